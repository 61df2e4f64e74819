"""``calibquant quantize`` of several files: one task of a Ray cluster each."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CalibQuantError, OptionError
from . import decision
from .bar import Bar

if TYPE_CHECKING:
    from ..reports.report import Report

One = Callable[[argparse.Namespace], "Report"]
PATHS = ("file", "output", "plan", "calibration")
ENDING = re.compile(r"\.safetensors(\.index\.json)?$|\.gguf$")


def run(args: argparse.Namespace, one: One) -> None:
    """A table of all at the end; CalibQuantError when one of them failed."""
    from ..jobs import Cluster
    from ..planning import targets

    if args.table:
        raise OptionError("--table keeps what was measured of one file: leave it out for several")
    if decision.budget_of(args):  # for the card of this machine, not of whichever has the task
        args.gpu = args.gpu or targets.this_gpu()
    jobs, names = _jobs(args), [str(file) for file in args.file]
    done: dict[int, Report | CalibQuantError] = {}
    with Cluster(args.ray) as cluster, Bar("quantize", "file") as bar:
        tasks = [(one, job) for job in jobs]
        for place, found in cluster.each(_task, tasks, names, args.device, _memory(jobs)):
            end, said = (found, "") if isinstance(found, CalibQuantError) else found
            for line in said.splitlines():
                bar.say(f"{names[place]}: {line}")
            done[place] = end
            bar(len(done), len(names), names[place])
    print(_as_json(names, done) if args.json else _as_text(names, done))
    failed = [names[place] for place, end in sorted(done.items()) if isinstance(end, CalibQuantError)]
    if failed:
        raise CalibQuantError(
            f"{failed[0]}: {len(failed)} of {len(names)} files failed: mend what the table says, then give these again"
        )


def _jobs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options of each file's own job, with paths that hold on every machine."""
    from ..planning import plan

    if not args.output.is_dir():
        raise CalibQuantError(f"{args.output}: no such folder, which several files need for -o: make it first")
    ending = ".split.safetensors" if args.split or (args.plan and plan.load(args.plan).ranks()) else ".safetensors"
    jobs: dict[Path, argparse.Namespace] = {}
    for file in args.file:
        output = args.output / (ENDING.sub("", file.resolve().name) + ending)
        if output in jobs:
            raise OptionError(f"{jobs[output].file} and {file} would both become {output}: give them one by one")
        jobs[output] = argparse.Namespace(**{**vars(args), "file": file, "output": output})
    for job in jobs.values():
        for name in PATHS:
            if getattr(job, name) is not None:
                setattr(job, name, Path(os.path.abspath(getattr(job, name))))
    return list(jobs.values())


def _memory(jobs: list[argparse.Namespace]) -> int:
    """Bytes that the file with the largest layers needs; those that cannot be opened will say so as tasks."""
    from ..jobs.remote import memory
    from ..models.modelfile import ModelFile

    most = 0
    for job in jobs:
        with suppress(CalibQuantError), ModelFile(job.file, job.architecture, job.parts, job.allow_lossy) as file:
            most = max(most, memory([file.shape(layer) for layer in file.layers], job.calibration is not None))
    return most


def _task(task: tuple[One, argparse.Namespace]) -> tuple[Report, str]:
    """On a worker: the report, and the warnings."""
    one, args = task
    with redirect_stderr(StringIO()) as said:
        report = one(args)
    return report, said.getvalue()


def _as_text(names: list[str], done: dict[int, Report | CalibQuantError]) -> str:
    from ..files.text import columns

    lines = [["file", "seconds", "result"]]
    for place, end in sorted(done.items()):
        if isinstance(end, CalibQuantError):
            lines.append([names[place], "", f"failed: {end}"])
        else:
            lines.append([names[place], f"{end.seconds:.1f}", f"{end.output}: {end.summary().splitlines()[0]}"])
    return columns(lines)


def _as_json(names: list[str], done: dict[int, Report | CalibQuantError]) -> str:
    facts = [
        {"source": names[place], "error": str(end)} if isinstance(end, CalibQuantError) else json.loads(end.to_json())
        for place, end in sorted(done.items())
    ]
    return json.dumps(facts, indent=1)
