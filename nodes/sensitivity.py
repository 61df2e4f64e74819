"""CalibQuantSensitivity: how much errors of each layer move the model's prediction, for plans that weigh them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import calibration as engine
from ..quant_core.evidence import probing, sensitivity
from ..quant_core.evidence.calibration import POINTS, Calibration
from ..quant_core.evidence.histogram import sigma_range
from ..quant_core.evidence.probing import Meter
from ..quant_core.files.text import counted
from .calibrate import (
    SWITCH,
    Job,
    check_negative,
    expert_inputs,
    job_of,
    jobs_of,
    negative_input,
    prompts_input,
    sample_all,
    sampling_inputs,
)
from .comfyui import feedback, folders, patches, sampling
from .comfyui import probing as comfyui
from .comfyui.sampling import SamplerSettings
from .recorder import IDENTITY, SAVING_SHARE, CalibrationHandle
from .types import CATEGORY, CalibrationType

SEEN_SHARE = 2 / 3  # of the steps, that the calibration must have seen; other numbers of steps end a bit earlier


class CalibQuantSensitivity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantSensitivity",
            display_name="Measure Sensitivity",
            category=CATEGORY,
            description="Measures how much an error of each layer moves the model's prediction, and adds that to a "
            "calibration. A plan for a size then spends its bits where they count.",
            search_aliases=["calibration", "gradient", "importance"],
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model of the calibration, with the same LoRAs."),
                CalibrationType.Input("calibration", tooltip="From Calibrate or Load Calibration."),
                prompts_input(),
                *sampling_inputs(8),
                *_probing_inputs(),
                negative_input(),
                *expert_inputs(),
            ],
            outputs=[CalibrationType.Output("calibration", tooltip="The calibration with sensitivities.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, model: Any, calibration: CalibrationHandle, conditioning: list[Any], samples: int, steps: int, cfg: float,
        sampler_name: str, scheduler: str, width: int, height: int, frames: int, seed: int, estimator: str, points: int,
        probes: int, rows: int, seconds: int, negative: Any = None, low_noise_model: Any = None,
        switch_at_step: int = SWITCH,
    ) -> io.NodeOutput:  # fmt: skip
        check_negative(cfg, negative)
        settings, before = SamplerSettings(steps, cfg, sampler_name, scheduler), calibration.current()
        stages = sampling.stages(model, low_noise_model, switch_at_step, settings)
        measured = patches.stage_of(stages, before.info.get("source_fingerprint"))
        model = measured.model
        _check(model, before)
        _check_steps(sampling.sigmas(measured, settings), before)
        how = [samples, steps, cfg, sampler_name, scheduler, width, height, frames, seed]
        how += [estimator, points, probes, rows, seconds]
        name = Path(before.info.get("source_file") or before.info["architecture"]).stem
        job = job_of(cls.hidden.unique_id, stages, before.fingerprint(), conditioning, negative, how)
        keeper = _Keeper(folders.unfinished_calibration_path(name, job))
        before = keeper.continued(before)
        jobs, done = _unfinished(jobs_of(conditioning, samples, seed), points, before)
        meter = Meter(
            model.model.diffusion_model,
            {name: stats.group for name, stats in before.layers.items()},
            probing.Settings(estimator, samples * points, done, probes, rows, seconds, seed),
            comfyui.weight,
            lambda: comfyui.free_memory(model),
            comfyui.check_cancel,
        )
        latent = sampling.empty_latent(model, width, height, frames)

        def sample(watched: Any, begin: Callable[[str, int], None]) -> None:
            drawing = tuple(replace(each, model=watched) if each is measured else each for each in stages)
            sample_all(
                drawing, jobs, negative, latent, settings, begin, cls.hidden.unique_id,
                lambda _: keeper.save(before, meter),
            )  # fmt: skip

        try:
            _measure(model, meter, jobs, before, points, sample)
        except BaseException:  # a cancel is no Exception; points that are done must not be lost
            feedback.tell_kept(cls.hidden.unique_id, keeper.keep(before, meter))
            raise
        keeper.path.unlink(missing_ok=True)
        found = _joined(before, meter)
        return io.NodeOutput(CalibrationHandle(lambda: found), ui=ui.PreviewText(_summary(found, meter)))


def _probing_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "estimator", options=list(probing.ESTIMATORS), default="gradient",
            tooltip="gradient: all layers at once, by backward passes. matched: rounds one layer at a time and runs "
            "the model, which needs no more memory than sampling; taken by itself where gradients do not fit.",
        ),
        io.Int.Input("points", default=6, min=1, max=1000, tooltip="Of each sample, where the model is measured."),
        io.Int.Input("probes", default=2, min=1, max=64, tooltip="Backward passes of each point, for gradient."),
        io.Int.Input(
            "rows", default=sensitivity.ROWS, min=16, max=1 << 16,
            tooltip="How many rows of each layer to keep. Memory and file grow with it.",
        ),
        io.Int.Input(
            "seconds", default=600, min=1, max=1 << 20,
            tooltip="For matched: time to spend. The first point always measures every layer.",
        ),
    ]  # fmt: skip


def _check(model: Any, found: Calibration) -> None:
    if not found.layers:
        raise CalibQuantError("the calibration is empty: link one that was collected before")
    if patches.is_quantized(model):
        raise CalibQuantError("the linked MODEL is quantized: load the 16-bit model that it was made from")
    identity = patches.identify(model)[1]
    if any(found.info.get(name) != identity.get(name) for name in IDENTITY):
        of = found.info.get("source_file") or f"a {found.info.get('architecture')} model"
        raise CalibQuantError(f"the calibration is of another model ({of}): link the model that it was made with")


def _check_steps(sigmas: list[float], found: Calibration) -> None:
    """An expert of a pair must not be measured at steps that it never draws."""
    low, high = sigma_range(found) or (min(sigmas), max(sigmas))
    inside = sum(low * 0.99 <= sigma <= high * 1.01 for sigma in sigmas)
    if inside < SEEN_SHARE * len(sigmas):
        raise CalibQuantError(
            f"the calibration saw sigma {high:.3g} to {low:.3g}, in {inside} of these {len(sigmas)} steps: link both "
            "models of an expert pair, else take the settings of the calibration"
        )


def _name(text: str, seed: int, number: int, points: int) -> str:
    return f"{text} seed {seed} point {number + 1} of {points}".strip()


def _unfinished(jobs: list[Job], points: int, found: Calibration) -> tuple[list[Job], int]:
    """Jobs that the calibration has not all points of, and how many points it has."""
    known = set(found.info.get(POINTS, []))
    names = [{_name(text, seed, i, points) for i in range(points)} for text, _, seed in jobs]
    left = [job for job, wanted in zip(jobs, names, strict=True) if not wanted <= known]
    return left, sum(len(wanted & known) for wanted in names)


def _measure(
    model: Any, meter: Meter, jobs: list[Job], before: Calibration, points: int, sample: Callable[..., None]
) -> None:
    job, known = ["", 0], set(before.info.get(POINTS, []))

    def begin(text: str, seed: int) -> None:
        job[:] = text, seed

    def visit(predict: probing.Predict, number: int) -> None:
        name = _name(str(job[0]), int(job[1]), number, points)
        if name not in known:
            meter.visit(predict, name)

    if jobs:
        sample(comfyui.stopping(model, points, visit), begin)


def _joined(before: Calibration, meter: Meter) -> Calibration:
    known = engine.merge_sensitivities(before.sensitivities, meter.result())
    info = {**before.info, POINTS: [*before.info.get(POINTS, []), *meter.points]}
    return replace(before, sensitivities=known, info=info)


class _Keeper:
    """The file that holds what is measured until all is, for the next run of the same job."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved, self._cost = time.monotonic(), 0.0

    def continued(self, before: Calibration) -> Calibration:
        """With what an earlier run of the job measured."""
        try:
            return engine.load(self.path) if self.path.exists() else before
        except CalibQuantError:  # damaged
            return before

    def save(self, before: Calibration, meter: Meter) -> None:
        """Unless the last time was not long ago, for what it takes."""
        began = time.monotonic()
        if began - self._saved >= SAVING_SHARE * self._cost:
            engine.save(_joined(before, meter), self.path, overwrite=True)
            self._saved = time.monotonic()
            self._cost = self._saved - began

    def keep(self, before: Calibration, meter: Meter) -> str:
        """Save what is measured; the words for it."""
        points = len(_joined(before, meter).info[POINTS])
        if meter.points:
            engine.save(_joined(before, meter), self.path, overwrite=True)
        if not points:
            return "nothing was kept: no point was finished"
        kept = f"{counted(points, 'point')} in {folders.shown(self.path)}"
        return f"{kept}: run again with the same settings for the rest"


def _summary(found: Calibration, meter: Meter) -> str:
    known = found.sensitivities.values()
    by_gradient = sum(stored.gradients is not None for stored in known)
    how = f"{by_gradient} by gradients, {len(known) - by_gradient} by matched prediction"
    points = f"{counted(len(found.info.get(POINTS, [])), 'point')}, {len(meter.points)} of them new"
    return "\n".join(filter(None, [f"{counted(len(known), 'layer')} ({how})", points, meter.note]))
