"""CalibQuantProbe ("Probe Model Weights"): what the weights alone tell, as a heatmap and for Quantization Plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import probe
from ..quant_core.evidence.measure import NOISE
from ..quant_core.evidence.probe import SAMPLE, LayerProbe, Probe
from ..quant_core.files.text import gigabytes
from ..quant_core.formats import title
from ..quant_core.models import architectures
from ..quant_core.models.modelfile import ModelFile
from ..quant_core.planning import scoring
from ..quant_core.planning.scoring import Scored, ScoreOptions
from ..quant_core.progress import Progress
from .comfyui import feedback, folders
from .types import CATEGORY, ProbeType

FAMILY, CUSTOM = "family", "custom"
STATISTICS = ("kurtosis", "dynamic_range", "outlier_share", "row_spread", "block16_spread", "block32_spread", "std")
FIELDS = ("name", "type", "block", "shape", "protected", "decision", "score", "reason", *STATISTICS, "errors")
_latest: dict[
    tuple[Path, str, tuple[str, ...]], Probe
] = {}  # at most one: to change a threshold is not to read 26 GB again


class CalibQuantProbe(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantProbe",
            display_name="Probe Model Weights",
            category=CATEGORY,
            description="Reads every weight of a model file once and shows, layer by layer, its statistics and the "
            "error that each format would cost. No prompts, no sampling, no GPU.",
            search_aliases=["quantize", "kurtosis", "heatmap", "quant_probe"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.model_names(),
                    tooltip="The 16-bit model file to probe. All-in-one checkpoints are listed as checkpoints/NAME, "
                    "text encoders as text_encoders/NAME.",
                ),
                io.Boolean.Input(
                    "compat",
                    default=False,
                    tooltip="Decide as quant_probe does, its defects included. Wan and Z-Image only. Changes the "
                    "decisions shown here, not the measured errors and not a plan.",
                ),
                io.DynamicCombo.Input(
                    "thresholds",
                    options=[
                        io.DynamicCombo.Option(FAMILY, []),
                        io.DynamicCombo.Option(CUSTOM, [*percentile_inputs(), _kurtosis_input()]),
                    ],
                    tooltip="When a score means FP8 or 16 bit: the model family's values (Wan 75/90, Z-Image 50/90, "
                    "others 75/90), or your own.",
                ),
            ],
            outputs=[ProbeType.Output("probe", tooltip="Statistics and errors of every layer, for a plan.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: object) -> str:
        return folders.fingerprint(model_name)

    @classmethod
    @feedback.in_node_words()
    def execute(cls, model_name: str, compat: bool, thresholds: dict[str, Any] | None = None) -> io.NodeOutput:
        with ModelFile(
            folders.model_path(model_name), lossy=True
        ) as model:  # before the reading: a slip is told at once
            options = _options(model.architecture.name, thresholds, compat)
        probed = probe_file(model_name)
        scored = scoring.decide(probed, options, compat=compat)
        text = summary(probed, scored, options, compat)
        return io.NodeOutput(probed, ui={"text": [text], "calibquant_probe": [document(probed, scored)]})


def percentile_inputs() -> list[io.Float.Input]:
    """The two percentiles of the score, as this node and Quantization Plan ask for them."""
    return [
        io.Float.Input(
            "fp8_percentile",
            default=75.0,
            min=0.0,
            max=100.0,
            step=1.0,
            tooltip="Layers whose score is above this percentile of all scores are FP8, those below NVFP4.",
        ),
        io.Float.Input(
            "keep_percentile",
            default=90.0,
            min=0.0,
            max=100.0,
            step=1.0,
            tooltip="Layers whose score is above this percentile stay 16-bit. Not below fp8_percentile.",
        ),
    ]


def _kurtosis_input() -> io.Float.Input:
    return io.Float.Input(
        "kurtosis_keep",
        default=8.0,
        min=-3.0,
        max=1e6,
        step=0.5,
        tooltip="Layers with this excess kurtosis or more stay 16-bit, whatever their score.",
    )


def probe_file(model_name: str) -> Probe:
    """The probe of a model of the list, with a progress bar; see ``probe_path``."""
    return probe_path(folders.model_path(model_name), feedback.progress()(0))


def probe_path(path: Path, progress: Progress, kinds: tuple[str, ...] = ()) -> Probe:
    """The probe of a file, or of these parts of it; the latest one is remembered while its file is the same.

    Raises CalibQuantError for a quantized or damaged file; a cancel raises ComfyUI's own exception.
    """
    key = (path, folders.stamp(path), kinds)
    if key not in _latest:
        probed = probe.probe(path, progress=progress, kinds=kinds)
        _latest.clear()
        _latest[key] = probed
    return _latest[key]


def _options(architecture: str, thresholds: dict[str, Any] | None, compat: bool) -> ScoreOptions:
    own = chosen("thresholds", thresholds, (FAMILY, CUSTOM))
    del own["thresholds"]
    options = replace(scoring.defaults(architecture), **own)
    scoring.check(architecture, options, compat)
    return options


def chosen(name: str, value: dict[str, Any] | None, options: Iterable[str]) -> dict[str, Any]:
    """A DynamicCombo's value. ComfyUI checks none that comes over its API; it leaves out one that it does not know."""
    if not value or value.get(name) not in options:
        raise CalibQuantError(f"{name} is none of {', '.join(options)}: choose one")
    return dict(value)


def summary(probed: Probe, scored: Scored, options: ScoreOptions, compat: bool) -> str:
    """A few lines for the node."""
    counts = " · ".join(f"{n} {name}" for name, n in scored.count().items())
    worst = max((d.layer for d in scored.decisions), key=lambda layer: layer.errors["nvfp4"][0])
    family = architectures.by_name(probed.architecture).title
    lines = [
        f"{family}: {len(probed.layers)} layers, {gigabytes(probed.bytes)}",
        f"by score ({options.fp8_percentile:g}/{options.keep_percentile:g}"
        f"{', as quant_probe' if compat else ''}): {counts}, "
        f"about {gigabytes(scoring.estimated_bytes(probed, scored))}",
        f"largest NVFP4 error of these {len(scored.decisions)}: {worst.name} {worst.errors['nvfp4'][0]:.2e}",
    ]
    if probed.architecture in scoring.DEFAULTS and not compat:
        other = scoring.differences(scored, scoring.decide(probed, options, compat=True))
        lines.append(f"quant_probe would decide otherwise on {len(other)} layers")
    return "\n".join(lines)


def document(probed: Probe, scored: Scored) -> dict[str, Any]:
    """What js/heatmap.js draws: ``layers`` are rows of ``fields``, numbers of 4 digits (Wan 14B: 400 layers, 140 kB).

    ``errors`` of a layer: [nearest, searched scale] for each of ``formats``. ``noise``: their relative standard error,
    in the order of ``formats``. ``correlations``: statistic -> Spearman
    correlation with the nearest error, in the order of ``formats``; None where one does not vary. ``types``: the rows
    of the map, main blocks first.
    """
    decided = {d.layer.name: (d.decision, _round(d.score), d.reason) for d in scored.decisions}
    formats = list(probed.layers[0].errors)
    return {
        "source": probed.source,
        "architecture": probed.architecture,
        "sample": probed.sample,
        "formats": formats,
        "titles": [title(fmt) for fmt in formats],
        "noise": [NOISE[fmt] * (SAMPLE / probed.sample) ** 0.5 for fmt in formats],
        "correlations": {name: [row[fmt] for fmt in formats] for name, row in probe.correlations(probed).items()},
        "types": architectures.map_rows(probed.layers),
        "fields": FIELDS,
        "layers": [_row(layer, decided.get(layer.name, ("", None, ""))) for layer in probed.layers],
    }


def _row(layer: LayerProbe, decision: tuple[str, float | None, str]) -> list[Any]:
    errors = [[_round(value) for value in pair] for pair in layer.errors.values()]
    head = [layer.name, layer.type, layer.block, list(layer.shape), layer.protected, *decision]
    return [*head, *(_round(getattr(layer, name)) for name in STATISTICS), errors]


def _round(value: float) -> float:
    return float(f"{value:.4g}")
