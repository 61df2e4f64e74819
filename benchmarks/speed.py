"""Time and memory of `quantize` against convert_to_quant's fastest mode of the same format, same file, same run.

    python benchmarks/speed.py [--recipe mxfp8|nvfp4] [--rounding auto|nearest|search] [--busy 2] [--runs 5] [--file M]

Both write the file; both run as processes of their own, alternating, with --busy beside so many others that do nothing
but keep a core busy. Needs convert_to_quant (bootstrap.py test installs it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ROOT, busy, measure, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--file", type=Path, help="default: a 1.05 GB file of benchmarks/synthetic.py")
    parser.add_argument("--recipe", choices=["mxfp8", "nvfp4"], default="mxfp8")
    parser.add_argument("--rounding", choices=["auto", "nearest", "search"], default="auto")
    parser.add_argument("--busy", type=int, default=0, help="busy processes beside the measured one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = options.file or Path(folder) / "zimage.safetensors"
        if not options.file:
            subprocess.run([sys.executable, str(ROOT / "benchmarks" / "synthetic.py"), str(source)], check=True)
        ours = [sys.executable, "-m", "quant_core.cli", "quantize", str(source), "--recipe", options.recipe]
        ours += ["--rounding", options.rounding, "--overwrite", "-o", f"{folder}/ours.safetensors"]
        theirs = [str(Path(sys.executable).with_name("convert_to_quant")), "-i", str(source), f"--{options.recipe}"]
        theirs += ["--simple", "--comfy_quant", "--zimage", "-o", f"{folder}/theirs.safetensors"]
        with busy(options.busy):
            pairs = [(measure(ours), measure(theirs)) for _ in range(options.runs)]
        what = f"{source.stat().st_size / 1e9:.2f} GB bf16 -> {options.recipe}, beside {options.busy} busy processes"
    ours_name = f"calibquant quantize --recipe {options.recipe} --rounding {options.rounding}"
    print(table(what, (ours_name, f"convert_to_quant --{options.recipe} --simple"), pairs))


if __name__ == "__main__":
    main()
