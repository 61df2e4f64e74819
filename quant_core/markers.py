"""How a file says that its layers are quantized: inline ``comfy_quant`` tensors and the header. No torch.

Both are made from one object when we write, and a file in which they contradict each other is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CalibQuantError
from .header import Headers

METADATA_KEY = "_quantization_metadata"
PROVENANCE_KEY = "calibquant"
FP8 = ("F8_E4M3", "F8_E5M2")


def declared_formats(file: Headers, prefix: str = "") -> dict[str, str]:
    """Layer -> format as the file itself declares it, inline or in the header; a contradiction is an error."""
    formats: dict[str, str] = {}
    for layer, config in header_layers(file).items():
        if layer.startswith(prefix) or layer + ".weight" not in file.entries:
            formats[layer if layer + ".weight" in file.entries else prefix + layer] = _format(file.path, layer, config)
    for key in file.entries:
        if key.endswith(".comfy_quant") and key.startswith(prefix):
            layer = key.removesuffix(".comfy_quant")
            inline = _format(file.path, layer, read_config(file, layer))
            if formats.setdefault(layer, inline) != inline:
                raise CalibQuantError(
                    f"{file.path}: layer {layer} is {inline} by its comfy_quant tensor and {formats[layer]} by "
                    "the header: one of the two is wrong"
                )
    return formats


def header_layers(file: Headers) -> dict[str, Any]:
    """The ``layers`` object of the header's ``_quantization_metadata`` ({} without one)."""
    try:
        layers = json.loads(file.metadata.get(METADATA_KEY, '{"layers": {}}'))["layers"]
        return dict(layers)
    except (ValueError, KeyError, TypeError) as e:
        raise CalibQuantError(f"{file.path}: {METADATA_KEY} in the header is damaged ({e})") from e


def read_config(file: Headers, layer: str) -> Any:
    """The JSON of a layer's inline ``comfy_quant`` tensor."""
    try:
        return json.loads(file.read_bytes(layer + ".comfy_quant"))
    except ValueError as e:
        raise CalibQuantError(f"{file.path}: layer {layer} has a damaged comfy_quant tensor ({e})") from e


def _format(path: Path, layer: str, config: Any) -> str:
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise CalibQuantError(f"{path}: layer {layer} has quantization data without a format: the file is damaged")
    return config["format"]
