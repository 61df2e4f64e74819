"""convert_to_quant's command-line words: its format names, its presets, and a complete command from decisions.

Facts of the tool (PyPI ``convert-to-quant`` 1.3.4), checked against its real decisions in the tests. No torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from ..errors import CalibQuantError

KEPT = "bf16"  # left in the source dtype
TYPES = {"fp8": "float8_e4m3fn", "mxfp8": "mxfp8", "nvfp4": "nvfp4", "int8": "int8_tensorwise"}
# Substrings of the key that a preset of the tool keeps in the source dtype (facts/convert_to_quant.md §4).
PRESETS: dict[str, tuple[str, ...]] = {
    "zimage": (
        "cap_embedder.0", "cap_pad_token", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "k_norm",
        "q_norm", "x_pad_token", "x_embedder", "clip_text_pooled_proj", "final_layer", "cap_embedder.1",
        "adaLN_modulation", "t_embedder", "time_text_embed",
    ),
    "zimage_refiner": (
        "cap_embedder.0", "cap_pad_token", "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "k_norm",
        "q_norm", "x_pad_token", "context_refiner", "noise_refiner",
    ),
}  # fmt: skip


def to_command(formats: Mapping[str, str], source: str, output: str) -> str:
    """A complete convert_to_quant command that gives every layer the format named for it (layer -> format).

    The tool takes a base and one custom format, so three quantized formats are refused with a CalibQuantError.
    """
    names = {fmt: word for word, fmt in TYPES.items()}
    counts = Counter(fmt for fmt in formats.values() if fmt != KEPT)
    if not 1 <= len(counts) <= 2 or any(fmt not in names for fmt in counts):
        raise CalibQuantError(
            f"these decisions use {', '.join(counts) or 'no quantized format'}: convert_to_quant takes one base format "
            f"and one custom format out of {', '.join(TYPES)}"
        )
    base, *custom = (fmt for fmt, _ in counts.most_common())
    words = ["convert_to_quant", "-i", source, "-o", output, "--comfy_quant", "--save-quant-metadata", "--simple"]
    words += [] if base == TYPES["fp8"] else [f"--{names[base]}"]
    if custom:
        chosen = [layer for layer, fmt in formats.items() if fmt == custom[0]]
        words += ["--custom-layers", exact_pattern(chosen), "--custom-type", names[custom[0]], "--custom-simple"]
    kept = [layer for layer, fmt in formats.items() if fmt == KEPT]
    words += ["--exclude-layers", exact_pattern(kept)] if kept else []
    return " ".join(f'"{w}"' if re.search(r"[^\w./:=\-]", w) else w for w in words)


def exact_pattern(layers: Iterable[str]) -> str:
    """An anchored regular expression that matches the weight keys of exactly these layers; indices are folded."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        head, number, tail = _split(layer)
        groups.setdefault((head, tail), []).append(number)
    parts = []
    for (head, tail), numbers in groups.items():
        index = "" if numbers == [""] else f"(?:{'|'.join(numbers)})"
        parts.append(re.escape(head) + index + re.escape(tail))
    return f"^(?:{'|'.join(parts)})\\.weight$"


def _split(layer: str) -> tuple[str, str, str]:
    """("layers.", "3", ".attention.qkv"): the first number that is a whole part of the name."""
    match = re.search(r"(?<=\.)\d+(?=\.)", layer)
    return (layer[: match.start()], match.group(), layer[match.end() :]) if match else (layer, "", "")
