"""Damaged inputs of every kind: one clear line, through every door; and the short form of benchmarks/fuzz.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import models
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration, promptset
from quant_core.files.checkpoint import Checkpoint
from quant_core.files.markers import declared_formats
from quant_core.files.text import parse_json
from quant_core.models.source import Source
from quant_core.planning import plan
from quant_core.planning.recipes import make_plan
from quant_core.reports import describe

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
SHIPPED = models.ROOT / "workflows"
LAYER = "blocks.0.self_attn.q"
WIDTH = 128  # of its inputs

# --- one reader of JSON

BAD_JSON = {
    "too deep for the parser": "[" * 200_000,
    "deep": "[" * 200 + "]" * 200,
    "endless number": "9" * 5000,
    "long number": "9" * 30,
    "infinity": "Infinity",
    "overflow": "1e999",
    "nan": "NaN",
    "half a character": r'"\ud800"',
    "key twice": '{"a": 1, "a": 2}',
    "no JSON": "{",
}


@pytest.mark.parametrize("fault", BAD_JSON)
def test_damaged_json_is_one_clear_error_at_every_door(fault: str, tmp_path: Path) -> None:
    bad = BAD_JSON[fault]
    with pytest.raises(CalibQuantError, match=r"^x is damaged \(.+\): mend it$"):
        parse_json(f'{{"layers": {bad}}}', "x is damaged", "mend it")
    file = tmp_path / "m.safetensors"

    def header(key: str, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        return models.save(file, tensors or models.zimage(), {key: f'{{"layers": {bad}}}'})

    def written(name: str) -> Path:
        (tmp_path / name).write_text(f'{{"weight_map": {bad}, "format_version": {bad}}}')
        return tmp_path / name

    config = models.zimage() | {
        "layers.0.attention.out.comfy_quant": torch.tensor(list(bad.encode()), dtype=torch.uint8)
    }
    doors: list[Callable[[], object]] = [
        lambda: describe.inspect(header("_quantization_metadata")),
        lambda: describe.inspect(header("x", config)),
        lambda: describe.inspect(written("m.safetensors.index.json")),
        lambda: calibration.load(header(calibration.METADATA_KEY)),
        lambda: promptset.load(header(promptset.METADATA_KEY)),
        lambda: plan.load(written("plan.json")),
    ]
    for door in doors:
        with pytest.raises(CalibQuantError) as caught:
            door()
        assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()
    assert describe.inspect(header("calibquant"))["provenance"] is None


def test_a_number_that_is_none_is_named_by_its_place() -> None:
    with pytest.raises(CalibQuantError, match=r"p: is no plan \(layers / blocks\.0 / input_scale is NaN, no number\)"):
        plan.from_json('{"size": 1, "layers": {"blocks.0": {"input_scale": NaN}}}', "p")


def test_an_error_is_one_printable_line() -> None:
    assert str(CalibQuantError("layer a\nb\x1b[2J\udc80 größer")) == r"layer a\nb\x1b[2J\udc80 größer"


# --- files that are well formed and make no sense


def changed(path: Path, target: Path, key: str, tensor: torch.Tensor | None) -> Path:
    """A copy of a file with one tensor replaced, or without it."""
    with Checkpoint(path) as file:
        metadata = file.metadata
    tensors = load_file(path)
    assert key in tensors
    save_file(
        {k: tensor if k == key else t for k, t in tensors.items() if k != key or tensor is not None}, target, metadata
    )
    return target


INF = torch.full((WIDTH,), torch.inf)
BAD_CALIBRATION: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "amax is Inf": (f"{LAYER}.input_amax", INF, "input_amax has NaN or Inf"),
    "amax is NaN": (f"{LAYER}.input_amax", INF * 0, "input_amax has NaN or Inf"),
    "amax is negative": (f"{LAYER}.input_amax", -torch.ones(WIDTH), "input_amax has negative values"),
    "amax is short": (f"{LAYER}.input_amax", torch.ones(5), "differ in length"),
    "amax is of another kind": (f"{LAYER}.input_amax", torch.ones(WIDTH).int(), "input_amax is I32"),
    "amax is missing": (f"{LAYER}.input_amax", None, "input_amax is missing"),
    "count is a vector": (f"{LAYER}.count", torch.ones(2, dtype=torch.int64), "count is I64"),
    "count is zero": (f"{LAYER}.count", torch.tensor(0), "0 rows"),
    "rows of another width": (f"{LAYER}.rows", torch.ones(2, 3).bfloat16(), "2 rows and"),
    "rows without keys": (f"{LAYER}.row_keys", None, "row_keys is missing"),
    "rows are NaN": (f"{LAYER}.rows", torch.full((4, WIDTH), torch.nan).bfloat16(), "rows has NaN or Inf"),
}


@pytest.mark.parametrize("fault", BAD_CALIBRATION)
def test_a_damaged_calibration_is_refused_by_the_name_of_its_layer(fault: str, tmp_path: Path) -> None:
    key, tensor, message = BAD_CALIBRATION[fault]
    path = changed(SHIPPED / "calibrations" / "digits.calibration.safetensors", tmp_path / "c.safetensors", key, tensor)
    with pytest.raises(CalibQuantError, match=rf"c\.safetensors: .* layer {re.escape(LAYER)}: .*{message}"):
        calibration.load(path)


@pytest.mark.parametrize(
    "info", [[], {}, {"groups": []}, {"groups": {"a": "b"}}, {"runs": 5}, {"sigmas": {"1": "x"}}, {"cond_rows": -1}]
)
def test_a_calibration_header_of_the_wrong_kind_is_refused(info: object, tmp_path: Path) -> None:
    base = {"format_version": calibration.FORMAT_VERSION, "groups": {}}
    text = json.dumps({**base, **info} if isinstance(info, dict) and info else info)
    path = models.save(tmp_path / "c.safetensors", {"x": torch.ones(1)}, {calibration.METADATA_KEY: text})
    with pytest.raises(CalibQuantError, match=r"c\.safetensors: is no calibration of this tool: .*: calibrate again"):
        calibration.load(path)


BAD_QUANTIZED: dict[str, tuple[str, str, torch.Tensor | None]] = {
    "scale of another dtype": ("fp8", "weight_scale", torch.ones((), dtype=torch.int64)),
    "two scales": ("fp8", "weight_scale", torch.ones(2)),
    "no scale": ("mxfp8", "weight_scale", None),
    "scales of another shape": ("mxfp8", "weight_scale", torch.ones(3, 5, dtype=torch.uint8)),
    "no second scale": ("nvfp4", "weight_scale_2", None),
    "scales of another width": ("nvfp4", "weight_scale", torch.ones(128, 4)),
    "codes of another dtype": ("nvfp4", "weight", torch.ones(64, 64)),
    "codes of another shape": ("int8", "weight", torch.ones(64, 5, dtype=torch.int8)),
    "scale in float64": ("int8", "weight_scale", torch.ones(64, 1, dtype=torch.float64)),
}


@pytest.mark.parametrize("fault", BAD_QUANTIZED)
def test_compare_refuses_a_damaged_layer_by_name(fault: str, tmp_path: Path) -> None:
    recipe, name, tensor = BAD_QUANTIZED[fault]
    file, sound = models.save(tmp_path / "m.safetensors", models.zimage()), tmp_path / "sound.safetensors"
    with Source(file) as source:
        jobs.quantize(source, make_plan(source, recipe), sound, device="cpu")
        damaged = changed(sound, tmp_path / "bad.safetensors", f"layers.0.attention.out.{name}", tensor)
        with pytest.raises(CalibQuantError, match=rf"bad\.safetensors: .*layers\.0\.attention\.out.*{name}"):
            jobs.compare(source, damaged)


@pytest.mark.parametrize("elements", [0, 2])
def test_a_scale_input_that_is_no_number_is_refused(elements: int, tmp_path: Path) -> None:
    model = models.legacy(models.zimage())
    tensors = model.tensors | {"layers.0.attention.out.scale_input": torch.ones(elements)}
    path = models.save(tmp_path / "old.safetensors", tensors)
    with pytest.raises(
        CalibQuantError, match=rf"layer layers\.0\.attention\.out: .*scale_input has {elements} elements"
    ):
        jobs.convert(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("options", [5, {"a": 1}, [5] * 10, [[]] * 10, [{}] * 3])
def test_prompt_options_of_the_wrong_kind_are_refused(options: object, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    header = json.dumps({"prompts": [str(i) for i in range(10)], "options": options})
    models.save(path, load_file(SHIPPED / "promptsets" / "digits.safetensors"), {promptset.METADATA_KEY: header})
    with pytest.raises(CalibQuantError, match=r"p\.safetensors: is no prompt set \(it must have one object"):
        promptset.load(path)


def test_a_format_that_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    layers = models.header_metadata({"layers.0.attention.out": {"format": "\x1b[2Jfp8"}})
    with Checkpoint(models.save(tmp_path / "m.safetensors", models.zimage(), layers)) as file:
        with pytest.raises(CalibQuantError, match="without a format"):
            declared_formats(file)


# --- mutations and kills by the hundred


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    pytest.importorskip("resource", reason="POSIX only")
    from benchmarks import fuzz

    return fuzz


def test_mutated_headers_end_in_clean_errors(fuzz: ModuleType, tmp_path: Path) -> None:
    (counts,) = fuzz.headers(400, tmp_path, seed=1)
    assert counts.failures == [] and counts.outcomes["refused"] > 300 and counts.outcomes["accepted"]


def test_mutated_files_end_in_clean_errors(fuzz: ModuleType, tmp_path: Path) -> None:
    for counts in fuzz.files(400, tmp_path, seed=1):
        assert counts.failures == [] and counts.outcomes["refused"] > 40 and counts.outcomes["accepted"], counts


@POSIX
def test_killed_runs_leave_the_name_free_or_the_file_whole() -> None:
    """In a process of its own: the runs are forks of it."""
    command = [sys.executable, "benchmarks/fuzz.py", "--headers", "0", "--files", "0", "--kills", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT, env=environment)
    assert done.returncode == 0 and done.stdout.count(" 0 failures") == 3, done.stdout + done.stderr
