"""Sampling with a MODEL, watched or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP

from ...quant_core.errors import CalibQuantError
from ...quant_core.evidence.collector import Collector
from ...quant_core.evidence.watch import linears, watch
from . import feedback

_WRAPPER = "calibquant"


@dataclass(frozen=True)
class SamplingRun:
    """What one sampling run was called with. resolution: the latent's shape; patched: tensors with LoRA patches."""

    seed: int | None
    steps: int
    sampler: str
    cfg: float
    resolution: list[int]
    patched: int


class Observer(Protocol):
    """Told of every sampling run of a MODEL; exactly one of finish and drop follows each start."""

    def start(self, run: SamplingRun) -> Collector: ...

    def finish(self) -> None: ...

    def drop(self) -> None:
        """The run was cancelled or failed."""


def observe(model: Any, observer: Observer) -> Any:
    """A clone of the MODEL whose sampling runs feed the observer's collector; samples stay bit-identical.

    Later clones (LoRA, shift) are observed too. Hooks are on the model's modules only while it samples.
    """
    collectors: list[Collector] = []  # that of the run under way, if one is
    observed = model.clone()
    observed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _WRAPPER, _around_sampling(observer, collectors))
    observed.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _WRAPPER, _before_model(collectors))
    return observed


def _around_sampling(observer: Observer, collectors: list[Collector]) -> Callable[..., Any]:
    def sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        if collectors:  # a sampler that samples within its own run: part of that run
            return executor(*args, **kwargs)
        # The module is that of sampling time: conditioning hooks may have swapped in a model of their own.
        patcher = executor.class_obj.model_patcher
        collectors.append(observer.start(_describe_run(executor, args, kwargs)))
        try:
            others = [each.model.diffusion_model for each in patcher.get_additional_models_with_key("multigpu")]
            layers = linears(patcher.model.diffusion_model)
            collectors[-1].expect({name: layer.in_features for name, layer in layers})
            with feedback.in_node_words():  # the sampler's node is not one of ours
                with watch(patcher.model.diffusion_model, collectors[-1], *others):
                    result = executor(*args, **kwargs)
                observer.finish()
        except BaseException:  # a cancel is no Exception
            observer.drop()
            raise
        finally:
            collectors.pop()
        return result

    return sample


def _before_model(collectors: list[Collector]) -> Callable[..., Any]:
    def apply(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        if collectors:
            call = inspect.signature(executor.original).bind(x, t, *args, **kwargs).arguments
            options = call.get("transformer_options") or {}
            collectors[-1].model_call(options.get("sigmas"), options.get("cond_or_uncond"))
        return executor(x, t, *args, **kwargs)

    return apply


def _describe_run(executor: Any, args: Any, kwargs: Any) -> SamplingRun:
    call, guider = inspect.signature(executor.original).bind(*args, **kwargs).arguments, executor.class_obj
    function = getattr(call["sampler"], "sampler_function", call["sampler"])
    sampler = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    shape = list((call.get("latent_shapes") or [call["noise"].shape])[0])
    steps, patched = len(call["sigmas"]) - 1, len(guider.model_patcher.patches)
    return SamplingRun(call.get("seed"), steps, sampler, float(getattr(guider, "cfg", 1)), shape, patched)


SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS


@dataclass(frozen=True)
class SamplerSettings:
    steps: int
    cfg: float
    sampler: str
    scheduler: str


def empty_latent(model: Any, width: int, height: int, frames: int) -> torch.Tensor:
    """Zeros of the shape this MODEL samples: [1, C, H, W], or [1, C, T, H, W] for a video model. Sizes in pixels."""
    latent = model.get_model_object("latent_format")
    size = [max(1, n // latent.spacial_downscale_ratio) for n in (height, width)]
    if latent.latent_dimensions == 3:
        size.insert(0, (frames - 1) // latent.temporal_downscale_ratio + 1)
    elif latent.latent_dimensions != 2:
        raise CalibQuantError("this MODEL makes neither images nor video: use Monitor Calibration in its own graph")
    return comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, latent.latent_channels, *size))


@dataclass(frozen=True)
class Stage:
    """The steps that one model draws of every sample: ``start`` up to ``end``."""

    model: Any
    start: int
    end: int


Stages = tuple[Stage, ...]  # one, or those of an expert pair: high noise, then low noise


def stages(model: Any, low_noise_model: Any, switch: int, settings: SamplerSettings) -> Stages:
    """All steps by one model, or, as Wan 2.2 wants it, those from step ``switch`` on by its low-noise expert."""
    if low_noise_model is None:
        return (Stage(model, 0, settings.steps),)
    if not 0 < switch < settings.steps:
        raise CalibQuantError(f"switch_at_step {switch} leaves one of the experts no step of {settings.steps}")
    check_pair(model, low_noise_model, settings)
    return Stage(model, 0, switch), Stage(low_noise_model, switch, settings.steps)


def check_pair(model: Any, other: Any, settings: SamplerSettings) -> None:
    """CalibQuantError for two MODELs that cannot draw the same picture."""
    kinds = [type(each.get_model_object("latent_format")).__name__ for each in (model, other)]
    if kinds[0] != kinds[1]:
        raise CalibQuantError(f"the two models make different latents ({kinds[0]}, {kinds[1]}): link two of one family")
    first, second = (_sigmas(each, settings) for each in (model, other))
    if not torch.allclose(first, second, rtol=1e-4):
        raise CalibQuantError("the two models are sampled at different noise levels: put the same shift on both")


def sigmas(stage: Stage, settings: SamplerSettings) -> list[float]:
    """Noise levels at which the stage's steps begin."""
    return _sigmas(stage.model, settings)[:-1][stage.start : stage.end].tolist()


def _sigmas(model: Any, settings: SamplerSettings) -> torch.Tensor:
    model_sampling = model.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(model_sampling, settings.scheduler, settings.steps)


def draw(
    stages: Stages, positive: Any, negative: Any, latent: torch.Tensor, settings: SamplerSettings, seed: int, step: Any
) -> torch.Tensor:
    """One sample as the stock KSampler draws it, or one KSampler (Advanced) for each stage.

    step(done, of, preview) after every step; preview as ComfyUI's.
    """
    noise = comfy.sample.prepare_noise(latent, seed)
    how = (settings.steps, settings.cfg, settings.sampler, settings.scheduler)
    for stage in stages:
        latent = comfy.sample.sample(
            stage.model, noise, *how, positive, negative, latent, start_step=stage.start, last_step=stage.end,
            callback=_callback(stage, settings.steps, step), disable_pbar=True, seed=seed,
        )  # fmt: skip
        noise = torch.zeros_like(noise)  # the next stage goes on with what noise is left
    return latent


def _callback(stage: Stage, steps: int, step: Any) -> Callable[..., None]:
    model = stage.model
    previewer = latent_preview.get_previewer(model.load_device, model.get_model_object("latent_format"))

    def callback(index: int, x0: torch.Tensor, _x: torch.Tensor, total: int) -> None:
        done = stage.start + (stage.end - stage.start) * (index + 1) // total
        step(done, steps, previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None)

    return callback
