"""Load Split Model and Error-Correction LoRA in a real ComfyUI: branches that stay whatever comes after them."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core import jobs
from quant_core.evidence import calibration
from quant_core.models import lora
from quant_core.models.source import Source
from quant_core.planning import recipes

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
PROMPTS = models.ROOT / "workflows" / "promptsets" / "digits.safetensors"
CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"
MAIN, BRANCH = "demo.split.safetensors", "demo.split.lora.safetensors"
RANK, STEPS, SEED = 16, 3, 7
pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def pack(comfy: Path) -> dict[str, Any]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return {name: nodes.NODE_CLASS_MAPPINGS[f"CalibQuant{name}"] for name in ("LoadSplit", "ErrorLora")}


@pytest.fixture(autouse=True)
def _as_in_a_graph() -> Iterator[None]:
    with torch.inference_mode():
        yield
        importlib.import_module("comfy.model_management").unload_all_models()


@pytest.fixture(scope="module", params=["nvfp4", "mxfp8"])
def split(request: pytest.FixtureRequest, comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of the demo model by plain SVD: R = W - BA quantized, BA beside it. The folder of both."""
    tensors, factors = load_file(DEMO), {}
    with Source(DEMO) as source:
        plan = recipes.make_plan(source, request.param)
        for layer in plan.quantized():
            weight = tensors[f"{layer}.weight"].float()
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            up, down = lora.balanced(u[:, :RANK] * s[:RANK], v[:RANK])
            factors |= dict(zip(lora.keys(layer), (up.contiguous(), down.contiguous()), strict=True))
            tensors[f"{layer}.weight"] = weight - up.float() @ down.float()
        header = source.checkpoint.metadata
    folder = tmp_path_factory.mktemp("split")
    save_file(factors, folder / BRANCH)
    models.save(folder / "rest.safetensors", tensors, header)
    with Source(folder / "rest.safetensors") as rest:
        jobs.quantize(rest, plan, folder / "q.safetensors")
    sha256 = hashlib.sha256((folder / BRANCH).read_bytes()).hexdigest()
    _restamp(folder / "q.safetensors", folder / MAIN, {"lora": BRANCH, "sha256": sha256})
    return folder


def _restamp(made: Path, target: Path, split: dict[str, str]) -> None:
    from safetensors import safe_open

    with safe_open(made, "pt") as file:
        header = file.metadata()
    header["calibquant"] = json.dumps({**json.loads(header["calibquant"]), "split": split})
    save_file(load_file(made), target, header)


@pytest.fixture
def installed(split: Path, comfy: Path) -> Iterator[Path]:
    """Main file and LoRA where ComfyUI has them; the folder ``models``."""
    folder = comfy / "models"
    places = {MAIN: folder / "diffusion_models" / MAIN, BRANCH: folder / "loras" / BRANCH}
    for name, place in places.items():
        place.write_bytes((split / name).read_bytes())
    yield folder
    for place in (*places.values(), folder / "diffusion_models" / BRANCH):
        place.unlink(missing_ok=True)


def user_lora(folder: Path, name: str, seed: int) -> dict[str, torch.Tensor]:
    """A user's LoRA file in models/loras; what it adds to each weight."""
    generator, tensors, deltas = torch.Generator().manual_seed(seed), {}, {}
    for key, weight in load_file(DEMO).items():
        if "attn" in key and key.endswith(".weight") and weight.dim() == 2:
            up, down = (
                torch.randn(shape, generator=generator) * 0.06 for shape in ((len(weight), 4), (4, weight.shape[1]))
            )
            layer = key.removesuffix(".weight")
            tensors |= dict(zip(lora.keys(layer), (up, down), strict=True))
            deltas[layer] = up @ down
    save_file(tensors, folder / "loras" / name)
    return deltas


def load(pack: dict[str, Any], name: str = MAIN) -> Any:
    return pack["LoadSplit"].PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(model_name=name).result[0]


def stock(model: Any, name: str, loader: str = "LoraLoaderBypassModelOnly") -> Any:
    """With a LoRA by a stock loader."""
    known = {**vars(importlib.import_module("nodes")), **vars(importlib.import_module("comfy_extras.nodes_lora_debug"))}
    return known[loader]().load_lora_model_only(model, name, 1.0)[0]


def sample(model: Any) -> torch.Tensor:
    comfy_sample, prompts = importlib.import_module("comfy.sample"), load_file(PROMPTS)
    context, latent = torch.cat([prompts[f"{digit}.cond"] for digit in range(3)]), torch.zeros(1, 16, 1, 8, 8)
    noise = comfy_sample.prepare_noise(latent, SEED).expand(3, *latent.shape[1:])
    cond = [[context, {}]]
    how = (STEPS, 1.0, "euler", "simple", cond, cond, torch.zeros_like(noise))
    return comfy_sample.sample(model, noise, *how, disable_pbar=True, seed=SEED).float().cpu()


def reference(split: Path, deltas: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """What the same model draws with every low-rank part in float32 weights, no branch and no LoRA loader at work."""
    from quant_core.jobs.finished import QuantizedFile

    tensors, branch = load_file(DEMO), load_file(split / BRANCH)
    with QuantizedFile(split / MAIN) as file:
        for layer in file.configs:
            up, down = (branch[key].float() for key in lora.keys(layer))
            weight = torch.cat(list(file.rows(layer, tuple(tensors[f"{layer}.weight"].shape)))) + up @ down
            tensors[f"{layer}.weight"] = weight + sum(delta.get(layer, 0) for delta in deltas)
    with Source(DEMO) as source:
        header = source.checkpoint.metadata
    models.save(split / "reference.safetensors", tensors, header)
    return sample(importlib.import_module("comfy.sd").load_diffusion_model(str(split / "reference.safetensors")))


def close(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).square().sum() / expected.square().sum()).item()


def test_a_split_model_is_drawn_with_its_branch(pack: dict[str, Any], split: Path, installed: Path) -> None:
    expected = reference(split, [])
    assert close(sample(load(pack)), expected) < 1e-4
    plain = importlib.import_module("comfy.sd").load_diffusion_model(str(split / MAIN))
    assert close(sample(plain), expected) > 0.5  # garbage without it: the branch carries most of the weights


@pytest.mark.parametrize("order", [["one"], ["one", "two"], ["two", "one"]])
def test_user_loras_by_the_stock_bypass_loader_keep_the_branch(
    order: list[str], pack: dict[str, Any], split: Path, installed: Path
) -> None:
    """The last of several stock bypass LoRAs replaces those before it; ours stays, loaded and unloaded and again."""
    management = importlib.import_module("comfy.model_management")
    deltas = {name: user_lora(installed, f"{name}.safetensors", seed) for seed, name in enumerate(("one", "two"))}
    bare = load(pack)
    model = bare
    for name in order:
        model = stock(model, f"{name}.safetensors")
    expected, without = reference(split, [deltas[order[-1]]]), reference(split, [])
    assert close(expected, without) > 1e-3  # the LoRA shows
    first = sample(model)
    assert close(first, expected) < 1e-4
    assert torch.equal(sample(model), first)
    assert close(sample(bare), without) < 1e-4  # its clone takes the hooks over, and gives them back
    assert torch.equal(sample(model.clone()), first)
    management.unload_all_models()
    assert torch.equal(sample(model), first)
    turned = model.clone()
    turned.injections = dict(reversed(turned.injections.items()))  # ours injected last, and ejected last
    assert torch.equal(sample(turned), first)
    management.unload_all_models()
    assert torch.equal(sample(turned), first)
    assert torch.equal(sample(model), first)


def test_no_hook_is_left_when_the_model_is_unloaded(pack: dict[str, Any], installed: Path) -> None:
    model = load(pack)
    count = lambda: sum(len(m._forward_hooks) for m in model.model.modules())  # noqa: E731
    assert count() == 0
    sample(model)
    assert count() == len(load_file(installed / "loras" / BRANCH)) // 2
    importlib.import_module("comfy.model_management").unload_all_models()
    assert count() == 0


def test_an_ordinary_lora_after_it_keeps_the_branch(pack: dict[str, Any], split: Path, installed: Path) -> None:
    """It requantizes the layers it patches, as on every quantized model: larger error, no garbage."""
    delta = user_lora(installed, "one.safetensors", 0)
    merged = stock(load(pack), "one.safetensors", "LoraLoaderModelOnly")
    assert 1e-6 < close(sample(merged), reference(split, [delta])) < 0.2


def test_the_stock_bypass_loader_takes_both_from_one_file(pack: dict[str, Any], split: Path, installed: Path) -> None:
    delta = user_lora(installed, "one.safetensors", 0)
    both, plain = installed / "loras" / "both.safetensors", importlib.import_module("comfy.sd").load_diffusion_model
    jobs.concat_loras(
        [(installed / "loras" / name, s) for name, s in ((BRANCH, 1), ("one.safetensors", 0.7))], both, True
    )
    expected = reference(split, [{layer: 0.7 * added for layer, added in delta.items()}])
    assert close(sample(stock(plain(str(split / MAIN)), both.name)), expected) < 1e-4


def test_the_lora_is_also_found_beside_the_main_file(pack: dict[str, Any], installed: Path) -> None:
    (installed / "loras" / BRANCH).rename(installed / "diffusion_models" / BRANCH)
    assert load(pack).get_injections("calibquant_split")
    assert BRANCH not in pack["LoadSplit"].GET_SCHEMA().inputs[0].options


def test_problems_name_both_files_and_the_remedy(pack: dict[str, Any], split: Path, installed: Path) -> None:
    branch = installed / "loras" / BRANCH
    before = pack["LoadSplit"].fingerprint_inputs(model_name=MAIN)
    branch.write_bytes(branch.read_bytes()[:-1] + b"\xff")
    message = rf"wrong without its LoRA {BRANCH}, which is another one.*: put the one made with it into.* \({MAIN}\)$"
    with pytest.raises(Exception, match=message):
        load(pack)
    branch.unlink()
    assert pack["LoadSplit"].fingerprint_inputs(model_name=MAIN) != before
    with pytest.raises(Exception, match=rf"wrong without its LoRA {BRANCH}, which cannot be found: put .* \({MAIN}\)$"):
        load(pack)
    with pytest.raises(Exception, match=rf"is no split model: use Load Diffusion Model \({MODEL}\)$"):
        load(pack, MODEL)


def test_a_lora_of_another_model_is_refused(pack: dict[str, Any], split: Path, installed: Path) -> None:
    save_file({key: torch.ones(4, 4) for key in lora.keys("blocks.99.nowhere")}, installed / "loras" / BRANCH)
    sha256 = hashlib.sha256((installed / "loras" / BRANCH).read_bytes()).hexdigest()
    _restamp(split / MAIN, installed / "diffusion_models" / MAIN, {"lora": BRANCH, "sha256": sha256})
    with pytest.raises(Exception, match=r"no layer for diffusion_model\.blocks\.99\.nowhere.* of its LoRA"):
        load(pack)


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_error_lora_by_the_stock_bypass_loader_draws_closer(
    calibrated: bool, pack: dict[str, Any], comfy: Path, tmp_path: Path
) -> None:
    from types import SimpleNamespace

    quantized = comfy / "models" / "diffusion_models" / "nearest.safetensors"
    with Source(DEMO) as source:
        jobs.quantize(source, recipes.make_plan(source, "nvfp4"), quantized, overwrite=True)
    seen = calibration.load(CALIBRATION)
    inputs = {"calibration": SimpleNamespace(current=lambda: seen)} if calibrated else {}
    node = pack["ErrorLora"].PREPARE_CLASS_CLONE(None)
    done = node.EXECUTE_NORMALIZED(
        model_name=MODEL, quantized_name=quantized.name, rank=32, filename_prefix="test/error", **inputs
    )
    assert "60 layers of 60 corrected" in done.ui.as_dict()["text"][0]
    sd = importlib.import_module("comfy.sd")
    expected, plain = sample(sd.load_diffusion_model(str(DEMO))), sd.load_diffusion_model(str(quantized))
    before, after = close(sample(plain), expected), close(sample(stock(plain, done.result[0])), expected)
    assert after < 0.6 * before
