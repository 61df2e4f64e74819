"""How a plan is asked for on the command line: the options that `plan` and `quantize` share."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import CalibQuantError, OptionError
from .bar import Bar
from .options import number, path, regex, split_amount

if TYPE_CHECKING:
    from ..evidence.calibration import Calibration
    from ..models.source import Source
    from ..planning.plan import Plan

HSWQ = ("hswq", "hswq-v1")
ROTATE_HELP = "INT8 layers in a rotated basis: auto, a recipe's default, where that measures better"
FOLD_HELP = "fold: smooth inputs through the weights that make them, where that measures better; any ComfyUI"
SMOOTHING_HELP = "smooth the inputs of NVFP4 layers; only for a ComfyUI newer than 0.29, which would ignore it"


def add_options(c: argparse.ArgumentParser) -> None:
    from ..planning import convert_to_quant, recipes, rotation, splitting

    c.add_argument("--recipe", choices=[*recipes.RECIPES, *HSWQ], help="a named rule set (hswq needs --calibration)")
    c.add_argument("--calibration", type=path, metavar="C", help="a *.calibration.safetensors of this model")
    c.add_argument("--no-input-scale", action="store_true", help="leave activation scales to the loader")
    c.add_argument("--force-calibration", action="store_true", help="use a calibration of another file")
    c.add_argument("--pre-quant-scale", action="store_true", help=SMOOTHING_HELP)
    c.add_argument("--smooth", choices=["none", "fold"], help=FOLD_HELP)
    c.add_argument("--split", type=split_amount, metavar="RANK|SHARE%", help=splitting.HELP)
    c.add_argument("--percentiles", nargs=2, type=number, metavar=("FP8", "KEEP"), help="by quant_probe's score")
    c.add_argument("--keep-ratio", type=number, metavar="R", help="share of layers, worst first, kept in 16 bit")
    c.add_argument("--rotate", choices=rotation.CHOICES, help=ROTATE_HELP)
    c.add_argument("--architecture", metavar="NAME", help="overrules the detected model family")
    group = c.add_argument_group("convert_to_quant's words, instead of --recipe")
    group.add_argument(
        "--base",
        choices=list(convert_to_quant.TYPES),
        help="format of all layers not named below (or not kept by --keep-ratio)",
    )
    group.add_argument("--custom-layers", type=regex, metavar="REGEX", help="beats every exclusion")
    group.add_argument("--custom-type", choices=list(convert_to_quant.TYPES))
    group.add_argument("--exclude-layers", type=regex, metavar="REGEX", help="left in the source dtype")
    group.add_argument("--preset", choices=list(convert_to_quant.PRESETS), action="append", default=[])


def words_of_base(args: argparse.Namespace) -> list[str]:
    """Those of convert_to_quant's options that were given and mean nothing without --base."""
    names = ("custom_layers", "custom_type", "exclude_layers", "preset")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def make_plan(source: Source, args: argparse.Namespace) -> Plan:
    from ..planning import recipes, rotation

    if args.smooth == "fold" and args.calibration is None:
        raise OptionError("--smooth fold needs --calibration C")
    calibration = calibration_of(source, args)
    plan = _uncalibrated_plan(source, args, calibration)
    if calibration is not None:
        plan = plan if args.no_input_scale else recipes.calibrated(source, plan, calibration)
        plan = _folded(source, plan, calibration) if args.smooth == "fold" else plan
        plan = replace(plan, seen=lambda: calibration)
    with Bar("rotate") as bar:  # convert_to_quant knows no rotation, so its words alone mean none
        plan = rotation.rotated(source, plan, args.rotate or ("auto" if args.recipe else "never"), calibration, bar)
    plan = _smoothed(source, plan, calibration) if args.pre_quant_scale else plan
    return _split(source, plan, calibration, args.split) if args.split else plan


def _split(source: Source, plan: Plan, calibration: Calibration | None, wanted: str) -> Plan:
    from ..planning import splitting

    if calibration is None:
        raise OptionError("--split needs --calibration C")
    with Bar("split") as bar:
        return splitting.split(source, plan, calibration, wanted, bar)


def _folded(source: Source, plan: Plan, calibration: Calibration) -> Plan:
    from ..planning import folding

    with Bar("fold") as bar:
        return folding.folded(source, plan, calibration, bar)


def _smoothed(source: Source, plan: Plan, calibration: Calibration | None) -> Plan:
    from ..planning import recipes

    if calibration is None:
        raise OptionError("--pre-quant-scale needs --calibration C")
    return recipes.smoothed(source, plan, calibration)


def check_core(plan: Plan) -> None:
    """Say what the ComfyUI found here cannot load of a plan; refuse what it would draw noise from."""
    from ..planning import targets

    for note in targets.check_core(plan):
        print(f"warning: {note}", file=sys.stderr)


def calibration_of(source: Source, args: argparse.Namespace) -> Calibration | None:
    from ..evidence import calibration
    from ..planning import recipes

    if args.calibration is None:
        return None
    loaded = calibration.load(args.calibration)
    recipes.check_widths(source, loaded)
    try:
        recipes.check_calibration(source, loaded)
    except CalibQuantError as e:
        if not args.force_calibration:
            raise CalibQuantError(f"{e}, or insist with --force-calibration") from e
        print(f"warning: {e}; going on because of --force-calibration", file=sys.stderr)
    return loaded


def _uncalibrated_plan(source: Source, args: argparse.Namespace, calibration: Calibration | None) -> Plan:
    from ..planning import recipes

    if words_of_base(args) and (not args.base or args.keep_ratio is not None):
        raise OptionError(f"{words_of_base(args)[0]} goes with --base alone")
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
        recipe = recipes.by_recipe_name(args.recipe)
    else:
        recipe = recipes.from_convert_to_quant(
            args.base, args.custom_layers, args.custom_type, args.exclude_layers, args.preset
        )
    for note in [*source.warnings(), recipe.warning, *recipes.unmatched(source, recipe)]:
        if note:
            print(f"warning: {note}", file=sys.stderr)
    return recipes.make_plan(source, recipe)


def _plan_from_probe(source: Source, args: argparse.Namespace) -> Plan:
    from ..evidence import probe
    from ..planning import convert_to_quant, recipes, scoring

    options = scoring.defaults(source.architecture.name)
    if args.keep_ratio is not None:
        scoring.check_ratio(args.keep_ratio)
    else:
        options = replace(options, fp8_percentile=args.percentiles[0], keep_percentile=args.percentiles[1])
        scoring.check(source.architecture.name, options)
    with Bar("probe") as bar:
        probed = probe.probe(args.file, args.architecture, progress=bar)
    if args.keep_ratio is not None:
        return recipes.keep_worst(source, probed, args.keep_ratio, convert_to_quant.TYPES[args.base or "nvfp4"])
    return recipes.by_score(source, probed, options)
