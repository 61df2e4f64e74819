"""``calibquant lora``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import OptionError
from . import decision
from .bar import Bar
from .options import path, positive

HELP = "error-correction LoRA for a quantized file; or several LoRAs in one (lora concat)"
USAGE = """calibquant lora SOURCE QUANT -o LORA [--rank 32] [--calibration C] [--overwrite]
       calibquant lora concat A B[:STRENGTH]... -o LORA [--overwrite]"""
RANK = 32


def options(c: argparse.ArgumentParser) -> None:
    c.usage = USAGE
    words = c.add_argument("words", type=path, nargs="+", metavar="SOURCE QUANT | concat A B:STRENGTH")
    words.help = "the 16-bit model and the file made from it; or a split's LoRA and others to be loaded with it"
    c.add_argument("-o", "--output", type=path, required=True, metavar="LORA.safetensors")
    c.add_argument("--rank", type=positive, metavar="N", help=f"of the factors of each layer (default {RANK})")
    c.add_argument("--calibration", type=path, metavar="C", help="fit to what layers see, on the rows sampled in C")
    c.add_argument("--force-calibration", action="store_true", help="use a calibration of another file")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> None:
    if str(args.words[0]) == "concat":
        _concat(args)
    elif len(args.words) == 2:
        _error_lora(args)
    else:
        raise OptionError("give SOURCE and QUANT, or concat and two LoRAs or more")


def _error_lora(args: argparse.Namespace) -> None:
    from .. import jobs
    from ..models.source import Source

    with Source(args.words[0], lossy=True) as source, Bar("lora") as bar:
        calibration = decision.calibration_of(source, args)
        rank = RANK if args.rank is None else args.rank
        report = jobs.error_lora(source, args.words[1], args.output, rank, calibration, args.overwrite, bar)
    print(f"{report.output}\n{report.summary()}")


def _concat(args: argparse.Namespace) -> None:
    from .. import jobs

    if len(args.words) < 3:
        raise OptionError("lora concat needs two LoRAs or more: A B:STRENGTH")
    if args.rank is not None or args.calibration or args.force_calibration:
        raise OptionError("lora concat takes neither --rank nor --calibration")
    with Bar("concat") as bar:
        layers = jobs.concat_loras([_weighted(word) for word in args.words[1:]], args.output, args.overwrite, bar)
    print(f"{args.output}: {layers} layers; load it with Load LoRA (Bypass, Model Only) at strength 1")


def _weighted(word: Path) -> tuple[Path, float]:
    """FILE:STRENGTH; a colon may be part of the path, as in C:\\x.safetensors."""
    name, colon, strength = str(word).rpartition(":")
    try:
        return (Path(name), float(strength)) if colon and name else (word, 1.0)
    except ValueError:
        return word, 1.0
