"""What the output file consists of: every tensor, the header, and so its exact size before any work is done."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

from .. import __version__
from ..errors import CalibQuantError
from ..files.checkpoint import HASH_PLACEHOLDER, TensorSpec, file_size, make_header
from ..files.markers import METADATA_KEY, PARTS, PROVENANCE_KEY, SPLIT, header_layers
from ..formats import FORMATS, SOURCE, changes_shape
from ..models import lora
from ..models.source import Source
from ..rounding import smoothing, split
from ..rounding.layerplan import LayerPlan
from . import folds
from .plan import Plan, check_input_scale
from .targets import core_needed

ROUNDINGS = ("nearest", "search", "gptq", "hswq")
LONGEST_NAME = 255  # bytes, of any file system
JOB = "job_sha256"  # entry in the provenance


def encode_config(config: Mapping[str, Any]) -> torch.Tensor:
    """The ``comfy_quant`` tensor: uint8 [n], the UTF-8 bytes of the JSON."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def layer_config(entry: LayerPlan, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """The one object from which both the inline tensor and the header entry are made."""
    return None if entry.format == SOURCE else FORMATS[entry.format].config(shape, entry.full_precision)


def layer_specs(source: Source, layer: str, entry: LayerPlan) -> list[TensorSpec]:
    """The tensors that replace ``layer.weight`` in the output."""
    if entry.format == SOURCE:
        return [TensorSpec(f"{layer}.weight", source.kept_dtype(layer), source.shape(layer))]
    layout = FORMATS[entry.format].layout(source.shape(layer))
    specs = [TensorSpec(f"{layer}.{suffix}", dtype, shape) for suffix, (dtype, shape) in layout.items()]
    if entry.pre_quant_scale:
        specs.append(TensorSpec(f"{layer}.{smoothing.KEY}", torch.bfloat16, source.shape(layer)[1:]))
    if entry.input_scale is not None:
        specs.append(TensorSpec(f"{layer}.input_scale", torch.float32, ()))
    config = layer_config(entry, source.shape(layer))
    if config is not None:
        specs.append(TensorSpec(f"{layer}.comfy_quant", torch.uint8, (len(encode_config(config)),)))
    return specs


def header_bytes(source: Source, layer: str, entry: LayerPlan) -> int:
    """Bytes of the output's header that are this layer's, and of its branch's in the other file, but for the digits of
    offsets."""
    config = layer_config(entry, source.shape(layer))
    ours = {METADATA_KEY: json.dumps({layer: config})} if config else {}
    ours[PROVENANCE_KEY] = json.dumps({layer: [entry.format, entry.reason]}, ensure_ascii=False)
    nbytes = len(make_header(layer_specs(source, layer, entry), ours)[0])
    if entry.rank:  # said in both files
        said, alone = json.dumps({layer: entry.rank}), Plan("", "", "", {layer: entry})
        nbytes += len(make_header(branch_specs(source, alone), {PROVENANCE_KEY: said})[0]) + len(json.dumps(said))
    return nbytes


def output_specs(source: Source, plan: Plan) -> list[TensorSpec]:
    """Every tensor of the output, in the order of the source."""
    check(source, plan)
    specs: list[TensorSpec] = []
    for key, entry in source.checkpoint.entries.items():
        layer = key.removesuffix(".weight")
        if key in source.consumed:
            continue
        if key.endswith(".weight") and layer in plan.layers:
            specs += layer_specs(source, layer, plan.layers[layer])
        elif source.is_scaled(key):  # a scaled Conv weight: its scale has no place in the native dialect
            specs.append(TensorSpec(key, source.kept_dtype(layer), entry.shape))
        else:
            specs.append(TensorSpec(key, source.copied_dtype(key), entry.shape))
    return specs


def output_metadata(
    source: Source,
    plan: Plan,
    sha256: str = HASH_PLACEHOLDER,
    merged: str = "",
    roundings: Collection[str] = (),
    branch: tuple[str, str] = ("", HASH_PLACEHOLDER),
    job: str = HASH_PLACEHOLDER,
) -> dict[str, str]:
    """The source's own metadata plus the two entries of ours.

    ``merged`` is a SHA-256 over the LoRA patches baked into the weights, "" for none; ``roundings`` are those that
    layers really got; ``branch`` is the name and SHA-256 of a split's LoRA; ``job`` is the digest that tells
    whether a file would only be made again. Hashes, roundings and that name take one length, so the size is known
    without them.
    """
    used = "+".join(name for name in ROUNDINGS if name in roundings)
    untouched = {
        layer: config for layer, config in header_layers(source.checkpoint).items() if _is_copied(source, layer)
    }
    configs = {layer: layer_config(entry, source.shape(layer)) for layer, entry in plan.layers.items()}
    ours = {layer: config for layer, config in configs.items() if config is not None}
    provenance = {
        "tool": f"ComfyUI-CalibQuant {__version__}",
        "source": {"file": source.name, "sha256": sha256},
        "architecture": plan.architecture,
        "recipe": plan.recipe,
        "rounding": f"{used:<{len('+'.join(ROUNDINGS))}}",
        "calibration": plan.calibration,
        "needs_comfyui": core_needed(plan),
        "merged_patches_sha256": merged or HASH_PLACEHOLDER,
        JOB: job,
        "plan": {layer: [entry.format, entry.reason] for layer, entry in plan.layers.items()},
    }
    if plan.parts:
        provenance[PARTS] = list(plan.parts)
    if plan.folds:
        provenance[folds.KEY] = folds.to_json(plan.folds)
        provenance["folded"] = {"layers": folds.changed(source, plan.folds), "note": folds.LORAS}
    if ranks := plan.ranks():
        name, digest = branch
        provenance[SPLIT] = {"lora": name, "sha256": digest, "ranks": ranks, "padding": _padding(name)}
    metadata = {k: v for k, v in source.checkpoint.metadata.items() if k not in (METADATA_KEY, PROVENANCE_KEY)}
    if ours or untouched:
        metadata[METADATA_KEY] = json.dumps({"format_version": "1.0", "layers": {**untouched, **ours}})
    metadata[PROVENANCE_KEY] = json.dumps(provenance, ensure_ascii=False)
    return metadata


def _is_copied(source: Source, layer: str) -> bool:
    """Whether what the source's header says of a layer goes for the output, too: it is of a part not chosen."""
    keys = (layer + ".weight", source.prefix + layer + ".weight")
    stored = next((key for key in keys if key in source.checkpoint.entries), "")
    return bool(stored) and not source.inside(stored)


def predicted_size(source: Source, plan: Plan) -> int:
    """Exact bytes of the file that this plan makes of this source."""
    return file_size(output_specs(source, plan), output_metadata(source, plan))


def branch_specs(source: Source, plan: Plan) -> list[TensorSpec]:
    """Every tensor of a split's LoRA."""
    specs = []
    for layer, rank in plan.ranks().items():
        up, down = lora.keys(source.short(layer))
        rows, columns = source.shape(layer)
        specs += [TensorSpec(up, lora.DTYPE, (rows, rank)), TensorSpec(down, lora.DTYPE, (rank, columns))]
    return specs


def branch_size(source: Source, plan: Plan) -> int:
    """Exact bytes of a split's LoRA, whatever it is named; 0 for a plan without one."""
    return file_size(branch_specs(source, plan), branch_metadata(source, plan, "")) if plan.ranks() else 0


def _padding(name: str) -> str:
    """So that files of any name have one size."""
    return " " * (LONGEST_NAME - len(name.encode("utf-8", "replace")))


def branch_metadata(
    source: Source, plan: Plan, name: str, sha256: str = HASH_PLACEHOLDER, merged: str = ""
) -> dict[str, str]:
    """What a split's LoRA says of itself; name: of the main file."""
    content = {
        "tool": f"ComfyUI-CalibQuant {__version__}",
        "belongs_to": name,
        "source": {"file": source.name, "sha256": sha256},
        "merged_patches_sha256": merged or HASH_PLACEHOLDER,
        "ranks": plan.ranks(),
        "load_with": "LoraLoaderBypassModelOnly at strength 1, never an ordinary LoRA loader",
        "padding": _padding(name),
    }
    return {PROVENANCE_KEY: json.dumps(content, ensure_ascii=False)}


def check(source: Source, plan: Plan) -> None:
    """CalibQuantError when the plan does not fit the source."""
    folds.check(source, plan.folds)
    if plan.parts != source.kinds:
        asked = ",".join(plan.parts) or "no choice of parts"
        raise CalibQuantError(f"{source.path}: was opened for other parts than the plan was made for ({asked}): say so")
    for layer, entry in plan.layers.items():
        known = layer in source.layers or layer in source.convolutions
        if not known:
            raise CalibQuantError(
                f"{source.path}: has no layer {layer}, which the plan names: make a plan for this file"
            )
        if entry.format == SOURCE:
            continue
        check_input_scale(entry.input_scale, f"{source.path}: layer {layer}")
        info = source.layers.get(layer)  # None: a convolution
        obstacle = (info.not_linear if info else "") or FORMATS[entry.format].obstacle(source.shape(layer))
        if not obstacle and info and changes_shape(FORMATS[entry.format], source.shape(layer)):
            obstacle = info.detects_shape
        if obstacle:
            raise CalibQuantError(f"{source.path}: layer {layer} cannot be {entry.format}: {obstacle}: change the plan")
        if entry.rank and (why := _no_branch(source, layer, entry)):
            raise CalibQuantError(
                f"{source.path}: layer {layer} cannot have a branch of rank {entry.rank}: {why}: change the plan"
            )
        if entry.pre_quant_scale and entry.format not in smoothing.FORMATS:
            raise CalibQuantError(
                f"{source.path}: layer {layer}: {smoothing.KEY} exists for {', '.join(smoothing.FORMATS)} only, not "
                f"for {entry.format}: change the plan"
            )


def _no_branch(source: Source, layer: str, entry: LayerPlan) -> str:
    """Why this layer cannot have the branch that is planned for it, "" if it can."""
    if entry.pre_quant_scale:
        return f"{smoothing.KEY} excludes it"
    if layer in source.layers and source.layers[layer].weight_only:
        return "its inputs are not rounded, and no LoRA loader of models reaches it"
    if entry.format in split.WITHOUT:
        return f"newer ComfyUI would lose it beside {entry.format}"
    fits = layer in source.layers and entry.rank <= min(source.shape(layer))
    return "" if fits else f"its shape is {source.shape(layer)}"
