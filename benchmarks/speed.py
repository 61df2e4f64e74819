"""Time and memory of `quantize --recipe mxfp8` against convert_to_quant's fastest mode, same file, same run.

    python benchmarks/speed.py [--runs 5] [--file MODEL.safetensors]

Both write the file; both run as processes of their own, alternating. Needs convert_to_quant (bootstrap.py test
installs it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ROOT, measure, table


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
        what = f"{source.stat().st_size / 1e9:.2f} GB bf16 -> MXFP8"
    print(table(what, ("calibquant quantize --recipe mxfp8", "convert_to_quant --mxfp8 --simple"), pairs))


if __name__ == "__main__":
    main()
