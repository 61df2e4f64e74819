"""ComfyUI's progress bar, its cancel, and text on a node while it works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer


def progress(total_parts: int = 1) -> Callable[[int], Callable[[int, int, str], None]]:
    """The engine's progress protocol on ComfyUI's progress bar; a cancel raises out of the engine at once.

    One bar over ``total_parts`` jobs of equal weight: ``progress(2)(0)`` is the function for the first half.
    """
    bar = comfy.utils.ProgressBar(1000 * total_parts)

    def part(index: int) -> Callable[[int, int, str], None]:
        def update(done: int, total: int, _text: str) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(1000 * index + 1000 * done // max(total, 1), 1000 * total_parts)

        return update

    return part


def show(node_id: str | None, text: str) -> None:
    """Text on the node while it works: event ``calibquant.text`` {node, text}, drawn by js/calibquant.js."""
    if node_id and PromptServer.instance is not None:
        PromptServer.instance.send_sync("calibquant.text", {"node": node_id, "text": text})


def preview_progress(total: int) -> Callable[[int, Any], None]:
    """ComfyUI's progress bar with pictures: update(done, preview); a cancel raises."""
    bar = comfy.utils.ProgressBar(total)

    def update(done: int, preview: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, preview)

    return update
