"""Below the floor of 4-bit inputs: what the split and folded smoothing leave of NVFP4's error as a loader runs it.

    python benchmarks/below_floor.py [--out DIR] [--seeds 4]

1. The demo model, calibrated and held out as in benchmarks/quality.py: GPTQ alone, splits of mean rank 4, 16 and 32,
   the same with a plain SVD of the weight instead of the best branch, fold, both; and, as the control, NVFP4 and MXFP8
   mixed by `plan --size` to the bytes of each split. Drawn by both of the ComfyUIs that `bootstrap.py test` knows,
   through their own quantized forward; the branch comes in by the stock bypass loader.
2. One Z-Image block, 1024 wide, its inputs correlated with eight loud channels in a thousand: layer errors as loaded,
   held out, as multiples of the floor (exact weights, 4-bit inputs). Loud channels side by side fill one block of 16,
   which no scaling can quiet; spread over the width they spoil a block each; and in trained models the weights' columns
   that see them are small.
3. Time and memory of a 3840 x 10240 layer with and without a branch.

Needs ComfyUI (`bootstrap.py test` brings everything else). Files that --out holds already are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from quality import MODEL, ROWS, WORKFLOW, calibrate_demo, distance, sample, save_prompts
from safetensors.torch import save_file
from synthetic import weight as heavy_tailed
from timing import ROOT, measure

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfy_env import start_server  # noqa: E402
from models import correlated  # noqa: E402

from quant_core.cli.main import main as calibquant  # noqa: E402
from quant_core.evidence import calibration  # noqa: E402
from quant_core.evidence.collector import Collector  # noqa: E402
from quant_core.formats import FORMATS  # noqa: E402
from quant_core.locate import find_newer_comfyui  # noqa: E402
from quant_core.models.lora import balanced  # noqa: E402
from quant_core.models.source import Source  # noqa: E402
from quant_core.rounding import split  # noqa: E402
from quant_core.rounding.judge import Judge  # noqa: E402

RANKS = (4, 16, 32)
SAMPLING = ("steps", "cfg", "sampler_name", "scheduler", "width", "height", "frames")
WIDTH, HIDDEN = 1024, 2816
BLOCK = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")  # of a Z-Image
LOUD = {  # heading -> spread over the width, the weights' columns there a quarter
    "side by side": (False, False),
    "spread": (True, False),
    "spread, small columns": (True, True),
}
CONTROL: list[str] = ["--weighting", "uniform"]
WAYS = {  # of the block; the control takes the bytes of the split before it
    "GPTQ alone": [],
    "split 6 %": ["--split", "6%"],
    "MXFP8 layers for the bytes of the split": CONTROL,
    "fold": ["--smooth", "fold"],
    "fold and split 6 %": ["--smooth", "fold", "--split", "6%"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep files here (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=4, help="per digit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (options.out or Path(temporary)).resolve()
        (out / "below").mkdir(parents=True, exist_ok=True)
        print(block_table(out / "below"), flush=True)
        print(demo_table(out, options.seeds), flush=True)
        print(wide_table(out / "below"), flush=True)


def mixed(split_file: Path) -> list[str]:
    """Options for the best mix of NVFP4 and MXFP8 (and 16 bit) in as many bytes as a split has."""
    size = f"{bytes_of(split_file) / 1e9:.9f}"
    return ["--size", size, "--formats", "nvfp4,mxfp8,bf16", "--gpu", "blackwell"]


def quantize(model: Path, seen: Path, stem: Path, options: list[str], recipe: str = "nvfp4") -> Path:
    """The main file; a split's LoRA lies beside it. Not made again."""
    path = stem.with_name(stem.name + (".split" if "--split" in options else "") + ".safetensors")
    if not path.exists():
        how = ["--recipe", recipe] if recipe else []
        run("quantize", model, *how, "--calibration", seen, "--rounding", "gptq", "-o", path, *options)
    return path


def run(*words: object) -> None:
    """A command of ours in this process, so that a part of it can be another's; its words go to stderr."""
    print("calibquant", *words, file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(sys.stderr):
        code = calibquant([str(word) for word in words])
    if code:
        sys.exit(code)


# --- the demo model ----------------------------------------------------------------------------------------------


def demo_table(out: Path, seeds: int) -> str:
    seen, held_out = calibrate_demo(out)
    stem = out / "below"
    informed = with_sensitivities(seen, stem / "sensitivities.calibration.safetensors")  # a control that knows more
    files = {"GPTQ alone": quantize(MODEL, seen, stem / "gptq", [])}
    files["fold"] = quantize(MODEL, seen, stem / "fold", ["--smooth", "fold"])
    for rank in RANKS:
        options = ["--split", str(rank)]
        files[f"split {rank}"] = ours = quantize(MODEL, seen, stem / f"split-{rank}", options)
        files[f"split {rank}, plain SVD"] = with_plain_svd(MODEL, seen, stem / f"svd-{rank}", options)
        files[f"fold, split {rank}"] = quantize(MODEL, seen, stem / f"fold-{rank}", ["--smooth", "fold", *options])
        planned = stem / f"mxfp8-{rank}"
        files[f"MXFP8 layers for the bytes of split {rank}"] = quantize(MODEL, informed, planned, mixed(ours), "")
    errors = {name: layer_error(MODEL, path, held_out) for name, path in files.items()}
    cores = {"0.29": False, "0.33": True} if find_newer_comfyui() else {"0.29": False}
    drawn = {core: drawn_by(newer, [MODEL, *files.values()], out, seeds) for core, newer in cores.items()}
    head = " | ".join(f"final latent, core {core}" for core in cores)
    lines = [
        f"Demo model, NVFP4, 10 prompts x {seeds} seeds (n = {10 * seeds}), held out, as loaded (× GPTQ alone):",
        "",
        f"| | bytes | layers, mean | {head} |",
        "|---|---|---|" + "---|" * len(cores),
    ]
    for i, (name, path) in enumerate(files.items()):
        cells = [times(errors[name], errors["GPTQ alone"])]
        for latents in drawn.values():
            cells.append(times(distance(latents[i + 1], latents[0]), distance(latents[1], latents[0])))
        lines.append(f"| {name} | {bytes_of(path)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_sensitivities(
    seen: Path, path: Path, conds: dict[str, torch.Tensor] | None = None, estimator: str = "gradient"
) -> Path:
    """The calibration with what Measure Sensitivity adds, on these prompts or on the very digits that are drawn."""
    if path.exists():
        return path
    graph = json.loads(WORKFLOW.read_text("utf-8"))
    sampling = {key: graph["4"]["inputs"][key] for key in SAMPLING}
    linked = {"model": ["2", 0], "conditioning": ["3", 0], "calibration": ["4", 0]}
    how = {"samples": 10, "seed": 5000, "estimator": estimator, "points": 6, "probes": 2, "rows": 512, "seconds": 120}
    graph["4"] = {"class_type": "CalibQuantLoadCalibration", "inputs": {"calibration_name": seen.name}}
    graph["6"] = {"class_type": "CalibQuantSensitivity", "inputs": sampling | linked | how}
    graph["5"]["inputs"] |= {"calibration": ["6", 0], "filename_prefix": "measured"}
    with tempfile.TemporaryDirectory() as folder, start_server(Path(folder)) as server:
        (server.output_dir / "calibrations").mkdir(parents=True, exist_ok=True)
        shutil.copy(seen, server.output_dir / "calibrations")
        if conds:
            named = save_prompts(conds, server.output_dir / "promptsets" / "conds.safetensors").name
            graph["3"]["inputs"] |= {"prompt_set": named, "index": 0}
        server.post(graph, timeout=1200)
        (saved,) = (server.output_dir / "calibrations").glob("measured*.safetensors")
        shutil.copy(saved, path)
    return path


def drawn_by(newer: bool, files: list[Path], out: Path, seeds: int) -> list[np.ndarray]:
    return sample(files, out, seeds, native=True, older=not newer)


def with_plain_svd(model: Path, seen: Path, stem: Path, options: list[str]) -> Path:
    """The same ranks, filled with the largest singular part of the weight."""

    def plain(weight: torch.Tensor, rows: torch.Tensor, fed: torch.Tensor, rank: int) -> split.Branch:
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        return split.Branch(*balanced(u[:, :rank] * s[:rank], v[:rank]))

    return replaced("branch", plain, lambda: quantize(model, seen, stem, options))


def replaced(name: str, other: Callable[..., object], job: Callable[[], Path]) -> Path:
    own = getattr(split, name)
    setattr(split, name, other)
    try:
        return job()
    finally:
        setattr(split, name, own)


def bytes_of(path: Path) -> int:
    """Of the file and of its LoRA."""
    beside = path.with_suffix(".lora.safetensors")
    return path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def layer_error(model: Path, path: Path, held_out: Path) -> float:
    return float(np.mean(list(layer_errors(model, path, held_out).values())))


def layer_errors(model: Path, path: Path, held_out: Path) -> dict[str, float]:
    """Layer -> error of its output as loaded, on inputs that the calibration did not see."""
    command = [sys.executable, "-m", "quant_core.cli", "compare", str(model), str(path), "--json"]
    command += ["--calibration", str(held_out)]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return {layer["name"]: layer["loader_error"] for layer in report["layers"] if layer["output_errors"]}


def times(error: float, base: float) -> str:
    return f"{error:.2e} ({error / base:.2f})"


# --- one wide block ----------------------------------------------------------------------------------------------


def block_table(out: Path) -> str:
    lines = [
        f"One Z-Image block, {WIDTH} wide, NVFP4, held out, as loaded: mean over its five layers of the error as a "
        "multiple of the layer's floor (best to worst layer):",
        "",
        f"| loud channels | bytes | {' | '.join(LOUD)} |",
        "|---|---|" + "---|" * len(LOUD),
    ]
    cells: dict[str, list[str]] = {name: [] for name in WAYS}
    sizes = {}
    for number, (spread, small) in enumerate(LOUD.values()):
        model, seen, held_out = make_block(out / f"block{number}", spread, small)
        floors, split_file = floor(model, held_out), model
        for i, (name, how) in enumerate(WAYS.items()):
            if how == CONTROL:
                how = [*mixed(split_file), *how]
            path = quantize(model, seen, out / f"block{number}" / f"way{i}", how, "" if "--size" in how else "nvfp4")
            split_file = path if "--split" in how else split_file
            errors, sizes[name] = layer_errors(model, path, held_out), bytes_of(path)
            ratios = [errors[f"layers.0.{layer}"] / base for layer, base in floors.items()]
            cells[name].append(f"{np.mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    lines += [f"| {name} | {sizes[name]} | {' | '.join(found)} |" for name, found in cells.items()]
    return "\n".join(lines) + "\n"


def inputs_of(width: int, seed: int, spread: bool) -> torch.Tensor:
    """float32 [ROWS, width]; spread: the loud channels one in 128 instead of side by side."""
    rows = correlated(ROWS, width, seed)
    if not spread:
        return rows
    rows[:, :8] /= 20
    rows[:, 64::128] *= 20
    return rows


def shapes_of(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    return dict(zip(BLOCK, [(3 * width, width), (width, width), *[(hidden, width)] * 2, (width, hidden)], strict=True))


def make_block(
    out: Path, spread: bool, small: bool, width: int = WIDTH, hidden: int = HIDDEN
) -> tuple[Path, Path, Path]:
    """A model file of one Z-Image block, and two calibrations from different draws of the same inputs.

    Its norms are what a fold is put into.
    """
    block = shapes_of(width, hidden)
    paths = out / "block.safetensors", out / "seen.calibration.safetensors", out / "held-out.calibration.safetensors"
    if all(path.exists() for path in paths):
        return paths
    out.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.0.{name}.weight": heavy_tailed(*shape, generator) for name, shape in block.items()}
    for weight in weights.values() if small else ():
        weight[:, 64::128] /= 4
    rest = {
        f"layers.0.{name}.weight": width for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
    }
    rest |= {f"{place}.attention.{x}_norm.weight": 128 for place in ("layers.0", "noise_refiner.0") for x in "qk"}
    rest |= {"cap_embedder.0.weight": width}
    tensors = weights | {key: torch.ones(size, dtype=torch.bfloat16) for key, size in rest.items()}
    tensors |= {"cap_embedder.1.weight": heavy_tailed(width, 256, generator)}
    tensors |= {"noise_refiner.0.adaLN_modulation.0.weight": heavy_tailed(4 * width, 256, generator)}
    save_file(tensors, paths[0])
    for path, seed in zip(paths[1:], (1, 2), strict=True):
        inputs = {f"layers.0.{name}": inputs_of(shape[1], seed, spread) for name, shape in block.items()}
        calibrate(inputs, weights, path, seed)
    return paths


def calibrate(inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], path: Path, seed: int) -> None:
    """A calibration file of these inputs, as eight runs."""
    collector = Collector(lambda layer: layer.replace("w3", "w1"), ROWS)
    for part in range(8):
        collector.start_run(f"part {part} of draw {seed}")
        for name, rows in inputs.items():
            x = rows[part * ROWS // 8 : (part + 1) * ROWS // 8]
            collector.add(name, x, x @ weights[f"{name}.weight"].float().T)
        collector.finish_run()
    calibration.save(collector.result(), path, overwrite=True)


def floor(model: Path, held_out: Path) -> dict[str, float]:
    """Layer -> what 4-bit inputs cost it when its weights are exact."""
    seen, found = calibration.load(held_out), {}
    with Source(model) as source:
        for name in BLOCK:
            weight, rows = source.load(f"layers.0.{name}"), seen.rows_of(f"layers.0.{name}")
            judge = Judge(weight, rows, limit=len(rows))
            scale = torch.tensor(float(seen.layers[f"layers.0.{name}"].input_amax.max()) / 2688)
            found[name] = judge.error(weight.float(), rows=FORMATS["nvfp4"].feed(judge.rows, scale))
    return found


# --- time --------------------------------------------------------------------------------------------------------


def wide_table(out: Path) -> str:
    """The down projection of a true Z-Image, by a process of its own each."""
    model, seen = make_wide(out)
    lines = ["One 3840 x 10240 layer, 2048 rows, whole command:", "", "| | seconds | peak GB |", "|---|---|---|"]
    for name, options in {"GPTQ alone": [], "split 6 %": ["--split", "6%"]}.items():
        path = out / ("wide.split.safetensors" if options else "wide.safetensors")
        command = [
            sys.executable,
            "-m",
            "quant_core.cli",
            "quantize",
            model,
            "--recipe",
            "nvfp4",
            "--calibration",
            seen,
        ]
        cost = measure([str(word) for word in [*command, "--rounding", "gptq", "-o", path, "--overwrite", *options]])
        lines.append(f"| {name} | {cost.wall:.1f} | {cost.peak:.2f} |")
    return "\n".join(lines) + "\n"


def make_wide(out: Path) -> tuple[Path, Path]:
    model, seen = out / "wide-model.safetensors", out / "wide.calibration.safetensors"
    if not (model.exists() and seen.exists()):
        weights = {"layers.0.feed_forward.w2.weight": heavy_tailed(3840, 10240, torch.Generator().manual_seed(0))}
        save_file(weights, model)
        calibrate({"layers.0.feed_forward.w2": correlated(ROWS, 10240, 1)}, weights, seen, 1)
    return model, seen


if __name__ == "__main__":
    main()
