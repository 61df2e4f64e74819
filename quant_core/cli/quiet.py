"""Keeps what compiled libraries print out of the results."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stdout_of_libraries_to_stderr() -> Iterator[None]:
    """HiGHS in scipy 1.17 prints lines of its own now and then, whatever it is told; ours would be mixed with them."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """C's own buffers, which otherwise would be written when the program ends."""
    try:
        ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
    except (OSError, AttributeError):
        pass
