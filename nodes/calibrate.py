"""Calibration: watch any sampler (Monitor), sample a prompt list (Calibrate), and their file (Save, Load)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import calibration as engine
from ..quant_core.evidence.calibration import Calibration
from .comfyui import feedback, folders, patches, sampling, written
from .comfyui.sampling import SamplerSettings, Stage, Stages
from .recorder import CalibrationHandle, Recorder, summary
from .types import CATEGORY, CalibrationType, ConditioningSetType

NONE = "none"
SWITCH = 10  # of 20 steps, as ComfyUI's own workflow for Wan 2.2 has it
_MONITORS: dict[Path, Recorder] = {}  # one per file, for as long as ComfyUI runs


def rows_input() -> io.Int.Input:
    return io.Int.Input(
        "rows",
        default=engine.ROWS,
        min=0,
        max=1 << 16,
        tooltip="How many input rows of each layer to keep (GPTQ needs about 2048). Memory and file grow with it: "
        "2048 rows are some 6 GB for Flux, 128 are enough for statistics and activation scales.",
    )


def _memory_input() -> io.Float.Input:
    return io.Float.Input(
        "rows_memory",
        default=0.0,
        min=0.0,
        max=1024.0,
        step=0.5,
        optional=True,
        advanced=True,
        tooltip="GB that all rows together may take so that wide layers keep more, up to as many as they have inputs. "
        "0: all keep the same. GPTQ's weights err a sixth to a half less than with a quarter of that; it does not help "
        "where inputs are rounded to 4 bit.",
    )


class CalibQuantMonitor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantMonitor",
            display_name="Monitor Calibration",
            category=CATEGORY,
            description="Put it between the model and your sampler: collects what each layer sees while you make "
            "pictures as ever. The pictures stay the same, bit for bit.",
            search_aliases=["calibrate", "activations", "statistics"],
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model you want to quantize, with or without LoRAs."),
                io.String.Input(
                    "name",
                    default="my_model",
                    tooltip="File name below output/calibrations. Saved after every run; continued after a restart.",
                ),
                rows_input(),
                io.Boolean.Input(
                    "reset",
                    default=False,
                    tooltip="While on, every queued run begins anew and replaces the file. Off: runs add up.",
                ),
                _memory_input(),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The same model, watched. Link it to your sampler."),
                CalibrationType.Output("calibration", tooltip="What was collected so far; grows run by run."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, reset: bool, **_: object) -> float | str:
        return float("nan") if reset else ""

    @classmethod
    @feedback.in_node_words()
    def execute(cls, model: Any, name: str, rows: int, reset: bool, rows_memory: float = 0.0) -> io.NodeOutput:
        path, node_id = folders.saved_calibration_path(name), cls.hidden.unique_id
        recorder = _MONITORS.setdefault(path, Recorder(path))
        recorder.prepare(*patches.identify(model), rows, reset, rows_memory)
        recorder.report = lambda text: feedback.show(node_id, text)
        return io.NodeOutput(sampling.observe(model, recorder), CalibrationHandle(recorder.current))


class CalibQuantCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantCalibrate",
            display_name="Calibrate",
            category=CATEGORY,
            description="Samples prompts with the model and collects what each layer sees. No KSampler is needed.",
            search_aliases=["calibration", "activations", "statistics"],
            inputs=[
                io.Model.Input("model", tooltip="The 16-bit model you want to quantize, with or without LoRAs."),
                prompts_input(),
                *sampling_inputs(32),
                rows_input(),
                negative_input(),
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Samples to leave out at the beginning, prompts and seeds with them: one calibration drawn "
                    "in parts, by several servers, to be merged.",
                ),
                *expert_inputs(),
                _memory_input(),
            ],
            outputs=[
                CalibrationType.Output("calibration", tooltip="What all samples together showed."),
                CalibrationType.Output(
                    "low_noise_calibration", tooltip="Of an expert pair: what the steps of low_noise_model showed."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, model: Any, conditioning: list[Any], samples: int, steps: int, cfg: float, sampler_name: str,
        scheduler: str, width: int, height: int, frames: int, seed: int, rows: int, negative: Any = None,
        first: int = 0, low_noise_model: Any = None, switch_at_step: int = SWITCH, rows_memory: float = 0.0,
    ) -> io.NodeOutput:  # fmt: skip
        check_negative(cfg, negative)
        settings = SamplerSettings(steps, cfg, sampler_name, scheduler)
        stages = sampling.stages(model, low_noise_model, switch_at_step, settings)
        how = [samples, first, steps, cfg, sampler_name, scheduler, width, height, frames, seed, rows, rows_memory]
        job = job_of(cls.hidden.unique_id, stages, conditioning, negative, how)
        recorders = [_recorder(stage, stages, job, rows, rows_memory) for stage in stages]
        done = min(recorder.runs() for recorder in recorders)
        for recorder in recorders:  # cancelled between the experts, the first has a sample more
            recorder.ahead = recorder.runs() - done
        latent = sampling.empty_latent(model, width, height, frames)
        jobs = jobs_of(conditioning, first + samples, seed)[first + done :]

        def begin(text: str, _seed: int) -> None:
            for recorder in recorders:
                recorder.labels = {**({"prompts": text} if text else {}), "scheduler": scheduler}

        pairs = zip(stages, recorders, strict=True)
        watched = tuple(replace(stage, model=sampling.observe(stage.model, each)) for stage, each in pairs)
        try:
            sample_all(watched, jobs, negative, latent, settings, begin, cls.hidden.unique_id)
        except BaseException:  # a cancel is no Exception; what finished runs gave must not be lost
            for recorder in recorders:
                recorder.save()
            finished = "; ".join(kept(each, samples, "sample") for each in recorders)
            feedback.tell_kept(cls.hidden.unique_id, f"{finished}: run again with the same settings for the rest")
            raise
        collected = [recorder.current() for recorder in recorders]
        for recorder in recorders:
            recorder.path.unlink(missing_ok=True)
        handles = [CalibrationHandle(lambda found=found: found) for found in collected]
        if low_noise_model is None:
            handles.append(CalibrationHandle(_no_expert))
        text = [f"continued: {done} of {samples} samples were done before"] * bool(done)
        return io.NodeOutput(*handles, ui=ui.PreviewText("\n".join([*text, *map(summary, collected)])))


def job_of(node_id: str | None, stages: Stages, *values: Any) -> str:
    """SHA-256 of what decides a sampling job of this node: the graph before it, its MODELs, conditionings, settings."""
    graph = written.graph(node_id)
    return patches.job([(stage.model, stage.start) for stage in stages], graph, *values)


def _recorder(stage: Stage, stages: Stages, job: str, rows: int, memory: float) -> Recorder:
    """Of what an earlier run of the job finished, if there was one."""
    architecture, identity = patches.identify(stage.model)
    name = Path(identity.get("source_file", architecture.name)).stem
    if len(stages) > 1:
        name += "_low_noise" if stage.start else "_high_noise"
    recorder = Recorder(folders.unfinished_calibration_path(name, job), patient=True)
    try:
        recorder.prepare(architecture, identity, rows, memory=memory)
    except CalibQuantError:  # what it left is damaged
        recorder.prepare(architecture, identity, rows, True, memory)
    return recorder


def _no_expert() -> Calibration:
    raise CalibQuantError("low_noise_calibration of Calibrate is of an expert pair: link low_noise_model to Calibrate")


def kept(recorder: Recorder, total: int, what: str) -> str:
    """What a node that ends early leaves behind; what: a sample, a prompt."""
    if not recorder.runs():
        return f"nothing was kept: no {what} was finished"
    return f"{recorder.runs()} of {total} {what}s are in {folders.shown(recorder.path)}"


def check_negative(cfg: float, negative: Any) -> None:
    if cfg != 1 and negative is None:
        raise CalibQuantError(f"cfg {cfg:g} needs a negative prompt: link one to negative, or set cfg to 1")


def sampling_inputs(samples: int) -> list[Any]:
    """What the nodes that sample prompts for a calibration are asked; samples: the default."""
    return [
        io.Int.Input(
            "samples", default=samples, min=1, max=4096, tooltip="Samples to draw; prompts take turns, seeds count up."
        ),
        *sampler_inputs(
            "Seed of the first sample; the next ones count up. Avoid the seeds you will compare models with."
        ),
    ]


def prompts_input() -> Any:
    return io.MultiType.Input(
        "conditioning",
        types=[ConditioningSetType, io.Conditioning],
        tooltip="A prompt set (Load Prompt Set, Encode Prompt Set), or one prompt's CONDITIONING.",
    )


def negative_input() -> Any:
    return io.Conditioning.Input(
        "negative", optional=True, tooltip="Negative prompt; needed unless cfg is 1, which ignores it."
    )


def sampler_inputs(seed: str) -> list[Any]:
    """What every node that samples by itself is asked; seed: what its seed is."""
    size = {"min": 16, "max": 16384, "step": 8}
    return [
        io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Steps of each sample; 8 or 9 for turbo models."),
        io.Float.Input(
            "cfg", default=1.0, min=0.0, max=100.0, step=0.1,
            tooltip="As you use the model: 1 for turbo, distilled and Flux models. Above 1 link negative.",
        ),
        io.Combo.Input("sampler_name", options=sampling.SAMPLERS, default="euler", tooltip="As you use the model."),
        io.Combo.Input("scheduler", options=sampling.SCHEDULERS, default="simple", tooltip="As you use the model."),
        io.Int.Input("width", default=1024, **size, tooltip="Pixels. Take the size you use most."),
        io.Int.Input("height", default=1024, **size, tooltip="Pixels. Take the size you use most."),
        io.Int.Input("frames", default=1, min=1, max=16384, tooltip="Video models only: frames of each sample."),
        io.Int.Input(
            "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF - 4096, control_after_generate=False, tooltip=seed,
        ),
    ]  # fmt: skip


def expert_inputs() -> list[Any]:
    """What a node that samples needs for an expert pair. Last of all inputs: older workflows lack them."""
    return [
        io.Model.Input(
            "low_noise_model", optional=True,
            tooltip="Of an expert pair (Wan 2.2): the model of the later steps, with the same shift. The other input "
            "is then the high-noise model, and each draws its own steps only.",
        ),
        switch_input("low_noise_model"),
    ]  # fmt: skip


def switch_input(low_noise: str) -> io.Int.Input:
    return io.Int.Input(
        "switch_at_step",
        default=SWITCH,
        min=1,
        max=1000,
        optional=True,
        tooltip=f"With {low_noise}: its first step, as end_at_step and start_at_step of your two samplers.",
    )


Job = tuple[str, Any, int]  # prompt text, CONDITIONING, seed


def jobs_of(conditioning: list[Any], samples: int, seed: int) -> list[Job]:
    """Prompts take turns, seeds count up."""
    return [(*prompt, seed + i) for i, prompt in enumerate(_in_turn(prompts_of(conditioning), samples))]


def prompts_of(conditioning: list[Any]) -> list[tuple[str, Any]]:
    """(text, CONDITIONING) of a prompt set's entries; of a single CONDITIONING no text is known."""
    if conditioning and isinstance(conditioning[0], dict):
        return [(prompt["text"], [[prompt["cond"], prompt["options"]]]) for prompt in conditioning]
    return [("", conditioning)]


def _in_turn(prompts: list[tuple[str, Any]], count: int) -> list[tuple[str, Any]]:
    return [prompts[i % len(prompts)] for i in range(count)]


def sample_all(
    stages: Stages, jobs: list[Job], negative: Any, latent: Any, settings: SamplerSettings,
    begin: Callable[[str, int], None], node_id: str | None, keep: Callable[[Any], None] = lambda _latent: None,
) -> None:  # fmt: skip
    """Draw all jobs, with progress on the node. begin(text, seed) is told before each, keep(latent) after it."""
    progress, clock = feedback.preview_progress(len(jobs) * settings.steps), Clock(len(jobs) * settings.steps)
    for i, (text, positive, seed) in enumerate(jobs):
        begin(text, seed)

        def step(done: int, of: int, preview: Any, i: int = i, text: str = text) -> None:
            total = i * settings.steps + settings.steps * done // of
            progress(total, preview)
            clock.tell(total, lambda left: feedback.show(node_id, f"sample {i + 1} of {len(jobs)} · {left}\n{text}"))

        # At cfg 1 the negative prompt is not evaluated; the sampler wants one all the same.
        keep(sampling.draw(stages, positive, negative or positive, latent, settings, seed, step))


class Clock:
    """Time left, from the steps done; told once a second at most."""

    def __init__(self, total: int) -> None:
        self._total, self._began, self._told = total, time.monotonic(), 0.0

    def tell(self, done: int, say: Callable[[str], None]) -> None:
        now = time.monotonic()
        if done and now - self._told >= 1:
            self._told = now
            say(f"{duration((now - self._began) / done * (self._total - done))} left")


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


class CalibQuantSaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantSaveCalibration",
            display_name="Save Calibration",
            category=CATEGORY,
            description="Saves a calibration as one file, merged with an earlier one if you like.",
            is_output_node=True,
            inputs=[
                CalibrationType.Input("calibration", tooltip="From Calibrate or Monitor Calibration."),
                io.String.Input(
                    "filename_prefix",
                    default="my_model",
                    tooltip="Below output/calibrations. A number is appended; nothing is overwritten.",
                ),
                io.Combo.Input(
                    "merge_with",
                    options=[NONE, *folders.calibration_names()],
                    default=NONE,
                    optional=True,
                    tooltip="Add up with this file of the same model, as if both were calibrated in one go.",
                ),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Link the sampler's LATENT here when the calibration comes from Monitor Calibration, so "
                    "that saving waits for sampling.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, merge_with: str = NONE, **_: object) -> str:
        merged = "" if merge_with == NONE else folders.calibration_fingerprint(merge_with)
        return f"{merged} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, calibration: CalibrationHandle, filename_prefix: str, merge_with: str = NONE, after: Any = None
    ) -> io.NodeOutput:
        found = calibration.current()
        if not found.layers:
            raise CalibQuantError("nothing was collected yet: link the sampler's LATENT to after, which makes it wait")
        if merge_with != NONE:
            other = engine.load(folders.calibration_path(merge_with), leave_rows=True)
            found = engine.merge(found, other, max(c.info.get("rows", engine.ROWS) for c in (found, other)))
        path = folders.new_calibration_path(filename_prefix)
        engine.save(found, path)
        written.remember(cls.hidden.unique_id, path)
        text = f"{path.name}\n{summary(found)}"
        return io.NodeOutput(ui={"text": [text], "calibquant_result": [{"path": folders.shown(path)}]})


class CalibQuantLoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantLoadCalibration",
            display_name="Load Calibration",
            category=CATEGORY,
            description="Loads a calibration file.",
            inputs=[
                io.Combo.Input(
                    "calibration_name",
                    options=folders.calibration_names(),
                    tooltip="A file from output/calibrations or models/calibquant_calibrations, or the demo model's.",
                )
            ],
            outputs=[CalibrationType.Output("calibration", tooltip="What the file holds.")],
        )

    @classmethod
    def fingerprint_inputs(cls, calibration_name: str) -> str:
        return folders.calibration_fingerprint(calibration_name)

    @classmethod
    @feedback.in_node_words()
    def execute(cls, calibration_name: str) -> io.NodeOutput:
        found = engine.load(folders.calibration_path(calibration_name), leave_rows=True)
        return io.NodeOutput(CalibrationHandle(lambda: found), ui=ui.PreviewText(summary(found)))
