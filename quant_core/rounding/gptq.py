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
from typing import Protocol

import torch

from ..formats import Codes, Format, Frame, Grid, join
from ..formats.base import roundup
from .parallel import Each, workers

LEAST_DAMPING, DAMPING = 0.01, 0.03  # of the mean diagonal; see damping()
RETRIES = (1, 10, 100)  # times as much damping, until there is a Cholesky factor
PART = 512  # rows or columns of a product that one thread computes
COLUMNS = 128  # whose updates to the rest are gathered into one matrix product
THIN = 2 / 3  # input rows per column, up to which H is not needed itself
ROWS, GPU_ROWS = 2048, 8192  # of the weight at once, so that memory is bounded by H and not by the weight
ALONE = 512  # rows that are not worth a second thread
TILE = 64  # rows; parts of a weight are a multiple of it
CODES = 128  # rows whose codes are made at once, in the processor's cache
PASSES = 2  # of refinement: the first takes 12 % off the error, the second 3 %, two more 1 %
SHARED = (32, 16)  # columns that may share a scale: MXFP8's and NVFP4's blocks
MIN_ROWS = 32  # distinct; with fewer, GPTQ fits those and is worse than nearest on other inputs


class Gram(Protocol):
    """The damped H of a group of layers, and H times the errors of rounding, of which refinement needs a block a time.

    A state belongs to errors [in, out] and is changed with them.
    """

    nbytes: int

    def own(self, block: slice) -> torch.Tensor:
        """H of some columns among themselves."""

    def state(self, errors: torch.Tensor) -> torch.Tensor: ...

    def product(self, state: torch.Tensor, block: slice, errors: torch.Tensor) -> torch.Tensor:
        """Rows ``block`` of H @ errors, as a tensor of its own; errors: only those rows."""

    def change(self, state: torch.Tensor, block: slice, by: torch.Tensor) -> None:
        """The errors in these rows grew."""


class Full:
    """H float32 [in, in], where there are about as many rows of inputs as columns."""

    def __init__(self, hessian: torch.Tensor) -> None:
        self.hessian, self.nbytes = hessian, hessian.nbytes

    def own(self, block: slice) -> torch.Tensor:
        return self.hessian[block, block]

    def state(self, errors: torch.Tensor) -> torch.Tensor:
        return self.hessian @ errors

    def product(self, state: torch.Tensor, block: slice, errors: torch.Tensor) -> torch.Tensor:
        return state[block].clone()

    def change(self, state: torch.Tensor, block: slice, by: torch.Tensor) -> None:
        state.addmm_(self.hessian[:, block], by)


class Thin:
    """H = A A^T + ridge of fewer input rows than columns: float32 A [in, n]. Wide layers take a third of the time."""

    def __init__(self, columns: torch.Tensor, ridge: float) -> None:
        self.columns, self.ridge, self.nbytes = columns, ridge, columns.nbytes

    def own(self, block: slice) -> torch.Tensor:
        hessian = self.columns[block] @ self.columns[block].T
        hessian.diagonal().add_(self.ridge)
        return hessian

    def state(self, errors: torch.Tensor) -> torch.Tensor:
        return self.columns.T @ errors

    def product(self, state: torch.Tensor, block: slice, errors: torch.Tensor) -> torch.Tensor:
        return torch.addmm(errors, self.columns[block], state, beta=self.ridge)

    def change(self, state: torch.Tensor, block: slice, by: torch.Tensor) -> None:
        state.addmm_(self.columns[block].T, by)


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the inputs of a group of layers: the damped H and U, float32 [in, in].

    order: int64 [in], the columns that rows and columns of H and U stand for. note: that it took more damping.
    """

    gram: Gram
    upper: torch.Tensor
    order: torch.Tensor
    note: str = ""

    @property
    def nbytes(self) -> int:
        return self.gram.nbytes + self.upper.nbytes


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
    x = x[:, order] / math.sqrt(len(x))
    average = x.square().sum(0).mean()
    if not torch.isfinite(average) or average <= 0:
        return "the sampled inputs are constant or not finite"
    share, made = damping(distinct, x.shape[1]), _thin if THIN * x.shape[1] >= len(x) else _full
    for times in RETRIES:
        if found := made(x, times * share * float(average)):
            note = f"GPTQ took {times} times the damping ({times * share:.2g} of the mean diagonal)"
            return Factor(*found, order, note if times > 1 else "")
    return "the Hessian of the sampled inputs is not positive definite"


def _full(x: torch.Tensor, ridge: float) -> tuple[Full, torch.Tensor] | None:
    """H = x^T x + ridge of x [n, in], and U; None where H is not positive definite."""
    with workers(x.device) as each:
        hessian = torch.cat(each(lambda part: part.T @ x, x.split(PART, dim=1)))
    hessian.diagonal().add_(ridge)
    root = _root(hessian)
    if root is None:
        return None
    return Full(hessian), _inverse(root)


def _thin(x: torch.Tensor, ridge: float) -> tuple[Thin, torch.Tensor] | None:
    """The same without H, whose inverse differs from 1 / ridge by a matrix of rank n only (Woodbury).

    From the last block of columns to the first: with A = x^T, and Z = (1 + A^T A / ridge)^-1 of all later columns, the
    Schur complement of a block b is A_b Z A_b^T + ridge = R R^T, and U_b,later = -R^-1 A_b Z A_later^T / ridge.
    """
    columns = x.T.contiguous()
    width, count = columns.shape
    later, upper = torch.eye(count, device=x.device), torch.zeros(width, width, device=x.device)
    with workers(x.device) as each:
        for start in reversed(range(0, width, COLUMNS)):
            if not _thin_block(columns, later, upper[start : start + COLUMNS], start, ridge, each):
                return None
    return Thin(columns, ridge), upper


def _thin_block(
    columns: torch.Tensor, later: torch.Tensor, upper: torch.Tensor, start: int, ridge: float, each: Each
) -> bool:
    """Rows ``upper`` of U, from ``start`` on, and ``later`` as the block before needs it; False: not positive."""
    block, stop = columns[start : start + len(upper)], start + len(upper)
    seen = torch.cat(each(lambda part: block @ part, later.split(PART, dim=1)), dim=1)
    complement = seen @ block.T
    complement.diagonal().add_(ridge)
    root = _root(complement)
    if root is None:
        return False
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), device=root.device), upper=True)
    upper[:, start:stop] = inverse
    seen = inverse @ seen
    rest = zip(upper[:, stop:].split(PART, dim=1), columns[stop:].split(PART), strict=True)
    each(lambda part: torch.mm(seen, part[1].T, out=part[0]).mul_(-1 / ridge), rest)
    each(lambda part: part[0].addmm_(part[1], seen, alpha=-1), zip(later.split(PART), seen.T.split(PART), strict=True))
    return True


def _root(matrix: torch.Tensor) -> torch.Tensor | None:
    """R, upper, with R R^T = matrix: the lower Cholesky factor of the matrix with its order reversed."""
    root, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    return None if failed else root.flip(0, 1)


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
    parts = weight.split(_rows_at_once(weight))
    with workers(weight.device) as each:
        return join(each(lambda part: _quantize_rows(part, fmt, fmt.frame(part, tensor), inputs), parts))


def _rows_at_once(weight: torch.Tensor) -> int:
    """At most ROWS, and an even number of parts where there are several: most machines have two cores, or four, …"""
    count, most = len(weight), ROWS if weight.device.type == "cpu" else GPU_ROWS
    if count <= ALONE:
        return count
    return roundup(-(-count // (2 * -(-count // (2 * most)))), TILE)


def _quantize_rows(weight: torch.Tensor, fmt: Format, frame: Frame, inputs: Factor) -> Codes:
    # From here on weights are [in, out]: those of a column, which are rounded together, lie side by side in memory.
    wanted, back = weight.T[inputs.order], inputs.order.argsort()
    rounded, grids, scale = _feed_back(wanted.clone(), fmt, frame, inputs.upper)
    _refine(wanted, rounded, grids, inputs.gram)
    if fmt.group and scale is not None:
        scale = scale.view(torch.uint8)[:, back[:: fmt.group] // fmt.group].view(scale.dtype)
    parts = [
        fmt.codes(
            rounded[:, few][back].T.contiguous(),
            None if scale is None else scale[few],
            frame if frame.rows is None else Frame(frame.tensor, frame.rows[few]),
        )
        for few in (slice(start, start + CODES) for start in range(0, len(weight), CODES))
    ]
    return Codes(torch.cat(parts), scale, frame)


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


def _refine(wanted: torch.Tensor, rounded: torch.Tensor, grids: list[Grid], gram: Gram) -> None:
    """Round each column of ``wanted`` [in, out] anew given what all others leave, PASSES times; changes ``rounded``."""
    width, span = len(wanted), len(wanted) // len(grids)
    state = gram.state(wanted - rounded)
    for start in PASSES * list(range(0, width, COLUMNS)):
        block = slice(start, start + COLUMNS)
        own, before = gram.own(block), rounded[block].clone()
        size = own.diagonal().unsqueeze(1)
        near = gram.product(state, block, wanted[block] - before).div_(size)
        own = own / size  # its row i: how far column i moves for the errors of the others
        for i in range(len(near)):
            now = rounded[start + i]
            value = grids[(start + i) // span].snap(now + near[i])
            near[i + 1 :].addr_(own[i + 1 :, i], now - value)
            now.copy_(value)
        gram.change(state, block, before.sub_(rounded[block]))
