"""A plan for a budget, refined by what samples say: measured, its blocks weighed anew, planned again, measured again.

Whoever has a sampler gives ``sample``; everything else is here. A block's damage is what the final latent loses with
that block alone as planned and all others in 16 bit. The other way, one block at a time back to 16 bit, measures the
same sum with some ten times the noise: what is rounded after it takes other turns, which moves the latent more than the
block does (demo model, n = 40, 5.5 bits: 1.1e-4 +- 7e-6 against 2.5e-4 +- 2e-4). Blocks alone add up to .88 to 1.08 of
all together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import CalibQuantError
from ..formats import title
from ..models.source import Source
from ..rounding.layerplan import LayerPlan
from . import budget
from .costs import OPTIONS
from .plan import Plan

LIMIT = 4.0  # a block's damage is multiplied or divided by no more
ONE_SAMPLE = 1.0  # relative variance of a damage that one sample says
SHOWN = 12  # changed layers that are named

Entries = Mapping[str, LayerPlan]
# Entries of a plan that are run ({}: none, the 16-bit model), what to call it -> final latents of the fixed samples
Sampler = Callable[[Entries, str], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Block:
    """One block of the model as planned. measured: ||z - z16||^2 / ||z16||^2 of each sample, () without time for it."""

    name: str
    layers: list[str]
    predicted: float
    measured: tuple[float, ...] = ()
    scale: float = 1.0  # what its layers' damages are multiplied by from now on


@dataclass(frozen=True)
class Refined:
    """plan: the better one, with what was found in ``predicted``. before, after: errors of the samples of the plan that
    was given and of the one made anew; () where that is the same. moved: layer -> its former and its new entry.
    """

    plan: Plan
    before: tuple[float, ...]
    after: tuple[float, ...]
    seconds: float
    blocks: list[Block]
    moved: dict[str, tuple[LayerPlan, LayerPlan]] = field(default_factory=dict)
    kept: bool = False  # the plan made anew

    @property
    def clear(self) -> bool:
        """Whether the difference is more than twice what the scatter of samples makes of none."""
        gains = [a - b for a, b in zip(self.before, self.after, strict=True)]
        mean, n = _mean(gains), len(gains)
        return n > 1 and mean**2 * n * (n - 1) > 4 * sum((gain - mean) ** 2 for gain in gains)

    def to_dict(self) -> dict[str, Any]:
        return {
            "before": _mean(self.before),
            "after": _mean(self.after) if self.after else None,
            "kept": "refined" if self.kept else "given",
            "clear": bool(self.after) and self.clear,
            "samples": len(self.before),
            "seconds": round(self.seconds, 1),
            "blocks": {b.name: {"measured": _mean(b.measured), "scale": b.scale} for b in self.blocks if b.measured},
            "moved": {name: [_name(old), _name(new)] for name, (old, new) in self.moved.items()},
        }


def refine(
    source: Source,
    plan: Plan,
    sample: Sampler,
    minutes: float = math.inf,
    measure_controls: bool = False,
    now: Callable[[], float] = time.monotonic,
) -> Refined:
    """Sample the plan and its blocks, weigh them, plan the same wish again, and return the plan that measured better.

    minutes: for all of it. The plan itself, its controls and the new plan are measured in any case.
    """
    began = now()
    check(source, plan)
    exact = sample({}, "16 bit")

    def errors(entries: Entries, what: str) -> tuple[float, ...]:
        return _errors(sample(entries, what), exact) if entries else (0.0,) * len(exact)

    before = errors(plan.quantized(), "the plan")
    controls = _controls(source, plan, errors) if measure_controls else {}
    left = began + 60 * minutes - (now() - began) / (2 + len(controls)) - now()  # the new plan wants its time, too
    blocks = weighed(_measured(_blocks(source, plan), plan, errors, left, now))
    again = _again(source, plan, blocks)
    moved = _moved(plan, again)
    after = errors(again.quantized(), "the refined plan") if moved else ()
    kept = bool(after) and _better(again, _mean(after), plan, _mean(before))
    found = Refined(again if kept else plan, before, after, now() - began, blocks, moved, kept)
    return replace(found, plan=_told(found, controls))


def check(source: Source, plan: Plan) -> None:
    if plan.asked is None:
        raise CalibQuantError(
            f"{source.path}: the plan does not hold what it was made of: choose the strategy size, bits or max_error "
            "in Quantization Plan and link it in the same graph"
        )
    if plan.asked.table.made_with.source != source.checkpoint.fingerprint():
        raise CalibQuantError(f"{source.path}: the plan was made for another file ({plan.source}): choose the same")
    if plan.folds or plan.ranks() or any(entry.pre_quant_scale for entry in plan.layers.values()):
        what = "folds" if plan.folds else "a split" if plan.ranks() else "pre_quant_scale"
        raise CalibQuantError(
            f"{source.path}: the plan has {what}, which cannot be sampled before it is saved: plan without, refine, "
            "and compare the saved files"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _errors(latents: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> tuple[float, ...]:
    found = []
    for z, z16 in zip(latents, exact, strict=True):
        error = ((z.double() - z16.double()).square().sum() / z16.double().square().sum()).item()
        if not math.isfinite(error):
            raise CalibQuantError("a sample is NaN or Inf, or the 16-bit one all zero: sample with other settings")
        found.append(error)
    return tuple(found)


# --- blocks


def _blocks(source: Source, plan: Plan) -> list[Block]:
    """What is rounded in each block, those with the largest predicted damage first."""
    assert plan.asked is not None
    damages = plan.asked.damages(source)[1]
    option = {kind: name for name, kind in OPTIONS.items()}
    layers: dict[str, list[str]] = {}
    for name in plan.quantized():
        info = source.layers[name]
        place = f"{info.subgraph} {info.block}" if info.block is not None else "outside the blocks"
        layers.setdefault(place, []).append(name)

    def predicted(name: str) -> float:
        entry = plan.layers[name]
        return damages.get(name, {}).get(option.get((entry.format, entry.full_precision), ""), 0.0)

    found = [Block(place, names, sum(map(predicted, names))) for place, names in layers.items()]
    return sorted(found, key=lambda block: -block.predicted)


def _measured(
    blocks: list[Block],
    plan: Plan,
    errors: Callable[[Entries, str], tuple[float, ...]],
    seconds: float,
    now: Callable[[], float],
) -> list[Block]:
    """As many as fit in the time, each taken to last as long as the longest so far."""
    found, began, longest = [], now(), 0.0
    for i, block in enumerate(blocks):
        start = now()
        if start - began + longest > seconds:
            return found + blocks[i:]
        entries = {name: plan.layers[name] for name in block.layers}
        found.append(replace(block, measured=errors(entries, f"block {i + 1} of {len(blocks)} alone ({block.name})")))
        longest = max(longest, now() - start)
    return found


def weighed(blocks: Sequence[Block]) -> list[Block]:
    """The blocks with their scales: measured over predicted damage, relative to all measured ones.

    The logarithm of that ratio is shrunk by what its scatter over samples leaves of it (empirical Bayes: the variance
    between blocks over that plus the block's own), and clipped. The measured blocks' predicted sum stays.
    """
    known = [block for block in blocks if block.measured and block.predicted > 0 and _mean(block.measured) > 0]
    if len(known) < 2:
        return list(blocks)
    total = math.log(sum(_mean(b.measured) for b in known) / sum(b.predicted for b in known))
    logs = [math.log(_mean(b.measured) / b.predicted) - total for b in known]
    noise = [_relative_variance(b.measured) for b in known]
    between = max(0.0, _mean([x * x - v for x, v in zip(logs, noise, strict=True)]))
    most = math.log(LIMIT)
    scales = [
        math.exp(min(most, max(-most, x * between / (between + v)))) if between else 1.0
        for x, v in zip(logs, noise, strict=True)
    ]
    whole = sum(b.predicted for b in known) / sum(b.predicted * s for b, s in zip(known, scales, strict=True))
    scaled = {b.name: s * whole for b, s in zip(known, scales, strict=True)}
    return [replace(b, scale=scaled.get(b.name, 1.0)) for b in blocks]


def _relative_variance(values: Sequence[float]) -> float:
    """Of the mean of values, over its square."""
    n, mean = len(values), _mean(values)
    if n < 2:
        return ONE_SAMPLE
    return sum((v - mean) ** 2 for v in values) / (n - 1) / n / mean**2


# --- the new plan


def _again(source: Source, plan: Plan, blocks: list[Block]) -> Plan:
    asked = plan.asked
    assert asked is not None
    scale = {n: asked.scale.get(n, 1.0) * block.scale for block in blocks for n in block.layers}
    # Layers in 16 bit belong to their block, too: what the budget has to spare is weighed by its scale.
    places = {(source.layers[b.layers[0]].subgraph, source.layers[b.layers[0]].block): b.scale for b in blocks}
    for name in asked.table.layers:
        info = source.layers[name]
        scale.setdefault(name, asked.scale.get(name, 1.0) * places.get((info.subgraph, info.block), 1.0))
    made = budget.plan(
        source,
        asked.table,
        asked.wish,
        weighting=asked.weighting,
        calibration=asked.calibration,
        probed=asked.probed,
        scale=scale,
    )
    return replace(made, path=plan.path, seen=plan.seen)


def _moved(plan: Plan, again: Plan) -> dict[str, tuple[LayerPlan, LayerPlan]]:
    def kind(entry: LayerPlan) -> LayerPlan:
        return replace(entry, reason="")

    return {n: (old, again.layers[n]) for n, old in plan.layers.items() if kind(old) != kind(again.layers[n])}


def _better(again: Plan, after: float, plan: Plan, before: float) -> bool:
    """Less error; of plans that were to be small, which have no size in common, without more bytes or error."""
    assert plan.asked is not None
    if plan.asked.wish.kind == "max_error":
        return again.size <= plan.size and after <= before
    return after < before


def _controls(source: Source, plan: Plan, errors: Callable[[Entries, str], tuple[float, ...]]) -> dict[str, float]:
    """Measured errors of the plans that stand beside this one."""
    assert plan.asked is not None
    wanted = {control["name"] for control in (plan.predicted or {}).get("controls", [])}
    plans = budget.compared(source, plan.asked) if wanted else {}
    return {n: _mean(errors(p.quantized(), f"control: {n}")) for n, p in plans.items() if n in wanted}


def _told(found: Refined, controls: Mapping[str, float]) -> Plan:
    """The plan with what was measured beside what is predicted."""
    predicted = {**(found.plan.predicted or {}), "refined": found.to_dict()}
    predicted["sampled"] = _mean(found.after if found.kept else found.before)
    predicted["controls"] = [
        {**control, "measured": controls[control["name"]]} if control["name"] in controls else control
        for control in predicted.get("controls", [])
    ]
    return replace(found.plan, predicted=predicted)


# --- words


def words(found: Refined) -> list[str]:
    """What was measured and what changed, for a person."""
    before, how = f"{_mean(found.before):.2e}", f"n = {len(found.before)}, {found.seconds:.0f} s"
    measured = [block for block in found.blocks if block.measured]
    if not found.after:
        lines = [f"the plan stays: weighed anew it is the same. Error of the samples {before} ({how})"]
    elif found.kept:
        lines = [f"refined: error of the samples {before} -> {_mean(found.after):.2e} ({how})"]
    else:
        lines = [f"the plan stays: error of the samples {before}, refined {_mean(found.after):.2e} ({how})"]
    if found.after and not found.clear:
        lines.append("that difference is within the scatter of these samples: more of them would tell")
    lines.append(f"{len(measured)} of {len(found.blocks)} blocks were measured alone")
    if len(measured) < len(found.blocks):
        lines[-1] += ", the most damaging first: give more minutes for the rest"
    lines += [f"  {b.name}: {_mean(b.measured):.2e}, weighs {b.scale:.2f} times as before" for b in measured]
    if found.kept:
        lines.append(f"layers that changed: {len(found.moved)}")
        lines += [f"  {name}: {_name(old)} -> {_name(new)}" for name, (old, new) in [*found.moved.items()][:SHOWN]]
    return lines


def _name(entry: LayerPlan) -> str:
    return title(entry.format) + (" weight-only" if entry.full_precision else "")
