"""``calibquant queue``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CalibQuantError, OptionError
from .bar import Bar
from .options import path, positive

HELP = "run a workflow on one or several ComfyUI servers, once for each combination of values"
LOCAL = "http://127.0.0.1:8188"


def options(c: argparse.ArgumentParser) -> None:
    c.add_argument("workflow", type=path, metavar="WORKFLOW.json", help="in API format: File, Export (API)")
    c.add_argument("--server", nargs="+", action="extend", metavar="URL", help=f"where ComfyUI runs (default: {LOCAL})")
    c.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NODE.INPUT=A,B",
        help="one job for each value; NODE is a number, title or class; a comma in a value is \\,; may be repeated",
    )  # fmt: skip
    c.add_argument("--in-flight", type=positive, default=1, metavar="N", help="jobs at a server at a time (default: 1)")
    c.add_argument("--journal", type=path, metavar="P", help="what is done (default: beside it, WORKFLOW.queue.jsonl)")
    c.add_argument(
        "--merge", type=path, metavar="OUT.calibration.safetensors",
        help="deal the samples of the workflow's Calibrate node out to the servers; one calibration file of all",
    )  # fmt: skip
    c.add_argument("--parts", type=positive, metavar="N", help="jobs that --merge makes (default: one a server)")
    c.add_argument("--overwrite", action="store_true", help="replace an existing output of --merge")
    c.add_argument("--json", action="store_true", help="print the table as one JSON document")


def run(args: argparse.Namespace) -> None:
    from ..files.disk import check_output
    from ..queue import server, table, workflow
    from ..queue.journal import DONE, FAILED, Journal
    from ..queue.run import Limits, run

    server.load_aiohttp()
    urls = [server.address(text) for text in args.server or [LOCAL]]
    if len(set(urls)) < len(urls):
        raise OptionError("--server: has an address twice")
    if args.merge is None and (args.parts or args.overwrite):
        raise OptionError("--parts and --overwrite are for --merge OUT.calibration.safetensors")
    jobs = workflow.grid(workflow.load(args.workflow), args.set)
    if args.merge is not None:
        if len(jobs) > 1:
            raise OptionError("--merge makes one file: give each --set one value")
        if args.merge.suffix != ".safetensors":
            raise OptionError(f"--merge {args.merge}: name it *.calibration.safetensors")
        check_output(args.merge, args.overwrite)
        jobs = workflow.deal(jobs[0], args.parts or len(urls))
    with Journal(args.journal or _beside(args.workflow)) as journal, Bar("queue", "job") as bar:
        rows = run(jobs, urls, journal, Limits(args.in_flight), bar, bar.say)
    print(table.as_json(rows) if args.json else table.as_text(rows) + "\n", end="")
    left = [row for row in rows if row.state != DONE]
    if left:
        failed = sum(row.state == FAILED for row in left)
        raise CalibQuantError(
            f"{args.workflow}: of {len(rows)} jobs {failed} failed and {len(left) - failed} did not run: mend what the "
            "table says, then give the same command: it runs these only"
        )
    if args.merge is not None:
        _merge(rows, args)


def _merge(rows: list, args: argparse.Namespace) -> None:
    from ..queue.merging import merge

    made = merge(rows, args.merge, args.overwrite)
    if not args.json:
        print(f"{args.merge}: {len(made.layers)} layers, {len(made.info.get('runs', []))} runs")


def _beside(workflow: Path) -> Path:
    return workflow.with_name(workflow.name.removesuffix(".json").removesuffix(".api") + ".queue.jsonl")
