"""The demo: its built-in sampler draws what ComfyUI draws, and the whole job runs without a ComfyUI."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import models
import pytest
import torch
from comfy_env import SHIMS, find_comfyui, install_shims
from safetensors.torch import load_file

from quant_core import jobs, locate
from quant_core.demo import drawing, run, sampler, wan
from quant_core.demo.results import Made
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.models.source import Source
from quant_core.planning import recipes, splitting, targets

DEMO = models.ROOT / run.MODEL
CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"
SEEDS = range(1000, 1001)
EXACT = 1e-9  # of the sum of squares: float32 sums in another order
# One input in a million is rounded to the other side, and what follows differs: so do two runs of one sampler that
# differ in the size of a batch (5e-6 for INT8). The same holds for the scales of MXFP8, which are powers of two.
ROUNDED = {"int8": 1e-4, "w4a8": 1e-4, "w6a8": 1e-4}
NATIVE = {"nvfp4": EXACT, "mxfp8": 1e-4, "fp8": EXACT, "fp8-unscaled": EXACT}  # after one step


@pytest.fixture(scope="module")
def stock(comfy: Path) -> ModuleType:
    """``nodes/sample_digits.py``, with ComfyUI in this process."""
    spec = importlib.util.spec_from_file_location("sample_digits", models.ROOT / "nodes" / "sample_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn_by_comfyui(stock: ModuleType, file: Path, steps: int) -> torch.Tensor:
    prompts = load_file(stock.PROMPT_SET)
    context = torch.cat([prompts[f"{digit}.cond"] for digit in range(10)])
    with torch.inference_mode():
        return stock.sample(stock._load(file), context, SEEDS, steps)


def quantized(recipe: str, folder: Path, calibrated: bool = False) -> Path:
    if recipe == "16-bit":
        return DEMO
    with Source(DEMO) as source:
        plan = recipes.make_plan(source, recipe)
        if any(target.missing(find_comfyui()) for target in targets.needs(plan)):
            pytest.skip("this ComfyUI cannot load the format")
        seen = calibration.load(CALIBRATION)
        plan = recipes.calibrated(source, plan, seen) if calibrated else plan
        jobs.quantize(source, plan, folder / "q.safetensors", rounding="nearest")
    return folder / "q.safetensors"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).double().square().sum() / expected.double().square().sum()).item()


@pytest.mark.core
@pytest.mark.parametrize("recipe", ["16-bit", "nvfp4", "mxfp8", "fp8", "fp8-unscaled", *ROUNDED])
def test_latents_are_those_of_comfyui(stock: ModuleType, recipe: str, tmp_path: Path) -> None:
    file = quantized(recipe, tmp_path)
    expected = drawn_by_comfyui(stock, file, sampler.STEPS)
    assert relative_error(sampler.sample(wan.load(file), SEEDS), expected) < ROUNDED.get(recipe, EXACT)


@pytest.mark.core
@pytest.mark.parametrize("recipe", NATIVE)
def test_a_card_that_rounds_inputs_is_emulated(
    stock: ModuleType, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy_kitchen

    for name in ("nvfp4", "mxfp8", "fp8"):  # so that they come back
        name = f"supports_{name}_compute"
        monkeypatch.setattr(comfy.model_management, name, getattr(comfy.model_management, name))
    for name in ("scaled_mm_nvfp4", "scaled_mm_mxfp8"):
        monkeypatch.setattr(comfy_kitchen, name, getattr(comfy_kitchen, name))
    stock.emulate_native()
    file = quantized(recipe, tmp_path, calibrated=True)
    expected = drawn_by_comfyui(stock, file, steps=1)
    found, exact = (sampler.sample(wan.load(file, gpu), SEEDS, steps=1) for gpu in ("blackwell", "turing"))
    assert relative_error(found, expected) < NATIVE[recipe] < relative_error(exact, expected) / 3


def test_a_split_file_is_drawn_with_its_branch(tmp_path: Path) -> None:
    seen = calibration.load(CALIBRATION)
    with Source(DEMO) as source:
        plain = recipes.make_plan(source, "nvfp4")
        for name, plan in (("q", plain), ("q.split", splitting.split(source, plain, seen, "16"))):
            jobs.quantize(source, plan, tmp_path / f"{name}.safetensors", calibration=seen)
    expected = sampler.sample(wan.load(DEMO), SEEDS, steps=1)
    files = (tmp_path / "q.safetensors", tmp_path / "q.split.safetensors")
    plain, split = (relative_error(sampler.sample(wan.load(f, "blackwell"), SEEDS, steps=1), expected) for f in files)
    assert split < plain / 2


def test_another_family_is_refused(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.native(models.zimage()).tensors)
    with pytest.raises(CalibQuantError, match=r"m.safetensors: has no .*: the built-in sampler draws with Wan models"):
        wan.load(path)


def test_the_same_seed_gives_the_same_bits() -> None:
    model = wan.load(DEMO)
    one, two = (sampler.sample(model, SEEDS, steps=3) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, sampler.sample(model, [SEEDS[0] + 1], steps=3))


# --- the whole job


@pytest.fixture
def no_comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(locate, "BROUGHT", tmp_path / "brought")
    assert locate.find_comfyui() is None


ROW = re.compile(r"^(\S.*?) +\d+ +(?:-|\d\S+) +([\d.]+) % +([\d.]+) +([\d.]+)", re.MULTILINE)


def rows_of(text: str) -> dict[str, tuple[float, float, float]]:
    """Name -> share read, SSIM, SSIM on RTX 50."""
    return {name: (float(read), float(ssim), float(rounded)) for name, read, ssim, rounded in ROW.findall(text)}


def test_the_whole_job_runs_without_a_comfyui(
    no_comfyui: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(recipes, "RECIPES", {"nvfp4": recipes.RECIPES["nvfp4"]})
    text = run.run(tmp_path, seeds=1)
    rows = rows_of(text)
    assert list(rows) == ["16-bit source", "nvfp4", "nvfp4-gptq"]
    assert all(read >= 80 for read, *_ in rows.values())
    assert 1 == rows["16-bit source"][1] > rows["nvfp4-gptq"][1] > rows["nvfp4"][1] > 0.95
    assert rows["nvfp4-gptq"][2] < rows["nvfp4-gptq"][1]
    assert "\ndrawn by the built-in reference sampler: 10 digits" in text
    assert text.endswith(f". Pictures: {tmp_path / 'samples.png'}")
    sheet = image.open(tmp_path / "samples.png")
    assert sheet.height > 3 * 48 and len(sheet.convert("L").getcolors()) > 100


def test_a_comfyui_that_cannot_draw_does_not_end_the_demo(tmp_path: Path) -> None:
    (tmp_path / "main.py").touch()
    made = [Made("16-bit source", DEMO, 1)]
    rows, notes = run._draw(made, tmp_path, tmp_path / "latents.npz", 1, run.Bar(1))
    assert notes[0].startswith("drawn by the built-in reference sampler (") and "not a ComfyUI checkout" in notes[0]
    assert torch.equal(rows[0].images, drawing.built_in(DEMO, 1))


@pytest.mark.core
def test_the_demo_draws_with_every_file_that_this_core_reads(tmp_path: Path) -> None:
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("ComfyUI not found: set COMFYUI_PATH")
    environment = os.environ | ({"PYTHONPATH": str(SHIMS)} if install_shims() else {})
    command = [sys.executable, "-m", "quant_core.cli", "demo", "--out", str(tmp_path), "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"drawn by {drawing.version(comfyui)} at {comfyui}: " in done.stdout
    rows = rows_of(done.stdout)
    names = {"nvfp4", "nvfp4-gptq", "mxfp8", "fp8", "int8", "fp8-unscaled", "w4a8", "w4a8-gptq", "w6a8"}
    assert {name.rstrip("*") for name in rows} == {"16-bit source", *names}
    too_new = {name.rstrip("*") for name in rows if name.endswith("*")}  # drawn by the built-in sampler
    assert too_new <= {"w4a8", "w4a8-gptq", "w6a8"}
    assert ("w4a8" in too_new) != ("asym_w4a8_int8" in (comfyui / "comfy" / "quant_ops.py").read_text("utf-8"))
    for name, (read, ssim, _) in rows.items():
        assert read >= 80 and ssim > 0.95, name
