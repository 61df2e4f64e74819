"""Two thin factors that put back part of what rounding took from a layer: up [out, rank] @ down [rank, in].

Without inputs: the largest singular part of W - Q. With sampled inputs X: reduced-rank ridge regression of the missing
outputs Y = X W^T - feed(X) Q^T on X, so that what the loader's rounding of the *inputs* costs is fitted too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OVERSAMPLED, POWERS = 2, 4  # leave .1 to .5 % more than the exact singular part even of a flat spectrum
NEGLIGIBLE = 1e-7  # of the largest eigenvalue: below it float32 knows no direction
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)  # times the mean eigenvalue of X X^T
Factors = tuple[torch.Tensor, torch.Tensor]


def largest_part(matrix: torch.Tensor, rank: int) -> Factors:
    """The best approximation of a float32 matrix [out, in] by this rank; the first factor is orthogonal.

    By a randomized range finder (Halko, Martinsson, Tropp 2011) from fixed random numbers.
    """
    generator = torch.Generator().manual_seed(0)
    probe = matrix @ torch.randn(matrix.shape[1], min(OVERSAMPLED * rank, *matrix.shape), generator=generator)
    for _ in range(POWERS):
        probe = matrix @ (matrix.T @ torch.linalg.qr(probe).Q)
    basis = torch.linalg.qr(probe).Q
    inside = basis.T @ matrix
    up = basis @ torch.linalg.eigh(inside @ inside.T).eigenvectors[:, -rank:].flip(1)
    return up, up.T @ matrix


@dataclass(frozen=True)
class Inputs:
    """Inputs X [n, in] as left @ right: left [n, m] orthogonal, rows of right [m, in] with squared norms ``energy``."""

    left: torch.Tensor
    right: torch.Tensor
    energy: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor) -> Inputs:
        """Of float32 rows [n, in]; n x n where there are fewer rows than columns, so that width costs little."""
        wide = rows.shape[1] > len(rows)
        energy, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        kept = energy > NEGLIGIBLE * energy.max()
        energy, vectors = energy[kept], vectors[:, kept]
        if wide:
            return cls(vectors, vectors.T @ rows, energy)
        return cls(rows @ (vectors / energy.sqrt()), energy.sqrt().unsqueeze(1) * vectors.T, energy)


def fitted(inputs: Inputs, missing: torch.Tensor, rank: int, ridge: float) -> Factors:
    """Factors with the least ||Y - X (up @ down)^T||^2 + a penalty, of ``missing`` outputs Y [n, out].

    The penalty is ``ridge`` times the mean energy, times ||up @ down||^2: the best of this rank is the ridge solution
    C = Y^T X (X^T X + penalty)^-1 projected on the top singular directions of what it explains.
    """
    seen = inputs.left.T @ missing  # [m, out]
    damped = inputs.energy + ridge * inputs.energy.mean()
    up, _ = largest_part(((inputs.energy / damped).sqrt().unsqueeze(1) * seen).T, rank)
    return up, ((seen @ up).T / damped) @ inputs.right
