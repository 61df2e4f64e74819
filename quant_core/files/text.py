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


def gigabytes(nbytes: int, beside: int | None = None) -> str:
    """GB = 1e9 bytes; MB where that, or the smaller number to be compared with, is below a tenth of one."""
    smallest = nbytes if beside is None else min(nbytes, beside)
    return f"{nbytes / 1e9:.2f} GB" if smallest >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def change_of_size(before: int, after: int) -> str:
    """Both sizes in one unit."""
    return f"{gigabytes(before, after)} → {gigabytes(after, before)}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
