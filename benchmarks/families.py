"""Every family with a row of its own, in every format: detected, planned, loads, and drawn within the format's error.

    python benchmarks/families.py [FAMILY …] [--formats nvfp4,fp8]

Small models of ComfyUI's own classes with random weights (tests/small_models.py), nearest rounding, on the CPU; the
ComfyUI that the tests find (COMFYUI_PATH). Columns:

detected: ComfyUI's class at the published widths is known as this family, from its keys and shapes.
planned: how many layers the plan quantizes, of all matrices. Widths that no block of 16 divides fall to FP8.
loads: every key of the file has its place in ComfyUI's class, and none is missing.
error: relative error of the output against the 16-bit model's. Random weights: it compares formats, not families.
noise: the same when the 16-bit model's quantized layers get Gaussian noise of the format's known size (NOISE) instead.
within: yes where the output is what the file's weights say, decoded by the engine, in the 16-bit model (to 1e-8; INT8
and W4A8 round inputs on a CPU as well: to the noise of that alone), and the error is that of noise. Both may be FACTOR
times as large: two draws of the same noise in these models differ by up to 3.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models  # noqa: E402
from comfy_classes import CASES, Built  # noqa: E402
from comfy_env import import_comfy  # noqa: E402
from small_models import OLDER, SMALL, Running, relative_error, trial  # noqa: E402

from quant_core.models.architectures import detect  # noqa: E402
from quant_core.models.source import Source  # noqa: E402
from quant_core.planning import recipes  # noqa: E402

# Relative mean squared error of Gaussian weights rounded to nearest, and of inputs where a CPU rounds them, too: E2M1
# in blocks of 16, E4M3 in blocks of 32 (power-of-two scales) and by tensor, 8 bits by row. Of W4A8's 4 bits what the
# best 16 even levels make (.01154; J. Max, Quantizing for minimum distortion, 1960): its own follow groups: less.
NOISE = {
    "nvfp4": (0.0091, 0),
    "mxfp8": (0.00086, 0),
    "fp8": (0.0007, 0),
    "int8": (0.00006, 0.00006),
    "w4a8": (0.01154, 0.00006),
}
DRAWS = 2  # of the noise
FACTOR = 4
ALL = SMALL | OLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=list(ALL))
    parser.add_argument("--formats", default=",".join(NOISE))
    options = parser.parse_args()
    began, cells, whole = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        import_comfy(Path(folder))
        logging.disable(logging.WARNING)
        from comfyui_version import __version__

        print(f"ComfyUI {__version__}\n\n| family | format | detected | planned | loads | error | noise | within |")
        print("|---|---|---|---|---|---|---|---|")
        for name in options.families:
            if not ALL[name].known:
                print(f"| {name} | | not in this ComfyUI | | | | | |")
                continue
            for row in family(name, options.formats.split(","), Path(folder)):
                print(f"| {name} | {' | '.join(row)} |", flush=True)
                cells, whole = cells + 1, whole + (row[1] == row[3] == row[-1] == "yes")
    print(f"\n{whole} of {cells} cells: yes in every column; {time.monotonic() - began:.0f} s")


def family(name: str, formats: list[str], folder: Path) -> list[list[str]]:
    small, rows = ALL[name], []
    shapes = Built.of(CASES[small.case]).file_shapes
    known_as = detect(shapes, shapes).name
    detected = "yes" if known_as == name else f"as {known_as}"
    running = Running(small)
    path = models.save(folder / f"{name}.safetensors", running.random_state())
    running.load(running.state)
    wanted = running.run()
    with Source(path) as source:
        for fmt in formats:
            layers = list(recipes.make_plan(source, fmt).quantized())
            planned = f"{len(layers)} of {len(source.layers)}"
            try:
                done = trial(small, source, fmt, wanted, folder)
            except (KeyError, ValueError, AssertionError) as refused:  # of a format that this ComfyUI does not know
                rows.append([fmt, detected, planned, f"no: {refused!r:.60}", "", "", ""])
                continue
            weights, inputs = NOISE[fmt]
            noise = max(noisy(running, layers, weights, inputs, seed, wanted) for seed in range(DRAWS))
            alone = max(noisy(running, layers, 0, inputs, seed, wanted) for seed in range(DRAWS)) if inputs else 0
            within = done.error <= FACTOR * noise and done.beside <= max(1e-8, FACTOR * alone)
            figures = [f"{done.error:.1e}", f"{noise:.1e}", "yes" if within else f"no (beside {done.beside:.0e})"]
            rows.append([fmt, detected, planned, "yes", *figures])
    path.unlink()
    return rows


def noisy(running: Running, layers: list[str], weights: float, inputs: float, seed: int, wanted: torch.Tensor) -> float:
    """Error of the output with Gaussian noise on the weights and inputs of these layers; sizes are relative squares."""
    generator = torch.Generator().manual_seed(seed)

    def disturbed(tensor: torch.Tensor, size: float) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=generator) * (size * tensor.square().mean()).sqrt()
        return tensor + noise

    def before(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return disturbed(args[0], inputs), *args[1:]

    state = dict(running.state)
    state |= {f"{name}.weight": disturbed(state[f"{name}.weight"], weights) for name in layers}
    running.load(state)
    modules = dict(running.model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(before) for name in layers if inputs and name in modules]
    try:
        return relative_error(running.run(), wanted)
    finally:
        for hook in hooks:
            hook.remove()
        running.load(running.state)


if __name__ == "__main__":
    main()
