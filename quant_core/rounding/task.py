"""What is rounded: one layer of a job, and what is known of its inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..evidence.calibration import LayerStats
from ..formats import FORMATS, Format, turn
from .layerplan import LayerPlan
from .pack import Packed
from .split import Branch


@dataclass(frozen=True)
class Inputs:
    """What is known of a layer's inputs: sampled rows [n, in] (any float dtype), and the calibration's statistics.

    held_out: bool [n], the rows of ``runs`` runs that judge what was fitted to the others; none where there is one run.
    """

    rows: torch.Tensor
    stats: LayerStats
    held_out: torch.Tensor
    runs: int

    @property
    def fitted(self) -> torch.Tensor:
        return self.rows[~self.held_out] if self.runs else self.rows

    @property
    def fitted_mean(self) -> torch.Tensor:
        """E[x] float32 [in], without the runs that judge."""
        return self.fitted.float().mean(0) if self.runs else self.stats.input_mean

    @property
    def judged(self) -> torch.Tensor:
        return self.rows[self.held_out] if self.runs else self.rows

    def scaled(self, factor: torch.Tensor) -> Inputs:
        """The inputs times ``factor`` [in]."""
        return replace(self, rows=self.rows.float() * factor, stats=self.stats.scaled(factor))


@dataclass(frozen=True)
class Task:
    """One layer to round: its plan entry, weight [out, in], bias [out], inputs; ``where`` begins error messages.

    whole: the weight that ``weight`` is left of when a branch has been split off; None without a branch.
    """

    entry: LayerPlan
    weight: torch.Tensor
    where: str
    bias: torch.Tensor | None
    inputs: Inputs | None
    whole: torch.Tensor | None = None

    @property
    def fmt(self) -> Format:
        return FORMATS[self.entry.format]

    @property
    def rotation(self) -> int:
        return self.fmt.rotation(self.weight.shape[1])

    def importance(self) -> torch.Tensor:
        """E[x^2] in the format's own basis, float32 [in]; without sampled rows as if inputs were independent."""
        assert self.inputs is not None
        known, size = self.inputs.stats.input_sqmean, self.rotation
        if not size:
            return known
        if not len(self.inputs.rows):
            return known.view(-1, size).mean(1, keepdim=True).expand(-1, size).reshape(-1)
        return turn(self.inputs.rows.float(), size).square().mean(0)

    def decode(self, packed: Packed) -> torch.Tensor:
        return self.fmt.decode(packed.tensors, tuple(self.weight.shape))

    def part(self, outputs: torch.Tensor) -> Task:
        """The same for some ``outputs``, int64."""
        return replace(
            self,
            weight=self.weight[outputs],
            bias=None if self.bias is None else self.bias[outputs],
            whole=None if self.whole is None else self.whole[outputs],
        )

    def without(self, branch: Branch) -> Task:
        """What is left to be rounded."""
        return replace(self, weight=self.weight.float().cpu() - branch.product(), whole=self.weight)
