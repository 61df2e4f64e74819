"""What became of a batch, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..files.text import columns
from .journal import DONE, FAILED
from .run import Row

NOT_RUN = "not run: no server was left"


def as_text(rows: Sequence[Row]) -> str:
    """One line a job, in columns."""
    labels = list(dict.fromkeys(label for row in rows for label in row.job.settings))
    lines = [["job", *labels, "server", "seconds", "result"]]
    for row in rows:
        settings = [str(row.job.settings.get(label, "")) for label in labels]
        seconds = "" if row.outcome.seconds is None else f"{row.outcome.seconds:.1f}"
        lines.append([str(row.number), *settings, row.server, seconds, _end(row)])
    return columns(lines)


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps([_facts(row) for row in rows], indent=1) + "\n"


def _end(row: Row) -> str:
    if row.state == FAILED:
        return f"failed: {row.outcome.error}"
    return ", ".join(row.outcome.results) or "done" if row.state == DONE else NOT_RUN


def _facts(row: Row) -> dict[str, Any]:
    out = row.outcome
    return {
        "job": row.number,
        "settings": row.job.settings,
        "state": row.state if row.state in (DONE, FAILED) else "not run",
        "server": row.server,
        "prompt_id": row.prompt_id,
        "seconds": out.seconds,
        "results": out.results,
        "error": out.error,
    }
