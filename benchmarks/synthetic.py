"""A random checkpoint in Z-Image's key layout, any size: heavy-tailed weights, row and column gains.

python benchmarks/synthetic.py OUT.safetensors [--dim 2048 --ffn 5472 --layers 6]      (1.05 GB)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from safetensors.torch import save_file

HEAD = 128
TIME = 256


def linears(dim: int, ffn: int, layers: int, text: int) -> Iterator[tuple[str, int, int]]:
    """(layer, out, in) of every Linear."""
    yield from [("x_embedder", dim, 64), ("cap_embedder.1", dim, text), ("final_layer.linear", 64, dim)]
    yield from [("t_embedder.mlp.0", 1024, 256), ("t_embedder.mlp.2", TIME, 1024)]
    yield ("final_layer.adaLN_modulation.1", dim, TIME)
    blocks = [(f"layers.{i}", True) for i in range(layers)]
    blocks += [(f"noise_refiner.{i}", True) for i in range(2)] + [(f"context_refiner.{i}", False) for i in range(2)]
    for block, modulated in blocks:
        yield from [(f"{block}.attention.qkv", 3 * dim, dim), (f"{block}.attention.out", dim, dim)]
        yield from [(f"{block}.feed_forward.{w}", ffn, dim) for w in ("w1", "w3")]
        yield (f"{block}.feed_forward.w2", dim, ffn)
        if modulated:
            yield (f"{block}.adaLN_modulation.0", 4 * dim, TIME)


def weight(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    """bfloat16 [rows, cols]: Gaussian (sigma .02), 2 % of it 3x larger, lognormal gains of rows and columns."""
    base = torch.randn(rows, cols, generator=generator).mul_(0.02)
    base *= torch.where(torch.rand(rows, cols, generator=generator) < 0.02, 3.0, 1.0)
    base *= torch.randn(rows, 1, generator=generator).mul_(0.35).exp_()
    base *= torch.randn(1, cols, generator=generator).mul_(0.25).exp_()
    return base.bfloat16()


def make(dim: int, ffn: int, layers: int, text: int = 2560, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.weight": weight(o, i, generator) for name, o, i in linears(dim, ffn, layers, text)}
    for key in list(tensors):
        block = key.split(".attention.qkv")[0]
        if block != key:
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                tensors[f"{block}.{norm}.weight"] = torch.ones(dim, dtype=torch.bfloat16)
            for norm in ("q_norm", "k_norm"):
                tensors[f"{block}.attention.{norm}.weight"] = torch.ones(HEAD, dtype=torch.bfloat16)
    tensors["cap_embedder.0.weight"] = torch.ones(text, dtype=torch.bfloat16)
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5472)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    save_file(make(options.dim, options.ffn, options.layers), options.out, {"format": "pt"})


if __name__ == "__main__":
    main()
