"""Roundings of some outputs of a layer, tried and judged before the whole is rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .judge import Judge, as_loaded
from .pack import Packed
from .task import Task

JUDGED_OUTPUTS = 256  # of a layer: so that GPTQ on fewer runs, which only judges it, costs little
# Of GPTQ's error when a trial is judged by held-out runs: a trial is fitted to fewer runs than the file will be. Demo
# model, NVFP4, true error of 4 / 8 runs: 1.56e-3 / 1.42e-3 without it, 1.52e-3 / 1.00e-3 with .5 or .25.
TRIAL_HANDICAP = 0.5
WITH_BIAS = "+bias"  # after a rounding's name: the bias takes up the mean error


@dataclass(frozen=True)
class Tried:
    """Roundings of some outputs of a layer, the simplest first: packed, and decoded to float32 [outputs, in].

    errors, best, shift, loader: what ``judge`` says of them.
    """

    part: Task
    outputs: torch.Tensor
    packed: dict[str, Packed]
    decoded: dict[str, torch.Tensor]
    errors: dict[str, float]
    best: str
    shift: torch.Tensor | None
    loader: float

    @property
    def chosen(self) -> str:
        """The best one's name without what was done to the bias."""
        return self.best.removesuffix(WITH_BIAS)


@dataclass(frozen=True)
class Trial:
    """What rounding a layer would cost, from some of its outputs.

    error: of outputs as the loader runs the layer, on inputs that GPTQ was not fitted to where there are several runs;
    of the weights where no inputs are known. changes: input rows float32 [n, in] -> what becomes of the outputs
    [n, out]: what the rounding of inputs does to all of them, what that of weights does to those that were tried,
    scaled so that sums over outputs are right in expectation. of_inputs: the former alone.
    """

    rounding: str
    error: float
    changes: Callable[[torch.Tensor], torch.Tensor]
    of_inputs: Callable[[torch.Tensor], torch.Tensor]


def judged_outputs(count: int) -> torch.Tensor:
    """Which outputs of a layer are judged, int64: from all over, because those of q, k and v come one after another."""
    return torch.linspace(0, count - 1, min(count, JUDGED_OUTPUTS), dtype=torch.float64).long()


def judge(task: Task, decoded: dict[str, torch.Tensor]) -> tuple[dict[str, float], str, torch.Tensor | None, float]:
    """Output errors of roundings (name -> weight [out, in]) and, where it helps, of each with a corrected bias.

    Then the name of the best, of equals the more elaborate, what it adds to the bias, and its error as the loader runs
    it. Without inputs: errors of the weights.
    """
    rows = torch.empty(0, 0) if task.inputs is None else task.inputs.judged
    by = Judge(task.weight, rows, whole=task.whole)
    errors: dict[str, float] = {}
    shifts: dict[str, torch.Tensor] = {}
    for name, weight in decoded.items():
        errors[name] = by.error(weight)
        if task.bias is not None and name != "nearest" and task.inputs and by.measures_outputs:
            bias = corrected(task.bias, task.weight, weight, task.inputs.fitted_mean)
            shifts[name + WITH_BIAS] = shift = bias.float() - task.bias.float()
            errors[name + WITH_BIAS] = by.error(weight, shift)
    runs = task.inputs.runs if task.inputs else 0
    handicap = {name: TRIAL_HANDICAP if runs and name.startswith("gptq") else 1.0 for name in errors}
    best = min(reversed(errors), key=lambda name: errors[name] * handicap[name])
    fed = as_loaded(task.fmt, by.rows, task.entry)
    shift = shifts.get(best)
    return errors, best, shift, by.error(decoded[best.removesuffix(WITH_BIAS)], shift, fed)


def changes(task: Task, tried: Tried, decoded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """X W^T - X' Q^T - (b' - b), float32 [n, out], of rows X and the X' that the loader makes of them.

    What is not tried of the weights stands in for by the rest, times a factor that keeps the sum of squares.
    """
    fed, weight = as_loaded(task.fmt, rows, task.entry), task.weight.float().cpu()
    out = changes_of_inputs(task, rows)
    own = fed @ (weight[tried.outputs] - decoded).T
    own = own if tried.shift is None else own - tried.shift
    out[:, tried.outputs] += own * (len(weight) / len(tried.outputs)) ** 0.5
    return out


def changes_of_inputs(task: Task, rows: torch.Tensor) -> torch.Tensor:
    """(X - X') W^T, float32 [n, out]."""
    return (rows - as_loaded(task.fmt, rows, task.entry)) @ task.weight.float().cpu().T


def corrected(
    bias: torch.Tensor, weight: torch.Tensor, decoded: torch.Tensor, input_mean: torch.Tensor
) -> torch.Tensor:
    """The bias, in its own dtype, that takes up the mean error E[x] (W - Q)^T of the outputs."""
    return (bias.float() + (weight.float().cpu() - decoded) @ input_mean).to(bias.dtype)
