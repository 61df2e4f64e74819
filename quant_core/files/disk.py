"""Files on disk: inputs looked at before they are opened, outputs given their name whole or not at all. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from ..errors import CalibQuantError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from typing_extensions import Self

FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
LONGEST_JOB = 200  # bytes of a journal's first line
STEM = 200  # bytes of the target's name in the temporary one; file systems allow 255 in all
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL}
_unfinished: set[NewFile] = set()


def stat_of(path: Path) -> os.stat_result | None:
    """None when there is nothing of that name; CalibQuantError when that cannot be told."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise CalibQuantError(f"{path}: cannot be reached: {reason(e)}: check the name and its folder") from e


def check_input(path: Path) -> None:
    """CalibQuantError unless this is a file that can be read to its end: not a pipe, a device or nothing."""
    found = stat_of(path)
    if found is None:
        raise CalibQuantError(f"{path}: no such file: check the path")
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file (a pipe or device)"
        raise CalibQuantError(f"{path}: is {what}: give the path of a file")


def check_output(path: Path, overwrite: bool) -> None:
    """What can be known to be wrong with an output's name before the work starts."""
    found = stat_of(path)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise CalibQuantError(f"{path}: is a folder: name a file")
    if found is not None and not overwrite:
        raise CalibQuantError(f"{path}: exists already: give another name or --overwrite")
    folder = stat_of(path.parent)
    if folder is None or not stat.S_ISDIR(folder.st_mode):
        raise CalibQuantError(f"{path.parent}: no such folder: make it first")


def reason(error: Exception) -> str:
    """What the system says of a failure, without the path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class NewFile:
    """A file that is written under a name of its own beside ``target`` and gets the target's name at the end.

    The name (``TARGET.calibquant-RANDOM.partial``) is new, so that two runs never share one and no link is followed.
    Leaving the block unpublished removes the file. What a killed run left for the same target is removed by the next
    one, or taken over (``continued``) if the journal beside it begins with the line ``job``: a run holds a lock on its
    file, so a file without one is nobody's.
    """

    def __init__(self, target: Path, job: bytes = b"") -> None:
        self.target, self.continued = target, False
        for path in _partials(target):
            if (left := _claim(path)) is None:
                continue
            if job and not self.continued and _first_line(journal_of(left[0])) == job:
                (self.path, self.file), self.continued = left, True
                _unfinished.add(self)
            else:
                _remove(*left)
        if not self.continued:
            self._create()

    @property
    def journal(self) -> Path:
        return journal_of(self.path)

    def _create(self) -> None:
        while True:
            self.path = _partial_name(self.target)
            with self._errors():
                _unfinished.add(self)  # first, so that an interruption between the next two lines leaves nothing
                try:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | FLAGS
                    self.file = os.fdopen(os.open(self.path, flags, 0o666), "w+b")
                except OSError:
                    _unfinished.discard(self)
                    raise
            if self._keep():
                return
            self.file.close()

    def _keep(self) -> bool:
        """Lock the new file; False where another run, which begins just now, took it for abandoned before that."""
        if fcntl is None:
            return True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: then leftovers stay, too
            return True
        return self.path.exists()

    def publish(self, overwrite: bool) -> None:
        """Give the file its name, durably. Without ``overwrite`` a file that appeared there meanwhile is refused."""
        with self._errors():
            self.file.flush()
            os.fsync(self.file.fileno())
            if os.name == "nt":  # cannot rename open files; elsewhere the lock is held until the name is given
                self.file.close()
            if overwrite:
                os.replace(self.path, self.target)
            else:
                _rename_to_new(self.path, self.target)
            _unfinished.discard(self)
            self.file.close()
        with contextlib.suppress(OSError):
            self.journal.unlink(missing_ok=True)
        _sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the file unless it was published; may be called again."""
        if self in _unfinished:
            with contextlib.suppress(AttributeError, OSError):  # never opened; a full disk shows again on closing
                self.file.close()
            for path in (self.path, self.journal):
                with contextlib.suppress(OSError):
                    path.unlink()
            _unfinished.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.discard()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError as e:
            raise CalibQuantError(
                f"{self.target}: another run made it meanwhile: give another name or --overwrite"
            ) from e
        except OSError as e:
            raise CalibQuantError(f"{self.target}: cannot be written: {reason(e)}") from e


def discard_unfinished() -> None:
    """Remove what an interruption in the middle of cleaning up may have left of this process."""
    for new in list(_unfinished):
        new.discard()


def _rename_to_new(path: Path, target: Path) -> None:
    """Rename, or FileExistsError where os.replace would silently replace."""
    if os.name == "nt":
        os.rename(path, target)
        return
    try:
        os.link(path, target)
    except OSError as e:
        if isinstance(e, FileExistsError) or e.errno not in NO_LINKS:
            raise
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # no hard links here: take the name first
        os.replace(path, target)
        return
    path.unlink()


def journal_of(partial: Path) -> Path:
    """Where what is done of an unfinished file is written down; see ``journal``."""
    return partial.with_suffix(".journal")


def abandoned(target: Path) -> int | None:
    """Bytes on the disk of what killed runs left for this target; None while another run is at work on it."""
    size = 0
    for path in _partials(target):
        if (left := _claim(path)) is None:
            return None
        with left[1] as file:
            found = os.fstat(file.fileno())
            size += min(found.st_size, getattr(found, "st_blocks", found.st_size) * 512)
    return size


def remove_abandoned(target: Path) -> None:
    """Remove what killed runs left for this target."""
    for path in _partials(target):
        if left := _claim(path):
            _remove(*left)


def _partial_name(target: Path) -> Path:
    return target.with_name(f"{_stem(target)}{secrets.token_hex(8)}.partial")


def _stem(target: Path) -> str:
    return os.fsencode(target.name)[:STEM].decode("utf-8", "ignore") + ".calibquant-"


def _partials(target: Path) -> list[Path]:
    """Unfinished files for this target. A journal whose file was published or removed is cleared away."""
    ours = re.compile(re.escape(_stem(target)) + r"[0-9a-f]{16}\.(partial|journal)")
    try:  # a folder may be written but not listed
        names = {name for name in os.listdir(target.parent) if ours.fullmatch(name)}
    except OSError:
        return []
    paths = [target.with_name(name) for name in sorted(names)]
    for path in paths:
        if path.suffix == ".journal" and path.with_suffix(".partial").name not in names:
            with contextlib.suppress(OSError):
                path.unlink()
    return [path for path in paths if path.suffix == ".partial"]


def _claim(path: Path) -> tuple[Path, BinaryIO] | None:
    """An unfinished file that nobody works on any more, opened and locked; None for others. It may get a new name."""
    try:
        if fcntl is None:  # Windows renames no file that is open anywhere, and only one run can do it
            fresh = path.with_name(path.name[: -len("0" * 16 + ".partial")] + f"{secrets.token_hex(8)}.partial")
            os.rename(path, fresh)
            with contextlib.suppress(FileNotFoundError):
                os.rename(journal_of(path), journal_of(fresh))
            return fresh, open(fresh, "r+b")
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | FLAGS), "r+b")
    except OSError:  # in use, not ours, or gone: leave it
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(file.fileno())
        if stat.S_ISREG(found.st_mode) and os.path.samestat(found, path.lstat()):  # else published meanwhile
            return path, file
    except OSError:
        pass
    file.close()
    return None


def _remove(path: Path, file: BinaryIO) -> None:
    """A claimed file with its journal."""
    if os.name == "nt":  # cannot remove open files; elsewhere the lock is held until the name is gone
        file.close()
    for each in (path, journal_of(path)):
        with contextlib.suppress(OSError):
            each.unlink()
    file.close()


def _first_line(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.readline(LONGEST_JOB)
    except OSError:
        return b""


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
