"""The reference sampler: flow matching by Euler steps, on the schedule that ComfyUI calls "simple".

Latents equal those of ComfyUI's KSampler (``nodes/sample_digits.py``) but for the order of sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from ..evidence.calibration import Calibration
from ..evidence.collector import Collector
from ..evidence.watch import watch
from ..files.checkpoint import Checkpoint
from ..locate import asset
from ..models.architectures import Architecture
from . import digits
from .wan import Wan

PROMPT_SET = "workflows/promptsets/digits.safetensors"
SHIFT = 8.0  # of sigmas, as for every Wan 2.1
TIMES = 1000
STEPS = 12

Step = Callable[[int, float], None]  # (number of the step, its sigma), before the model is asked


def sigmas(steps: int) -> list[float]:
    """From 1 down to 0, steps + 1 of them: every so many entries of the shifted table of times."""
    even = torch.arange(1, TIMES + 1) / TIMES
    table = SHIFT * even / (1 + (SHIFT - 1) * even)
    return [float(table[-1 - int(i * TIMES / steps)]) for i in range(steps)] + [0.0]


def noise(seed: int) -> torch.Tensor:
    """What a run of that seed starts from, float32 [1, 16, 1, 8, 8]: drawn on the CPU on every machine."""
    return torch.randn(1, *digits.LATENT_SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def sample(model: Wan, seeds: Sequence[int], steps: int = STEPS, step: Step = lambda *_: None) -> torch.Tensor:
    """All digits for all seeds in one batch: float32 [seeds, 10, 16, 1, 8, 8], in Wan's latent space."""
    text = _embeddings().repeat(len(seeds), 1, 1)
    count = len(text) // len(seeds)
    x = torch.cat([noise(seed).expand(count, -1, -1, -1, -1) for seed in seeds])
    schedule = sigmas(steps)
    for number, (now, then) in enumerate(pairwise(schedule)):
        step(number, now)
        x = x + model(x, torch.full((len(x),), now * TIMES), text) * (then - now)
    return digits.to_wan_space(x).clone().unflatten(0, (len(seeds), count))


def calibrate(
    model: Wan, architecture: Architecture, seeds: Sequence[int], step: Step = lambda *_: None
) -> Calibration:
    """What every layer sees while all digits are drawn, one run a seed."""
    collector = Collector(lambda layer: architecture.describe(layer).shared_input)

    def called(number: int, sigma: float) -> None:
        collector.model_call(torch.tensor(sigma), [0])
        step(number, sigma)

    for seed in seeds:
        collector.start_run(f"digits seed {seed}")
        with watch(model, collector):
            sample(model, [seed], step=called)
        collector.finish_run()
    return collector.result({"architecture": architecture.name, "seeds": list(seeds), "steps": [STEPS]})


def _embeddings() -> torch.Tensor:
    """Of the ten digits, float32 [10, tokens, width]."""
    with Checkpoint(asset(PROMPT_SET)) as file:
        return torch.cat([file.read(f"{digit}.cond").float() for digit in range(10)])
