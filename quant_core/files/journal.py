"""What is done of an unfinished file, written down beside it for the run that continues it after a kill.

The first line says of which job and file it is. Each further line is a part: a CRC-32 of the line, then JSON. It is
written after the part's bytes, and they are believed only when they have its SHA-256: neither a line that the kill
tore nor bytes that a power cut took do any harm.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CalibQuantError
from .disk import reason


@dataclass(frozen=True)
class Part:
    """Tensors that are made together; sha256: of their bytes, one after the other; note: JSON."""

    name: str
    tensors: Sequence[str]
    sha256: str
    note: Any


def first_line(job: str, header: bytes) -> bytes:
    """Of a journal for the file with this header. job: what decides every byte of it."""
    return b"calibquant journal 1 " + hashlib.sha256(job.encode() + b"\n" + header).hexdigest().encode() + b"\n"


class Journal:
    """``parts``: what was there when a killed run's journal was taken over (``continued``), by name."""

    def __init__(self, path: Path, line: bytes, continued: bool) -> None:
        self._path = path
        self.parts = _read(path) if continued else {}
        self._append(b"\n" if continued else line)  # after a torn line a new one begins

    def add(self, name: str, tensors: Sequence[str], sha256: str, note: Any) -> None:
        """A part whose bytes are with the system."""
        text = json.dumps(asdict(Part(name, tensors, sha256, note))).encode()
        self._append(_check(text) + b" " + text + b"\n")

    def _append(self, data: bytes) -> None:
        try:
            with open(self._path, "ab", buffering=0) as file:
                file.write(data)
        except OSError as e:
            raise CalibQuantError(f"{self._path}: cannot be written: {reason(e)}") from e


def _read(path: Path) -> dict[str, Part]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return {}
    pairs = (line.partition(b" ") for line in lines)
    parts = [Part(**json.loads(text)) for check, _, text in pairs if text and check == _check(text)]
    return {part.name: part for part in parts}


def _check(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
