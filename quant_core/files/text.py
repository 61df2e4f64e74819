"""Text for people and small text files (plans, reports, tables), written beside themselves and renamed."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CalibQuantError


def write_text(path: str | os.PathLike[str], text: str, overwrite: bool = True) -> None:
    """A small text file (plan, report, table), written beside itself and renamed."""
    path = Path(path)
    if path.suffix == ".safetensors":  # one slip of -o would replace a model of 12 GB by a page of text
        raise CalibQuantError(f"{path}: is a model's name, not a text file's: give another name")
    if path.exists() and not overwrite:
        raise CalibQuantError(f"{path}: exists already: give another name or --overwrite")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, "utf-8", newline="\n")
        os.replace(partial, path)
    except OSError as e:
        raise CalibQuantError(f"{path}: cannot be written: {e.strerror}") from e


def read_text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibQuantError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e


def gigabytes(nbytes: int) -> str:
    """GB = 1e9 bytes; MB below a tenth of one."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
