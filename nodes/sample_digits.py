"""Sample the digits demo model, or quantized copies of it, with ComfyUI's own loader and KSampler.

Run as a program: ``python nodes/sample_digits.py --comfyui PATH --out OUT.npz --seeds 2 FILE…``. For each FILE it
prints one JSON line on stdout ({"file", "seconds", …}) and stores array "0", "1", … (in the order of the FILEs):
float32 [seeds, 10, 16, 1, 8, 8], latents as KSampler returns them. Progress goes to stderr.
It is a program of its own so that a caller never has ComfyUI inside its own process.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its types.py would hide Python's own from everything that is imported below

import argparse
import importlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

PROMPT_SET = Path(__file__).resolve().parents[1] / "workflows" / "promptsets" / "digits.safetensors"
DIGITS = 10
SAMPLER, SCHEDULER, CFG = "euler", "simple", 1.0


def main(argv: list[str] | None = None) -> int:
    """Sample every file named on the command line; the exit status is 0, or 1 with one error line on stderr."""
    options = _parse(argv)
    if not (options.comfyui / "comfy" / "sd.py").is_file():
        return _fail(f"{options.comfyui}: not a ComfyUI checkout; name one with --comfyui")
    for file in [options.promptset, *options.files]:
        if not file.is_file():
            return _fail(f"{file}: no such file")
    start_comfyui(options.comfyui)
    if options.native:
        emulate_native()
    with torch.inference_mode():  # as ComfyUI runs its nodes, loaders included
        latents = sample_files(options)
    np.savez(options.out, **latents)
    return 0


def sample_files(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Load and sample every file; one JSON line each on stdout. Latents by the index of the file, as text."""
    prompts = load_file(str(options.promptset))
    context = torch.cat([prompts[f"{digit}.cond"] for digit in range(DIGITS)])
    latents: dict[str, np.ndarray] = {}
    for index, file in enumerate(options.files):
        print(f"sampling {file.name} ({index + 1}/{len(options.files)})", file=sys.stderr, flush=True)
        began = time.perf_counter()
        model = _load(file)
        loaded = time.perf_counter()
        sampled = sample(model, context, range(options.first_seed, options.first_seed + options.seeds), options.steps)
        latents[str(index)] = sampled.numpy()
        now = time.perf_counter()
        line = {"file": str(file), "seconds": round(now - loaded, 3), "load_seconds": round(loaded - began, 3)}
        print(json.dumps(line), flush=True)
    return latents


def start_comfyui(folder: Path) -> None:
    """Make ``import comfy`` mean the checkout at `folder`, on the CPU where there is no CUDA.

    The checkout goes first on sys.path and this script's own folder off it, so that ComfyUI's ``nodes.py`` is
    never shadowed by ours.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path.insert(0, str(folder.resolve()))
    logging.getLogger().setLevel(logging.WARNING)
    cli_args = importlib.import_module("comfy.cli_args")
    if not torch.cuda.is_available():
        cli_args.args.cpu = True


def emulate_native() -> None:
    """Let the loader treat this machine as a GPU that computes in the files' formats.

    Activations are then quantized by ComfyUI's own code, W4A4 or W8A8; the matrix products of NVFP4 and MXFP8, which
    no CPU has, are taken of the dequantized operands, comfy-kitchen's own fallback.
    """
    management, kitchen = (importlib.import_module(name) for name in ("comfy.model_management", "comfy_kitchen"))

    def absent(*_: object, **__: object) -> None:
        raise RuntimeError("emulated")

    logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # one warning per product else
    for name in ("nvfp4", "mxfp8", "fp8"):
        setattr(management, f"supports_{name}_compute", lambda *_, **__: True)
    kitchen.scaled_mm_nvfp4 = kitchen.scaled_mm_mxfp8 = absent


def sample(model: Any, context: torch.Tensor, seeds: range, steps: int) -> torch.Tensor:
    """All digits for all seeds in one batch, each from the noise a single KSampler run of that seed would start from.

    model: ComfyUI ModelPatcher; context: float32 [10, T, text_dim]. Returns float32 [seeds, 10, 16, 1, 8, 8].
    """
    comfy_sample = importlib.import_module("comfy.sample")
    empty = torch.zeros(1, 16, 1, 8, 8)
    noise = torch.cat([comfy_sample.prepare_noise(empty, seed).expand(DIGITS, -1, -1, -1, -1) for seed in seeds])
    cond = [[context.repeat(len(seeds), 1, 1), {}]]
    blank = torch.zeros_like(noise)
    out = comfy_sample.sample(
        model, noise, steps, CFG, SAMPLER, SCHEDULER, cond, cond, blank, disable_pbar=True, seed=seeds[0]
    )
    return out.float().cpu().reshape(len(seeds), DIGITS, *out.shape[1:])


def _load(file: Path) -> Any:
    """The model; of a split file with its branch, by the stock bypass loader, from the LoRA that lies beside it."""
    importlib.import_module("comfy.model_management").unload_all_models()
    loader = importlib.import_module("comfy.sd")
    model, branch = loader.load_diffusion_model(str(file)), file.with_suffix(".lora.safetensors")
    if not branch.is_file():
        return model
    return loader.load_bypass_lora_for_models(model, None, load_file(str(branch)), 1.0, 0.0)[0]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sample_digits", description="sample the digits demo model through ComfyUI")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="diffusion model files")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI checkout")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--seeds", type=_positive, default=2, help="samples per digit")
    parser.add_argument("--first-seed", type=int, default=1000, help="seeds count up from here")
    parser.add_argument("--steps", type=_positive, default=12)
    parser.add_argument("--native", action="store_true", help="quantize activations as a GPU with these formats would")
    parser.add_argument("--promptset", type=Path, default=PROMPT_SET)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
