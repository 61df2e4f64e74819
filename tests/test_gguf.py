"""GGUF files as sources. The package ``gguf`` writes them and decodes what must come out: a source of its own."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core import cli, jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence.probe import probe
from quant_core.files import gguf as ours
from quant_core.files.checkpoint import Checkpoint
from quant_core.files.header import Headers
from quant_core.models.modelfile import ModelFile
from quant_core.models.source import Source
from quant_core.planning import recipes
from quant_core.reports import describe

gguf = pytest.importorskip("gguf", reason="the extra [test] has the package gguf")
Type = gguf.GGMLQuantizationType
Q8, Q4 = Type.Q8_0, Type.Q4_0


def save(path: Path, tensors: models.Tensors, kind: int = Q8, texts: Mapping[str, str] | None = None) -> Path:
    """As converters of diffusion models do it: matrices in blocks, vectors in F32, 5-D weights flattened."""
    writer = gguf.GGUFWriter(path, "flux")
    for key, text in (texts or {}).items():
        writer.add_string(key, text)
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(n) for n in values.shape])
            values = values.reshape(values.shape[0], -1)
        used = kind if values.ndim == 2 and values.shape[1] % 32 == 0 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def expected(path: Path) -> dict[str, np.ndarray]:
    """Every tensor's float32 values by the package's own reader, flat."""
    found = gguf.GGUFReader(path)
    return {t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)).reshape(-1) for t in found.tensors}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("gguf") / "wan.gguf", models.wan(), texts={"config": "{}"})


def test_block_types_are_the_packages() -> None:
    assert {kind: (b.name, b.values, b.nbytes) for kind, b in ours.BLOCKS.items()} == {
        int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in map(Type, ours.BLOCKS)
    }
    for kind, name in ours.PLAIN.items():
        assert Type(kind).name == name


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.F16, Type.BF16, Type.F32, Type.Q4_0, Type.Q5_1])
def test_values_are_those_of_the_package(kind: int, tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", models.wan(), kind)
    wanted = expected(path)
    with Source(path, lossy=True) as source:
        assert source.checkpoint.shapes() == {name: tuple(t.shape) for name, t in models.wan().items()}
        for name, values in wanted.items():
            read = source.checkpoint.read(name).float().numpy().reshape(-1)
            assert read.tobytes() == values.astype(np.float32).tobytes(), name


def test_chunks_and_pieces_are_the_whole(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "PIECE", 300)  # bytes; of no block a multiple
    with Checkpoint(wan) as file:
        entry = file.entries["blocks.0.ffn.0.weight"]
        whole = file.read_bytes(entry.name)
        assert whole == expected(wan)[entry.name].tobytes()
        for offset, length in ((0, 1), (127, 2), (128, 1000), (129, 4097), (len(whole) - 3, 3)):
            buffer = bytearray(length)
            file.read_into(entry, offset, memoryview(buffer))
            assert bytes(buffer) == whole[offset : offset + length]


def test_the_file_is_that_of_the_dequantized_model(wan: Path, tmp_path: Path) -> None:
    like = {name: tuple(tensor.shape) for name, tensor in models.wan().items()}
    plain = {name: torch.from_numpy(values.copy()).view(like[name]) for name, values in expected(wan).items()}
    models.save(tmp_path / "plain.safetensors", plain)
    for source, output in ((wan, "a"), (tmp_path / "plain.safetensors", "b")):
        with Source(source) as opened:
            report = jobs.quantize(opened, recipes.make_plan(opened, "nvfp4"), tmp_path / f"{output}.safetensors")
            jobs.verify(opened, report)
    one, other = (reference.File(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.tensors.keys() == other.tensors.keys() and one.configs() and one.configs() == other.configs()
    blocks = {t.name for t in gguf.GGUFReader(wan).tensors if t.tensor_type == Q8}
    for name, tensor in other.tensors.items():
        if name in blocks and one.tensors[name].dtype == torch.bfloat16:  # kept: 16-bit, as other sources are
            assert torch.equal(one.tensors[name], tensor.bfloat16()), name
        else:
            assert reference.raw(one.tensors[name]) == reference.raw(tensor), name
    assert one.metadata["config"] == "{}"


def test_probe_and_inspect(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = expected(wan)
    for layer in probe(wan).layers:
        assert layer.amax == np.abs(values[f"{layer.name}.weight"]).max()
    info = describe.inspect(wan)
    assert info["architecture"] == "wan" and info["formats"]["Q8_0"] > 10 and info["bytes"] == wan.stat().st_size
    assert sum(info["dtypes"].values()) <= info["bytes"]
    with ModelFile(wan) as model:
        assert any("GGUF Q8_0" in note for note in model.warnings())


def test_fingerprints_tell_fine_tunes_apart(wan: Path, tmp_path: Path) -> None:
    again = save(tmp_path / "again.gguf", models.wan(), texts={"config": "{}"})
    other = save(tmp_path / "other.gguf", {k: v * 1.5 for k, v in models.wan().items()}, texts={"config": "{}"})
    found = [Headers(path).fingerprint() for path in (wan, again, other)]
    assert found[0] == found[1] != found[2]


def test_types_below_q8_0_are_refused_unless_insisted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "m.gguf", models.wan(), Q4)
    command = ["quantize", str(path), "--recipe", "nvfp4", "-o", str(tmp_path / "out.safetensors")]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert "Q4_0" in error and "--allow-lossy" in error and not (tmp_path / "out.safetensors").exists()
    assert cli.main([*command, "--allow-lossy", "--verify"]) == 0
    assert describe.inspect(path)["formats"]["Q4_0"]


def test_a_missing_package_is_one_line_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(tmp_path / f"{kind}.gguf", models.wan(), kind) for kind in (Q8, Q4)]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with Source(paths[0]) as source:  # Q8_0 needs none
        source.load("blocks.0.ffn.0")
    with Source(paths[1], lossy=True) as source, pytest.raises(CalibQuantError, match="pip install gguf"):
        source.load("blocks.0.ffn.0")


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.gguf", {"blk.0.attn_q.weight": torch.ones(32, 32)})
    with pytest.raises(CalibQuantError, match=r"language model in llama\.cpp's names.*blk\.0\.attn_q\.weight"):
        Source(path)


@pytest.mark.usefixtures("comfy")
def test_comfyui_loads_what_is_made_of_it(tmp_path: Path) -> None:
    import comfy.sd
    from safetensors.torch import load_file

    demo = load_file(models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors")
    path = save(tmp_path / "digits.gguf", demo, texts={"config": '{"transformer": {"text_dim": 64}}'})
    with Source(path) as source:
        plan = recipes.make_plan(source, "mxfp8")
        jobs.quantize(source, plan, tmp_path / "out.safetensors")
    loaded = comfy.sd.load_diffusion_model(str(tmp_path / "out.safetensors")).model.diffusion_model
    values = expected(path)
    assert len(plan.quantized()) > 20
    for layer in plan.quantized():
        weight = loaded.get_submodule(layer).weight.dequantize().float().numpy().reshape(-1)
        error = ((weight - values[f"{layer}.weight"]) ** 2).sum() / (values[f"{layer}.weight"] ** 2).sum()
        assert 0 < error < 9e-4, layer


@pytest.mark.usefixtures("comfy")
def test_nodes_list_gguf_files_among_their_sources() -> None:
    import asyncio
    import importlib

    import folder_paths

    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0], "below")
    folder.mkdir(parents=True, exist_ok=True)
    path = save(folder / "m.gguf", models.wan())
    try:
        folders = importlib.import_module(next(n for n in sys.modules if n.endswith("nodes.comfyui.folders")))
        assert str(Path("below", "m.gguf")) in folders.model_names()
        assert folders.model_path(str(Path("below", "m.gguf"))) == path
        assert not folders._is_original(path, "")
    finally:
        path.unlink()


# --- damage

RAW_ARCHITECTURE = b"general.architecture" + struct.pack("<I", 8)


def refused(path: Path, raw: bytes) -> str:
    path.write_bytes(raw)
    with pytest.raises(CalibQuantError) as error:
        Headers(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


def test_damaged_files_are_one_clear_error(wan: Path, tmp_path: Path) -> None:
    raw, path = wan.read_bytes(), tmp_path / "m.gguf"
    endless = b"general.architecture" + struct.pack("<IIQ", 9, 4, 1 << 40)  # on which the package runs without end
    assert "header is damaged" in refused(path, raw.replace(RAW_ARCHITECTURE, endless, 1))
    assert "is truncated" in refused(path, raw[: -len(raw) // 4])
    assert "after the last tensor" in refused(path, raw + bytes(64))
    assert "version 1," in refused(path, b"GGUF\1" + raw[5:])
    assert "header is damaged" in refused(path, raw[:16] + b"\xff" * 8 + raw[24:])
    assert "header is damaged" in refused(path, raw[:20])
    name = b"blocks.0.ffn.0.weight"
    assert "twice" in refused(path, raw.replace(b"blocks.1.ffn.0.weight", name))
    shape = raw.replace(b"orig_shape.patch_embedding.weight" + struct.pack("<IIQI", 9, 5, 5, 64),
                        b"orig_shape.patch_embedding.weight" + struct.pack("<IIQI", 9, 5, 5, 63))  # fmt: skip
    assert shape != raw and "patch_embedding.weight has shape" in refused(path, shape)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_damage_to_a_header_is_more_than_an_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source, path = folder / "fuzz.gguf", folder / "damaged.gguf"
    if not source.exists():
        save(source, {"blocks.0.ffn.0.weight": torch.ones(32, 64), "blocks.0.norm.weight": torch.ones(64)})
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, 400))
        some = data.draw(st.binary(min_size=1, max_size=8))
        raw[at : at + len(some)] = some
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    try:
        with Checkpoint(path) as file:
            for name in file.entries:
                file.read(name)
    except CalibQuantError as e:
        assert "\n" not in str(e)
