"""The networks of one file: the diffusion model and, in an all-in-one checkpoint, text encoders and VAE.

Facts: ComfyUI 0.29 and 0.33, ``comfy/supported_models.py``: ``clip_target`` says which encoders of which family are
told of scales in a checkpoint (``Architecture.encoders``; no CLIP ever is), ``process_clip_state_dict`` and
``vae_key_prefix`` where the parts lie. ``tests/test_parts.py`` checks the table against those classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from ..files.header import TensorEntry
from .families import PARTS
from .families.row import Architecture, LayerInfo

KINDS = {"model": "diffusion model", "te": "text encoder", "vae": "VAE"}
_ENCODERS = re.compile(
    r"conditioner\.embedders\.\d+\.(?:transformer|model)\."  # SDXL: CLIP-L, OpenCLIP-G
    r"|cond_stage_model\.(?:transformer|model)\."  # SD 1.x, 2.x
    r"|(?:text_encoders|cond_stage_model)\.(?P<name>\w+)\.transformer\."  # what ComfyUI saves
)
_VAES = re.compile(r"(?:first_stage_model|vae|pretransform\.model)\.")


@dataclass(frozen=True)
class Part:
    """One network. architecture: how its layers are quantized; None where the loader reads no scales for it."""

    kind: str  # one of KINDS
    prefix: str  # of its keys
    architecture: Architecture | None
    name: str = ""  # of an encoder: "t5xxl", "clip_l"

    @property
    def title(self) -> str:
        return " ".join(filter(None, (KINDS.get(self.kind, self.kind), self.name)))

    def describe(self, layers: Iterable[str], keys: Collection[str]) -> dict[str, LayerInfo]:
        """What the table knows of layers, named as in the file; keys: all of the file's."""
        if self.architecture is None:
            return {}
        if self.kind == self.architecture.part == "model" or not self.prefix:
            return self.architecture.describe_file(layers, keys)
        bare = {layer.removeprefix(self.prefix): layer for layer in layers}
        inside = {key.removeprefix(self.prefix) for key in keys if key.startswith(self.prefix)}
        infos = self.architecture.describe_file(bare, inside)
        return {bare[name]: self._placed(bare[name], info) for name, info in infos.items()}

    def _placed(self, layer: str, info: LayerInfo) -> LayerInfo:
        """Beside the model's layers: its blocks are not theirs, nor are its inputs."""
        subgraph = ".".join((self.name, info.subgraph)).removesuffix(".main") if info.block is not None else ""
        shared = info.shared_input and self.prefix + info.shared_input
        return replace(info, name=layer, subgraph=subgraph, shared_input=shared)


def find(entries: Mapping[str, TensorEntry], model: Part) -> list[Part]:
    """All parts of a file whose main one is ``model``, in the order of the file."""
    found = {model.prefix: model}
    for key in entries if model.prefix else ():
        if (match := _ENCODERS.match(key)) and match[0] not in found:
            prefix, name = match[0], match["name"] or ""
            found[prefix] = Part("te", prefix, _encoder(entries, prefix, name, model), name)
        elif (match := _VAES.match(key)) and match[0] not in found:
            found[match[0]] = Part("vae", match[0], None)
    return list(found.values())


def _encoder(entries: Mapping[str, TensorEntry], prefix: str, name: str, model: Part) -> Architecture | None:
    """The row of an encoder that the loader tells of scales."""
    told = model.architecture.encoders if model.architecture else ()
    shapes = {key.removeprefix(prefix): entry.shape for key, entry in entries.items() if key.startswith(prefix)}
    row = next((row for row in PARTS if row.matches(set(shapes), shapes)), None)
    return row if row and row.part == "te" and name in told else None
