"""What became of each job, one line of JSON each, on disk before the next step: a killed batch continues from it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import CalibQuantError
from ..files.disk import check_input, reason, stat_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from typing_extensions import Self

HEAD = b'{"calibquant_queue": 1}\n'
SENT, DONE, FAILED, WITHDRAWN = "sent", "done", "failed", "withdrawn"


@dataclass(frozen=True)
class Entry:
    """The latest about a job. seconds: of the run itself; results: files as the server names them, below output/."""

    job: str
    state: str
    server: str = ""
    prompt_id: str = ""
    seconds: float | None = None
    results: list[str] = field(default_factory=list)
    error: str = ""


class Journal:
    """A file of entries that only grows; ``entries`` has the latest of each job. One process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        if stat_of(path) is not None:
            check_input(path)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as e:
            raise CalibQuantError(f"{path}: cannot be written: {reason(e)}: give another --journal") from e
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def add(self, entry: Entry) -> None:
        self.entries[entry.job] = entry
        self._append(json.dumps(asdict(entry)).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            if fcntl is not None:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise CalibQuantError(f"{self.path}: another batch is writing it: wait, or give another --journal") from e
        except OSError:  # a file system without locks
            return

    def _read(self) -> None:
        """A line that a kill cut short is cut off; nothing else is touched, and no file that is not ours."""
        text = self.path.read_bytes()
        if not text.startswith(HEAD[: len(text)]):
            raise CalibQuantError(f"{self.path}: is no journal of a batch: give another --journal")
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines()[1:], 2):
            entry = _entry(line)
            if entry is None:
                raise CalibQuantError(f"{self.path}: line {number} is damaged: delete it, its job then runs again")
            self.entries[entry.job] = entry
        if len(whole) < len(text):
            os.ftruncate(self._fd, len(whole))
        if not whole:
            self._append(HEAD)

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            os.fsync(self._fd)
        except OSError as e:
            raise CalibQuantError(f"{self.path}: cannot be written: {reason(e)}: make room, then run it again") from e


_KINDS: dict[str, Any] = {
    "job": str, "state": str, "server": str, "prompt_id": str, "seconds": (int, float, type(None)), "results": list,
    "error": str,
}  # fmt: skip


def _entry(line: bytes) -> Entry | None:
    """None for what is none."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.keys() != _KINDS.keys():
        return None
    kept = all(isinstance(values[name], kind) for name, kind in _KINDS.items())
    return Entry(**values) if kept and all(isinstance(name, str) for name in values["results"]) else None
