"""Text for people, small text files (plans, reports, tables), the one reader of JSON that others wrote. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CalibQuantError, printable
from .disk import NewFile, check_input, check_output, reason

MAX_TEXT = 256 << 20  # bytes; a plan has a few MB
MAX_DEPTH = 64  # of nested JSON; ours has 5 levels
MAX_DIGITS = 20  # of a whole number; 2**64 has 20


def write_text(path: str | os.PathLike[str], text: str, overwrite: bool = True) -> None:
    """A small text file (plan, report, table), written beside itself and renamed."""
    path = Path(path)
    if not path.name:
        raise CalibQuantError(f"{path}: is no file name: name a file")
    if path.suffix == ".safetensors":  # one slip of -o would replace a model of 12 GB by a page of text
        raise CalibQuantError(f"{path}: is a model's name, not a text file's: give another name")
    check_output(path, overwrite)
    with NewFile(path) as new:
        try:
            new.file.write(text.encode("utf-8", "replace"))
        except OSError as e:
            raise CalibQuantError(f"{path}: cannot be written: {reason(e)}") from e
        new.publish(overwrite)


def read_text(path: str | os.PathLike[str]) -> str:
    path = Path(path)
    check_input(path)
    try:
        if path.stat().st_size > MAX_TEXT:
            raise CalibQuantError(f"{path}: is too large for a text file: check the path")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise CalibQuantError(f"{path}: cannot be read: {reason(e)}") from e


def parse_json(text: str | bytes, problem: str, remedy: str) -> Any:
    """JSON that anybody may have written: plain, finite, not nested without end, no key twice.

    Whatever is wrong with it is one error, ``PROBLEM (what and where): REMEDY``.
    """
    doubtful: list[str] = []

    def real(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):  # NaN, Infinity, 1e999: their place is searched for afterwards
            doubtful.append(word)
        return value

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_int=_whole, parse_float=real, parse_constant=real
        )
        _check_depth(value)
        if doubtful:
            raise ValueError(f"{_place(value)} is {doubtful[0]}, no number")
        if "\\u" in text:  # an escaped half of a character cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as e:
        raise CalibQuantError(f"{problem} (nested too deeply): {remedy}") from e
    except ValueError as e:
        raise CalibQuantError(f"{problem} ({e}): {remedy}") from e
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _check_depth(value: Any) -> None:
    """Shallow enough to be compared, copied and written again without fear."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _place(value: Any, path: tuple[str, ...] = ()) -> str:
    """Where the first number that is none stands: "layers / blocks.0.ffn / input_scale"."""
    if isinstance(value, float) and not math.isfinite(value):
        return " / ".join(path) or "it"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    places = (_place(child, (*path, str(key))) for key, child in items)
    return next(filter(None, places), "")


def gigabytes(nbytes: int, beside: int | None = None) -> str:
    """GB = 1e9 bytes; MB where that, or the smaller number to be compared with, is below a tenth of one."""
    smallest = nbytes if beside is None else min(nbytes, beside)
    return f"{nbytes / 1e9:.2f} GB" if smallest >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def change_of_size(before: int, after: int) -> str:
    """Both sizes in one unit."""
    return f"{gigabytes(before, after)} → {gigabytes(after, before)}"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """A table, each cell on one line."""
    cells = [[printable(cell.replace("\n", "; ")) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
