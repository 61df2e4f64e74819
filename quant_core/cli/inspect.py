"""``calibquant inspect``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import printable
from ..files.text import gigabytes
from .options import parts, path

HELP = "what a file is: architecture, layers, formats, bytes, provenance"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("file", type=path)
    c.add_argument("--parts", type=parts, default=(), metavar="A,B,…", help="whose layers to list: model,te,vae")
    c.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> None:
    from ..reports import describe

    info = describe.inspect(args.file, args.parts)
    if args.json:
        print(json.dumps(info, indent=1))
        return
    print(f"{info['file']}: {info['architecture_title']}, {gigabytes(info['bytes'])}, {info['tensors']} tensors")
    if info["layout"]:
        print(info["layout"])
    if info["prefix"]:
        print(f"prefix {info['prefix']} ({info['other_tensors']} tensors outside it: kept as they are)")
    for part in info["parts"] if len(info["parts"]) > 1 else []:
        how = "" if part["architecture"] else ", ComfyUI reads no scales for it in a checkpoint"
        print(f"part {part['part']}: {part['title']}, {gigabytes(part['bytes'])} {'/'.join(part['dtypes'])}{how}")
    print("2-D weights: " + ", ".join(f"{n} {fmt}" for fmt, n in info["formats"].items()))
    print("bytes: " + ", ".join(f"{dtype} {gigabytes(n)}" for dtype, n in info["dtypes"].items()))
    if info["split"]:
        print(f"wrong without its LoRA {info['split']}: load both with Load Split Model, or bypass it at strength 1")
    if info["provenance"]:
        print(printable(_made_by(info["provenance"])))


def _made_by(provenance: dict[str, Any]) -> str:
    """What a header claims, whatever it claims."""
    tool, recipe, source = (provenance.get(name) for name in ("tool", "recipe", "source"))
    source = source if isinstance(source, dict) else {}
    made = f"made by {tool}, recipe {recipe}, from {source.get('file')} (sha256 {source.get('sha256')})"
    folded = provenance.get("folded")
    layers = folded.get("layers") if isinstance(folded, dict) else None
    return made + (
        f"; {len(layers)} modules folded: {folded.get('note')}" if isinstance(layers, list) and layers else ""
    )
