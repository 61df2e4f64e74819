"""An API-format workflow, and the jobs that a grid of values or a dealt-out calibration makes of it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from ..errors import CalibQuantError, OptionError
from ..files.text import parse_json, read_text

Graph = dict[str, dict[str, Any]]

CALIBRATE, SAVE_CALIBRATION, MONITOR = "CalibQuantCalibrate", "CalibQuantSaveCalibration", "CalibQuantMonitor"
MAX_JOBS = 10_000  # as many as ComfyUI keeps in its history
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True)
class Job:
    """One graph to run; settings: what was set in it, by the names that the user gave."""

    settings: dict[str, Any]
    graph: Graph

    @cached_property
    def key(self) -> str:
        """Names the job in the journal: equal graphs are one job."""
        return hashlib.sha256(json.dumps(self.graph, sort_keys=True).encode()).hexdigest()[:16]

    def title(self, node: str) -> str:
        return _title(self.graph[node]) if node in self.graph else node


def load(path: Path) -> Graph:
    """Read and check an API-format workflow."""
    graph = parse_json(read_text(path), f"{path}: is no workflow", "export it from ComfyUI: File, Export (API)")
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise CalibQuantError(f"{path}: is a workflow for the screen: export it by File, Export (API)")
    if not isinstance(graph, dict) or not graph or not all(map(_is_node, graph.values())):
        raise CalibQuantError(f"{path}: is no API-format workflow: export it from ComfyUI: File, Export (API)")
    return graph


def _is_node(node: Any) -> bool:
    return (
        isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
    )  # fmt: skip


def _title(node: dict[str, Any]) -> str:
    about = node.get("_meta")
    title = about.get("title") if isinstance(about, dict) else None
    return title if isinstance(title, str) else node["class_type"]


# --- a grid


def grid(graph: Graph, settings: Iterable[str]) -> list[Job]:
    """One job for each combination of ``NODE.INPUT=a,b`` settings; the last one changes fastest.

    NODE is an id, or a title or class that one node has. A comma within a value is written ``\\,``. Values become
    what the workflow holds there: number, switch or text. OptionError says what there is instead.
    """
    labels: dict[tuple[str, str], str] = {}
    values: dict[tuple[str, str], list[Any]] = {}
    for setting in settings:
        name, equals, words = setting.partition("=")
        if not equals:
            raise OptionError(f"--set {setting}: write NODE.INPUT=VALUE,VALUE")
        place = _place(graph, name)
        labels.setdefault(place, name)
        for value in (_typed(word, graph, place, name) for word in split_values(words)):
            if value in values.setdefault(place, []):
                raise OptionError(f"--set {name}: has {value} twice")
            values[place].append(value)
    if math.prod(map(len, values.values())) > MAX_JOBS:
        raise OptionError(f"--set makes {math.prod(map(len, values.values()))} jobs: {MAX_JOBS} are the most")
    return [_set(graph, labels, dict(zip(values, chosen, strict=True))) for chosen in product(*values.values())]


def split_values(words: str) -> list[str]:
    return [word.replace("\\,", ",") for word in re.split(r"(?<!\\),", words)]


def _place(graph: Graph, name: str) -> tuple[str, str]:
    """(node id, input) of NODE.INPUT; titles and inputs may have dots in them."""
    cuts = [match.start() for match in re.finditer(r"\.", name)]
    named = [(node, name[cut + 1 :]) for cut in cuts for node in _named(graph, name[:cut])]
    if not named:
        there = ", ".join(f"{key} ({_title(node)})" for key, node in graph.items())
        raise OptionError(f"--set {name}: no such node: the workflow has {there}")
    found = [(node, given) for node, given in named if given in graph[node]["inputs"]]
    if not found:
        node = named[0][0]
        there = ", ".join(graph[node]["inputs"]) or "none"
        raise OptionError(f"--set {name}: node {node} ({_title(graph[node])}) has no such input: it has {there}")
    if len(found) > 1:
        raise OptionError(f"--set {name}: means nodes {' and '.join(node for node, _ in found)}: give one's number")
    return found[0]


def _named(graph: Graph, name: str) -> list[str]:
    if name in graph:
        return [name]
    return [key for key, node in graph.items() if name in (_title(node), node["class_type"])]


def _typed(word: str, graph: Graph, place: tuple[str, str], name: str) -> Any:
    """The word as what the workflow holds there."""
    held = graph[place[0]]["inputs"][place[1]]
    if isinstance(held, str):
        return word
    if isinstance(held, bool):
        if word.lower() not in ("true", "false"):
            raise OptionError(f"--set {name}: is a switch, true or false, not {word!r}")
        return word.lower() == "true"
    if isinstance(held, int | float):
        if not _NUMBER.fullmatch(word) or not math.isfinite(float(word)):
            raise OptionError(f"--set {name}: is a number, not {word!r}")
        return int(word) if _WHOLE.fullmatch(word) else float(word)  # an export writes 1.0 as 1: no type is lost
    if isinstance(held, list) and len(held) == 2 and str(held[0]) in graph:
        origin = str(held[0])
        raise OptionError(f"--set {name}: is linked to node {origin} ({_title(graph[origin])}): set an input there")
    raise OptionError(f"--set {name}: holds no number, switch or text")


def _set(graph: Graph, labels: dict[tuple[str, str], str], chosen: dict[tuple[str, str], Any]) -> Job:
    graph = copy.deepcopy(graph)
    for (node, name), value in chosen.items():
        graph[node]["inputs"][name] = value
    return Job({labels[place]: value for place, value in chosen.items()}, graph)


# --- one calibration dealt out


def deal(job: Job, parts: int) -> list[Job]:
    """The samples of the workflow's Calibrate node in so many jobs; together they draw what the one would."""
    calibrate = [key for key, node in job.graph.items() if node["class_type"] == CALIBRATE]
    classes = [node["class_type"] for node in job.graph.values()]
    if len(calibrate) != 1 or classes.count(SAVE_CALIBRATION) != 1:
        raise OptionError("--merge needs a workflow with one Calibrate and one Save Calibration node")
    if MONITOR in classes:
        raise OptionError("--merge takes no Monitor Calibration: it adds up the runs of one server by itself")
    inputs = job.graph[calibrate[0]]["inputs"]
    samples, first = inputs.get("samples"), inputs.get("first", 0)
    if not isinstance(samples, int) or not isinstance(first, int) or samples < 1:
        raise OptionError("--merge: samples of the Calibrate node must be a number, not a link")
    parts = min(parts, samples)
    ends = [samples * part // parts for part in range(parts + 1)]
    return [_part(job, calibrate[0], first + a, b - a) for a, b in pairwise(ends)]


def _part(job: Job, node: str, first: int, samples: int) -> Job:
    graph = copy.deepcopy(job.graph)
    graph[node]["inputs"] |= {"first": first, "samples": samples}
    return Job({**job.settings, "samples": f"{first + 1}-{first + samples}"}, graph)
