"""The split: a branch of low rank, kept in 16 bit, that takes up what the rounding of a layer's inputs costs.

y = R x4 + B (A x), with x4 the input as the loader quantizes it and R = W - B A the weight that is rounded (SVDQuant's
idea, Li et al., arXiv 2411.05007, in two stock files). What the inputs' rounding costs is R (x4 - x), so with
N = E[(x4 - x)(x4 - x)^T] the best branch of rank r is B A = svd_r(W N^1/2) N^-1/2 = U_r U_r^T W, with U_r the leading
eigenvectors of W N W^T. On sampled rows that is G^T G / n with G = (X4 - X) W^T: no matrix of in x in is ever made.

Layer error as loaded, NVFP4 with GPTQ, held out (benchmarks/below_floor.py): demo model at a mean rank of 16 2.44e-3
(without 4.81e-3, plain SVD of W 2.60e-3), 1024-wide block at 6 % bytes .32 of its floor (without 1.03). Left out,
because they gain nothing there: the weight's own rounding error in N (.995-1.01x), and a branch fitted again to the
rounded R (1.03-1.3x, on held-out rows).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.lora import DTYPE, balanced
from .gptq import to_unit

# Newer cores (0.33: comfy.ops.linear_input_act) compute some INT8 layers without calling their module: what a bypass
# loader hangs on it is lost in silence. And it would gain 18 % where FP4's inputs gain 93 % (tests' loud channels).
WITHOUT = ("int8_tensorwise", "int8_convrot")


@dataclass(frozen=True)
class Branch:
    """Factors of a layer's branch as its file has them: bfloat16 [out, rank] and [rank, in]."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def product(self) -> torch.Tensor:
        """float32 [out, in]."""
        return self.up.float() @ self.down.float()

    def first(self, rank: int) -> Branch:
        """The best branch of a lower rank: its leading directions come first."""
        return Branch(self.up[:, :rank], self.down[:rank])


def none(shape: tuple[int, ...], rank: int) -> Branch:
    """A branch that adds nothing."""
    return Branch(torch.zeros(shape[0], rank, dtype=DTYPE), torch.zeros(rank, shape[1], dtype=DTYPE))


def spectrum(weight: torch.Tensor, rows: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
    """The share of ||(X4 - X) W^T||^2 that each further rank takes off, falling: float32 [min(n, out)]; or zeros.

    weight: [out, in]; rows: the inputs X [n, in]; fed: X4, the same as the loader feeds them.
    """
    far = fed.float() - rows.float()
    errors = (far * to_unit(far)) @ (weight.float() * to_unit(weight)).T
    found = torch.linalg.eigvalsh(_gram(errors)).flip(0).clamp(min=0)
    return found / found.sum() if found.any() else found


def branch(weight: torch.Tensor, rows: torch.Tensor, fed: torch.Tensor, rank: int) -> Branch:
    """The best branch of that rank for inputs ``rows`` [n, in] that the loader feeds as ``fed``; on the CPU."""
    unit, far = to_unit(weight), fed.float() - rows.float()
    whole = weight.float() * unit
    errors = (far * to_unit(far)) @ whole.T  # G [n, out]
    leading = torch.linalg.eigh(_gram(errors))[1].flip(1)[:, :rank]
    if len(errors) < errors.shape[1]:
        leading = torch.linalg.qr(errors.T @ leading)[0]
    up, down = balanced(leading, leading.T @ whole / unit)
    return Branch(up.cpu(), down.cpu())


def _gram(errors: torch.Tensor) -> torch.Tensor:
    """G G^T or G^T G, whichever is smaller: their eigenvalues are the same but for zeros."""
    return errors @ errors.T if len(errors) < errors.shape[1] else errors.T @ errors
