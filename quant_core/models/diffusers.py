"""Model files in *diffusers* layout, seen as ComfyUI names and joins their tensors. Headers only, no torch.

While it loads such a file, ComfyUI renames tensors and joins some (q, k and v become one), and what a quantized one
consists of beside its codes is lost. So the file we write must be in ComfyUI's own layout, and everything from the plan
on sees the source in it: ``present`` gives a file's entries the names ComfyUI gives them. No byte is copied: a joined
tensor is a list of stored ones (``TensorEntry.parts``). Adding a layout is adding a table.

Facts: ComfyUI 0.29 and 0.33, ``comfy/utils.py`` (``*_to_diffusers``) and ``comfy/model_detection.py`` (which keys say
what a file is, ``convert_diffusers_mmdit``); ``tests/test_diffusers.py`` checks the tables against them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CalibQuantError
from ..files.header import Headers, TensorEntry
from .architectures import split_prefix

# ComfyUI's name -> the stored tensors that make its rows, in order; all without ".weight" and ".bias". "*" stands for
# the number of a block, "NAME[2/2]" for the second half of a tensor's rows.
Table = Mapping[str, str]
Stored = Mapping[str, TensorEntry]  # without prefix


@dataclass(frozen=True)
class Layout:
    """A layout that is converted. ``table`` sees the keys, because a UNet's depends on how many blocks there are."""

    title: str
    marks: tuple[str, ...]  # a file with all these keys is in this layout
    table: Callable[[Collection[str]], Table]
    kept: str = r"(?!)"  # pattern of the keys that are ComfyUI's already; by default none


def present(file: Headers) -> str:
    """Make ``file.entries`` those of ComfyUI's own layout. Returns what they were converted from, "" if nothing was.

    Raises CalibQuantError for a diffusers layout that is not converted here, or not all of it.
    """
    prefix = split_prefix(file.entries)
    stored = {name.removeprefix(prefix): entry for name, entry in file.entries.items() if name.startswith(prefix)}
    layout = next((row for row in LAYOUTS if all(mark in stored for mark in row.marks)), None)
    if layout is None:
        _refuse_foreign(file.path, stored)
        return ""
    entries = {name: entry for name, entry in file.entries.items() if not name.startswith(prefix)}
    for name, entry in _converted(file.path, layout, stored).items():
        entries[prefix + name] = replace(entry, name=prefix + name)
    file.entries = dict(sorted(entries.items()))  # in which safetensors would have written them
    return layout.title


_REMEDY = "use the 16-bit model in ComfyUI's layout (its single-file release), or save it from ComfyUI with ModelSave"


def _refuse_foreign(path: Path, stored: Stored) -> None:
    for pattern, unless in _FOREIGN:
        found = next((key for key in stored if re.match(pattern, key)), None)
        if found and unless not in stored:
            known = ", ".join(row.title for row in LAYOUTS)
            raise CalibQuantError(f"{path}: is in a diffusers layout (it has {found}) other than {known}: {_REMEDY}")


# --- converting

_NUMBER = re.compile(r"(transformer_blocks|layers|refiner)\.(\d+)\.")
Part = tuple[str, str]  # stored key, "" or "[1/2]" or "[2/2]"


def _converted(path: Path, layout: Layout, stored: Stored) -> dict[str, TensorEntry]:
    rows = {part.partition("[")[0]: row for row in layout.table(stored).items() for part in row[1].split()}
    wanted: dict[str, list[Part]] = {}
    for key in stored:
        name, parts = _place(key, rows) or (key if re.match(layout.kept, key) else "", [(key, "")])
        if not name or wanted.setdefault(name, parts) != parts:
            raise CalibQuantError(
                f"{path}: is in the diffusers layout of {layout.title}, but ComfyUI's has no place for {key}: {_REMEDY}"
            )
    return {name: _joined(path, name, [_part(path, stored, part) for part in parts]) for name, parts in wanted.items()}


def _place(key: str, rows: Mapping[str, tuple[str, str]]) -> tuple[str, list[Part]] | None:
    """ComfyUI's key for a stored one, with all parts of that tensor."""
    name, _, end = key.rpartition(".")
    row = rows.get(_NUMBER.sub(r"\1.*.", name, count=1))
    if row is None or end not in ("weight", "bias"):
        return None
    block = _NUMBER.search(name)
    native, parts = (text.replace("*", block[2] if block else "*") for text in row)
    halves = [part.partition("[") for part in parts.split()]
    return f"{native}.{end}", [(f"{stored}.{end}", bracket + half) for stored, bracket, half in halves]


def _part(path: Path, stored: Stored, part: Part) -> TensorEntry:
    key, half = part
    if key not in stored:
        raise CalibQuantError(f"{path}: has no tensor {key}: check that the file is complete")
    entry = stored[key]
    if not half:
        return entry
    if not entry.shape or entry.shape[0] % 2 or entry.blocks:
        raise CalibQuantError(f"{path}: tensor {key} of shape {entry.shape} has no two halves: {_REMEDY}")
    rows, nbytes = entry.shape[0] // 2, entry.nbytes // 2
    start = entry.start + (nbytes if half == "[2/2]" else 0)
    return replace(entry, shape=(rows, *entry.shape[1:]), start=start, nbytes=nbytes)


def _joined(path: Path, name: str, parts: list[TensorEntry]) -> TensorEntry:
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(part.shape for part in parts) or len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        names = ", ".join(part.name for part in parts)
        raise CalibQuantError(f"{path}: ComfyUI joins {names} to {name}, but they differ in dtype or width: {_REMEDY}")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return replace(first, name=name, shape=shape, nbytes=sum(part.nbytes for part in parts), parts=tuple(parts))


# --- tables


def _block(native: str, stored: str, table: Table) -> Table:
    """The table of a block's inside, put into its place."""
    return {f"{native}.{name}": " ".join(f"{stored}.{part}" for part in parts.split()) for name, parts in table.items()}


_FLUX: Table = {
    **_block("double_blocks.*", "transformer_blocks.*", {
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    }),
    **_block("single_blocks.*", "single_transformer_blocks.*", {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "modulation.lin": "norm.linear",
    }),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear[2/2] norm_out.linear[1/2]",  # scale and shift change places
    "final_layer.linear": "proj_out",
}  # fmt: skip

_ZIMAGE_ATTENTION: Table = {
    "qkv": "to_q to_k to_v",
    "out": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_ZIMAGE: Table = {
    **_block("layers.*.attention", "layers.*.attention", _ZIMAGE_ATTENTION),
    **_block("context_refiner.*.attention", "context_refiner.*.attention", _ZIMAGE_ATTENTION),
    **_block("noise_refiner.*.attention", "noise_refiner.*.attention", _ZIMAGE_ATTENTION),
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}

_RESNET: Table = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION: Table = {
    name: name
    for name in (
        *("norm", "proj_in", "proj_out"),
        *(f"transformer_blocks.*.norm{i}" for i in (1, 2, 3)),
        *(f"transformer_blocks.*.attn{i}.to_{to}" for i in (1, 2) for to in ("q", "k", "v", "out.0")),
        *("transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2"),
    )
}


def _unet(keys: Collection[str]) -> Table:
    """ComfyUI numbers blocks through; diffusers numbers levels, of ``deep`` blocks each, one more on the way up."""
    levels, deep = _count(keys, "down_blocks.{}."), _count(keys, "down_blocks.0.resnets.{}.")
    table: dict[str, str] = {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **_block("middle_block.0", "mid_block.resnets.0", _RESNET),
        **_block("middle_block.1", "mid_block.attentions.0", _ATTENTION),
        **_block("middle_block.2", "mid_block.resnets.1", _RESNET),
    }
    embedding = "add_embedding" if "add_embedding.linear_1.weight" in keys else "class_embedding"
    table |= {"label_emb.0.0": f"{embedding}.linear_1", "label_emb.0.2": f"{embedding}.linear_2"}
    for level in range(levels):
        first_in, first_out = 1 + level * (deep + 1), level * (deep + 1)
        for i in range(deep + 1):
            down, up = f"down_blocks.{level}", f"up_blocks.{level}"
            table |= _block(f"output_blocks.{first_out + i}.0", f"{up}.resnets.{i}", _RESNET)
            table |= _block(f"output_blocks.{first_out + i}.1", f"{up}.attentions.{i}", _ATTENTION)
            if i < deep:
                table |= _block(f"input_blocks.{first_in + i}.0", f"{down}.resnets.{i}", _RESNET)
                table |= _block(f"input_blocks.{first_in + i}.1", f"{down}.attentions.{i}", _ATTENTION)
        table[f"input_blocks.{first_in + deep}.0.op"] = f"{down}.downsamplers.0.conv"
        after = 2 if f"{up}.attentions.{deep}.norm.weight" in keys else 1  # resnet, attention if any, upsampler
        table[f"output_blocks.{first_out + deep}.{after}.conv"] = f"{up}.upsamplers.0.conv"
    return table


def _count(keys: Collection[str], name: str) -> int:
    """How many there are, of ten that may be: a damaged file must not make a table without end."""
    return next((i for i in range(10) if not any(key.startswith(name.format(i)) for key in keys)), 10)


LAYOUTS = (
    Layout("Flux.1", ("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"), lambda _: _FLUX),
    # ComfyUI keeps the names it does not know (the decoder of pixel-space models); none of those may be diffusers'.
    Layout(
        "Z-Image",
        ("noise_refiner.0.attention.norm_k.weight",),
        lambda _: _ZIMAGE,
        kept=r"(?!all_|.*\.attention\.(to|norm)_)",
    ),
    Layout("Stable Diffusion 1.x, 2.x and XL", ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), _unet),
)

# Keys that no model class of ComfyUI has, unless the key beside them is there too. ComfyUI renames AuraFlow, SD3 and
# PixArt, takes Lumina 2 for OmniGen2 and Flux.2 for Flux.1, and knows none of the others.
_FOREIGN = (
    (r"(joint|single)_transformer_blocks\.\d+\.attn\.to_\w+\.weight$", ""),  # AuraFlow, Flux.2, HunyuanVideo
    (r"pos_embed\.proj\.(weight|bias)$", ""),  # SD3, PixArt, Hunyuan-DiT
    (r"conv_in\.weight$", ""),  # UNets of another make
    (r"time_caption_embed\.", "ref_image_patch_embedder.weight"),  # Lumina 2; with it OmniGen2 and Boogu
    (r"blocks\.\d+\.attn1\.to_out\.0\.weight$", ""),  # Wan
    (r"transformer_blocks\.\d+\.attn1\.norm_q\.weight$", ""),  # LTX-Video, CogVideoX, Mochi, Cosmos
    (r"context_embedder\.time_text_embed\.", ""),  # HunyuanVideo 1.5
)
