"""The two halves of a split: a main file that is wrong by itself, and the LoRA that makes it right."""

from __future__ import annotations

from pathlib import Path

from ..errors import CalibQuantError
from ..files.checkpoint import Hasher
from ..files.disk import check_input
from ..files.header import Headers
from ..files.markers import branch_of

MAIN, BRANCH = ".split.safetensors", ".split.lora.safetensors"


def branch_path(output: Path) -> Path:
    """Where the LoRA of a main file lies unless it is put elsewhere; CalibQuantError for a name that hides it."""
    if not output.name.endswith(MAIN) or output.name == MAIN:
        raise CalibQuantError(f"{output}: a split file is wrong without its LoRA: say so by a name that ends in {MAIN}")
    return output.with_name(output.name.removesuffix(MAIN) + BRANCH)


def find_branch(main: Headers, path: Path | None = None) -> Path | None:
    """The LoRA of a split file, checked by its hash: ``path``, or by the header's name beside it; else None.

    Reads the LoRA once. CalibQuantError where it is missing, or of another file.
    """
    needed = branch_of(main)
    if needed is None:
        if path is not None:
            raise CalibQuantError(f"{main.path}: is not split, so it has no LoRA: leave {path.name} off")
        return None
    name, digest = needed
    path = path or main.files[0].with_name(name)
    try:
        check_input(path)
    except CalibQuantError as e:
        raise CalibQuantError(f"{main.path}: is split and wrong without its LoRA {name}: {e}, or name it") from e
    if Hasher([path]).result() != digest:
        raise CalibQuantError(
            f"{path}: is not the LoRA that {main.path} was split into (its SHA-256 differs): put the one of the same "
            "run there, or quantize again"
        )
    return path
