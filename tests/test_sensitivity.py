"""Sensitivities: against finite differences of the prediction, in files, and in ComfyUI's own sampling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant_core.evidence import probing, sensitivity
from quant_core.evidence.probing import Meter, Settings


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Two blocks that see each token alone, so that its damage is a sum over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.unused = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().requires_grad_(False)


X = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1))
LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def measured(model: nn.Module, estimator: str = "gradient", visits: int = 1, **how: object) -> Meter:
    groups = {name: name for name in [*LAYERS, "unused"]}
    meter = Meter(model, groups, Settings(estimator, visits, **{"rows": 1 << 14, "probes": 64, **how}))
    for _ in range(visits):
        meter.visit(lambda: model(X))
    return meter


def small_error(model: nn.Module, layer: str) -> sensitivity.Error:
    """A coarser weight, as a function of input rows."""
    weight = dict(model.named_modules())[layer].weight
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    return lambda rows: rows @ change.T


def true_damage(model: nn.Module, *layers: str) -> float:
    """By running the model with the errors added."""
    modules, exact = dict(model.named_modules()), model(X)
    hooks = [
        modules[name].register_forward_hook(lambda _m, args, y, e=small_error(model, name): y + e(args[0]))
        for name in layers
    ]
    moved = model(X)
    for hook in hooks:
        hook.remove()
    return ((moved - exact).flatten(1).square().sum(1) / exact.flatten(1).square().sum(1)).mean().item()


def test_damage_is_the_change_of_the_prediction(model: nn.Module) -> None:
    found = measured(model).result()
    for layer in LAYERS:
        predicted = sensitivity.damage(found[layer], small_error(model, layer))
        assert predicted == pytest.approx(true_damage(model, layer), rel=0.15), layer  # 3840 draws of a probe
    together = sum(sensitivity.damage(found[layer], small_error(model, layer)) for layer in LAYERS)
    assert together == pytest.approx(true_damage(model, *LAYERS), rel=0.3)


def test_gradients_equal_finite_differences(model: nn.Module) -> None:
    """<g, d> of one row is the change of <v, y> when that token's output is moved by d, in units of ||y||."""
    vectors, rows = [], []
    anchor, layers = torch.zeros((), requires_grad=True), {n: m for n, m in model.named_modules() if n in LAYERS}
    x = X.double()
    model.double()

    def sink(layer: str, _x: torch.Tensor, g: torch.Tensor) -> None:
        rows.append((layer, g))

    with probing.tapped(layers, anchor, sink, probing.plain_weight):
        y = model(x)
        vectors.append(torch.randn_like(y))
        torch.autograd.grad(y, anchor, vectors[0], allow_unused=True)
    assert [layer for layer, _ in rows] == LAYERS[::-1]
    for layer, g in rows:
        step = torch.zeros_like(g)
        step[1, 5] = torch.randn(g.shape[-1], dtype=g.dtype)
        ends = []
        for sign in (1e-5, -1e-5):
            hook = layers[layer].register_forward_hook(lambda _m, _a, out, s=sign, d=step: out + s * d)
            ends.append((model(x) * vectors[0]).sum())
            hook.remove()
        torch.testing.assert_close((g * step).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-9)


def test_matched_prediction_agrees_and_unused_layers_cost_nothing(model: nn.Module) -> None:
    by_gradient, matched = measured(model).result(), measured(model, "matched").result()
    for layer in LAYERS:
        error = probing.rounding_error(dict(model.named_modules())[layer].weight)
        expected = sensitivity.damage(by_gradient[layer], error)
        assert sensitivity.damage(matched[layer], error) == pytest.approx(expected, rel=0.3), layer
    assert by_gradient["unused"].gain == matched["unused"].gain == 0.0


def same(a: Meter, b: Meter) -> bool:
    one, two = a.result(), b.result()
    return one.keys() == two.keys() and all(
        torch.equal(one[n].inputs, two[n].inputs) and torch.equal(one[n].gradients, two[n].gradients) for n in LAYERS
    )


def test_a_seed_gives_the_same_rows_and_another_seed_others(model: nn.Module) -> None:
    few = {"rows": 32, "probes": 2, "visits": 3}
    assert same(measured(model, **few), measured(model, **few))
    assert not same(measured(model, **few), measured(model, **few, seed=1))
    assert all(len(measured(model, **few).result()[name].inputs) == 32 for name in LAYERS)


def test_checkpointed_blocks_give_the_same_gradients(model: nn.Module) -> None:
    groups = {name: name for name in LAYERS}
    meters = []
    for free in (1e12, 8000):  # bytes: the model alone keeps more
        meters.append(Meter(model, groups, Settings(rows=64), free=lambda free=free: free))
        meters[-1].visit(lambda: model(X))
    assert meters[1].note == "" and meters[1]._checkpointed and not meters[0]._checkpointed
    one, two = (meter.result() for meter in meters)
    for layer in LAYERS:  # the failed try drew no vector
        torch.testing.assert_close(one[layer].gradients, two[layer].gradients)


class InPlace(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.exp(self.blocks[0].up(x))
        y = self.blocks[0].down(h)
        h += 1  # what exp's backward pass needs
        return y + self.blocks[1](x) + h.sum()


def test_a_model_without_a_backward_pass_is_matched_and_says_so(model: nn.Module) -> None:
    torch.manual_seed(0)
    meter = measured(InPlace().requires_grad_(False))
    assert meter.note.startswith("no gradients (") and meter.note.endswith("measured by matched prediction")
    assert all(stored.gradients is None and stored.gain > 0 for stored in meter.result().values())


def test_a_cancel_leaves_the_model_as_it_was(model: nn.Module) -> None:
    def cancel() -> None:
        raise KeyboardInterrupt

    for estimator in probing.ESTIMATORS:
        meter = Meter(model, {name: name for name in LAYERS}, Settings(estimator), tick=cancel)
        with pytest.raises(KeyboardInterrupt):
            meter.visit(lambda: model(X))
        assert not any("forward" in vars(module) for module in model.modules())
        assert meter.result() == {}
