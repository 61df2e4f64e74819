"""Every family with a row of its own, in every format: detected, planned, loads, and how far its output moves.

    python benchmarks/families.py [FAMILY …] [--formats nvfp4,fp8]

Small models of ComfyUI's own classes with random weights (tests/small_models.py), nearest rounding, on the CPU; the
ComfyUI that the tests find (COMFYUI_PATH). Columns:

detected: ComfyUI's class at the published widths is known as this family, from its keys and shapes.
layers: how many the plan quantizes, of all matrices. Widths that no block of 16 divides fall to FP8.
error: relative error of the output against the 16-bit model's. Random weights: it compares formats, not families.
beside: the same against the decoded weights in the 16-bit model; 0 unless the format rounds activations as well (INT8).
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models  # noqa: E402
from comfy_classes import CASES, Built  # noqa: E402
from comfy_env import import_comfy  # noqa: E402
from small_models import SMALL, Running, trial  # noqa: E402

from quant_core.models.architectures import detect  # noqa: E402
from quant_core.models.source import Source  # noqa: E402

FORMATS = ("nvfp4", "mxfp8", "fp8", "int8", "w4a8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=list(SMALL))
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        import_comfy(Path(folder))
        logging.disable(logging.WARNING)
        from comfyui_version import __version__

        print(f"ComfyUI {__version__}\n\n| family | format | detected | layers | error | beside |")
        print("|---|---|---|---|---|---|")
        for name in options.families:
            if SMALL[name].known:
                family(name, options.formats.split(","), Path(folder))
            else:
                print(f"| {name} | | not in this ComfyUI | | | |")


def family(name: str, formats: list[str], folder: Path) -> None:
    small = SMALL[name]
    shapes = Built.of(CASES[small.case]).file_shapes
    detected = "yes" if detect(shapes, shapes).name == name else f"as {detect(shapes, shapes).name}"
    running = Running(small)
    path = models.save(folder / f"{name}.safetensors", running.random_state())
    running.load(running.state)
    wanted = running.run()
    with Source(path) as source:
        for fmt in formats:
            try:
                done = trial(small, source, fmt, wanted, folder)
                figures = f"{done.layers} of {len(source.layers)} | {done.error:.1e} | {done.beside:.0e}"
            except (KeyError, ValueError) as refused:  # this ComfyUI does not know the format
                figures = f"not loaded: {str(refused)[:60]} | | "
            print(f"| {name} | {fmt} | {detected} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
