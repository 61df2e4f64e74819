"""Sampling runs added up in one calibration file: what Monitor Calibration and Calibrate have in common."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quant_core.errors import CalibQuantError
from ..quant_core.evidence import calibration
from ..quant_core.evidence.calibration import Calibration
from ..quant_core.evidence.collector import Collector
from ..quant_core.evidence.histogram import range_in_words
from ..quant_core.files.text import counted
from ..quant_core.models.architectures import Architecture
from .comfyui import folders
from .comfyui.sampling import SamplingRun

SAVING_SHARE = 10  # a patient recorder works at least this many times as long as its last save took, then saves again
IDENTITY = ("architecture", "source_fingerprint")


@dataclass(frozen=True)
class CalibrationHandle:
    """What a CALIBRATION link carries; current() is live behind a monitor and constant otherwise."""

    current: Callable[[], Calibration]


class Recorder:
    """Adds runs up on top of what its file held, and saves after each. There must be one per file only: of two servers
    that share a file each adds to what the other saved, and where they sample at once one goes on in a file beside it.

    An observer of ``sampling.observe``. rows: capacity of each input's row sample; memory: GB for more of wide ones.
    patient: of one job, whose runs have names of their own: may skip a save, and after a restart draws the rows that it
    would have drawn without.
    """

    def __init__(self, path: Path, patient: bool = False, report: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.report = report  # told after every run
        self.ahead = 0  # of the next runs so many are not watched: it has them already
        self.labels: dict[str, Any] = {}  # provenance of the next runs that only the caller knows: prompts, scheduler
        self._patient = patient
        self._before = Calibration()
        self._identity: dict[str, Any] = {}
        self._rows = 0, 0  # at least of each input, and the bytes for more of wide ones
        self._stamp = folders.MISSING  # of the file as it was loaded or saved here
        self._forget()

    def prepare(
        self,
        architecture: Architecture,
        identity: Mapping[str, Any],
        rows: int,
        reset: bool = False,
        memory: float = 0.0,
    ) -> None:
        """Continue what this recorder or its file holds, or begin anew. CalibQuantError: it is of another model."""
        if reset:
            self._stamp = folders.stamp(self.path)
        before = Calibration() if reset else self._continued(identity, (rows, int(memory * 1e9)))
        if before is None:
            return
        self._identity, self._rows, self._architecture = dict(identity), (rows, int(memory * 1e9)), architecture
        self._begin(before)

    def current(self) -> Calibration:
        """Everything collected so far, by finished runs."""
        if self._collector is None:
            return self._before
        collected = self._collector.result({**self._identity, **self._info})
        return calibration.merge(self._before, collected, self._rows[0]) if self._before.layers else collected

    def runs(self) -> int:
        """How many finished."""
        runs = self._collector.info["runs"] if self._collector else []
        return len(self._before.info.get("runs", [])) + len(runs)

    def save(self) -> None:
        """Write what is not on disk yet."""
        if not self._unsaved:
            return
        began = time.monotonic()
        if self._changed():
            self.path = _beside(self.path)
        calibration.save(self.current(), self.path, overwrite=True)
        self._saved, self._unsaved = time.monotonic(), False
        self._stamp = folders.stamp(self.path)
        self._cost = self._saved - began

    def start(self, run: SamplingRun | None = None) -> Collector:
        """run: None where a prompt was encoded, of which ``labels`` tells everything."""
        assert self._collector is not None, "prepare comes first"
        if self.ahead:
            unused = Collector(lambda layer: "", 1)
            unused.start_run("")
            return unused
        if not self._unsaved and self._changed():  # all that is collected here is in that file
            with contextlib.suppress(CalibQuantError):  # of another model, or damaged: it stays as it is
                self._begin(self._loaded(self._identity))
                self._saved = time.monotonic()
        self._run = run
        seed = f" seed {run.seed}" if run else ""
        self._collector.start_run(f"{self.labels.get('prompts', '')}{seed}".strip())
        return self._collector

    def finish(self) -> None:
        assert self._collector is not None
        if self.ahead:
            self.ahead -= 1
            return
        self._collector.finish_run()
        for name, value in {**_facts(self._run), **self.labels}.items():
            values = self._info.setdefault(name, [])
            if value not in values:
                values.append(value)
        self._unsaved = True
        if not self._patient or time.monotonic() - self._saved >= SAVING_SHARE * self._cost:
            self.save()
        if self.report:
            rows = f"{self._collector.nbytes() / 1e6:.0f} MB of rows"
            self.report(f"{counted(self.runs(), 'run')} in {self.path.name} ({rows})")

    def drop(self) -> None:
        if self._collector is not None and not self.ahead:
            self._collector.drop_run()

    def _begin(self, before: Calibration) -> None:
        self._before = before
        self._forget()
        # Seeded by what came before, so that a repeated run does not draw the same rows again.
        seed, (rows, memory) = 0 if self._patient else len(before.info.get("runs", [])), self._rows
        self._collector = Collector(_groups(self._architecture), rows, seed, memory)

    def _changed(self) -> bool:
        """Whether somebody else wrote the file since it was loaded or saved here."""
        return folders.stamp(self.path) not in (self._stamp, folders.MISSING)

    def _forget(self) -> None:
        self._collector: Collector | None = None
        self._info: dict[str, list[Any]] = {}
        self._unsaved = False
        self._saved, self._cost = 0.0, 0.0

    def _continued(self, identity: Mapping[str, Any], rows: tuple[int, int]) -> Calibration | None:
        """What to build on; None when the collector at hand goes on as it is."""
        deleted = self._saved and not self.path.exists()  # by the user, who wants to begin anew
        if self._collector is not None and not deleted:
            self._check(self._identity, identity)
            return None if rows == self._rows else self.current()
        return self._loaded(identity) if self.path.exists() else Calibration()

    def _loaded(self, identity: Mapping[str, Any]) -> Calibration:
        stamp, held = folders.stamp(self.path), calibration.load(self.path)
        self._check(held.info, identity)
        self._stamp = stamp
        return held

    def _check(self, held: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        if any(held.get(name) != identity.get(name) for name in IDENTITY):
            model = held.get("source_file") or f"a {held.get('architecture')} model"
            raise CalibQuantError(
                f"{self.path}: holds the calibration of another model ({model}): give another name, or switch reset on "
                "to replace it"
            )


def _facts(run: SamplingRun | None) -> dict[str, Any]:
    if run is None:
        return {}
    facts = {"seeds": run.seed, "steps": run.steps, "sampler": run.sampler, "cfg": run.cfg}
    return {**facts, "resolution": run.resolution, "patched_tensors": run.patched}


def _beside(path: Path) -> Path:
    """NAME_2, or the first number that is free."""
    name = path.name.removesuffix(folders.CALIBRATION_SUFFIX)
    names = (path.with_name(f"{name}_{number}{folders.CALIBRATION_SUFFIX}") for number in itertools.count(2))
    return next(free for free in names if not free.exists())


def _groups(architecture: Architecture) -> Callable[[str], str]:
    return lambda layer: architecture.describe(layer).shared_input


def summary(found: Calibration) -> str:
    """Layers, rows, runs, noise levels and how far the loudest input channel stands out: a few lines for a node."""
    rows = [len(sample.keys) for sample in found.rows.values()]
    held = f"up to {max(rows)} rows of {len(rows)} inputs" if rows else "no rows"
    runs = counted(len(found.info.get("runs", [])), "run")
    lines = [f"{len(found.layers)} layers · {held} · {runs} · {range_in_words(found)}"]
    ratios = {name: calibration.outlier_ratio(stats) for name, stats in found.layers.items()}
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name])
        middle = sorted(ratios.values())[len(ratios) // 2]
        lines.append(f"loudest/median channel: {ratios[worst]:.1f} in {worst}, {middle:.1f} in the median layer")
    return "\n".join(lines)
