"""``calibquant demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import path, positive

HELP = "the whole job on the model that ships with the pack"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("--out", type=path, default=Path("calibquant-demo"), metavar="DIR")
    c.add_argument("--seeds", type=positive, default=2, help="seeds per digit (default 2)")
    c.add_argument("--no-comfyui", action="store_true", help="draw with the built-in sampler, even beside a ComfyUI")


def run(args: argparse.Namespace) -> None:
    from ..demo import run as demo

    print(demo.run(args.out, args.seeds, not args.no_comfyui))
