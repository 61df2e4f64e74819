"""Text encoders of ComfyUI's own classes: at their published widths without weights, and small ones that run.

The small ones keep what ``detect_te_model`` reads (a count of layers, a width) and are narrow otherwise. They are
loaded from their files by ``comfy.sd.load_clip``, as the stock CLIP loaders do, and encode tokens that need no
vocabulary; tokenizers that would read one from the file are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

Shapes = dict[str, tuple[int, ...]]
TEXT = "comfy.text_encoders."
VOCABULARY = 128
TOKENS = [3, 17, 42, 99, 5, 61, 7, 2, 90, 33, 11, 64]


@dataclass(frozen=True)
class Encoder:
    """One encoder. ``at``: module and class of ``comfy.text_encoders``; ``te``: what detect_te_model calls it.

    config: of the class at the published width; json: of T5, a file beside its module. key: what the loader calls it.
    narrow: changes of the small one, None if none runs. kind: of CLIPType. stored: beginnings of keys in files.
    patches: of the loader, for what no config reaches. tower: changes of Qwen2.5-VL's vision tower.
    """

    at: str
    te: str
    key: str = ""
    kind: str = "STABLE_DIFFUSION"
    narrow: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    json: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)
    patches: Mapping[str, Any] = field(default_factory=dict)
    tower: Mapping[str, Any] = field(default_factory=dict)
    row: str = "language"

    @property
    def known(self) -> bool:
        """Whether the ComfyUI at hand has it."""
        import comfy.sd

        return hasattr(comfy.sd.TEModel, self.te)

    def build(self, operations: Any, device: str, narrow: bool, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The class as the loader makes it."""
        module, name = self.at.split(":")
        made = getattr(importlib.import_module(TEXT + module), name)
        config = dict(self.config)
        if self.json:
            folder = Path(importlib.import_module(TEXT + module).__file__).parent
            config |= json.loads((folder / self.json).read_text())
        config |= (self.narrow or {}) if narrow else {}
        with self.patched() if narrow else contextlib.nullcontext():
            if name == "GptOssModel":  # takes its configuration made
                config = importlib.import_module(TEXT + module).GptOss20BConfig(**config)
                return made(config, dtype=dtype, device=device, ops=operations)
            return made(config, dtype, device, operations)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for target, value in self.patches.items():
                stack.enter_context(patch(TEXT + target, value))
            if self.tower:
                made = importlib.import_module(TEXT + "qwen_vl").Qwen2VLVisionTransformer
                small = lambda **given: made(**(given | dict(self.tower)))  # noqa: E731
                stack.enter_context(patch(TEXT + "qwen_vl.Qwen2VLVisionTransformer", small))
            yield

    def file_key(self, key: str) -> str:
        """What a key of the class is called in files."""
        return next(
            (there + key.removeprefix(here) for here, there in self.stored.items() if key.startswith(here)), key
        )


def _no_tokenizer(*_: Any, **__: Any) -> None:
    return None


_SMALL = dict(vocab_size=VOCABULARY, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1)
_TINY_TOWER = dict(hidden_size=64, num_heads=2, intermediate_size=128, depth=2)
_VL = {"model.lm_head": "lm_head", "model.": "model.language_model.", "visual.": "model.visual."}


ENCODERS: dict[str, Encoder] = {
    "t5": Encoder(
        "t5:T5", "T5_XXL", "t5xxl", "PIXART", dict(d_model=64, num_heads=2, d_kv=32, vocab_size=VOCABULARY),
        json="t5_config_xxl.json", row="t5",
    ),
    "umt5": Encoder(
        "t5:T5", "T5_XXL", "umt5xxl", "WAN", dict(d_model=64, num_heads=2, d_kv=32, vocab_size=VOCABULARY),
        json="umt5_config_xxl.json", patches={"wan.WanT5Tokenizer": _no_tokenizer}, row="t5",
    ),
    "t5_old": Encoder(
        "t5:T5", "T5_XXL_OLD", "t5xxl", "COSMOS",
        dict(d_model=64, num_heads=2, d_kv=32, d_ff=128, vocab_size=VOCABULARY),
        json="t5_old_config_xxl.json", row="t5",
    ),
    "t5_xl": Encoder("t5:T5", "T5_XL", json="t5_pile_config_xl.json", row="t5_smaller"),
    "t5_base": Encoder("t5:T5", "T5_BASE", json="t5_config_base.json", row="t5_smaller"),
    "byt5": Encoder("t5:T5", "BYT5_SMALL_GLYPH", json="byt5_config_small_glyph.json", row="t5_smaller"),
    "llama3": Encoder("llama:Llama2", "LLAMA3_8", "llama", "HIDREAM", dict(_SMALL, hidden_size=128)),
    "qwen25_3b": Encoder("llama:Qwen25_3B", "QWEN25_3B"),
    "qwen25_7b": Encoder(
        "llama:Qwen25_7BVLI", "QWEN25_7B", "qwen25_7b", "QWEN_IMAGE",
        dict(_SMALL, hidden_size=128, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=2),
        tower=dict(hidden_size=64, intermediate_size=128, num_heads=2, num_layers=2),
    ),
    "qwen3_06b": Encoder("llama:Qwen3_06B", "QWEN3_06B"),
    "qwen3_2b": Encoder("llama:Ovis25_2B", "QWEN3_2B"),
    "qwen3_4b": Encoder("llama:Qwen3_4B", "QWEN3_4B", "qwen3_4b", "LUMINA2", dict(_SMALL, num_hidden_layers=3)),
    "qwen3_8b": Encoder("llama:Qwen3_8B", "QWEN3_8B"),
    "qwen3vl_32b": Encoder("minimax:MiniMaxQwen3VL", "QWEN3VL_32B"),
    "qwen35": Encoder(
        "qwen35:Qwen35", "QWEN35_2B", "qwen35_2b",
        narrow=dict(_SMALL, hidden_size=128, num_hidden_layers=4, head_dim=64, linear_num_key_heads=2,
                    linear_num_value_heads=2, linear_key_head_dim=32, linear_value_head_dim=32,
                    mrope_section=[3, 3, 2]),
        stored=_VL,
        patches={"qwen35.tokenizer": lambda **_: _no_tokenizer,
                 "qwen35.QWEN35_VISION_DEFAULTS": dict(_TINY_TOWER, patch_size=16, temporal_patch_size=2,
                 in_channels=3, spatial_merge_size=2, num_position_embeddings=16)},
    ),
    "qwen3vl": Encoder(
        "qwen3vl:Qwen3VL", "QWEN3VL_8B", "qwen3vl_8b",
        narrow=dict(_SMALL, hidden_size=128, num_hidden_layers=3), stored=_VL,
        patches={"qwen3vl.QWEN3VL_VISION": {"qwen3vl_8b": dict(hidden_size=64, intermediate_size=128, depth=2,
                 deepstack_visual_indexes=[0])}},
    ),
    "gemma2": Encoder(
        "llama:Gemma2_2B", "GEMMA_2_2B", "gemma2_2b", "LUMINA2", dict(_SMALL, hidden_size=128, num_hidden_layers=3),
        patches={"lumina2.LuminaTokenizer": _no_tokenizer},
    ),
    "gemma3": Encoder(
        "llama:Gemma3_4B", "GEMMA_3_4B", "gemma3_4b", "LUMINA2", dict(_SMALL, hidden_size=128, num_hidden_layers=3),
        patches={"lumina2.NTokenizer": _no_tokenizer},
    ),
    "gemma3_vision": Encoder("llama:Gemma3_4B_Vision", "GEMMA_3_4B_VISION"),
    "gemma3_12b": Encoder("llama:Gemma3_12B", "GEMMA_3_12B"),
    "gemma4_e2b": Encoder("gemma4:Gemma4_E2B", "GEMMA_4_E2B"),
    "gemma4": Encoder("gemma4:Gemma4_E4B", "GEMMA_4_E4B"),
    "gemma4_12b": Encoder("gemma4:Gemma4_12B", "GEMMA_4_12B"),
    "gemma4_31b": Encoder("gemma4:Gemma4_31B", "GEMMA_4_31B"),
    "mistral3": Encoder("llama:Mistral3Small24B", "MISTRAL3_24B"),
    "ministral3": Encoder(
        "llama:Ministral3_3B", "MINISTRAL_3_3B", "ministral3_3b", "FLUX2", dict(_SMALL, num_hidden_layers=3),
        patches={"ernie.ErnieTokenizer": _no_tokenizer},
    ),
    "gpt_oss": Encoder(
        "gpt_oss:GptOssModel", "GPT_OSS_20B", "gpt_oss", "LENS",
        dict(_SMALL, hidden_size=128, head_dim=32, num_local_experts=4, num_experts_per_tok=2), row="gpt_oss",
        patches={"gpt_oss.LensTokenizer": _no_tokenizer},
    ),
    "jina": Encoder("jina_clip_2:XLMRobertaModel", "JINA_CLIP_2", row="jina_clip2"),
    "t5_gemma": Encoder("sa3:T5GemmaModel", "T5_GEMMA", row="t5_gemma"),
}  # fmt: skip


def layout(encoder: Encoder, narrow: bool) -> tuple[Shapes, set[str]]:
    """Keys and shapes of its file, and the layers that become Linears that read ``comfy_quant``."""
    import comfy.ops

    mixed = comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True)
    model = encoder.build(mixed, "meta", narrow)
    told = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Linears have no weight before they are loaded, and each says so
    shapes: Shapes = {encoder.file_key(key): tuple(t.shape) for key, t in model.state_dict().items()}
    logging.disable(told)
    linears = set()
    for name, module in model.named_modules():
        name = encoder.file_key(name)
        if isinstance(module, mixed.Linear):
            linears.add(name)
            shapes[f"{name}.weight"] = (module.out_features, module.in_features)
            if module.bias is not None:
                shapes[f"{name}.bias"] = (module.out_features,)
        elif isinstance(module, mixed.MoEExperts):
            shapes[f"{name}.weight"] = module._orig_shape
    return shapes, linears


def random_state(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights, norms and biases, none of them a one or a zero by chance."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        base = 1.0 if len(shape) == 1 and "norm" in key else 0.0
        spread = 0.1 if len(shape) <= 1 else shape[-1] ** -0.5
        state[key] = (base + torch.randn(shape, generator=generator) * spread).to(dtype)
    return state


def detected(shapes: Mapping[str, tuple[int, ...]] | Mapping[str, torch.Tensor]) -> str:
    """What ComfyUI takes a file with these shapes (or tensors) for."""
    import comfy.sd

    found = comfy.sd.detect_te_model(
        {key: s if torch.is_tensor(s) else torch.empty(s, device="meta") for key, s in shapes.items()}
    )
    return "" if found is None else found.name


def load(encoder: Encoder, path: Path) -> Any:
    """The CLIP object of a stock CLIP loader."""
    import comfy.sd

    kind = getattr(comfy.sd.CLIPType, encoder.kind)
    narrow = dict(encoder.narrow or {})
    options = {f"{encoder.key}_model_config": narrow, "gpt_oss_config": narrow, "txt_offset": 0}
    with encoder.patched():
        return comfy.sd.load_clip([str(path)], clip_type=kind, model_options=options)


def encode(encoder: Encoder, clip: Any) -> torch.Tensor:
    """The conditioning [1, tokens, channels] of TOKENS."""
    with torch.inference_mode():
        tokens = {key: [[(token, 1.0) for token in TOKENS]] for key in (encoder.key, "l", "g", "t5xxl")}
        made = clip.encode_from_tokens(tokens, return_dict=True)
    out = made.get("conditioning_llama3", made["cond"])  # HiDream: [1, layers, tokens, channels]
    return out.reshape(-1, out.shape[-1]).float()
