"""Sensitivities of any torch model: gradient probes where a backward pass fits, else matched prediction.

    meter = Meter(model, groups, Settings(visits=1))
    meter.visit(lambda: model(x), "first point")  # at as many points as you like; grad mode on, inference mode off
    calibration.sensitivities = meter.result()

*Gradient probes* cost a forward pass and ``probes`` backward passes a point, for all layers at once. *Matched
prediction* rounds one layer at a time to NVFP4 and runs the model: as many forward passes as there are layers.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint

from ..errors import CalibQuantError
from ..formats import FORMATS
from . import sensitivity
from .sensitivity import Error, Gatherer, LayerSensitivity
from .watch import force_eager, linears, replaced

ESTIMATORS = ("gradient", "matched")
REFERENCE = "nvfp4"  # what matched prediction rounds to
MATCHED_ROWS = 64  # of a layer and point, whose errors the change of the prediction is related to

Predict = Callable[[], torch.Tensor]  # the model's prediction [B, ...] at one point; may be called again
WeightOf = Callable[[torch.nn.Module, torch.Tensor], contextlib.AbstractContextManager[torch.Tensor]]


class TooLarge(Exception):  # noqa: N818 - a state of the machine, not a fault
    """What the backward pass needs does not fit in the memory that is free."""


@contextlib.contextmanager
def plain_weight(module: torch.nn.Module, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weight of a Linear, in the dtype and on the device of ``like``."""
    yield module.weight.detach().to(like)  # type: ignore[union-attr, operator]


@dataclass(frozen=True)
class Settings:
    """visits: how many points there are, ``done`` of them in an earlier run. rows: of each layer, from all of them.

    seconds: that matched prediction may take over all of them.
    """

    estimator: str = "gradient"
    visits: int = 1
    done: int = 0
    probes: int = 2
    rows: int = sensitivity.ROWS
    seconds: float = 600.0
    seed: int = 0


class Meter:
    """Measures the Linears of a model that ``groups`` names (layer -> its group), point by point.

    free: bytes that a backward pass may hold. tick: called often; may raise to cancel.
    """

    def __init__(
        self, model: torch.nn.Module, groups: Mapping[str, str], settings: Settings, weight_of: WeightOf = plain_weight,
        free: Callable[[], float] = lambda: float("inf"), tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._model, self._settings, self._weight_of = model, settings, weight_of
        self._free, self._tick = free, tick
        self._layers = {name: module for name, module in linears(model) if name in groups}
        probes = settings.probes
        self._gatherer = Gatherer(groups, settings.rows, settings.visits * probes, settings.done * probes)
        self._matched: dict[str, LayerSensitivity] = {}
        self._by_gradient, self._checkpointed = settings.estimator == "gradient", False
        self.note = ""  # why it does not work as asked
        self.points: list[str] = []  # visited

    def visit(self, predict: Predict, point: str) -> None:
        """Measure at one point, whose random numbers hang on its name.

        Falls back to block-wise checkpointing, and from that to matched prediction.
        """
        if self._by_gradient:
            try:
                reached = self._gradients(predict, zlib.crc32(point.encode()))
                # A layer without effect, or one behind an operation that has no gradient: a rounding tells which.
                self._match(predict, [n for n in self._layers if n not in reached and n not in self._matched])
                self.points.append(point)
                return
            except (RuntimeError, TooLarge, CalibQuantError) as e:  # torch.OutOfMemoryError is a RuntimeError
                problem = str(e).splitlines()[0]
            self._by_gradient = False
            self.note = f"no gradients ({problem}): measured by matched prediction"
        self._match(predict, list(self._layers))
        self.points.append(point)

    def result(self) -> dict[str, LayerSensitivity]:
        """Of all points so far; of a layer with gradients those alone."""
        return {**self._matched, **self._gatherer.result()}

    def _gradients(self, predict: Predict, entropy: int) -> set[str]:
        """Layers that the backward passes reached."""
        if not self._checkpointed:
            try:
                return self._backward(predict, entropy, contextlib.nullcontext())
            except (TooLarge, torch.OutOfMemoryError):
                self._checkpointed = True
        return self._backward(predict, entropy, checkpointed_blocks(self._model))

    def _backward(self, predict: Predict, entropy: int, how: contextlib.AbstractContextManager[None]) -> set[str]:
        anchor = torch.zeros((), requires_grad=True)
        energy = torch.empty(0)

        def sink(layer: str, x: torch.Tensor, g: torch.Tensor) -> None:
            self._tick()
            if layer in self._layers:
                self._gatherer.add(layer, x, g, energy)

        random = torch.Generator().manual_seed(self._settings.seed << 32 | entropy)
        with tapped(self._model, anchor, sink, self._weight_of), how:
            with _held_below(self._free(), self._model):
                y = predict()
            energy = y.detach().float().flatten(1).square().sum(1).clamp(min=1e-30)
            reached: set[str] = set()
            for i in range(self._settings.probes):
                v = torch.randint(0, 2, y.shape, generator=random).to(y) * 2 - 1
                more = i + 1 < self._settings.probes
                self._gatherer.start(i, self._settings.seed, entropy)
                torch.autograd.grad(y, anchor, v, retain_graph=more, allow_unused=True)
                reached |= set(self._gatherer.finish())
        return reached

    def _match(self, predict: Predict, layers: list[str]) -> None:
        """Round one layer after the other. The first point measures all; later ones the most damaging first, until
        their share of the time is over."""
        if not layers:
            return
        began, share = time.monotonic(), self._settings.seconds / self._settings.visits
        known = [name for name in layers if name in self._matched]
        known.sort(key=lambda name: -self._matched[name].gain)
        with torch.no_grad():
            exact = predict().float()
            for name in [*(name for name in layers if name not in self._matched), *known]:
                if name in self._matched and time.monotonic() - began > share:
                    return
                self._tick()
                found = self._measured(name, predict, exact)
                if found is not None:
                    before = self._matched.get(name)
                    self._matched[name] = sensitivity.merge(before, found) if before else found

    def _measured(self, name: str, predict: Predict, exact: torch.Tensor) -> LayerSensitivity | None:
        """One layer at one point; None where the model does not call it."""
        module, rows, sums = self._layers[name], [], [0.0, 0]
        with self._weight_of(module, exact) as weight:
            error = rounding_error(weight.float())
        forward = module.forward

        def rounded(x: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(-1, x.shape[-1]).float()
            errors = error(flat)
            rows.append(flat[:: max(1, len(flat) // MATCHED_ROWS)][:MATCHED_ROWS].to(torch.bfloat16).cpu())
            sums[0] += errors.square().sum().item()
            sums[1] += len(flat)
            y = forward(x)
            return y + errors.view(y.shape).to(y.dtype)

        with replaced(module, rounded):
            change = (predict().float() - exact).flatten(1).square().sum(1)
        if not rows:
            return None
        damage = (change / exact.flatten(1).square().sum(1).clamp(min=1e-30)).mean().item()
        mean = sums[0] / sums[1]
        return LayerSensitivity(torch.cat(rows), gain=damage / mean if mean else 0.0)


def rounding_error(weight: torch.Tensor) -> Error:
    """What nearest rounding to the reference format, of inputs too, does to output rows. weight: float32 [out, in]."""
    fmt = FORMATS[REFERENCE]
    codes = fmt.quantize(weight, fmt.tensor(weight, weight.abs().amax()))
    rounded = fmt.dequantize(codes, tuple(weight.shape))
    return lambda rows: fmt.feed(rows, None) @ rounded.T - rows @ weight.T


class _Tap(torch.autograd.Function):
    """A Linear that saves its input and nothing else, tells the sink its gradient, and is reached by every backward
    pass: its output depends on the anchor, whether or not its input requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, _anchor: torch.Tensor, forward: Any, sink: Any, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.sink, ctx.weight = sink, weight
        with torch.no_grad():
            y = forward(x)
        return y.clone() if y._is_view() else y  # no view: models work on it in place

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.sink(x, g)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        with ctx.weight(g) as weight:
            return g @ weight, None, None, None, None


@contextlib.contextmanager
def tapped(
    model: torch.nn.Module, anchor: torch.Tensor, sink: Callable[..., None], weight_of: WeightOf
) -> Iterator[None]:
    """While the block runs, every backward pass to the anchor tells sink(layer, input, gradient of its output).

    What norms and activations keep for it are copies, so that a model may add to its residual stream in place.
    """

    def through(name: str, module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        forward = module.forward

        def tell(x: torch.Tensor, g: torch.Tensor) -> None:
            sink(name, x, g)

        return lambda x: _Tap.apply(x, anchor, forward, tell, lambda like: weight_of(module, like))

    def on_copies(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(*cloned(args), **cloned(kwargs))

    taps = dict(linears(model))
    others = {id(m): m for m in model.modules() if next(m.children(), None) is None} | {
        id(m): None for m in taps.values()
    }
    with contextlib.ExitStack() as stack:
        for name, module in taps.items():
            stack.enter_context(replaced(module, through(name, module)))
        for other in filter(None, others.values()):
            stack.enter_context(replaced(other, on_copies(other.forward)))
        stack.enter_context(force_eager())
        yield


@contextlib.contextmanager
def checkpointed_blocks(model: torch.nn.Module) -> Iterator[None]:
    """While the block runs, members of the model's ModuleLists keep their inputs only and run again in the backward
    pass. Of nested lists the outermost that is called counts."""
    inside: list[None] = []

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        def on_copies(args: Any, kwargs: Any) -> Any:  # a block that works in place must not change what is kept
            inside.append(None)
            try:
                return forward(*cloned(args), **cloned(kwargs))
            finally:
                inside.pop()

        def call(*args: Any, **kwargs: Any) -> Any:
            if inside or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return torch.utils.checkpoint.checkpoint(on_copies, args, kwargs, use_reentrant=False)

        return call

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    blocks = {id(block): block for each in lists for block in each if next(block.children(), None) is not None}
    with contextlib.ExitStack() as stack:
        for block in blocks.values():
            stack.enter_context(replaced(block, again(block.forward)))
        yield


def cloned(value: Any) -> Any:
    """With tensors cloned: those of inference mode cannot be kept for a backward pass, nor changed in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(cloned, value))
    return {k: cloned(v) for k, v in value.items()} if type(value) is dict else value


def _held_below(limit: float, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """TooLarge once what operations keep for the backward pass, besides the model's own tensors, exceeds so many bytes:
    on the CPU nothing else stops it. Versions are checked as torch does where there are no such hooks.
    """
    held = dict.fromkeys((tensor.untyped_storage().data_ptr() for tensor in model.parameters()), 0)
    total = 0

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            held[storage.data_ptr()] = storage.nbytes()
            total += storage.nbytes()
        if total > limit:
            raise TooLarge(f"the backward pass needs more than {limit / 1e9:.1f} GB")
        return tensor, tensor._version

    def unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError("the model changes a tensor in place that its backward pass needs")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
