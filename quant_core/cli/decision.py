"""How a plan is asked for on the command line: the options that `plan` and `quantize` share."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import CalibQuantError, OptionError
from ..locate import find_comfyui
from .bar import Bar
from .options import PARTS_HELP, above_zero, layer_format, number, parts, path, regex, split_amount
from .quiet import stdout_of_libraries_to_stderr

if TYPE_CHECKING:
    from ..evidence.calibration import Calibration
    from ..evidence.probe import Probe
    from ..models.source import Source
    from ..planning.costs import CostTable, MadeWith
    from ..planning.plan import Plan

HSWQ = ("hswq", "hswq-v1")
ROTATE_HELP = "INT8 layers in a rotated basis: auto, a recipe's default, where that measures better"
FOLD_HELP = "fold: smooth inputs through the weights that make them, where that measures better; any ComfyUI"
SMOOTHING_HELP = "smooth the inputs of NVFP4 layers; only for a ComfyUI newer than 0.29, which would ignore it"
FORMATS_HELP = "default: all that ComfyUI reads, weight-only (w4a16) ones excepted"
WEIGHTING_HELP = "what a layer's error is worth (default: gradient where the calibration has it, else uniform)"
SLOW_HELP = "share of the multiplications that may run outside native kernels"
SET_HELP = "this format for a layer, whatever else decides; a name or a regular expression; may be repeated"
BUDGETS = ("size", "bits", "max_error")


def add_options(c: argparse.ArgumentParser) -> None:
    from ..planning import convert_to_quant, costs, recipes, rotation, splitting, targets, weighing

    c.add_argument("--recipe", choices=[*recipes.RECIPES, *HSWQ], help="a named rule set (hswq needs --calibration)")
    c.add_argument("--calibration", type=path, metavar="C", help="a *.calibration.safetensors of this model")
    c.add_argument("--no-input-scale", action="store_true", help="leave activation scales to the loader")
    c.add_argument("--force-calibration", action="store_true", help="use a calibration of another file")
    c.add_argument("--pre-quant-scale", action="store_true", help=SMOOTHING_HELP)
    c.add_argument("--smooth", choices=["none", "fold"], help=FOLD_HELP)
    c.add_argument("--split", type=split_amount, metavar="RANK|SHARE%", help=splitting.HELP)
    c.add_argument("--percentiles", nargs=2, type=number, metavar=("FP8", "KEEP"), help="by quant_probe's score")
    c.add_argument("--keep-ratio", type=number, metavar="R", help="share of layers, worst first, kept in 16 bit")
    c.add_argument(
        "--size",
        type=above_zero,
        metavar="GB",
        help="the least error in so many GB (1e9 bytes), of both files of a split",
    )
    c.add_argument("--bits", type=above_zero, metavar="B", help="the same in so many bits a weight, scales included")
    c.add_argument("--max-error", type=above_zero, metavar="E", help="the smallest file with this predicted error")
    budget = c.add_argument_group("for --size, --bits and --max-error")
    budget.add_argument("--gpu", choices=list(targets.GPUS), help="the card that will run it (default: this machine's)")
    budget.add_argument("--formats", metavar="A,B,…", help=f"some of {','.join(costs.OPTIONS)}; {FORMATS_HELP}")
    budget.add_argument("--weighting", choices=weighing.WEIGHTINGS, help=WEIGHTING_HELP)
    budget.add_argument("--tie", action="store_true", help="one format for q, k and v, and for gate and up, of a block")
    budget.add_argument("--max-slow", type=number, metavar="T", help=SLOW_HELP)
    budget.add_argument("--table", type=path, metavar="T.json", help="keep what was measured here, and use it again")
    c.add_argument("--set", action="append", type=layer_format, default=[], metavar="LAYER=FORMAT", help=SET_HELP)
    c.add_argument("--rotate", choices=rotation.CHOICES, help=ROTATE_HELP)
    c.add_argument("--parts", type=parts, default=(), metavar="A,B,…", help=PARTS_HELP)
    c.add_argument("--architecture", metavar="NAME", help="overrules the detected model family")
    c.add_argument("--allow-lossy", action="store_true", help="take a GGUF source below Q8_0, whatever that has lost")
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
    return _given(args, "custom_layers", "custom_type", "exclude_layers", "preset")


def _given(args: argparse.Namespace, *names: str) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


def make_plan(source: Source, args: argparse.Namespace) -> Plan:
    from ..planning import edits, recipes, rotation

    fixed = edits.from_words(source, args.set)
    if args.smooth == "fold" and args.calibration is None:
        raise OptionError("--smooth fold needs --calibration C")
    calibration = calibration_of(source, args)
    if budget_of(args):
        plan = _plan_for_budget(source, args, calibration, fixed)
    else:
        if lost := _given(args, "formats", "weighting", "tie", "max_slow", "table"):
            raise OptionError(f"{lost[0]} goes with --size, --bits or --max-error")
        plan = edits.applied(source, _uncalibrated_plan(source, args, calibration), fixed)
        plan = replace(plan, gpu=args.gpu or "")
    if calibration is not None:
        plan = plan if args.no_input_scale else recipes.calibrated(source, plan, calibration)
        if args.smooth == "fold" and not budget_of(args):
            plan = _folded(source, plan, calibration)
        plan = replace(plan, seen=lambda: calibration)
    with Bar("rotate") as bar:  # convert_to_quant knows no rotation, so its words alone mean none
        how = args.rotate or ("auto" if args.recipe else "never")
        plan = rotation.rotated(source, plan, how, calibration, bar, but=fixed)
    plan = _smoothed(source, plan, calibration) if args.pre_quant_scale else plan
    return _split(source, plan, calibration, args.split) if args.split and not budget_of(args) else plan


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


def budget_of(args: argparse.Namespace) -> list[str]:
    """Which of the three budgets were asked for."""
    return [name for name in BUDGETS if getattr(args, name) is not None]


def _plan_for_budget(
    source: Source, args: argparse.Namespace, calibration: Calibration | None, fixed: dict[str, str]
) -> Plan:
    from ..planning import budget, costs, targets

    ways = [args.recipe, args.percentiles, args.keep_ratio is not None, args.base, args.rotate, args.pre_quant_scale]
    if len(budget_of(args)) != 1 or any(ways):
        raise OptionError("give one of --size, --bits, --max-error, without --recipe and other ways to decide")
    (kind,) = budget_of(args)
    amount = getattr(args, kind) * (1e9 if kind == "size" else 1)
    wish = budget.Wish(kind, amount, args.tie, args.max_slow, fixed)
    wish.check()
    for note in source.warnings():
        print(f"warning: {note}", file=sys.stderr)
    gpu, rounding = args.gpu or targets.this_gpu(), getattr(args, "rounding", "auto")
    options = costs.choose_options(args.formats, gpu, find_comfyui())
    if args.split:
        if calibration is None:
            raise OptionError("--split needs --calibration C")
        options = costs.with_branches(options, gpu, args.split)
    scaled, fold = not args.no_input_scale, args.smooth == "fold"
    how = costs.made_with(source, gpu, options, rounding, scaled, calibration, fold)
    probed = _probe(args) if calibration is None or args.weighting == "score" else None
    table = _table(source, args, how, calibration, probed)
    with stdout_of_libraries_to_stderr():
        return budget.plan(source, table, wish, weighting=args.weighting, calibration=calibration, probed=probed)


def _table(
    source: Source, args: argparse.Namespace, how: MadeWith, calibration: Calibration | None, probed: Probe | None
) -> CostTable:
    from ..planning import costs
    from ..rounding.pack import pick_device

    if args.table and args.table.exists():
        return costs.load(args.table, how)
    if calibration is None:
        assert probed is not None
        table = costs.guess(source, probed, how)
    else:
        with Bar("measure") as bar:
            table = costs.measure(source, calibration, how, pick_device(getattr(args, "device", "auto")), progress=bar)
    if args.table:
        table.save(args.table)
    return table


def _probe(args: argparse.Namespace) -> Probe:
    from ..evidence import probe

    with Bar("probe") as bar:
        return probe.probe(args.file, args.architecture, progress=bar, kinds=args.parts)


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
    loaded = calibration.load(args.calibration, leave_rows=True)
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
        raise OptionError(
            "give one of --recipe NAME, --size GB, --bits B, --max-error E, --percentiles FP8 KEEP, --keep-ratio R, "
            "--base TYPE"
        )
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
    from ..planning import convert_to_quant, recipes, scoring

    options = scoring.defaults(source.architecture.name)
    if args.keep_ratio is not None:
        scoring.check_ratio(args.keep_ratio)
    else:
        options = replace(options, fp8_percentile=args.percentiles[0], keep_percentile=args.percentiles[1])
        scoring.check(source.architecture.name, options)
    probed = _probe(args)
    if args.keep_ratio is not None:
        return recipes.keep_worst(source, probed, args.keep_ratio, convert_to_quant.TYPES[args.base or "nvfp4"])
    return recipes.by_score(source, probed, options)
