"""``calibquant quantize``."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ..errors import OptionError
from . import decision, many
from .bar import Bar
from .options import path

if TYPE_CHECKING:
    from ..jobs import Cluster
    from ..reports.report import Report

HELP = "write the quantized file"
ROUNDING_HELP = "auto (default): gptq with a calibration; else searched scales for NVFP4, nearest for the rest"
RAY_HELP = "on a Ray cluster (auto, local or HOST:PORT): layer by layer, or several files at once; pip install ray"

WITHOUT_CALIBRATION = (
    "warning: the plan was made with a calibration, and none is given: no GPTQ; give it with --calibration C"
)


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=path, nargs="+", help="several with --ray")
    c.add_argument("-o", "--output", type=path, required=True, metavar="OUT.safetensors", help="of several: a folder")
    c.add_argument("--plan", type=path, metavar="PLAN.json", help="a plan made by `calibquant plan`")
    decision.add_options(c)
    c.add_argument("--rounding", choices=["auto", "nearest", "search", "gptq"], default="auto", help=ROUNDING_HELP)
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    c.add_argument("--ray", metavar="ADDRESS", help=RAY_HELP)
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")
    c.add_argument("--fresh", action="store_true", help="do not go on where a killed run of the same job stopped")
    c.add_argument("--verify", action="store_true", help="re-read the file by comfy-kitchen's dequantize and check it")
    c.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> None:
    _check(args)
    if len(args.file) > 1:
        many.run(args, one)
        return
    from ..jobs import Cluster

    args.file = args.file[0]
    with Cluster(args.ray) if args.ray else nullcontext() as cluster:
        report = one(args, cluster)
    if args.json:
        print(report.to_json(), end="")
    else:
        print(f"{report.output}\n{report.summary()}" + ("\nverified: every layer's error is as reported" * args.verify))


def _check(args: argparse.Namespace) -> None:
    """What can be known to be wrong with the options by themselves."""
    from ..models.splitfile import branch_path

    decided = args.recipe or args.base or args.percentiles or args.keep_ratio is not None or decision.budget_of(args)
    if bool(args.plan) == bool(decided):
        raise OptionError("give --plan PLAN.json, or --recipe NAME or another way to decide (one of the two)")
    making = decision.words_of_base(args) + ["--pre-quant-scale"] * args.pre_quant_scale
    making += ["--no-input-scale"] * args.no_input_scale + ["--smooth"] * (args.smooth is not None)
    making += ["--split"] * bool(args.split) + ["--set"] * bool(args.set) + ["--parts"] * bool(args.parts)
    if args.plan and making:
        raise OptionError(f"{making[0]} is for making a plan: give it to `calibquant plan`")
    if len(args.file) > 1 and not args.ray:
        raise OptionError("several files need --ray ADDRESS; --ray local is this machine alone")
    if args.split and len(args.file) == 1:
        branch_path(args.output)  # says what is wrong with the name before the plan takes its time


def one(args: argparse.Namespace, cluster: Cluster | None = None) -> Report:
    """Quantize one file as the options say."""
    from .. import jobs
    from ..models.source import Source
    from ..planning import plan

    given = plan.load(args.plan) if args.plan else None
    parts = given.parts if given else args.parts
    with Source(args.file, args.architecture, parts, args.allow_lossy) as source:
        made = given or decision.make_plan(source, args)
        decision.check_core(made)
        seen = decision.calibration_of(source, args) if args.plan else None  # else the plan has it
        if args.rounding == "auto" and made.calibration and seen is None and made.seen is None:
            print(WITHOUT_CALIBRATION, file=sys.stderr)
        with Bar("quantize") as bar:
            return jobs.quantize(
                source,
                made,
                args.output,
                overwrite=args.overwrite,
                device=args.device,
                calibration=seen,
                rounding=args.rounding,
                verify=args.verify,
                fresh=args.fresh,
                cluster=cluster,
                progress=bar,
            )
