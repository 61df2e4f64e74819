"""CalibQuantCompareClip ("Compare Text Encoders"): what a quantized encoder makes of prompts beside the original."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import conditioning
from ..quant_core.evidence.likeness import relative_error
from ..quant_core.files.header import Headers
from ..quant_core.files.markers import provenance
from ..quant_core.models.architectures import detect
from ..quant_core.reports import likeness as reports
from ..quant_core.reports.conditioning import Encoded, Prompt
from .calibrate import Clock
from .comfyui import encoding, feedback, folders, written
from .prompts import NO_FILE, file_fingerprint, file_input, prompts_in, texts_of
from .types import CATEGORY

MASK = "attention_mask"  # option of a conditioning: 1 for the prompt's tokens, 0 for padding


class CalibQuantCompareClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CalibQuantCompareClip",
            display_name="Compare Text Encoders",
            category=CATEGORY,
            description="Encodes the same prompts with two text encoders and says how far apart they are, token by "
            "token, in figures and in one sentence.",
            search_aliases=["quality", "benchmark", "clip", "conditioning", "cosine", "difference"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip_a", tooltip="The 16-bit original, from Load CLIP."),
                io.Clip.Input("clip_b", tooltip="The quantized copy, loaded with the same type."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt a line; others than the calibration's. Left empty: 16 that ship with the pack "
                    "for this and are not among the 64 for calibration.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="compare_clip",
                    tooltip="Below output/comparisons: the report as a page and as JSON. A number is appended; "
                    "nothing is overwritten.",
                ),
                file_input(),
            ],
            outputs=[io.String.Output("report", tooltip="The whole report as markdown.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str = NO_FILE, **_: object) -> str:
        return f"{file_fingerprint(file)} {written.times_lost(cls.hidden.unique_id)}"

    @classmethod
    @feedback.in_node_words()
    def execute(
        cls, clip_a: Any, clip_b: Any, prompts: str, filename_prefix: str, file: str = NO_FILE
    ) -> io.NodeOutput:
        began = time.monotonic()
        folders.new_comparison_path(filename_prefix)  # a name that cannot be is told before the work
        texts = texts_of(prompts, file) or prompts_in(folders.HELD_OUT_PROMPTS)
        wanted, found = _both(clip_a, clip_b, texts, cls.hidden.unique_id)
        compared = Encoded(
            *_files(clip_a, clip_b),
            seconds=time.monotonic() - began,
            prompts=[_judged(i, *each) for i, each in enumerate(zip(texts, found, wanted, strict=True), 1)],
            other_prompts=[_apart(other, one) for one, other in itertools.pairwise(wanted)],
        )
        return _saved(folders.new_comparison_path(filename_prefix), compared, cls.hidden.unique_id)


Encoding = dict[str, Any]  # as encoding.encode gives it


def _both(clip_a: Any, clip_b: Any, texts: list[str], node_id: str | None) -> tuple[list[Encoding], list[Encoding]]:
    """One encoder after the other, so that short memory is filled twice only."""
    total = 2 * len(texts)
    progress, clock = feedback.progress()(0), Clock(total)
    made: dict[str, list[Encoding]] = {"clip_a": [], "clip_b": []}
    for offset, (who, clip) in zip((1, 1 + len(texts)), (("clip_a", clip_a), ("clip_b", clip_b)), strict=True):
        for done, text in enumerate(texts, offset):
            made[who].append(encoding.encode(clip, text))
            if not made[who][-1]["cond"].isfinite().all():
                raise CalibQuantError(f"{who} makes NaN of {text!r}, no conditioning: load it in another dtype")
            progress(done, total, "")
            clock.tell(done, lambda left, who=who, text=text: feedback.show(node_id, f"{who} · {left}\n{text}"))
    return made["clip_a"], made["clip_b"]


def _judged(number: int, text: str, found: Encoding, wanted: Encoding) -> Prompt:
    a, b = (list(each["cond"].shape) for each in (wanted, found))
    if a != b:
        raise CalibQuantError(f"clip_a makes {a} of a prompt, clip_b {b}: load both of one family and type")
    if not wanted["cond"].any():
        raise CalibQuantError("clip_a makes nothing but zeros of a prompt: load it with the type of your model")
    mask = wanted["options"].get(MASK)
    others = {
        name: relative_error(found["options"][name], value)
        for name, value in wanted["options"].items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name in found["options"]
    }
    closeness = conditioning.compare(found["cond"], wanted["cond"], mask)
    return Prompt(**asdict(closeness), number=number, prompt=text, others=others)


def _apart(other: Encoding, one: Encoding) -> float:
    return conditioning.distance(other["cond"], one["cond"], one["options"].get(MASK))


def _files(clip_a: Any, clip_b: Any) -> tuple[str, str, str, str, int, int]:
    """Both's file names, the family, the second's recipe, both sizes; empty where a loader left no trace."""
    names, families, recipes, sizes = [], [], [], []
    for clip in (clip_a, clip_b):
        paths = encoding.files_of(clip)
        names.append(" + ".join(path.name for path in paths))
        opened = [found for path in paths if (found := _read(path))]
        families.append(" + ".join(family for family, _, _ in opened))
        recipes.append(" + ".join(recipe for _, recipe, _ in opened if recipe))
        sizes.append(sum(nbytes for _, _, nbytes in opened) if len(opened) == len(paths) else 0)
    return names[0], names[1], families[0], recipes[1], sizes[0], sizes[1]


def _read(path: Path) -> tuple[str, str, int] | None:
    try:
        with Headers(path) as file:
            shapes = {key: entry.shape for key, entry in file.entries.items()}
            return detect(shapes, shapes).name, str((provenance(file) or {}).get("recipe", "")), file.nbytes()
    except (CalibQuantError, OSError):  # no safetensors file, or gone
        return None


def _saved(target: Path, compared: Encoded, node_id: str | None) -> io.NodeOutput:
    page, data = (target.with_name(target.name + suffix) for suffix in (".md", ".json"))
    markdown, figures = compared.to_markdown(), compared.to_json()
    reports.save({page: markdown.encode(), data: figures.encode()})
    written.remember(node_id, page, data)
    shown = {
        "text": (f"{compared.summary()}\nsaved as {folders.shown(page)} and .json",),
        "calibquant_compare_clip": [json.loads(figures)],
    }
    return io.NodeOutput(markdown, ui=shown)
