"""What output nodes wrote, so that ComfyUI's cache does not call a node done whose file was deleted since."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from . import feedback

_latest: dict[str, tuple[Path, ...]] = {}  # by graph: what it wrote last
_lost: Counter[str] = Counter()  # by graph: how often one of them was found deleted


def remember(node_id: str | None, *paths: Path) -> None:
    """The node that runs now, with everything before it, has written these files."""
    _latest[graph(node_id)] = paths


def times_lost(node_id: str | None) -> int:
    """For ``fingerprint_inputs``: another number whenever a file that the same graph wrote last has gone."""
    key = graph(node_id)
    if key in _latest and not all(path.exists() for path in _latest[key]):
        del _latest[key]
        _lost[key] += 1
    return _lost[key]


def graph(node_id: str | None) -> str:
    """A digest of the node with everything before it, as the prompt that runs now has it.

    Looked up in the queue because ``fingerprint_inputs`` is told neither the prompt nor what is linked.
    """
    running = feedback.server()
    prompts = [item[2] for item in running.prompt_queue.currently_running.values()] if running else []
    prompt: dict[str, Any] = prompts[0] if prompts else {}
    digests: dict[str, str] = {}

    def digest(name: str) -> str:
        if name not in digests:
            digests[name] = ""  # a loop is refused before it runs; end all the same
            node = prompt.get(name, {})
            inputs = {key: linked(value) for key, value in node.get("inputs", {}).items()}
            text = json.dumps([node.get("class_type"), inputs], sort_keys=True, default=repr)
            digests[name] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return digests[name]

    def linked(value: Any) -> Any:
        is_link = isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt
        return [digest(str(value[0])), value[1]] if is_link else value

    return digest(node_id or "")
