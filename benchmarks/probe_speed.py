"""Time and memory of `calibquant probe` against quant_probe, same file, same run.

    python benchmarks/probe_speed.py --quant-probe FOLDER [--runs 5]

FOLDER is a checkout of quant_probe (it has no licence and no release, so it is not part of this repository). The file
has three blocks in Z-Image's true shapes: 543 M weights, 1.09 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from synthetic import linears, weight
from timing import measure, table


def make(path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    blocks = [layer for layer in linears(3840, 10240, 3, 2560) if layer[0].startswith("layers.")]
    save_file({f"{name}.weight": weight(o, i, generator) for name, o, i in blocks}, path, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant-probe", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "zimage3.safetensors"
        # in a process of its own: a child's peak memory starts at its parent's
        subprocess.run([sys.executable, __file__, "--quant-probe", ".", "--make", str(source)], check=True)
        package = Path(folder) / "peer"
        package.mkdir()
        (package / "quant_probe").symlink_to(options.quant_probe.resolve())  # its own packaging does not install
        ours = [sys.executable, "-m", "quant_core.cli", "probe", str(source), "--model", "zimage"]
        run = "import sys; from quant_probe.cli import main; sys.exit(main())"
        theirs = [sys.executable, "-c", run, str(source), "--model", "zimage"]
        pairs = [(measure(ours), measure(theirs, package)) for _ in range(options.runs)]
        size = source.stat().st_size
    print(table(f"{size / 1e9:.2f} GB bf16, 18 tensors", ("calibquant probe", "quant_probe"), pairs))


if __name__ == "__main__":
    main()
