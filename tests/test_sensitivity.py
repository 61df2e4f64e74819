"""Sensitivities: against finite differences of the prediction, in files, and in ComfyUI's own sampling."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from safetensors import safe_open
from scipy.stats import spearmanr
from test_calibrate_nodes import DEMO, FAMILIES, MODEL, execute, hooks_on, ksampler, monitor, prompt_set, tiny
from test_calibrate_nodes import LAYERS as LINEARS
from torch import nn

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration, probing, sensitivity
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.evidence.probing import Meter, Settings
from quant_core.evidence.sensitivity import LayerSensitivity
from quant_core.evidence.watch import watch
from quant_core.models.source import Source
from quant_core.planning import recipes


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
    for i in range(visits):
        meter.visit(lambda: model(X), f"point {i}")
    return meter


def small_error(model: nn.Module, layer: str) -> sensitivity.Error:
    """A coarser weight, as a function of input rows."""
    weight = dict(model.named_modules())[layer].weight
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    return lambda rows: rows @ change.T


def true_damage(model: nn.Module, *layers: str) -> float:
    """By running the model with the errors added."""
    modules, exact = dict(model.named_modules()), model(X)
    errors = {name: small_error(model, name) for name in layers}
    hooks = [
        modules[name].register_forward_hook(lambda _m, args, y, e=error: y + e(args[0]))
        for name, error in errors.items()
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

    with probing.tapped(model, anchor, sink, probing.plain_weight):
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
        meters[-1].visit(lambda: model(X), "point")
    assert meters[1].note == "" and meters[1]._checkpointed and not meters[0]._checkpointed
    one, two = (meter.result() for meter in meters)
    for layer in LAYERS:  # the failed try drew no vector
        torch.testing.assert_close(one[layer].gradients, two[layer].gradients)


class Mixing(Model):
    """Gives every token the mean of all, as attention may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](x + 4 * self.blocks[0](x + 0.5).mean(1, keepdim=True))


def test_errors_that_tokens_have_in_common_add_up() -> None:
    torch.manual_seed(0)
    model = Mixing().requires_grad_(False)
    found = measured(model).result()
    for layer in LAYERS[:2]:  # taken token by token, the damage were a sixth
        predicted = sensitivity.damage(found[layer], small_error(model, layer))
        assert predicted == pytest.approx(true_damage(model, layer), rel=0.3), layer


class Residual(Model):
    """Adds to its residual stream in place, as Flux does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)
        x += self.blocks[1].down(torch.tanh(self.blocks[1].up(self.norm(x))))
        return x


def test_residuals_may_be_added_in_place(model: nn.Module) -> None:
    torch.manual_seed(0)
    model = Residual().requires_grad_(False)
    meter = measured(model)
    assert meter.note == ""
    for layer in LAYERS:
        predicted = sensitivity.damage(meter.result()[layer], small_error(model, layer))
        assert predicted == pytest.approx(true_damage(model, layer), rel=0.2), layer


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
            meter.visit(lambda: model(X), "point")
        assert not any("forward" in vars(module) for module in model.modules())
        assert meter.result() == {}


# --- in the calibration file


def calibrated(model: nn.Module, seed: int = 0, estimator: str = "gradient") -> Calibration:
    collector = Collector(lambda _: "")
    collector.start_run(f"seed {seed}")
    with watch(model, collector):
        model(X)
    collector.finish_run()
    meter = measured(model, estimator, rows=32, probes=2, seed=seed)
    info = {calibration.POINTS: [f"{name} of seed {seed}" for name in meter.points]}
    return replace(collector.result(info), sensitivities=meter.result())


def equal(a: LayerSensitivity, b: LayerSensitivity) -> bool:
    if a.gradients is None or b.gradients is None:
        return a.gradients is b.gradients and a.gain == b.gain and torch.equal(a.inputs, b.inputs)
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("inputs", "gradients", "sums"))


@pytest.mark.parametrize("estimator", probing.ESTIMATORS)
def test_the_file_holds_sensitivities(model: nn.Module, tmp_path: Path, estimator: str) -> None:
    found, path = calibrated(model, estimator=estimator), tmp_path / "a.calibration.safetensors"
    calibration.save(found, path)
    read = calibration.load(path)
    assert read.sensitivities.keys() == found.sensitivities.keys() == {*LAYERS, "unused"}
    assert all(equal(stored, read.sensitivities[name]) for name, stored in found.sensitivities.items())
    assert f"sensitivities of 5 layers from 1 point ({4 * (estimator == 'gradient')} of them" in calibration.describe(
        read
    )


def test_layers_with_one_input_store_its_rows_once(model: nn.Module, tmp_path: Path) -> None:
    found, path = calibrated(model), tmp_path / "a.calibration.safetensors"
    two = {name: replace(found.layers[name], group="blocks.0.up") for name in ("blocks.0.up", "blocks.1.up")}
    stored = {"blocks.0.up": found.sensitivities["blocks.0.up"], "blocks.1.up": found.sensitivities["blocks.0.up"]}
    rows = {"blocks.0.up": found.rows["blocks.0.up"]}
    calibration.save(Calibration(two, rows, found.info, stored), path)
    with safe_open(path, "pt") as file:
        assert [key for key in file.keys() if key.endswith("sens_inputs")] == ["blocks.0.up.sens_inputs"]
    assert equal(calibration.load(path).sensitivities["blocks.1.up"], stored["blocks.1.up"])


def test_merging_adds_the_points_of_both(model: nn.Module) -> None:
    a, b, matched = calibrated(model), calibrated(model, seed=1), calibrated(model, seed=2, estimator="matched")
    both, error = calibration.merge(a, b), small_error(model, LAYERS[0])
    apart = [sensitivity.damage(each.sensitivities[LAYERS[0]], error) for each in (a, b)]
    assert sensitivity.damage(both.sensitivities[LAYERS[0]], error) == pytest.approx(sum(apart) / 2, rel=0.1)
    assert both.info[calibration.POINTS] == ["point 0 of seed 0", "point 0 of seed 1"]
    mixed = calibration.merge(matched, a).sensitivities
    assert all(equal(mixed[name], a.sensitivities[name]) for name in LAYERS)
    twice = calibration.merge(matched, matched).sensitivities[LAYERS[0]]
    assert twice.gain == pytest.approx(matched.sensitivities[LAYERS[0]].gain)


@pytest.mark.parametrize(
    ("name", "damaged", "problem"),
    [
        ("sens_gradients", torch.zeros(31, 24, dtype=torch.bfloat16), "its sensitivity does not fit"),
        ("sens_gradients", torch.zeros(32, 23, dtype=torch.bfloat16), "its sensitivity does not fit"),
        ("sens_gradients", torch.full((32, 24), torch.nan, dtype=torch.bfloat16), "sens_gradients has NaN or Inf"),
        ("sens_sums", torch.zeros(2, 23, dtype=torch.bfloat16), "its sensitivity does not fit"),
        ("sens_sums", None, "sens_sums is missing"),
        ("sens_inputs", torch.zeros(32, 16), "sens_inputs is F32"),
        ("sens_inputs", None, "sens_inputs is missing"),
    ],
)
def test_a_damaged_sensitivity_names_its_layer(
    model: nn.Module, tmp_path: Path, name: str, damaged: torch.Tensor | None, problem: str
) -> None:
    path, key = tmp_path / "a.calibration.safetensors", f"blocks.0.up.{name}"
    calibration.save(calibrated(model), path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys() if k != key}, file.metadata()
    models.save(path, tensors if damaged is None else {**tensors, key: damaged}, metadata)
    with pytest.raises(CalibQuantError, match=rf"layer blocks\.0\.up: {problem}.*: calibrate again"):
        calibration.load(path)


# --- in ComfyUI

HOW = {"samples": 2, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "width": 64, "height": 64}
HOW |= {"frames": 1, "seed": 50, "estimator": "gradient", "points": 3, "probes": 2, "rows": 48, "seconds": 1}


@pytest.fixture(scope="module")
def pack(comfy: Path) -> dict[str, Any]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def demo(pack: dict[str, Any]) -> dict[str, Any]:
    """The demo model, its calibration and its prompts, as inputs of the node."""
    with torch.inference_mode():
        model = importlib.import_module("nodes").UNETLoader().load_unet(MODEL, "default")[0]
    found = execute(pack["CalibQuantLoadCalibration"], calibration_name="digits.calibration.safetensors").result[0]
    return {"model": model, "calibration": found, "conditioning": prompt_set(pack)}


def node_of(pack: dict[str, Any], **inputs: Any) -> Calibration:
    return execute(pack["CalibQuantSensitivity"], **inputs).result[0].current()


def untouched(model: Any) -> bool:
    management, modules = importlib.import_module("comfy.model_management"), model.model.diffusion_model.modules()
    return not management.in_training and hooks_on(model) == 0 and not any("forward" in vars(m) for m in modules)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_of_the_family_agree_with_matched_prediction(family: str, pack: dict[str, Any]) -> None:
    _, _, text, options, shape = FAMILIES[family]
    model, generator = tiny(family), torch.Generator().manual_seed(1)
    options = {k: torch.randn(v, generator=generator) if isinstance(v, tuple) else v for k, v in options.items()}
    positive, negative = ([[torch.randn(1, *text, generator=generator), options]] for _ in range(2))
    watched, handle = monitor(pack, model, f"sensitivity_{family}", rows=0)
    ksampler(watched, positive, negative, cfg=3.0, latent=torch.zeros(shape))
    how = {"model": model, "calibration": handle, "conditioning": positive, "negative": negative, **HOW, "cfg": 3.0}
    del how["estimator"]
    how |= {"samples": 1, "points": 4, "probes": 8, "rows": 2048, "seconds": 1000}
    by_gradient, matched = (node_of(pack, **how, estimator=each).sensitivities for each in probing.ESTIMATORS)
    assert by_gradient.keys() == matched.keys() == handle.current().layers.keys()
    modules, pairs = dict(model.model.diffusion_model.named_modules()), []
    for name, stored in matched.items():
        error = probing.rounding_error(modules[name].weight.detach().float().clone())
        pairs.append([sensitivity.damage(each, error) for each in (by_gradient[name], stored)])
        assert (by_gradient[name].gradients is None) == (stored.gain == 0), name  # only what has no effect
    assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9
    assert untouched(model)


def test_samples_stay_as_they_are(pack: dict[str, Any], demo: dict[str, Any]) -> None:
    visited, one = [], [[demo["conditioning"][3]["cond"], {}]]
    stopping = sys.modules[pack["CalibQuantSensitivity"].__module__].comfyui.stopping

    def visit(predict: Any, number: int) -> None:
        with torch.no_grad():
            visited.append((number, tuple(predict().shape)))

    watched = stopping(demo["model"], 3, visit)
    assert torch.equal(ksampler(watched, one, steps=4), ksampler(demo["model"], one, steps=4))
    assert visited == [(number, (1, 16, 1, 8, 8)) for number in range(3)]


def test_a_cancelled_measurement_goes_on_to_the_same_result(
    pack: dict[str, Any], demo: dict[str, Any], comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = node_of(pack, **demo, **HOW)
    assert len(whole.sensitivities) == LINEARS and max(len(s.inputs) for s in whole.sensitivities.values()) == 48
    module, ticks, told = sys.modules[pack["CalibQuantSensitivity"].__module__], itertools.count(), []
    interrupt = importlib.import_module("comfy.model_management").InterruptProcessingException

    def cancel_in_the_fifth_point() -> None:
        if next(ticks) == 4 * 2 * LINEARS + 7:
            raise interrupt

    with monkeypatch.context() as patched:
        patched.setattr(module.comfyui, "check_cancel", cancel_in_the_fifth_point)
        patched.setattr(module.feedback, "tell_kept", lambda _node, text: told.append(text))
        with pytest.raises(interrupt):
            node_of(pack, **demo, **HOW)
    assert untouched(demo["model"]) and told[0].startswith("4 points in output/calibrations/unfinished/")
    (path,) = (comfy / "output" / "calibrations" / "unfinished").glob("calibquant_digits*")
    part, held = calibration.load(path), path.read_bytes()
    assert part.info[calibration.POINTS] == [f"{i // 3} seed {50 + i // 3} point {i % 3 + 1} of 3" for i in range(4)]
    output = execute(pack["CalibQuantSensitivity"], **demo, **HOW)  # the same job goes on by itself, after a kill, too
    again = output.result[0].current()
    assert "6 points, 2 of them new" in output.ui.value and not path.exists()
    assert again.info[calibration.POINTS] == whole.info[calibration.POINTS]
    assert all(equal(stored, again.sensitivities[name]) for name, stored in whole.sensitivities.items())
    path.write_bytes(held[:-1])  # damaged: measured anew
    assert all(equal(s, whole.sensitivities[n]) for n, s in node_of(pack, **demo, **HOW).sensitivities.items())
    for _ in range(2):  # the second time nothing is left to do
        part = node_of(pack, **{**demo, "calibration": SimpleNamespace(current=lambda held=part: held)}, **HOW)
        assert part.info[calibration.POINTS] == whole.info[calibration.POINTS]
        assert all(equal(stored, part.sensitivities[name]) for name, stored in whole.sensitivities.items())


def test_what_does_not_belong_together_is_refused(pack: dict[str, Any], demo: dict[str, Any], tmp_path: Path) -> None:
    with Source(DEMO) as source:
        jobs.quantize(source, recipes.make_plan(source, "fp8"), tmp_path / "q.safetensors")
    with torch.inference_mode():
        quantized = importlib.import_module("comfy.sd").load_diffusion_model(str(tmp_path / "q.safetensors"))
    with pytest.raises(Exception, match="the linked MODEL is quantized: load the 16-bit model"):
        node_of(pack, **{**demo, "model": quantized}, **HOW)
    found = demo["calibration"].current()
    other = replace(found, info={**found.info, "source_file": "other.safetensors", "source_fingerprint": "f"})
    with pytest.raises(Exception, match=r"is of another model \(other\.safetensors\): link the model"):
        node_of(pack, **{**demo, "calibration": SimpleNamespace(current=lambda: other)}, **HOW)
    with pytest.raises(Exception, match="the calibration is empty: "):
        node_of(pack, **{**demo, "calibration": SimpleNamespace(current=Calibration)}, **HOW)
