"""``calibquant demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import path, positive

HELP = "the whole job on the model that ships with the pack"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("--out", type=path, default=Path("calibquant-demo"), metavar="DIR")
    c.add_argument("--seeds", type=positive, default=2, help="seeds per digit (default 2)")


def run(args: argparse.Namespace) -> None:
    from ..demo import run as demo

    print(demo.run(args.out, args.seeds))
