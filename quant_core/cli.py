"""The command line: ``calibquant COMMAND …``. Results go to stdout, progress and warnings to stderr.

Exit codes: 0 done; 1 a problem with an input or output (one line ``error: …``); 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import CalibQuantError, OptionError
from .textfile import gigabytes

if TYPE_CHECKING:
    from .calibration import Calibration
    from .plan import Plan
    from .report import Report
    from .scoring import ScoreOptions
    from .source import Source


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a cp1252 pipe on Windows must not die of an arrow
            stream.reconfigure(encoding="utf-8", errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv).parse_args(argv)
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        args.run(args)
        return 0
    except OptionError as e:
        print(f"usage error: {e} (see calibquant {args.command} --help)", file=sys.stderr)
        return 2
    except CalibQuantError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `calibquant inspect … | head`
        sys.stderr.close()
        return 0


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Only the command that is called gets its options: some need torch, which takes long to import."""
    parser = argparse.ArgumentParser(prog="calibquant", description="Turn a 16-bit diffusion model into a small file.")
    parser.add_argument("--version", action="version", version=f"calibquant {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, (run, options, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, command=name)
        if name == called:
            options(command)
    return parser


def _inspect_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=Path)
    c.add_argument("--json", action="store_true", help="print one JSON document")


def _probe_options(c: argparse.ArgumentParser) -> None:
    from .architectures import ARCHITECTURES

    c.add_argument("file", type=Path)
    c.add_argument("--csv", type=Path, metavar="P", help="write a table, one row per layer")
    c.add_argument("--json", type=Path, metavar="P", help="write everything as one JSON document")
    c.add_argument("--model", choices=[a.name for a in ARCHITECTURES], help="overrules the detected model family")
    c.add_argument("--compat", choices=["quant_probe"], help="decide as that tool does, its defects included")
    c.add_argument("--outlier-sigma", type=_above_zero, default=3.0, help="what counts as an outlier (default 3)")
    _score_options(c)
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
        group.add_argument(name, type=_number, metavar="X", help=text)
    group.add_argument(
        "--spread-filter-exempt", nargs="*", metavar="TYPE", help="types --min-group-spread leaves alone"
    )


def _plan_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=Path)
    _decision_options(c)
    c.add_argument("-o", "--output", type=Path, required=True, metavar="PLAN.json")
    c.add_argument("--print-convert-to-quant", action="store_true", help="also print convert_to_quant's command")


def _quantize_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=Path)
    c.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    c.add_argument("--plan", type=Path, metavar="PLAN.json", help="a plan made by `calibquant plan`")
    _decision_options(c)
    c.add_argument("--rounding", choices=["auto", "nearest", "search", "gptq"], default="auto", help=ROUNDING_HELP)
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")
    c.add_argument("--verify", action="store_true", help="re-read the file by comfy-kitchen's dequantize and check it")
    c.add_argument("--json", action="store_true", help="print the report as one JSON document")


def _compare_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("source", type=Path)
    c.add_argument("quant", type=Path)
    c.add_argument("--calibration", type=Path, metavar="C", help="also measure outputs, on the rows sampled in C")
    c.add_argument("--force-calibration", action="store_true", help="use a calibration of another file")
    c.add_argument("--json", action="store_true", help="print the report as one JSON document")


def _convert_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=Path)
    c.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _demo_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("--out", type=Path, default=Path("calibquant-demo"), metavar="DIR")
    c.add_argument("--seeds", type=_positive, default=2, help="seeds per digit when a ComfyUI is found (default 2)")


def _decision_options(c: argparse.ArgumentParser) -> None:
    from . import convert_to_quant, recipes

    c.add_argument("--recipe", choices=[*recipes.RECIPES, *HSWQ], help="a named rule set (hswq needs --calibration)")
    c.add_argument("--calibration", type=Path, metavar="C", help="a *.calibration.safetensors of this model")
    c.add_argument("--no-input-scale", action="store_true", help="leave activation scales to the loader")
    c.add_argument("--force-calibration", action="store_true", help="use a calibration of another file")
    c.add_argument("--pre-quant-scale", action="store_true", help=SMOOTHING_HELP)
    c.add_argument("--percentiles", nargs=2, type=_number, metavar=("FP8", "KEEP"), help="by quant_probe's score")
    c.add_argument("--keep-ratio", type=_number, metavar="R", help="share of layers, worst first, kept in 16 bit")
    c.add_argument("--architecture", metavar="NAME", help="overrules the detected model family")
    group = c.add_argument_group("convert_to_quant's words, instead of --recipe")
    group.add_argument(
        "--base",
        choices=list(convert_to_quant.TYPES),
        help="format of all layers not named below (or not kept by --keep-ratio)",
    )
    group.add_argument("--custom-layers", type=_regex, metavar="REGEX", help="beats every exclusion")
    group.add_argument("--custom-type", choices=list(convert_to_quant.TYPES))
    group.add_argument("--exclude-layers", type=_regex, metavar="REGEX", help="left in the source dtype")
    group.add_argument("--preset", choices=list(convert_to_quant.PRESETS), action="append", default=[])


def _number(text: str) -> float:
    value = float(text)
    if value != value:
        raise argparse.ArgumentTypeError("nan is no number to compare with")
    return value


def _above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"no regular expression: {e}") from e
    return text


def _make_plan(source: Source, args: argparse.Namespace) -> Plan:
    from . import recipes

    calibration = _calibration(source, args)
    plan = _uncalibrated_plan(source, args, calibration)
    if calibration is not None and not args.no_input_scale:
        plan = recipes.calibrated(source, plan, calibration)
    return _smoothed(source, plan, calibration) if args.pre_quant_scale else plan


def _smoothed(source: Source, plan: Plan, calibration: Calibration | None) -> Plan:
    from . import recipes

    if calibration is None:
        raise OptionError("--pre-quant-scale needs --calibration C")
    return recipes.smoothed(source, plan, calibration)


def _check_core(plan: Plan) -> None:
    """A plan with ``pre_quant_scale``, given or just made, is only for a ComfyUI that reads it."""
    from . import smoothing

    if any(entry.pre_quant_scale for entry in plan.layers.values()) and (warning := smoothing.refuse_old_core()):
        print(f"warning: {warning}", file=sys.stderr)


def _calibration(source: Source, args: argparse.Namespace) -> Calibration | None:
    from . import calibration, recipes

    if args.calibration is None:
        return None
    loaded = calibration.load(args.calibration)
    try:
        recipes.check_calibration(source, loaded)
    except CalibQuantError as e:
        if not args.force_calibration:
            raise
        print(f"warning: {e}; going on because of --force-calibration", file=sys.stderr)
    return loaded


def _uncalibrated_plan(source: Source, args: argparse.Namespace, calibration: Calibration | None) -> Plan:
    from . import recipes

    if args.recipe in HSWQ:
        if calibration is None:
            raise OptionError(f"--recipe {args.recipe} needs --calibration C")
        ratio = 0.25 if args.keep_ratio is None else args.keep_ratio
        return recipes.hswq(source, calibration, ratio, scaled=args.recipe == "hswq")
    ways = [args.recipe, args.percentiles, args.keep_ratio is not None, args.base and args.keep_ratio is None]
    if sum(map(bool, ways)) != 1:
        raise OptionError("give one of --recipe NAME, --percentiles FP8 KEEP, --keep-ratio R, --base TYPE")
    if args.percentiles or args.keep_ratio is not None:
        return _plan_from_probe(source, args)
    if args.recipe:
        if args.custom_layers or args.custom_type or args.exclude_layers or args.preset:
            raise OptionError("--custom-layers, --exclude-layers and --preset go with --base, not with --recipe")
        recipe = recipes.by_recipe_name(args.recipe)
    else:
        recipe = recipes.from_convert_to_quant(
            args.base, args.custom_layers, args.custom_type, args.exclude_layers, args.preset
        )
    for note in [*source.warnings(), recipe.warning]:
        if note:
            print(f"warning: {note}", file=sys.stderr)
    return recipes.make_plan(source, recipe)


def _plan_from_probe(source: Source, args: argparse.Namespace) -> Plan:
    from . import convert_to_quant, probe, recipes, scoring

    with Bar("probe") as bar:
        probed = probe.probe(args.file, args.architecture, progress=bar)
    if args.keep_ratio is not None:
        base = convert_to_quant.TYPES[args.base or "nvfp4"]
        return recipes.keep_worst(source, probed, args.keep_ratio, base)
    fp8, keep = args.percentiles
    options = replace(scoring.defaults(probed.architecture), fp8_percentile=fp8, keep_percentile=keep)
    return recipes.by_score(source, probed, options)


def _inspect(args: argparse.Namespace) -> None:
    from . import describe

    info = describe.inspect(args.file)
    if args.json:
        print(json.dumps(info, indent=1))
        return
    print(f"{info['file']}: {info['architecture_title']}, {gigabytes(info['bytes'])}, {info['tensors']} tensors")
    if info["prefix"]:
        print(f"prefix {info['prefix']} ({info['other_tensors']} tensors outside it: kept as they are)")
    print("2-D weights: " + ", ".join(f"{n} {fmt}" for fmt, n in info["formats"].items()))
    print("bytes: " + ", ".join(f"{dtype} {gigabytes(n)}" for dtype, n in info["dtypes"].items()))
    if info["provenance"]:
        made = info["provenance"]
        source = made["source"]
        print(f"made by {made['tool']}, recipe {made['recipe']}, from {source['file']} (sha256 {source['sha256']})")


def _probe(args: argparse.Namespace) -> None:
    from . import probe, probe_report, scoring
    from .textfile import write_text

    with Bar("probe") as bar:
        probed = probe.probe(args.file, args.model, args.outlier_sigma, progress=bar)
    options = _scoring(args, probed.architecture)
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
    from . import scoring

    names = [f.name for f in fields(scoring.ScoreOptions)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "spread_filter_exempt" in given:
        given["spread_filter_exempt"] = tuple(given["spread_filter_exempt"])
    options = replace(scoring.defaults(architecture), **given)
    options.check()
    return options


def _plan(args: argparse.Namespace) -> None:
    from . import convert_to_quant
    from .source import Source

    with Source(args.file, args.architecture) as source:
        made = _make_plan(source, args)
        _check_core(made)
        made.save(args.output)
        print(_plan_text(made, source))
        if args.print_convert_to_quant:
            chosen = {layer: entry.format for layer, entry in made.layers.items()}
            print(convert_to_quant.to_command(chosen, str(args.file), f"{args.file.stem}-quantized.safetensors"))


def _plan_text(made: Plan, source: Source) -> str:
    from .formats import title

    counts = ", ".join(f"{n} {title(fmt)}" for fmt, n in made.count().items())
    sizes = f"{gigabytes(source.checkpoint.nbytes())} -> {gigabytes(made.size)}"
    return f"{source.architecture.title}, recipe {made.recipe}: {counts}; {sizes} ({made.size} bytes)"


def _quantize(args: argparse.Namespace) -> None:
    from . import pipeline, plan, quality
    from .source import Source

    decided = args.recipe or args.base or args.percentiles or args.keep_ratio is not None
    if bool(args.plan) == bool(decided):
        raise OptionError("give --plan PLAN.json, or --recipe NAME (one of the two)")
    if args.plan and args.pre_quant_scale:
        raise OptionError("--pre-quant-scale is for making a plan: give it to `calibquant plan`")
    with Source(args.file, args.architecture) as source:
        made = plan.load(args.plan) if args.plan else _make_plan(source, args)
        _check_core(made)
        seen = _calibration(source, args)
        with Bar("quantize") as bar:
            report = pipeline.quantize(
                source,
                made,
                args.output,
                overwrite=args.overwrite,
                device=args.device,
                calibration=seen,
                rounding=args.rounding,
                progress=bar,
            )
        if args.verify:
            with Bar("verify") as bar:
                quality.verify(source, report, progress=bar)
    if args.json:
        print(report.to_json(), end="")
    else:
        print(f"{report.output}\n{report.summary()}" + ("\nverified: every layer's error is as reported" * args.verify))


def _compare(args: argparse.Namespace) -> None:
    from . import quality
    from .source import Source

    with Source(args.source) as source, Bar("compare") as bar:
        report = quality.compare(source, args.quant, progress=bar, calibration=_calibration(source, args))
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


def _convert(args: argparse.Namespace) -> None:
    from . import pipeline

    with Bar("convert") as bar:
        done = pipeline.convert(args.file, args.output, args.overwrite, progress=bar)
    print(
        f"{args.output}: {done['layers']} layers in the native dialect, {done['convolutions']} Conv weights in 16 bit"
    )


def _demo(args: argparse.Namespace) -> None:
    from . import demo

    print(demo.run(args.out, args.seeds))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Bar:
    """The engine's progress protocol on a tqdm bar on stderr."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit="tensor", file=sys.stderr, leave=False, disable=None)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int, text: str) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)


def _calibration_command(args: argparse.Namespace) -> None:
    from . import calibration

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


def _calibration_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("action", choices=["info", "merge"])
    c.add_argument("files", type=Path, nargs="+", metavar="FILE")
    c.add_argument("-o", "--output", type=Path, metavar="OUT.safetensors", help="of merge")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")


HSWQ = ("hswq", "hswq-v1")
SMOOTHING_HELP = "smooth the inputs of NVFP4 layers; only for a ComfyUI newer than 0.29, which would ignore it"
ROUNDING_HELP = "auto (default): gptq with a calibration; else searched scales for NVFP4, nearest for the rest"
Command = tuple[Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None], str]
COMMANDS: dict[str, Command] = {
    "inspect": (_inspect, _inspect_options, "what a file is: architecture, layers, formats, bytes, provenance"),
    "probe": (_probe, _probe_options, "statistics of the weights and the measured error of every format"),
    "plan": (_plan, _plan_options, "decide a format per layer, with reasons and the exact size"),
    "quantize": (_quantize, _quantize_options, "write the quantized file"),
    "compare": (_compare, _compare_options, "per-layer weight error of a finished file, worst first"),
    "convert": (_convert, _convert_options, "HSWQ V2 (.scale) and legacy scaled_fp8 files -> native dialect"),
    "calibration": (_calibration_command, _calibration_options, "what is in a calibration file; merge several"),
    "demo": (_demo, _demo_options, "the whole job on the model that ships with the pack"),
}

if __name__ == "__main__":
    sys.exit(main())
