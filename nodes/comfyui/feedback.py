"""ComfyUI's progress bar, its cancel, text on a node while it works, and errors in a node's words."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...quant_core.errors import CalibQuantError
from ...quant_core.progress import Progress

SECONDS_BETWEEN = 0.5  # two words on a node
SETTLED = 3.0  # seconds after which the time left is told


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


def counting(node_id: str | None, what: str, bar: Progress) -> Progress:
    """The bar, and on the node how many layers of a step are done and how long the rest will take."""
    began, told = time.monotonic(), -math.inf
    show(node_id, what)

    def update(done: int, total: int, text: str) -> None:
        nonlocal told
        bar(done, total, text)
        now = time.monotonic()
        if now - told >= SECONDS_BETWEEN and 0 < done:
            told = now
            show(node_id, f"{what}: layer {done} of {total}{_left(now - began, done, total)}")

    return update


def _left(elapsed: float, done: int, total: int) -> str:
    """The minutes left if it goes on as it did; nothing as long as that is no more than a guess."""
    if elapsed < SETTLED:
        return ""
    minutes = elapsed / done * (total - done) / 60
    return " · less than a minute left" if minutes < 1 else f" · about {math.ceil(minutes)} min left"


def show(node_id: str | None, text: str) -> None:
    """Text on the node while it works."""
    _send(node_id, {"text": text})


def tell_kept(node_id: str | None, text: str) -> None:
    """What is left of work that is about to end early; the node shows it with its error or its cancel."""
    _send(node_id, {"kept": text})


def _send(node_id: str | None, words: dict[str, str]) -> None:
    """Event ``calibquant.text`` {node, prompt_id, text | kept}, drawn by js/results.js in the page that queued it."""
    running, context = server(), get_executing_context()
    if node_id and running is not None:
        about = {"node": node_id, "prompt_id": context.prompt_id if context else None}
        running.send_sync("calibquant.text", {**about, **words}, running.client_id)


def server() -> PromptServer | None:
    """None where nodes are run without one: in tests and scripts."""
    return getattr(PromptServer, "instance", None)


def preview_progress(total: int) -> Callable[[int, Any], None]:
    """ComfyUI's progress bar with pictures: update(done, preview); a cancel raises."""
    bar = comfy.utils.ProgressBar(total)

    def update(done: int, preview: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, preview)

    return update


@contextlib.contextmanager
def in_node_words() -> Iterator[None]:
    """Errors of the engine, as a node says them; around a block of code or, as a decorator, a function."""
    try:
        yield
    except CalibQuantError as error:
        raise type(error)(node_words(str(error))) from error


# How the problem of "FILE: problem: remedy" begins where the file is its subject.
_SAYS_OF_THE_FILE = re.compile(r"(is|has|holds|exists|cannot|ends|mixes|needs) ")


def node_words(message: str) -> str:
    """The problem first, then the file's name without its folders; an option (--keep-ratio) as the input it is here.

    A node shows few words at a time, and which file it is about is known there; paths also end up in shared pictures
    of a graph. Inputs are named as the command line's options are.
    """
    file, problem = _split(message)
    if file:
        subject = "the file " if _SAYS_OF_THE_FILE.match(problem) else ""
        problem = f"{subject}{problem} ({Path(file).name})"
    return re.sub(r"--([a-z][a-z0-9-]*)", lambda option: option[1].replace("-", "_"), problem)


def _split(message: str) -> tuple[str, str]:
    """(file, problem) of a message that begins with an absolute path, else ("", message)."""
    ends = [match.start() for match in re.finditer(": ", message)]
    paths = [message[:end] for end in ends if Path(message[:end]).is_absolute()]
    file = next((path for path in paths if Path(path).exists()), paths[0] if paths else "")
    return file, message[len(file) + 2 :] if file else message
