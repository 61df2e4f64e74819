"""``calibquant plan``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..files.text import change_of_size, write_text
from . import decision
from .options import path

if TYPE_CHECKING:
    from ..models.source import Source
    from ..planning.plan import Plan

HELP = "decide a format per layer, with reasons and the exact size"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=path)
    decision.add_options(c)
    c.add_argument("-o", "--output", type=path, required=True, metavar="PLAN.json")
    c.add_argument("--plot", type=path, metavar="CURVE.svg", help="draw error against size, recipes as points")
    c.add_argument("--print-convert-to-quant", action="store_true", help="also print convert_to_quant's command")


def run(args: argparse.Namespace) -> None:
    from ..models.source import Source
    from ..planning import convert_to_quant
    from ..reports import planned

    if args.plot and not decision.budget_of(args):
        raise OptionError("--plot goes with --size, --bits or --max-error")
    with Source(args.file, args.architecture, args.parts, args.allow_lossy) as source:
        made = decision.make_plan(source, args)
        decision.check_core(made)
        made.save(args.output)
        if args.plot:
            write_text(args.plot, planned.svg(made))
        print("\n".join([_plan_text(made, source), *planned.lines(made, source)]))
        if args.print_convert_to_quant:
            chosen = {layer: entry.format for layer, entry in made.layers.items()}
            print(convert_to_quant.to_command(chosen, str(args.file), f"{args.file.stem}-quantized.safetensors"))


def _plan_text(made: Plan, source: Source) -> str:
    from ..formats import title
    from ..planning import folds, splitting

    counts = ", ".join(f"{n} {title(fmt)}" for fmt, n in made.count().items())
    sizes = change_of_size(source.checkpoint.nbytes(), made.size)
    name = made.recipe if made.predicted else f"recipe {made.recipe}"
    line = f"{source.architecture.title}, {name}: {counts}; {sizes} ({made.size} bytes)"
    return "\n".join([line, *folds.summary(made.folds), *splitting.summary(source, made)])
