"""What Monitor Calibration costs: seconds per sampling step with and without it, runs of both kinds in turn.

    python benchmarks/monitor_overhead.py [--runs 7] [--rows 2048]

Needs ComfyUI (see bootstrap.py); takes the GPU if ComfyUI finds one. Prints a markdown table. The demo model is tiny,
so that it shows the fixed cost of a hook; the wider one (random weights, 1024 channels) is nearer to a real model.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfy_env import import_comfy  # noqa: E402

DEMO = ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
STEPS = 12
WIDE = {"dim": 1024, "ffn_dim": 4096, "num_heads": 8, "num_layers": 2, "in_dim": 16, "out_dim": 16, "model_type": "t2v"}


def wide_model() -> Any:
    """A random Wan of 1024 channels and 2 blocks."""
    operations = importlib.import_module("comfy.ops").disable_weight_init
    build = importlib.import_module("comfy.ldm.wan.model").WanModel
    shapes = build(**WIDE, device="meta", dtype=torch.float32, operations=operations).state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.empty(t.shape).normal_(std=0.02, generator=generator) for name, t in shapes.items()}
    return importlib.import_module("comfy.sd").load_diffusion_model_state_dict(state)


def timed_run(model: Any, width: int, size: int) -> tuple[float, float, torch.Tensor]:
    """Seconds per step, seconds before the first and after the last step's end, and the sample."""
    sample, ends = importlib.import_module("comfy.sample"), []
    latent, generator = torch.zeros(1, 16, 1, size, size), torch.Generator().manual_seed(1)
    cond = [[torch.randn(1, 8, width, generator=generator), {}]]

    def step(*_: Any) -> None:
        synchronize()
        ends.append(time.perf_counter())

    began = time.perf_counter()
    noise = sample.prepare_noise(latent, 1)
    drawn = sample.sample(
        model, noise, STEPS, 1.0, "euler", "simple", cond, cond, latent, callback=step, disable_pbar=True, seed=1
    )
    synchronize()
    total, steps = time.perf_counter() - began, ends[-1] - ends[0]
    return steps / (STEPS - 1), total - steps, drawn


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(name: str, model: Any, watch: Callable[[Any, str], Any], text: int, size: int, runs: int) -> str:
    """One line of the table; raises if the monitor changed the sample."""
    watched = watch(model, name.replace(" ", "_"))
    timed_run(model, text, size), timed_run(watched, text, size)  # warm up
    pairs = [(timed_run(model, text, size), timed_run(watched, text, size)) for _ in range(runs)]
    assert all(torch.equal(plain[2], seen[2]) for plain, seen in pairs)
    without, with_it = (median(pair[i][0] for pair in pairs) for i in (0, 1))
    ratios = [seen[0] / plain[0] for plain, seen in pairs]
    rest = median(seen[1] - plain[1] for plain, seen in pairs)
    spread = f"{min(ratios):.2f} / {median(ratios):.2f} / {max(ratios):.2f}"
    return f"| {name} | {without * 1e3:.1f} | {with_it * 1e3:.1f} | {spread} | {rest:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        import_comfy(Path(folder))
        nodes = importlib.import_module("nodes")
        assert asyncio.run(nodes.load_custom_node(str(ROOT)))
        monitor = nodes.NODE_CLASS_MAPPINGS["CalibQuantMonitor"]

        def watch(model: Any, name: str) -> Any:
            made = monitor.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED
            return made(model=model, name=name, rows=options.rows, reset=False).result[0]

        demo = importlib.import_module("comfy.sd").load_diffusion_model(str(DEMO))
        lines = [compare("demo model", demo, watch, 64, 8, options.runs)]
        lines.append(compare("1024 channels", wide_model(), watch, 4096, 64, options.runs))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; n = {options.runs} pairs of runs of {STEPS} steps, {options.rows} rows\n")
    print("| | ms a step | with monitor | ratio min / median / max | more per run: moving, saving (s) |")
    print("|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
