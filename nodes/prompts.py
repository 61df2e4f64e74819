"""CalibQuantLoadPromptSet: encoded prompts from a file, so that a graph needs no text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..quant_core.checkpoint import Checkpoint
from ..quant_core.errors import CalibQuantError
from . import comfyui

METADATA_KEY = "calibquant_promptset"


class CalibQuantLoadPromptSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantLoadPromptSet",
            display_name="Load Prompt Set",
            category=comfyui.CATEGORY,
            description="Loads prompts that were encoded and saved once; no text encoder is needed.",
            inputs=[
                io.Combo.Input(
                    "prompt_set",
                    options=comfyui.prompt_set_names(),
                    tooltip="A file from models/calibquant_promptsets, or the digits of the demo model.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=99999,
                    tooltip="Which prompt the CONDITIONING output carries. In the digits set it is the digit.",
                ),
            ],
            outputs=[
                comfyui.ConditioningSetType.Output("prompt_set", tooltip="All prompts of the file."),
                io.Conditioning.Output("conditioning", tooltip="The prompt at the index."),
            ],
        )

    @classmethod
    def execute(cls, prompt_set: str, index: int) -> io.NodeOutput:
        path = comfyui.prompt_set_path(prompt_set)
        prompts = load_prompt_set(path)
        if index >= len(prompts):
            raise CalibQuantError(f"{path}: has {len(prompts)} prompts: index {index} must be below that")
        return io.NodeOutput(prompts, [[prompts[index]["cond"], prompts[index]["options"]]])


def load_prompt_set(path: Path) -> list[dict[str, Any]]:
    """Prompts of a file: each {"text", "cond": float32 [1, tokens, width], "options": pooled_output and alike}.

    The file is safetensors: ``N.cond`` and optional ``N.<option>`` tensors, prompt texts in the header.
    """
    with Checkpoint(path) as file:
        try:
            texts = json.loads(file.metadata[METADATA_KEY])["prompts"]
        except (KeyError, ValueError, TypeError) as e:
            raise CalibQuantError(f"{path}: is no prompt set: choose a file saved by this pack") from e
        return [{"text": text, **_prompt(file, i)} for i, text in enumerate(texts)]


def _prompt(file: Checkpoint, index: int) -> dict[str, Any]:
    names = [name for name in file.entries if name.startswith(f"{index}.")]
    tensors: dict[str, torch.Tensor] = {name.partition(".")[2]: file.read(name) for name in names}
    if "cond" not in tensors:
        raise CalibQuantError(f"{file.path}: prompt {index} has no tensor {index}.cond: save the set again")
    return {"cond": tensors.pop("cond"), "options": tensors}
