"""What a MODEL does while it samples (predictions, seconds, native kernels), and latents made visible."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...quant_core.errors import CalibQuantError
from ...quant_core.evidence.likeness import relative_error
from ...quant_core.evidence.watch import force_eager, linears
from ...quant_core.reports.likeness import Pace
from .sampling import Stages

_WRAPPER = "calibquant_compare"


Predict = Callable[[torch.Tensor], torch.Tensor]  # from another x at the same noise level
KEPT = 1e9  # bytes of predictions on the CPU; samples beyond it are drawn all the same


@dataclass(frozen=True)
class Prediction:
    """A call of the model in sampling: the denoised latent x0 that it predicts from x. number: from 1."""

    number: int
    sigma: float
    x: torch.Tensor
    x0: torch.Tensor


Observer = Callable[[Prediction, Predict], None]


class Watched:
    """Clones of a MODEL or an expert pair, ``stages``, that tell what they do while they sample.

    Samples stay as they are.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = tuple(replace(stage, model=stage.model.clone()) for stage in stages)
        for stage in self.stages:
            stage.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _WRAPPER, self._predict)
        self._seconds: list[list[float]] = []  # of each sample's calls of the model
        self._layers: dict[torch.nn.Module, dict[str, str]] = {}  # quantized layer -> why it ran emulated, or ""
        self._observer: Observer | None = None

    def begin(self, observer: Observer | None = None) -> None:
        """A new sample; the observer is told of each of its predictions."""
        self._seconds.append([])
        self._observer = observer

    def pace(self, steps: int) -> Pace:
        """steps: of each sample; some samplers call the model twice in one."""
        reasons = [reason for layers in self._layers.values() for reason in layers.values()]
        calls = [seconds for sample in self._seconds for seconds in sample[1:] or sample]
        per_step = sum(map(len, self._seconds)) / (steps * len(self._seconds))
        why = Counter(filter(None, reasons))
        return Pace(median(calls) * per_step, len(reasons), reasons.count(""), dict(why.most_common()))

    def _predict(self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            module = executor.class_obj.inner_model.diffusion_model
            if module not in self._layers:  # in the first call, which is not counted, so that hooks cost nothing
                stack.enter_context(_watch_kernels(module, self._layers.setdefault(module, {})))
            began = _now()
            x0 = executor(x, timestep, *args, **kwargs)
            self._seconds[-1].append(_now() - began)
        if self._observer:
            prediction = Prediction(len(self._seconds[-1]), float(timestep.max()), x, x0)
            self._observer(prediction, lambda other: executor(other.to(x), timestep, *args, **kwargs))
        return x0


class Matched:
    """The predictions of one model, then another's from the same inputs: errors that do not add up on the way."""

    def __init__(self) -> None:
        self.errors: dict[int, list[tuple[float, float]]] = {}  # number of the call -> (sigma, error) of each sample
        self._kept: dict[int, list[Prediction]] = {}  # by sample
        self._nbytes = 0

    def record(self, sample: int) -> Observer | None:
        """For the first model; None where memory is used up."""
        if self._nbytes >= KEPT:
            return None
        kept = self._kept[sample] = []

        def observe(seen: Prediction, _predict: Predict) -> None:
            kept.append(Prediction(seen.number, seen.sigma, _kept(seen.x), _kept(seen.x0)))
            self._nbytes += kept[-1].x.nbytes + kept[-1].x0.nbytes

        return observe

    def compare(self, sample: int) -> Observer | None:
        """For the other model, in the same sample."""
        known = {one.number: one for one in self._kept.pop(sample, [])}

        def observe(seen: Prediction, predict: Predict) -> None:
            wanted = known.get(seen.number)
            if wanted and abs(wanted.sigma - seen.sigma) <= 1e-4 * wanted.sigma:  # a sampler may choose its own steps
                error = relative_error(predict(wanted.x).cpu(), wanted.x0, scale=wanted.x - wanted.x0)
                self.errors.setdefault(seen.number, []).append((seen.sigma, error))

        return observe if known else None


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _now() -> float:
    """Once the device has done what it was told."""
    comfy.model_management.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _watch_kernels(diffusion_model: torch.nn.Module, layers: dict[str, str]) -> Iterator[None]:
    """Fill in why each quantized Linear that is called runs emulated; "" where a kernel of its format multiplies.

    ComfyUI decides by these attributes of the layer. A kernel that fails is replaced by decoded weights, which
    comfy-kitchen says in its log.
    """
    handles, running = [], [""]

    class Failures(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if running[0] in layers:
                layers[running[0]] = f"the kernel failed ({record.getMessage().splitlines()[0][:80]})"

    def hook(name: str) -> Callable[..., None]:
        def before(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            running[0] = name
            if getattr(module, "layout_type", None) is not None and args:
                layers.setdefault(name, _why_emulated(module, args[0].device.type))

        return before

    failures, log = Failures(logging.WARNING), logging.getLogger("comfy_kitchen")
    log.addHandler(failures)
    try:
        for name, module in linears(diffusion_model):
            handles.append(module.register_forward_pre_hook(hook(name)))
        with force_eager():
            yield
    finally:
        log.removeHandler(failures)
        for handle in handles:
            handle.remove()


def _why_emulated(module: Any, device: str) -> str:
    if device == "cpu":
        return "no GPU: computed on the CPU"
    if module.weight_function or module.bias_function:
        return "a LoRA that is added while sampling: weights are decoded"
    if getattr(module, "_full_precision_mm_config", False):
        return "the file asks for 16-bit products (weight-only)"
    if module._full_precision_mm:
        return f"this GPU has no kernel for {module.quant_format}"
    return "weights are decoded in every step" if getattr(module, "comfy_force_cast_weights", False) else ""


def in_model_space(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """Where the model works, with about zero mean and unit variance; samplers hand out the VAE's space."""
    return model.get_model_object("latent_format").process_in(latent)


def decode(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    """Pictures float32 [frames, H, W, C] in 0..1, on the CPU. A VAE of images decodes a video cell by cell."""
    by_frame = latent.dim() == 5 and vae.latent_dim == 2
    parts = [vae.decode(part).float().cpu() for part in (latent.unbind(2) if by_frame else [latent])]
    pictures = torch.cat([part.reshape(-1, *part.shape[-3:]) for part in parts])
    if not pictures.isfinite().all():
        raise CalibQuantError("the linked VAE decodes to NaN: start ComfyUI with --fp32-vae, or take another VAE")
    return pictures.clamp(0, 1)


def rough_pictures(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """The same without a VAE: a pixel for each cell of the latent, in rough colours where its format knows some."""
    latent_format = model.get_model_object("latent_format")
    cells = in_model_space(model, latent)[0].float().cpu()
    cells = (cells[:, None] if cells.dim() == 3 else cells).movedim(0, -1)  # [frames, H, W, C]
    factors, bias = latent_format.latent_rgb_factors, getattr(latent_format, "latent_rgb_factors_bias", None)
    if factors is None or len(factors) != cells.shape[-1]:
        return (cells.mean(-1, keepdim=True) / 2 + 0.5).clamp(0, 1).expand(-1, -1, -1, 3)
    colours = cells @ torch.tensor(factors) + (torch.tensor(bias) if bias is not None else 0)
    return (colours / 2 + 0.5).clamp(0, 1)
