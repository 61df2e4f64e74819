"""From a card to a plan: what a person who knows no formats gets. One table; planning itself is ``recipes`` and
``budget``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..evidence.calibration import Calibration
from ..models.source import Source
from ..progress import Progress
from ..rounding.layerplan import LayerPlan
from . import budget, costs, recipes, rotation
from .costs import OPTIONS, CostTable, MadeWith
from .plan import Plan
from .recipes import RECIPES
from .targets import ANY, NATIVE, TARGETS, speed, this_gpu

THIS_MACHINE = "this machine's card"
# Errors below are of the final latent on a digits model that nobody tuned to, GPTQ, held out, as the loader runs it.
MIXED = 5.5  # bits a weight of NVFP4 with MXFP8: .0016, where all NVFP4 (4.5 bits) has .0040, all MXFP8 (8.25) .0005
NO_LIMIT = 32.0  # bits a weight that no format reaches: whatever errs least


@dataclass(frozen=True)
class Way:
    """One way to a plan, with why it is taken. Either a recipe, or the least error of ``options`` in ``bits`` a weight.

    needs: what of a calibration it cannot do without, "" for nothing.
    """

    why: str
    recipe: str = ""
    options: tuple[str, ...] = ()
    bits: float = 0.0
    needs: str = ""


@dataclass(frozen=True)
class Card:
    """A row of the table. gpu: a key of targets.GPUS. slug: of file names. ways: the first that can be had is taken."""

    gpu: str
    slug: str
    ways: tuple[Way, ...]


CALIBRATION, SENSITIVITIES = "a calibration", "a calibration with sensitivities"
_INT8 = Way(
    "INT8 is next to lossless at half the size, runs natively on RTX 20 and newer, and loads everywhere", "int8"
)
_W4A8 = Way(
    "W4A8 is about a quarter of the size, runs natively on RTX 30 and newer, and calibrated errs no more than FP8",
    "w4a8",
)
_BLACKWELL = ("nvfp4", "mxfp8")
CARDS: dict[str, Card] = {
    "RTX 50": Card(
        "blackwell",
        "rtx50",
        (
            Way(
                "NVFP4 where the model bears it, MXFP8 elsewhere",
                options=_BLACKWELL,
                bits=MIXED,
                needs=SENSITIVITIES,
            ),
            Way("the published mix of NVFP4 and MXFP8 for this family", "zimage-nvfp4-mixed"),
            Way("NVFP4 for most layers, MXFP8 for those that err most", options=_BLACKWELL, bits=MIXED),
        ),
    ),
    "RTX 40": Card(
        "ada",
        "rtx40",
        (
            Way("FP8 multiplies natively here with a calibration's activation scales", "fp8", needs=CALIBRATION),
            _INT8,
        ),
    ),
    "RTX 30": Card("ampere", "rtx30", (_W4A8, _INT8)),
    "RTX 20": Card("turing", "rtx20", (_INT8,)),
    "smallest file": Card(
        ANY,
        "smallest",
        (
            replace(_W4A8, why="W4A8 and NVFP4 are the smallest; W4A8 errs less (.0003 to .0040 on RTX 50)"),
            Way(
                "NVFP4 is the smallest that this ComfyUI loads: fast on RTX 50, small but no faster elsewhere", "nvfp4"
            ),
        ),
    ),
    "closest to the original": Card(
        ANY,
        "closest",
        (
            Way(
                "of the 8-bit formats the one that errs least, layer by layer",
                options=("fp8", "int8", "int8-convrot", "mxfp8"),
                bits=NO_LIMIT,
            ),
        ),
    ),
}
# Which row a card of targets.GPUS is; without a card of NVIDIA's what every ComfyUI loads.
_ROWS = {
    "blackwell": "RTX 50",
    "hopper": "RTX 40",
    "ada": "RTX 40",
    "ampere": "RTX 30",
    "turing": "RTX 20",
    ANY: "RTX 20",
}
CHOICES = (THIS_MACHINE, *CARDS)


def card_of(choice: str) -> Card:
    """The row that a choice means, on this machine."""
    if choice != THIS_MACHINE:
        return CARDS[choice]
    gpu = this_gpu()
    return replace(CARDS[_ROWS[gpu]], gpu=gpu)


def plan(
    source: Source,
    card: Card,
    *,
    calibration: Calibration | None = None,
    size: float = 0.0,
    comfyui: Path | None = None,
    tabled: Callable[[MadeWith], CostTable],
    progress: Progress | None = None,
) -> tuple[Plan, list[str]]:
    """The plan for a card, and a few lines on why it is as it is.

    size: bytes of the file, 0 for as few as are good for the card. comfyui: whose loader must read the file. tabled is
    asked for a cost table where one is needed: measured with the calibration, guessed without one.
    Raises CalibQuantError for a size that cannot be had.
    """
    readable = costs.choose_options(None, card.gpu, comfyui)
    if size:
        fast = [o for o in readable if card.gpu == ANY or speed(LayerPlan(OPTIONS[o][0], ""), card.gpu) == NATIVE]
        way, notes = Way(f"the least error in {size / 1e9:g} GB", options=(*dict.fromkeys([*fast, "bf16"]),)), []
    else:
        way, notes = _way(source, card, calibration, {OPTIONS[option][0] for option in readable})
    if way.recipe:
        made = recipes.make_plan(source, way.recipe)
        made = made if calibration is None else recipes.calibrated(source, made, calibration)
        made = rotation.rotated(source, made, "auto", calibration, progress)
    else:
        wish = budget.Wish("size", size) if size else budget.Wish("bits", way.bits)
        table = tabled(costs.made_with(source, card.gpu, way.options, calibration=calibration))
        made = budget.plan(
            source, table, wish, weighting=_weighting(source, table, calibration), calibration=calibration
        )
    if calibration is None and any(TARGETS[fmt].bits < 8 for fmt in made.count() if fmt in TARGETS):
        notes.append("no calibration is linked: 4-bit layers err several times more than they need to")
    return replace(made, gpu=card.gpu), [f"why: {way.why}", *notes]


def _way(source: Source, card: Card, calibration: Calibration | None, readable: set[str]) -> tuple[Way, list[str]]:
    """The first way that can be had, and what would open those before it."""
    has = {"", *([CALIBRATION] if calibration else []), *([SENSITIVITIES] if _sensitive(calibration) else [])}
    notes = []
    for way in card.ways:
        recipe = RECIPES.get(way.recipe)
        if recipe and recipe.architectures and source.architecture.name not in recipe.architectures:
            continue
        unread = [TARGETS[recipe.base]] if recipe and recipe.base not in readable else []
        if unread:
            notes.append(
                f"this ComfyUI cannot load {unread[0].title}, which needs {unread[0].core_needed()}: update it"
            )
        elif way.needs not in has:
            notes.append(f"better with {way.needs} linked: {way.why}")
        else:
            return way, notes
    raise AssertionError("the last way of a card needs nothing")


def _sensitive(calibration: Calibration | None) -> bool:
    return calibration is not None and bool(calibration.sensitivities)


def _weighting(source: Source, table: CostTable, calibration: Calibration | None) -> str:
    """Sensitivities (.0016 at 5.5 bits), else output variance (.0020; at random .0032), else nothing."""
    if table.has_damage:
        return "gradient"
    known = calibration.layers if calibration else {}
    return "hswq" if all(source.short(name) in known for name in table.layers) else "uniform"
