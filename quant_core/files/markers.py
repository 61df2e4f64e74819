"""How a file says that its layers are quantized: inline ``comfy_quant`` tensors and the header. No torch.

Both are made from one object when we write, and a file in which they contradict each other is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CalibQuantError
from .header import Headers
from .text import parse_json

METADATA_KEY = "_quantization_metadata"
PROVENANCE_KEY = "calibquant"
PARTS = "parts"  # entry in the provenance: the parts of a checkpoint that were chosen, other than the model alone
SPLIT = "split"  # entry in the provenance of a file that is wrong without its LoRA
FP8 = ("F8_E4M3", "F8_E5M2")
MAX_CONFIG = 1 << 16  # bytes of a comfy_quant tensor; ours has 60


# What ComfyUI's loader acts on; group_size (but for W4A8's), orig_dtype and orig_shape are ignored there and
# differ between tools.
LOADER_FIELDS = ("format", "full_precision_matrix_mult", "convrot", "convrot_groupsize", "linear_dtype")


def declared_formats(file: Headers, prefix: str = "") -> dict[str, str]:
    """Layer -> format as the file itself declares it, inline or in the header; a contradiction is an error."""
    return {layer: config["format"] for layer, config in declared_configs(file, prefix).items()}


def declared_configs(file: Headers, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Layer (as the file's tensors name it) -> everything that the two places declare of it, "format" at least."""
    configs: dict[str, Any] = {}
    for layer, config in header_layers(file).items():
        if layer.startswith(prefix) or layer + ".weight" not in file.entries:
            configs[layer if layer + ".weight" in file.entries else prefix + layer] = _flat(config)
    for key in file.entries:
        if key.endswith(".comfy_quant") and key.startswith(prefix):
            layer = key.removesuffix(".comfy_quant")
            inline = _flat(read_config(file, layer))
            header = configs.get(layer, inline)
            if _acted_on(file.path, layer, header) != _acted_on(file.path, layer, inline):
                raise CalibQuantError(
                    f"{file.path}: layer {layer} is {inline} by its comfy_quant tensor and {header} by the header: "
                    "one of the two is wrong: quantize again"
                )
            configs[layer] = {**header, **inline}
    for layer, config in configs.items():
        _acted_on(file.path, layer, config)
    return configs


def header_layers(file: Headers) -> dict[str, Any]:
    """The ``layers`` object of the header's ``_quantization_metadata`` ({} without one)."""
    problem, remedy = f"{file.path}: {METADATA_KEY} in the header is damaged", "save the file again"
    content = parse_json(file.metadata.get(METADATA_KEY, '{"layers": {}}'), problem, remedy)
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise CalibQuantError(f"{problem} (it has no layers): {remedy}")
    return content["layers"]


def read_config(file: Headers, layer: str) -> Any:
    """The JSON of a layer's inline ``comfy_quant`` tensor."""
    problem, remedy = f"{file.path}: layer {layer} has a damaged comfy_quant tensor", "save the file again"
    if file.entry(layer + ".comfy_quant").nbytes > MAX_CONFIG:
        raise CalibQuantError(f"{problem} (it is too large): {remedy}")
    return parse_json(file.read_bytes(layer + ".comfy_quant"), problem, remedy)


def provenance(file: Headers) -> dict[str, Any] | None:
    """What the header says of how the file was made by this tool; None where it says nothing that can be read."""
    try:
        found = parse_json(file.metadata.get(PROVENANCE_KEY, "null"), "", "")
    except CalibQuantError:
        return None
    return found if isinstance(found, dict) else None


def parts_of(file: Headers) -> tuple[str, ...]:
    """The parts of a checkpoint that were chosen when this file was made; () for the diffusion model alone."""
    found = (provenance(file) or {}).get(PARTS)
    return tuple(kind for kind in found if isinstance(kind, str)) if isinstance(found, list) else ()


def branch_of(file: Headers) -> tuple[str, str] | None:
    """Name and SHA-256 of the LoRA that a split file is wrong without; None for every other file."""
    found = (provenance(file) or {}).get(SPLIT)
    if found is None:
        return None
    name, digest = (found.get(key) if isinstance(found, dict) else None for key in ("lora", "sha256"))
    if not (isinstance(name, str) and isinstance(digest, str) and Path(name).name == name and "\\" not in name):
        raise CalibQuantError(f"{file.path}: its header does not say which LoRA it was split into: quantize again")
    return name, digest


def _flat(config: Any) -> Any:
    """Some tools put all but the format into an object ``params``; the loader takes either, the outer one first."""
    inner = config.get("params") if isinstance(config, dict) else None
    return {**inner, **config} if isinstance(inner, dict) else config


def _acted_on(path: Path, layer: str, config: Any) -> dict[str, Any]:
    fmt = config.get("format") if isinstance(config, dict) else None
    if not isinstance(fmt, str) or not fmt.isprintable():
        raise CalibQuantError(f"{path}: layer {layer} has quantization data without a format: the file is damaged")
    fields = (*LOADER_FIELDS, "group_size") if fmt == "asym_w4a8_int8" else LOADER_FIELDS
    return {name: config[name] for name in fields if config.get(name)}
