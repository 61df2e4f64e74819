"""A job that was done before, or begun: its file tells, by a digest of everything that decides what is in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from .. import __version__
from ..errors import CalibQuantError
from ..evidence.calibration import Calibration
from ..files.disk import stat_of
from ..files.header import Headers
from ..files.markers import provenance
from ..models.source import Source
from ..planning.layout import JOB
from ..planning.plan import Plan


def job(source: Source, plan: Plan, merged: str, calibration: Calibration | None, rounding: str, verified: bool) -> str:
    """SHA-256 over the source, the plan, the LoRA patches, the calibration and how weights are rounded.

    verified: whether the file is read again and compared before it gets its name.
    """
    seen = None if calibration is None else calibration.fingerprint()
    words = [__version__, source.checkpoint.fingerprint(), merged, seen, rounding, verified]
    return hashlib.sha256((json.dumps(words) + replace(plan, predicted=None).to_json()).encode()).hexdigest()


def unfinished(source: Source, job: str, device: str) -> str:
    """What a killed run must have been doing for another to go on with it: a changed source is not noticed by ``job``,
    which looks at parts of it, and another device may round otherwise.
    """
    found = [stat_of(file) for file in source.checkpoint.files]
    return json.dumps([job, device, [each and (each.st_size, each.st_mtime_ns) for each in found]])


def find_finished(
    folder: Path, source: Source, plan: Plan, merged: str, calibration: Calibration | None, rounding: str
) -> Path | None:
    """A verified file below the folder that this job would make again; None where there is none."""
    wanted = job(source, plan, merged, calibration, rounding, True)
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            found = stat_of(path)
            if found is None or found.st_size != plan.size:  # which is exact
                continue
            with Headers(path) as file:
                if (provenance(file) or {}).get(JOB) == wanted:
                    return path
        except CalibQuantError:  # just this size, but damaged or not to be read
            continue
    return None
