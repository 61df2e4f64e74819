"""What an error of a layer is worth. Its damage is its error (``costs``) times a weight; four weightings say which:

    gradient  what the layer's error does to the model's own prediction, by gradients that the calibration holds
    hswq      the layer's output variance, by which HSWQ ranks layers: about its absolute squared error
    score     quant_probe's score of the weights
    uniform   the same everywhere

By gradient, damages add up to the relative squared change of the prediction, as far as it lasts over the steps of
sampling (``costs``); by the others to a weighted mean of the layers' relative errors.
"""

from __future__ import annotations

from ..errors import CalibQuantError, OptionError
from ..evidence.calibration import Calibration
from ..evidence.probe import Probe
from ..models.source import Source
from . import scoring
from .costs import CostTable

WEIGHTINGS = ("gradient", "hswq", "score", "uniform")


def weigh(
    source: Source,
    table: CostTable,
    weighting: str | None = None,
    calibration: Calibration | None = None,
    probed: Probe | None = None,
) -> tuple[str, dict[str, dict[str, float]]]:
    """The weighting (gradient where the table has it, else uniform), and layer -> option -> damage."""
    chosen = weighting or ("gradient" if table.has_damage else "uniform")
    if chosen == "gradient":
        if not table.has_damage:
            raise CalibQuantError(
                f"{source.path}: the calibration says nothing of sensitivity: collect it, or weigh by hswq or uniform"
            )
        return chosen, {n: {o: cost.damage or 0.0 for o, cost in c.items()} for n, c in table.layers.items()}
    weights = _weights(source, table, chosen, calibration, probed)
    total = sum(weights.values()) or 1.0
    return chosen, {n: {o: cost.error * weights[n] / total for o, cost in c.items()} for n, c in table.layers.items()}


def _weights(
    source: Source, table: CostTable, weighting: str, calibration: Calibration | None, probed: Probe | None
) -> dict[str, float]:
    if weighting == "uniform":
        return dict.fromkeys(table.layers, 1.0)
    if weighting == "hswq" and calibration is not None:
        seen = {name: calibration.layers.get(source.short(name)) for name in table.layers}
        if missing := [name for name, stats in seen.items() if stats is None]:
            raise CalibQuantError(f"{source.path}: layer {missing[0]} is not in the calibration: calibrate this model")
        return {name: stats.output_variance for name, stats in seen.items() if stats is not None}
    if weighting == "score" and probed is not None:
        scores = {d.layer.name: d.score for d in scoring.decide(probed).decisions}
        return {name: scores.get(name, 0.0) for name in table.layers}
    if weighting in WEIGHTINGS:
        raise OptionError(f"weighting {weighting} needs a {'calibration' if weighting == 'hswq' else 'probe'}")
    raise OptionError(f"weighting {weighting!r}: use one of {', '.join(WEIGHTINGS)}")
