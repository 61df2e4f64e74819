"""CalibQuantPromptSet and CalibQuantLoadPromptSet: prompts encoded once, so that later graphs need no text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import promptset
from ..quant_core.files.text import counted, read_text
from .comfyui import encoding, feedback, folders, written
from .types import CATEGORY, ConditioningSetType

NO_FILE = "none"
MAX_CONDITIONINGS = 100  # links; ComfyUI's own limit


class CalibQuantPromptSet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantPromptSet",
            display_name="Encode Prompt Set",
            category=CATEGORY,
            description="Encodes a list of prompts and saves it; Load Prompt Set then needs no text encoder.",
            search_aliases=["calibration", "conditioning", "text encoder"],
            is_output_node=True,
            inputs=[
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder of the model to calibrate. Not a CLIP: link conditionings instead.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line, for clip. Left empty: 64 varied prompts that ship with the pack.",
                ),
                io.String.Input(
                    "name",
                    default="my_prompts",
                    tooltip="File name below output/promptsets. A file of that name is replaced.",
                ),
                file_input(),
                io.Autogrow.Input(
                    "conditionings",
                    template=io.Autogrow.TemplatePrefix(
                        io.Conditioning.Input(
                            "conditioning", optional=True, tooltip="One encoded prompt, from any text encoder's node."
                        ),
                        "conditioning_",
                        min=0,
                        max=MAX_CONDITIONINGS,
                    ),
                    optional=True,
                    tooltip="Prompts that other nodes encoded, one a link; saved after those of clip.",
                ),
            ],
            outputs=[ConditioningSetType.Output("prompt_set", tooltip="The encoded prompts, for Calibrate.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = NO_FILE, **_: object) -> str:
        return f"{file_fingerprint(file)} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls,
        prompts: str,
        name: str,
        clip: Any = None,
        file: str = NO_FILE,
        conditionings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        linked = [(key, value) for key, value in (conditionings or {}).items() if value is not None]
        texts = texts_of(prompts, file)
        _check_links(clip, texts, linked)
        texts = texts or (varied_prompts() if clip is not None else [])
        path, progress = folders.saved_prompt_set_path(name), feedback.progress()(0)
        encoded = []
        for i, text in enumerate(texts):
            feedback.show(cls.hidden.unique_id, f"encoding prompt {i + 1} of {len(texts)}")
            encoded.append({"text": text, **encoding.encode(clip, text)})
            progress(i + 1, len(texts), "")
        encoded += [{"text": key.replace("_", " "), **_prompt(value, key)} for key, value in linked]
        promptset.save(encoded, path)
        written.remember(cls.hidden.unique_id, path)
        return io.NodeOutput(encoded, ui=ui.PreviewText(f"{counted(len(encoded), 'prompt')} saved as {path.name}"))


def _check_links(clip: Any, texts: list[str], linked: list[Any]) -> None:
    if clip is None and texts:
        raise CalibQuantError("prompts need a CLIP to encode them: link one, or empty the box and link conditionings")
    if clip is None and not linked:
        raise CalibQuantError("there is nothing to encode with: link a CLIP, or conditionings that another node made")


def file_input() -> io.Combo.Input:
    return io.Combo.Input(
        "file",
        options=[NO_FILE, *folders.prompt_files()],
        default=NO_FILE,
        optional=True,
        tooltip="A text file in ComfyUI's input folder with one prompt a line, taken instead of prompts.",
    )


def file_fingerprint(file: str) -> str:
    return "" if file == NO_FILE else folders.prompt_file_fingerprint(file)


def texts_of(prompts: str, file: str) -> list[str]:
    """The prompts of the box, or of the file if one is chosen."""
    return _lines(prompts) if file == NO_FILE else prompts_in(folders.prompt_file(file))


def varied_prompts() -> list[str]:
    """The pack's own prompts."""
    return prompts_in(folders.VARIED_PROMPTS)


def prompts_in(path: Path) -> list[str]:
    """One a line; lines that begin with # are comments."""
    found = [line for line in _lines(read_text(path)) if not line.startswith("#")]
    if not found:
        raise CalibQuantError(f"{path}: has no prompts: write one a line")
    return found


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _prompt(conditioning: list[Any], name: str) -> dict[str, Any]:
    if len(conditioning) != 1:
        raise CalibQuantError(f"{name} holds {len(conditioning)} conditionings: link each of them by itself")
    return encoding.on_cpu(conditioning[0])


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
        prompts = promptset.load(path)
        if index >= len(prompts):
            raise CalibQuantError(f"{path}: has {len(prompts)} prompts: index {index} must be below that")
        return io.NodeOutput(prompts, [[prompts[index]["cond"], prompts[index]["options"]]])
