"""Make everything of the digits demo from scikit-learn's bundled handwritten digits, reproducibly, on a CPU.

    python benchmarks/train_demo.py [--comfyui PATH] [--only promptset,judge,model,vae,check]

Needs scikit-learn, and a ComfyUI checkout (--comfyui, $COMFYUI_PATH or ~/comfy/ComfyUI) whose Wan 2.1 transformer and
TAESD decoder it trains. Seeds and step counts are fixed; on another machine sums may round otherwise in the last bit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, installed or not
digits = importlib.import_module("quant_core.demo.digits")
MODEL = ROOT / "workflows" / "models" / "calibquant_digits_wan.safetensors"
VAE = ROOT / "workflows" / "vae" / "calibquant_digits_vae.safetensors"
PROMPT_SET = ROOT / "workflows" / "promptsets" / "digits.safetensors"
JUDGE = ROOT / "workflows" / "judge" / "digits_judge.safetensors"
STAGES = ("promptset", "judge", "model", "vae", "check")

DIGITS, TOKENS, TEXT_DIM = 10, 4, 64
DIM, FFN_DIM, LAYERS = 128, 512, 6
SHIFT = 8.0  # the sigma shift ComfyUI samples Wan 2.1 with
STEPS, BATCH, LEARNING_RATE, EMA = 2800, 80, 2e-3, 0.998
VAE_STEPS, VAE_BATCH, VAE_INPUT_SCALE = 1500, 16, 0.25
LICENCE = "Apache-2.0"
DATA_SOURCE = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"


def main() -> int:
    """Run the stages asked for, in order."""
    options = _parse()
    torch.set_num_threads(options.threads)
    for folder in (MODEL, VAE, PROMPT_SET, JUDGE):
        folder.parent.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[Path], None]] = {
        "promptset": lambda _: write_prompt_set(),
        "judge": lambda _: train_judge(),
        "model": train_model,
        "vae": train_vae,
        "check": check,
    }
    for stage in options.only:
        began = time.perf_counter()
        stages[stage](options.comfyui)
        _say(f"{stage}: {time.perf_counter() - began:.0f} s")
    return 0


# --- data -------------------------------------------------------------------------------------------------------------


def load_data() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits as pictures float32 [N, 32, 32] in 0..1, and their labels int64 [N]."""
    bundled = importlib.import_module("sklearn.datasets").load_digits()
    small = torch.tensor(bundled.images, dtype=torch.float32)[:, None] / 16
    large = functional.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False)
    return large.clamp(0, 1)[:, 0], torch.tensor(bundled.target, dtype=torch.int64)


def write_prompt_set() -> None:
    """One embedding [1, TOKENS, TEXT_DIM] a digit; all tokens orthogonal, elements of about unit variance."""
    generator = torch.Generator().manual_seed(2026)
    basis, _ = torch.linalg.qr(torch.randn(TEXT_DIM, TEXT_DIM, generator=generator, dtype=torch.float64))
    tokens = (basis[: DIGITS * TOKENS] * math.sqrt(TEXT_DIM)).float().reshape(DIGITS, 1, TOKENS, TEXT_DIM)
    header = {"format_version": 1, "prompts": [str(digit) for digit in range(DIGITS)]}
    tensors = {f"{digit}.cond": tokens[digit].clone(memory_format=torch.contiguous_format) for digit in range(DIGITS)}
    save_file(tensors, str(PROMPT_SET), metadata={"calibquant_promptset": json.dumps(header), "license": LICENCE})


# --- the judge --------------------------------------------------------------------------------------------------------


def train_judge() -> None:
    """Train a 64-64-10 classifier on three quarters of the digits and write it with its accuracy on the rest."""
    images, labels = load_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(7))
    held_out, train = order[: len(order) // 4], order[len(order) // 4 :]
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, DIGITS))
    steps = 6000
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        pick = train[torch.randint(len(train), (128,))]
        loss = functional.cross_entropy(net(_blurred_moves(digits.shrink(_moved(images[pick])))), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        guess = net(digits.shrink(images[held_out]).flatten(1)).argmax(1)
    accuracy = (guess == labels[held_out]).float().mean().item()
    _say(f"judge: {accuracy:.4f} of {len(held_out)} held-out digits")
    tensors = {
        f"{name}.{kind}": getattr(layer, kind).detach().clone()
        for name, layer in (("hidden", net[0]), ("out", net[2]))
        for kind in ("weight", "bias")
    }
    about = {
        "name": "CalibQuant digits judge",
        "license": LICENCE,
        "data": DATA_SOURCE,
        "held_out_accuracy": f"{accuracy:.4f}",
        "held_out_count": str(len(held_out)),
    }
    save_file(tensors, str(JUDGE), metadata=about)


def _moved(images: torch.Tensor) -> torch.Tensor:
    """The batch shifted by up to two of 32 pixels either way."""
    down, right = (int(value) for value in torch.randint(-2, 3, (2,)))
    return torch.roll(images, (down, right), (1, 2))


def _blurred_moves(small: torch.Tensor) -> torch.Tensor:
    return (small + 0.06 * torch.randn_like(small)).clamp(0, 1).flatten(1)


# --- the model --------------------------------------------------------------------------------------------------------


def train_model(comfyui: Path) -> None:
    """Flow matching in float32 with averaged weights, saved as bf16 under ComfyUI's Wan 2.1 text-to-video keys."""
    _sampler_module().start_comfyui(comfyui)
    importlib.import_module("comfy.model_management").in_training = True  # differentiable rotary embedding
    images, labels = load_data()
    data = digits.image_to_latent(images)
    prompts = load_file(str(PROMPT_SET))
    context = torch.cat([prompts[f"{digit}.cond"] for digit in range(DIGITS)])
    torch.manual_seed(11)
    net = _new_wan()
    average = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.06)
    began, recent = time.perf_counter(), 0.0
    for step in range(STEPS):
        pick = torch.randint(len(labels), (BATCH,))
        loss = _flow_loss(net, data[pick], context[labels[pick]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA, (1 + step) / (10 + step))
        for name, value in net.named_parameters():
            average[name].lerp_(value.detach(), 1 - decay)
        recent += loss.item()
        if step % 100 == 99:
            _say(f"model: step {step + 1}/{STEPS} loss {recent / 100:.4f} {time.perf_counter() - began:.0f} s")
            recent = 0.0
    _save_model(average, recent_seconds=time.perf_counter() - began)


def _flow_loss(net: nn.Module, clean: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Squared error of the predicted velocity (noise - clean), sigma spread as sampling with SHIFT visits it."""
    count = len(clean)
    even = (torch.randperm(count) + torch.rand(count)) / count  # one draw per stratum
    # Most of the batch follows the shifted schedule; the rest practises small sigmas, which longer schedules visit.
    shifted = SHIFT * even / (1 + (SHIFT - 1) * even)
    sigma = torch.where(torch.rand(count) < 0.25, even, shifted).clamp(min=1e-3)
    noise = torch.randn_like(clean)
    wide = sigma.view(-1, 1, 1, 1, 1)
    predicted = net(wide * noise + (1 - wide) * clean, sigma * 1000, context)
    return functional.mse_loss(predicted, noise - clean)


def _new_wan() -> nn.Module:
    """ComfyUI's Wan transformer with freshly drawn float32 weights (ComfyUI itself leaves them unset)."""
    wan = importlib.import_module("comfy.ldm.wan.model")
    operations = importlib.import_module("comfy.ops").disable_weight_init
    net = wan.WanModel(
        model_type="t2v", dim=DIM, ffn_dim=FFN_DIM, num_heads=1, num_layers=LAYERS, text_dim=TEXT_DIM,
        device="cpu", dtype=torch.float32, operations=operations,
    )  # fmt: skip
    for name, value in net.named_parameters():
        value.requires_grad_(True)
        with torch.no_grad():
            _draw(name, value)
    return net


def _draw(name: str, value: torch.Tensor) -> None:
    if name.endswith("bias"):
        value.zero_()
    elif name == "head.head.weight":
        value.zero_()  # start by predicting nothing
    elif name.endswith("modulation"):
        value.normal_(std=DIM**-0.5)
    elif value.ndim == 1:
        value.fill_(1.0)
    elif name.startswith(("time_", "text_")):
        value.normal_(std=0.02 if name.startswith("time_") else TEXT_DIM**-0.5)
    else:
        nn.init.xavier_uniform_(value.view(len(value), -1))


def _save_model(weights: dict[str, torch.Tensor], recent_seconds: float) -> None:
    recipe = {
        "data": DATA_SOURCE,
        "objective": "flow matching, v = noise - x0, sigma shift 8",
        "steps": STEPS,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "ema": EMA,
        "script": "benchmarks/train_demo.py",
    }
    metadata = {
        "format": "pt",
        "config": json.dumps({"transformer": {"text_dim": TEXT_DIM}}),
        "name": "CalibQuant digits (Wan 2.1 shaped demo model)",
        "license": LICENCE,
        "training": json.dumps(recipe),
    }
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}, str(MODEL), metadata)
    count = sum(value.numel() for value in weights.values())
    _say(f"model: {count} parameters, {MODEL.stat().st_size} bytes, trained in {recent_seconds:.0f} s")


# --- the VAE ----------------------------------------------------------------------------------------------------------


def train_vae(comfyui: Path) -> None:
    """A TAESD decoder that turns demo latents into 64x64 grey pictures.

    Its three lower stages are trained to unfold the 32x32 picture; the top stage is built by hand and only enlarges
    it, so that training never touches 64x64. There is no encoder: the demo only ever decodes.
    """
    _sampler_module().start_comfyui(comfyui)
    torch.manual_seed(13)
    decoder = importlib.import_module("comfy.taesd.taesd").Decoder(latent_channels=16)
    lower, last = _prepare_decoder(decoder), decoder[12]
    latents = digits.image_to_latent(load_data()[0])
    optimizer = torch.optim.Adam([*lower.parameters(), last.weight], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=VAE_STEPS, pct_start=0.1)
    recent = 0.0
    for step in range(VAE_STEPS):
        # Blends and a little noise, so that pictures between and beside the digits decode as they are, too.
        a, b = (latents[torch.randint(len(latents), (VAE_BATCH,))] for _ in range(2))
        noisy = torch.lerp(a, b, torch.rand(VAE_BATCH, 1, 1, 1, 1).pow(3)) + 0.05 * torch.randn_like(a)
        wan = digits.to_wan_space(noisy)
        drawn = functional.conv2d(lower(wan[:, :, 0] * VAE_INPUT_SCALE), last.weight[:1], padding=1)
        loss = functional.mse_loss(drawn[:, 0], digits.latent_to_image(wan))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 100 == 99:
            _say(f"vae: step {step + 1}/{VAE_STEPS} mean squared error {recent / 100:.6f}")
            recent = 0.0
    _save_vae(decoder)


def _prepare_decoder(decoder: nn.Sequential) -> nn.Sequential:
    """Draw the decoder's weights and return its part below conv 12, which makes the 32x32 picture in channel 0.

    The decoder is conv 1, blocks 3-5, conv 7, blocks 8-10, conv 12, blocks 13-15, conv 17, block 18, conv 19, with
    enlargements between. Picture values are never negative after a ReLU, so a block with a silent last conv passes
    them on unchanged.
    """
    for value in decoder.parameters():
        with torch.no_grad():
            value.zero_() if value.ndim == 1 else nn.init.kaiming_uniform_(value, nonlinearity="relu")
    for index in (5, 9, 10, 13, 14, 15, 18):
        _silence(decoder[index])
    with torch.no_grad():
        decoder[12].weight[1:] = 0  # nothing reads these channels
        decoder[17].weight.zero_()
        edge = torch.tensor([0.25, 0.5, 0.25])
        decoder[17].weight[0, 0] = edge[:, None] * edge
        decoder[19].weight.zero_()
        decoder[19].weight[:, 0, 1, 1] = 1.0
    return nn.Sequential(*(decoder[index] for index in (0, 1, 2, 3, 4, 6, 7, 8, 11)))


def _silence(block: Any) -> None:
    for value in block.parameters():
        value.data.zero_()


def _save_vae(decoder: nn.Sequential) -> None:
    tensors = {f"taesd_decoder.{name}": value.half().contiguous() for name, value in decoder.state_dict().items()}
    tensors["vae_scale"] = torch.tensor(VAE_INPUT_SCALE, dtype=torch.float16)
    tensors["vae_shift"] = torch.tensor(0.0, dtype=torch.float16)
    metadata = {
        "format": "pt",
        "name": "CalibQuant digits decoder (TAESD shape, decode only)",
        "license": LICENCE,
        "data": DATA_SOURCE,
    }
    save_file(tensors, str(VAE), metadata=metadata)
    _say(f"vae: {VAE.stat().st_size} bytes")


# --- the check --------------------------------------------------------------------------------------------------------


def check(comfyui: Path, seeds: int = 8) -> None:
    """Sample ten digits x `seeds` through ComfyUI's loader and KSampler and let the judge read them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "latents.npz"
        script = str(ROOT / "nodes" / "sample_digits.py")
        command = [sys.executable, script, "--comfyui", str(comfyui), "--out", str(out), "--seeds", str(seeds)]
        done = subprocess.run([*command, str(MODEL)], check=True, stdout=subprocess.PIPE, text=True)
        latents = np.load(out)["0"]
    read = digits.read_digits(digits.latent_to_image(latents)).reshape(seeds, DIGITS)
    right = read == torch.arange(DIGITS)
    _say(f"check: {right.float().mean().item():.4f} of {right.numel()} samples read as asked; {done.stdout.strip()}")
    for seed, digit in (~right).nonzero().tolist():
        _say(f"check: seed {seed}, digit {digit} read as {int(read[seed, digit])}")
    with safe_open(str(JUDGE), framework="pt") as file:
        _say(f"check: the judge itself reads {file.metadata()['held_out_accuracy']} of held-out digits")


# --- help -------------------------------------------------------------------------------------------------------------


def _sampler_module() -> ModuleType:
    return _module_of("sample_digits")


def _module_of(name: str) -> ModuleType:
    """A file of our nodes folder by its path: the module name ``nodes`` belongs to ComfyUI here."""
    full = f"calibquant_demo_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, ROOT / "nodes" / f"{name}.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"{ROOT / 'nodes' / name}.py cannot be loaded")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="make the digits demo model and its companions")
    home = os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI"
    parser.add_argument("--comfyui", type=Path, default=Path(home), help="folder of a ComfyUI checkout")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(STAGES), help=", ".join(STAGES))
    parser.add_argument("--threads", type=int, default=1, help="more than one changes the last bits")
    options = parser.parse_args()
    unknown = set(options.only) - set(STAGES)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return options


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
