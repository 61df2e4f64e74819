"""Time and memory of `quantize --recipe mxfp8` against convert_to_quant's fastest mode, same file, same run.

    python benchmarks/speed.py [--runs 5] [--file MODEL.safetensors]

Both write the file; both run as processes of their own, alternating. Prints a markdown table: seconds
min/median/max, peak memory, and the ratio of each pair. Needs convert_to_quant (bootstrap.py test installs it).
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a command; exits when it fails."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--file", type=Path, help="default: a 1.05 GB file of benchmarks/synthetic.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.file or Path(folder) / "zimage.safetensors"
        if not options.file:
            subprocess.run([sys.executable, str(ROOT / "benchmarks" / "synthetic.py"), str(source)], check=True)
        ours = [sys.executable, "-m", "quant_core.cli", "quantize", str(source), "--recipe", "mxfp8", "--overwrite"]
        ours += ["-o", f"{folder}/ours.safetensors"]
        theirs = [str(Path(sys.executable).with_name("convert_to_quant")), "-i", str(source), "--mxfp8", "--simple"]
        theirs += ["--comfy_quant", "--zimage", "-o", f"{folder}/theirs.safetensors"]
        pairs = [(measure(ours), measure(theirs)) for _ in range(options.runs)]
        size = source.stat().st_size / 1e9
    print(
        f"{size:.2f} GB bf16 -> MXFP8, n = {options.runs}, {os.cpu_count()} cores, {platform.machine()}, no GPU used\n"
    )
    print("| | seconds min / median / max | peak GB (worst) |\n|---|---|---|")
    for i, name in enumerate(("calibquant quantize --recipe mxfp8", "convert_to_quant --mxfp8 --simple")):
        seconds = [pair[i][0] for pair in pairs]
        worst = max(pair[i][1] for pair in pairs)
        print(f"| {name} | {min(seconds):.1f} / {median(seconds):.1f} / {max(seconds):.1f} | {worst:.2f} |")
    ratios = [a[0] / b[0] for a, b in pairs]
    print(f"| ratio | {min(ratios):.2f} / {median(ratios):.2f} / {max(ratios):.2f} | |")


if __name__ == "__main__":
    main()
