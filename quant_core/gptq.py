"""GPTQ: round one column after the other and let the columns still to come absorb the error.

With H = E[x x^T] of the layer's inputs and U the upper Cholesky factor of H^-1, rounding column i changes the later
columns by -(w_i - q_i) / U_ii * U_i,: (Frantar et al., arXiv 2210.17323). Scales are searched inside the loop, on the
columns as they are when their group is reached, weighted by 1 / U_ii^2: what an error in that column costs after the
best compensation. Measured on 1024 x 1024 with correlated inputs, held out, output error: nearest .0090, searched
scales .0053, GPTQ .0008, GPTQ with searched scales .0005.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .formats import Codes, Format

DAMPING = 0.01  # of the mean diagonal; .001 is worse on held-out rows
COLUMNS = 128  # whose updates to the rest are gathered into one matrix product
MIN_ROWS = 64


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the inputs of a group of layers: U float32 [in, in], and how many rows it came from."""

    upper: torch.Tensor
    rows: int


def factor(rows: torch.Tensor, damping: float = DAMPING) -> Factor | str:
    """Upper Cholesky factor of the damped inverse Hessian of ``rows`` [n, in]; or why there is none."""
    n = len(rows)
    if n < MIN_ROWS:
        return f"{n} sampled rows are too few for GPTQ (at least {MIN_ROWS})"
    x = rows.float()
    hessian = (x.T @ x) / n
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        return "the sampled inputs are zero or not finite"
    hessian.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return "the Hessian of the sampled inputs is not positive definite"
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if failed:
        return "the inverse Hessian of the sampled inputs is not positive definite"
    return Factor(upper, n)


def quantize(weight: torch.Tensor, fmt: Format, tensor_scale: torch.Tensor | None, inputs: Factor) -> Codes:
    """Codes of float32 ``[out, in]``; deterministic for a device.

    Formats with groups choose a scale per group on the way; others choose theirs for whole rows before.
    """
    left, upper = weight.clone(), inputs.upper
    cost = upper.diagonal().square().reciprocal()  # [in]
    width = weight.shape[1]
    data, scales = [], []
    if not fmt.group:
        whole = fmt.choose(weight.unsqueeze(1), tensor_scale, cost.unsqueeze(0))  # [out, 1] or None
        step = fmt.step(None if whole is None else whole[:, 0], tensor_scale)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = torch.empty((weight.shape[0], stop - start), device=weight.device)
        for i in range(start, stop):
            if fmt.group and i % fmt.group == 0:
                group = slice(i, i + fmt.group)
                scale = fmt.choose(left[:, group].unsqueeze(1), tensor_scale, cost[group].unsqueeze(0))
                scales.append(scale)
                step = fmt.step(scale[:, 0], tensor_scale)
            column = left[:, i]
            codes = fmt.round(torch.where(step == 0, 0.0, column / torch.where(step == 0, 1.0, step)))
            data.append(codes)
            error = (column - fmt.value(codes) * step) / upper[i, i]
            errors[:, i - start] = error
            left[:, i + 1 : stop] -= torch.outer(error, upper[i, i + 1 : stop])
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    if fmt.group:
        whole = torch.cat(scales, dim=1)
    return Codes(torch.stack(data, dim=1), whole, tensor_scale)
