"""CalibQuantPromptSet and CalibQuantLoadPromptSet: prompts encoded once, so that later graphs need no text encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..quant_core.errors import CalibQuantError
from ..quant_core.files.checkpoint import Checkpoint, TensorSpec, Writer
from .comfyui import feedback, folders, written
from .types import CATEGORY, ConditioningSetType

METADATA_KEY = "calibquant_promptset"


class CalibQuantPromptSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantPromptSet",
            display_name="Encode Prompt Set",
            category=CATEGORY,
            description="Encodes a list of prompts and saves it; Load Prompt Set then needs no text encoder.",
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model to calibrate."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line. Left empty: 64 varied prompts that ship with the pack.",
                ),
                io.String.Input(
                    "name",
                    default="my_prompts",
                    tooltip="File name below output/promptsets. A file of that name is replaced.",
                ),
            ],
            outputs=[ConditioningSetType.Output("prompt_set", tooltip="The encoded prompts, for Calibrate.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: object) -> int:
        return written.times_lost(cls.hidden.unique_id)

    @classmethod
    @feedback.in_node_words()
    def execute(cls, clip: Any, prompts: str, name: str) -> io.NodeOutput:
        texts = [line.strip() for line in prompts.splitlines() if line.strip()] or varied_prompts()
        path, progress = folders.saved_prompt_set_path(name), feedback.progress()(0)
        encoded = []
        for i, text in enumerate(texts):
            feedback.show(cls.hidden.unique_id, f"encoding prompt {i + 1} of {len(texts)}")
            encoded.append({"text": text, **_encode(clip, text)})
            progress(i + 1, len(texts), "")
        save_prompt_set(path, encoded)
        written.remember(cls.hidden.unique_id, path)
        return io.NodeOutput(encoded, ui=ui.PreviewText(f"{len(texts)} prompts saved as {path.name}"))


def varied_prompts() -> list[str]:
    """The pack's own prompts; lines that begin with # are comments."""
    lines = folders.VARIED_PROMPTS.read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _encode(clip: Any, text: str) -> dict[str, Any]:
    scheduled = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    if len(scheduled) != 1:
        raise CalibQuantError(f"prompt {text!r}: this CLIP changes with the step: unlink its hooks, then encode again")
    cond, options = scheduled[0]
    return {"cond": cond.cpu(), "options": {k: _to_cpu(v) for k, v in options.items() if v is not None}}


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def save_prompt_set(path: Path, prompts: list[dict[str, Any]]) -> None:
    """Write a file that :func:`load_prompt_set` reads, atomically; options that are plain values go into the header."""
    tensors: dict[str, torch.Tensor] = {}
    values: list[dict[str, Any]] = []
    for i, prompt in enumerate(prompts):
        options = {"cond": prompt["cond"], **prompt["options"]}
        tensors |= {f"{i}.{name}": value for name, value in options.items() if isinstance(value, torch.Tensor)}
        values.append({name: value for name, value in options.items() if not isinstance(value, torch.Tensor)})
    try:
        header = json.dumps({"prompts": [p["text"] for p in prompts], "options": values}, ensure_ascii=False)
    except TypeError as e:
        raise CalibQuantError(f"{path}: this CLIP returns something that cannot be saved ({e}): link its node") from e
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with Writer(path, specs, {METADATA_KEY: header}, overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class CalibQuantLoadPromptSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantLoadPromptSet",
            display_name="Load Prompt Set",
            category=CATEGORY,
            description="Loads prompts that were encoded and saved once; no text encoder is needed.",
            inputs=[
                io.Combo.Input(
                    "prompt_set",
                    options=folders.prompt_set_names(),
                    tooltip="From output/promptsets or models/calibquant_promptsets, or the digits of the demo model.",
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
                ConditioningSetType.Output("prompt_set", tooltip="All prompts of the file."),
                io.Conditioning.Output("conditioning", tooltip="The prompt at the index."),
            ],
        )

    @classmethod
    @feedback.in_node_words()
    def execute(cls, prompt_set: str, index: int) -> io.NodeOutput:
        path = folders.prompt_set_path(prompt_set)
        prompts = load_prompt_set(path)
        if index >= len(prompts):
            raise CalibQuantError(f"{path}: has {len(prompts)} prompts: index {index} must be below that")
        return io.NodeOutput(prompts, [[prompts[index]["cond"], prompts[index]["options"]]])


def load_prompt_set(path: Path) -> list[dict[str, Any]]:
    """Prompts of a file: each {"text", "cond": float32 [1, tokens, width], "options": pooled_output and alike}.

    The file is safetensors: ``N.cond`` and optional ``N.<option>`` tensors, prompt texts and plain options in the
    header.
    """
    with Checkpoint(path) as file:
        try:
            header = json.loads(file.metadata[METADATA_KEY])
            texts = header["prompts"]
            values = header.get("options") or [{}] * len(texts)
        except (KeyError, ValueError, TypeError) as e:
            raise CalibQuantError(f"{path}: is no prompt set: choose a file saved by this pack") from e
        return [{"text": text, **_prompt(file, i, values[i])} for i, text in enumerate(texts)]


def _prompt(file: Checkpoint, index: int, values: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in file.entries if name.startswith(f"{index}.")]
    tensors: dict[str, torch.Tensor] = {name.partition(".")[2]: file.read(name) for name in names}
    if "cond" not in tensors:
        raise CalibQuantError(f"{file.path}: prompt {index} has no tensor {index}.cond: save the set again")
    return {"cond": tensors.pop("cond"), "options": {**tensors, **values}}
