"""``calibquant calibration``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    pass

HELP = "what is in a calibration file; merge several"


def run(args: argparse.Namespace) -> None:
    from ..evidence import calibration

    loaded = [calibration.load(file) for file in args.files]
    if args.action == "info":
        if len(loaded) > 1:
            raise OptionError("calibration info takes one FILE")
        print(calibration.describe(loaded[0]))
        return
    if args.output is None:
        raise OptionError("calibration merge needs -o OUT.safetensors")
    merged = loaded[0]
    for other in loaded[1:]:
        merged = calibration.merge(merged, other)
    calibration.save(merged, args.output, args.overwrite)
    print(f"{args.output}: {len(merged.layers)} layers, {len(merged.info.get('runs', []))} runs")


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("action", choices=["info", "merge"])
    c.add_argument("files", type=Path, nargs="+", metavar="FILE")
    c.add_argument("-o", "--output", type=Path, metavar="OUT.safetensors", help="of merge")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")
