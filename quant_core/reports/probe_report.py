"""A probe as people and programs read it: text tables, CSV with quant_probe's columns, one JSON document."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import fmean
from typing import Any

from ..errors import CalibQuantError
from ..evidence.probe import STATISTICS, LayerProbe, Probe, correlations
from ..files.text import gigabytes
from ..planning import scoring
from ..planning.convert_to_quant import to_command
from ..planning.scoring import KEEP, Scored

COLUMNS = (
    "key,layer_type,block_idx,subgraph,rows,cols,excess_kurtosis,dynamic_range,std,outlier_pct,aspect_ratio,score,"
    "recommendation,effective_recommendation,reason"
).split(",")
MORE = ("mean", "zeros", "row_spread", "block16_spread", "block32_spread")
SHOWN = 20  # lines of a list in the text report; the JSON has all


def text(probed: Probe, scored: Scored, theirs: Scored | None) -> str:
    """The report on the terminal. ``theirs``: quant_probe's decisions, where it knows the family."""
    parts = [_type_table(probed), _decisions(probed, scored), _correlations(probed)]
    if theirs is not None:
        lines = scoring.differences(scored, theirs)
        more = [f"  … {len(lines) - SHOWN} more (--json lists all)"] if len(lines) > SHOWN else []
        parts.append("\n".join([f"quant_probe would decide otherwise on {len(lines)} layers", *_indent(lines), *more]))
    outside = [layer for layer in probed.layers if layer.protected]
    names = [f"{layer.name}: {layer.protected}" for layer in outside]
    more = [f"  … {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    parts.append("\n".join([f"{len(outside)} layers stay in the source dtype", *_indent(names), *more]))
    return "\n\n".join(parts)


def _indent(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines[:SHOWN]]


def _type_table(probed: Probe) -> str:
    """One line per layer type, largest NVFP4 error first; means over the layers of the type."""
    groups: dict[str, list[LayerProbe]] = {}
    for layer in probed.layers:
        groups.setdefault(layer.type, []).append(layer)
    formats = list(probed.layers[0].errors)
    head = f"{'layer type':<34}{'n':>4}{'kurtosis':>10}{'range':>8}{'std':>9}{'outliers':>10}{'row spread':>12}"
    head += "".join(f"{_short(fmt):>10}" for fmt in formats) + f"{'NVFP4+s':>10}"
    lines = [f"{probed.source}: {probed.architecture}, {gigabytes(probed.bytes)}, {len(probed.layers)} 2-D weights"]
    lines += [f"relative weight error x 1e-4, nearest rounding, about {probed.sample} weights a layer;"]
    lines += [
        "NVFP4+s: with searched block scales; range: max|w| - min|w|; row spread in bits",
        "",
        head,
        "-" * len(head),
    ]
    for name, layers in sorted(groups.items(), key=lambda g: -fmean(x.errors["nvfp4"][0] for x in g[1])):
        row = f"{name:<34}{len(layers):>4}{fmean(x.kurtosis for x in layers):>10.2f}"
        row += f"{fmean(x.dynamic_range for x in layers):>8.3f}{fmean(x.std for x in layers):>9.4f}"
        row += f"{100 * fmean(x.outlier_share for x in layers):>8.2f} %{fmean(x.row_spread for x in layers):>12.2f}"
        row += "".join(f"{1e4 * fmean(x.errors[fmt][0] for x in layers):>10.2f}" for fmt in formats)
        lines.append(row + f"{1e4 * fmean(x.errors['nvfp4'][1] for x in layers):>10.2f}")
    return "\n".join(lines)


def _short(fmt: str) -> str:
    return {"float8_e4m3fn": "FP8", "int8_tensorwise": "INT8", "float8_e4m3fn_unscaled": "FP8 cast"}.get(
        fmt, fmt.upper()
    )


def _decisions(probed: Probe, scored: Scored) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in scored.count().items())
    size = gigabytes(scoring.estimated_bytes(probed, scored))
    return "\n".join(
        [
            f"by score percentiles ({scored.options.fp8_percentile:g}/{scored.options.keep_percentile:g}): {counts}",
            f"  thresholds: FP8 from score {scored.fp8_threshold:.3f}, KEEP from {scored.keep_threshold:.3f} or "
            f"kurtosis {scored.options.kurtosis_keep:g}",
            f"  estimated size {size} (calibquant plan --percentiles says it to the byte)",
        ]
    )


def _correlations(probed: Probe) -> str:
    table = correlations(probed)
    if not table:
        return "too few layers to say what the statistics mean here"
    formats = list(probed.layers[0].errors)
    lines = ["does a statistic tell which layers suffer? Spearman correlation with the measured error on this model"]
    lines.append(f"  {'':<16}" + "".join(f"{_short(fmt):>10}" for fmt in formats))
    for name in STATISTICS:
        cells = ("-" if table[name][fmt] is None else f"{table[name][fmt]:+.2f}" for fmt in formats)
        lines.append(f"  {name:<16}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def suggestion(probed: Probe, scored: Scored, path: str) -> str:
    """The convert_to_quant command that makes these decisions, complete; or why there is none."""
    chosen = scoring.formats(scored, [layer.name for layer in probed.layers])
    stem = path.removesuffix(".safetensors")
    try:
        return to_command(chosen, path, f"{stem}-quantized.safetensors")
    except CalibQuantError as e:
        return f"no convert_to_quant command: {e}"


def csv(probed: Probe, scored: Scored, compat: bool = False) -> str:
    """quant_probe's columns and number formats; ours follow them unless ``compat``."""
    decided = {d.layer.name: d for d in scored.decisions}
    formats = list(probed.layers[0].errors)
    header = [*COLUMNS]
    if not compat:
        header += [*MORE, *(f"error_{fmt}_{how}" for fmt in formats for how in ("nearest", "search"))]
    lines = [header]
    for w in probed.layers:
        d = decided.get(w.name)
        if d is None and compat:
            continue
        place = [d.type, d.block, d.subgraph] if d else [w.type, "" if w.block is None else w.block, w.subgraph]
        verdict = [f"{d.score:.4f}", _starred(d.own), _starred(d.decision), d.reason] if d else _unscored(w)
        row = [f"{w.name}.weight", *place, *w.shape, f"{w.kurtosis:.4f}", f"{w.dynamic_range:.4f}", f"{w.std:.6f}"]
        row += [f"{100 * w.outlier_share:.2f}", f"{w.aspect_ratio:.2f}", *verdict]
        if not compat:
            row += [getattr(w, name) for name in MORE] + [f"{v:.6e}" for fmt in formats for v in w.errors[fmt]]
        lines.append(row)
    return "".join(",".join(_cell(value) for value in line) + "\r\n" for line in lines)  # RFC 4180, as theirs


def _starred(name: str) -> str:
    return f"*{KEEP}*" if name == KEEP else name


def _unscored(layer: LayerProbe) -> list[str]:
    return ["", _starred(KEEP), _starred(KEEP), layer.protected or "not scored"]


def _cell(value: object) -> str:
    out = str(value)
    return '"' + out.replace('"', '""') + '"' if any(c in out for c in ',"\n') else out


def document(probed: Probe, scored: Scored, theirs: Scored | None, path: str) -> dict[str, Any]:
    """Everything: statistics and errors per layer, decisions, thresholds, correlations, differences, the command."""
    decided = {d.layer.name: d for d in scored.decisions}
    layers = []
    for layer in probed.layers:
        d = decided.get(layer.name)
        extra = {"type": layer.type, "dynamic_range": layer.dynamic_range, "aspect_ratio": layer.aspect_ratio}
        verdict = {"score": d.score, "own": d.own, "decision": d.decision, "reason": d.reason} if d else None
        layers.append({**asdict(layer), **extra, "verdict": verdict})
    return {
        "source": probed.source,
        "architecture": probed.architecture,
        "bytes": probed.bytes,
        "sample": probed.sample,
        "options": {k: str(v) if v == float("inf") else v for k, v in asdict(scored.options).items()},
        "thresholds": {"fp8": scored.fp8_threshold, "keep": scored.keep_threshold},
        "counts": scored.count(),
        "estimated_bytes": scoring.estimated_bytes(probed, scored),
        "correlations": correlations(probed),
        "differs_from_quant_probe": None if theirs is None else scoring.differences(scored, theirs),
        "convert_to_quant": suggestion(probed, scored, path),
        "layers": layers,
    }


def to_json(probed: Probe, scored: Scored, theirs: Scored | None, path: str) -> str:
    return json.dumps(document(probed, scored, theirs, path), indent=1, allow_nan=False) + "\n"
