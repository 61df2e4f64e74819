"""The node Probe Model Weights, plans made from it, and its heatmap in a real browser."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from comfy_env import PACK_NAME, Server, ServerError
from safetensors.torch import load_file
from test_browser import SCRIPTS, browser_environment

from quant_core.evidence import probe
from quant_core.models.source import Source
from quant_core.planning import recipes, scoring

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
NODE_IDS = ["CalibQuantProbe", "CalibQuantPlan"]
FAMILY = {"thresholds": "family"}
PERCENTILES = {"strategy": "percentiles", "fp8_percentile": 60.0, "keep_percentile": 80.0}
KEEP_RATIO = {"strategy": "keep_ratio", "ratio": 0.25, "base": "nvfp4"}
Pack = dict[str, Any]


@pytest.fixture(scope="module")
def pack(comfy: Path) -> Pack:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return {name: nodes.NODE_CLASS_MAPPINGS[name] for name in NODE_IDS}


@pytest.fixture
def model_file(comfy: Path) -> Iterator[Callable[..., Path]]:
    """Save a model where the nodes find it; removed at the end."""
    made: list[Path] = []

    def save(name: str, tensors: models.Tensors) -> Path:
        made.append(comfy / "models" / "diffusion_models" / name)
        return models.save(made[-1], tensors)

    yield save
    for path in made:
        path.unlink(missing_ok=True)


def execute(node: Any, **inputs: Any) -> Any:
    """Run a node as ComfyUI does; its NodeOutput."""
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


def run_probe(
    pack: Pack, model_name: str = MODEL, compat: bool = False, thresholds: dict[str, Any] = FAMILY
) -> tuple[Any, dict[str, dict[str, Any]], str]:
    """(the PROBE, the layers that the page gets by name, the text) of Probe Model Weights."""
    done = execute(pack["CalibQuantProbe"], model_name=model_name, compat=compat, thresholds=thresholds)
    (raw,), (text,) = done.ui["calibquant_probe"], done.ui["text"]
    return done.result[0], by_name(raw), text


def by_name(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    layers = [dict(zip(raw["fields"], row, strict=True)) for row in raw["layers"]]
    return {layer["name"]: layer for layer in layers}


def make_plan(pack: Pack, strategy: dict[str, Any], model_name: str = MODEL, linked: Any = None) -> Any:
    inputs = {} if linked is None else {"probe": linked}
    return execute(pack["CalibQuantPlan"], model_name=model_name, strategy=strategy, **inputs).result[0]


def engine_of(pack: Pack) -> Any:
    """The engine's probe module as the pack's own node sees it."""
    return sys.modules[pack["CalibQuantProbe"].__module__].probe


def own_error(message: str) -> Any:
    return pytest.raises(Exception, match=message)


# --- what the node hands to the page


def test_every_2d_weight_is_there_with_its_measured_errors(pack: Pack) -> None:
    _, layers, text = run_probe(pack)
    weights = {key: list(t.shape) for key, t in load_file(DEMO).items() if key.endswith(".weight") and t.dim() == 2}
    assert {f"{name}.weight": layer["shape"] for name, layer in layers.items()} == weights
    for expected in probe.probe(DEMO).layers:
        shown = layers[expected.name]
        assert shown["protected"] == expected.protected and shown["block"] == expected.block
        for pair, measured in zip(shown["errors"], expected.errors.values(), strict=True):
            assert pair == pytest.approx(measured, rel=1e-3)
        for name in ("kurtosis", "dynamic_range", "outlier_share", "row_spread", "block16_spread", "block32_spread"):
            assert shown[name] == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-9)
    assert text.startswith("Wan 2.1 / 2.2: 66 layers, 3.58 MB") and "6 KEEP · 9 FP8 · 45 NVFP4" in text


def test_statistics_are_those_of_the_file(pack: Pack) -> None:
    weight = load_file(DEMO)["blocks.2.ffn.0.weight"].double()
    centred = weight - weight.mean()
    layer = run_probe(pack)[1]["blocks.2.ffn.0"]
    kurtosis = float((centred**4).mean() / (centred**2).mean() ** 2 - 3)
    assert layer["kurtosis"] == pytest.approx(kurtosis, abs=1e-3)
    assert layer["outlier_share"] == pytest.approx(float((centred.abs() > 3 * weight.std()).double().mean()), rel=1e-3)


def test_what_the_page_gets_is_small_and_plain_json(pack: Pack, model_file: Callable[..., Path]) -> None:
    model_file("deep.safetensors", models.zimage(layers=60))
    done = execute(pack["CalibQuantProbe"], model_name="deep.safetensors", compat=False, thresholds=FAMILY)
    (raw,) = done.ui["calibquant_probe"]
    told = json.dumps(raw, allow_nan=False)
    assert len(told) < 400 * len(raw["layers"]) + 2000  # bytes
    assert raw["types"][0] == "adaLN_modulation.0" and raw["types"][-1].startswith("noise_refiner.")
    assert set(raw["types"]) == {layer["type"] for layer in by_name(raw).values() if layer["block"] is not None}
    assert raw["correlations"].keys() == set(probe.STATISTICS)


@pytest.mark.parametrize("compat", [False, True])
def test_decisions_are_the_engines(pack: Pack, compat: bool) -> None:
    _, layers, text = run_probe(pack, compat=compat)
    scored = scoring.decide(probe.probe(DEMO), compat=compat)
    assert {n: x["decision"] for n, x in layers.items() if x["decision"]} == {
        d.layer.name: d.decision for d in scored.decisions
    }
    assert ("as quant_probe" in text) == compat
    assert ("quant_probe would decide otherwise on 9 layers" in text) != compat


def test_own_thresholds(pack: Pack) -> None:
    own = {"thresholds": "custom", "fp8_percentile": 0.0, "keep_percentile": 100.0, "kurtosis_keep": 8.0}
    decisions = [layer["decision"] for layer in run_probe(pack, thresholds=own)[1].values() if layer["decision"]]
    assert decisions.count("KEEP") == 1 and decisions.count("FP8") > 9  # the highest score is at percentile 100
    everything = {**own, "kurtosis_keep": -3.0}
    assert {x["decision"] for x in run_probe(pack, thresholds=everything)[1].values()} == {"KEEP", ""}


def test_a_file_is_read_again_only_when_it_changed(
    pack: Pack, model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, read = engine_of(pack), []
    real = engine.probe
    monkeypatch.setattr(engine, "probe", lambda path, **kw: read.append(path) or real(path, **kw))
    model_file("twice.safetensors", models.zimage())
    before = run_probe(pack, "twice.safetensors")[1]
    run_probe(pack, "twice.safetensors", compat=True)
    make_plan(pack, KEEP_RATIO, "twice.safetensors")
    assert len(read) == 1
    model_file("twice.safetensors", {k: 3 * t for k, t in models.zimage(layers=3).items()})
    after = run_probe(pack, "twice.safetensors")[1]
    assert len(read) == 2 and len(after) > len(before)


def test_cancel_stops_the_probe_and_is_not_remembered(
    pack: Pack, model_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file("stopped.safetensors", models.zimage(layers=8))
    management, calls = importlib.import_module("comfy.model_management"), []

    def cancel_at_the_third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(management, "throw_exception_if_processing_interrupted", cancel_at_the_third)
        with pytest.raises(management.InterruptProcessingException):
            run_probe(pack, "stopped.safetensors")
    assert len(calls) == 3
    assert len(run_probe(pack, "stopped.safetensors")[1]) == len(probe.probe(_path(pack, "stopped.safetensors")).layers)


def _path(pack: Pack, name: str) -> str:
    return importlib.import_module("folder_paths").get_full_path("diffusion_models", name)


def test_nan_stops_with_the_tensors_name(pack: Pack, model_file: Callable[..., Path]) -> None:
    tensors = models.zimage()
    tensors["layers.1.attention.out.weight"][3, 5] = float("nan")
    model_file("damaged.safetensors", tensors)
    with own_error(r"^tensor layers\.1\.attention\.out\.weight has NaN.* \(damaged\.safetensors\)$"):
        run_probe(pack, "damaged.safetensors")


def test_compat_of_another_family_is_one_clear_error(pack: Pack, model_file: Callable[..., Path]) -> None:
    model_file("sd.safetensors", models.sd15())
    assert "Stable Diffusion 1" in run_probe(pack, "sd.safetensors")[2]
    with own_error(r"^compat quant_probe knows wan and zimage only, this model is sd15$"):
        run_probe(pack, "sd.safetensors", compat=True)


# --- plans from a probe


@pytest.mark.parametrize("strategy", [PERCENTILES, KEEP_RATIO], ids=lambda s: s["strategy"])
def test_plan_is_the_engines_with_and_without_a_linked_probe(
    pack: Pack, strategy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    linked = run_probe(pack)[0]
    alone = make_plan(pack, strategy)
    with Source(DEMO) as source:
        probed = probe.probe(DEMO)
        options = replace(scoring.defaults("wan"), fp8_percentile=60.0, keep_percentile=80.0)
        by_score = recipes.by_score(source, probed, options)
        expected = by_score if strategy is PERCENTILES else recipes.keep_worst(source, probed, 0.25, "nvfp4")
    assert alone.to_json() == expected.to_json()
    sys.modules[pack["CalibQuantProbe"].__module__]._latest.clear()
    monkeypatch.setattr(engine_of(pack), "probe", lambda *_, **__: pytest.fail("a linked probe is there to be used"))
    assert make_plan(pack, strategy, linked=linked).to_json() == expected.to_json()


@pytest.mark.parametrize(("base", "fmt"), [("nvfp4", "nvfp4"), ("mxfp8", "mxfp8"), ("int8", "int8_tensorwise")])
def test_keep_ratio_keeps_the_layers_with_the_largest_error(pack: Pack, base: str, fmt: str) -> None:
    _, layers, _ = run_probe(pack)
    plan = make_plan(pack, {**KEEP_RATIO, "base": base})
    column = list(probe.probe(DEMO).layers[0].errors).index(fmt)
    free = {name: layer["errors"][column][0] for name, layer in layers.items() if not layer["protected"]}
    kept = [free[name] for name in free if plan.layers[name].format == "bf16"]
    quantized = [free[name] for name in free if plan.layers[name].format == fmt]
    assert (len(kept), len(quantized)) == (15, 45)
    assert min(kept) >= max(quantized)


@pytest.mark.parametrize("strategy", [PERCENTILES, KEEP_RATIO], ids=lambda s: s["strategy"])
def test_probe_of_another_file_is_one_clear_error(
    pack: Pack, strategy: dict[str, Any], model_file: Callable[..., Path]
) -> None:
    model_file("other.safetensors", models.zimage())
    linked = run_probe(pack, "other.safetensors")[0]
    with own_error(
        rf"^the linked probe is of another file \(other\.safetensors\): choose the same model .*\({MODEL}\)$"
    ) as e:
        make_plan(pack, strategy, linked=linked)
    assert type(e.value).__name__ == "CalibQuantError" and "\n" not in str(e.value)
    model_file("other.safetensors", models.zimage(layers=3))  # the same name, another file
    with own_error("is of another file"):
        make_plan(pack, strategy, "other.safetensors", linked)


def test_percentiles_the_wrong_way_round(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_of(pack), "probe", lambda *_, **__: pytest.fail("no need to read the weights for that"))
    sys.modules[pack["CalibQuantProbe"].__module__]._latest.clear()
    custom = {"thresholds": "custom", "fp8_percentile": 95.0, "keep_percentile": 80.0, "kurtosis_keep": 8.0}
    for ask in (
        lambda: make_plan(pack, {**PERCENTILES, "fp8_percentile": 95.0}),
        lambda: run_probe(pack, thresholds=custom),
    ):
        with own_error("^fp8_percentile must not exceed keep_percentile$"):
            ask()


# --- what is said about it


def described(inputs: list[Any]) -> Iterator[tuple[str, str | None]]:
    """(id, tooltip) of inputs, those of a DynamicCombo's options included."""
    for entry in inputs:
        yield entry.id, entry.tooltip
        for option in getattr(entry, "options", None) or []:
            yield from described(getattr(option, "inputs", []))


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_input_and_output_is_explained(pack: Pack, node_id: str) -> None:
    schema = pack[node_id].GET_SCHEMA()
    page = (models.ROOT / "js" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    explained = [*described(schema.inputs), *((o.display_name or o.id, o.tooltip) for o in schema.outputs)]
    assert {"probe", "fp8_percentile", "keep_percentile"} <= {name for name, _ in explained}
    for name, tooltip in explained:
        assert tooltip and len(tooltip) > 10, name
        assert f"**{name}**" in page, f"{node_id}.md does not explain {name}"
    for heading in ("## Inputs", "## Output", "## Example", "## What goes wrong"):
        assert heading in page


# --- through a real server, and a browser


@pytest.fixture(scope="module")
def deep(server: Server) -> Iterator[str]:
    """A model of 30 blocks, known to the server; types differ in their errors as a trained model's do."""
    tensors = models.zimage(layers=30)
    for i, key in enumerate(k for k, t in tensors.items() if t.dim() == 2):
        rows = torch.linspace(-1, 1, tensors[key].shape[0])[:, None] * (i % 7) / 3
        tensors[key] = (tensors[key].float() * torch.exp2(rows)).to(torch.bfloat16)
    path = models.save(server.base_dir / "models" / "diffusion_models" / "deep.safetensors", tensors)
    yield path.name
    path.unlink()


@pytest.fixture(scope="module")
def even(server: Server) -> Iterator[str]:
    """A model whose layers are all drawn from one Gaussian."""
    folder = server.base_dir / "models" / "diffusion_models"
    path = models.save(folder / "even.safetensors", models.zimage(dim=512, ffn=1024, layers=3))
    yield path.name
    path.unlink()


def graph(probe_name: str, plan_name: str, **strategy: Any) -> dict[str, Any]:
    probing = {"model_name": probe_name, "compat": False, "thresholds": "family"}
    strategy = {f"strategy.{key}" if key != "strategy" else key: value for key, value in strategy.items()}
    return {
        "1": {"class_type": "CalibQuantProbe", "inputs": probing},
        "2": {"class_type": "CalibQuantPlan", "inputs": {"model_name": plan_name, "probe": ["1", 0], **strategy}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }


@pytest.mark.parametrize("strategy", [PERCENTILES, KEEP_RATIO], ids=lambda s: s["strategy"])
def test_probe_and_plan_through_a_server(server: Server, deep: str, strategy: dict[str, Any]) -> None:
    outputs = server.post(graph(deep, deep, **strategy))["outputs"]
    layers = by_name(outputs["1"]["calibquant_probe"][0])
    assert len(layers) == 197 and layers["layers.29.attention.qkv"]["errors"][0][0] > 0
    assert outputs["1"]["text"][0].startswith("Z-Image: 197 layers")
    assert outputs["2"]["text"][0].startswith("Z-Image: ") and "BF16" in outputs["2"]["text"][0]


def test_another_files_probe_is_a_single_line_on_the_node(server: Server, deep: str) -> None:
    with pytest.raises(ServerError, match=r"^node 2 \(CalibQuantPlan\): [^\n]*the linked probe is of another file"):
        server.post(graph(deep, MODEL, **KEEP_RATIO))


@pytest.mark.parametrize(("name", "value"), [("ratio", 1.5), ("base", "nvfp2")])
def test_bad_value_is_refused(server: Server, deep: str, name: str, value: object) -> None:
    prompt = graph(deep, deep, **{**KEEP_RATIO, name: value})
    del prompt["1"], prompt["2"]["inputs"]["probe"]  # else the probe, an output of its own, would be run all the same
    with pytest.raises(ServerError, match=rf"prompt refused \(400\).*{name}"):
        server.submit(prompt)


def test_script_and_help_are_served(server: Server) -> None:
    assert f"/extensions/{PACK_NAME}/heatmap.js" in server.get("/extensions")
    with urllib.request.urlopen(f"{server.url}/extensions/{PACK_NAME}/docs/CalibQuantProbe.md", timeout=30) as page:
        assert page.read().startswith(b"# Probe Model Weights")


def test_heatmap_in_both_renderers(server: Server, deep: str, even: str) -> None:
    command = ["node", str(SCRIPTS / "check_heatmap.mjs"), server.url, deep, even]
    done = subprocess.run(command, env=browser_environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail()}"
    lines = done.stdout.splitlines()
    assert len(lines) == 42 and all(line.startswith("ok ") for line in lines), done.stdout
