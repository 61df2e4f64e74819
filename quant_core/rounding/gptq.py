"""GPTQ: round one column after the other and let the columns still to come absorb the error; then refine.

With H = E[x x^T] of the layer's inputs and U the upper Cholesky factor of H^-1, rounding column i changes the later
columns by -(w_i - q_i) / U_ii * U_i,: (Frantar et al., arXiv 2210.17323). Loud columns come first, when most others are
left to absorb their error; those that share a scale stay together. Scales are searched inside the loop, on the
columns as they are when their group is reached, weighted by 1 / U_ii^2: what an error in that column costs after the
best compensation. Then every column is rounded again, now that the errors of the later ones are known too: coordinate
descent on tr((W - Q) H (W - Q)^T) (Behdin et al., "QuantEase", arXiv 2309.01885).

``benchmarks/gptq_variants.py`` measures on held-out inputs what each of these is worth, and what was left out because
it is worth nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..formats import Codes, Format, Frame, Grid, join
from .parallel import all_threads, workers

LEAST_DAMPING, DAMPING = 0.01, 0.03  # of the mean diagonal; see damping()
RETRIES = (1, 10, 100)  # times as much damping, until there is a Cholesky factor
PART = 512  # columns of H and U computed at once
COLUMNS = 128  # whose updates to the rest are gathered into one matrix product
ROWS = 4096  # of the weight at once, so that memory is bounded by H and not by the weight
PASSES = 2  # of refinement: the first takes 12 % off the error, the second 3 %, two more 1 %
SHARED = (32, 16)  # columns that may share a scale: MXFP8's and NVFP4's blocks
MIN_ROWS = 32  # distinct; with fewer, GPTQ fits those and is worse than nearest on other inputs


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the inputs of a group of layers: the damped H and U, both float32 [in, in].

    order: int64 [in], the columns that rows and columns of H and U stand for. note: that it took more damping.
    """

    hessian: torch.Tensor
    upper: torch.Tensor
    order: torch.Tensor
    note: str = ""

    @property
    def nbytes(self) -> int:
        return self.hessian.nbytes + self.upper.nbytes


def damping(distinct: int, width: int) -> float:
    """What to add to H's diagonal, as a share of its mean: the more, the fewer distinct rows H was made of."""
    return max(LEAST_DAMPING, DAMPING * math.sqrt(width / distinct))


def factor(rows: torch.Tensor, mean: torch.Tensor | None = None, least: int = MIN_ROWS) -> Factor | str:
    """H and U of input ``rows`` [n, in]; or the reason why there are none.

    mean: E[x], float32 [in], for a layer whose bias will take up the mean error: H is then the covariance.
    least: the distinct rows that it takes.
    """
    distinct = _distinct(rows)
    if few := _few(distinct, least):
        return few
    x = rows.float() if mean is None else rows.float() - mean
    x = x * to_unit(x)  # their squares might overflow; for GPTQ the scale of H does not matter
    order = loud_first(x.square().mean(0))
    x = x[:, order]
    with workers(x.device) as each:
        hessian = torch.cat(each(lambda part: part.T @ x, x.split(PART, dim=1))) / len(x)
    average = hessian.diagonal().mean()
    if not torch.isfinite(average) or average <= 0:
        return "the sampled inputs are constant or not finite"
    share, added = damping(distinct, x.shape[1]), 0
    for times in RETRIES:
        hessian.diagonal().add_((times - added) * share * average)
        # With the order of the columns reversed, H's own lower factor is R with H = R R^T, R upper; then U = R^-1.
        root, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        added = times
        if not failed:
            break
    else:
        return "the Hessian of the sampled inputs is not positive definite"
    upper = _inverse(root.flip(0, 1))
    note = f"GPTQ took {added} times the damping ({added * share:.2g} of the mean diagonal)" if added > 1 else ""
    return Factor(hessian, upper, order, note)


def _inverse(root: torch.Tensor) -> torch.Tensor:
    """Of an upper triangular matrix, some columns at a time: a third of the work, for they end at the diagonal."""
    inverse, one = torch.zeros_like(root), torch.eye(len(root), device=root.device)

    def part(start: int) -> None:
        stop = min(start + PART, len(root))
        found = torch.linalg.solve_triangular(root[:stop, :stop], one[:stop, start:stop], upper=True)
        inverse[:stop, start:stop] = found

    with workers(root.device) as each:
        each(part, range(0, len(root), PART))
    return inverse


def too_few(rows: torch.Tensor, least: int) -> str:
    """Why these input rows [n, in] are too few for GPTQ; "" where they are not."""
    return _few(_distinct(rows), least) if len(rows) else "no input rows were sampled"


def _few(distinct: int, least: int) -> str:
    if distinct >= least:
        return ""
    return f"{distinct} distinct rows were sampled, too few for GPTQ (at least {least}): calibrate on more"


def _distinct(rows: torch.Tensor) -> int:
    return len({row.numpy().tobytes() for row in rows.cpu().view(torch.uint8)})


def to_unit(x: torch.Tensor) -> float:
    """The power of two that brings max|x| to between 1/2 and 1, within what float32 holds; 1 for zeros."""
    peak = float(x.abs().amax()) if x.numel() else 0.0
    return math.ldexp(1.0, min(-math.frexp(peak)[1], 127)) if math.isfinite(peak) else 1.0


def loud_first(energy: torch.Tensor) -> torch.Tensor:
    """int64 [in]: columns by falling energy [in], blocks of 32 and 16 kept together where they divide the width."""
    order = torch.arange(len(energy), device=energy.device).unsqueeze(0)
    for size in (*(s for s in SHARED if len(energy) % s == 0), 1):
        parts = order.view(len(order), -1, size)
        loudest = energy[parts].sum(-1).argsort(dim=1, descending=True, stable=True)
        order = parts.gather(1, loudest.unsqueeze(-1).expand_as(parts)).reshape(-1, size)
    return order.reshape(-1)


def quantize(weight: torch.Tensor, fmt: Format, tensor: torch.Tensor | None, inputs: Factor) -> Codes:
    """Codes of float32 ``[out, in]``, scales included; deterministic for a device. Rows do not depend on each other.

    weight and inputs in the format's own basis; tensor: ``Frame.tensor`` of the whole weight.
    """
    with all_threads():  # which share its outputs out, never the terms of a sum
        return join([_quantize_rows(part, fmt, fmt.frame(part, tensor), inputs) for part in weight.split(ROWS)])


def _quantize_rows(weight: torch.Tensor, fmt: Format, frame: Frame, inputs: Factor) -> Codes:
    # From here on weights are [in, out]: those of a column, which are rounded together, lie side by side in memory.
    wanted, back = weight.T[inputs.order], inputs.order.argsort()
    rounded, grids, scale = _feed_back(wanted.clone(), fmt, frame, inputs.upper)
    _refine(wanted, rounded, grids, inputs.hessian)
    if fmt.group and scale is not None:
        scale = scale.view(torch.uint8)[:, back[:: fmt.group] // fmt.group].view(scale.dtype)
    return Codes(fmt.codes(rounded[back].T.contiguous(), scale, frame), scale, frame)


def _feed_back(
    left: torch.Tensor, fmt: Format, frame: Frame, upper: torch.Tensor
) -> tuple[torch.Tensor, list[Grid], torch.Tensor | None]:
    """One run over the columns of ``left`` [in, out], which is used up.

    Formats with groups choose a scale per group on the way, others theirs before. Returns the rounded weights
    [in, out], the grid of each group (one without groups), and the stored scales.
    """
    rounded, cost = torch.empty_like(left), upper.diagonal().square().reciprocal()  # cost: [in]
    scales: list[torch.Tensor | None] = []
    grids: list[Grid] = []
    span = fmt.group or len(left)  # columns that a grid holds for
    for start in range(0, len(left), COLUMNS):
        block = left[start : start + COLUMNS]
        errors, own = torch.empty_like(block), upper[start : start + COLUMNS, start : start + COLUMNS]
        for i in range(len(block)):
            column = start + i
            if column % span == 0:
                group = slice(column, column + span)
                blocks = left[group].T.contiguous().unsqueeze(1)  # [out, 1, span]
                scale = fmt.choose(blocks, frame, cost[group].unsqueeze(0))  # [out, 1] or None
                scales.append(scale)
                grids.append(fmt.grid(None if scale is None else scale[:, 0], frame))
            rounded[column] = grids[-1].snap(block[i])
            torch.sub(block[i], rounded[column], out=errors[i])
            errors[i] /= own[i, i]
            block[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        rest = slice(start + len(block), None)
        left[rest].addmm_(upper[start : start + len(block), rest].T, errors, alpha=-1)
    stored = [scale for scale in scales if scale is not None]
    return rounded, grids, torch.cat(stored, dim=1) if stored else None


def _refine(wanted: torch.Tensor, rounded: torch.Tensor, grids: list[Grid], hessian: torch.Tensor) -> None:
    """Round each column of ``wanted`` [in, out] anew given what all others leave, PASSES times; changes ``rounded``."""
    width, span = len(wanted), len(wanted) // len(grids)
    weight = hessian / hessian.diagonal().unsqueeze(1)  # its row i: how far column i moves for the errors of the others
    pull = weight @ (wanted - rounded)
    for start in PASSES * list(range(0, width, COLUMNS)):
        block = slice(start, start + COLUMNS)
        near, own, before = pull[block].clone(), weight[block, block], rounded[block].clone()
        for i in range(len(near)):
            now = rounded[start + i]
            value = grids[(start + i) // span].snap(now + near[i])
            near.addr_(own[:, i], now - value)
            now.copy_(value)
        pull.addmm_(weight[:, block], before.sub_(rounded[block]))
