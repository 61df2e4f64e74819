"""Small models of ComfyUI's own classes, one for each family, with random weights and inputs that they run on.

A ``Small`` is a case of ``comfy_classes`` with smaller numbers: the keys of its file are those of the true model, its
forward pass takes a second. ``Running`` loads a file into it as ComfyUI's loader does, and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from comfy_classes import CASES, _diffusion_model, _modules
from safetensors.torch import load_file

from quant_core import jobs
from quant_core.jobs.finished import QuantizedFile
from quant_core.models.source import Source
from quant_core.planning import recipes

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Small:
    """changes: to the configuration of a case, which also says what ComfyUI calls the class.

    x, more: the latent and what else forward() gets. A tuple is the shape of random numbers; time: the timestep.
    """

    case: str
    changes: Mapping[str, Any]
    x: tuple[int, ...] | list[tuple[int, ...]]
    more: Mapping[str, Any] = field(default_factory=dict)
    time: float = 0.5

    @property
    def known(self) -> bool:
        """Whether the ComfyUI that runs has this class."""
        import comfy.supported_models

        return any(one.__name__ == CASES[self.case].name for one in comfy.supported_models.models)


def _image(channels: int, size: int = 8) -> tuple[int, ...]:
    return (1, channels, size, size)


def _video(channels: int, size: int = 8, frames: int = 1) -> tuple[int, ...]:
    return (1, channels, frames, size, size)


_FLUX = dict(
    hidden_size=128, num_heads=1, depth=2, depth_single_blocks=2, context_in_dim=64, vec_in_dim=32, in_channels=16
)  # fmt: skip
_TEXT = (1, 6, 64)
_OMNIGEN = dict(hidden_size=120, num_attention_heads=3, num_kv_heads=1, axes_dim_rope=[8, 16, 16], multiple_of=32)

SMALL: dict[str, Small] = {
    "flux2": Small(
        "Flux2",
        _FLUX | dict(in_channels=32, out_channels=32, vec_in_dim=None),
        _image(32),
        dict(context=_TEXT, guidance=(1,)),
    ),
    "chroma": Small(
        "Chroma",
        _FLUX | dict(in_channels=64, vec_in_dim=None, hidden_dim=160, out_dim=128, n_layers=2),
        _image(16),
        dict(context=_TEXT, guidance=(1,)),
    ),
    "chroma_radiance": Small(
        "ChromaRadiance",
        _FLUX | dict(in_channels=3, vec_in_dim=None, hidden_dim=160, out_dim=128, n_layers=2, patch_size=16),
        _image(3, 32),
        dict(context=_TEXT, guidance=(1,)),
    ),
    "hunyuan_video": Small(
        "HunyuanVideo", _FLUX | dict(vec_in_dim=32), _video(16), dict(context=_TEXT, y=(1, 32), guidance=(1,))
    ),
    "sd3": Small(
        "SD3.5 medium",
        dict(
            depth=2,
            x_block_self_attn_layers=[0],
            num_patches=64,
            pos_embed_max_size=8,
            adm_in_channels=32,
            context_embedder_config=dict(target="torch.nn.Linear", params=dict(in_features=64, out_features=128)),
        ),
        _image(16),
        dict(context=_TEXT, y=(1, 32)),
    ),
    "auraflow": Small("AuraFlow", dict(dim=256, n_heads=2), _image(4), dict(context=(1, 6, 2048))),
    "ltxv": Small(
        "LTXV",
        dict(cross_attention_dim=64, attention_head_dim=32, num_attention_heads=2, caption_channels=48),
        _video(128),
        dict(context=(1, 6, 48), attention_mask=None),
    ),
    "cosmos": Small(
        "CosmosT2V", dict(model_channels=256, num_blocks=2, num_heads=2), _video(16), dict(context=(1, 6, 1024))
    ),
    "cosmos_predict2": Small(
        "CosmosT2IPredict2", dict(model_channels=256, num_blocks=2, num_heads=2), _video(16), dict(context=(1, 6, 1024))
    ),
    "anima": Small(
        "Anima",
        dict(model_channels=256, num_blocks=2, num_heads=2),
        _video(16),
        dict(context=(1, 6, 1024), t5xxl_ids=torch.arange(8).view(1, 8)),
    ),
    "hidream": Small(
        "HiDream",
        dict(
            attention_head_dim=128,
            num_attention_heads=2,
            num_layers=2,
            num_single_layers=2,
            caption_channels=[64, 64],
            text_emb_dim=32,
            llama_layers=[0, 1, 1, 1],
        ),
        _image(16),
        dict(y=(1, 32), context=_TEXT, encoder_hidden_states_llama3=(1, 2, 6, 64)),
    ),
    "omnigen2": Small(
        "Omnigen2",
        _OMNIGEN | dict(num_layers=2, num_refiner_layers=1, text_feat_dim=64),
        _image(16),
        dict(context=_TEXT, num_tokens=6),
    ),
    "kandinsky5": Small(
        "Kandinsky5Image",
        dict(model_dim=256, ff_dim=512, in_text_dim=64, in_text_dim2=32, time_dim=64),
        _video(16),
        dict(context=_TEXT, y=(1, 32)),
    ),
    "ace": Small(
        "ACEStep",
        dict(inner_dim=256, attention_head_dim=64, num_attention_heads=4, num_layers=2, ssl_latent_dims=[32, 32]),
        (1, 8, 16, 8),
        dict(context=(1, 6, 768), speaker_embeds=(1, 512), lyric_token_idx=torch.arange(8).view(1, 8)),
    ),
    "ace15": Small(
        "ACEStep15",
        dict(
            hidden_size=128,
            num_dit_layers=2,
            num_lyric_layers=1,
            num_timbre_layers=1,
            num_tokenizer_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=64,
            intermediate_size=256,
            fsq_dim=128,
            encoder_hidden_size=128,
            encoder_intermediate_size=256,
            encoder_num_heads=2,
        ),
        (1, 64, 20),
        dict(context=(1, 6, 1024), lyric_embed=(1, 6, 1024), refer_audio=(1, 64, 20)),
    ),
    "krea2": Small(
        "Krea2",
        dict(features=256, heads=2, kvheads=1, txtdim=64, txtheads=2, txtkvheads=2),
        _image(16),
        dict(context=(1, 6, 12 * 64)),
    ),
    "ideogram4": Small(
        "Ideogram4",
        dict(
            num_attention_heads=2,
            attention_head_dim=128,
            intermediate_size=256,
            adaln_dim=64,
            llm_features_dim=64,
            mrope_section=(24, 20, 20),
        ),
        _image(128),
        dict(context=_TEXT),
    ),
    "mochi": Small(
        "GenmoMochi",
        dict(
            depth=2,
            num_heads=2,
            hidden_size_x=128,
            hidden_size_y=64,
            mlp_ratio_x=96.0,
            mlp_ratio_y=96.0,
            t5_feat_dim=64,
            t5_token_length=8,
        ),
        _video(12),
        dict(context=(1, 8, 64), attention_mask=torch.ones(1, 8), num_tokens=8),
    ),
    "pixart": Small(
        "PixArtSigma", dict(hidden_size=128, num_heads=2, caption_channels=64), _image(4, 64), dict(context=_TEXT)
    ),
    "boogu": Small(
        "Boogu",
        _OMNIGEN
        | dict(
            hidden_size=96,
            axes_dim_rope=[8, 12, 12],
            num_layers=2,
            num_double_stream_layers=2,
            num_refiner_layers=1,
            instruction_feat_dim=64,
        ),
        _image(16),
        dict(context=_TEXT, num_tokens=6),
    ),
    "seedvr2": Small(
        "SeedVR2",
        dict(vid_dim=128, heads=1, mm_layers=2, txt_in_dim=64),
        _video(16),
        dict(context=_TEXT, condition=_video(17), transformer_options=dict(cond_or_uncond=[0])),
    ),
    "hunyuan3d": Small(
        "Hunyuan3Dv2", dict(hidden_size=128, num_heads=2, context_in_dim=64), (1, 64, 16), dict(context=_TEXT)
    ),
    "hunyuan3d21": Small(
        "Hunyuan3Dv2_1",
        dict(hidden_size=128, num_heads=2, depth=4, num_moe_layers=2),
        (1, 64, 16),
        dict(context=(1, 6, 1024)),
    ),
    "mage_flow": Small(
        "MageFlow", dict(num_attention_heads=1, joint_attention_dim=64), _image(128), dict(context=_TEXT)
    ),
    "ernie_image": Small(
        "ErnieImage",
        dict(hidden_size=256, num_attention_heads=2, num_layers=2, ffn_hidden_size=512, text_in_dim=64),
        _image(128),
        dict(context=_TEXT),
    ),
    "ltxav": Small(
        "LTXAV gated",
        dict(
            cross_attention_dim=64,
            audio_cross_attention_dim=64,
            attention_head_dim=32,
            audio_attention_head_dim=32,
            num_attention_heads=2,
            audio_num_attention_heads=2,
            caption_channels=64,
            connector_num_attention_heads=2,
            connector_attention_head_dim=32,
        ),
        [_video(128), (1, 8, 4, 16)],
        dict(context=(1, 6, 128)),
    ),
    "hidream_o1": Small(
        "HiDreamO1",
        dict(
            text_config_overrides=dict(
                vocab_size=128,
                hidden_size=256,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            ),
            vision_config_overrides=dict(
                hidden_size=128, num_heads=2, intermediate_size=256, depth=2, num_position_embeddings=16
            ),
        ),
        _image(3, 64),
        dict(input_ids=torch.arange(8).view(1, 8), position_ids=torch.arange(12).expand(1, 3, 12), ar_len=0),
    ),
}


_LUMINA = dict(dim=256, n_layers=2, n_heads=2, n_kv_heads=2, axes_dims=[32, 48, 48], cap_feat_dim=64)
_CAPTION = dict(context=_TEXT, num_tokens=6)
# Families with tests of their own: here for the table of all (benchmarks/families.py).
OLDER: dict[str, Small] = {
    "flux": Small("Flux", _FLUX, _image(16), dict(context=_TEXT, y=(1, 32), guidance=(1,))),
    "wan": Small(
        "WAN21_T2V",
        dict(dim=128, ffn_dim=256, num_heads=1, num_layers=2, text_dim=64),
        _video(16, frames=3),
        dict(context=_TEXT),
    ),
    "zimage": Small("ZImage", _LUMINA, _image(16), _CAPTION),
    "lumina2": Small("Lumina2", _LUMINA, _image(16), _CAPTION),
    "qwen_image": Small(
        "QwenImage", dict(num_attention_heads=2, joint_attention_dim=64), _video(16), dict(context=_TEXT)
    ),
    "sdxl": Small(
        "SDXL",
        dict(
            model_channels=64,
            channel_mult=[1, 2],
            num_res_blocks=[1, 1],
            transformer_depth=[0, 1],
            transformer_depth_output=[0, 0, 1, 1],
            transformer_depth_middle=1,
            context_dim=64,
        ),
        _image(4),
        dict(context=_TEXT, y=(1, 2816)),
        time=500,
    ),
    "sd15": Small("SD15", dict(model_channels=64, context_dim=64), _image(4, 16), dict(context=_TEXT), time=500),
}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


def decoded(source: Source, quantized: Path) -> dict[str, torch.Tensor]:
    """The 16-bit file's tensors with the weights of the quantized file, as the engine reads them, in their place."""
    state = load_file(source.path)
    with QuantizedFile(quantized) as file:
        for layer in source.layers:
            if file.codec(layer):
                state[f"{layer}.weight"] = torch.cat(list(file.rows(layer, source.shape(layer))))
    return state


@dataclass(frozen=True)
class Trial:
    """A family in a format: how many layers are quantized, and relative errors of the output as it was loaded.

    error: against the 16-bit model. beside: against the same weights, decoded by the engine, in the 16-bit model.
    """

    layers: int
    error: float
    beside: float


def trial(small: Small, source: Source, recipe: str, wanted: torch.Tensor, folder: Path) -> Trial:
    """Quantize a small model's file by a recipe, load it and run it; ``wanted`` is the 16-bit model's output."""
    out = folder / f"{recipe}.safetensors"
    plan = recipes.make_plan(source, recipe)
    jobs.quantize(source, plan, out, device="cpu", overwrite=True)
    outputs = []
    for state in (load_file(out), decoded(source, out)):
        running = Running(small)
        running.load(state)
        outputs.append(running.run())
    return Trial(len(plan.quantized()), relative_error(outputs[0], wanted), relative_error(*outputs))


def tensors(spec: Any, generator: torch.Generator) -> Any:
    if isinstance(spec, list):
        return [tensors(one, generator) for one in spec]
    return torch.randn(spec, generator=generator) if isinstance(spec, tuple) else spec


class Running:
    """The model of a Small on the CPU, in float32."""

    def __init__(self, small: Small) -> None:
        import comfy.supported_models

        self.small = small
        case = CASES[small.case]
        self.config = getattr(comfy.supported_models, case.name)(dict(case.config))
        self.config.unet_config |= small.changes
        self.config.set_inference_dtype(torch.float32, None)
        self.model = _diffusion_model(self.config, "cpu").eval()

    def random_state(self) -> dict[str, torch.Tensor]:
        """Weights, norms and biases, none of them a one or a zero by chance."""
        generator = torch.Generator().manual_seed(0)
        buffers = dict(self.model.named_buffers())
        state: dict[str, torch.Tensor] = {}
        for name, shape in _modules(self.model)[0].items():
            if name in buffers and not buffers[name].is_floating_point():
                state[name] = buffers[name].clone()
                continue
            fan = shape[-1] if len(shape) == 2 else (torch.Size(shape[1:]).numel() if len(shape) > 1 else 1)
            base = 1.0 if len(shape) == 1 and name.endswith(("weight", "scale")) else 0.0
            state[name] = base + torch.randn(shape, generator=generator) * (0.3 if fan == 1 else fan**-0.5)
        self.state = state
        return state

    def load(self, state: State) -> None:
        """As the loader does; AssertionError for a key that is missing or has no place."""
        missing, unexpected = self.model.load_state_dict(self.config.process_unet_state_dict(dict(state)), strict=False)
        assert not missing and not unexpected, (missing[:5], unexpected[:5])

    def run(self, watch: Callable[[str, torch.Tensor], None] | None = None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        x = tensors(self.small.x, generator)
        more = {name: tensors(spec, generator) for name, spec in self.small.more.items()}
        hooks = []
        for name, module in self.model.named_modules():
            if watch and hasattr(module, "in_features"):
                hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: watch(name, args[0])))
        try:
            with torch.inference_mode():
                out = self.model(x, torch.tensor([self.small.time]), **more)
        finally:
            for hook in hooks:
                hook.remove()
        return out if torch.is_tensor(out) else torch.cat([part.reshape(-1) for part in out])
