"""Progress on the terminal."""

from __future__ import annotations

import sys


class Bar:
    """The engine's progress protocol on a tqdm bar on stderr."""

    def __init__(self, name: str, unit: str = "tensor") -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit=unit, file=sys.stderr, leave=False, disable=None)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int, text: str) -> None:
        self._bar.total = total
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n) or self._bar.refresh()

    def say(self, text: str) -> None:
        """A line of its own on stderr."""
        self._bar.write(text, file=sys.stderr)
