"""``calibquant convert``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .bar import Bar
from .options import path

if TYPE_CHECKING:
    pass

HELP = "HSWQ V2 (.scale) and legacy scaled_fp8 files -> native dialect"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=path)
    c.add_argument("-o", "--output", type=path, required=True, metavar="OUT.safetensors")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    from .. import jobs

    with Bar("convert") as bar:
        done = jobs.convert(args.file, args.output, args.overwrite, progress=bar)
    print(
        f"{args.output}: {done['layers']} layers in the native dialect, {done['convolutions']} other weights in 16 bit"
    )
