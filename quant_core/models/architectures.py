"""Which family a model is of: one table row per family, no code per family.

The rows lie in ``families``, a module for each group of relatives. A row says by which keys a family is known, where
its numbered blocks are, which layers see the same input, which stay in the source dtype by default, and from which
layers' shapes ComfyUI detects the model. Adding a family is adding a row.

Sources: ComfyUI's ``comfy/model_detection.py`` (detection keys, shapes read) and its model classes (blocks, shared
inputs, what is no Linear). ``tests/test_architectures.py`` and ``tests/test_families.py`` check the rows,
``tests/test_comfy_classes.py`` checks every class. Patterns see names without prefix and ".weight".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ..errors import CalibQuantError
from .families import PARTS, ROWS
from .families.row import NORM, PREFIXES, READ, TIME, Architecture, LayerInfo, layer_type, prefix_of

__all__ = [
    "ARCHITECTURES",
    "PREFIXES",
    "Architecture",
    "LayerInfo",
    "by_name",
    "detect",
    "layer_type",
    "part_of",
    "split_prefix",
]

# Any model: a numbered member of something called …block(s), …layer(s) or …refiner is a block, the outermost if nested.
# Shared inputs are not guessed.  The never-list joins those of the families ComfyUI detects by an input width.
GENERIC = Architecture(
    name="generic",
    title="unknown family",
    blocks=(("", r"^(?P<subgraph>(?:.+?\.)??[^.]*(?:block|layer|refiner)s?)\.(?P<block>\d+)\.(?P<kind>.+)$"),),
    protected=(
        (r"(?:^|\.)distilled_guidance_layer\.", TIME),  # Chroma: makes the modulation of all blocks
        *NORM,
    ),
    shape_read=tuple(
        (pattern, READ.format("the model's dimensions"))
        for pattern in (
            *(r"^(?:img_in|txt_in)$", r"^vector_in\.in_layer$", r"^cap_embedder\.1$", r"^label_emb\.0\.0$"),
            r"^input_blocks\.\d+\.1\.transformer_blocks\.0\.attn2\.to_k$",
            *(r"^context_embedder$", r"^x_embedder(?:\.proj(?:\.1)?)?$", r"^y_embedder\.mlp\.0$"),  # SD3, Cosmos
            *(r"^txt_in\.input_embedder$", r"^img_in\.proj$", r"^vision_in\.proj\.0$"),  # HunyuanVideo
            r"^transformer_blocks\.0\.attn2\.to_k$",  # LTX-Video, within a block
            *(r"^patch_embed\.(?:text_)?proj$", r"^blocks\.0\.norm1\.linear$", r"^ofs_embedding_linear_1$"),  # CogVideo
            r"^down_blocks\.1\.0\.channelwise\.0$",  # Stable Cascade B, within a block
            r"^transformer\.layers\.0\.(?:self_attn\.to_qkv|to_local_embed\.0)$",  # Stable Audio, within a block
            *(r"^to_(?:cond|global)_embed\.0$", r"^transformer\.project_in$"),  # Stable Audio
            *(r"^cond_seq_linear$", r"^extra_embedder\.0$", r"^(?:latent|cond)_in$"),  # AuraFlow, HunyuanDiT and 3D
            *(r"^input_proj$", r"^first$", r"^txtfusion\.projector$"),  # Ideogram 4, Krea 2
            *(r"^visual_embeddings\.in_layer$", r"^condition_proj$", r"^time_embedder\.proj_in$"),  # Kandinsky, MiniMax
        )
    ),
)

ARCHITECTURES: tuple[Architecture, ...] = (*ROWS, GENERIC)


class Mapped(Protocol):
    """What has a place on a map of layer types and blocks."""

    @property
    def subgraph(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def type(self) -> str: ...


def map_rows(layers: Iterable[Mapped]) -> list[str]:
    """The types of the layers inside blocks, as the rows of a map: main blocks first, then the other sub-graphs."""
    inside = [layer for layer in layers if layer.block is not None]
    subgraphs = list(dict.fromkeys(layer.subgraph for layer in inside))
    rows = {(layer.subgraph != "main", subgraphs.index(layer.subgraph), layer.type) for layer in inside}
    return [name for _, _, name in sorted(rows)]


def detect(keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Architecture:
    """Return the row of the model with these keys.

    ``keys`` may carry a prefix and lie among text encoder and VAE keys; ``shapes`` (same keys) settles the families
    that keys alone do not tell apart.  Never fails: a model without a row of its own is ``generic``.
    """
    keys = set(keys)
    if part := _part(keys, shapes or {}):
        return part
    prefix = split_prefix(keys)
    bare = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    bare_shapes = {key.removeprefix(prefix): shape for key, shape in (shapes or {}).items() if key.startswith(prefix)}
    return next(row for row in ARCHITECTURES if row.matches(bare, bare_shapes))


def by_name(name: str) -> Architecture:
    """Return the row called ``name``; CalibQuantError lists the known names."""
    rows = (*PARTS, *ARCHITECTURES)
    for row in rows:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in rows)
    raise CalibQuantError(f"unknown architecture {name!r}: known are {known}; leave it out to detect it from the file")


def part_of(name: str) -> str:
    """What the family called ``name`` is a part of: "model", "te" …; "model" for an unknown one."""
    return next((row.part for row in PARTS if row.name == name), "model")


def split_prefix(keys: Iterable[str]) -> str:
    """Return the prefix of the diffusion model's keys in this file: one of PREFIXES, or ""."""
    keys = set(keys)
    found = {prefix_of(key) for key in keys}
    return "" if _part(keys, {}) else next((prefix for prefix in PREFIXES if prefix in found), "")


def _part(keys: set[str], shapes: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """The row of a file that is all text encoder, vision tower or VAE: they are known by their keys as stored."""
    return next((row for row in PARTS if row.matches(keys, shapes)), None)
