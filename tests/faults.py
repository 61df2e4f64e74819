"""A process of its own for ``test_resume``: quantizes a model again and again and has each run die somewhere else.

python faults.py FOLDER (kill | fail | signal) [split]

A run is killed (kill) or fails (fail) at its n-th write, fsync, rename or removal, half of a write being done, for all
n (of a split, which takes longer, each third); or gets a SIGKILL after n / 20 of the time it takes (signal). A second
run follows. For each n a line of JSON tells what the first left and what the second did. Runs are forks of a process
that never started a thread, so that each takes milliseconds.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import models
import torch

from quant_core import jobs
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.files import disk, journal
from quant_core.models.source import Source
from quant_core.planning import recipes, splitting
from quant_core.rounding.choice import Rounder

KILLED, FAILED = 9, 3
LAYERS = [f"layers.0.{name}" for name in ("attention.qkv", "feed_forward.w1", "feed_forward.w3")]


class Fault:
    """Dies or fails at the n-th call that touches the disk."""

    def __init__(self, how: str, at: int) -> None:
        self.how, self.left = how, at
        for name in ("fsync", "link", "replace", "rename", "unlink"):
            setattr(os, name, self._before(getattr(os, name)))
        os.fdopen = lambda fd, mode: self.file(fd, mode)  # type: ignore[assignment, misc]
        journal.open = lambda path, mode, buffering: self.file(path, mode)  # type: ignore[attr-defined]
        assert disk.os is os

    def file(self, where: Any, mode: str) -> io.FileIO:
        fault = self

        class Torn(io.FileIO):
            def write(self, data: Any) -> int:
                half = memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2]
                fault.tick(lambda: super(Torn, self).write(half))
                return super().write(data)

        return Torn(where, mode.replace("b", ""))

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return call(*args, **kwargs)

        return faulty

    def tick(self, half: Callable[[], object] = lambda: None) -> None:
        self.left -= 1
        if self.left == 0:
            half()
            if self.how == "kill":
                os._exit(KILLED)
            raise OSError(errno.ENOSPC, "No space left on device")


def calibration() -> Calibration:
    collector = Collector(lambda layer: "", 256)
    for run in range(3):
        collector.start_run(f"run {run}")
        for layer in LAYERS:
            x = models.correlated(64, 64, run)
            collector.add(layer, x, x)
        collector.finish_run()
    return collector.result()


class Runs:
    def __init__(self, folder: Path, split: bool) -> None:
        without = ("refiner", "t_embedder", "adaLN", "w2", "out")
        tensors = {n: t for n, t in models.zimage(layers=1).items() if not any(word in n for word in without)}
        self.seen = calibration()
        self.source = Source(models.save(folder / "m.safetensors", tensors), "zimage")
        self.plan = recipes.make_plan(self.source, "nvfp4")
        if split:
            self.plan = splitting.split(self.source, self.plan, self.seen, "4")
        self.folder, self.told = folder / "out", folder / "told.json"
        self.folder.mkdir()
        self.target = self.folder / ("m.split.safetensors" if split else "m.safetensors")

    def fork(self, fault: Callable[[], object] = lambda: None, seconds: float | None = None) -> int:
        """Quantize in a child; its exit code. seconds: until it is killed."""
        self.told.write_text("{}")
        child = os.fork()
        if not child:
            try:
                self._quantize(fault)
                os._exit(0)
            except jobs.quantization.CalibQuantError:
                os._exit(FAILED)
            finally:
                os._exit(1)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, KILLED)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return KILLED if code == -KILLED else code

    def _quantize(self, fault: Callable[[], object]) -> None:
        rounded, round_one = [], Rounder.round

        def counted(rounder: Rounder, layer: str, *args: Any) -> Any:
            rounded.append(layer)
            return round_one(rounder, layer, *args)

        Rounder.round = counted  # type: ignore[method-assign]
        fault()
        how = "auto" if self.plan.ranks() else "search"
        report = jobs.quantize(self.source, self.plan, self.target, calibration=self.seen, rounding=how, overwrite=True)
        self.told.write_text(json.dumps({"rounded": len(rounded), "report": asdict(report) | {"seconds": 0}}))

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def main(folder: str, how: str, split: str = "") -> None:
    torch.set_num_threads(1)
    runs = Runs(Path(folder), bool(split))
    began = time.monotonic()
    assert runs.fork() == 0
    took, wanted, told = time.monotonic() - began, runs.files(), json.loads(runs.told.read_text())
    code, n = KILLED, 0
    while code != 0 and n < (20 if how == "signal" else 10_000):
        n += 3 if split else 1
        runs.clear()
        if how == "signal":
            code = runs.fork(seconds=took * n / 20) or KILLED
        else:
            code = runs.fork(lambda n=n: Fault(how, n))  # type: ignore[misc]
        left = runs.files()
        finals = {name: data for name, data in left.items() if name in wanted}
        again = runs.fork()
        now = json.loads(runs.told.read_text())
        line = {
            "n": n,
            "code": code,
            "left": sorted(left),
            "whole": all(data == wanted[name] for name, data in finals.items()),
            "again": again,
            "same": runs.files() == wanted and now.get("report") == told["report"],
            "rounded": now.get("rounded"),
        }
        print(json.dumps(line | {"of": told["rounded"]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
