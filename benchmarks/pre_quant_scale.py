"""What ``pre_quant_scale`` is worth on a core that reads it: NVFP4 by GPTQ, smoothed and not, of the demo model.

    COMFYUI_PATH=NEWER python benchmarks/pre_quant_scale.py [--out DIR] [--seeds 16]

Calibrated on blends of two digits, measured on the digits themselves and other seeds, as in quality.py; run it in the
newer core's own environment (.venv-next). Files that --out holds already are not made again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from quality import MODEL, Made, calibrate_demo, compare, distance, make, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep files here (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=16, help="per digit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        print(table(out, options.seeds))


def table(out: Path, seeds: int) -> str:
    seen, held_out = calibrate_demo(out)
    command = [sys.executable, "-m", "quant_core.cli", "quantize", str(MODEL), "--recipe", "nvfp4"]
    command += ["--rounding", "gptq", "--calibration", str(seen)]
    files = [
        make("NVFP4", "gptq", out / "plain", command),
        make("NVFP4", "gptq, pre_quant_scale", out / "smoothed", [*command, "--pre-quant-scale"]),
    ]
    reference = sample([MODEL], out, seeds)[0]
    drawn = {native: sample([one.path for one in files], out, seeds, native=native) for native in (False, True)}
    lines = [
        f"n = {10 * seeds} pictures a row; final latent: mean over all, and median of pictures",
        "",
        "| NVFP4 | bytes | layers, weights only | as loaded | latent, weights only | as loaded | median as loaded |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [row(one, held_out, [drawn[way][i] for way in (False, True)], reference) for i, one in enumerate(files)]
    plain, smoothed = ([distance(a, b) for a, b in pictures(latent, reference)] for latent in drawn[True])
    better = sum(b < a for a, b in zip(plain, smoothed, strict=True))
    return "\n".join([*lines, "", f"As loaded, {better} of {len(plain)} pictures are closer with pre_quant_scale."])


def row(one: Made, held_out: Path, drawn: list[np.ndarray], reference: np.ndarray) -> str:
    compare(one, MODEL, held_out)
    errors = [*one.errors, *(distance(latent, reference) for latent in drawn)]
    median = float(np.median([distance(a, b) for a, b in pictures(drawn[1], reference)]))
    return " | ".join([f"| {one.name}", str(one.size), *(f"{error:.2e}" for error in [*errors, median])]) + " |"


def pictures(latent: np.ndarray, reference: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    flat = (-1, *latent.shape[2:])
    return list(zip(latent.reshape(flat), reference.reshape(flat), strict=True))


if __name__ == "__main__":
    main()
