"""``calibquant compare``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import decision
from .bar import Bar
from .options import path

if TYPE_CHECKING:
    from ..reports.report import Report

HELP = "per-layer weight error of a finished file, worst first"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("source", type=path)
    c.add_argument("quant", type=path)
    c.add_argument("--calibration", type=path, metavar="C", help="also measure outputs, on the rows sampled in C")
    c.add_argument("--force-calibration", action="store_true", help="use a calibration of another file")
    c.add_argument("--lora", type=path, metavar="P", help="of a split file, if it is not beside it")
    c.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> None:
    from .. import jobs
    from ..files.header import Headers
    from ..files.markers import parts_of
    from ..models.source import Source

    with Headers(args.quant) as quant:
        chosen = parts_of(quant)
    with Source(args.source, kinds=chosen, lossy=True) as source, Bar("compare") as bar:
        calibration = decision.calibration_of(source, args)
        report = jobs.compare(source, args.quant, progress=bar, calibration=calibration, lora=args.lora)
    if args.json:
        print(report.to_json(), end="")
        return
    print(_comparison(report))


def _comparison(report: Report) -> str:
    """A line per layer: relative errors of weights, and of outputs where they were measured."""
    measured = any(layer.output_errors for layer in report.layers)
    head = ["weights"] + ["outputs", "as loaded"] * measured
    lines = ["relative error per layer, worst first, of" + " (on the calibration's rows)" * measured]
    lines.append("".join(f"{name:>11}" for name in head) + f"  {'format':<16}{'bytes':>12}  layer")
    for layer in report.layers:
        errors = [layer.error] + [layer.output_errors.get("file"), layer.loader_error] * measured
        cells = "".join(f"{'-' if error is None else f'{error:.3e}':>11}" for error in errors)
        lines.append(f"{cells}  {layer.format:<16}{layer.nbytes:>12}  {layer.name}")
    return "\n".join([*lines, report.summary()])
