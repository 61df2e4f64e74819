"""A plan as the map that a person edits: what js/plan_map.js draws and adds up.

    layers   rows of FIELDS. chosen: number of the planned option. costs: for each option [bytes of tensors, bytes of
             header] and, with a table, [.., error, damage]; 0 where the layer cannot have it; [] for protected layers
    fixed    bytes of all the rest of the file, so that fixed + the bytes of every layer's option is its size (but for
             a few digits of offsets in the header)
    options  [name, title, whether a person may choose it]
    curve    least error by size, with ``chosen``: for each layer that is not protected its option, as one digit

Numbers have 4 digits; 1000 layers take less than 500 kB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..evidence.calibration import Calibration
from ..formats import title
from ..models.architectures import LayerInfo, map_rows
from ..models.source import Source
from ..planning.choices import reason_of
from ..planning.costs import OPTIONS, RANK, Cost, CostTable, entries, option_of, stored_bytes
from ..planning.edits import REASON
from ..planning.layout import branch_size, header_bytes
from ..planning.plan import Plan
from ..rounding.layerplan import LayerPlan

FIELDS = ("name", "type", "block", "shape", "protected", "chosen", "costs")
Priced = tuple[CostTable, Mapping[str, Mapping[str, float]]]  # with layer -> option -> damage


def document(
    source: Source,
    plan: Plan,
    options: Sequence[str],
    fixed: Mapping[str, str],
    priced: Priced | None = None,
    calibration: Calibration | None = None,
    before: Plan | None = None,
) -> dict[str, Any]:
    """options: that a person may choose. fixed: set by hand. calibration: whose activation scales are stored. before:
    the plan without ``fixed``, where it had not to be planned anew for them.
    """
    names = [*options, *(["bf16"] if "bf16" not in options else [])]
    chosen = {layer: option_of(plan.layers[layer]) for layer in source.layers}
    without = {layer: option_of(before.layers[layer]) for layer in fixed} if before else {}
    shown = list(dict.fromkeys([*names, *chosen.values(), *without.values()]))
    made = entries(source, tuple(names), calibration)
    size = plan.size + branch_size(source, plan)
    layers, rest, weights = [], size, 0
    for layer, info in source.layers.items():
        costs: list[Any] = []
        if layer in made:
            possible = {option: replace(entry, reason="") for option, entry in made[layer].items()}
            possible[chosen[layer]] = plan.layers[layer]
            costs = [_cost(source, layer, o, possible.get(o), priced) for o in shown]
            rest -= sum(costs[shown.index(chosen[layer])][:2])
            weights += math.prod(source.shape(layer))
        layers.append(_row(source, info, shown.index(chosen[layer]), costs))
    return {
        "source": source.name,
        "architecture": source.architecture.title,
        "size": size,
        "fixed": rest,
        "weights": weights,
        "options": [[name, _title(name), name in names] for name in shown],
        "types": map_rows(source.layers.values()),
        "fields": FIELDS,
        "layers": layers,
        "edits": dict(fixed),
        "before": without,
        **_predicted(plan, priced),
    }


def _title(option: str) -> str:
    name, _, rank = option.partition(RANK)
    fmt, full_precision = OPTIONS.get(name, (name, False))
    return title(fmt) + " W4A16" * full_precision + f" + rank {rank}" * bool(rank)


def _row(source: Source, info: LayerInfo, chosen: int, costs: list[Any]) -> list[Any]:
    why = info.protected or info.not_linear
    return [info.name, info.type, info.block, list(source.shape(info.name)), why, chosen, costs]


def _cost(source: Source, layer: str, option: str, entry: LayerPlan | None, priced: Priced | None) -> list[float] | int:
    """entry: the plan's own where this option is planned, else without a reason."""
    if entry is None:
        return 0
    told: list[float] = []
    reason = REASON
    if priced is not None:
        table, damages = priced
        cost = table.layers[layer].get(option, Cost(0.0, 0, ""))  # 16 bit need not be in the table
        damage = damages[layer].get(option, 0.0)
        told, reason = [_round(cost.error), _round(damage)], reason_of(table, cost, damage)
    entry = entry if entry.reason else replace(entry, reason=reason)  # for the length of the header
    return [stored_bytes(source, layer, entry), header_bytes(source, layer, entry), *told]


def _predicted(plan: Plan, priced: Priced | None) -> dict[str, Any]:
    """What the allocation says; nothing where none was made."""
    if plan.predicted is None or priced is None:
        return {}
    found, order = plan.predicted, list(priced[0].layers)
    curve = [{**point, "error": _round(point["error"])} for point in found["curve"]]
    assert all(len(point["chosen"]) == len(order) for point in curve)
    points = [{**point, "error": _round(point["error"])} for point in found["points"]]
    told = {name: found[name] for name in ("weighting", "measured", "bits")}
    kind, _, amount = plan.recipe.partition(" ")
    told |= {"kind": kind.replace("-", "_"), "amount": float(amount)}
    return {**told, "curve": curve, "points": points}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
