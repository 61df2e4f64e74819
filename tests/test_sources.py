"""Sources as people have them: folders and variants of diffusers, pickles, FP8 releases of other makers."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quant_core import cli, jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence.probe import probe
from quant_core.files.header import Headers
from quant_core.models.source import Source
from quant_core.planning import recipes

Tensors = models.Tensors
NAME = "diffusion_pytorch_model"


def refusal(path: Path) -> str:
    with pytest.raises(CalibQuantError) as error:
        Source(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


# --- pickles


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def zipped(path: Path) -> bytes:
    """As torch.save writes it, but that loading it does something."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap(path), 2))
    return archive.getvalue()


def saved(tensors: Tensors) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.pth", "m.bin", "m.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5, "zip", "torch"])
def test_pickles_are_refused_and_never_loaded(name: str, protocol: int | str, tmp_path: Path) -> None:
    trap, path = tmp_path / "it ran", tmp_path / name
    content = {"zip": zipped(trap), "torch": saved(models.wan())}.get(str(protocol))
    path.write_bytes(content or pickle.dumps(Trap(trap), int(protocol)) + bytes(100))
    message = refusal(path)
    if protocol == 0 and name == "m.safetensors":  # text, which is like nothing
        assert "is no safetensors file" in message
    else:
        assert "is a pickle" in message and ".safetensors release" in message and "ModelSave" in message
    assert not trap.exists()


def test_a_safetensors_file_is_known_by_its_content(tmp_path: Path) -> None:
    for size in range(300, 700, 8):  # some header lengths are bytes with which pickles begin
        path = models.save(tmp_path / "m.ckpt", models.wan(), {"text": "x" * size})
        with Source(path) as source:
            assert source.architecture.name == "wan"


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 23802932552\n")
    assert "Git LFS pointer" in refusal(path)


# --- folders


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusers pipeline whose transformer is sharded, with an all-in-one file beside."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    models.save(folder / "all-in-one.safetensors", models.prefixed(models.zimage()))
    models.save_sharded(folder / "transformer", models.wan())
    models.save_sharded(folder / "text_encoder", {"model.layers.0.mlp.up_proj.weight": torch.ones(32, 32)})
    return folder


def test_of_a_pipeline_the_diffusion_model_is_taken(pipeline: Path, tmp_path: Path) -> None:
    with Source(pipeline) as source:
        assert source.architecture.name == "wan" and source.checkpoint.shapes().keys() == models.wan().keys()
        jobs.quantize(source, recipes.make_plan(source, "fp8"), tmp_path / "out.safetensors")
    (pipeline / "transformer").rename(pipeline / "unet")
    with Source(pipeline) as source:
        assert source.architecture.name == "wan"
    with Headers(pipeline / "text_encoder") as file:
        assert list(file.entries) == ["model.layers.0.mlp.up_proj.weight"]


def test_a_pipeline_of_two_experts_names_both(pipeline: Path) -> None:
    models.save_sharded(pipeline / "transformer_2", models.wan())
    message = refusal(pipeline)
    assert str(pipeline / "transformer") in message and str(pipeline / "transformer_2") in message


def test_a_pipeline_without_a_model_says_what_it_lacks(pipeline: Path) -> None:
    (pipeline / "transformer").rename(pipeline / "elsewhere")
    assert "without a folder transformer or transformer_2 or unet" in refusal(pipeline)


def test_of_variants_the_one_without_a_mark_is_taken(tmp_path: Path) -> None:
    models.save(tmp_path / f"{NAME}.fp16.safetensors", {k: t.half() for k, t in models.zimage().items()})
    with Source(tmp_path) as source:  # alone it is taken
        assert source.load("layers.0.attention.qkv").dtype == torch.float16
    models.save(tmp_path / f"{NAME}.safetensors", {k: t.float() for k, t in models.zimage().items()})
    models.save(tmp_path / f"{NAME}.non_ema.safetensors", {"x": torch.ones(1)})
    with Source(tmp_path) as source:
        assert source.load("layers.0.attention.qkv").dtype == torch.float32
    models.save(tmp_path / "other.safetensors", {"x": torch.ones(1)})
    assert "2 candidates" in refusal(tmp_path)


@pytest.mark.parametrize("index", [f"{NAME}.safetensors.index.fp16.json", f"{NAME}.fp16.safetensors.index.json"])
def test_an_index_of_a_variant_is_an_index(index: str, tmp_path: Path) -> None:
    models.save_sharded(tmp_path, models.zimage()).rename(tmp_path / index)
    with Source(tmp_path) as source:
        assert source.architecture.name == "zimage"


def test_folders_without_a_model_say_what_they_lack(tmp_path: Path) -> None:
    assert "no .safetensors file" in refusal(tmp_path)
    (tmp_path / f"{NAME}.bin").write_bytes(saved({}))
    assert "only pickles" in refusal(tmp_path)
    models.save(tmp_path / f"{NAME}-00001-of-00002.safetensors", models.zimage())
    assert "shards without their index" in refusal(tmp_path)


# --- FP8 releases

LAYER = "layers.0.feed_forward.w2"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def model_with(layer: Tensors, kept: torch.dtype = torch.bfloat16, weight: torch.Tensor | None = None) -> Tensors:
    """Z-Image with one layer as given (by suffix)."""
    tensors = {key: tensor.to(kept) for key, tensor in models.zimage(dim=192, ffn=320).items()}
    return tensors | {f"{LAYER}.{suffix}": tensor for suffix, tensor in layer.items()}


def codes(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(192, 320, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(path: Path, wanted: np.ndarray) -> None:
    """The weight as read, and as the probe sees it, is exactly this float64 product in float32."""
    with Source(path) as source:
        assert np.array_equal(source.load(LAYER).float().numpy(), wanted.astype(np.float32))
        assert source.kept_dtype(LAYER) == torch.bfloat16
    layer = next(one for one in probe(path).layers if one.name == LAYER)
    assert layer.amax == np.abs(wanted.astype(np.float32)).max()


@pytest.mark.parametrize("suffix", ["weight_scale", "scale_weight", "scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (192,), (192, 1)])
def test_scales_per_tensor_and_per_row(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    dtype, kept = (E5M2, torch.float32) if len(shape) == 1 else (E4M3, torch.bfloat16)
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(2)) / 64
    tensors = model_with({"weight": codes(dtype), suffix: scale}, kept)
    exact = codes(dtype).double().numpy() * scale.reshape(-1, 1).double().numpy()
    check(models.save(tmp_path / "m.safetensors", tensors), exact)


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
def test_scales_per_block(suffix: str, tmp_path: Path) -> None:
    scale = torch.rand(2, 3, generator=torch.Generator().manual_seed(2)) / 64  # of 128 × 128; the last ones are cut
    tensors = model_with({"weight": codes(E4M3), suffix: scale, "activation_scale": torch.ones(())})
    wide = np.kron(scale.double().numpy(), np.ones((128, 128)))[:192, :320]
    path = models.save(tmp_path / "m.safetensors", tensors)
    check(path, codes(E4M3).double().numpy() * wide)
    output = tmp_path / "out.safetensors"
    assert cli.main(["quantize", str(path), "--recipe", "nvfp4", "-o", str(output), "--verify"]) == 0
    assert not any(suffix == key.rpartition(".")[2] for key in load_file(output) if key.startswith(LAYER + ".act"))


def test_a_block_scale_is_never_taken_for_one_per_row(tmp_path: Path) -> None:
    """128 rows by 16384 columns have as many blocks as rows."""
    weight = torch.ones(128, 16384).to(E4M3)
    scale = torch.arange(1.0, 129.0).view(1, 128)
    tensors = models.zimage() | {f"{LAYER}.weight": weight, f"{LAYER}.weight_scale_inv": scale}
    with Source(models.save(tmp_path / "m.safetensors", tensors)) as source:
        assert torch.equal(source.load(LAYER)[0], torch.arange(1.0, 129.0).repeat_interleave(128))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (192, 2), (1, 192), (2, 3, 1)])
def test_scales_of_another_shape_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = models.save(
        tmp_path / "m.safetensors", model_with({"weight": codes(E4M3), "weight_scale": torch.ones(shape)})
    )
    for read in (lambda: Source(path).load(LAYER), lambda: probe(path)):
        with pytest.raises(CalibQuantError, match=f"layer {LAYER} has a scale of shape"):
            read()


@pytest.mark.parametrize("suffix", ["weight.scale", "scale_inv", "weight_block_scale", "scales"])
def test_fp8_with_a_scale_that_is_not_known_is_refused(suffix: str, tmp_path: Path) -> None:
    """Without its scale such a weight would be wrong, and nobody would say so."""
    path = models.save(tmp_path / "m.safetensors", model_with({"weight": codes(E4M3), suffix: torch.ones(())}))
    assert f"layer {LAYER} is FP8 beside {LAYER}.{suffix}" in refusal(path)


def test_fp8_without_scales_and_with_float32_kept(tmp_path: Path) -> None:
    tensors = model_with({"weight": codes(E5M2)}, torch.float32)
    path = models.save(tmp_path / "m.safetensors", tensors)
    with Source(path) as source:
        assert torch.equal(source.load(LAYER).float(), codes(E5M2).float())
        report = jobs.quantize(source, recipes.make_plan(source, "mxfp8"), tmp_path / "out.safetensors")
        jobs.verify(source, report)
    assert load_file(tmp_path / "out.safetensors")["layers.0.ffn_norm1.weight"].dtype == torch.float32


def test_a_text_encoder_of_comfy_org(tmp_path: Path) -> None:
    """Their ``*_fp8_scaled``: no prefix, the marker beside the embeddings, a tokenizer among the tensors."""
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    scale = torch.tensor(0.0123)
    tensors = {
        "scaled_fp8": torch.empty(0, dtype=E4M3),
        "spiece_model": torch.zeros(99, dtype=torch.uint8),
        "shared.weight": torch.randn(64, 320).bfloat16(),
        f"{layer}.weight": codes(E4M3),
        f"{layer}.scale_weight": scale,
        f"{layer}.scale_input": torch.tensor(1.0),
    }
    with Source(models.save(tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors", tensors)) as source:
        exact = codes(E4M3).double().numpy() * float(scale)
        assert np.array_equal(source.load(layer).numpy(), exact.astype(np.float32))
        assert {key.rpartition(".")[2] for key in source.consumed} == {"scaled_fp8", "scale_weight", "scale_input"}
