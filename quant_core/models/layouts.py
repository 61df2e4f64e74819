"""How the layouts of *diffusers* differ from ComfyUI's: tables of names, no code per layout but for counting blocks.

Facts: ComfyUI 0.29 and 0.33, ``comfy/utils.py`` (``*_to_diffusers``) and ``comfy/model_detection.py`` (which keys say
what a file is, ``convert_diffusers_mmdit``); of the families that ComfyUI does not convert, the package diffusers
0.42, ``loaders/single_file_utils.py``, the other way round. ``tests/test_diffusers.py`` checks the tables against both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

# ComfyUI's name -> the stored tensors that make its rows, in order; all without ".weight" and ".bias" (whole keys where
# they end in neither). "*" stands for the number of a block, "NAME[2/2]" for the second half of a tensor's rows.
Table = Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """A layout that is converted. ``table`` sees the keys, because a UNet's depends on how many blocks there are."""

    title: str
    marks: tuple[str, ...]  # a file with all these keys is in this layout, the first such row's
    table: Callable[[Collection[str]], Table]
    kept: str = r"(?!)"  # pattern of the keys that are ComfyUI's already; by default none
    unless: str = ""  # a key by which ComfyUI knows another model


def _block(native: str, stored: str, table: Table) -> Table:
    """The table of a block's inside, put into its place."""
    return {f"{native}.{name}": " ".join(f"{stored}.{part}" for part in parts.split()) for name, parts in table.items()}


_FLUX: Table = {
    **_block("double_blocks.*", "transformer_blocks.*", {
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    }),
    **_block("single_blocks.*", "single_transformer_blocks.*", {
        "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
        "modulation.lin": "norm.linear",
    }),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear[2/2] norm_out.linear[1/2]",  # scale and shift change places
    "final_layer.linear": "proj_out",
}  # fmt: skip

_CHROMA: Table = _FLUX | {
    **{f"distilled_guidance_layer.{name}": f"distilled_guidance_layer.{name}" for name in ("in_proj", "out_proj")},
    **{f"distilled_guidance_layer.norms.{i}": f"distilled_guidance_layer.norms.{i}" for i in range(5)},
    "distilled_guidance_layer.layers.*.in_layer": "distilled_guidance_layer.layers.*.linear_1",
    "distilled_guidance_layer.layers.*.out_layer": "distilled_guidance_layer.layers.*.linear_2",
}

_FLUX2: Table = {
    **_block("double_blocks.*", "transformer_blocks.*", {
        "img_attn.qkv": "attn.to_q attn.to_k attn.to_v",
        "txt_attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "img_mlp.0": "ff.linear_in",
        "img_mlp.2": "ff.linear_out",
        "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    }),
    **_block("single_blocks.*", "single_transformer_blocks.*", {
        "linear1": "attn.to_qkv_mlp_proj",
        "linear2": "attn.to_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }),
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.adaLN_modulation.1": "norm_out.linear[2/2] norm_out.linear[1/2]",
    "final_layer.linear": "proj_out",
}  # fmt: skip

_WAN_BLOCK: Table = {
    **_block("self_attn", "attn1", {
        **{letter: f"to_{letter}" for letter in "qkv"}, "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    }),
    **_block("cross_attn", "attn2", {
        **{letter: f"to_{letter}" for letter in "qkv"}, "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
        "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
    }),
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}  # fmt: skip
_WAN: Table = {
    **_block("blocks.*", "blocks.*", _WAN_BLOCK),
    **_block("vace_blocks.*", "vace_blocks.*", {**_WAN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

_LUMINA2_BLOCK: Table = {
    "attention.qkv": "attn.to_q attn.to_k attn.to_v",
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    **{f"feed_forward.w{i}": f"feed_forward.linear_{i}" for i in (1, 2, 3)},
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
}
_LUMINA2_MODULATED: Table = {
    **_LUMINA2_BLOCK,
    "attention_norm1": "norm1.norm",
    "adaLN_modulation.1": "norm1.linear",
}
_LUMINA2: Table = {
    **_block("layers.*", "layers.*", _LUMINA2_MODULATED),
    **_block("noise_refiner.*", "noise_refiner.*", _LUMINA2_MODULATED),
    **_block("context_refiner.*", "context_refiner.*", {**_LUMINA2_BLOCK, "attention_norm1": "norm1"}),
    "x_embedder": "x_embedder",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}

_COSMOS_ATTENTION: Table = {
    **{f"{letter}_proj": f"to_{letter}" for letter in "qkv"},
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_COSMOS_BLOCK: Table = {
    **_block("self_attn", "attn1", _COSMOS_ATTENTION),
    **_block("cross_attn", "attn2", _COSMOS_ATTENTION),
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{part}.{i}": f"norm{norm}.linear_{i}"
        for norm, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for i in (1, 2)
    },
}  # fmt: skip
_COSMOS: Table = {
    **_block("blocks.*", "transformer_blocks.*", _COSMOS_BLOCK),
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
}

_SD3_BLOCK: Table = {
    "x_block.attn.qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "context_block.attn.qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    **{f"x_block.{attn}.ln_{x}": f"{attn}.norm_{x}" for attn in ("attn", "attn2") for x in "qk"},
    **{f"context_block.attn.ln_{x}": f"attn.norm_added_{x}" for x in "qk"},
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


def _sd3(keys: Collection[str]) -> Table:
    """The context's last modulation has no gate, and its scale and shift change places like the final layer's."""
    blocks = (int(match[1]) for key in keys if (match := re.match(r"transformer_blocks\.(\d{1,3})\.", key)))
    last = f"transformer_blocks.{max(blocks, default=0)}.norm1_context.linear"
    return {
        **_block("joint_blocks.*", "transformer_blocks.*", _SD3_BLOCK),
        f"joint_blocks.{last.split('.')[1]}.context_block.adaLN_modulation.1": f"{last}[2/2] {last}[1/2]",
        "x_embedder.proj": "pos_embed.proj",
        "pos_embed": "pos_embed.pos_embed",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear[2/2] norm_out.linear[1/2]",
        "final_layer.linear": "proj_out",
    }


_AURAFLOW: Table = {
    **_block("double_layers.*", "joint_transformer_blocks.*", {
        **{f"attn.w2{x}": f"attn.to_{x}" for x in "qkv"}, "attn.w2o": "attn.to_out.0",
        **{f"attn.w1{x}": f"attn.add_{x}_proj" for x in "qkv"}, "attn.w1o": "attn.to_add_out",
        "mlpX.c_fc1": "ff.linear_1", "mlpX.c_fc2": "ff.linear_2", "mlpX.c_proj": "ff.out_projection",
        "mlpC.c_fc1": "ff_context.linear_1", "mlpC.c_fc2": "ff_context.linear_2",
        "mlpC.c_proj": "ff_context.out_projection",
        "modX.1": "norm1.linear", "modC.1": "norm1_context.linear",
    }),
    **_block("single_layers.*", "single_transformer_blocks.*", {
        **{f"attn.w1{x}": f"attn.to_{x}" for x in "qkv"}, "attn.w1o": "attn.to_out.0",
        "mlp.c_fc1": "ff.linear_1", "mlp.c_fc2": "ff.linear_2", "mlp.c_proj": "ff.out_projection",
        "modCX.1": "norm1.linear",
    }),
    "positional_encoding": "pos_embed.pos_embed",
    "register_tokens": "register_tokens",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    "modF.1": "norm_out.linear[2/2] norm_out.linear[1/2]",
    "final_linear": "proj_out",
}  # fmt: skip

_PIXART: Table = {
    **_block("blocks.*", "transformer_blocks.*", {
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v",
        "attn.proj": "attn1.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
        "cross_attn.proj": "attn2.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "scale_shift_table": "scale_shift_table",
    }),
    **_block("csize_embedder", "adaln_single.emb.resolution_embedder", {"mlp.0": "linear_1", "mlp.2": "linear_2"}),
    **_block("ar_embedder", "adaln_single.emb.aspect_ratio_embedder", {"mlp.0": "linear_1", "mlp.2": "linear_2"}),
    **_block("t_embedder", "adaln_single.emb.timestep_embedder", {"mlp.0": "linear_1", "mlp.2": "linear_2"}),
    "t_block.1": "adaln_single.linear",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}  # fmt: skip

_ZIMAGE_ATTENTION: Table = {
    "qkv": "to_q to_k to_v",
    "out": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_ZIMAGE: Table = {
    **_block("layers.*.attention", "layers.*.attention", _ZIMAGE_ATTENTION),
    **_block("context_refiner.*.attention", "context_refiner.*.attention", _ZIMAGE_ATTENTION),
    **_block("noise_refiner.*.attention", "noise_refiner.*.attention", _ZIMAGE_ATTENTION),
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}

_RESNET: Table = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION: Table = {
    name: name
    for name in (
        *("norm", "proj_in", "proj_out"),
        *(f"transformer_blocks.*.norm{i}" for i in (1, 2, 3)),
        *(f"transformer_blocks.*.attn{i}.to_{to}" for i in (1, 2) for to in ("q", "k", "v", "out.0")),
        *("transformer_blocks.*.ff.net.0.proj", "transformer_blocks.*.ff.net.2"),
    )
}


def _unet(keys: Collection[str]) -> Table:
    """ComfyUI numbers blocks through; diffusers numbers levels, of ``deep`` blocks each, one more on the way up."""
    levels, deep = _count(keys, "down_blocks.{}."), _count(keys, "down_blocks.0.resnets.{}.")
    table: dict[str, str] = {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **_block("middle_block.0", "mid_block.resnets.0", _RESNET),
        **_block("middle_block.1", "mid_block.attentions.0", _ATTENTION),
        **_block("middle_block.2", "mid_block.resnets.1", _RESNET),
    }
    embedding = "add_embedding" if "add_embedding.linear_1.weight" in keys else "class_embedding"
    table |= {"label_emb.0.0": f"{embedding}.linear_1", "label_emb.0.2": f"{embedding}.linear_2"}
    for level in range(levels):
        first_in, first_out = 1 + level * (deep + 1), level * (deep + 1)
        for i in range(deep + 1):
            down, up = f"down_blocks.{level}", f"up_blocks.{level}"
            table |= _block(f"output_blocks.{first_out + i}.0", f"{up}.resnets.{i}", _RESNET)
            table |= _block(f"output_blocks.{first_out + i}.1", f"{up}.attentions.{i}", _ATTENTION)
            if i < deep:
                table |= _block(f"input_blocks.{first_in + i}.0", f"{down}.resnets.{i}", _RESNET)
                table |= _block(f"input_blocks.{first_in + i}.1", f"{down}.attentions.{i}", _ATTENTION)
        table[f"input_blocks.{first_in + deep}.0.op"] = f"{down}.downsamplers.0.conv"
        after = 2 if f"{up}.attentions.{deep}.norm.weight" in keys else 1  # resnet, attention if any, upsampler
        table[f"output_blocks.{first_out + deep}.{after}.conv"] = f"{up}.upsamplers.0.conv"
    return table


def _count(keys: Collection[str], name: str) -> int:
    """How many there are, of ten that may be: a damaged file must not make a table without end."""
    return next((i for i in range(10) if not any(key.startswith(name.format(i)) for key in keys)), 10)


_CONTEXT = "transformer_blocks.0.attn.add_q_proj.weight"
LAYOUTS = (
    Layout("Chroma", ("x_embedder.weight", "distilled_guidance_layer.in_proj.weight", _CONTEXT), lambda _: _CHROMA),
    Layout("Flux.2", ("x_embedder.weight", "double_stream_modulation_img.linear.weight"), lambda _: _FLUX2),
    Layout("Flux.1", ("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"), lambda _: _FLUX),
    Layout("Stable Diffusion 3", ("pos_embed.proj.weight", _CONTEXT), _sd3),
    Layout("AuraFlow", ("joint_transformer_blocks.0.attn.add_k_proj.weight",), lambda _: _AURAFLOW),
    Layout("PixArt", ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias"), lambda _: _PIXART),
    Layout("Wan", ("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"), lambda _: _WAN),
    Layout("Cosmos Predict2", ("time_embed.norm.weight", "patch_embed.proj.weight"), lambda _: _COSMOS),
    Layout(
        "Lumina 2",
        ("time_caption_embed.caption_embedder.0.weight", "noise_refiner.0.attn.to_k.weight"),
        lambda _: _LUMINA2,
        unless="ref_image_patch_embedder.weight",  # OmniGen2 and Boogu
    ),
    # ComfyUI keeps the names it does not know (the decoder of pixel-space models); none of those may be diffusers'.
    Layout(
        "Z-Image",
        ("noise_refiner.0.attention.norm_k.weight",),
        lambda _: _ZIMAGE,
        kept=r"(?!all_|.*\.attention\.(to|norm)_)",
    ),
    Layout("Stable Diffusion 1.x, 2.x and XL", ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"), _unet),
)

# Keys that no model class of ComfyUI has, unless the key beside them is there too. LTX-Video's names would be easy, but
# what ComfyUI reads from the header of its releases (are frames placed causally?) is in no tensor.
FOREIGN = (
    (r"(joint|single)_transformer_blocks\.\d+\.attn\.to_\w+\.weight$", ""),  # HunyuanVideo
    (r"pos_embed\.proj\.(weight|bias)$", ""),  # Hunyuan-DiT
    (r"conv_in\.weight$", ""),  # UNets of another make
    (r"time_caption_embed\.", "ref_image_patch_embedder.weight"),
    (r"blocks\.\d+\.attn1\.to_out\.0\.weight$", ""),  # relatives of Wan
    (r"transformer_blocks\.\d+\.attn1\.norm_q\.weight$", ""),  # LTX-Video, CogVideoX, Mochi, Cosmos 1
    (r"context_embedder\.time_text_embed\.", ""),  # HunyuanVideo 1.5
)
