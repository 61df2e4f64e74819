"""A cost table and a wish in the solver's terms (``allocation``), and the plans that its solutions are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration
from ..files.text import gigabytes
from ..formats import SOURCE
from ..models.source import Source
from ..rounding.layerplan import LayerPlan
from . import edits, folds
from .allocation import Item, Solution, least_bytes, least_damage
from .costs import Cost, CostTable, entries
from .layout import branch_size, header_bytes, layer_specs
from .plan import Plan
from .recipes import sized, summary
from .targets import NATIVE, multiplications

KINDS = {"size": "a file of {} bytes", "bits": "{:g} bits a weight", "max_error": "an error of {:g}"}
ROUNDS = 5  # of solving again because the header turned out longer than estimated


@dataclass(frozen=True)
class Wish:
    """What is asked for. kind: ``size``, bytes of the whole file, with a split of both; ``bits``, all tensors of the
    layers that may be quantized per weight of theirs; or ``max_error``, the total damage. tied: layers of a block that
    see one input (q, k and v; gate and up) get one format. max_slow: the share of the multiplications of those layers
    that may run outside native kernels.
    fixed: layer -> option, set by hand: counted, and stronger than a tie.
    """

    kind: str
    amount: float
    tied: bool = False
    max_slow: float | None = None
    fixed: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        if self.kind not in KINDS or not 0 < self.amount < math.inf:
            raise OptionError(f"{self.amount:g} is no {self.kind} to keep to: must be above 0")
        if self.max_slow is not None and not 0 <= self.max_slow <= 1:
            raise OptionError(f"--max-slow {self.max_slow:g}: must lie between 0 and 1")

    def __str__(self) -> str:
        return KINDS[self.kind].format(int(self.amount) if self.kind == "size" else self.amount)


def reason_of(table: CostTable, cost: Cost, damage: float) -> str:
    """What a plan says of a layer's option."""
    of = "output error as loaded" if table.measured else "weight error"
    return f"{of} {cost.error:.1e}, damage {damage:.1e}"


@dataclass(frozen=True)
class Option:
    """nbytes: of tensors. header: bytes that it adds to headers, but for the digits of offsets. slow: work outside
    native kernels."""

    entry: LayerPlan
    damage: float
    nbytes: int
    header: int
    slow: float


Groups = list[tuple[list[str], list[str]]]  # layers that get one option, and the options that they may get


class Choices:
    """One table in the solver's terms, and plans made of what the solver says."""

    def __init__(
        self,
        source: Source,
        table: CostTable,
        wish: Wish,
        damages: Mapping[str, Mapping[str, float]],
        calibration: Calibration | None,
    ) -> None:
        self._source, self.table, self._wish = source, table, wish
        self._calibration = calibration
        self.scales = calibration if table.made_with.input_scale else None
        seen = self.scales and folds.seen(source, table.folds, self.scales)
        made = entries(source, table.made_with.options, seen)
        self._work = {name: multiplications(source, calibration, name) for name in table.layers}
        self.layers = {
            name: {o: self._option(name, o, made[name][o], damage) for o, damage in damages[name].items()}
            for name in table.layers
        }
        self.free = self._tie() if wish.tied else [([name], list(o)) for name, o in self.layers.items()]
        for name, option in wish.fixed.items():
            self._set_by_hand(name, option)
        rest = [([n for n in names if n not in wish.fixed], options) for names, options in self.free]
        self._groups = [g for g in rest if g[0]] + [([name], [option]) for name, option in wish.fixed.items()]
        self._weights = sum(math.prod(source.shape(name)) for name in table.layers)
        least = self._assemble(least_bytes(self.items(self.file_bytes)))
        # Bytes of all the rest of the file.
        self.rest = self.size(least) - sum(map(self.file_bytes, self.chosen(least)))

    def _option(self, name: str, option: str, entry: LayerPlan, damage: float) -> Option:
        cost = self.table.layers[name][option]
        branch = f"; branch of rank {entry.rank}" * bool(entry.rank)
        entry = replace(entry, reason=reason_of(self.table, cost, damage) + branch)
        rows, columns = self._source.shape(name)
        slow = entry.rank * (1 / rows + 1 / columns) if cost.speed == NATIVE else 1.0
        return Option(entry, damage, cost.nbytes, header_bytes(self._source, name, entry), slow * self._work[name])

    def _set_by_hand(self, name: str, option: str) -> None:
        """Check it, and say so in the plan; a layer may stay in 16 bit though the table has no such option."""
        made, options = edits.entry(self._source, name, option), self.layers[name]
        if option not in options and made.format != SOURCE:
            where = f"{self._source.path}: layer {name}"
            raise CalibQuantError(f"{where}: {option} is not among the formats of this plan: add it to --formats")
        known = options.get(option) or self._kept(name, made)
        entry = replace(known.entry, reason=f"{edits.REASON}; {known.entry.reason}".removesuffix(f"; {edits.REASON}"))
        options[option] = replace(known, entry=entry, header=header_bytes(self._source, name, entry))

    def _kept(self, name: str, entry: LayerPlan) -> Option:
        """A layer in 16 bit where the table has no such option."""
        kept = sum(spec.nbytes for spec in layer_specs(self._source, name, LayerPlan(SOURCE, "")))
        return Option(entry, 0.0, kept, 0, self._work[name])

    def _tie(self) -> Groups:
        """Layers that see one input in one block, with the options that all of them have."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name in self.layers:
            info = self._source.layers[name]
            alone = not info.shared_input
            key = (name,) if alone else (info.shared_input, info.subgraph, info.block)
            groups.setdefault(key, []).append(name)
        tied = []
        for names in groups.values():
            every = dict.fromkeys([*self.table.made_with.options, "bf16"])
            common = [o for o in every if all(o in self.layers[name] for name in names)]
            if not common:
                raise CalibQuantError(
                    f"{self._source.path}: layer {names[0]}: no format fits all of its tied layers: allow bf16"
                )
            tied.append((names, common))
        return tied

    @staticmethod
    def file_bytes(option: Option) -> float:
        return option.nbytes + option.header

    def items(self, nbytes: Callable[[Option], float], groups: Groups | None = None) -> list[Item]:
        def sums(names: list[str], options: list[str], value: Callable[[Option], float]) -> np.ndarray[Any, Any]:
            return np.array([sum(value(self.layers[n][o]) for n in names) for o in options], np.float64)

        return [
            Item(sums(*group, lambda o: o.damage), sums(*group, nbytes), sums(*group, lambda o: o.slow))
            for group in groups or self._groups
        ]

    def max_slow(self) -> float | None:
        return None if self._wish.max_slow is None else self._wish.max_slow * sum(self._work.values())

    # --- plans

    def _assemble(self, solution: Solution | None) -> Plan:
        """The plan of a solution, with its exact size."""
        if solution is None:
            raise CalibQuantError(
                f"{self._source.path}: these formats run too little natively on {self.table.made_with.gpu} for a "
                f"--max-slow of {self._wish.max_slow:g}: allow more, or other formats"
            )
        chosen = {
            name: options[i]
            for (names, options), i in zip(self._groups, solution.chosen, strict=True)
            for name in names
        }
        return self.plan({name: self.layers[name][option].entry for name, option in chosen.items()})

    def plan(self, chosen: Mapping[str, LayerPlan]) -> Plan:
        source, kept = self._source, self._source.layers
        layers = {n: chosen.get(n, LayerPlan(SOURCE, kept[n].protected or kept[n].not_linear)) for n in kept}
        name = f"{self._wish.kind.replace('_', '-')} {self._wish.amount:.12g}"
        seen = None if self._calibration is None else summary(self._calibration)
        made = Plan(source.architecture.name, name, source.name, layers, calibration=seen)
        return sized(source, replace(made, gpu=self.table.made_with.gpu, folds=self.table.folds))

    def size(self, made: Plan) -> int:
        """Of all that must be stored: the file, and a split's other one."""
        return made.size + branch_size(self._source, made)

    def chosen(self, made: Plan) -> list[Option]:
        """The options of a plan, of this one or another; KeyError where the table does not know one."""
        found = []
        for name, entry in made.layers.items():
            if name in self.layers:
                known = {_key(o.entry): o for o in self.layers[name].values()}
                known.setdefault(_key(LayerPlan(SOURCE, "")), self._kept(name, entry))
                found.append(known[_key(entry)])
            elif entry.format != SOURCE:
                raise KeyError(name)
        return found

    def fulfil(self) -> tuple[Plan, float]:
        """The plan, and by which share of the optimum it may fall short of it."""
        wish, slow = self._wish, self.max_slow()
        if wish.kind == "max_error":
            solution = least_bytes(self.items(self.file_bytes), wish.amount, slow)
        elif wish.kind == "bits":
            solution = least_damage(self.items(lambda o: o.nbytes), wish.amount * self._weights / 8, slow)
        else:
            solution = self._within_size(slow)
        if solution is None:
            raise self._impossible(slow)
        return self._assemble(solution), solution.gap

    def _within_size(self, slow: float | None) -> Solution | None:
        items, allowed = self.items(self.file_bytes), self._wish.amount - self.rest
        for _ in range(ROUNDS):
            solution = least_damage(items, allowed, slow)
            if solution is None:
                break
            over = self.size(self._assemble(solution)) - self._wish.amount
            if over <= 0:
                return solution
            allowed -= over
        smallest = least_bytes(items, max_slow=slow)  # may fit where its estimate did not
        return smallest if smallest and self.size(self._assemble(smallest)) <= self._wish.amount else None

    def _impossible(self, slow: float | None) -> CalibQuantError:
        if self._wish.kind == "max_error":
            items = self.items(self.file_bytes)
            best = self._assemble(least_damage(items, math.inf, slow))
            can = f"the least error that these formats have is {self.error(best):.3g}"
        else:
            nbytes = self.file_bytes if self._wish.kind == "size" else lambda o: o.nbytes
            asked, least = self._wish, least_bytes(self.items(nbytes), max_slow=slow)
            best = self._assemble(least)
            if asked.kind == "size":  # the header names the size asked for, with more digits than too small a one
                self._wish = replace(asked, amount=self.size(best))
                best, self._wish = self._assemble(least), asked
            size = self.size(best)
            can = f"the smallest that these formats make is {size} bytes ({gigabytes(size)})"
            can += f", {self.bits(best):.3f} bits a weight"
        return CalibQuantError(f"{self._source.path}: {self._wish} cannot be had: {can}: allow more, or other formats")

    def error(self, made: Plan) -> float:
        return sum(o.damage for o in self.chosen(made))

    def bits(self, made: Plan) -> float:
        return 8 * sum(o.nbytes for o in self.chosen(made)) / self._weights

    def slow_share(self, made: Plan) -> float:
        """Of the multiplications of these layers, outside native kernels."""
        return sum(o.slow for o in self.chosen(made)) / (sum(self._work.values()) or 1.0)


def _key(entry: LayerPlan) -> tuple[str, bool, int]:
    """What tells a layer's options apart."""
    return entry.format, entry.full_precision, entry.rank
