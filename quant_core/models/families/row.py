"""What a row of the table is: types, what is common to rows, and how a row describes a layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

# Those that ComfyUI strips (the last three: audio models, Cosmos and Anima, AuraFlow), longest first, and the naming of
# LoRA trainers and ModelSave tools.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.")

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
    weight_only: bool = False  # the loader multiplies it in 16 bit, whatever the card
    formats: tuple[str, ...] = ()  # the only ones that the loader reads for it; () all of them

    @property
    def type(self) -> str:
        return layer_type(self.subgraph, self.kind)


def layer_type(subgraph: str, kind: str) -> str:
    """The kind, with the sub-graph before it where that is not the main one."""
    return kind if subgraph in ("main", "") else f"{subgraph}.{kind}"


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
    ``shared`` lists kinds that are called with the same tensor: within one block ("block"), in all blocks of a subgraph
    ("subgraph"), or of all ("model": text context and timestep embedding are computed once and handed to every block).
    ``folds`` are what ``folding`` may do; tests/test_folding.py and test_families.py check each on ComfyUI's classes.
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
    part: str = "model"  # of a checkpoint: the diffusion model, "te" a text encoder, "vision" or "vae"
    unread: Rules = ()  # what ComfyUI's class reads no scales for, besides what no class does
    encoders: tuple[str, ...] = ()  # text encoders of its checkpoints that ComfyUI tells of scales
    table: str = ""  # the table of tokens, where the loader reads scales for its rows

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
        name = self._bare(layer)
        subgraph, block, kind = self._place(name)
        protected = _first_match(self.protected, name)
        if block is None:
            protected = protected or OUTSIDE
        shape_read = _first_match(self.shape_read, name)
        shared = self._shared(name, subgraph, kind) if block is not None else ""
        note, weight_only = _first_match(self.notes, name), self.part == "te"
        info = LayerInfo(layer, subgraph, block, kind, shared, protected, shape_read, note, weight_only=weight_only)
        is_table = bool(self.table and re.fullmatch(self.table, name))
        return replace(info, protected=TABLE, formats=TABLE_FORMATS) if is_table else info

    def describe_file(self, layers: Iterable[str], keys: Collection[str]) -> dict[str, LayerInfo]:
        """Describe the layers of one file: ``keys``, all of its keys, tell Linears from what only looks like one."""
        routed = {key.partition(_EXPERTS)[0] for key in keys if _EXPERTS in key}
        infos = {}
        for layer in layers:
            name, info = self._bare(layer), self.describe(layer)
            reason = _first_match(self.unread, name)
            reason = reason or ("" if info.formats else _not_linear(layer, name, keys, routed))
            infos[layer] = replace(info, protected=reason, not_linear=reason) if reason else info
        return infos

    def _bare(self, layer: str) -> str:
        """The name without prefix. Other parts than the model have none: in theirs "model." is part of the name."""
        return layer.removeprefix(prefix_of(layer)) if self.part == "model" else layer

    def _place(self, name: str) -> tuple[str, int | None, str]:
        for subgraph, pattern in self.blocks:
            if match := re.match(pattern, name):
                groups = match.groupdict()
                block = int(groups["block"])
                if "sub" in groups:
                    block = 10 * block + int(groups["sub"] or 0)
                return groups.get("subgraph") or subgraph, block, groups["kind"]
        return "", None, name

    def _shared(self, name: str, subgraph: str, kind: str) -> str:
        for scope, kinds in self.shared:
            if kind in kinds:
                where = {"block": name.removesuffix(kind), "subgraph": f"{subgraph}.*.", "model": "*."}[scope]
                return where + "{" + ",".join(kinds) + "}"
        return ""


def prefix_of(name: str) -> str:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def _first_match(rules: Rules, name: str) -> str:
    return next((reason for pattern, reason in rules if re.search(pattern, name)), "")


def _not_linear(layer: str, name: str, keys: Collection[str], routed: Collection[str]) -> str:
    """Why the loader does not run this weight as a Linear, "" if it does, as far as names can tell.

    A loader reads scales for Linears only. Any other matrix would be used without its scale, and nobody would say so.
    ``name``: the layer's without prefix. ``routed``: the modules that have experts.
    """
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
    r"(?!embedding_projection).*emb.*|(?:.*_)?tokens?|shared|relative_attention_bias|wte|wpe|codebook|"
    r"timestep_features|reference_points|trainable_cond_mask"  # Stable Audio, SAM 3, Wan S2V
)
_NUMBERED_TABLE = re.compile(r"(embeddings)\.\d+$")
_RUN_OTHERWISE: Rules = (
    (r"^motion_encoder\.", "the loader scales this weight by its own rule and reads no scale for it"),  # Wan Animate
    (r"(?:^|\.)pixel_blocks\.\d+\.adaLN_modulation\.0$", "the loader splits this weight, not its scales"),  # PixelDiT
    (r"^cc_projection$", "the loader applies this weight outside the model and reads no scale for it"),  # Zero123
)

# --- reasons
OUTSIDE = "lies outside the numbered blocks"
EMBEDDER = "embedder: every block depends on it, and it is small"
TIME = "timestep or guidance embedder: scales every block at every step, and it is small"
FINAL = "final layer: nothing downstream evens its error out"
TABLE = "table of tokens: every token begins there; 8 bit is careful"
TABLE_FORMATS = ("float8_e4m3fn", "int8_tensorwise")  # of which ComfyUI's mixed_precision_ops.Embedding reads rows
NORM = ((r"(?:^|\.)[^.]*norm[^.]*$", "norm: one value per channel, not a matrix"),)
# Modulation within blocks may be quantized: it is 3.2 of Flux's 11.9 billion weights (bf16 adds 4.6 GB to an NVFP4
# file).  The field is split: ComfyUI's own fp8 cast takes it; NVIDIA's Qwen-Image-NVFP4 packs it except in the first
# and last two blocks (sgl-project/sglang#28557); convert_to_quant keeps Flux.2's, which lies outside the blocks, and
# Qwen-Image's in block 0, and has no preset for Flux.1.
MODULATION_NOTE = "modulation: scales a whole block, sees one row per step (costs memory, no time); 8 bit is careful"
READ = "ComfyUI reads {} from the shape of its weight, which NVFP4 packing halves: the file would not load"


def numbered(container: str, inner: str = "") -> str:
    """The pattern of container.0.kind; ``inner`` is what stands before every kind."""
    return rf"^{container}\.(?P<block>\d+)\.{inner}(?P<kind>.+)$"


def value_rows(kind: str) -> Producer:
    """The last third of q, k and v in one Linear."""
    return Producer(kind, (0, 2), (0, 3))


def fold(consumers: Iterable[str], *producers: Producer | str, head: str = "") -> FoldRule:
    """Whole inputs of these kinds; a producer's name stands for all of its rows."""
    made = tuple(Producer(one) if isinstance(one, str) else one for one in producers)
    return FoldRule(tuple(map(Consumer, consumers)), made, head)


def modulated(consumers: Iterable[str], modulation: str, shift: int) -> FoldRule:
    """Inputs norm * (1 + scale) + shift: the modulation's rows hold shift and scale, each as many as it has columns."""
    by_one = (
        Producer(modulation, (0, shift), (0, shift + 1)),
        Producer(modulation, (0, shift + 1), (0, shift + 2), True),
    )
    return fold(consumers, *by_one)
