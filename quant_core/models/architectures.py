"""What is known of each model family: one table row per family, no code per family.

A row says by which keys a family is known, where its numbered blocks are, which layers see the same input, which stay
in the source dtype by default, and from which layers' shapes ComfyUI detects the model.  ``describe`` makes a layer's
``LayerInfo`` from its name and the row alone.  Adding a family is adding a row.

Sources: ComfyUI 0.29 ``comfy/model_detection.py`` (detection keys, shapes read) and its model classes (blocks, shared
inputs, what is no Linear).  ``tests/test_architectures.py`` checks the rows, ``tests/test_comfy_classes.py`` checks
every class.  Patterns see names without prefix and ".weight".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from ..errors import CalibQuantError

# Longest first.  ComfyUI itself strips only the first; the second is the naming of LoRA trainers and ModelSave tools.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")

Rules = tuple[tuple[str, str], ...]  # (regular expression, reason), first match wins
Shared = tuple[tuple[str, tuple[str, ...]], ...]  # (where in the name, kinds); see Architecture.shared
Bound = tuple[float, float]  # so many times a weight's rows plus so many times its columns


@dataclass(frozen=True)
class LayerInfo:
    """What the table knows of one layer."""

    name: str  # as in the checkpoint, prefix included, without ".weight"
    subgraph: str  # "main", "context_refiner", "double", "vace", "input" …; "" outside the blocks
    block: int | None  # index within the subgraph
    kind: str  # layer type: the name with the block part removed ("attention.qkv", "ffn.0", "x_embedder")
    shared_input: str  # id of the group of layers that see the same input, "" when alone
    protected: str  # why the layer stays in the source dtype by default, "" if it may be quantized
    detects_shape: str  # why the layer must never be NVFP4, "" otherwise
    note: str = ""  # what is known of its sensitivity; binds nobody, recipes and reports may use it
    not_linear: str = ""  # why no format can ever be loaded for it (it is then protected too), "" otherwise

    @property
    def type(self) -> str:
        return layer_type(self.subgraph, self.kind)


class Mapped(Protocol):
    """What has a place on a map of layer types and blocks."""

    @property
    def subgraph(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def type(self) -> str: ...


@dataclass(frozen=True)
class Consumer:
    """Columns of a Linear of this kind, by default all."""

    kind: str
    start: Bound = (0, 0)
    stop: Bound = (0, 1)


@dataclass(frozen=True)
class Producer:
    """Rows of a Linear, or entries of a norm, of this kind; weight and bias alike, by default all.

    plus_one: the model adds 1 to what they make (a modulation's scale). optional: not every model has it.
    """

    kind: str
    start: Bound = (0, 0)
    stop: Bound = (1, 0)
    plus_one: bool = False
    optional: bool = False


@dataclass(frozen=True)
class FoldRule:
    """Channels whose scale may be changed within one block: producers divide by it, consumers' columns multiply.

    Exact where the consumers see nothing but what the producers make, through linear steps only, and nobody else sees
    it. head: kind of a norm as long as one head, for attention whose heads share values in groups.
    """

    consumers: tuple[Consumer, ...]
    producers: tuple[Producer, ...]
    head: str = ""


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    ``blocks`` patterns have the named groups ``block`` and ``kind``.  ``sub``, if there, numbers blocks within a block:
    the index is then ``10 * block + sub`` (input_blocks.4.1.transformer_blocks.1 is block 41; none has more than 10).
    ``shared`` lists kinds that are called with the same tensor: within one block ("block"), or in all blocks of all
    subgraphs ("model": text context and timestep embedding are computed once and handed to every block).
    ``folds`` are what ``folding`` may do; tests/test_folding.py checks each against ComfyUI's class.
    """

    name: str
    title: str
    all_of: tuple[str, ...] = ()  # keys that must all be there
    any_of: tuple[str, ...] = ()  # of these at least one, where there are any
    none_of: tuple[str, ...] = ()  # keys of look-alikes with a row of their own (or none yet)
    not_size: tuple[tuple[str, int, int], ...] = ()  # (key, dimension, size) of look-alikes with the very same keys
    blocks: tuple[tuple[str, str], ...] = ()  # (subgraph, pattern)
    shared: Shared = ()
    protected: Rules = ()
    shape_read: Rules = ()
    notes: Rules = ()
    folds: tuple[FoldRule, ...] = ()

    def matches(self, keys: set[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """True if these keys (and shapes, where known), without prefix, are a model of this family."""
        return (
            all(key in keys for key in self.all_of)
            and (not self.any_of or any(key in keys for key in self.any_of))
            and not any(key in keys for key in self.none_of)
            and not any(key in shapes and shapes[key][dim] == size for key, dim, size in self.not_size)
        )

    def describe(self, layer: str) -> LayerInfo:
        """Describe one layer.

        ``layer`` is a name with or without prefix and ".weight".  Never fails: a name the row does not know lies
        outside the blocks and is protected.
        """
        layer = layer.removesuffix(".weight")
        name = layer.removeprefix(_prefix_of(layer))
        subgraph, block, kind = self._place(name)
        protected = _first_match(self.protected, name)
        if block is None:
            protected = protected or _OUTSIDE
        shape_read = _first_match(self.shape_read, name)
        shared = self._shared(name, kind) if block is not None else ""
        return LayerInfo(layer, subgraph, block, kind, shared, protected, shape_read, _first_match(self.notes, name))

    def describe_file(self, layers: Iterable[str], keys: Collection[str]) -> dict[str, LayerInfo]:
        """Describe the layers of one file: ``keys``, all of its keys, tell Linears from what only looks like one."""
        routed = {key.partition(_EXPERTS)[0] for key in keys if _EXPERTS in key}
        infos = {}
        for layer in layers:
            reason = _not_linear(layer, keys, routed)
            info = self.describe(layer)
            infos[layer] = replace(info, protected=reason, not_linear=reason) if reason else info
        return infos

    def _place(self, name: str) -> tuple[str, int | None, str]:
        for subgraph, pattern in self.blocks:
            if match := re.match(pattern, name):
                groups = match.groupdict()
                block = int(groups["block"])
                if "sub" in groups:
                    block = 10 * block + int(groups["sub"] or 0)
                return groups.get("subgraph") or subgraph, block, groups["kind"]
        return "", None, name

    def _shared(self, name: str, kind: str) -> str:
        for scope, kinds in self.shared:
            if kind in kinds:
                where = name.removesuffix(kind) if scope == "block" else "*."
                return where + "{" + ",".join(kinds) + "}"
        return ""


def layer_type(subgraph: str, kind: str) -> str:
    """The kind, with the sub-graph before it where that is not the main one."""
    return kind if subgraph in ("main", "") else f"{subgraph}.{kind}"


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
    keys = list(keys)
    prefix = split_prefix(keys)
    bare = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    bare_shapes = {key.removeprefix(prefix): shape for key, shape in (shapes or {}).items() if key.startswith(prefix)}
    return next(row for row in ARCHITECTURES if row.matches(bare, bare_shapes))


def by_name(name: str) -> Architecture:
    """Return the row called ``name``; CalibQuantError lists the known names."""
    for row in ARCHITECTURES:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in ARCHITECTURES)
    raise CalibQuantError(f"unknown architecture {name!r}: known are {known}; leave it out to detect it from the file")


def split_prefix(keys: Iterable[str]) -> str:
    """Return the prefix of the diffusion model's keys in this file: one of PREFIXES, or ""."""
    found = {_prefix_of(key) for key in keys}
    return next((prefix for prefix in PREFIXES if prefix in found), "")


def _prefix_of(name: str) -> str:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def _first_match(rules: Rules, name: str) -> str:
    return next((reason for pattern, reason in rules if re.search(pattern, name)), "")


def _not_linear(layer: str, keys: Collection[str], routed: Collection[str]) -> str:
    """Why the loader does not run this weight as a Linear, "" if it does, as far as names can tell.

    A loader reads scales for Linears only. Any other matrix would be used without its scale, and nobody would say so.
    ``routed``: the modules that have experts.
    """
    name = layer.removeprefix(_prefix_of(layer))
    if reason := _first_match(_RUN_OTHERWISE, name):
        return reason
    kind = _NUMBERED_TABLE.sub(r"\1", name).rpartition(".")[2]
    if _TABLE.fullmatch(kind) and f"{layer}.bias" not in keys:
        return "table of embeddings: the loader looks rows up in it and reads no scale for it"
    router = _ROUTER.fullmatch(layer)
    if router and router[1] in routed:
        return "router of a mixture of experts: the loader multiplies by it as it is and reads no scale for it"
    return ""


# --- what is no Linear, whatever the family; tests/test_comfy_classes.py checks it against all of ComfyUI's classes
_EXPERTS = ".experts."
_ROUTER = re.compile(r"(.+)\.(?:gate|router)(?:\.[^.]+)?")  # beside experts; elsewhere a gate is a Linear (SwiGLU)
# No table has a bias, and nearly every Linear with such a name (x_embedder, cond_embed) has one.
_TABLE = re.compile(
    r".*emb.*|(?:.*_)?tokens?|shared|relative_attention_bias|wte|wpe|codebook|"
    r"timestep_features|reference_points|trainable_cond_mask"  # Stable Audio, SAM 3, Wan S2V
)
_NUMBERED_TABLE = re.compile(r"(embeddings)\.\d+$")
_RUN_OTHERWISE: Rules = (
    (r"^motion_encoder\.", "the loader scales this weight by its own rule and reads no scale for it"),  # Wan Animate
    (r"(?:^|\.)pixel_blocks\.\d+\.adaLN_modulation\.0$", "the loader splits this weight, not its scales"),  # PixelDiT
    (r"^cc_projection$", "the loader applies this weight outside the model and reads no scale for it"),  # Zero123
)

# --- reasons
_OUTSIDE = "lies outside the numbered blocks"
_EMBEDDER = "embedder: every block depends on it, and it is small"
_TIME = "timestep or guidance embedder: scales every block at every step, and it is small"
_FINAL = "final layer: nothing downstream evens its error out"
_NORM = ((r"(?:^|\.)[^.]*norm[^.]*$", "norm: one value per channel, not a matrix"),)
_READ = "ComfyUI reads {} from the shape of its weight, which NVFP4 packing halves: the file would not load"


def _numbered(container: str) -> str:
    return rf"^{container}\.(?P<block>\d+)\.(?P<kind>.+)$"


def _fold(consumers: Iterable[str], *producers: Producer | str, head: str = "") -> FoldRule:
    """Whole inputs of these kinds; a producer's name stands for all of its rows."""
    made = tuple(Producer(one) if isinstance(one, str) else one for one in producers)
    return FoldRule(tuple(map(Consumer, consumers)), made, head)


def _modulated(consumers: Iterable[str], modulation: str, shift: int) -> FoldRule:
    """Inputs norm * (1 + scale) + shift: the modulation's rows hold shift and scale, each as many as it has columns."""
    by_one = (
        Producer(modulation, (0, shift), (0, shift + 1)),
        Producer(modulation, (0, shift + 1), (0, shift + 2), True),
    )
    return _fold(consumers, *by_one)


# --- rows
# Z-Image differs from Lumina 2 by a modulation without SiLU, so its Linear is number 0 of its Sequential, not 1.
# ComfyUI tells them apart by the width (3840); the key says the same of all published files, and of small models too.
_LUMINA2 = Architecture(
    name="lumina2",
    title="Lumina 2",
    all_of=("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"),
    blocks=(
        ("main", _numbered("layers")),
        ("context_refiner", _numbered("context_refiner")),
        ("noise_refiner", _numbered("noise_refiner")),
        ("siglip_refiner", _numbered("siglip_refiner")),  # Z-Image Omni
    ),
    shared=(
        ("block", ("feed_forward.w1", "feed_forward.w3")),
        ("model", ("adaLN_modulation.0",)),  # the timestep embedding itself
        ("model", ("adaLN_modulation.1",)),  # its SiLU
    ),
    protected=(
        (r"^(?:x_embedder|cap_embedder|siglip_embedder|clip_text_pooled_proj)(?:\.|$)", _EMBEDDER),
        (r"^(?:t_embedder|time_text_embed)\.", _TIME),
        (r"^(?:final_layer|dec_net)\.", _FINAL),
        *_NORM,
    ),
    shape_read=((r"^cap_embedder\.1$", _READ.format("the width of the text features")),),
    notes=(
        (r"\.adaLN_modulation\.[01]$", "convert_to_quant --zimage keeps it; the published recipes keep layers 22-29"),
        (r"^(?:context|noise)_refiner\.", "convert_to_quant --zimage_refiner keeps it: a refiner has only two blocks"),
        (r"^layers\.29\.attention\.qkv$", "the published recipes keep it: only the final layer follows"),
    ),
    # All subgraphs are of one class. adaLN_modulation sees the timestep embedding, which the final layer sees through
    # a SiLU: no fold. clamp_fp16 after w1, w3 acts on overflows only.
    folds=(
        _fold(("attention.qkv",), "attention_norm1"),
        _fold(("feed_forward.w1", "feed_forward.w3"), "ffn_norm1"),
        # q has as many rows as the input has channels; k and v halve the rest
        _fold(("attention.out",), Producer("attention.qkv", (0.5, 0.5)), head="attention.k_norm"),
        _fold(("feed_forward.w2",), "feed_forward.w3"),
    ),
)

_ZIMAGE = replace(
    _LUMINA2,
    name="zimage",
    title="Z-Image",
    all_of=(*_LUMINA2.all_of, "noise_refiner.0.adaLN_modulation.0.weight"),
)

_ZIMAGE_PIXEL = replace(
    _ZIMAGE,
    name="zimage_pixel",
    title="Z-Image in pixel space",
    all_of=(*_LUMINA2.all_of, "dec_net.cond_embed.weight"),
    shape_read=(
        *_LUMINA2.shape_read,
        (r"^x_embedder$", _READ.format("the patch size")),
        (r"^dec_net\.input_embedder\.embedder\.0$", _READ.format("the decoder's frequencies")),
    ),
)

# 2.1 and 2.2; t2v, i2v, first-last-frame, VACE, and the derivatives that ComfyUI knows by the same head (S2V, HuMo,
# Animate …), whose extra branches outside blocks.* stay.  ComfyUI reads convolutions, modulation and output sizes only,
# none of which changes when a Linear whose sizes divide is quantized.
_WAN = Architecture(
    name="wan",
    title="Wan 2.1 / 2.2",
    all_of=("head.modulation", "head.head.weight", "blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight"),
    blocks=(("main", _numbered("blocks")), ("vace", _numbered("vace_blocks"))),
    shared=(
        ("block", ("self_attn.q", "self_attn.k", "self_attn.v")),
        ("model", ("cross_attn.k", "cross_attn.v")),  # the embedded text
        ("model", ("cross_attn.k_img", "cross_attn.v_img")),  # the embedded image
    ),
    protected=(
        (r"^(?:text_embedding|img_emb)\.", _EMBEDDER),
        (r"^(?:vace_)?patch_embedding", _EMBEDDER),
        (r"^(?:time_embedding|time_projection)\.", _TIME),
        (r"^head\.", _FINAL),
        *_NORM,
    ),
    # Not self_attn.q, k, v and ffn.0: their modulation comes from a table plus one Linear for all blocks. Not ffn.2:
    # GELU. Not cross_attn.k, v: all blocks see the embedded text.
    folds=(
        _fold(("cross_attn.q",), "norm3"),
        _fold(("self_attn.o",), "self_attn.v"),
        _fold(("cross_attn.o",), "cross_attn.v", Producer("cross_attn.v_img", optional=True)),
    ),
)

# Modulation within blocks may be quantized: it is 3.2 of Flux's 11.9 billion weights (bf16 adds 4.6 GB to an NVFP4
# file).  The field is split: ComfyUI's own fp8 cast takes it; NVIDIA's Qwen-Image-NVFP4 packs it except in the first
# and last two blocks (sgl-project/sglang#28557); convert_to_quant keeps Flux.2's, which lies outside the blocks, and
# Qwen-Image's in block 0, and has no preset for Flux.1.
_MODULATION_NOTE = "modulation: scales a whole block, sees one row per step (costs memory, no time); 8 bit is careful"
_FLUX = Architecture(
    name="flux",
    title="Flux.1 (dev, schnell)",
    all_of=("img_in.weight", "txt_in.weight", "double_blocks.0.img_mod.lin.weight", "single_blocks.0.linear1.weight"),
    any_of=tuple(f"double_blocks.0.img_attn.norm.key_norm.{end}" for end in ("scale", "weight")),
    blocks=(("double", _numbered("double_blocks")), ("single", _numbered("single_blocks"))),
    shared=(("model", ("img_mod.lin", "txt_mod.lin", "modulation.lin")),),
    protected=(
        (r"^(?:img_in|txt_in|vector_in)(?:\.|$)", _EMBEDDER),
        (r"^(?:time_in|guidance_in)\.", _TIME),
        (r"^final_layer\.", _FINAL),
        *_NORM,
    ),
    shape_read=(
        (r"^img_in$", _READ.format("the number of latent channels")),
        (r"^txt_in$", _READ.format("the width of the text features")),
        (r"^vector_in\.in_layer$", _READ.format("the width of the pooled text")),
    ),
    notes=((r"\.(?:img_mod|txt_mod|modulation)\.lin$", _MODULATION_NOTE),),
    # Not mlp.2 and the other columns of linear2: GELU. Not the modulation: all blocks see the same vector.
    folds=(
        *(_modulated((f"{side}_attn.qkv",), f"{side}_mod.lin", 0) for side in ("img", "txt")),
        *(_modulated((f"{side}_mlp.0",), f"{side}_mod.lin", 3) for side in ("img", "txt")),
        _modulated(("linear1",), "modulation.lin", 0),
        # attention over both: every output holds values of either
        _fold(
            ("img_attn.proj", "txt_attn.proj"),
            *(Producer(f"{side}_attn.qkv", (0, 2), (0, 3)) for side in ("img", "txt")),
        ),
        FoldRule((Consumer("linear2", stop=(1, 0)),), (Producer("linear1", (0, 2), (0, 3)),)),
    ),
)

_UNET_REST = r"\.(?:transformer_blocks\.(?P<sub>\d+)\.)?(?P<kind>.+)$"
_SDXL = Architecture(
    name="sdxl",
    title="Stable Diffusion XL",
    all_of=("input_blocks.0.0.weight", "label_emb.0.0.weight"),
    blocks=(
        ("input", r"^input_blocks\.(?P<block>\d+)\.\d+" + _UNET_REST),
        ("middle", r"^middle_block\.(?P<block>\d+)" + _UNET_REST),
        ("output", r"^output_blocks\.(?P<block>\d+)\.\d+" + _UNET_REST),
    ),
    shared=(
        ("block", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("model", ("attn2.to_k", "attn2.to_v")),  # the text
        ("model", ("emb_layers.1",)),
    ),
    protected=(
        (r"^time_embed\.", _TIME),
        (r"^label_emb\.", _EMBEDDER),
        (r"\.emb_layers\.1$", "timestep embedding's entry into a residual block, and it is small"),
        (r"^input_blocks\.0\.0$", _EMBEDDER),
        (r"^out\.", _FINAL),
        (r"\.(?:in_layers|out_layers)\.0$", _NORM[0][1]),
        *_NORM,
    ),
    shape_read=(
        (r"^label_emb\.0\.0$", _READ.format("the width of the pooled text")),
        # Only the first transformer is read: input block 4; 3 in KOALA, 1 in SD 2.1 unCLIP, which share these keys.
        (r"^input_blocks\.[134]\.1\.transformer_blocks\.0\.attn2\.to_k$", _READ.format("the text features' width")),
    ),
    # Not attn2.to_v -> attn2.to_out.0: IP-Adapters add values of their own between the two. Where attn1 sees the text
    # (x4 upscaler) widths differ, and proj_in may be a convolution: no fold then.
    folds=(
        _fold(("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm1"),
        _fold(("attn2.to_q",), "norm2"),
        _fold(("ff.net.0.proj",), "norm3"),
        _fold(("attn1.to_out.0",), "attn1.to_v"),
        _fold(("ff.net.2",), Producer("ff.net.0.proj", stop=(0.5, 0))),  # the other half is the gate
        _fold(("proj_in",), "norm"),
    ),
)

_SD15 = replace(
    _SDXL,
    name="sd15",
    title="Stable Diffusion 1.x / 2.x",
    all_of=("input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
    none_of=("label_emb.0.0.weight",),
    shape_read=(
        (r"^input_blocks\.1\.1\.transformer_blocks\.0\.attn2\.to_k$", _READ.format("the text features' width")),
    ),
)

_QWEN_IMAGE = Architecture(
    name="qwen_image",
    title="Qwen-Image",
    all_of=("txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"),
    not_size=(("txt_norm.weight", 0, 2560),),  # Mage-Flow: the same keys
    blocks=(("main", _numbered("transformer_blocks")),),
    shared=(
        ("block", ("attn.to_q", "attn.to_k", "attn.to_v")),
        ("block", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        ("model", ("img_mod.1",)),  # apart: with reference images txt_mod sees half of img_mod's rows
        ("model", ("txt_mod.1",)),
    ),
    protected=(
        (r"^(?:img_in|txt_in)$", _EMBEDDER),
        (r"^time_text_embed\.", _TIME),
        (r"^(?:norm_out\.linear|proj_out)$", _FINAL),
        *_NORM,
    ),
    shape_read=((r"^img_in$", _READ.format("the number of latent channels")),),
    notes=(
        (r"\.(?:img|txt)_mod\.1$", _MODULATION_NOTE),
        (r"^transformer_blocks\.(?:0|1|58|59)\.", "NVIDIA's Qwen-Image-NVFP4 keeps the first and last two blocks"),
    ),
    # Not net.2: GELU. Not the modulation: all blocks see the same vector.
    folds=(
        _modulated(("attn.to_q", "attn.to_k", "attn.to_v"), "img_mod.1", 0),
        _modulated(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_mod.1", 0),
        _modulated(("img_mlp.net.0.proj",), "img_mod.1", 3),
        _modulated(("txt_mlp.net.0.proj",), "txt_mod.1", 3),
        _fold(("attn.to_out.0", "attn.to_add_out"), "attn.to_v", "attn.add_v_proj"),
    ),
)

# Any model: a numbered member of something called …block(s), …layer(s) or …refiner is a block, the outermost if nested.
# Shared inputs are not guessed.  The never-list joins those of the families ComfyUI detects by an input width.
_GENERIC = Architecture(
    name="generic",
    title="unknown family",
    blocks=(("", r"^(?P<subgraph>(?:.+?\.)??[^.]*(?:block|layer|refiner)s?)\.(?P<block>\d+)\.(?P<kind>.+)$"),),
    protected=(
        (r"(?:^|\.)distilled_guidance_layer\.", _TIME),  # Chroma: makes the modulation of all blocks
        *_NORM,
    ),
    shape_read=tuple(
        (pattern, _READ.format("the model's dimensions"))
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

ARCHITECTURES: tuple[Architecture, ...] = (
    *(_ZIMAGE_PIXEL, _ZIMAGE, _LUMINA2, _WAN, _FLUX, _SDXL, _SD15, _QWEN_IMAGE),
    _GENERIC,
)
