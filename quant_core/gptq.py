"""GPTQ: round one column after the other and let the columns still to come absorb the error; then refine.

With H = E[x x^T] of the layer's inputs and U the upper Cholesky factor of H^-1, rounding column i changes the later
columns by -(w_i - q_i) / U_ii * U_i,: (Frantar et al., arXiv 2210.17323). Scales are searched inside the loop, on the
columns as they are when their group is reached, weighted by 1 / U_ii^2: what an error in that column costs after the
best compensation. Then every column is rounded again, now that the errors of the later ones are known too: coordinate
descent on tr((W - Q) H (W - Q)^T) (Behdin et al., "QuantEase", arXiv 2309.01885).

``benchmarks/gptq_variants.py`` measures on held-out inputs what each of these is worth, and what was left out because
it is worth nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .formats import Codes, Format

LEAST_DAMPING, DAMPING = 0.01, 0.03  # of the mean diagonal; see damping()
COLUMNS = 128  # whose updates to the rest are gathered into one matrix product
ROWS = 4096  # of the weight at once, so that memory is bounded by H and not by the weight
PASSES = 2  # of refinement: the first takes 17 % off the error, the second 4 %, two more 2 %
MIN_ROWS = 32  # distinct; with fewer, GPTQ fits those and is worse than nearest on other inputs


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the inputs of a group of layers: the damped H and U, both float32 [in, in]."""

    hessian: torch.Tensor
    upper: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.hessian.nbytes + self.upper.nbytes


def damping(distinct: int, width: int) -> float:
    """What to add to H's diagonal, as a share of its mean: the more, the fewer distinct rows H was made of."""
    return max(LEAST_DAMPING, DAMPING * math.sqrt(width / distinct))


def factor(rows: torch.Tensor, mean: torch.Tensor | None = None) -> Factor | str:
    """H and U of input ``rows`` [n, in]; or the reason why there are none.

    mean: E[x], float32 [in], for a layer whose bias will take up the mean error: H is then the covariance.
    """
    distinct = len({row.numpy().tobytes() for row in rows.cpu().view(torch.uint8)})
    if distinct < MIN_ROWS:
        return f"{distinct} distinct rows were sampled, too few for GPTQ (at least {MIN_ROWS}): calibrate on more"
    x = rows.float() if mean is None else rows.float() - mean
    hessian = (x.T @ x) / len(x)
    average = hessian.diagonal().mean()
    if not torch.isfinite(average) or average <= 0:
        return "the sampled inputs are constant or not finite"
    hessian.diagonal().add_(damping(distinct, x.shape[1]) * average)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return "the Hessian of the sampled inputs is not positive definite"
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        return "the inverse Hessian of the sampled inputs is not positive definite"
    return Factor(hessian, upper)


def quantize(weight: torch.Tensor, fmt: Format, tensor_scale: torch.Tensor | None, inputs: Factor) -> Codes:
    """Codes of float32 ``[out, in]``, scales included; deterministic for a device. Rows do not depend on each other."""
    parts = [_quantize_rows(part, fmt, tensor_scale, inputs) for part in weight.split(ROWS)]
    scales = [part.scale for part in parts if part.scale is not None]
    return Codes(torch.cat([part.data for part in parts]), torch.cat(scales) if scales else None, tensor_scale)


def _quantize_rows(weight: torch.Tensor, fmt: Format, tensor_scale: torch.Tensor | None, inputs: Factor) -> Codes:
    codes = _feed_back(weight, fmt, tensor_scale, inputs.upper)
    return _refine(weight, codes, fmt, inputs.hessian) if PASSES else codes


def _feed_back(weight: torch.Tensor, fmt: Format, tensor_scale: torch.Tensor | None, upper: torch.Tensor) -> Codes:
    """One run over the columns. Formats with groups choose a scale per group on the way, others theirs before."""
    left = weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: a column's weights lie side by side
    cost = upper.diagonal().square().reciprocal()  # [in]
    width = len(left)
    data, scales = [], []
    if not fmt.group:
        whole = fmt.choose(weight.unsqueeze(1), tensor_scale, cost.unsqueeze(0))  # [out, 1] or None
        step = fmt.step(None if whole is None else whole[:, 0], tensor_scale)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            if fmt.group and i % fmt.group == 0:
                group = slice(i, i + fmt.group)
                blocks = left[group].T.contiguous().unsqueeze(1)  # [out, 1, group]
                scales.append(fmt.choose(blocks, tensor_scale, cost[group].unsqueeze(0)))
                step = fmt.step(scales[-1][:, 0], tensor_scale)
            codes, value = _nearest(left[i], fmt, step)
            data.append(codes)
            errors[i - start] = (left[i] - value) / upper[i, i]
            left[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    if fmt.group:
        whole = torch.cat(scales, dim=1)
    return Codes(torch.stack(data, dim=1), whole, tensor_scale)


def _refine(weight: torch.Tensor, codes: Codes, fmt: Format, hessian: torch.Tensor) -> Codes:
    """Round each column anew, given what all others leave, PASSES times."""
    wanted, data = weight.T.contiguous(), list(codes.data.unbind(1))
    left = wanted - fmt.dequantize(codes, tuple(weight.shape)).T  # W - Q, [in, out]
    pull = hessian @ left  # its row i, over H_ii, is how far column i should move
    steps = fmt.step(codes.scale, codes.tensor_scale)
    steps = steps.T.contiguous() if steps.dim() else steps.expand(1)  # [groups, out], or one step for all
    span = len(data) // len(steps)  # columns a step holds for
    for start in PASSES * list(range(0, len(data), COLUMNS)):
        block = slice(start, start + COLUMNS)
        near, own, before = pull[block].clone(), hessian[block, block], left[block].clone()
        for i in range(len(near)):
            column = start + i
            old = wanted[column] - left[column]
            data[column], value = _nearest(old + near[i] / own[i, i], fmt, steps[column // span])
            left[column] = wanted[column] - value
            near.addr_(own[i], old - value)
        pull.addmm_(hessian[:, block], left[block] - before)
    return replace(codes, data=torch.stack(data, dim=1))


def _nearest(column: torch.Tensor, fmt: Format, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values of float32 weights [out] for steps [out] or []; a zero step gives zeros."""
    codes = fmt.round(torch.where(step == 0, 0.0, column / torch.where(step == 0, 1.0, step)))
    return codes, fmt.value(codes) * step
