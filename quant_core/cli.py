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
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import CalibQuantError
from .textfile import gigabytes

if TYPE_CHECKING:
    from .plan import Plan
    from .source import Source


class UsageError(Exception):
    """Options that do not go together."""


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
    except UsageError as e:
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
    c.add_argument("--rounding", choices=["nearest"], default="nearest")
    c.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")
    c.add_argument("--verify", action="store_true", help="re-read the file by comfy-kitchen's dequantize and check it")
    c.add_argument("--json", action="store_true", help="print the report as one JSON document")


def _compare_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("source", type=Path)
    c.add_argument("quant", type=Path)
    c.add_argument("--json", action="store_true", help="print the report as one JSON document")


def _convert_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=Path)
    c.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _demo_options(c: argparse.ArgumentParser) -> None:
    c.add_argument("--out", type=Path, default=Path("calibquant-demo"), metavar="DIR")
    c.add_argument("--seeds", type=_positive, default=2, help="seeds per digit when a ComfyUI is found (default 2)")


def _decision_options(c: argparse.ArgumentParser) -> None:
    from . import recipes

    c.add_argument("--recipe", choices=list(recipes.RECIPES), help="a named rule set")
    c.add_argument("--architecture", metavar="NAME", help="overrules the detected model family")
    group = c.add_argument_group("convert_to_quant's words, instead of --recipe")
    group.add_argument("--base", choices=list(recipes.CTQ_TYPES), help="format of all layers not named below")
    group.add_argument("--custom-layers", type=_regex, metavar="REGEX", help="beats every exclusion")
    group.add_argument("--custom-type", choices=list(recipes.CTQ_TYPES))
    group.add_argument("--exclude-layers", type=_regex, metavar="REGEX", help="left in the source dtype")
    group.add_argument("--preset", choices=list(recipes.CTQ_PRESETS), action="append", default=[])


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

    if bool(args.recipe) == bool(args.base):
        raise UsageError("give --recipe NAME or --base TYPE (one of the two)")
    if args.recipe:
        if args.custom_layers or args.custom_type or args.exclude_layers or args.preset:
            raise UsageError("--custom-layers, --exclude-layers and --preset go with --base, not with --recipe")
        recipe = recipes.by_recipe_name(args.recipe)
    else:
        recipe = recipes.from_convert_to_quant(
            args.base, args.custom_layers, args.custom_type, args.exclude_layers, args.preset
        )
    for note in [*source.warnings(), recipe.warning]:
        if note:
            print(f"warning: {note}", file=sys.stderr)
    return recipes.make_plan(source, recipe)


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


def _plan(args: argparse.Namespace) -> None:
    from . import recipes
    from .source import Source

    with Source(args.file, args.architecture) as source:
        made = _make_plan(source, args)
        made.save(args.output)
        print(_plan_text(made, source))
        if args.print_convert_to_quant:
            print(recipes.to_convert_to_quant(made, str(args.file), args.file.stem + "-quantized.safetensors"))


def _plan_text(made: Plan, source: Source) -> str:
    from .formats import title

    counts = ", ".join(f"{n} {title(fmt)}" for fmt, n in made.count().items())
    sizes = f"{gigabytes(source.checkpoint.nbytes())} -> {gigabytes(made.size)}"
    return f"{source.architecture.title}, recipe {made.recipe}: {counts}; {sizes} ({made.size} bytes)"


def _quantize(args: argparse.Namespace) -> None:
    from . import pipeline, plan, quality
    from .source import Source

    if bool(args.plan) == bool(args.recipe or args.base):
        raise UsageError("give --plan PLAN.json, or --recipe NAME (one of the two)")
    with Source(args.file, args.architecture) as source:
        made = plan.load(args.plan) if args.plan else _make_plan(source, args)
        with Bar("quantize") as bar:
            report = pipeline.quantize(
                source, made, args.output, overwrite=args.overwrite, device=args.device, progress=bar
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
        report = quality.compare(source, args.quant, progress=bar)
    if args.json:
        print(report.to_json(), end="")
        return
    print(f"{'relative weight error':>22}  {'format':<12} {'bytes':>12}  layer")
    for layer in report.layers:
        print(f"{layer.error:>22.3e}  {layer.format:<12} {layer.nbytes:>12}  {layer.name}")
    print(report.summary())


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


Command = tuple[Callable[[argparse.Namespace], None], Callable[[argparse.ArgumentParser], None], str]
COMMANDS: dict[str, Command] = {
    "inspect": (_inspect, _inspect_options, "what a file is: architecture, layers, formats, bytes, provenance"),
    "plan": (_plan, _plan_options, "decide a format per layer, with reasons and the exact size"),
    "quantize": (_quantize, _quantize_options, "write the quantized file"),
    "compare": (_compare, _compare_options, "per-layer weight error of a finished file, worst first"),
    "convert": (_convert, _convert_options, "HSWQ V2 (.scale) and legacy scaled_fp8 files -> native dialect"),
    "demo": (_demo, _demo_options, "the whole job on the model that ships with the pack"),
}

if __name__ == "__main__":
    sys.exit(main())
