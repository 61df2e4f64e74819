"""Train a LoRA for the digits demo model that draws bolder digits, reproducibly, on a CPU in about a minute.

    python benchmarks/train_demo_lora.py [--comfyui PATH]

Data, loss and needs are those of train_demo.py; only the LoRA's factors learn, on digits whose strokes are thickened.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from pathlib import Path

import torch
import train_demo as demo
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

LORA = demo.ROOT / "workflows" / "loras" / "calibquant_digits_bold.safetensors"
RANK, THICKER = 4, 5  # pixels of 32: every stroke grows by two on each side
STEPS, BATCH, LEARNING_RATE = 300, 40, 4e-3


def main() -> int:
    parser = argparse.ArgumentParser(description="train the demo model's LoRA")
    home = os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI"
    parser.add_argument("--comfyui", type=Path, default=Path(home), help="folder of a ComfyUI checkout")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more than one changes the last bits
    demo._sampler_module().start_comfyui(options.comfyui)
    importlib.import_module("comfy.model_management").in_training = True  # differentiable rotary embedding
    began = time.perf_counter()
    torch.manual_seed(17)
    net = demo._new_wan()
    net.load_state_dict({name: value.float() for name, value in load_file(str(demo.MODEL)).items()})
    net.requires_grad_(False)
    factors = _attach(net)
    _train(net, [value for pair in factors.values() for value in pair])
    _save(factors, time.perf_counter() - began)
    return 0


def _attach(net: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Down and up of every Linear in the blocks; up begins at zero, so the model begins as it is."""
    factors = {}
    for name, layer in net.named_modules():
        if not (name.startswith("blocks.") and isinstance(layer, nn.Linear)):
            continue
        down = nn.Parameter(torch.randn(RANK, layer.in_features) * layer.in_features**-0.5)
        up = nn.Parameter(torch.zeros(layer.out_features, RANK))
        factors[name] = (down, up)
        layer.register_forward_hook(
            lambda _, inputs, out, down=down, up=up: out + functional.linear(functional.linear(inputs[0], down), up)
        )
    return factors


def _train(net: nn.Module, factors: list[nn.Parameter]) -> None:
    images, labels = demo.load_data()
    bold = functional.max_pool2d(images[:, None], THICKER, stride=1, padding=THICKER // 2)[:, 0]
    data = demo.digits.image_to_latent(bold)
    prompts = load_file(str(demo.PROMPT_SET))
    context = torch.cat([prompts[f"{digit}.cond"] for digit in range(demo.DIGITS)])
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    recent = 0.0
    for step in range(STEPS):
        pick = torch.randint(len(labels), (BATCH,))
        loss = demo._flow_loss(net, data[pick], context[labels[pick]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if step % 50 == 49:
            demo._say(f"lora: step {step + 1}/{STEPS} loss {recent / 50:.4f}")
            recent = 0.0


def _save(factors: dict[str, tuple[nn.Parameter, nn.Parameter]], seconds: float) -> None:
    """Under the names that stock ComfyUI knows for any model."""
    tensors = {
        f"diffusion_model.{name}.{kind}.weight": value.detach().to(torch.bfloat16).contiguous()
        for name, pair in factors.items()
        for kind, value in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    recipe = {"data": demo.DATA_SOURCE, "strokes": f"thickened by a maximum over {THICKER}x{THICKER} of 32x32 pixels"}
    recipe |= {"rank": RANK, "steps": STEPS, "batch": BATCH, "script": "benchmarks/train_demo_lora.py"}
    metadata = {"format": "pt", "name": "CalibQuant digits, bold", "license": demo.LICENCE}
    LORA.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(LORA), metadata | {"training": json.dumps(recipe)})
    demo._say(f"lora: {len(factors)} layers, {LORA.stat().st_size} bytes, trained in {seconds:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
