"""The storage formats: the same bits as comfy-kitchen, and the values that an independent decoder reads."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import comfy_kitchen as ck
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quant_core.errors import CalibQuantError
from quant_core.formats import FORMATS, FileTensors, Format, turn
from quant_core.formats.base import power_of_two_at_least
from quant_core.formats.nvfp4 import e2m1_value, round_e2m1, snap_e2m1
from quant_core.rounding import pack
from quant_core.rounding.parallel import threads

ROTATED_FORMATS = pytest.mark.parametrize("fmt", [FORMATS[n] for n in reference.ROTATED], ids=reference.ROTATED)
EVERY_FORMAT = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
CPU = torch.device("cpu")
EXAMPLES = settings(max_examples=60, deadline=None)


# --- random weights


def draw_values(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return {
        "gaussian": lambda: rng.standard_normal(shape),
        "heavy tails": lambda: rng.standard_t(2, shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "few values": lambda: rng.integers(-6, 7, shape) / 4,  # ties
        "lognormal": lambda: rng.lognormal(0, 4, shape) * rng.choice([-1, 1], shape),
        "constant": lambda: np.full(shape, -1.0),
    }[kind]()


@st.composite
def weights(draw: st.DrawFn, smallest: int = -44) -> torch.Tensor:
    """float32 [1…200, 1…512] around 10**smallest … 1e36; some have zero rows or zero blocks."""
    shape = draw(st.integers(1, 200)), draw(st.one_of(st.integers(1, 150), st.sampled_from([64, 192, 256, 512])))
    kinds = ["gaussian", "heavy tails", "uniform", "few values", "lognormal", "constant"]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = draw_values(draw(st.sampled_from(kinds)), rng, shape) * 10.0 ** draw(st.integers(smallest, 36))
    if draw(st.booleans()):
        weight[rng.random(shape[0]) < 0.3] = 0
    if draw(st.booleans()):
        weight[:, : 32 * draw(st.integers(1, 4))] = 0
    return torch.tensor(weight.clip(-3e38, 3e38), dtype=torch.float32)


def fitting(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    """With as many columns as a rotated format takes; others pad by themselves."""
    return F.pad(weight, (0, -weight.shape[1] % 32)) if fmt.name in reference.ROTATED else weight


def own_basis(fmt: Format, weight: torch.Tensor) -> torch.Tensor:
    return turn(weight, fmt.rotation(weight.shape[1]))


def encode(fmt: Format, weight: torch.Tensor, tensor_scale: torch.Tensor | None) -> FileTensors:
    return fmt.pack(fmt.quantize(own_basis(fmt, weight.clone()), tensor_scale))


def nearest_scale(fmt: Format, weight: torch.Tensor) -> torch.Tensor | None:
    weight = own_basis(fmt, weight)
    return fmt.tensor(weight, weight.abs().amax())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


# --- parity with comfy-kitchen


def eager(fmt: str, weight: torch.Tensor, scale: torch.Tensor | None) -> FileTensors:
    """What comfy-kitchen's eager backend makes of a weight."""
    with ck.use_backend("eager"):
        if fmt == "nvfp4":
            data, block_scale = ck.quantize_nvfp4(weight, scale, pad_16x=True)
            return {"weight": data, "weight_scale": block_scale}
        if fmt == "mxfp8":
            data, block_scale = ck.quantize_mxfp8(weight, pad_32x=True)
            return {"weight": data, "weight_scale": block_scale}
        if fmt == "int8_tensorwise":
            data, row_scale = ck.quantize_int8_rowwise(weight)
            return {"weight": data, "weight_scale": row_scale.view(-1, 1)}
        return {"weight": ck.quantize_per_tensor_fp8(weight, scale)}


@pytest.mark.core  # comfy-kitchen comes with it
@EVERY_FORMAT
@EXAMPLES
@given(weight=weights(-20), stretch=st.floats(0.25, 3, width=32))  # MXFP8 below 3e-36: our codes are 0, theirs 448
def test_rounding_to_nearest_gives_the_bits_of_comfy_kitchen(fmt: Format, weight: torch.Tensor, stretch: float) -> None:
    if fmt.name in reference.ROTATED:
        pytest.skip("below")
    scale = nearest_scale(fmt, weight)
    if scale is not None:
        # comfy-kitchen makes NaN of an all-zero tensor: that case is ours alone
        scale = torch.where(scale == 0, 1.0, scale * stretch)
    ours = encode(fmt, weight, scale)
    for name, expected in eager(fmt.name, weight, scale).items():
        assert same_bits(ours[name], expected), name


def rotated_by_kitchen(fmt: Format, weight: torch.Tensor) -> FileTensors:
    """What the installed comfy-kitchen makes of a weight in a rotated format; skips where it has no such format."""
    size = fmt.rotation(weight.shape[1])
    with ck.use_backend("eager"):
        if fmt.name == "int8_convrot":
            arguments = {"weight": weight, "group_size": size}
            rotating = ck.registry.get_implementation("quantize_int8_convrot_weight", kwargs=arguments)
            data, scale = rotating(**arguments)
            return {"weight": data, "weight_scale": scale.view(-1, 1)}
        w4a8 = pytest.importorskip("comfy_kitchen.tensor.w4a8_int8")
        bits = {"bits": 6} if fmt.name == "asym_w6a8_int8" else {}
        if bits.keys() - inspect.signature(w4a8.quantize_w4a8_int8_weight).parameters.keys():
            pytest.skip("this comfy-kitchen has no 6-bit codes")
        data, groups, rows, _, table = w4a8.quantize_w4a8_int8_weight(weight, convrot_groupsize=size, **bits)
    made = {"weight": data, "weight_s_rel": groups.view(torch.uint8), "weight_s_channel": rows}
    return made if table is None else made | {"weight_codebook": table}


@pytest.mark.core
@ROTATED_FORMATS
@EXAMPLES
@given(weight=weights(-1))
def test_rotated_formats_give_the_bits_of_comfy_kitchen(fmt: Format, weight: torch.Tensor) -> None:
    weight = fitting(fmt, weight)
    top = own_basis(fmt, weight).abs().amax(1)
    weight[(top < 2.0**-9) | (top > 2.0**59)] = 0  # theirs lose sums of squares there, ours do not
    ours = pack.nearest(weight, fmt, CPU, "f: layer l").tensors
    with threads(1) as one:  # a matrix product's last bit depends on how many threads it is shared among
        theirs = one.submit(rotated_by_kitchen, fmt, weight).result()
    table = theirs.get("weight_codebook", torch.zeros(1))
    if (table.diff() < 0).any():  # fitted to many zeros: theirs searches it as if it were ascending, ours is
        errors = [reference.relative_error(weight, reference.decode(fmt.name, t, weight.shape)) for t in (ours, theirs)]
        assert errors[0] <= errors[1] * 1.02
        return
    for name, expected in theirs.items():
        assert same_bits(ours[name], expected), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@EVERY_FORMAT
@pytest.mark.parametrize("shape", [(128, 128), (96, 1376), (3840, 256)])
def test_the_cuda_kernels_give_the_bits_of_the_cpu(fmt: Format, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    on_cpu, on_gpu = (pack.nearest(weight, fmt, torch.device(d), "f: layer l") for d in ("cpu", "cuda"))
    for name, expected in on_cpu.tensors.items():
        assert same_bits(on_gpu.tensors[name], expected), name
    assert on_gpu.error == pytest.approx(on_cpu.error, rel=1e-4)


# --- values


@EVERY_FORMAT
@EXAMPLES
@given(weight=weights())
def test_three_decoders_agree(fmt: Format, weight: torch.Tensor) -> None:
    weight = fitting(fmt, weight)
    assume(weight.abs().max() < pack.LARGEST or fmt.name not in reference.ROTATED)  # such are refused by name
    scale, shape = nearest_scale(fmt, weight), tuple(weight.shape)
    codes = fmt.quantize(own_basis(fmt, weight), scale)
    tensors = fmt.pack(codes)
    expected = torch.tensor(reference.decode_rotated(fmt.name, tensors, shape), dtype=torch.float32)
    assert torch.equal(fmt.dequantize(codes, shape), expected)
    decoded = fmt.decode(tensors, shape)
    if fmt.name not in reference.ROTATED:
        assert torch.equal(decoded, expected)
        return
    exact = torch.tensor(reference.decode(fmt.name, tensors, shape))  # the rotation of theirs and ours is in float32
    size = fmt.rotation(shape[1])
    assert (decoded - exact).abs().amax() <= 1e-5 * size**0.5 * expected.abs().amax() + 1e-43


# Largest |w - q| / max|w| in the format's own basis. NVFP4: half the step from 4 to 6, and 1/16 for the E4M3 scale.
# FP8: half a step of 32 in 448; in MXFP8, whose scales are powers of two, only 256 of the 448 may be used. W6A8: half
# a step of 31, 1/16 for the E4M3 scale, half an INT8 step.
WORST = {"nvfp4": 1 / 6 + 1 / 16, "mxfp8": 1 / 16, "float8_e4m3fn": 1 / 28, "int8_tensorwise": 1 / 254}
WORST |= {"int8_convrot": 1 / 254, "asym_w6a8_int8": 1 / 62 + 1 / 16 + 1 / 254, "asym_w4a8_int8": 0.25}


@pytest.mark.parametrize("name", WORST)
@EXAMPLES
@given(weight=weights())
def test_no_weight_is_further_off_than_the_format_allows(name: str, weight: torch.Tensor) -> None:
    fmt = FORMATS[name]
    weight = own_basis(fmt, fitting(fmt, weight))
    codes = fmt.quantize(weight, fmt.tensor(weight, weight.abs().amax()))
    distance = (fmt.dequantize(codes, tuple(weight.shape)) - weight).double().abs().max()
    assert distance <= weight.double().abs().max() * WORST[name] * 1.0001 + 1e-29  # below: scales end at 2**-126


@EVERY_FORMAT
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (33, 65), (130, 300)])
@pytest.mark.parametrize("zero", ["tensor", "rows", "columns"])
def test_zero_stays_exactly_zero(fmt: Format, shape: tuple[int, int], zero: str) -> None:
    if fmt.name in reference.ROTATED:
        shape = {1: (1, 32), 32: (16, 96), 65: (33, 128), 300: (130, 512)}[shape[1]]  # halves are whole blocks
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(shape, dtype=torch.bool)
    if zero == "rows":
        mask[shape[0] // 2 :] = False
    elif zero == "columns":
        mask[:, shape[1] // 2 :] = False
    weight[mask] = 0
    packed = pack.nearest(weight, fmt, CPU, "f: layer l")
    decoded = reference.decode(fmt.name, packed.tensors, shape)
    assert (decoded[mask.numpy()] == 0).all() and np.isfinite(decoded).all()
    assert math.isfinite(packed.error) and packed.error <= packed.energy


@EVERY_FORMAT
@given(shape=st.tuples(st.integers(1, 300), st.integers(1, 300)))
@settings(max_examples=30, deadline=None)
def test_the_layout_foretells_every_tensor(fmt: Format, shape: tuple[int, int]) -> None:
    weight = fitting(fmt, torch.ones(shape))
    shape = tuple(weight.shape)
    tensors = encode(fmt, weight, nearest_scale(fmt, weight))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == fmt.layout(shape)
    assert {n: t.dtype for n, t in fmt.kernel(weight, nearest_scale(fmt, weight)).items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("name", "shape", "obstacle"),
    [
        ("nvfp4", (24, 64), "24x64 does not divide"),
        ("nvfp4", (32, 48), "32x48 does not divide"),
        ("nvfp4", (16, 32), ""),
        ("mxfp8", (48, 32), "48x32 does not divide"),
        ("mxfp8", (32, 32), ""),
        ("int8_tensorwise", (3, 5), ""),
        ("float8_e4m3fn", (3, 5, 1, 1), "only 2-D"),
        ("float8_e4m3fn_unscaled", (3, 5, 1, 1), ""),
        ("int8_tensorwise", (0, 5), "empty"),
        *((name, (1, 24), "24 columns do not divide by 16") for name in reference.ROTATED),
        *((name, (1, 32), "") for name in reference.ROTATED),
        ("asym_w4a8_int8", (1, 48), ""),
        ("asym_w6a8_int8", (1, 48), "48 columns do not divide by 32"),
        ("asym_w4a8_int8", (3, 5, 1, 1), "only 2-D"),
        ("asym_w6a8_int8", (0, 32), "empty"),
        ("float8_e4m3fn_unscaled", (0, 5), "empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], obstacle: str) -> None:
    found = FORMATS[name].obstacle(shape)
    assert (obstacle in found) if obstacle else found == ""


# --- small parts


@given(st.one_of(st.floats(-8, 8, width=32), st.integers(-32, 32).map(lambda n: n / 4)))
@settings(max_examples=400, deadline=None)
def test_e2m1_rounds_to_the_nearest_and_ties_to_even(x: float) -> None:
    grid = reference.E2M1[:8]
    distance = np.abs(grid - abs(x))
    nearest = [code for code in range(8) if distance[code] == distance.min()]
    expected = next(code for code in nearest if len(nearest) == 1 or code % 2 == 0)
    code = round_e2m1(torch.tensor([x])).item()
    assert code == expected + 8 * (math.copysign(1, x) < 0)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.integers(-64, 64).map(lambda n: n / 8))
@settings(max_examples=400, deadline=None)
def test_snapping_to_e2m1_gives_the_bits_of_rounding_to_it(x: float) -> None:
    around = torch.tensor([x]).nextafter(torch.tensor([-math.inf, x, math.inf]))
    assert same_bits(snap_e2m1(around), e2m1_value(round_e2m1(around)))


def test_e2m1_codes_have_the_values_of_the_table() -> None:
    assert e2m1_value(torch.arange(16, dtype=torch.uint8)).tolist() == reference.E2M1.tolist()


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_power_of_two_at_least(x: float) -> None:
    power = power_of_two_at_least(torch.tensor(x)).item()
    assert power / 2 < x <= power
    assert math.frexp(power)[0] == 0.5


def test_a_scale_of_zero_stays_zero_and_the_smallest_is_normal() -> None:
    assert power_of_two_at_least(torch.tensor([0.0, 1e-45])).tolist() == [0.0, 2.0**-126]


# --- chunks


@pytest.fixture(params=[1, 700, 5000], ids=lambda n: f"chunks of {n}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(pack, "CHUNK", request.param)
    return request.param


@EVERY_FORMAT
@pytest.mark.parametrize("shape", [(64, 64), (96, 160), (160, 32), (5, 768)])
def test_chunks_of_rows_change_nothing(fmt: Format, shape: tuple[int, int], chunk: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    packed = pack.nearest(weight, fmt, CPU, "f: layer l")
    for name, expected in encode(fmt, weight, nearest_scale(fmt, weight)).items():
        assert same_bits(packed.tensors[name], expected), name
    decoded = reference.decode(fmt.name, packed.tensors, shape)
    assert packed.error / packed.energy == pytest.approx(reference.relative_error(weight, decoded), rel=1e-5)


@EVERY_FORMAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_rounded_as_its_float32_value(fmt: Format, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    direct, widened = (pack.nearest(w, fmt, CPU, "f: layer l").tensors for w in (weight, weight.float()))
    assert all(same_bits(direct[name], widened[name]) for name in widened)


# --- bad input


@ROTATED_FORMATS
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, "the weight has 1 NaN value"),
        (math.inf, "the weight has 1 Inf value"),
        (3e38, r"weights up to 3e\+38 are too large"),
    ],
)
@pytest.mark.parametrize("rounding", [pack.nearest, pack.searched])
def test_weights_that_cannot_be_rounded_are_named(
    fmt: Format, bad: float, message: str, rounding: Callable[..., Any]
) -> None:
    weight = torch.ones(4, 64)
    weight[2, 7:9] = torch.tensor([bad, bad if bad == 3e38 else 1.0])  # two of them: their rotated sum is Inf
    with pytest.raises(CalibQuantError, match=f"f: layer l: {message}"):
        rounding(weight, fmt, CPU, "f: layer l")


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-8, 1.0, 1e19, 1e30, 1e35])
@pytest.mark.parametrize("shape", [(1, 32), (7, 512)])
def test_the_size_of_weights_does_not_matter(name: str, size: float, shape: tuple[int, int]) -> None:
    ones = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    fmt, weight = FORMATS[name], ones * size
    packed = pack.nearest(weight, fmt, CPU, "f: layer l")
    wanted, decoded = weight.double().numpy(), reference.decode(name, packed.tensors, shape)
    assert np.isfinite(decoded).all()
    assert packed.error <= packed.energy
    if size > 1e-29:
        assert reference.relative_error(weight, decoded) < 0.02, np.abs(wanted).max()
