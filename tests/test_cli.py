"""The command line as a user meets it: a process, its exit code and its two streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from keys import make_keys

from quant_core import __version__, cli, jobs
from quant_core.files import disk

LAYER = "layers.0.attention.out"
DEMO = models.ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
CALIBRATION = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of ``calibquant ARGUMENTS`` in a process of its own."""
    command = [sys.executable, "-m", "quant_core.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=models.ROOT)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """The same in this process: a tenth of the time."""
    try:
        returned = cli.main([str(a) for a in arguments])
    except SystemExit as left:  # argparse
        returned = left.code
    out, err = capsys.readouterr()
    assert returned == code, err
    return out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


# --- folded smoothing


def test_a_folded_file_needs_a_calibration_once(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, wanted = tmp_path / "p.json", ["--recipe", "nvfp4", "--smooth", "fold"]
    for command, target in (("plan", plan), ("quantize", output)):
        assert "--smooth fold needs --calibration" in call(capsys, command, DEMO, *wanted, "-o", target, code=2)[1]
    told, _ = call(capsys, "plan", DEMO, *wanted, "--calibration", CALIBRATION, "-o", plan)
    assert "folded smoothing: " in told and "LoRAs made for the original model do not fit" in told
    again = ["quantize", DEMO, "--plan", plan, "-o", output, "--rounding", "nearest"]
    assert "--smooth is for making a plan" in call(capsys, *again, "--smooth", "none", code=2)[1]
    made = json.loads(call(capsys, *again, "--verify", "--json")[0])
    assert made["folds"].keys() == json.loads(plan.read_text())["folds"].keys()
    assert all(fold.keys() == {"a", "b", "before", "after"} for fold in made["folds"].values())
    assert "modules folded: LoRAs made for the original" in call(capsys, "inspect", output)[0]
    compared = json.loads(call(capsys, "compare", DEMO, output, "--calibration", CALIBRATION, "--json")[0])
    found = {layer["name"]: layer["error"] for layer in compared["layers"]}
    assert found == pytest.approx({layer["name"]: layer["error"] for layer in made["layers"]}, rel=1e-3)


# --- a core that reads pre_quant_scale, or does not


@pytest.mark.parametrize("reads", [True, False])
def test_smoothing_only_for_a_core_that_reads_it(
    reads: bool, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    core = tmp_path / "ComfyUI"
    (core / "comfy").mkdir(parents=True)
    (core / "main.py").touch()
    (core / "comfy" / "quant_ops.py").write_text('"parameters": {"weight_scale"' + ', "pre_quant_scale"' * reads + "}")
    monkeypatch.setenv("COMFYUI_PATH", str(core))
    arguments = ["quantize", DEMO, "-o", output, "--recipe", "nvfp4", "--rounding", "search", "--pre-quant-scale"]
    call(capsys, *arguments, code=2)  # without a calibration
    _, err = call(capsys, *arguments, "--calibration", CALIBRATION, code=0 if reads else 1)
    assert output.exists() == reads
    if not reads:
        assert "ignores pre_quant_scale" in err and str(core) in err and err.count("\n") == 1
        return
    plan = tmp_path / "p.json"
    call(capsys, "plan", DEMO, "--recipe", "nvfp4", "--calibration", CALIBRATION, "--pre-quant-scale", "-o", plan)
    (core / "comfy" / "quant_ops.py").write_text("")  # a plan from elsewhere, for a core that cannot read its file
    again = ["quantize", DEMO, "-o", tmp_path / "no.safetensors", "--plan", plan, "--calibration", CALIBRATION]
    assert "ignores pre_quant_scale" in call(capsys, *again, code=1)[1]
    call(capsys, *again, "--pre-quant-scale", code=2)
    out, _ = call(capsys, "compare", DEMO, output, "--calibration", CALIBRATION)
    assert out.splitlines()[1].split() == ["weights", "outputs", "as", "loaded", "format", "bytes", "layer"]
    assert "blocks.0.ffn.2" in out and "as the loader runs it" in out


# --- results


def test_the_way_from_a_model_to_a_checked_file(file: Path, output: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    out, _ = run("plan", file, "--recipe", "zimage-nvfp4-mixed", "-o", plan)
    size = json.loads(plan.read_text("utf-8"))["size"]
    assert out.startswith("Z-Image, recipe zimage-nvfp4-mixed: ") and f"({size} bytes)" in out
    out, _ = run("quantize", file, "-o", output, "--plan", plan, "--verify")
    assert output.stat().st_size == size
    assert out.startswith(f"{output}\n") and out.endswith("verified: every layer's error is as reported\n")
    out, _ = run("inspect", output)
    assert "nvfp4" in out and "made by ComfyUI-CalibQuant" in out and "recipe zimage-nvfp4-mixed" in out
    out, _ = run("compare", file, output)
    assert "relative error" in out.splitlines()[0] and LAYER in out


def test_json_is_one_document_on_stdout(file: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(call(capsys, "quantize", file, "-o", output, "--recipe", "mxfp8", "--json")[0])
    assert made["recipe"] == "mxfp8" and made["bytes_after"] == output.stat().st_size
    errors = {layer["name"]: layer["error"] for layer in made["layers"]}
    compared = json.loads(call(capsys, "compare", file, output, "--json")[0])
    assert {layer["name"]: pytest.approx(layer["error"], rel=1e-4) for layer in compared["layers"]} == errors
    seen = json.loads(call(capsys, "inspect", output, "--json")[0])
    assert seen["architecture"] == "zimage" and seen["layers"][LAYER]["format"] == "mxfp8"
    assert seen["provenance"]["recipe"] == "mxfp8"


def test_convert_makes_a_file_that_can_be_inspected(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.hswq(models.sd15())
    old = models.save(tmp_path / "old.safetensors", model.tensors)
    out, _ = call(capsys, "convert", old, "-o", output)
    convolutions = sum(weight.dim() == 4 for weight in model.real.values())
    assert f"{len(model.real) - convolutions} layers" in out and f"{convolutions} other weights in 16 bit" in out
    formats = json.loads(call(capsys, "inspect", output, "--json")[0])["formats"]
    assert formats["float8_e4m3fn"] == len(model.real) - convolutions


def test_convert_to_quants_words_make_a_plan_and_come_back(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base", "nvfp4", "--custom-layers", r"\.w1", "--custom-type", "mxfp8", "--exclude-layers", "refiner"]
    plan = tmp_path / "p.json"
    out, _ = call(capsys, "plan", file, *words, "--preset", "zimage", "-o", plan, "--print-convert-to-quant")
    layers = json.loads(plan.read_text("utf-8"))["layers"]
    assert (
        layers["layers.1.feed_forward.w1"]["format"] == layers["noise_refiner.0.feed_forward.w1"]["format"] == "mxfp8"
    )
    assert layers[LAYER]["format"] == "nvfp4" and layers["noise_refiner.0.attention.qkv"]["format"] == "bf16"
    assert layers["layers.1.adaLN_modulation.0"]["format"] == "bf16"
    assert "convert_to_quant -i" in out and "--custom-type mxfp8" in out


def test_a_pattern_that_matches_nothing_is_a_warning(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = call(capsys, "plan", file, "--base", "nvfp4", "--exclude-layers", "refinre", "-o", tmp_path / "p.json")
    assert "warning: the pattern 'refinre' (excluded layer) matches no layer" in err


def test_a_calibration_that_the_plan_was_made_with_is_missed(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, calibrated = tmp_path / "p.json", ["--calibration", CALIBRATION]
    call(capsys, "plan", DEMO, "--recipe", "int8", *calibrated, "-o", plan)
    _, err = call(capsys, "quantize", DEMO, "--plan", plan, "-o", output)
    assert "warning: the plan was made with a calibration, and none is given: no GPTQ" in err
    out, err = call(capsys, "quantize", DEMO, "--recipe", "int8", *calibrated, "-o", output, "--overwrite")
    assert "warning" not in err and "output error held out (4 of 20 runs), mean of 60 layers" in out


def test_a_12_gb_file_is_inspected_from_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.save_sparse(tmp_path / "z.safetensors", make_keys.load("zimage"))
    seen = json.loads(call(capsys, "inspect", path, "--json")[0])
    assert seen["bytes"] == path.stat().st_size > 12e9
    assert seen["architecture"] == "zimage" and seen["formats"] == {"BF16": len(seen["layers"])}


def test_inspect_needs_no_torch(file: Path) -> None:
    code = "import sys; from quant_core import cli; cli.main(['inspect', sys.argv[1]]); print('torch' in sys.modules)"
    done = subprocess.run(models.python(code, file), capture_output=True, text=True, cwd=models.ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_an_all_in_one_checkpoint_says_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.save(tmp_path / "m.safetensors", models.all_in_one(models.zimage()))
    out, _ = call(capsys, "inspect", path)
    assert "prefix model.diffusion_model. (4 tensors outside it: kept as they are)" in out


def test_warnings_go_to_stderr(tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models.save(tmp_path / "m.safetensors", models.native(models.zimage()).tensors)
    out, err = call(capsys, "quantize", path, "-o", output, "--recipe", "fp8-unscaled", "--json")
    assert json.loads(out)["recipe"] == "fp8-unscaled"
    assert "warning: " in err and "are scaled FP8" in err and "a plain cast is too coarse" in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version")[0] == f"calibquant {__version__}\n"
    for command in ("inspect", "plan", "quantize", "compare", "convert", "demo"):
        assert f"usage: calibquant {command}" in call(capsys, command, "--help")[0]
        assert command in call(capsys, "--help")[0]


def test_the_sampler_starts_in_a_python_that_has_imported_nothing_yet() -> None:
    """Beside it lies our types.py, which has the name of one of Python's own modules."""
    command = [sys.executable, models.ROOT / "nodes" / "sample_digits.py", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- exit code 1: one line that names the file


def test_a_problem_is_one_line_without_traceback(tmp_path: Path, output: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.touch()
    out, err = run("quantize", path, "-o", output, "--recipe", "nvfp4", code=1)
    assert (out, err) == ("", f"error: {path}: is empty: download it again\n")


def test_every_command_reports_a_missing_file_the_same_way(
    tmp_path: Path, file: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = tmp_path / "none.safetensors"
    commands = [["inspect", none], ["plan", none, "--recipe", "fp8", "-o", tmp_path / "p.json"]]
    commands += [["quantize", none, "-o", output, "--recipe", "fp8"], ["convert", none, "-o", output]]
    commands += [["compare", none, file], ["compare", file, none]]
    for command in commands:
        assert call(capsys, *command, code=1) == ("", f"error: {none}: no such file: check the path\n"), command
    assert call(capsys, "quantize", file, "-o", output, "--plan", none, code=1)[1].startswith(f"error: {none}: ")


def test_a_nan_is_an_error_that_names_the_layer(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = models.zimage()
    tensors[f"{LAYER}.weight"][0, 0] = torch.nan
    path = models.save(tmp_path / "m.safetensors", tensors)
    _, err = call(capsys, "quantize", path, "-o", output, "--recipe", "mxfp8", code=1)
    assert f"error: {path}: layer {LAYER}: the weight has 1 NaN value: " in err.splitlines()[-1]
    assert not output.exists()


def test_an_existing_output_needs_overwrite(file: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output.write_bytes(b"precious")
    command = ["quantize", file, "-o", output, "--recipe", "mxfp8"]
    assert "exists already" in call(capsys, *command, code=1)[1]
    assert output.read_bytes() == b"precious"
    call(capsys, *command, "--overwrite")
    assert output.stat().st_size > 1000


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_pipe_is_no_file(file: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for command in (["inspect", pipe], ["quantize", file, "-o", output, "--plan", pipe], ["calibration", "info", pipe]):
        assert "is no regular file" in call(capsys, *command, code=1)[1]


@pytest.mark.parametrize("length", [244, 300])
def test_a_long_name_is_written_or_refused(
    length: int, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits = length < 255
    name = "n" * (length - len(".safetensors")) + ".safetensors"
    _, err = call(capsys, "quantize", file, "-o", tmp_path / name, "--recipe", "fp8", code=0 if fits else 1)
    assert {path.name for path in tmp_path.iterdir()} == {file.name, *([name] if fits else [])}
    assert fits or "File name too long" in err
    call(capsys, "inspect", tmp_path / name, code=0 if fits else 1)


def test_a_source_that_is_deleted_at_the_end_is_no_traceback(
    file: Path, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish = disk.NewFile.publish
    monkeypatch.setattr(disk.NewFile, "publish", lambda new, replace: (file.unlink(), publish(new, replace)))
    call(capsys, "quantize", file, "-o", output, "--recipe", "fp8")
    assert output.exists() and not file.exists()


def test_what_a_header_claims_cannot_reach_the_terminal_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = {"calibquant": json.dumps({"tool": "a\nb", "recipe": "\x1b[2J", "source": 5})}
    path = models.save(tmp_path / "m.safetensors", models.zimage(), claims)
    out, _ = call(capsys, "inspect", path)
    assert out.splitlines()[-1] == r"made by a\nb, recipe \x1b[2J, from None (sha256 None)"
    for text in ("[]", '"x"', "{", "[" * 100_000, '{"a": Infinity}'):
        models.save(path, models.zimage(), {"calibquant": text})
        assert "made by" not in call(capsys, "inspect", path)[0]


def test_a_plan_is_not_written_over_the_model(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    call(capsys, "plan", file, "--recipe", "mxfp8", "-o", file, code=1)
    assert file.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_cuda_without_cuda_is_an_error(file: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = call(capsys, "quantize", file, "-o", output, "--recipe", "fp8", "--device", "cuda", code=1)
    assert err == "error: --device cuda: this torch sees no CUDA GPU: use --device cpu or install a CUDA torch\n"


# --- exit code 2: wrong usage


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["inspect"],
        ["quantize", "m", "-o", "o"],
        ["quantize", "m", "-o", "o", "--recipe", "none"],
        ["quantize", "m", "-o", "o", "--recipe", "fp8", "--plan", "p"],
        ["quantize", "m", "-o", "o", "--recipe", "fp8", "--device", "tpu"],
        ["plan", "m", "-o", "p"],
        ["plan", "m", "-o", "p", "--recipe", "fp8", "--base", "fp8"],
        ["plan", "m", "-o", "p", "--recipe", "fp8", "--exclude-layers", "x"],
        ["plan", "m", "-o", "p", "--base", "fp8", "--exclude-layers", "("],
        ["plan", "m", "-o", "p", "--base", "fp8", "--custom-layers", "x"],
        ["plan", "m", "-o", "p", "--keep-ratio", ".5", "--preset", "zimage"],
        ["plan", "m", "-o", "", "--recipe", "fp8"],
        ["quantize", "m", "-o", "o.safetensors", "--recipe", "fp8", "--rounding", "gptq"],
        ["quantize", "m", "-o", "o.safetensors", "--plan", "p", "--exclude-layers", "x"],
        ["quantize", "m", "-o", "o.safetensors", "--plan", "p", "--no-input-scale"],
        ["calibration", "info", "c", "-o", "o.safetensors"],
        ["demo", "--seeds", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage(
    words: list[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = call(capsys, *[str(file) if word == "m" else word for word in words], code=2)
    assert out == "" and "usage" in err
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# --- exit code 130: interrupted


# The command line, which stops in the middle of a layer and says so; further signals come while it cleans up.
STOPS = """
import os, pathlib, signal, sys, time
from quant_core import cli
from quant_core.rounding.choice import Rounder
unlink = pathlib.Path.unlink
def stop(*_):
    print("begun", flush=True)
    for _ in range(600):  # a signal just before one long sleep would not end it
        time.sleep(0.1)
def disturbed(path, **options):
    for number in (signal.SIGTERM, signal.SIGINT) * 3:
        os.kill(os.getpid(), number)
    unlink(path, **options)
Rounder.round, pathlib.Path.unlink = stop, disturbed
sys.exit(cli.main())
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGINT] * 10], ids=str)
def test_an_interruption_leaves_nothing(numbers: list[signal.Signals], file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    command = models.python(STOPS, "quantize", file, "-o", folder / "o.safetensors", "--recipe", "nvfp4")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=models.ROOT)
    assert process.stdout and process.stdout.readline() == b"begun\n"
    assert list(folder.glob("o.safetensors.calibquant-*.partial"))
    for number in numbers:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == b"" and err.strip() == b"interrupted: no unfinished file was left"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(None, 1), (KeyboardInterrupt, 130)])
def test_what_was_not_verified_never_has_the_name(
    error: type[BaseException] | None,
    code: int,
    file: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(*_: object) -> float:
        assert not output.exists()
        if error:
            raise error
        return 0.5  # not what was reported

    monkeypatch.setattr(jobs.verification, "layer_error", measure)
    _, err = call(capsys, "quantize", file, "-o", output, "--recipe", "fp8", "--verify", code=code)
    assert ("relative error 5.0000e-01" if code == 1 else "no unfinished file was left") in err
    assert [path.name for path in output.parent.iterdir()] == [file.name]


def test_a_reader_that_leaves_early_is_no_error(file: Path) -> None:
    command = [sys.executable, "-m", "quant_core.cli", "inspect", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=models.ROOT) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 120)  # 120: the interpreter's own flush at exit
