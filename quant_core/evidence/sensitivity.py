"""How much an error of one layer's output moves the model's prediction: stored rows that answer it for any rounding.

Damage is ||dy||^2 / ||y||^2 of the prediction y, a mean over points of sampling trajectories. To first order
dy = J dY with J = dy/dY of the layer's outputs Y, and for a random vector v of +-1 E<v, J dY>^2 = ||J dY||^2: one
backward pass of <v, y> gives the gradients of all layers, and any error's damage follows without running the model.
The mean error of all tokens is followed through whole passes, (sum_t g_t . mean dY)^2, for attention adds it up over
thousands of tokens; what single tokens have beyond it is taken as independent, sum_t (g_t . (dY_t - mean dY))^2, so
that a sample of them will do. Element by element would be worse (demo model, Spearman with the true damage .74).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import CalibQuantError

ROWS = 512  # of each layer; demo model, Spearman with the true damage of 32 / 128 / 512 / 1024: .79 / .83 / .85 / .85
PARTS = 8  # of the rows, which are in the order of sampling
Error = Callable[[torch.Tensor], torch.Tensor]  # input rows float32 [n, in] -> errors of the output rows [n, out]


@dataclass(frozen=True)
class LayerSensitivity:
    """What is known of one layer, by one of two estimators.

    inputs: bfloat16 [n, in]. gradients: bfloat16 [n, out], in units of ||y|| and times the square root of the number of
    tokens. sums: bfloat16 [m, out], gradients of whole passes, summed over tokens, in units of ||y||.
    Matched prediction knows neither, but gain: the damage of a mean squared error (a row's sum) of 1.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    gain: float = 0.0


def damage(stored: LayerSensitivity, error: Error) -> float:
    """||dy||^2 / ||y||^2 of the model's prediction y that this error of the layer makes; damages of layers add up."""
    errors = error(stored.inputs.float())
    if stored.gradients is None or stored.sums is None:
        return stored.gain * errors.square().sum(1).mean().item()
    apart = (stored.gradients.float() * (errors - errors.mean(0))).sum(1, dtype=torch.float64).square().mean()
    effects = (errors @ stored.sums.float().T).double()  # [n, m]
    # The square of their mean without what scatter alone makes of it: products of rows from different parts, and so
    # of different sampling runs, for a text's rows are the same at every point of a run.
    parts = torch.stack([part.sum(0) for part in effects.tensor_split(PARTS)])
    pairs = len(errors) ** 2 - sum(len(part) ** 2 for part in errors.tensor_split(PARTS))
    together = (parts.sum(0).square() - parts.square().sum(0)).mean() / max(1, pairs)
    return (apart + together.clamp(min=0)).item()


def merge(a: LayerSensitivity, b: LayerSensitivity) -> LayerSensitivity:
    """The points of both; where only one has gradients, that one."""
    if (a.gradients is None) != (b.gradients is None):
        return b if a.gradients is None else a
    inputs = torch.cat([a.inputs, b.inputs])
    if a.gradients is None or b.gradients is None or a.sums is None or b.sums is None:
        return LayerSensitivity(inputs, gain=(a.gain * len(a.inputs) + b.gain * len(b.inputs)) / len(inputs))
    return LayerSensitivity(inputs, torch.cat([a.gradients, b.gradients]), torch.cat([a.sums, b.sums]))


class Gatherer:
    """Keeps some rows of every backward pass, as many of each, chosen by numbers alone.

    groups: layer -> the group that sees one tensor; layers of a group keep the same rows and share one copy of them.
    rows: to keep of each layer when all ``backwards`` are done; ``done`` of them an earlier gatherer saw.
    """

    def __init__(self, groups: Mapping[str, str], rows: int, backwards: int, done: int = 0) -> None:
        self._groups, self._rows, self._backwards, self._done = groups, rows, backwards, done
        self._entropy: tuple[int, ...] = ()
        self._probe = 0
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._gradients: dict[str, list[torch.Tensor]] = {}
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._pending: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def start(self, probe: int, *entropy: int) -> None:
        """Begin a backward pass, of the point that ``entropy`` stands for its ``probe``-th: each takes other rows."""
        self._probe, self._entropy, self._pending = probe, entropy, {}

    def add(self, layer: str, x: torch.Tensor, g: torch.Tensor, energy: torch.Tensor) -> None:
        """One call of a layer: its input [..., in] and gradient [..., out]; energy: ||y||^2 of each sample, [B]."""
        calls = self._pending.setdefault(layer, [])
        x, g, tokens, samples = *_rows_of(x, g), 1, len(energy)
        if len(x) % samples:
            energy, samples = energy.mean().view(1), 1
        tokens = len(x) // samples
        quota = self._rows * (self._done + 1) // self._backwards - self._rows * self._done // self._backwards
        group = zlib.crc32(self._groups.get(layer, layer).encode())
        random = np.random.default_rng((*self._entropy, group, len(calls)))
        chosen = torch.from_numpy(np.roll(random.permutation(len(x)), -quota * self._probe)[:quota])
        norm, at = energy.to(g.device).float().sqrt().unsqueeze(1), chosen.to(x.device)
        gradients = g[at].float() * tokens**0.5 / norm[at // tokens]
        sums = (g.view(samples, tokens, -1).sum(1, dtype=torch.float32) / norm)[:quota]
        calls.append((x[at].to(torch.bfloat16).cpu(), gradients.cpu(), sums.cpu()))

    def finish(self) -> list[str]:
        """End a backward pass; the layers it reached. CalibQuantError names a layer whose gradients overflowed."""
        for layer, calls in self._pending.items():
            inputs, gradients, sums = zip(*calls, strict=True)
            if not all(g.isfinite().all() for g in (*gradients, *sums)):
                raise CalibQuantError(f"layer {layer}: NaN or Inf in its gradient: choose estimator matched")
            # A layer that is called more than once: damage is a sum over its calls, where a mean is taken over rows.
            self._gradients.setdefault(layer, []).append((torch.cat(gradients) * len(calls) ** 0.5).to(torch.bfloat16))
            self._sums.setdefault(layer, []).append(torch.stack(sums).sum(0).to(torch.bfloat16))
            self._inputs.setdefault(layer, []).append(torch.cat(inputs))
        reached, self._pending = list(self._pending), {}
        self._done += 1
        return reached

    def result(self) -> dict[str, LayerSensitivity]:
        found: dict[str, LayerSensitivity] = {}
        shared: dict[str, torch.Tensor] = {}
        for layer, gradients in self._gradients.items():
            inputs = torch.cat(self._inputs[layer])
            first = shared.setdefault(self._groups.get(layer, layer), inputs)
            same = first if torch.equal(first, inputs) else inputs
            found[layer] = LayerSensitivity(same, torch.cat(gradients), torch.cat(self._sums[layer]))
        return {layer: each for layer, each in found.items() if len(each.inputs)}


def _rows_of(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.detach().reshape(-1, x.shape[-1]), g.detach().reshape(-1, g.shape[-1])
