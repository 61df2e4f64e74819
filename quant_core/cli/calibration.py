"""``calibquant calibration``."""

from __future__ import annotations

import argparse

from ..errors import OptionError
from .options import path

HELP = "what is in a calibration file; merge several"


def run(args: argparse.Namespace) -> None:
    from ..evidence import calibration
    from ..evidence.histogram import histogram

    if args.action == "info" and (len(args.files) > 1 or args.output or args.overwrite):
        raise OptionError("calibration info takes one FILE and no -o")
    if args.action == "merge" and args.output is None:
        raise OptionError("calibration merge needs -o OUT.safetensors")
    loaded = [calibration.load(file) for file in args.files]
    if args.action == "info":
        print("\n".join([calibration.describe(loaded[0]), "", "calls of the model:", *histogram(loaded[0])]))
        return
    merged = loaded[0]
    for other in loaded[1:]:
        merged = calibration.merge(merged, other)
    calibration.save(merged, args.output, args.overwrite)
    print(f"{args.output}: {len(merged.layers)} layers, {len(merged.info.get('runs', []))} runs")


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("action", choices=["info", "merge"])
    c.add_argument("files", type=path, nargs="+", metavar="FILE")
    c.add_argument("-o", "--output", type=path, metavar="OUT.safetensors", help="of merge")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")
