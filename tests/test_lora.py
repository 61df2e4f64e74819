"""LoRA files: what puts rounding errors back, which loaders take it, and several in one."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from comfy_classes import CASES, Built
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core import cli, jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.evidence.collector import Collector
from quant_core.jobs.finished import QuantizedFile
from quant_core.models import lora
from quant_core.models.architectures import detect
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.rounding import factors

LAYER = "layers.1.feed_forward.w2"  # [64, 128]


# --- the mathematics, against numpy in float64


def test_the_largest_part_is_the_svds() -> None:
    matrix = torch.randn(96, 160, generator=torch.Generator().manual_seed(1)) @ torch.diag(torch.linspace(2, 0.1, 160))
    up, down = factors.largest_part(matrix, 12)
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert (matrix - up @ down).square().sum().item() == pytest.approx((values[12:] ** 2).sum(), rel=0.005)
    assert torch.equal(factors.largest_part(matrix, 12)[0], up)


@pytest.mark.parametrize("rows, width", [(200, 24), (40, 160)])
def test_fitted_factors_are_the_reduced_rank_ridge_regression(rows: int, width: int) -> None:
    x = models.correlated(rows, 160, 3)[:, :width]
    y = x @ torch.randn(width, 30, generator=torch.Generator().manual_seed(4)) + models.correlated(rows, 160, 5)[:, :30]
    inputs = factors.Inputs.of(x)
    up, down = factors.fitted(inputs, y, 5, ridge=0.1)

    wide, missing = x.double().numpy(), y.double().numpy()
    squares = np.linalg.eigvalsh(wide @ wide.T if width > rows else wide.T @ wide)
    penalty = 0.1 * squares.mean()
    full = np.linalg.solve(wide.T @ wide + penalty * np.eye(width), wide.T @ missing)  # [in, out]
    explained = np.vstack([wide, np.sqrt(penalty) * np.eye(width)]) @ full
    top = np.linalg.svd(explained, full_matrices=False)[2][:5]

    def cost(coefficients: np.ndarray) -> float:
        return ((missing - wide @ coefficients) ** 2).sum() + penalty * (coefficients**2).sum()

    assert cost((up @ down).T.double().numpy()) == pytest.approx(cost(full @ top.T @ top), rel=1e-3)


# --- error LoRAs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.prefixed(models.zimage()))


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Path:
    return quantize(source, tmp_path / "q.safetensors")


def quantize(source: Path, output: Path, recipe: str = "nvfp4", **options: Any) -> Path:
    with Source(source) as opened:
        jobs.quantize(opened, recipes.make_plan(opened, recipe), output, **options)
    return output


def calibrate(source: Path, path: Path, runs: int, seed: int = 0) -> Path:
    """Inputs with loud channels for LAYER alone."""
    tensors, collector = load_file(source), Collector(lambda _: LAYER, 1024)
    weight = tensors[f"{models.PREFIX}{LAYER}.weight"].float()
    for run in range(runs):
        collector.start_run(f"run {run}")
        x = models.correlated(400 // runs, weight.shape[1], seed + run)
        collector.add(LAYER, x, x @ weight.T)
        collector.finish_run()
    calibration.save(collector.result(), path, overwrite=True)
    return path


def test_an_error_lora_lowers_the_error_of_weights_as_it_says(source: Path, quantized: Path, tmp_path: Path) -> None:
    with Source(source) as opened:
        report = jobs.error_lora(opened, quantized, tmp_path / "l.safetensors", rank=4)
    made, weights = load_file(tmp_path / "l.safetensors"), load_file(source)
    with QuantizedFile(quantized) as file:
        for gain in report.layers:
            weight = weights[f"{models.PREFIX}{gain.name}.weight"].float()
            lost = weight - torch.cat(list(file.rows(models.PREFIX + gain.name, tuple(weight.shape))))
            up, down = (made[key].float() for key in lora.keys(gain.name))
            assert up.shape[1] == gain.rank == 4
            error = (lost - up @ down).square().sum() / weight.square().sum()
            assert error.item() == pytest.approx(gain.after, rel=1e-4) and gain.after < 0.95 * gain.before
    assert len(made) == 2 * len(report.layers) and not report.note
    about = json.loads(header(tmp_path / "l.safetensors")["calibquant"])
    assert about["of"] == {"file": "q.safetensors", "sha256": sha256(quantized)} and about["rank"] == 4


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("runs", [1, 5])
def test_a_fitted_error_lora_lowers_the_error_as_loaded_on_unseen_rows(
    runs: int, source: Path, quantized: Path, tmp_path: Path
) -> None:
    seen = calibrate(source, tmp_path / "seen.safetensors", runs)
    unseen = calibration.load(calibrate(source, tmp_path / "unseen.safetensors", 1, seed=90)).rows_of(LAYER).float()
    with Source(source) as opened:
        report = jobs.error_lora(opened, quantized, tmp_path / "l.safetensors", 8, calibration.load(seen))
        weight = opened.load(models.PREFIX + LAYER).float()
    gain = next(gain for gain in report.layers if gain.name == LAYER)
    assert gain.calibrated and report.runs == (1 if runs > 1 else 0)
    assert not any(other.calibrated for other in report.layers if other is not gain)
    up, down = (load_file(tmp_path / "l.safetensors")[key].float() for key in lora.keys(LAYER))
    with QuantizedFile(quantized) as file:
        decoded = torch.cat(list(file.rows(models.PREFIX + LAYER, tuple(weight.shape))))
        fed = file.codec(models.PREFIX + LAYER).feed(unseen, None)
    errors = [
        (unseen @ weight.T - out).square().sum() for out in (fed @ decoded.T, fed @ decoded.T + unseen @ down.T @ up.T)
    ]
    assert errors[1] < 0.8 * errors[0]
    assert gain.after / gain.before == pytest.approx((errors[1] / errors[0]).item(), rel=0.3)


def test_a_layer_that_nothing_helps_gets_no_factors(
    source: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calibration.load(calibrate(source, tmp_path / "c.safetensors", 5))
    job = importlib.import_module("quant_core.jobs.error_lora")
    monkeypatch.setattr(job, "fitted", lambda *args, **_: (-factors.fitted(*args)[0], torch.ones(8, 128)))
    with Source(source) as opened:
        report = jobs.error_lora(opened, quantized, tmp_path / "l.safetensors", 8, seen)
    gain = next(gain for gain in report.layers if gain.name == LAYER)
    assert gain.rank == 0 and gain.after == gain.before
    assert lora.keys(LAYER)[0] not in load_file(tmp_path / "l.safetensors")


def test_factors_without_inputs_are_no_help_after_gptq_and_that_is_said(source: Path, tmp_path: Path) -> None:
    seen = calibration.load(calibrate(source, tmp_path / "c.safetensors", 5))
    made = quantize(source, tmp_path / "g.safetensors", calibration=seen, rounding="gptq")
    with Source(source) as opened:
        told = [
            jobs.error_lora(opened, made, tmp_path / f"{i}.safetensors", 4, c).note for i, c in enumerate((None, seen))
        ]
    assert "rounded by GPTQ" in told[0] and not told[1]


def refusals(source: Path, quantized: Path, tmp_path: Path) -> list[tuple[Path, Path, str]]:
    other = models.save(tmp_path / "other.safetensors", models.prefixed(models.zimage(dim=96)))
    short = models.save(tmp_path / "short.safetensors", models.prefixed(models.zimage(layers=1)))
    plain = quantize(source, tmp_path / "bf16.safetensors", "nvfp4")
    split = stamped(quantized, tmp_path / "s.split.safetensors", split={"lora": "x", "sha256": "0" * 64})
    baked = stamped(quantized, tmp_path / "baked.safetensors", merged_patches_sha256="1" * 64)
    save_file(load_file(source), plain)
    return [
        (other, quantized, "of another model"),
        (short, quantized, "is not what .* is made from"),
        (source, short, "has no layer"),
        (source, plain, "has no quantized layer"),
        (source, split, "is a split file"),
        (source, baked, "has LoRAs baked in"),
    ]


def stamped(path: Path, target: Path, **changes: object) -> Path:
    metadata = header(path)
    metadata["calibquant"] = json.dumps({**json.loads(metadata["calibquant"]), **changes})
    save_file(load_file(path), target, metadata)
    return target


def test_a_pair_that_does_not_fit_is_one_clear_error(source: Path, quantized: Path, tmp_path: Path) -> None:
    for original, made, message in refusals(source, quantized, tmp_path):
        with Source(original) as opened, pytest.raises(CalibQuantError, match=message) as e:
            jobs.error_lora(opened, made, tmp_path / "l.safetensors")
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "l.safetensors").exists() and not list(tmp_path.glob("*.partial"))


def call(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """stdout, or stderr where it fails."""
    assert cli.main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_the_command_line_has_both_forms(
    source: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, joined = tmp_path / "l.safetensors", tmp_path / "both.safetensors"
    out = call(capsys, "lora", source, quantized, "-o", made, "--rank", 4)
    assert "corrected at rank 4" in out and "mean of" in out and "Bypass" in out
    assert "exists already" in call(capsys, "lora", source, quantized, "-o", made, code=1)
    assert "rank 0" in call(capsys, "lora", "concat", made, f"{made}:0", "-o", joined) or joined.exists()
    call(capsys, "lora", source, "-o", joined, code=2)
    call(capsys, "lora", "concat", made, "-o", joined, code=2)
    call(capsys, "lora", "concat", made, made, "-o", joined, "--rank", 4, code=2)
    assert "is the source itself" in call(capsys, "lora", "concat", made, made, "-o", made, "--overwrite", code=1)


# --- the stock loaders take the keys of every model family


@pytest.mark.core
@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("name", list(CASES))
def test_comfyui_finds_the_layer_of_every_key(name: str) -> None:
    import comfy.lora
    import comfy.supported_models

    case = CASES[name]
    if not any(known.__name__ == case.name for known in comfy.supported_models.models):
        pytest.skip(f"this ComfyUI has no {case.name}")
    built = Built.of(case)
    assert detect(built.file_shapes, built.file_shapes)
    tensors = {}
    for layer in built.linears:
        rows, columns = built.file_shapes[f"{layer}.weight"]
        up, down = lora.keys(layer)
        tensors |= {up: torch.empty(rows, 1, device="meta"), down: torch.empty(1, columns, device="meta")}
    found = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(hollow(built), {}), log_missing=False)
    assert set().union(*(adapter.loaded_keys for adapter in found.values())) == tensors.keys()
    assert found.keys() == {f"diffusion_model.{place}.weight" for place in built.linears.values()}


def hollow(built: Built) -> Any:
    """A model of the case's class with nothing but its keys."""
    from unittest.mock import patch

    import comfy.model_base

    class Caught(Exception):  # noqa: N818 - carries the class out of __init__
        pass

    def catch(self: Any, *_: object, **__: object) -> None:
        raise Caught(type(self))

    with patch.object(comfy.model_base.BaseModel, "__init__", catch), pytest.raises(Caught) as caught:
        built.config.get_model(_Any(), device="meta")
    tensors = {f"diffusion_model.{key}": torch.empty(0) for key in built.shapes}
    body = {"__init__": torch.nn.Module.__init__, "state_dict": lambda self: tensors}
    model = type("Hollow", (caught.value.args[0],), body)()
    model.model_config = built.config
    return model


class _Any(dict[str, torch.Tensor]):
    def __missing__(self, key: str) -> torch.Tensor:
        return torch.empty(1)


# --- several in one


BRANCH = {
    "layers.0.attention.qkv": (192, 64),
    "layers.0.attention.out": (64, 64),
    "layers.1.feed_forward.w1": (128, 64),
}


@pytest.fixture
def branch(tmp_path: Path) -> Path:
    tensors = {}
    for i, (layer, (rows, columns)) in enumerate(BRANCH.items()):
        generator = torch.Generator().manual_seed(i)
        parts = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
        tensors |= {key: part.to(lora.DTYPE) for key, part in zip(lora.keys(layer), parts, strict=True)}
    save_file(tensors, tmp_path / "x.split.lora.safetensors")
    return tmp_path / "x.split.lora.safetensors"


Pair = tuple[torch.Tensor, torch.Tensor]
Dialect = Callable[[str, Pair], dict[str, torch.Tensor]]
KOHYA: Dialect = lambda name, f: {  # noqa: E731
    f"lora_unet_{name.replace('.', '_')}.{end}": tensor
    for end, tensor in (("lora_up.weight", f[0]), ("lora_down.weight", f[1]), ("alpha", torch.tensor(3.0)))
}


def peft(prefix: str) -> Dialect:
    return lambda name, f: {f"{prefix}{name}.lora_B.weight": f[0], f"{prefix}{name}.lora_A.weight": f[1]}


@pytest.mark.parametrize(
    "dialect, alpha, names",
    [
        (lambda name, f: dict(zip(lora.keys(name), f, strict=True)), 1.0, "native"),
        (peft("diffusion_model."), 1.0, "native"),
        (peft(""), 1.0, "native"),
        (peft("transformer."), 1.0, "diffusers"),
        (KOHYA, 1.5, "native"),
        (KOHYA, 1.5, "diffusers"),
    ],
)
def test_joined_loras_add_up_to_both(dialect: Dialect, alpha: float, names: str, branch: Path, tmp_path: Path) -> None:
    """To the last bit of float32, q, k and v joined to the rows that ComfyUI gives them."""
    generator, spelled, expected = torch.Generator().manual_seed(9), {}, {}
    parts = {"layers.0.attention.to_q": (0, 64), "layers.0.attention.to_v": (128, 192)} if names == "diffusers" else {}
    places = {**parts, "layers.1.feed_forward.w1": (0, 128), "layers.3.feed_forward.w1": (0, 128)}
    for name, (start, stop) in places.items():
        factors_of = torch.randn(stop - start, 2, generator=generator), torch.randn(2, 64, generator=generator)
        spelled |= dialect(name, factors_of)
        layer = "layers.0.attention.qkv" if "to_" in name else name
        whole = expected.setdefault(layer, torch.zeros(BRANCH.get(layer, (128, 64))))
        whole[start:stop] += 0.7 * alpha * (factors_of[0] @ factors_of[1])
    save_file(spelled, tmp_path / "user.safetensors")
    layers = jobs.concat_loras([(branch, 1.0), (tmp_path / "user.safetensors", 0.7)], tmp_path / "c.safetensors")
    joined, first = load_file(tmp_path / "c.safetensors"), load_file(branch)
    assert layers == len(BRANCH.keys() | expected.keys()) == len(joined) // 2
    for layer in BRANCH.keys() | expected.keys():
        up, down = (joined[key] for key in lora.keys(layer))
        total = expected.get(layer, torch.zeros(BRANCH.get(layer, (128, 64))))
        if layer in BRANCH:
            total = total + torch.mm(*(first[key].float() for key in lora.keys(layer)))
        assert torch.allclose(up.float() @ down.float(), total, rtol=1e-5, atol=1e-5)
    untouched = lora.keys("layers.0.attention.out")
    assert all(torch.equal(joined[key], first[key]) and joined[key].dtype == lora.DTYPE for key in untouched)


@pytest.mark.parametrize(
    "native, spelled",
    [
        ("double_blocks.1.img_attn.proj", "transformer.transformer_blocks.1.attn.to_out.0"),
        ("single_blocks.0.linear2", "lora_unet_single_transformer_blocks_0_proj_out"),
        ("double_blocks.0.img_mlp.0", "lora_unet_double_blocks_0_img_mlp_0"),
        (
            "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q",
        ),
        (
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k",  # SD 1.x: four levels
            "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k",
        ),
        ("blocks.7.ffn.2", "diffusion_model.blocks.7.ffn.2"),
    ],
)
def test_spellings_of_other_families(native: str, spelled: str, tmp_path: Path) -> None:
    pair = {"up": torch.randn(8, 2), "down": torch.randn(2, 8)}
    save_file(dict(zip(lora.keys(native), pair.values(), strict=True)), tmp_path / "a.safetensors")
    save_file({f"{spelled}.lora_{end}.weight": t for end, t in pair.items()}, tmp_path / "b.safetensors")
    jobs.concat_loras([(tmp_path / f"{n}.safetensors", 1.0) for n in "ab"], tmp_path / "c.safetensors")
    made = load_file(tmp_path / "c.safetensors")
    assert {key: tuple(t.shape) for key, t in made.items()} == dict(
        zip(lora.keys(native), ((8, 4), (4, 8)), strict=True)
    )


@pytest.mark.parametrize(
    "key, problem",
    [
        ("lora_unet_layers_0_attention_out.dora_scale", "is DoRA"),
        ("lora_unet_layers_0_attention_out.hada_w1_a", "is LoHa"),
        ("diffusion_model.layers.0.attention.out.lokr_w1", "is LoKr"),
        ("diffusion_model.layers.0.attention.out.diff_b", "is a change of weights"),
        ("lora_unet_nothing_here.lora_up.weight", "names no layer"),
        ("transformer.norm_out.linear.lora_B.weight", "names no layer"),
        ("x.bias", "is no LoRA's factor"),
    ],
)
def test_what_cannot_be_joined_is_one_clear_error(key: str, problem: str, branch: Path, tmp_path: Path) -> None:
    other = {"up": "down", "B": "A"}
    tensors = {key: torch.ones(64, 2)}
    tensors |= {
        key.replace(f"lora_{a}.", f"lora_{b}."): torch.ones(2, 64) for a, b in other.items() if f"lora_{a}." in key
    }
    save_file(tensors, tmp_path / "user.safetensors")
    with pytest.raises(
        CalibQuantError, match=rf"user\.safetensors: {key} {problem}.*: load it with the stock bypass loader"
    ):
        jobs.concat_loras([(branch, 1.0), (tmp_path / "user.safetensors", 1.0)], tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_factors_of_another_width_and_a_branch_that_is_none_are_refused(branch: Path, tmp_path: Path) -> None:
    wide = dict(zip(lora.keys("layers.0.attention.out"), (torch.ones(64, 2), torch.ones(2, 96)), strict=True))
    save_file(wide, tmp_path / "user.safetensors")
    kohya = save_file(
        KOHYA("layers.0.attention.out", (torch.ones(64, 2), torch.ones(2, 64))), tmp_path / "k.safetensors"
    )
    assert kohya is None
    for order, message in (
        ([branch, tmp_path / "user.safetensors"], r"layer layers\.0\.attention\.out: its factors are .* another model"),
        ([tmp_path / "k.safetensors", branch], r"give the split's own LoRA"),
    ):
        with pytest.raises(CalibQuantError, match=message):
            jobs.concat_loras([(path, 1.0) for path in order], tmp_path / "c.safetensors")
