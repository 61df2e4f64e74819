"""Plans for a budget: the least damage in so many bytes, or the fewest bytes with so little damage (``allocation``).

The damage of a layer is its error (``costs``) times a weight. Four weightings say what an error is worth:

    gradient  what the layer's error does to the model's own prediction, by gradients that the calibration holds
    hswq      the layer's output variance, by which HSWQ ranks layers: about its absolute squared error
    score     quant_probe's score of the weights
    uniform   the same everywhere

By gradient, damages add up to the relative squared change of the prediction, as far as it lasts over the steps of
sampling (``costs``); by the others to a weighted mean of the layers' relative errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration
from ..evidence.probe import Probe
from ..files.checkpoint import make_header
from ..files.markers import METADATA_KEY, PROVENANCE_KEY
from ..files.text import gigabytes
from ..formats import SOURCE
from ..models.source import Source
from ..rounding.layerplan import LayerPlan
from . import scoring
from .allocation import Item, Solution, least_bytes, least_damage
from .costs import OPTIONS, CostTable, entries
from .layout import layer_config, layer_specs
from .plan import Plan
from .recipes import RECIPES, calibrated, legal, make_plan, sized, summary
from .targets import NATIVE

WEIGHTINGS = ("gradient", "hswq", "score", "uniform")
KINDS = {"size": "a file of {} bytes", "bits": "{:g} bits a weight", "max_error": "an error of {:g}"}
POINTS, CURVE_GAP = 9, 0.005  # of the size-error curve, and how far above the least errors it may run
ROUNDS = 5  # of solving again because the header turned out longer than estimated


@dataclass(frozen=True)
class Wish:
    """What is asked for. kind: ``size``, bytes of the whole file; ``bits``, all tensors of the layers that may be
    quantized per weight of theirs; or ``max_error``, the total damage. tied: layers of a block that see one input
    (q, k and v; gate and up) get one format. max_slow: the share of the multiplications of those layers that may run
    outside native kernels.
    """

    kind: str
    amount: float
    tied: bool = False
    max_slow: float | None = None

    def check(self) -> None:
        if self.kind not in KINDS or not 0 < self.amount < math.inf:
            raise OptionError(f"{self.amount:g} is no {self.kind} to keep to: must be above 0")
        if self.max_slow is not None and not 0 <= self.max_slow <= 1:
            raise OptionError(f"--max-slow {self.max_slow:g}: must lie between 0 and 1")

    def __str__(self) -> str:
        return KINDS[self.kind].format(int(self.amount) if self.kind == "size" else self.amount)


def plan(
    source: Source,
    table: CostTable,
    wish: Wish,
    *,
    weighting: str | None = None,
    calibration: Calibration | None = None,
    probed: Probe | None = None,
) -> Plan:
    """The best plan for a wish, with what is ``predicted`` of it. CalibQuantError where no plan can be had."""
    wish.check()
    budget = _Budget(source, table, wish, *weigh(source, table, weighting, calibration, probed), calibration)
    made, gap = budget.fulfil()
    return replace(made, predicted=budget.predicted(made, gap))


def weigh(
    source: Source,
    table: CostTable,
    weighting: str | None = None,
    calibration: Calibration | None = None,
    probed: Probe | None = None,
) -> tuple[str, dict[str, dict[str, float]]]:
    """The weighting (gradient where the table has it, else uniform), and layer -> option -> damage."""
    chosen = weighting or ("gradient" if table.has_damage else "uniform")
    if chosen == "gradient":
        if not table.has_damage:
            raise CalibQuantError(
                f"{source.path}: the calibration says nothing of sensitivity: collect it, or weigh by hswq or uniform"
            )
        return chosen, {n: {o: cost.damage or 0.0 for o, cost in c.items()} for n, c in table.layers.items()}
    weights = _weights(source, table, chosen, calibration, probed)
    total = sum(weights.values()) or 1.0
    return chosen, {n: {o: cost.error * weights[n] / total for o, cost in c.items()} for n, c in table.layers.items()}


def _weights(
    source: Source, table: CostTable, weighting: str, calibration: Calibration | None, probed: Probe | None
) -> dict[str, float]:
    if weighting == "uniform":
        return dict.fromkeys(table.layers, 1.0)
    if weighting == "hswq" and calibration is not None:
        seen = {name: calibration.layers.get(name.removeprefix(source.prefix)) for name in table.layers}
        if missing := [name for name, stats in seen.items() if stats is None]:
            raise CalibQuantError(f"{source.path}: layer {missing[0]} is not in the calibration: calibrate this model")
        return {name: stats.output_variance for name, stats in seen.items() if stats is not None}
    if weighting == "score" and probed is not None:
        scores = {d.layer.name: d.score for d in scoring.decide(probed).decisions}
        return {name: scores.get(name, 0.0) for name in table.layers}
    if weighting in WEIGHTINGS:
        raise OptionError(f"weighting {weighting} needs a {'calibration' if weighting == 'hswq' else 'probe'}")
    raise OptionError(f"weighting {weighting!r}: use one of {', '.join(WEIGHTINGS)}")


@dataclass(frozen=True)
class _Option:
    """nbytes: of tensors. header: bytes that it adds to the header, but for the digits of offsets. slow: work outside
    native kernels."""

    entry: LayerPlan
    damage: float
    nbytes: int
    header: int
    slow: float


class _Budget:
    """One table in the solver's terms, and plans made of what the solver says."""

    def __init__(
        self,
        source: Source,
        table: CostTable,
        wish: Wish,
        weighting: str,
        damages: Mapping[str, Mapping[str, float]],
        calibration: Calibration | None,
    ) -> None:
        self._source, self._table, self._wish, self._weighting = source, table, wish, weighting
        self._calibration = calibration
        self._scales = calibration if table.made_with.input_scale else None
        made = entries(source, table.made_with.options, self._scales)
        self._work = {name: _multiplications(source, calibration, name) for name in table.layers}
        self._layers = {
            name: {o: self._option(name, o, made[name][o], damage) for o, damage in damages[name].items()}
            for name in table.layers
        }
        self._groups = self._tie() if wish.tied else [([name], list(o)) for name, o in self._layers.items()]
        self._weights = sum(math.prod(source.shape(name)) for name in table.layers)
        least = self._assemble(least_bytes(self._items(self._file_bytes)))
        self._fixed = least.size - sum(map(self._file_bytes, self._chosen(least)))  # bytes of all the rest of the file

    def _option(self, name: str, option: str, entry: LayerPlan, damage: float) -> _Option:
        cost = self._table.layers[name][option]
        of = "output error as loaded" if self._table.measured else "weight error"
        entry = replace(entry, reason=f"{of} {cost.error:.1e}, damage {damage:.1e}")
        slow = 0.0 if cost.speed == NATIVE else self._work[name]
        return _Option(entry, damage, cost.nbytes, _header(self._source, name, entry), slow)

    def _tie(self) -> list[tuple[list[str], list[str]]]:
        """Layers that see one input in one block, with the options that all of them have."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name in self._layers:
            info = self._source.layers[name]
            alone = not info.shared_input
            key = (name,) if alone else (info.shared_input, info.subgraph, info.block)
            groups.setdefault(key, []).append(name)
        tied = []
        for names in groups.values():
            common = [o for o in OPTIONS if all(o in self._layers[name] for name in names)]
            if not common:
                raise CalibQuantError(
                    f"{self._source.path}: layer {names[0]}: no format fits all of its tied layers: allow bf16"
                )
            tied.append((names, common))
        return tied

    @staticmethod
    def _file_bytes(option: _Option) -> float:
        return option.nbytes + option.header

    def _items(self, nbytes: Callable[[_Option], float]) -> list[Item]:
        def sums(names: list[str], options: list[str], value: Callable[[_Option], float]) -> np.ndarray[Any, Any]:
            return np.array([sum(value(self._layers[n][o]) for n in names) for o in options], np.float64)

        return [
            Item(sums(*group, lambda o: o.damage), sums(*group, nbytes), sums(*group, lambda o: o.slow))
            for group in self._groups
        ]

    def _max_slow(self) -> float | None:
        return None if self._wish.max_slow is None else self._wish.max_slow * sum(self._work.values())

    # --- plans

    def _assemble(self, solution: Solution | None) -> Plan:
        """The plan of a solution, with its exact size."""
        if solution is None:
            raise CalibQuantError(
                f"{self._source.path}: these formats run too little natively on {self._table.made_with.gpu} for a "
                f"--max-slow of {self._wish.max_slow:g}: allow more, or other formats"
            )
        chosen = {
            name: options[i]
            for (names, options), i in zip(self._groups, solution.chosen, strict=True)
            for name in names
        }
        return self._plan({name: self._layers[name][option].entry for name, option in chosen.items()})

    def _plan(self, chosen: Mapping[str, LayerPlan]) -> Plan:
        source, kept = self._source, self._source.layers
        layers = {n: chosen.get(n, LayerPlan(SOURCE, kept[n].protected or kept[n].not_linear)) for n in kept}
        name = f"{self._wish.kind.replace('_', '-')} {self._wish.amount:.12g}"
        seen = None if self._calibration is None else summary(self._calibration)
        made = Plan(source.architecture.name, name, source.name, layers, calibration=seen)
        return sized(source, replace(made, gpu=self._table.made_with.gpu))

    def _chosen(self, made: Plan) -> list[_Option]:
        """The options of a plan, of this one or another; KeyError where the table does not know one."""
        found = []
        for name, entry in made.layers.items():
            if name in self._layers:
                known = {(o.entry.format, o.entry.full_precision): o for o in self._layers[name].values()}
                kept = sum(spec.nbytes for spec in layer_specs(self._source, name, LayerPlan(SOURCE, "")))
                known.setdefault((SOURCE, False), _Option(entry, 0.0, kept, 0, self._work[name]))
                found.append(known[entry.format, entry.full_precision])
            elif entry.format != SOURCE:
                raise KeyError(name)
        return found

    def fulfil(self) -> tuple[Plan, float]:
        """The plan, and by which share of the optimum it may fall short of it."""
        wish, slow = self._wish, self._max_slow()
        if wish.kind == "max_error":
            solution = least_bytes(self._items(self._file_bytes), wish.amount, slow)
        elif wish.kind == "bits":
            solution = least_damage(self._items(lambda o: o.nbytes), wish.amount * self._weights / 8, slow)
        else:
            solution = self._within_size(slow)
        if solution is None:
            raise self._impossible(slow)
        return self._assemble(solution), solution.gap

    def _within_size(self, slow: float | None) -> Solution | None:
        items, allowed = self._items(self._file_bytes), self._wish.amount - self._fixed
        for _ in range(ROUNDS):
            solution = least_damage(items, allowed, slow)
            if solution is None:
                break
            over = self._assemble(solution).size - self._wish.amount
            if over <= 0:
                return solution
            allowed -= over
        smallest = least_bytes(items, max_slow=slow)  # may fit where its estimate did not
        return smallest if smallest and self._assemble(smallest).size <= self._wish.amount else None

    def _impossible(self, slow: float | None) -> CalibQuantError:
        if self._wish.kind == "max_error":
            items = self._items(self._file_bytes)
            best = self._assemble(least_damage(items, math.inf, slow))
            can = f"the least error that these formats have is {self._error(best):.3g}"
        else:
            nbytes = self._file_bytes if self._wish.kind == "size" else lambda o: o.nbytes
            best = self._assemble(least_bytes(self._items(nbytes), max_slow=slow))
            can = f"the smallest that these formats make is {best.size} bytes ({gigabytes(best.size)})"
            can += f", {self._bits(best):.3f} bits a weight"
        return CalibQuantError(f"{self._source.path}: {self._wish} cannot be had: {can}: allow more, or other formats")

    def _error(self, made: Plan) -> float:
        return sum(o.damage for o in self._chosen(made))

    def _bits(self, made: Plan) -> float:
        return 8 * sum(o.nbytes for o in self._chosen(made)) / self._weights

    # --- what to expect

    def predicted(self, made: Plan, gap: float) -> dict[str, Any]:
        """What is said of a plan: its error and size, how it was weighed, the curve, and plans to compare it with."""
        slow = sum(o.slow for o in self._chosen(made)) / (sum(self._work.values()) or 1.0)
        points = [*self._uniform(), *self._recipes()]
        return {
            "error": self._error(made),
            "bits": self._bits(made),
            "native_share": 1 - slow,
            "weighting": self._weighting,
            "measured": self._table.measured,
            "gap": gap,
            "curve": self._curve(),
            "points": points,  # uniform plans and recipes, to be drawn beside the curve
            "controls": _controls(points, made.size),
        }

    def _curve(self) -> list[dict[str, float]]:
        """The least error at sizes from the smallest possible to that of the least error."""
        items, slow = self._items(self._file_bytes), self._max_slow()
        ends = least_bytes(items, max_slow=slow), least_damage(items, math.inf, slow)
        totals = [end.total([i.nbytes for i in items]) for end in ends if end]
        curve = []
        for limit in np.geomspace(min(totals), max(totals), POINTS):
            solution = ends[0] if limit <= min(totals) else least_damage(items, float(limit), slow, CURVE_GAP)
            if solution:
                error = solution.total([i.damage for i in items])
                made = {"size": round(self._fixed + solution.total([i.nbytes for i in items])), "error": error}
                curve.append(made)
        return curve

    def _uniform(self) -> list[dict[str, Any]]:
        """Every option wherever it fits, with what falls back in its place."""
        found = []
        for option in self._table.made_with.options:
            fmt, full_precision = OPTIONS[option]
            wish, infos = LayerPlan(fmt, f"every layer {option}", full_precision), self._source.layers
            chosen = {n: legal(wish, infos[n], self._source.shape(n)) for n in self._layers}
            found += self._point(f"every layer {option}", self._plan(chosen))
        return found

    def _recipes(self) -> list[dict[str, Any]]:
        """The published recipes of this family."""
        family = self._source.architecture.name
        fitting = [r for r in RECIPES.values() if r.rules and family in (r.architectures or (family,))]
        return [p for r in fitting for p in self._point(f"recipe {r.name}", make_plan(self._source, r))]

    def _point(self, name: str, made: Plan) -> list[dict[str, Any]]:
        """One plan as a point beside the curve; none where the table does not know all of its formats."""
        made = made if self._scales is None else calibrated(self._source, made, self._scales)
        try:
            return [{"name": name, "size": made.size, "error": self._error(made)}]
        except KeyError:
            return []


def _controls(points: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """What a plan must be better than: the best of one format that is no larger, and whatever is nearest in bytes."""
    smaller = [p for p in points if p["size"] <= size and p["name"].startswith("every")]
    best = min(smaller, key=lambda p: p["error"], default=None)
    nearest = min(points, key=lambda p: abs(p["size"] - size), default=None)
    found = [p for p in (best, nearest) if p is not None]
    return found[:1] if len(found) == 2 and found[0] is found[1] else found


def _multiplications(source: Source, calibration: Calibration | None, layer: str) -> float:
    """Of one layer while the calibration ran; without one of one row."""
    seen = calibration.layers.get(layer.removeprefix(source.prefix)) if calibration else None
    return float(math.prod(source.shape(layer))) * (seen.count if seen else 1)


def _header(source: Source, layer: str, entry: LayerPlan) -> int:
    """Bytes of the file's header that are this layer's."""
    config = layer_config(entry, source.shape(layer))
    ours = {METADATA_KEY: json.dumps({layer: config})} if config else {}
    ours[PROVENANCE_KEY] = json.dumps({layer: [entry.format, entry.reason]}, ensure_ascii=False)
    return len(make_header(layer_specs(source, layer, entry), ours)[0])
