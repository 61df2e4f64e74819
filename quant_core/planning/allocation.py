"""One option for each item: the least damage within a number of bytes, or the fewest bytes within a damage.

The multiple-choice knapsack, by scipy's mixed-integer solver (HiGHS). Damages add up: of single layers of the demo
model's kind .00434, of all together .0039-.0044 (facts/activations.md §7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
GAP = 1e-4  # relative, that is good enough
# Of the search tree, before the solver hands over the best it has, with its gap. 227 layers of one and the same
# distribution, the worst case: .1 to .5 s on one core and a gap up to 1.4 %, where 20 s would not close it either.
NODES = 500
ROUNDS = 20  # of tightening a limit that the solver's tolerance overstepped
LEAST_LEFT = 1e-9  # of a limit in floating point


@dataclass(frozen=True)
class Item:
    """Layers that get one option together. damage, nbytes, slow (work outside native kernels): [options]."""

    damage: Vector
    nbytes: Vector
    slow: Vector


@dataclass(frozen=True)
class Solution:
    """chosen: per item the index of its option. gap: how far from the optimum at most, as a share of the objective."""

    chosen: list[int]
    gap: float

    def total(self, values: Sequence[Vector]) -> float:
        return float(sum(value[i] for value, i in zip(values, self.chosen, strict=True)))


def least_damage(
    items: Sequence[Item], max_bytes: float, max_slow: float | None = None, gap: float = GAP
) -> Solution | None:
    """None where no choice keeps within the limits."""
    limits = [([i.nbytes for i in items], max_bytes), ([i.slow for i in items], max_slow)]
    return _solve([i.damage for i in items], limits, gap)


def least_bytes(
    items: Sequence[Item], max_damage: float | None = None, max_slow: float | None = None
) -> Solution | None:
    limits = [([i.damage for i in items], max_damage), ([i.slow for i in items], max_slow)]
    return _solve([i.nbytes for i in items], limits, GAP)


def _solve(wanted: list[Vector], bounded: list[tuple[list[Vector], float | None]], gap: float) -> Solution | None:
    """The least sum of ``wanted`` with every bounded sum up to its limit (None: without one), which holds exactly."""
    limits = [(values, most) for values, most in bounded if most is not None and most < math.inf]
    allowed = [most for _, most in limits]
    for _ in range(ROUNDS):
        found = _milp(wanted, [values for values, _ in limits], allowed, gap)
        if found is None:
            return None
        over = [found.total(values) - most for values, most in limits]
        if all(excess <= LEAST_LEFT * abs(most) for excess, (_, most) in zip(over, limits, strict=True)):
            return found
        allowed = [most - max(excess, 0.0) for most, excess in zip(allowed, over, strict=True)]
    return None


def _milp(
    wanted: list[Vector], bounded: list[list[Vector]], limits: list[float], gap: float, nodes: int | None = NODES
) -> Solution | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(values) for values in wanted]
    starts = np.cumsum([0, *sizes])
    item = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_array((np.ones(starts[-1]), (item, np.arange(starts[-1]))))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for values, most in zip(bounded, limits, strict=True):
        row = np.concatenate(values)
        unit = max(row.max(), 1e-300)  # the solver's tolerances are absolute
        constraints.append(LinearConstraint(row[None] / unit, -np.inf, most / unit))
    objective = np.concatenate(wanted)
    done = milp(
        objective / max(objective.max(), 1e-300) * 100,  # absolute, too, is the gap that it is content with: 1e-6
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap} | ({"node_limit": nodes} if nodes else {}),
    )
    if done.x is None:  # 2: infeasible; else it had found nothing yet
        return None if done.status == 2 or not nodes else _milp(wanted, bounded, limits, gap, None)
    chosen = [int(np.argmax(done.x[a:b])) for a, b in pairwise(starts)]
    return Solution(chosen, float(done.mip_gap or 0.0))
