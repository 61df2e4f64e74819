"""Plans for a budget: the least damage in so many bytes, or the fewest bytes with so little damage.

``weighing`` says what an error is worth, ``choices`` puts it to the solver (``allocation``), ``outlook`` says what to
expect of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..evidence.calibration import Calibration
from ..evidence.probe import Probe
from ..models.source import Source
from . import outlook
from .choices import Choices, Wish
from .costs import CostTable
from .plan import Plan
from .weighing import weigh


@dataclass(frozen=True)
class Asked:
    """What a plan was made of, besides the source. scale: layer -> what its damages are multiplied by, else 1."""

    table: CostTable
    wish: Wish
    weighting: str | None = None
    calibration: Calibration | None = None
    probed: Probe | None = None
    scale: Mapping[str, float] = field(default_factory=dict)

    def damages(self, source: Source) -> tuple[str, dict[str, dict[str, float]]]:
        """The weighting, and layer -> option -> damage."""
        name, found = weigh(source, self.table, self.weighting, self.calibration, self.probed)
        return name, {n: {o: d * self.scale.get(n, 1.0) for o, d in options.items()} for n, options in found.items()}


def plan(
    source: Source,
    table: CostTable,
    wish: Wish,
    *,
    weighting: str | None = None,
    calibration: Calibration | None = None,
    probed: Probe | None = None,
    scale: Mapping[str, float] | None = None,
) -> Plan:
    """The best plan for a wish, with what is ``predicted`` of it. CalibQuantError where no plan can be had.

    weighting: one of ``weighing.WEIGHTINGS``. scale: see ``Asked``.
    """
    wish.check()
    asked = Asked(table, wish, weighting, calibration, probed, scale or {})
    used, choices = _choices(source, asked)
    made, gap = choices.fulfil()
    return replace(made, predicted=outlook.predicted(choices, source, used, made, gap), asked=asked)


def compared(source: Source, asked: Asked) -> dict[str, Plan]:
    """The plans beside the curve by name: one option everywhere, and the published recipes."""
    return dict(outlook.others(_choices(source, asked)[1], source))


def _choices(source: Source, asked: Asked) -> tuple[str, Choices]:
    """With the weighting."""
    weighting, damages = asked.damages(source)
    return weighting, Choices(source, asked.table, asked.wish, damages, asked.calibration)
