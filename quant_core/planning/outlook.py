"""What to expect of a plan for a budget: its error and size, the curve of least errors, plans to compare it with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..models.source import Source
from .allocation import Solution, least_bytes, least_damage
from .choices import Choices
from .costs import layer_plan
from .plan import Plan
from .recipes import RECIPES, calibrated, legal, make_plan, sized

POINTS, CURVE_GAP = 9, 0.005  # of the curve, and how far above the least errors it may run
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of options


def predicted(choices: Choices, source: Source, weighting: str, made: Plan, gap: float) -> dict[str, Any]:
    """What is said of a plan: its error and size, how it was weighed, the curve, and plans to compare it with."""
    points = [point for name, other in others(choices, source) for point in _point(choices, name, other)]
    return {
        "error": choices.error(made),
        "size": choices.size(made),  # with a split's other file
        "bits": choices.bits(made),
        "native_share": 1 - choices.slow_share(made),
        "weighting": weighting,
        "measured": choices.table.measured,
        "gap": gap,
        "curve": _curve(choices),
        "points": points,  # uniform plans and recipes, to be drawn beside the curve
        "controls": _controls(points, choices.size(made)),
    }


def _curve(choices: Choices) -> list[dict[str, Any]]:
    """The least error at sizes from the smallest possible to that of the least error, nothing set by hand.

    chosen: for each layer of the table the number of its option in ``table.options``, as one digit.
    """
    items, slow = choices.items(choices.file_bytes, choices.free), choices.max_slow()
    ends = least_bytes(items, max_slow=slow), least_damage(items, math.inf, slow)
    totals = [end.total([i.nbytes for i in items]) for end in ends if end]
    curve = []
    for limit in np.geomspace(min(totals), max(totals), POINTS):
        solution = ends[0] if limit <= min(totals) else least_damage(items, float(limit), slow, CURVE_GAP)
        if solution:
            error = solution.total([i.damage for i in items])
            size = round(choices.rest + solution.total([i.nbytes for i in items]))
            curve.append({"size": size, "error": error, "chosen": _digits(choices, solution)})
    return curve


def _digits(choices: Choices, solution: Solution) -> str:
    made = zip(choices.free, solution.chosen, strict=True)
    digits = {n: DIGITS[choices.table.options.index(options[i])] for (names, options), i in made for n in names}
    return "".join(digits[name] for name in choices.layers)


def others(choices: Choices, source: Source) -> Iterator[tuple[str, Plan]]:
    """Every option wherever it fits, with what falls back in its place; and this family's published recipes."""
    infos, family = source.layers, source.architecture.name
    for option in choices.table.made_with.options:
        entry = replace(layer_plan(option), reason=f"every layer {option}")
        ranks = {n: entry.rank * (option in choices.layers[n]) for n in choices.layers}
        if entry.rank and not any(ranks.values()):
            continue
        chosen = {n: legal(replace(entry, rank=r), infos[n], source.shape(n)) for n, r in ranks.items()}
        yield entry.reason, _scaled(choices, source, choices.plan(chosen))
    for recipe in RECIPES.values():
        if recipe.rules and family in (recipe.architectures or (family,)):
            yield f"recipe {recipe.name}", _scaled(choices, source, make_plan(source, recipe))


def _scaled(choices: Choices, source: Source, made: Plan) -> Plan:
    made = sized(source, replace(made, folds=choices.table.folds)) if choices.table.folds else made
    return made if choices.scales is None else calibrated(source, made, choices.scales)


def _point(choices: Choices, name: str, made: Plan) -> list[dict[str, Any]]:
    """One plan as a point beside the curve; none where the table does not know all of its formats."""
    try:
        return [{"name": name, "size": choices.size(made), "error": choices.error(made)}]
    except KeyError:
        return []


def _controls(points: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """What a plan must be better than: the best of one format that is no larger, and whatever is nearest in bytes."""
    smaller = [p for p in points if p["size"] <= size and p["name"].startswith("every")]
    best = min(smaller, key=lambda p: p["error"], default=None)
    nearest = min(points, key=lambda p: abs(p["size"] - size), default=None)
    found = [p for p in (best, nearest) if p is not None]
    return found[:1] if len(found) == 2 and found[0] is found[1] else found
