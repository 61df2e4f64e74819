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
from typing import TYPE_CHECKING

from ..errors import CalibQuantError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from typing_extensions import Self

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
    one: a run holds a lock on its file, so a file without one is nobody's.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._begin = os.fsencode(target.name)[:STEM].decode("utf-8", "ignore") + ".calibquant-"
        self.path = target.with_name(f"{self._begin}{secrets.token_hex(8)}.partial")
        self._remove_leftovers()
        with self._errors():
            _unfinished.add(self)  # first, so that an interruption between the next two lines leaves nothing
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
                self.file = os.fdopen(os.open(self.path, flags, 0o666), "w+b")
            except OSError:
                _unfinished.discard(self)
                raise
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks: then leftovers stay, too
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

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
        _sync_folder(self.target.parent)

    def discard(self) -> None:
        """Remove the file unless it was published; may be called again."""
        if self in _unfinished:
            with contextlib.suppress(AttributeError, OSError):  # never opened; a full disk shows again on closing
                self.file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()
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

    def _remove_leftovers(self) -> None:
        ours = re.compile(re.escape(self._begin) + r"[0-9a-f]{16}\.partial")
        with contextlib.suppress(OSError):  # a folder that may be written but not listed
            for name in filter(ours.fullmatch, os.listdir(self.target.parent)):
                _remove_if_abandoned(self.target.with_name(name))


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


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):  # in use, not ours, or gone: leave it
        if fcntl is None:
            path.unlink()
            return
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                path.unlink()
        finally:
            os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
