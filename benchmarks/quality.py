"""Error at equal bytes: our roundings against comfy-kitchen's nearest and convert_to_quant, on inputs nobody saw.

    python benchmarks/quality.py [--out DIR] [--seeds 4] [--runs 1] [--readme]

1. A ComfyUI server calibrates the demo model on 45 blends of two digits each (seeds 3000 and up). A second
   calibration, of the ten digits themselves (seeds 4000 and up), is the held-out data: other prompts, other seeds.
2. Every file is made by the command line that a user would type, convert_to_quant's by the command that
   `calibquant plan --print-convert-to-quant` prints; `calibquant compare --calibration HELD_OUT` measures them all.
3. The same on one 12.6 M-parameter block, 1024 wide, with correlated inputs and eight loud channels; its files are
   timed.
   W4A8's and INT8's nearest rounding is comfy-kitchen's own quantizer, bit for bit (tests/test_formats.py).
4. ComfyUI's own KSampler draws the ten digits from seeds 1000 and up with every file of the demo model; the
   reference is what it draws with the 16-bit model.

Pictures are drawn by the newer of the two ComfyUIs that `bootstrap.py test` knows, which alone reads W4A8.
Needs ComfyUI, convert_to_quant and scikit-image (`bootstrap.py test` brings them). Files that --out holds already are
not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timing import ROOT, measure, spread

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from comfy_env import SHIMS, require_comfyui, start_server  # noqa: E402
from models import correlated  # noqa: E402
from synthetic import weight as heavy_tailed  # noqa: E402

from bootstrap import NEWER, Environment  # noqa: E402
from quant_core.demo import digits  # noqa: E402
from quant_core.demo.results import ssim  # noqa: E402
from quant_core.evidence import calibration  # noqa: E402
from quant_core.evidence.collector import Collector  # noqa: E402
from quant_core.locate import find_newer_comfyui  # noqa: E402

MODEL = ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
PROMPTS = ROOT / "workflows" / "promptsets" / "digits.safetensors"
WORKFLOW = ROOT / "workflows" / "api" / "calibrate_with_prompts.json"
FIRST_SEED, OTHER_SEED = 1000, 1500
ROWS = 2048
DEMO_FORMATS = {  # title in the tables -> options of our command
    "NVFP4": ["--recipe", "nvfp4"],
    "W4A8": ["--recipe", "w4a8"],
    "W6A8": ["--recipe", "w6a8"],
    "MXFP8": ["--recipe", "mxfp8"],
    "FP8": ["--recipe", "fp8"],
    "INT8 plain": ["--recipe", "int8", "--rotate", "never"],
    "INT8 auto": ["--recipe", "int8"],
}
BLOCK_FORMATS = {name: DEMO_FORMATS[name] for name in ("NVFP4", "W4A8", "INT8 plain", "INT8 auto")}
PEERS = ("NVFP4", "MXFP8", "FP8")  # that the peer can write on a CPU: its INT8 needs a GPU's Triton
WIDE = {"attn.q": (1024, 1024), "attn.k": (1024, 1024), "attn.v": (1024, 1024), "attn.o": (1024, 1024)}
WIDE |= {"ffn.0": (4096, 1024), "ffn.2": (1024, 4096)}
MARKS = "<!-- made by benchmarks/quality.py -->", "<!-- end -->"


@dataclass
class Made:
    """One file and what was measured of it. seconds: of every run; errors: held out, weights only and as loaded."""

    format: str
    name: str
    path: Path
    seconds: list[float] = field(default_factory=list)
    errors: tuple[float, float] = (0.0, 0.0)
    size: int = 0
    latent: dict[str, float] = field(default_factory=dict)  # "weights" or "loaded" -> relative error
    ssim: float = 0.0
    read: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep files here (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=4, help="per digit")
    parser.add_argument("--runs", type=int, default=1, help="of the timed commands")
    parser.add_argument("--square", type=int, metavar="N", help="only time one N x N layer, and print that")
    parser.add_argument("--readme", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        out.mkdir(parents=True, exist_ok=True)
        if options.square:
            one = {"attn.o": (options.square, options.square)}
            print(block_table(quantize_block(out / f"square-{options.square}", one, options.runs)))
            return
        everything, short = run(out, options.seeds, options.runs)
    print(everything)
    if options.readme:
        readme = ROOT / "README.md"
        begin, end = MARKS
        inside = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        readme.write_text(inside.sub(lambda _: f"{begin}\n{short}\n{end}", readme.read_text("utf-8")), "utf-8")


def run(out: Path, seeds: int, runs: int) -> tuple[str, str]:
    """Tables of all files, and of those that the README shows."""
    seen, held_out = calibrate_demo(out)
    demo = quantize_all(MODEL, seen, held_out, out / "demo", DEMO_FORMATS, runs=1)
    cast = ours(MODEL, ["--recipe", "fp8-unscaled"], "nearest")
    demo.append(make("FP8 cast", "ours, nearest", out / "demo" / "cast", cast))
    compare(demo[-1], MODEL, held_out)
    wide = quantize_block(out / "wide", WIDE, runs)
    # calibrated on the prompts drawn below, but on other seeds
    same = [*ours(MODEL, DEMO_FORMATS["NVFP4"], "gptq"), "--calibration", str(held_out)]
    informed = make("NVFP4", "ours, gptq, calibrated on these prompts", out / "demo" / "same", same)
    drawn = [*demo[:3], informed, *demo[3:]]
    drawn = [one for one in drawn if one.format != "W6A8"]  # core 0.33 has no comfy-kitchen that multiplies it
    floor, change = sample_all(drawn, seen, out, seeds)

    def shown(one: Made) -> bool:
        return one.format == "NVFP4" or one.name.endswith(("nearest", "gptq"))

    def tables(layers: list[Made], pictures: list[Made]) -> str:
        return f"{layer_table(layers, wide)}\n\n{latent_table(pictures, floor, change, seeds)}\n"

    return tables(demo, drawn), tables([one for one in demo if shown(one)], [one for one in drawn if shown(one)])


# --- inputs ------------------------------------------------------------------------------------------------------


def calibrate_demo(out: Path) -> tuple[Path, Path]:
    """Calibrations of the demo model on blends of digits, and on the digits themselves; made once."""
    paths = out / "blends.calibration.safetensors", out / "digits.calibration.safetensors"
    if all(path.exists() for path in paths):
        return paths
    blends, digit = prompts()
    sets = {"blends": (blends, 3000), "digits": (digit, 4000)}
    with tempfile.TemporaryDirectory() as folder, start_server(Path(folder)) as server:
        for (name, (conds, seed)), path in zip(sets.items(), paths, strict=True):
            target = save_prompts(conds, server.output_dir / "promptsets" / f"{name}.safetensors")
            workflow = json.loads(WORKFLOW.read_text("utf-8"))
            workflow["3"]["inputs"] |= {"prompt_set": target.name, "index": 0}
            workflow["4"]["inputs"] |= {"samples": 45, "seed": seed, "rows": ROWS}
            workflow["5"]["inputs"] |= {"filename_prefix": name}
            server.post(workflow)
            (saved,) = (server.output_dir / "calibrations").glob(f"{name}*.safetensors")
            shutil.copy(saved, path)
    return paths


def prompts() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Conditioning by text: of the 45 blends of two digits each, and of the ten digits."""
    tensors = load_file(PROMPTS)
    digit = {str(i): tensors[f"{i}.cond"] for i in range(10)}
    return {f"{a}+{b}": (digit[a] + digit[b]) / 2 for a, b in itertools.combinations(digit, 2)}, digit


def save_prompts(conds: dict[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"calibquant_promptset": json.dumps({"format_version": 1, "prompts": list(conds)})}
    save_file({f"{i}.cond": cond.clone() for i, cond in enumerate(conds.values())}, path, header)
    return path


def quantize_block(out: Path, shapes: dict[str, tuple[int, int]], runs: int) -> list[Made]:
    out.mkdir(exist_ok=True)
    return quantize_all(*make_block(out, shapes), out, BLOCK_FORMATS, runs)


def make_block(out: Path, shapes: dict[str, tuple[int, int]]) -> tuple[Path, Path, Path]:
    """One block's weights, and two calibrations from different draws of the same input distribution."""
    paths = out / "block.safetensors", out / "block-seen.calibration.safetensors", out / "block-held-out.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.0.{name}": heavy_tailed(*shape, generator) for name, shape in shapes.items()}
    save_file({f"{name}.weight": weight for name, weight in weights.items()}, paths[0])
    for path, seed in zip(paths[1:], (1, 2), strict=True):
        collector = Collector(lambda layer: "blocks.0.attn.q" if layer[-6:-1] == "attn." else "", ROWS)
        collector.start_run("synthetic")
        for name, weight in weights.items():
            x = correlated(ROWS, weight.shape[1], seed)
            collector.add(name, x, x @ weight.float().T)
        collector.finish_run()
        calibration.save(collector.result(), path, overwrite=True)
    return paths


# --- files -------------------------------------------------------------------------------------------------------


def quantize_all(
    model: Path, seen: Path, held_out: Path, out: Path, formats: dict[str, list[str]], runs: int
) -> list[Made]:
    """Files of all formats and roundings, ours and the peer's, with their held-out errors."""
    out.mkdir(exist_ok=True)
    made = []
    for name, options in formats.items():
        stem = name.lower().replace(" ", "-")
        for rounding in ("nearest", "search", "gptq"):
            command = [*ours(model, options, rounding), "--calibration", str(seen)]
            made.append(make(name, f"ours, {rounding}", out / f"{stem}-{rounding}", command, runs))
        for mode in ("--simple", "learned") if name in PEERS else ():
            command = theirs(model, options[1], mode, out)
            made.append(make(name, f"convert_to_quant {mode}", out / f"{stem}-{mode}", command, runs))
    for one in made:
        compare(one, model, held_out)
    return made


def ours(model: Path, options: list[str], rounding: str) -> list[str]:
    return [sys.executable, "-m", "quant_core.cli", "quantize", str(model), *options, "--rounding", rounding]


def theirs(model: Path, recipe: str, mode: str, out: Path) -> list[str]:
    """The peer's command for the very same layers; "learned" is what it does by default."""
    plan = [sys.executable, "-m", "quant_core.cli", "plan", str(model), "--recipe", recipe]
    plan += ["-o", str(out / "plan.json"), "--print-convert-to-quant"]
    printed = subprocess.run(plan, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    words = [word for word in shlex.split(printed) if word != "--simple" or mode == "--simple"]
    at = words.index("-o")
    del words[at : at + 2]
    program = Path(sys.executable).with_name("convert_to_quant")
    return [str(program), *words[1:], "--manual_seed", "0"]


def make(fmt: str, name: str, stem: Path, command: list[str], runs: int = 1) -> Made:
    path = stem.with_name(stem.name + ".safetensors")
    seconds = stem.with_name(stem.name + ".seconds.json")
    if not (path.exists() and seconds.exists()):
        print(f"making {path.name}", file=sys.stderr, flush=True)
        taken = []
        for _ in range(runs):
            path.unlink(missing_ok=True)
            taken.append(measure([*command, "-o", str(path)])[0])
        seconds.write_text(json.dumps(taken))
    return Made(fmt, name, path, json.loads(seconds.read_text()), size=path.stat().st_size)


def compare(made: Made, model: Path, held_out: Path) -> None:
    command = [sys.executable, "-m", "quant_core.cli", "compare", str(model), str(made.path), "--json"]
    command += ["--calibration", str(held_out)]
    report = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    layers = [layer for layer in report["layers"] if layer["output_errors"]]
    loaded = [layer["loader_error"] for layer in layers]
    made.errors = fmean(layer["output_errors"]["file"] for layer in layers), fmean(loaded)


# --- pictures ----------------------------------------------------------------------------------------------------


def sample_all(made: list[Made], seen: Path, out: Path, seeds: int) -> tuple[float, float]:
    """Fill in what ComfyUI draws with every file; the error of FP4 activations alone, and of another seed."""
    reference = sample([MODEL], out, seeds)[0]
    for way, native in (("weights", False), ("loaded", True)):
        drawn = sample([one.path for one in made], out, seeds, native=native)
        for one, latent in zip(made, drawn, strict=True):
            one.latent[way] = distance(latent, reference)
            if way == "weights":
                images = digits.latent_to_image(latent)
                one.ssim = ssim(images, digits.latent_to_image(reference)) or 0.0
                wanted = torch.arange(10).repeat(seeds)
                one.read = (digits.read_digits(images) == wanted).float().mean().item()
    floor = sample([MODEL], out, seeds, program=["benchmarks/sample_floor.py", str(seen)])[0]
    other = sample([MODEL], out, seeds, first=OTHER_SEED)[0]
    return distance(floor, reference), distance(other, reference)


def sample(
    files: list[Path],
    out: Path,
    seeds: int,
    first: int = FIRST_SEED,
    native: bool = False,
    program: list[str] | None = None,
    older: bool = False,
) -> list[np.ndarray]:
    """Latents float32 [seeds, 10, 16, 1, 8, 8] per file, as KSampler returns them; older: by the older ComfyUI."""
    npz = out / "latents.npz"
    comfyui = None if older else find_newer_comfyui()
    python = Environment(NEWER, comfyui).python if comfyui else sys.executable
    command = [str(python), *(program or ["nodes/sample_digits.py"]), "--comfyui", str(comfyui or require_comfyui())]
    command += ["--out", str(npz), "--seeds", str(seeds), "--first-seed", str(first), *["--native"] * native]
    environment = {**os.environ, "PYTHONPATH": str(SHIMS)}
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"sampling failed: {done.stderr}")
    with np.load(npz) as latents:
        return [latents[str(i)] for i in range(len(files))]


def distance(latent: np.ndarray, reference: np.ndarray) -> float:
    """||Y' - Y||^2 / ||Y||^2 in the model's own space, where latents have about zero mean and unit variance."""
    a, b = (digits.from_wan_space(torch.from_numpy(x)) for x in (latent, reference))
    return ((a - b).square().sum() / b.square().sum()).item()


# --- tables ------------------------------------------------------------------------------------------------------


def layer_table(demo: list[Made], wide: list[Made]) -> str:
    """Held-out output errors per rounding, and the time of the block."""
    lines = [
        "Output error of layers on held-out inputs, mean over layers (× the format's nearest in brackets), weights "
        "only and as the loader runs them on a GPU that has the format; seconds of the whole command for the block, "
        "min / median / max:",
        "",
        "| | demo model, 60 layers | as loaded | 1024-wide block, 12.6 M weights | as loaded | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for one in demo:
        base = next(x for x in demo if x.format.split()[0] == one.format.split()[0]).errors[0]
        other = next((x for x in wide if (x.format, x.name) == (one.format, one.name)), None)
        first = f"{one.errors[0]:.2e} ({one.errors[0] / base:.2f})"
        second, seconds = " | ", ""
        if other:
            second = f"{other.errors[0]:.2e} | {other.errors[1]:.2e}"
            seconds = spread(other.seconds, 1)
        lines.append(f"| {one.format}, {one.name} | {first} | {one.errors[1]:.2e} | {second} | {seconds} |")
    return "\n".join(lines)


def block_table(block: list[Made]) -> str:
    lines = ["| | held-out output error | seconds min / median / max |", "|---|---|---|"]
    for one in block:
        error = f"{one.errors[0]:.2e} ({one.errors[0] / block[0].errors[0]:.2f}), as loaded {one.errors[1]:.2e}"
        lines.append(f"| {one.format}, {one.name} | {error} | {spread(one.seconds, 1)} |")
    return "\n".join(lines)


def latent_table(demo: list[Made], floor: float, change: float, seeds: int) -> str:
    lines = [
        f"Demo model, 10 prompts × {seeds} seeds (n = {10 * seeds}), 12 steps: relative error of the final latent "
        "(× NVFP4 nearest in brackets). Activations of the second column are quantized by ComfyUI's own code and "
        "multiplied on the CPU, simulating a GPU that has the format:",
        "",
        "| | bytes | weights only | activations too | SSIM | digits read |",
        "|---|---|---|---|---|---|",
    ]
    base = demo[0].latent
    for one in demo:
        cells = [f"{one.latent[way]:.2e} ({one.latent[way] / base[way]:.3f})" for way in ("weights", "loaded")]
        shown = f"{one.ssim:.4f} | {100 * one.read:.1f} %"
        lines.append(f"| {one.format}, {one.name} | {one.size} | {cells[0]} | {cells[1]} | {shown} |")
    lines.append(f"| exact weights, FP4 activations | | | {floor:.2e} ({floor / base['loaded']:.3f}) | | |")
    lines.append(f"| another seed, 16-bit model | | {change:.2e} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
