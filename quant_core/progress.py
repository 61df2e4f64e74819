"""The one progress protocol of the engine."""

from collections.abc import Callable

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what is being done); may raise to cancel
