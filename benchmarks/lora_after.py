"""What a LoRA on a quantized model costs: by the ordinary loader, which requantizes, and by the bypass loader.

    python benchmarks/lora_after.py --comfyui DIR [--native] [--seeds 2] [--change 0.05] FILE…

A user's LoRA of rank 8 with random factors changes every block Linear of the demo model by ``change``, ||dW|| / ||W||.
Errors are those of the final latent, ten digits times ``seeds``, relative to what the 16-bit model draws with the same
LoRA; "no LoRA" is the file against the 16-bit model, both without. --own LORA measures a LoRA made for the FILEs
(`calibquant lora`) instead, against the 16-bit model without any. --native as in nodes/sample_digits.py.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nodes"), str(ROOT / "tests")]

import sample_digits  # noqa: E402
from comfy_env import install_shims  # noqa: E402

from quant_core.demo import digits  # noqa: E402
from quant_core.models import lora  # noqa: E402

MODEL = ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
RANK, STEPS, FIRST_SEED = 8, 12, 1000
Tensors = dict[str, torch.Tensor]


def user_lora(change: float) -> Tensors:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, weight in load_file(MODEL).items():
        if key.startswith("blocks.") and key.endswith(".weight") and weight.dim() == 2:
            up = torch.randn(len(weight), RANK, generator=generator)
            down = torch.randn(RANK, weight.shape[1], generator=generator)
            up *= change * weight.float().norm() / (up @ down).norm()
            tensors |= dict(zip(lora.keys(key.removesuffix(".weight")), (up, down), strict=True))
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--change", type=float, default=0.05)
    parser.add_argument("--own", type=Path, metavar="LORA")
    options = parser.parse_args()
    install_shims()
    sample_digits.start_comfyui(options.comfyui)
    if options.native:
        sample_digits.emulate_native()
    sd = importlib.import_module("comfy.sd")
    prompts = load_file(sample_digits.PROMPT_SET)
    context = torch.cat([prompts[f"{digit}.cond"] for digit in range(10)])
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    added = load_file(options.own) if options.own else user_lora(options.change)

    def draw(file: Path, load: Callable[..., Any] | None = None) -> torch.Tensor:
        model = sample_digits._load(file)
        model = load(model, None, dict(added), 1.0, 0.0)[0] if load else model
        return digits.from_wan_space(sample_digits.sample(model, context, seeds, STEPS))

    with torch.inference_mode():
        plain = draw(MODEL)
        wanted = plain if options.own else draw(MODEL, sd.load_lora_for_models)
        print(f"the LoRA changes the 16-bit model's latents by {error(wanted, plain):.2e}; n = {10 * options.seeds}")
        print("| | no LoRA | LoRA, ordinary loader | LoRA, bypass loader |\n|---|---|---|---|")
        for file in options.files:
            drawn = draw(file), draw(file, sd.load_lora_for_models), draw(file, sd.load_bypass_lora_for_models)
            cells = [error(latent, of) for latent, of in zip(drawn, (plain, wanted, wanted), strict=True)]
            print(f"| {file.stem} | " + " | ".join(f"{cell:.2e}" for cell in cells) + " |", flush=True)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


if __name__ == "__main__":
    main()
