"""``calibquant probe``."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from .bar import Bar
from .options import PARTS_HELP, above_zero, number, parts, path

if TYPE_CHECKING:
    from ..planning.scoring import ScoreOptions

HELP = "statistics of the weights and the measured error of every format"


def options(c: argparse.ArgumentParser) -> None:
    from ..models.architectures import ARCHITECTURES

    c.add_argument("file", type=path)
    c.add_argument("--csv", type=path, metavar="P", help="write a table, one row per layer")
    c.add_argument("--json", type=path, metavar="P", help="write everything as one JSON document")
    c.add_argument("--model", choices=[a.name for a in ARCHITECTURES], help="overrules the detected model family")
    c.add_argument("--compat", choices=["quant_probe"], help="decide as that tool does, its defects included")
    c.add_argument("--outlier-sigma", type=above_zero, default=3.0, help="what counts as an outlier (default 3)")
    _score_options(c)
    c.add_argument("--parts", type=parts, default=(), metavar="A,B,…", help=PARTS_HELP)
    c.add_argument("--device", choices=["auto", "cpu"], default="auto", help="a GPU would wait for the disk: CPU only")
    c.add_argument("--lowram", action="store_true", help="accepted for quant_probe's sake: memory is always low")


def _score_options(c: argparse.ArgumentParser) -> None:
    group = c.add_argument_group("score (quant_probe's; defaults depend on the model family)")
    for name, text in {
        "--fp8-percentile": "score percentile from which a layer is FP8",
        "--keep-percentile": "score percentile from which a layer stays 16-bit",
        "--kurtosis-keep": "excess kurtosis from which a layer stays 16-bit whatever its score (inf: never)",
        "--fp8-min-score": "least score for FP8",
        "--min-group-spread": "types whose groups differ less are lowered one step",
        "--kurtosis-weight": "weight of the kurtosis (default .6)",
        "--range-weight": "weight of the range within the type (default .3)",
        "--ar-weight": "weight of the aspect ratio within the type (default .1)",
        "--extreme-pct": "share of blocks at each end that are groups of their own (default 10)",
    }.items():
        group.add_argument(name, type=number, metavar="X", help=text)
    group.add_argument(
        "--spread-filter-exempt", nargs="*", metavar="TYPE", help="types --min-group-spread leaves alone"
    )


def run(args: argparse.Namespace) -> None:
    from ..evidence import probe
    from ..files.text import write_text
    from ..models.modelfile import ModelFile
    from ..planning import scoring
    from ..reports import probe_report

    with ModelFile(
        args.file, args.model, args.parts, lossy=True
    ) as model:  # before the reading: a slip is told at once
        options = _scoring(args, model.architecture.name)
    with Bar("probe") as bar:
        probed = probe.probe(args.file, args.model, args.outlier_sigma, progress=bar, kinds=args.parts)
    scored = scoring.decide(probed, options, compat=args.compat is not None)
    known = probed.architecture in scoring.DEFAULTS and not args.compat
    theirs = scoring.decide(probed, options, compat=True) if known else None
    if args.csv:
        write_text(args.csv, probe_report.csv(probed, scored, compat=args.compat is not None))
    if args.json:
        write_text(args.json, probe_report.to_json(probed, scored, theirs, str(args.file)))
    print(probe_report.text(probed, scored, theirs))
    print("\n" + probe_report.suggestion(probed, scored, str(args.file)))


def _scoring(args: argparse.Namespace, architecture: str) -> ScoreOptions:
    from ..planning import scoring

    names = [f.name for f in fields(scoring.ScoreOptions)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "spread_filter_exempt" in given:
        given["spread_filter_exempt"] = tuple(given["spread_filter_exempt"])
    options = replace(scoring.defaults(architecture), **given)
    scoring.check(architecture, options, compat=args.compat is not None)
    return options
