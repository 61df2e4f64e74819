"""What quantized files predict at points of the 16-bit model's own trajectories, as the loader runs them.

Arguments are those of nodes/sample_digits.py, the first FILE the 16-bit model; array "0", "1", … of the .npz holds
the predictions of each FILE, float32 [points, pictures, …].
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nodes")]

import sample_digits  # noqa: E402

POINTS = 6


def main() -> int:
    sample_digits.sample_files = predictions
    return sample_digits.main(sys.argv[1:])


def predictions(options: Any) -> dict[str, np.ndarray]:
    calls: list[tuple[Any, Any]] = []
    found = {}
    for index, file in enumerate(options.files):
        network = (model := sample_digits._load(file)).model.diffusion_model
        calls = calls or trajectory(model, network, options)
        found[str(index)] = torch.stack([network(*copy.deepcopy(a), **copy.deepcopy(k)) for a, k in calls]).numpy()
    return found


def trajectory(model: Any, network: torch.nn.Module, options: Any) -> list[tuple[Any, Any]]:
    """What the network is called with at points that are even in sigma, as Measure Sensitivity's are."""
    prompts = load_file(str(options.promptset))
    context = torch.cat([prompts[f"{i}.cond"] for i in range(sample_digits.DIGITS)])
    calls: list[tuple[Any, Any]] = []
    hook = network.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(copy.deepcopy((args, kwargs))), with_kwargs=True
    )
    sample_digits.sample(model, context, range(options.first_seed, options.first_seed + options.seeds), options.steps)
    hook.remove()
    times = [float(args[1].max()) for args, _ in calls]
    wanted = [times[0] * (1 - (i + 0.5) / POINTS) for i in range(POINTS)]
    return [calls[sum(time >= at for time in times) - 1] for at in wanted]


if __name__ == "__main__":
    sys.exit(main())
