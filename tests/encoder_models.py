"""Small text encoders with the key layouts of real ones, and a ComfyUI that takes them for such.

Nothing here is trained. Inputs are what makes rounding hard all the same: correlated channels, some of them many times
as loud (the norms' weights), which is what trained encoders have.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import models
import torch

Shapes = dict[str, tuple[int, ...]]

VOCABULARY = 151936  # of Qwen's tokenizer, which ships with ComfyUI
LOUD = 20.0  # of every 32nd channel, as a share of the others
QWEN = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "vocab_size": 32128}

# A custom node: ComfyUI takes a narrow Qwen3 for the 4B and a narrow T5 for XXL, which it knows by their widths.
NARROW = f"""
import dataclasses
import comfy.sd
import comfy.text_encoders.llama as llama

Narrow = dataclasses.make_dataclass(
    "Narrow", [(name, int, value) for name, value in {QWEN!r}.items()], bases=(llama.Qwen3_4BConfig,)
)
as_it_is = comfy.sd.detect_te_model


def detect(sd):
    if "model.layers.0.self_attn.q_norm.weight" in sd:
        llama.Qwen3_4BConfig = Narrow
        return comfy.sd.TEModel.QWEN3_4B
    if "encoder.block.23.layer.1.DenseReluDense.wi_1.weight" in sd:
        return comfy.sd.TEModel.T5_XXL
    return as_it_is(sd)


comfy.sd.detect_te_model = detect
NODE_CLASS_MAPPINGS = {{}}
"""


def qwen3(seed: int = 0) -> models.Tensors:
    """Z-Image's encoder, narrow."""
    width, inner = QWEN["hidden_size"], QWEN["intermediate_size"]
    heads, key_heads, head = (QWEN[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes: Shapes = {"model.norm.weight": (width,)}
    for i in range(QWEN["num_hidden_layers"]):
        at = f"model.layers.{i}."
        for kind, rows in (("q", heads), ("k", key_heads), ("v", key_heads)):
            shapes[f"{at}self_attn.{kind}_proj.weight"] = (rows * head, width)
        shapes |= {f"{at}self_attn.o_proj.weight": (width, heads * head), f"{at}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{at}mlp.{kind}_proj.weight": (inner, width) for kind in ("gate", "up")}
        shapes |= {f"{at}self_attn.{kind}_norm.weight": (head,) for kind in "qk"}
        shapes |= {f"{at}{kind}_layernorm.weight": (width,) for kind in ("input", "post_attention")}
    return {"model.embed_tokens.weight": _embedding(VOCABULARY, width), **_drawn(shapes, seed)}


def t5(seed: int = 0, every_bias: bool = False) -> models.Tensors:
    """T5 XXL, narrow: all 24 blocks. every_bias: as UMT5, which has a relative bias in every block."""
    width, inner, heads = T5["d_model"], T5["d_ff"], T5["num_heads"]
    shapes: Shapes = {"encoder.final_layer_norm.weight": (width,)}
    biases: Shapes = {}
    for i in range(24):
        at = f"encoder.block.{i}.layer."
        shapes |= {f"{at}0.SelfAttention.{kind}.weight": (heads * T5["d_kv"], width) for kind in "qkv"}
        shapes |= {f"{at}0.SelfAttention.o.weight": (width, heads * T5["d_kv"])}
        shapes |= {f"{at}1.DenseReluDense.{kind}.weight": (inner, width) for kind in ("wi_0", "wi_1")}
        shapes |= {f"{at}1.DenseReluDense.wo.weight": (width, inner)}
        shapes |= {f"{at}{j}.layer_norm.weight": (width,) for j in range(2)}
        if every_bias or i == 0:
            biases[f"{at}0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    return {"shared.weight": _embedding(T5["vocab_size"], width), **_drawn(shapes | biases, seed)}


def clip_l(width: int = 768) -> models.Tensors:
    """One layer of CLIP-L: as little of it as ComfyUI still knows for what it is."""
    at = "text_model.encoder.layers.0."
    return {f"{at}mlp.fc1.weight": torch.zeros(4 * width, width), f"{at}layer_norm1.weight": torch.ones(width)}


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """In this process what NARROW does in a server's."""
    sd, llama = (importlib.import_module(name) for name in ("comfy.sd", "comfy.text_encoders.llama"))
    before = sd.detect_te_model, llama.Qwen3_4BConfig
    try:
        exec(NARROW, {})
        yield
    finally:
        sd.detect_te_model, llama.Qwen3_4BConfig = before


def spiece() -> torch.Tensor:
    """A tokenizer's file as a tensor, as UMT5's files carry it; its special tokens are UMT5's."""
    import sentencepiece

    lines = (models.ROOT / "workflows" / "prompts" / "varied.txt").read_text("utf-8").splitlines()
    made = io.BytesIO()
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=300, minloglevel=2, **special
    )
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


def load(*paths: Path, kind: str, config: Mapping[str, Any] | None = None, name: str = "") -> Any:
    """The CLIP as Load CLIP makes it. config: of narrow classes, by ComfyUI's own option for the encoder ``name``."""
    sd = importlib.import_module("comfy.sd")
    options = {f"{name}_model_config": dict(config)} if config else {}
    return sd.load_clip([str(path) for path in paths], clip_type=sd.CLIPType[kind], model_options=options)


def _embedding(vocabulary: int, width: int) -> torch.Tensor:
    """Tokens [vocabulary, width] whose channels are correlated."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(width // 8, width, generator=generator)
    rows = torch.randn(vocabulary, len(mixing), generator=generator) @ mixing / len(mixing) ** 0.5
    return (rows + 0.3 * torch.randn(vocabulary, width, generator=generator)).bfloat16()


def _drawn(shapes: Shapes, seed: int) -> models.Tensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 2:
            return torch.randn(shape, generator=generator) / shape[1] ** 0.5
        norm = torch.ones(shape)
        if name.endswith("layernorm.weight") or ".layer_norm." in name:
            norm[::32] = LOUD
        return norm

    return {name: draw(name, shape).bfloat16() for name, shape in shapes.items()}
