"""Text encoders in ComfyUI: listed, calibrated as prompts are encoded, saved where Load CLIP looks, compared."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import encoder_models
import models
import pytest
import torch
from comfy_env import start_server

from quant_core.evidence import conditioning
from quant_core.reports.conditioning import Encoded, Prompt

NODE_IDS = ["CalibQuantCalibrateClip", "CalibQuantCompareClip"]
OTHERS = ["CalibQuantPlan", "CalibQuantQuantize", "CalibQuantEasy", "CalibQuantProbe"]
QWEN, T5, UMT5 = "qwen_3_4b.safetensors", "t5.safetensors", "umt5.safetensors"
TEXTS = "A red kite over a harbour\nTwo spoons\nThe same harbour at night, painted in oil, rain"
Handle = Any
pytestmark = pytest.mark.core


# --- figures


def test_figures_of_a_conditioning_are_those_worked_out_by_hand() -> None:
    """Three tokens count: off by 1/25, turned by a right angle at twice the length, the same. Zeros do not count."""
    wanted = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    found = torch.tensor([[[3.0, 5.0], [0.0, 2.0], [0.0, 2.0], [9.0, 9.0]]])
    made = conditioning.compare(found, wanted)
    turned = (9 + 20) / (5 * 34**0.5)
    assert made.tokens == 3
    assert made.error == pytest.approx((1 + 5) / 30) and made.mean == pytest.approx((1 / 25 + 5 + 0) / 3)
    assert made.median == pytest.approx(1 / 25) and made.worst == 5
    assert made.cosine == pytest.approx((turned + 0 + 1) / 3) and made.least_cosine == 0
    masked = conditioning.compare(found, wanted, torch.tensor([[1, 0, 1, 1]]))
    assert (masked.tokens, masked.worst) == (2, pytest.approx(1 / 25))


def test_prompts_of_unlike_length_are_compared_where_both_have_tokens() -> None:
    one, other = torch.tensor([[[2.0], [2.0]]]), torch.tensor([[[2.0], [4.0], [9.0]]])
    assert conditioning.distance(other, one) == pytest.approx((0 + 1) / 2)
    assert conditioning.distance(one, other) == pytest.approx((0 + 1 / 4) / 2)
    assert conditioning.distance(other, one, torch.tensor([[0, 1]])) == pytest.approx(1)
    assert conditioning.distance(one, other, torch.tensor([[0, 1, 1]])) == pytest.approx(1 / 4)


def encoded(*means: float, other: float = 1.0) -> Encoded:
    def prompt(i: int, mean: float) -> Prompt:
        return Prompt(5, mean, mean, mean, mean, 1 - mean, 1 - mean, number=i, prompt="a | b", others={"pooled": mean})

    prompts = [prompt(i, mean) for i, mean in enumerate(means, 1)]
    return Encoded("a.safetensors", "b.safetensors", "t5", "fp8", 2 * 10**9, 10**9, 1.0, prompts, [other])


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.0, "The same"), (9e-4, "Practically"), (9e-3, "Close"), (0.09, "Noticeably"), (0.2, "Another")],
)
def test_the_verdict_has_its_documented_thresholds(error: float, words: str) -> None:
    page = (models.ROOT / "js" / "docs" / "CalibQuantCompareClip.md").read_text("utf-8")
    assert encoded(error).verdict().startswith(words) and words.lower() in page.lower()
    assert ("use more bits" in encoded(error).verdict()) is (error > 1e-2)
    assert encoded(error, other=100.0).verdict() != encoded(error).verdict() or not error


def test_the_report_is_plain_json_and_a_page_with_every_prompt() -> None:
    made = encoded(0.01, 0.02, 0.04)
    data = json.loads(made.to_json())
    assert data["measures"]["a token, mean relative error"]["mean"] == pytest.approx(0.07 / 3)
    assert data["measures"]["cosine of a token, mean"]["worst"] == pytest.approx(0.96)  # the least is the worst
    assert data["measures"]["pooled, relative error"]["n"] == 3 and data["verdict"] == made.verdict()
    assert "#3" in made.verdict() and made.to_markdown().count("a \\| b") == 3
    assert "only 3 prompts" in made.summary() and "2.00 GB → 1.00 GB" in made.summary()


# --- in this process


@pytest.fixture(scope="module")
def pack(comfy: Path) -> Iterator[dict[str, Any]]:
    """The nodes by id, and encoders in ComfyUI's folder, which knows the narrow Qwen meanwhile."""
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    folder = comfy / "models" / "text_encoders"
    made = {QWEN: encoder_models.qwen3(), T5: encoder_models.t5(), UMT5: encoder_models.t5(1, every_bias=True)}
    made[UMT5]["spiece_model"] = encoder_models.spiece()
    for name, tensors in made.items():
        models.save(folder / name, tensors)
    with encoder_models.narrow():
        yield {name: nodes.NODE_CLASS_MAPPINGS[name] for name in [*NODE_IDS, *OTHERS]}
    for name in made:
        (folder / name).unlink()


def load(name: str, folder: str = "models/text_encoders") -> Any:
    root = Path(importlib.import_module("folder_paths").base_path)
    kinds = {T5: ("CHROMA", "t5xxl"), UMT5: ("WAN", "umt5xxl")}
    kind, config = kinds.get(name, ("LUMINA2", ""))
    narrow = encoder_models.T5 if name in kinds else None
    return encoder_models.load(root / folder / name, kind=kind, config=narrow, name=config)


def execute(node: Any, **inputs: Any) -> Any:
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


def calibrate(pack: dict[str, Any], clip: Any, prompts: str = TEXTS, rows: int = 512, **words: Any) -> Any:
    return execute(pack["CalibQuantCalibrateClip"], clip=clip, prompts=prompts, rows=rows, **words)


def encode(clip: Any, text: str) -> Any:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]


def hooks_on(clip: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in clip.cond_stage_model.modules())


def engine(pack: dict[str, Any], module: str) -> Any:
    """A module of the pack as ComfyUI imported it."""
    return importlib.import_module(f"{pack['CalibQuantPlan'].__module__.rpartition('.nodes.')[0]}.{module}")


def test_encoders_are_listed_and_what_is_made_of_them_is_found_by_load_clip(pack: dict[str, Any], comfy: Path) -> None:
    folders = engine(pack, "nodes.comfyui.folders")
    names = folders.model_names()
    ours = [f"text_encoders/{name}" for name in (QWEN, T5, UMT5)]
    assert folders.encoder_names() == ours == names[-3:] and not names[0].startswith("text_encoders/")
    assert folders.model_path(ours[0]) == comfy / "models" / "text_encoders" / QWEN
    saved = execute(
        pack["CalibQuantQuantize"],
        plan=execute(
            pack["CalibQuantPlan"], model_name=ours[0], strategy={"strategy": "recipe", "recipe": "fp8"}
        ).result[0],
        filename_prefix="encoders/found",
    ).result[0]
    path = comfy / "output" / "clip" / saved
    assert path.is_file() and saved in importlib.import_module("folder_paths").get_filename_list("text_encoders")
    assert folders.name_of(path) == f"text_encoders/{saved}"


def test_one_node_makes_and_finds_an_encoder_and_says_which_loader_takes_it(pack: dict[str, Any], comfy: Path) -> None:
    words = {"model_name": f"text_encoders/{QWEN}", "card": "smallest file"}
    options = pack["CalibQuantEasy"].GET_SCHEMA().inputs[1].options
    words["card"] = next(option for option in options if "50" in option)
    done = execute(pack["CalibQuantEasy"], **words)
    assert (comfy / "output" / "clip" / done.result[0]).is_file() and "Load CLIP finds it" in done.ui["text"][0]
    assert "already there" in execute(pack["CalibQuantEasy"], **words).ui["text"][0]


def test_statistics_are_those_of_what_the_encoder_saw_and_it_encodes_as_ever(pack: dict[str, Any]) -> None:
    clip = load(QWEN)
    before = [encode(clip, text) for text in TEXTS.splitlines()]
    found = calibrate(pack, clip).result[0].current()
    assert hooks_on(clip) == 0
    stored = stored_inputs(clip, lambda: [encode(clip, text) for text in TEXTS.splitlines()])
    names = {key.removesuffix(".weight") for key, t in encoder_models.qwen3().items() if t.dim() == 2}
    assert set(found.layers) == names - {"model.embed_tokens"} == set(stored)
    for name, rows in stored.items():
        stats = found.layers[name]
        assert stats.count == len(rows)
        torch.testing.assert_close(stats.input_sqmean, rows.double().square().mean(0).float())
        torch.testing.assert_close(stats.input_amax, rows.abs().amax(0))
    group = {found.layers[f"model.layers.1.self_attn.{kind}_proj"].group for kind in "qkv"}
    assert len(group) == 1 and found.info["runs"] == found.info["prompts"] == TEXTS.splitlines()
    assert found.info["source_file"] == QWEN and found.info["architecture"] == "language"
    after = [encode(clip, text) for text in TEXTS.splitlines()]
    assert all((a[0] == b[0]).all() for a, b in zip(before, after, strict=True))


def stored_inputs(clip: Any, run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """What every Linear of the first encoder is called with, by hooks of our own."""
    transformer = next(m.transformer for m in clip.cond_stage_model.modules() if hasattr(m, "transformer"))
    kept: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, name=name: kept.setdefault(name, []).append(args[0]))
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in found]) for name, found in kept.items()}


def test_padding_counts_unless_the_encoder_throws_it_away(pack: dict[str, Any]) -> None:
    layer = "encoder.block.3.layer.1.DenseReluDense.wi_0"
    prompt = "Two spoons"
    clip = load(UMT5)
    cond = encode(clip, prompt)[0]
    read = int(cond.abs().sum(-1).count_nonzero())
    assert cond.shape[1] == 512 and read < 10
    assert calibrate(pack, clip, prompt).result[0].current().layers[layer].count == read
    assert hooks_on(clip) == 0
    clip = load(T5)
    tokens = encode(clip, prompt)[0].shape[1]
    assert calibrate(pack, clip, prompt).result[0].current().layers[layer].count == tokens


def test_of_a_clip_of_two_files_one_is_chosen(pack: dict[str, Any], comfy: Path) -> None:
    folder = comfy / "models" / "text_encoders"
    models.save(folder / "clip_l.safetensors", encoder_models.clip_l())
    clip = encoder_models.load(
        folder / "clip_l.safetensors", folder / T5, kind="FLUX", config=encoder_models.T5, name="t5xxl"
    )
    with pytest.raises(Exception, match=r"several files \(clip_l.safetensors, t5.safetensors\): choose one"):
        calibrate(pack, clip)
    found = calibrate(pack, clip, model_name=f"text_encoders/{T5}").result[0].current()
    assert len(found.layers) == 24 * 7 and found.info["architecture"] == "t5"
    with pytest.raises(Exception, match="was loaded from another file"):
        calibrate(pack, clip, model_name=f"text_encoders/{QWEN}")
    (folder / "clip_l.safetensors").unlink()


def test_a_clip_that_leaves_no_trace_is_known_by_its_layers(pack: dict[str, Any]) -> None:
    clip = load(QWEN)
    clip.patcher.cached_patcher_init = None
    with pytest.raises(Exception, match="does not say which file"):
        calibrate(pack, clip)
    found = calibrate(pack, clip, model_name=f"text_encoders/{QWEN}").result[0].current()
    assert "model.layers.0.mlp.up_proj" in found.layers
    with pytest.raises(Exception, match="no encoder of the linked CLIP has its layers"):
        calibrate(pack, clip, model_name=f"text_encoders/{T5}")


def test_a_clip_with_more_layers_than_the_file_was_loaded_from_another(pack: dict[str, Any], comfy: Path) -> None:
    less = {key: t for key, t in encoder_models.qwen3().items() if ".layers.3." not in key}
    path = models.save(comfy / "models" / "text_encoders" / "less.safetensors", less)
    clip = load(QWEN)
    clip.patcher.cached_patcher_init = None
    with pytest.raises(Exception, match=r"layer model.layers.3.\S+ of the linked CLIP is not in this file"):
        calibrate(pack, clip, model_name="text_encoders/less.safetensors")
    path.unlink()


def test_a_cancel_keeps_finished_prompts_and_leaves_no_hook(
    pack: dict[str, Any], comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, done = load(QWEN), []
    stop = importlib.import_module("comfy.model_management").InterruptProcessingException
    encoding = engine(pack, "nodes.comfyui.encoding")
    as_it_is = encoding.encode

    def encode_two(clip: Any, text: str) -> Any:
        result = as_it_is(clip, text)
        done.append(text)
        if len(done) == 3:
            raise stop
        return result

    monkeypatch.setattr(encoding, "encode", encode_two)
    with pytest.raises(stop):
        calibrate(pack, clip)
    assert hooks_on(clip) == 0
    (left,) = (comfy / "output" / "calibrations" / "unfinished").glob("qwen_3_4b_*.calibration.safetensors")
    kept = engine(pack, "quant_core.evidence.calibration").load(left)
    assert kept.info["runs"] == TEXTS.splitlines()[:2]
    left.unlink()


def test_an_encoder_takes_no_model(pack: dict[str, Any]) -> None:
    model = importlib.import_module("comfy.sd").load_diffusion_model(
        str(models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors")
    )
    name = f"text_encoders/{QWEN}"
    plan = execute(pack["CalibQuantPlan"], model_name=name, strategy={"strategy": "recipe", "recipe": "fp8"}).result[0]
    with pytest.raises(Exception, match="is a text encoder, which no MODEL has LoRAs for: unlink"):
        execute(pack["CalibQuantQuantize"], plan=plan, model_name=name, model=model)


def compare(pack: dict[str, Any], a: Any, b: Any, prompts: str = "", prefix: str = "clips/x") -> dict[str, Any]:
    done = execute(pack["CalibQuantCompareClip"], clip_a=a, clip_b=b, prompts=prompts, filename_prefix=prefix)
    return done.ui["calibquant_compare_clip"][0]


@pytest.fixture(scope="module")
def roundings(pack: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """NVFP4 copies compared with the original on the 16 prompts for that, calibrated on the other 64."""
    clip, name = load(QWEN), f"text_encoders/{QWEN}"
    calibration = calibrate(pack, clip, "", 2048).result[0]
    strategy = {"strategy": "recipe", "recipe": "nvfp4"}
    plan = execute(pack["CalibQuantPlan"], model_name=name, strategy=strategy, calibration=calibration).result[0]
    found = {}
    for rounding in ("nearest", "gptq"):
        words = {"plan": plan, "rounding": rounding, "filename_prefix": f"encoders/{rounding}"}
        saved = execute(pack["CalibQuantQuantize"], **words).result[0]
        found[rounding] = compare(pack, clip, load(saved, "output/clip"))
    return found


def test_gptq_by_the_nodes_calibration_beats_nearest_on_held_out_prompts(roundings: dict[str, dict[str, Any]]) -> None:
    nearest, gptq = (
        {title: found["measures"][title]["mean"] for title in found["measures"]}
        for found in (roundings["nearest"], roundings["gptq"])
    )
    for title, value in nearest.items():
        if "error" in title or ("token" in title and "cosine" not in title):
            assert gptq[title] < value / 5, title  # measured: 1/16 (the worst token) to 1/49
        else:
            assert 1 - gptq[title] < (1 - value) / 5, title
    assert len(roundings["gptq"]["prompts"]) == 16 and roundings["gptq"]["recipe"] == "nvfp4"
    assert roundings["gptq"]["bytes_after"] < roundings["gptq"]["bytes_before"]


def test_what_compare_says_is_what_load_clip_gives(pack: dict[str, Any], comfy: Path) -> None:
    """Errors recomputed from CLIPs of stock loading, and the files that are written."""
    a, b = load(QWEN), load(QWEN)
    with torch.inference_mode():
        weight = b.cond_stage_model.get_submodule("qwen3_4b.transformer.model.layers.1.mlp.down_proj").weight
        weight.mul_(1.05)
    found = compare(pack, a, b, TEXTS, "clips/recomputed")
    for text, one in zip(TEXTS.splitlines(), found["prompts"], strict=True):
        (wanted, _), (got, _) = encode(a, text), encode(b, text)
        error = ((got.double() - wanted.double()).norm() / wanted.double().norm()) ** 2
        assert one["error"] == pytest.approx(float(error), rel=1e-6) and one["tokens"] == wanted.shape[1] > 0
        assert 0 < one["median"] <= one["worst"] and one["least_cosine"] <= one["cosine"] < 1
    page = comfy / "output" / "comparisons" / "clips" / "recomputed_00001_.md"
    assert found["verdict"] in page.read_text("utf-8")
    assert json.loads(page.with_suffix(".json").read_text("utf-8")) == found


def test_an_encoder_against_itself_is_the_same(pack: dict[str, Any]) -> None:
    clip = load(QWEN)
    found = compare(pack, clip, clip, TEXTS)
    assert found["verdict"].startswith("The same") and found["other_prompts"][0] > 0.1


def test_what_cannot_be_compared_is_refused(pack: dict[str, Any]) -> None:
    a, b = load(QWEN), load(T5)
    with pytest.raises(Exception, match=r"clip_a makes \[1, \d+, 128\] of a prompt, clip_b \[1, \d+, 64\]"):
        compare(pack, a, b, TEXTS)
    with torch.inference_mode():
        b.cond_stage_model.get_submodule("t5xxl.transformer.encoder.final_layer_norm").weight.fill_(float("nan"))
    with pytest.raises(Exception, match="clip_b makes NaN of 'A red kite"):
        compare(pack, a, b, TEXTS)


def described(inputs: list[Any]) -> Iterator[tuple[str, str | None]]:
    for entry in inputs:
        yield entry.id, entry.tooltip


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_input_and_output_is_explained(pack: dict[str, Any], node_id: str) -> None:
    schema = pack[node_id].GET_SCHEMA()
    page = (models.ROOT / "js" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    for name, tooltip in described([*schema.inputs, *schema.outputs]):
        assert tooltip and len(tooltip) > 10, name
        assert f"**{name}**" in page, f"{node_id}.md does not explain {name}"
    for heading in ("## Inputs", "## Output", "## Example", "## What goes wrong"):
        assert heading in page


# --- through a real server


def test_the_workflow_makes_an_encoder_that_load_clip_takes(comfy: Path, tmp_path: Path) -> None:
    name = "qwen_3_4b.safetensors"
    for place, write in {
        f"models/text_encoders/{name}": lambda path: models.save(path, encoder_models.qwen3()),
        "custom_nodes/narrow_encoders.py": lambda path: path.write_text(encoder_models.NARROW),
    }.items():
        (tmp_path / place).parent.mkdir(parents=True)
        write(tmp_path / place)
    graph = json.loads((models.ROOT / "workflows" / "api" / "text_encoder.json").read_text("utf-8"))
    save, compare_node = (
        next(key for key, node in graph.items() if node["class_type"] == kind)
        for kind in ("CalibQuantQuantize", "CalibQuantCompareClip")
    )
    with start_server(tmp_path) as server:
        outputs = server.post(graph)["outputs"]
        (saved,), (found,) = outputs[save]["calibquant_result"], outputs[compare_node]["calibquant_compare_clip"]
        names = server.get("/object_info/CLIPLoader")["CLIPLoader"]["input"]["required"]["clip_name"][0]
        ours = server.get("/object_info/CalibQuantPlan")["CalibQuantPlan"]["input"]["required"]["model_name"]
    assert saved["path"] == f"output/clip/{saved['model_name']}" and saved["model_name"] in names
    assert {f"text_encoders/{each}" for each in (name, saved["model_name"])} <= set(ours[1].get("options", ours[0]))
    assert saved["formats"]["nvfp4"] == 28 and (tmp_path / saved["path"]).stat().st_size == saved["bytes_after"]
    assert found["verdict"].startswith("Close to the original's") and len(found["prompts"]) == 16
    assert (tmp_path / "output" / "comparisons" / "qwen_3_4b_00001_.md").is_file()
