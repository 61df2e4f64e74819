"""quant_probe's three-way decision (KEEP, FP8, NVFP4) from weight statistics alone.

The score and its thresholds are that tool's (facts: seeds §A1). What it does with them afterwards is ours by default;
``compat=True`` gives its own behaviour, defects included, so that the two can be compared layer by layer:

==============================  ======================================  =========================================
                                default                                 compat
==============================  ======================================  =========================================
kurtosis floor                  the last word                           a group row may still demote the layer
group rows (type x position)    for the spread filter only              overrule their tensors both ways
range within a type of 1 or 2   no evidence, counts 0                   min-max: exactly 0 and 1
layers                          every layer of the table's blocks       two families' lists; vace_blocks collide
==============================  ======================================  =========================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from ..errors import CalibQuantError, OptionError
from ..evidence.probe import LayerProbe, Probe

KEEP, FP8, NVFP4 = "KEEP", "FP8", "NVFP4"
FORMAT_OF = {KEEP: "bf16", FP8: "float8_e4m3fn", NVFP4: "nvfp4"}
BITS = {KEEP: 16.0, FP8: 8.0, NVFP4: 4.5}
LOW, MIDDLE, HIGH = "first", "middle", "last"


@dataclass(frozen=True)
class ScoreOptions:
    """Percentiles are of the score over all scored layers; weights sum to 1."""

    fp8_percentile: float = 75.0
    keep_percentile: float = 90.0
    kurtosis_keep: float = 8.0  # floor: this excess kurtosis or more is KEEP
    fp8_min_score: float = 0.0
    min_group_spread: float = 0.0
    kurtosis_weight: float = 0.6
    range_weight: float = 0.3
    ar_weight: float = 0.1
    extreme_pct: float = 10.0  # share of the main blocks at each end that count as first or last
    spread_filter_exempt: tuple[str, ...] = ()

    def check(self) -> None:
        """OptionError for a value that makes no sense."""
        percent = {"--fp8-percentile": self.fp8_percentile, "--keep-percentile": self.keep_percentile}
        for name, value in percent.items():
            if not 0 <= value <= 100:
                raise OptionError(f"{name} {value:g}: must lie between 0 and 100")
        if self.fp8_percentile > self.keep_percentile:
            raise OptionError("--fp8-percentile must not exceed --keep-percentile")
        weights = (self.kurtosis_weight, self.range_weight, self.ar_weight)
        if min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
            raise OptionError("--kurtosis-weight, --range-weight and --ar-weight must be >= 0 and sum to 1")
        if not 0 <= self.extreme_pct <= 50:
            raise OptionError(f"--extreme-pct {self.extreme_pct:g}: must lie between 0 and 50")
        if not self.kurtosis_keep == self.kurtosis_keep or min(self.fp8_min_score, self.min_group_spread) < 0:
            raise OptionError("--kurtosis-keep must be a number, --fp8-min-score and --min-group-spread >= 0")


# quant_probe's defaults per family; the percentiles were fitted there on Wan 2.1 14B and Z-Image Turbo.
DEFAULTS: dict[str, ScoreOptions] = {
    "wan": ScoreOptions(fp8_percentile=75, fp8_min_score=0.5, min_group_spread=0.06),
    "zimage": ScoreOptions(fp8_percentile=50, min_group_spread=0.20),
}
_COMPAT_MAIN = {
    "wan": r"blocks\.(?P<block>\d+)\.(?P<kind>cross_attn\.(?:k|v|q|o|k_img|v_img)|self_attn\.[kvqo]|ffn\.[02])$",
    "zimage": r"layers\.(?P<block>\d+)\."
    r"(?P<kind>attention\.(?:qkv|out)|feed_forward\.w[123]|adaLN_modulation\.0)$",
}
_COMPAT_REFINER = (
    r"(?P<subgraph>(?:context|noise)_refiner)\.(?P<block>\d+)\.(?P<kind>attention\.(?:qkv|out)|feed_forward\.w[123])$"
)
_COMPAT_NAME = {"wan": "blocks", "zimage": "layers"}
_MAIN = ("main", "", *_COMPAT_NAME.values())


@dataclass(frozen=True)
class Decision:
    """One layer: score, the tensor's own recommendation, what came of it, and why."""

    layer: LayerProbe
    type: str  # the kind; in a refiner "<subgraph>.<kind>", as quant_probe names it
    subgraph: str
    block: int
    score: float
    own: str
    decision: str
    reason: str

    @property
    def refiner(self) -> bool:
        return self.subgraph not in _MAIN


@dataclass(frozen=True)
class Scored:
    """All decisions with the thresholds they came from."""

    decisions: list[Decision]
    fp8_threshold: float
    keep_threshold: float
    options: ScoreOptions

    def count(self) -> dict[str, int]:
        names = [d.decision for d in self.decisions]
        return {name: names.count(name) for name in (KEEP, FP8, NVFP4)}


def defaults(architecture: str) -> ScoreOptions:
    """The family's thresholds; families quant_probe does not know get 75/90 without filters."""
    return DEFAULTS.get(architecture, ScoreOptions())


def check(architecture: str, options: ScoreOptions, compat: bool = False) -> None:
    """OptionError for what :func:`decide` would refuse whatever the weights are: ask before reading them."""
    options.check()
    if compat:
        _compat_family(architecture)


def decide(probed: Probe, options: ScoreOptions | None = None, compat: bool = False) -> Scored:
    """Score every layer that may be quantized and decide KEEP, FP8 or NVFP4.

    Raises OptionError for bad options, an unknown exempt type, a compat family other than wan and zimage.
    """
    options = options or defaults(probed.architecture)
    check(probed.architecture, options, compat)
    layers = _compat_layers(probed) if compat else _layers(probed)
    if not layers:
        raise CalibQuantError(f"{probed.source}: no layer to score: name the family with --model")
    unknown = set(options.spread_filter_exempt) - {d.type for d in layers}
    if unknown:
        known = ", ".join(sorted({d.type for d in layers}))
        raise OptionError(f"--spread-filter-exempt {' '.join(sorted(unknown))}: no such layer type; there are {known}")
    scores = score([d.layer for d in layers], [d.type for d in layers], options, small_types=compat)
    fp8, keep = (float(np.quantile(scores, p / 100)) for p in (options.fp8_percentile, options.keep_percentile))
    decisions = []
    for d, value in zip(layers, scores, strict=True):
        own, reason = recommend(float(value), d.layer.kurtosis, fp8, keep, options)
        decisions.append(replace(d, score=float(value), own=own, decision=own, reason=reason))
    rows = _rows(decisions, options.extreme_pct)
    settle = _settle_compat if compat else _settle
    return Scored(settle(decisions, rows, fp8, keep, options), fp8, keep, options)


def score(
    layers: list[LayerProbe], types: list[str], options: ScoreOptions, small_types: bool = False
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """float64 [layers]: weighted sum of IQR-clipped kurtosis and of range and aspect ratio min-maxed within the type.

    small_types: min-max also over types of one or two layers, where it can only say 0 or 1.
    """
    kurtosis = np.array([layer.kurtosis for layer in layers])
    q25, q75 = np.quantile(kurtosis, [0.25, 0.75])
    low, high = q25 - 1.5 * (q75 - q25), q75 + 1.5 * (q75 - q25)
    normal = (np.clip(kurtosis, low, high) - low) / (high - low) if high > low else np.zeros(len(layers))
    ranges = _within_type([layer.dynamic_range for layer in layers], types, small_types)
    ratios = _within_type([layer.aspect_ratio for layer in layers], types, small_types)
    return options.kurtosis_weight * normal + options.range_weight * ranges + options.ar_weight * ratios


def _within_type(values: list[float], types: list[str], small: bool) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    array, names, result = np.array(values), np.array(types), np.zeros(len(values))
    for name in set(types):
        member = names == name
        low, high = array[member].min(), array[member].max()
        if high > low and (small or member.sum() > 2):
            result[member] = (array[member] - low) / (high - low)
    return result


def recommend(value: float, kurtosis: float, fp8: float, keep: float, options: ScoreOptions) -> tuple[str, str]:
    """(KEEP | FP8 | NVFP4, reason) of one tensor or group row."""
    if kurtosis >= options.kurtosis_keep:
        return KEEP, "kurtosis_floor"
    if value >= keep:
        return KEEP, "score_percentile"
    if value >= fp8:
        return (FP8, "score_percentile") if value >= options.fp8_min_score else (NVFP4, "score_below_fp8_min")
    return NVFP4, "default"


# --- which layers -------------------------------------------------------------------------------------------------


def _layers(probed: Probe) -> list[Decision]:
    found = []
    for layer in probed.layers:
        if layer.block is not None and not layer.protected:
            found.append(Decision(layer, layer.type, layer.subgraph, layer.block, 0.0, "", "", ""))
    return found


def _compat_family(architecture: str) -> str:
    family = {"wan": "wan", "zimage": "zimage", "lumina2": "zimage"}.get(architecture)
    if family is None:
        raise OptionError(f"--compat quant_probe knows wan and zimage only, this model is {architecture}")
    return family


def _compat_layers(probed: Probe) -> list[Decision]:
    family, found = _compat_family(probed.architecture), []
    for layer in probed.layers:
        main = re.search(_COMPAT_MAIN[family], layer.name)  # searched, so that vace_blocks.0 is taken for blocks.0
        refiner = re.search(_COMPAT_REFINER, layer.name) if family == "zimage" and not main else None
        if match := main or refiner:
            subgraph = refiner["subgraph"] if refiner else _COMPAT_NAME[family]
            kind = f"{subgraph}.{match['kind']}" if refiner else match["kind"]
            found.append(Decision(layer, kind, subgraph, int(match["block"]), 0.0, "", "", ""))
    return found


# --- group rows and what is made of them --------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A layer type at one position (first, middle, last blocks); a refiner's type is one row."""

    type: str
    subgraph: str
    position: str
    blocks: tuple[int, ...]
    score: float  # mean
    kurtosis_max: float


def _rows(decisions: list[Decision], extreme_pct: float) -> list[Row]:
    main = [d.block for d in decisions if not d.refiner]
    total = max(main, default=0) + 1
    ends = max(1, round(total * extreme_pct / 100))
    groups: dict[tuple[str, str, str], list[Decision]] = {}
    for d in decisions:
        position = "" if d.refiner else LOW if d.block < ends else HIGH if d.block >= total - ends else MIDDLE
        groups.setdefault((d.type, d.subgraph, position), []).append(d)
    return [
        Row(*key, tuple(d.block for d in group), fmean(d.score for d in group), max(d.layer.kurtosis for d in group))
        for key, group in groups.items()
    ]


def low_spread_types(rows: Iterable[Row], options: ScoreOptions) -> set[str]:
    """Main-block types whose group scores differ by less than min_group_spread: no evidence to tell blocks apart."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.subgraph in _MAIN and row.type not in options.spread_filter_exempt:
            scores.setdefault(row.type, []).append(row.score)
    return {kind for kind, values in scores.items() if max(values) - min(values) < options.min_group_spread}


def _settle(
    decisions: list[Decision], rows: list[Row], fp8: float, keep: float, options: ScoreOptions
) -> list[Decision]:
    """Ours: each tensor keeps its own recommendation; the spread filter lowers it one step, never past the floor."""
    flat = low_spread_types(rows, options)
    lowered = {FP8: NVFP4, KEEP: FP8, NVFP4: NVFP4}
    return [
        replace(d, decision=lowered[d.own], reason="spread_filter")
        if d.type in flat and not d.refiner and d.own != NVFP4 and d.reason != "kurtosis_floor"
        else d
        for d in decisions
    ]


def _settle_compat(
    decisions: list[Decision], rows: list[Row], fp8: float, keep: float, options: ScoreOptions
) -> list[Decision]:
    """quant_probe's: group rows decide. Of layers that share type, block and sub-graph the last one counts for all."""
    flat = low_spread_types(rows, options)
    own = {(d.type, d.block, d.subgraph): d.own for d in decisions}
    result: dict[tuple[str, int, str], tuple[str, str]] = {}
    for row in rows:
        group, _ = recommend(row.score, row.kurtosis_max, fp8, keep, options)
        for block in row.blocks:
            key = (row.type, block, row.subgraph)
            result[key] = _row_decision(row, group, own[key], flat, options)
    settled = []
    for d in decisions:
        decision, reason = result[(d.type, d.block, d.subgraph)]
        settled.append(replace(d, decision=decision, reason=reason or d.reason))
    return settled


def _row_decision(row: Row, group: str, own: str, flat: set[str], options: ScoreOptions) -> tuple[str, str]:
    """(decision, reason or "" for the tensor's own reason) of one tensor under its row."""
    if row.type in options.spread_filter_exempt or row.subgraph not in _MAIN:
        return own, ""
    if row.type in flat and group != NVFP4:
        return (NVFP4 if group == FP8 else FP8), "spread_demotion"
    if group == KEEP:
        return own, "" if own == KEEP else "group_keep_resolved"
    if own == group:
        return group, ""
    return group, "group_fp8_promotion" if (group, own) == (FP8, NVFP4) else "group_spread_demotion"


# --- what comes of it ---------------------------------------------------------------------------------------------


def differences(ours: Scored, theirs: Scored) -> list[str]:
    """One line per layer on which quant_probe would decide otherwise, with both reasons."""
    other = {d.layer.name: d for d in theirs.decisions}
    lines = []
    for d in ours.decisions:
        t = other.get(d.layer.name)
        if t is None:
            lines.append(f"{d.layer.name}: {d.decision} ({d.reason}); quant_probe does not look at it")
        elif t.decision != d.decision:
            lines.append(f"{d.layer.name}: {d.decision} ({d.reason}); quant_probe {t.decision} ({t.reason})")
    return lines


def estimated_bytes(probed: Probe, scored: Scored) -> int:
    """quant_probe's estimate (16, 8 and 4.5 bits a weight, the rest as it is); `calibquant plan` knows exactly."""
    saved = sum(d.layer.count * (16.0 - BITS[d.decision]) / 8 for d in scored.decisions)
    return int(probed.bytes - saved)


def formats(scored: Scored, layers: Iterable[str]) -> dict[str, str]:
    """Layer -> format for every layer named; those that were not scored stay in the source dtype."""
    chosen: Mapping[str, str] = {d.layer.name: FORMAT_OF[d.decision] for d in scored.decisions}
    return {name: chosen.get(name, FORMAT_OF[KEEP]) for name in layers}


def check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise OptionError(f"--keep-ratio {ratio:g}: must lie between 0 and 1")


def keep_worst(probed: Probe, ratio: float, base: str = "nvfp4") -> dict[str, str]:
    """Layer -> format: the share ``ratio`` of scored layers with the largest error in ``base`` stays 16-bit."""
    check_ratio(ratio)
    layers = [d.layer for d in _layers(probed)]
    worst = sorted(layers, key=lambda layer: (-layer.errors[base][0], layer.name))[: int(len(layers) * ratio)]
    kept = {layer.name for layer in worst}
    return {layer.name: FORMAT_OF[KEEP] if layer.name in kept else base for layer in layers}
