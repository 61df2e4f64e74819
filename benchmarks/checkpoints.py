"""All-in-one checkpoints: what Load Checkpoint reads of each part in each format, and what a plain cast of a VAE costs.

    python benchmarks/checkpoints.py

Small checkpoints of ComfyUI's own classes with random weights (tests/checkpoints.py), nearest rounding, on the CPU, in
the ComfyUI that the tests find (COMFYUI_PATH). First table: relative error of the conditioning of one prompt, and the
least cosine of a token, against the 16-bit checkpoint; beside: the error against the decoded weights in float32.

Second table: a decoder of Stable Diffusion's true width (49 M weights, all but 1 % of them in convolutions) stored in a
plain dtype and decoded in float32, relative error of the picture about its mean. sigma: of the weights, 1 as they come
from initialization (fan_in**-.5), less for weights that are small and are scaled up by the norm after them.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402
import models  # noqa: E402
import torch  # noqa: E402
from comfy_env import import_comfy  # noqa: E402

FORMATS = ("nvfp4", "mxfp8", "fp8", "int8", "w4a8")
PLAIN = {"float16": torch.float16, "bfloat16": torch.bfloat16, "FP8 (convolutions)": torch.float8_e4m3fn}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        import_comfy(Path(folder))
        logging.disable(logging.WARNING)
        print(f"ComfyUI {importlib.import_module('comfyui_version').__version__}\n")
        print(
            "| checkpoint | encoder | format | layers | error | least cosine | beside |\n|---|---|---|---|---|---|---|"
        )
        encoders(Path(folder))
        print("\n| VAE stored as | sigma 1 | sigma .25 |\n|---|---|---|")
        for name, dtype in PLAIN.items():
            print(f"| {name} | " + " | ".join(f"{cast_error(dtype, size):.1e}" for size in (1, 0.25)) + " |")


def encoders(folder: Path) -> None:
    tests = importlib.import_module("test_parts")
    for name, encoder in (("flux", "t5xxl"), ("klein", "qwen3_4b")):
        path = models.save(folder / f"{name}.safetensors", tests.MADE[name]())
        wanted = tests.conditioning(tests.loaded(path)[1])
        for fmt in FORMATS:
            made, decoded = folder / f"{name}-{fmt}.safetensors", folder / f"{name}-{fmt}-decoded.safetensors"
            layers = sum(
                layer.startswith("text_") for layer in tests.quantized(path, fmt, made, "model,te").quantized()
            )
            try:
                found = tests.conditioning(tests.loaded(made)[1])
            except (KeyError, ValueError) as refused:  # this ComfyUI does not know the format
                print(f"| {name} | {encoder} | {fmt} | {layers} | not loaded: {str(refused)[:60]} | | |")
                continue
            same = tests.conditioning(tests.loaded(tests.in_float32(path, made, decoded))[1])
            least = torch.nn.functional.cosine_similarity(found, wanted, dim=-1).min()
            errors = tests.relative_error(found, wanted), tests.relative_error(found, same)
            print(
                f"| {name} | {encoder} | {fmt} | {layers} | {errors[0]:.1e} | {least:.4f} | {errors[1]:.0e} |",
                flush=True,
            )


def cast_error(dtype: torch.dtype, sigma: float) -> float:
    """Of the decoded picture, when the VAE's tensors are cast to dtype (FP8: the convolutions' weights)."""
    sd = importlib.import_module("comfy.sd")
    tensors = checkpoints.vae(4, width=128)
    tensors = {key: tensor * sigma if tensor.dim() > 1 else tensor for key, tensor in tensors.items()}
    fp8 = dtype.itemsize == 1
    stored = {key: t.to(dtype) if t.dim() > 1 or not fp8 else t for key, t in tensors.items()}
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before, after = (sd.VAE(sd=dict(state)).decode(latent) for state in (tensors, stored))
    return ((after - before).square().sum() / (before - before.mean()).square().sum()).item()


if __name__ == "__main__":
    main()
