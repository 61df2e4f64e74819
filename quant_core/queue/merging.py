"""The calibrations that the jobs of a dealt-out one saved, brought here and added up."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CalibQuantError
from .run import Row
from .server import opened

if TYPE_CHECKING:
    from ..evidence.calibration import Calibration

SUFFIX = ".calibration.safetensors"


def merge(rows: Sequence[Row], output: Path, overwrite: bool) -> Calibration:
    """One file of all the parts, as if one server had drawn all samples; what it holds."""
    from ..evidence import calibration

    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as folder:
        merged: Calibration | None = None
        for row in rows:
            part = Path(folder) / SUFFIX
            asyncio.run(_fetch(row.server, _saved(row), part))
            found = calibration.load(part)
            if merged is None:
                merged = found
                continue
            twice = set(merged.info.get("runs", [])) & set(found.info.get("runs", []))
            if twice:
                raise CalibQuantError(
                    f"{_saved(row)} (job {row.number}): holds a sample of an earlier job, {min(twice)}: set merge_with "
                    f"to none, and update ComfyUI-CalibQuant on {row.server}"
                )
            merged = calibration.merge(merged, found, max(c.info.get("rows", 0) for c in (merged, found)))
    assert merged is not None, "a batch has a job"
    calibration.save(merged, output, overwrite)
    return merged


def _saved(row: Row) -> str:
    found = [result for result in row.outcome.results if result.endswith(SUFFIX)]
    if len(found) != 1:
        raise CalibQuantError(
            f"{row.server}: job {row.number} names no calibration file: update ComfyUI-CalibQuant there, run it again"
        )
    return found[0]


async def _fetch(url: str, result: str, into: Path) -> None:
    async with opened([url], 1.0, listen=False) as (server,):
        await server.fetch(result, into)
