"""Searched scales, GPTQ and the choice between them: never worse than nearest, and much better where inputs allow."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace

import comfy_kitchen as ck
import models
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import correlated

from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.evidence.collector import Collector
from quant_core.formats import FORMATS, turn
from quant_core.rounding import gptq, pack
from quant_core.rounding.choice import Rounded, Rounder
from quant_core.rounding.judge import as_loaded
from quant_core.rounding.layerplan import LayerPlan

CPU = torch.device("cpu")
QUANTIZING = [name for name in FORMATS if name != "float8_e4m3fn_unscaled"]


def weights(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def turned(name: str, x: torch.Tensor) -> torch.Tensor:
    """In the format's own basis, in which importance and Hessian are wanted."""
    return turn(x, FORMATS[name].rotation(x.shape[1]))


def output_error(fmt: str, packed: pack.Packed, weight: torch.Tensor, x: torch.Tensor) -> float:
    decoded = FORMATS[fmt].decode(packed.tensors, tuple(weight.shape))
    return (((x @ decoded.T) - (x @ weight.T)).square().sum() / (x @ weight.T).square().sum()).item()


def calibrated(weight: torch.Tensor, x: torch.Tensor, rows: int = 2048) -> calibration.Calibration:
    collector = Collector(lambda layer: "", rows)
    collector.start_run("run")
    collector.add("layer", x, x @ weight.T)
    collector.finish_run()
    return collector.result()


@given(
    name=st.sampled_from(QUANTIZING),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    tails=st.sampled_from([1.0, 3.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(name="float8_e4m3fn", rows=3, blocks=4, tails=3.0, weighted=True, seed=3)  # float32 weights, FP8's histogram
@settings(max_examples=80, deadline=None)
def test_a_searched_scale_is_never_worse_than_nearest(
    name: str, rows: int, blocks: int, tails: float, weighted: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (32 * rows, 32 * blocks)
    weight = torch.randn(shape, generator=generator).abs() ** tails * torch.randn(shape, generator=generator).sign()
    importance = torch.rand(shape[1], generator=generator) if weighted else torch.ones(shape[1])
    fmt = FORMATS[name]

    def cost(packed: pack.Packed) -> float:
        difference = turned(name, fmt.decode(packed.tensors, shape) - weight).double()
        return (difference.square() * importance).sum().item()

    nearest = cost(pack.nearest(weight, fmt, CPU, "w"))
    searched = cost(pack.searched(weight, fmt, CPU, "w", importance if weighted else None))
    assert searched <= nearest * (1 + 1e-5)


@pytest.mark.parametrize("name", QUANTIZING)
def test_a_zero_weight_stays_zero_under_every_rounding(name: str) -> None:
    weight, x = torch.zeros(64, 64), correlated(256, 64, 1)
    fmt = FORMATS[name]
    for packed in (
        pack.searched(weight, fmt, CPU, "w"),
        pack.by_gptq(weight, fmt, CPU, "w", gptq.factor(turned(name, x))),
    ):
        assert torch.equal(fmt.decode(packed.tensors, (64, 64)), weight)


@pytest.mark.parametrize(
    ("name", "search", "feedback"),  # measured 0.58 / 0.05, 1 / 0.08, .99 / 0.09, 1 / 0.07
    [
        *(("nvfp4", 0.65, 0.25), ("mxfp8", 1.001, 0.25), ("float8_e4m3fn", 1.02, 0.25), ("int8_tensorwise", 1.6, 0.25)),
        *(("int8_convrot", 1.0, 0.25), ("asym_w4a8_int8", 1.0, 0.25), ("asym_w6a8_int8", 1.0, 0.25)),
    ],
)
def test_held_out_output_error_falls(name: str, search: float, feedback: float) -> None:
    weight, seen, held_out = weights(512, 1024), correlated(2048, 1024, 1), correlated(512, 1024, 2)
    fmt, inputs = FORMATS[name], turned(name, seen)
    importance = inputs.square().mean(0)
    nearest = output_error(name, pack.nearest(weight, fmt, CPU, "w"), weight, held_out)
    searched = output_error(name, pack.searched(weight, fmt, CPU, "w", importance), weight, held_out)
    compensated = output_error(name, pack.by_gptq(weight, fmt, CPU, "w", gptq.factor(inputs)), weight, held_out)
    assert searched <= search * nearest
    assert compensated <= feedback * nearest
    assert compensated < searched


@pytest.mark.parametrize(  # measured .03, .13, .51; the rest is what the inputs lose in INT8
    ("name", "bound"), [("asym_w4a8_int8", 0.06), ("asym_w6a8_int8", 0.25), ("int8_convrot", 0.75)]
)
def test_rotated_formats_gain_as_the_loader_runs_them(name: str, bound: float) -> None:
    weight, x = weights(256, 512), correlated(512, 512, 1)
    sampled = x.bfloat16().float()
    wanted = sampled.double().numpy() @ weight.double().numpy().T
    fed, errors = reference.fed_int8(sampled.numpy(), 256), {}
    for way in ("nearest", "search", "gptq"):
        done = rounded(weight, x, LayerPlan(name, ""), way=way)
        packed = pack.nearest(weight, FORMATS[name], CPU, "w") if way == "nearest" else done.packed
        got = fed @ reference.decode(name, packed.tensors, (256, 512)).T
        errors[way] = ((got - wanted) ** 2).sum() / (wanted**2).sum()
        assert way == "nearest" or done.loader_error == pytest.approx(errors[way], rel=0.02)
    assert errors["gptq"] < bound * errors["nearest"]
    assert errors["gptq"] < errors["search"] <= errors["nearest"] * 1.001


def by_energy(energy: list[float]) -> list[int]:
    """Columns by falling energy; blocks of 32, their halves and the columns of a half are sorted each on their own."""

    def total(columns: list[int]) -> float:
        return -sum(energy[i] for i in columns)

    blocks = sorted(([*range(i, i + 32)] for i in range(0, len(energy), 32)), key=total)
    halves = [half for block in blocks for half in sorted((block[:16], block[16:]), key=total)]
    return [i for half in halves for i in sorted(half, key=lambda i: -energy[i])]


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8_convrot", "asym_w4a8_int8", "asym_w6a8_int8"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("passes", "rows"), [(0, 768), (2, 768), (2, 96)])  # 96: fewer than columns
def test_gptq_equals_a_column_by_column_reference(
    passes: int, rows: int, centered: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The textbook loops in float64 (explicit inverse, no Cholesky, no blocks), scales fixed."""
    monkeypatch.setattr(gptq, "PASSES", passes)
    fmt, size = FORMATS[name], 64 if name in reference.ROTATED else 0
    weight, x = weights(8, 192).double(), (correlated(rows, 192, 3) + 0.5).bfloat16().double()
    if size:
        weight, x = (torch.tensor(reference.turn(part.numpy(), size)).float().double() for part in (weight, x))
    mean, tensor = x.float().mean(0), fmt.tensor(weight.float(), weight.abs().max().float())
    if name.startswith("asym"):  # one E4M3 scale for all groups, so that nothing has to be searched
        group = 112.0 if tensor is not None else 3.5
        monkeypatch.setattr(
            type(fmt), "choose", lambda _, blocks, *__: torch.full(blocks.shape[:2], group).to(torch.float8_e4m3fn)
        )
        table = torch.arange(-31.0, 32) if tensor is None else tensor
        unit = fmt.frame(weight.float(), tensor).rows.double().squeeze(1)
        levels = (table * group).round().clamp(-127, 127).double()
    step = weight.abs().amax(1) / 127
    if name == "int8_convrot":
        monkeypatch.setattr(type(fmt), "choose", lambda *_: step.float().unsqueeze(1))
    inputs = gptq.factor(x.float(), mean if centered else None)
    got = fmt.dequantize(gptq.quantize(weight.float(), fmt, tensor, inputs), (8, 192))

    def rounded(column: torch.Tensor) -> torch.Tensor:
        if name == "float8_e4m3fn":
            return ((column.float() / tensor).clamp(-448, 448).to(torch.float8_e4m3fn).float() * tensor).double()
        if name == "int8_convrot":
            return (column / step).round().clamp(-128, 127) * step
        return levels[((column / unit).unsqueeze(1) - levels).abs().argmin(1)] * unit

    samples = x - mean.double() if centered else x
    hessian = samples.T @ samples / len(x)
    damping = max(0.01, 0.03 * (192 / rows) ** 0.5)  # as documented
    hessian += torch.eye(192, dtype=torch.float64) * damping * hessian.diagonal().mean()
    inverse, left, wanted = torch.linalg.inv(hessian), weight.clone(), torch.empty_like(weight)
    order = by_energy(samples.square().mean(0).tolist())
    for i in order:
        wanted[:, i] = rounded(left[:, i])
        left -= torch.outer((left[:, i] - wanted[:, i]) / inverse[i, i], inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    for i in passes * order:
        others = (weight - wanted) @ hessian[:, i] / hessian[i, i]
        wanted[:, i] = rounded(wanted[:, i] + others)
    same = ((got - wanted).abs() <= 1e-6 * wanted.abs()).float().mean().item()
    assert same > 0.97  # a code may flip where float32 and float64 disagree about the middle
    outputs = samples @ (weight - wanted).T
    assert (samples @ (got.double() - wanted).T).norm() < 0.1 * outputs.norm()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.randn(8, 32), "8 distinct rows"),
        (torch.randn(8, 32).repeat(100, 1), "8 distinct rows"),  # a prompt's tokens, seen at every step
        (torch.zeros(128, 32), "1 distinct rows"),
        (torch.randn(128, 32).index_fill(1, torch.tensor(3), math.nan), "not finite"),
    ],
)
def test_gptq_says_why_it_cannot(rows: torch.Tensor, reason: str) -> None:
    assert reason in str(gptq.factor(rows))


def test_gptq_says_so_when_the_hessian_is_not_positive_definite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "damping", lambda distinct, width: -2.0)
    assert gptq.factor(correlated(256, 32, 1)) == "the Hessian of the sampled inputs is not positive definite"


def test_gptq_takes_more_damping_when_the_hessian_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    few = correlated(64, 256, 1)  # rank 64 of 256: only damping makes it positive definite, and float32 loses 1e-8
    assert gptq.factor(few).note == ""
    monkeypatch.setattr(gptq, "damping", lambda distinct, width: 1e-8)
    assert gptq.factor(few).note == "GPTQ took 100 times the damping (1e-06 of the mean diagonal)"


@pytest.mark.parametrize("exponent", [-80, 75, 118])  # squares of the weights leave float32 from 2**-70 and 2**64
@pytest.mark.parametrize("name", QUANTIZING)
def test_errors_of_tiny_and_huge_weights_are_those_of_float64(name: str, exponent: int) -> None:
    weight, x = torch.ldexp(weights(64, 64), torch.tensor(exponent)), correlated(256, 64, 1)
    done = Rounder(CPU, calibrated(weights(64, 64), x), "auto").round("layer", LayerPlan(name, ""), weight, "w")
    assert done.rounding == "gptq"
    wanted, difference = weight.double(), FORMATS[name].decode(done.packed.tensors, (64, 64)).double() - weight.double()
    assert done.packed.error / done.packed.energy == pytest.approx(
        (difference.square().sum() / wanted.square().sum()).item(), rel=1e-5
    )
    inputs = x.bfloat16().double()
    relative = (inputs @ difference.T).square().sum() / (inputs @ wanted.T).square().sum()
    assert done.output_errors["gptq"] == pytest.approx(relative.item(), rel=1e-2)


@pytest.mark.parametrize("rounding", ["nearest", "auto"])
def test_weights_too_large_for_any_format_are_refused(rounding: str) -> None:
    weight = weights(64, 64).index_fill(1, torch.tensor([3]), 3e38)
    with pytest.raises(CalibQuantError, match=r"layer L: weights up to 3e\+38 are too large"):
        Rounder(CPU, None, rounding).round("L", LayerPlan("nvfp4", ""), weight, "layer L")


@pytest.mark.parametrize("factor", [2.0**100, 2.0**-100])
def test_the_scale_of_the_inputs_does_not_matter_to_gptq(factor: float) -> None:
    x = correlated(256, 64, 1)
    ordinary, scaled = gptq.factor(x), gptq.factor(x * factor)
    assert torch.equal(ordinary.gram.own(slice(64)), scaled.gram.own(slice(64)))
    assert torch.equal(ordinary.upper, scaled.upper)


def test_layers_that_share_an_input_share_its_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    factor = gptq.factor
    monkeypatch.setattr(gptq, "factor", lambda *inputs: made.append(inputs) or factor(*inputs))
    weight, x = weights(64, 64), correlated(256, 64, 1)
    collector = Collector(lambda layer: "attention" if layer in "qkv" else "")
    collector.start_run("run")
    for layer in "qkvo":
        collector.add(layer, x, x @ weight.T)
    collector.finish_run()
    rounder = Rounder(CPU, collector.result(), "gptq")
    for layer in "qkvo":
        assert rounder.round(layer, LayerPlan("nvfp4", ""), weight, "w").rounding == "gptq"
    assert len(made) == 2


def test_auto_takes_the_best_of_what_was_tried_and_reports_it() -> None:
    weight, x = weights(256, 256), correlated(1024, 256, 1)
    done = Rounder(CPU, calibrated(weight, x), "auto").round("layer", LayerPlan("nvfp4", ""), weight, "w")
    assert done.rounding == "gptq"
    assert done.output_errors["gptq"] < done.output_errors["search"] < done.output_errors["nearest"]
    sampled = x.bfloat16().float()
    nearest = pack.nearest(weight, FORMATS["nvfp4"], CPU, "w")
    assert done.output_errors["nearest"] == pytest.approx(output_error("nvfp4", nearest, weight, sampled), rel=0.1)
    assert done.loader_error > done.output_errors["gptq"]  # FP4 activations cost something


@pytest.mark.parametrize("runs", [1, 2, 6])
def test_gptq_is_judged_by_runs_that_it_was_not_fitted_to(runs: int) -> None:
    """Each run sees 8 directions of its own: what GPTQ makes of its own runs says nothing of another."""
    weight, collector = weights(64, 64), Collector(lambda layer: "", 2048)
    for seed in range(runs):
        collector.start_run(f"seed {seed}")
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(64, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
        collector.add("layer", x, x @ weight.T)
        collector.finish_run()
    found = collector.result()
    done = Rounder(CPU, found, "gptq").round("layer", LayerPlan("int8_tensorwise", ""), weight, "w")
    (held_out, count), rows = found.held_out("layer"), found.rows_of("layer")
    assert done.held_out == count == min(1, runs - 1)
    fitted = gptq.factor(rows[~held_out] if count else rows)
    trial = pack.by_gptq(weight, FORMATS["int8_tensorwise"], CPU, "w", fitted)
    judged = rows[held_out].float() if count else rows.float()
    true = output_error("int8_tensorwise", trial, weight, judged)
    assert done.output_errors["gptq"] == pytest.approx(true, rel=1e-3)


def test_a_winner_is_fitted_to_all_runs() -> None:
    weight, collector = weights(64, 64), Collector(lambda layer: "", 2048)
    for seed in range(5):
        collector.start_run(f"seed {seed}")
        collector.add("layer", correlated(64, 64, seed), torch.zeros(64, 64))
        collector.finish_run()
    found, fmt = collector.result(), FORMATS["nvfp4"]
    done = Rounder(CPU, found, "gptq").round("layer", LayerPlan("nvfp4", ""), weight, "w")
    whole = pack.by_gptq(weight, fmt, CPU, "w", gptq.factor(found.rows_of("layer")))
    assert done.rounding == "gptq" and done.held_out == 1
    assert torch.equal(whole.tensors["weight"], done.packed.tensors["weight"])


def test_only_some_outputs_of_a_large_layer_are_judged() -> None:
    weight, collector = weights(2048, 64), Collector(lambda layer: "", 2048)
    for seed in range(5):
        collector.start_run(f"seed {seed}")
        collector.add("layer", correlated(64, 64, seed), torch.zeros(64, 64))
        collector.finish_run()
    found, fmt = collector.result(), FORMATS["nvfp4"]
    done = Rounder(CPU, found, "gptq").round("layer", LayerPlan("nvfp4", ""), weight, "w")
    held_out, rows = found.held_out("layer")[0], found.rows_of("layer")
    every = pack.by_gptq(weight, fmt, CPU, "w", gptq.factor(rows[~held_out]))
    true = output_error("nvfp4", every, weight, rows[held_out].float())
    assert done.output_errors["gptq"] == pytest.approx(true, rel=0.05)


def test_too_few_rows_fall_back_to_search_with_the_reason() -> None:
    weight, x = weights(64, 64), correlated(300, 64, 1)
    done = Rounder(CPU, calibrated(weight, x, rows=16), "auto").round("layer", LayerPlan("nvfp4", ""), weight, "")
    assert done.rounding == "search"
    assert "too few" in done.note


def test_without_a_calibration_only_nvfp4_is_searched() -> None:
    weight = weights(64, 64)
    rounder = Rounder(CPU, None, "auto")
    assert rounder.round("layer", LayerPlan("nvfp4", ""), weight, "").rounding == "search"
    assert rounder.round("layer", LayerPlan("mxfp8", ""), weight, "").rounding == "nearest"
    with pytest.raises(CalibQuantError, match="rounding gptq needs a calibration"):
        Rounder(CPU, None, "gptq")


def test_the_loader_error_quantizes_inputs_as_the_loader_does() -> None:
    x = correlated(256, 64, 5)
    fmt, scale = FORMATS["nvfp4"], x.abs().max() / 2688
    fed = as_loaded(fmt, x, LayerPlan("nvfp4", "", input_scale=float(scale)))
    codes, blocks = ck.quantize_nvfp4(x, scale, pad_16x=True)
    assert torch.equal(fed, ck.dequantize_nvfp4(codes, scale, blocks, output_type=torch.float32)[:256, :64])
    assert as_loaded(fmt, x, LayerPlan("nvfp4", "", full_precision=True)) is x
    tiny = x * 1e-4  # FP8 activations at scale 1.0 lose small values: what a calibrated input_scale is for
    plain = as_loaded(FORMATS["float8_e4m3fn"], tiny, LayerPlan("float8_e4m3fn", ""))
    scaled = LayerPlan("float8_e4m3fn", "", input_scale=float(tiny.abs().max() / 448))
    with_scale = as_loaded(FORMATS["float8_e4m3fn"], tiny, scaled)
    assert (plain - tiny).norm() > 5 * (with_scale - tiny).norm()


# --- bias, smoothing, whole jobs


def rounded(
    weight: torch.Tensor, x: torch.Tensor, entry: LayerPlan, bias: torch.Tensor | None = None, way: str = "auto"
) -> Rounded:
    return Rounder(CPU, calibrated(weight, x), way).round("layer", entry, weight, "w", bias)


@given(
    name=st.sampled_from(QUANTIZING),
    rank=st.integers(1, 64),
    loud=st.floats(0.1, 50),
    rows=st.integers(40, 400),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_gptq_is_never_worse_than_search_on_its_own_rows(
    name: str, rank: int, loud: float, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, 64, generator=generator)
    x[:, 5] *= loud
    weight = torch.randn(64, 64, generator=generator) * 0.05
    done = rounded(weight, x, LayerPlan(name, ""), way="gptq")
    sampled = x.bfloat16().float()
    searched = pack.searched(weight, FORMATS[name], CPU, "w", x.square().mean(0))
    assert output_error(name, done.packed, weight, sampled) <= output_error(name, searched, weight, sampled) * 1.001


def test_the_bias_takes_up_the_mean_error() -> None:
    weight, x = weights(256, 256), correlated(2048, 256, 1) + 1.5
    bias = torch.randn(256, generator=torch.Generator().manual_seed(3)).bfloat16()
    held_out = correlated(512, 256, 2) + 1.5
    wanted = held_out @ weight.T + bias.float()
    errors = {}
    for given_bias in (None, bias):
        done = rounded(weight, x, LayerPlan("nvfp4", ""), given_bias, "search")
        decoded = FORMATS["nvfp4"].decode(done.packed.tensors, (256, 256))
        stored = bias if done.bias is None else done.bias
        errors[given_bias is not None] = (held_out @ decoded.T + stored.float() - wanted).square().sum().item()
    assert done.rounding == "search+bias" and done.bias.dtype == torch.bfloat16
    assert errors[True] < 0.9 * errors[False]
    shift = (done.bias.double() - bias.double()) - (weight.double() - decoded.double()) @ x.double().mean(0)
    assert shift.abs().max() < 2**-8 * bias.abs().max()  # E[x](W - Q)^T, to the bias's own precision
    with_gptq = rounded(weight, x, LayerPlan("nvfp4", ""), bias)
    assert list(with_gptq.output_errors) == ["nearest", "search", "search+bias", "gptq", "gptq+bias"]
    assert with_gptq.rounding == "gptq+bias"  # on the covariance, so that only with its bias it is any good
    assert with_gptq.output_errors["gptq+bias"] < 0.5 * with_gptq.output_errors["gptq"]


def test_nearest_leaves_the_bias_alone() -> None:
    weight, x = weights(64, 64), correlated(512, 64, 1) + 3
    assert rounded(weight, x, LayerPlan("nvfp4", ""), torch.zeros(64), "nearest").bias is None


@pytest.mark.parametrize("with_bias", [False, True])
def test_smoothed_inputs_cost_less_as_the_loader_runs_them(with_bias: bool) -> None:
    apart = torch.arange(256).view(8, 32).T.reshape(-1)  # a loud channel in every other block
    weight, x, held_out = weights(256, 256), correlated(2048, 256, 1)[:, apart], correlated(512, 256, 2)[:, apart]
    bias = torch.zeros(256) if with_bias else None
    entry = LayerPlan("nvfp4", "", input_scale=float(x.abs().max() / 2688))
    errors = {}
    for smooth in (False, True):
        done = rounded(weight, x, replace(entry, pre_quant_scale=smooth), bias)
        scale = done.extra["pre_quant_scale"].float() if smooth else torch.ones(256)
        stored = float(done.extra["input_scale"]) if smooth else entry.input_scale
        fed = held_out * scale  # what a newer core does first
        codes, blocks = ck.quantize_nvfp4(fed, torch.tensor(stored), pad_16x=True)
        fed = ck.dequantize_nvfp4(codes, torch.tensor(stored), blocks, output_type=torch.float32)[:512, :256]
        got = fed @ FORMATS["nvfp4"].decode(done.packed.tensors, (256, 256)).T
        got = got if done.bias is None else got + done.bias
        wanted = held_out @ weight.T
        errors[smooth] = ((got - wanted).square().sum() / wanted.square().sum()).item()
    assert errors[True] < 0.7 * errors[False]
    assert done.extra["pre_quant_scale"].dtype == torch.bfloat16
    assert float((x * scale).abs().max() / 2688) == pytest.approx(stored, rel=1e-2)
    assert done.loader_error == pytest.approx(errors[True], rel=0.2)


def test_smoothing_needs_inputs() -> None:
    with pytest.raises(CalibQuantError, match="layer L: pre_quant_scale needs a calibration"):
        Rounder(CPU, None, "auto").round("L", LayerPlan("nvfp4", "", pre_quant_scale=True), weights(64, 64), "layer L")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", QUANTIZING)
def test_gptq_on_cuda_repeats_itself_and_is_as_good_as_on_the_cpu(name: str) -> None:
    weight, seen, held_out = weights(256, 512), correlated(2048, 512, 1).bfloat16(), correlated(512, 512, 2)
    packed = {}
    for device in ("cpu", "cuda", "cuda"):
        inputs = gptq.factor(seen.to(device))
        before = packed.get(device)
        packed[device] = pack.by_gptq(weight, FORMATS[name], torch.device(device), "w", inputs)
        assert before is None or torch.equal(before.tensors["weight"], packed[device].tensors["weight"])
    errors = {device: output_error(name, made, weight, held_out) for device, made in packed.items()}
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.05)


@pytest.mark.parametrize(("rows", "bound"), [(3072, 5.5), (256, 2.5)])
def test_memory_is_bounded_by_the_width(rows: int, bound: float) -> None:
    """Peak memory of a whole process, in matrices of the width squared: U, and with many rows H and two on the way."""
    code = """
import resource, sys, torch
from quant_core.rounding import gptq, pack
from quant_core.formats import FORMATS
width = int(sys.argv[1])
torch.manual_seed(0)
torch.randn(64, 64) @ torch.randn(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = torch.randn(int(sys.argv[2]), width).bfloat16()
packed = pack.by_gptq(torch.randn(32, width) * .02, FORMATS["nvfp4"], torch.device("cpu"), "w", gptq.factor(rows))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * width**2))
assert packed.error < .1 * packed.energy
"""
    done = subprocess.run(models.python(code, 3072, rows), cwd=models.ROOT, check=True, capture_output=True, text=True)
    assert float(done.stdout) < bound
