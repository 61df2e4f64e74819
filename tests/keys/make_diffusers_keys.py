"""Where each tensor of a diffusers file comes from, by the conversion functions of the package ``diffusers`` itself.

``python tests/keys/make_diffusers_keys.py`` (with diffusers installed; the tests need it not) gives those functions the
published keys of two blocks, every row filled with a number of its own, and writes down where the rows went:
``diffusers.json``, variant -> stored key -> ranges of rows [native key, first, number].
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import make_keys
import torch

CONVERTERS = {
    "wan21_i2v_14b": "convert_wan_transformer_to_diffusers",
    "wan21_flf2v_14b": "convert_wan_transformer_to_diffusers",
    "wan21_vace_14b": "convert_wan_transformer_to_diffusers",
    "flux2_dev": "convert_flux2_transformer_checkpoint_to_diffusers",
    "lumina2": "convert_lumina2_to_diffusers",
    "chroma": "convert_chroma_transformer_checkpoint_to_diffusers",
    "cosmos_predict2_2b": "convert_cosmos_transformer_checkpoint_to_diffusers",
}
# Norms of Flux-like models, as published; ComfyUI reads either name.
_SCALE = re.compile(r"((?:query_norm|key_norm|norms\.\d+))\.weight$")
NUMBER = re.compile(r"(?:blocks|(?<!guidance_layer\.)layers|refiner)\.(\d+)\.")
# Forgotten by the conversion function; the name is that of models/transformers/transformer_wan.py.
POSITIONS = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
Tensors = dict[str, torch.Tensor]


def functions() -> dict[str, Callable[[Tensors], Tensors]]:
    """Of one module of the package, without importing the package and all that it needs."""
    found = importlib.util.find_spec("diffusers")
    tree = ast.parse(Path(found.submodule_search_locations[0], "loaders", "single_file_utils.py").read_text())
    kept = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith(("convert_", "swap_"))]
    scope: dict[str, Callable[[Tensors], Tensors]] = {"torch": torch, "re": re}
    module = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *kept], [])
    exec(compile(ast.fix_missing_locations(module), "single_file_utils.py", "exec"), scope)
    return scope


def rows_of(variant: str) -> dict[str, int]:
    """Native key -> rows, of the first two blocks of each kind."""
    shapes = make_keys.load(variant)
    return {key: (shape or (1,))[0] for key, shape in shapes.items() if all(int(n) < 2 for n in NUMBER.findall(key))}


def ranges(numbers: list[int], owner: dict[int, tuple[str, int]]) -> list[list[str | int]]:
    runs: list[list[str | int]] = []
    last = None
    for number in numbers:
        key, row = owner[number]
        if runs and runs[-1][0] == key and number == last + 1:
            runs[-1][2] += 1
        else:
            runs.append([key, row, 1])
        last = number
    return runs


def convert(variant: str, function: Callable[[Tensors], Tensors]) -> dict[str, list[list[str | int]]]:
    owner: dict[int, tuple[str, int]] = {}
    native, position = {}, 0
    dims = {key: max(1, len(shape)) for key, shape in make_keys.load(variant).items()}
    for key, rows in rows_of(variant).items():
        native[_SCALE.sub(r"\1.scale", key)] = torch.arange(position, position + rows).view(-1, *[1] * (dims[key] - 1))
        owner |= {position + i: (key, i) for i in range(rows)}
        position += rows
    made = function(native).items()
    return {POSITIONS.get(key, key): ranges(tensor.reshape(-1).tolist(), owner) for key, tensor in made}


def main() -> None:
    known = functions()
    lines = []
    for variant, name in CONVERTERS.items():
        made = convert(variant, known[name])
        inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in made.items())
        lines.append(f"{json.dumps(variant)}: {{\n{inner}\n}}")
        print(f"{variant}: {len(made)} keys")
    (make_keys.HERE / "diffusers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
