"""The map on Quantization Plan: edits through a server, its scripts by node's test runner, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from comfy_env import Server, ServerError
from test_browser import SCRIPTS, browser_environment

QKV = "layers.0.attention.qkv"
BITS = {
    "strategy": "bits",
    "strategy.bits": 6.0,
    "strategy.gpu": "blackwell",
    "strategy.formats": "nvfp4,mxfp8",
    "strategy.weighting": "auto",
    "strategy.tie": False,
    "strategy.max_slow": 1.0,
}
RECIPE = {"strategy": "recipe", "strategy.recipe": "nvfp4"}


@pytest.fixture(scope="module")
def model(server: Server) -> Iterator[str]:
    """Known to the server; its layers differ in their errors as a trained model's do."""
    tensors = models.zimage(layers=6)
    for i, key in enumerate(k for k, t in tensors.items() if t.dim() == 2):
        rows = torch.linspace(-1, 1, tensors[key].shape[0])[:, None] * (i % 7) / 3
        tensors[key] = (tensors[key].float() * torch.exp2(rows)).to(torch.bfloat16)
    path = models.save(server.base_dir / "models" / "diffusion_models" / "edited.safetensors", tensors)
    yield path.name
    path.unlink()


def run(server: Server, model: str, strategy: dict[str, Any], edits: str) -> dict[str, Any]:
    """The output of a plan."""
    inputs = {"model_name": model, **strategy, "edits": edits}
    sink = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}
    return server.post({"1": {"class_type": "CalibQuantPlan", "inputs": inputs}, "2": sink})["outputs"]["1"]


def chosen(document: dict[str, Any]) -> dict[str, str]:
    rows = (dict(zip(document["fields"], row, strict=True)) for row in document["layers"])
    return {row["name"]: document["options"][row["chosen"]][0] for row in rows}


@pytest.mark.core
@pytest.mark.parametrize("strategy", [BITS, RECIPE], ids=lambda s: s["strategy"])
def test_a_plan_follows_its_edits(server: Server, model: str, strategy: dict[str, Any]) -> None:
    plain = run(server, model, strategy, "")
    before = chosen(plain["calibquant_plan"][0])
    wanted = {QKV: "bf16", "layers.5.feed_forward.w2": "mxfp8"}
    edited = run(server, model, strategy, json.dumps(wanted))
    document = edited["calibquant_plan"][0]
    after = chosen(document)
    assert {name: after[name] for name in wanted} == wanted != {name: before[name] for name in wanted}
    assert document["edits"] == wanted and "2 layers set by hand" in edited["text"][0]
    if strategy is RECIPE:
        assert {**after, **wanted} == {**before, **wanted}
        assert document["before"] == {name: before[name] for name in wanted} and "curve" not in document
    else:
        assert abs(document["bits"] - 6.0) < 0.1 and document["amount"] == 6.0  # the rest made room


@pytest.mark.core
@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ("{", r"edits are no JSON \(.*\): write "),
        ('{"x_embedder": "mxfp8"}', r"layer x_embedder: cannot be set by hand: embedder.*\(edited\.safetensors\)"),
        (json.dumps({QKV: "w4a8"}), "w4a8 is not among the formats of this plan: add it to formats"),
    ],
)
def test_edits_that_cannot_be_are_one_line_on_the_node(server: Server, model: str, edits: str, says: str) -> None:
    with pytest.raises(ServerError, match=rf"^node 1 \(CalibQuantPlan\): [^\n]*{says}"):
        run(server, model, BITS, edits)


@pytest.mark.core
def test_edits_are_an_input_that_no_widget_shows(server: Server) -> None:
    kind, told = server.get("/object_info/CalibQuantPlan")["CalibQuantPlan"]["input"]["optional"]["edits"]
    assert kind == "STRING" and told["hidden"] and told["default"] == ""


def test_the_parts_that_need_no_page() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    tests = models.ROOT / "tests" / "js" / "plan_map.test.mjs"
    done = subprocess.run([node, "--test", str(tests)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"pass (\d+)", done.stdout)[1]) >= 10, done.stdout


def test_the_map_is_edited_in_both_renderers(server: Server, model: str) -> None:
    command = ["node", str(SCRIPTS / "check_plan_map.mjs"), server.url, model]
    done = subprocess.run(command, env=browser_environment(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail()}"
    lines = done.stdout.splitlines()
    assert len(lines) == 60 and all(line.startswith("ok ") for line in lines), done.stdout
