"""Layers, or whole jobs, on the machines of a Ray cluster (an optional extra).

Ray starts a task where a CPU (or GPU) and memory are free, and starts it again when its worker is killed. Models are
opened by path: every machine must see them under one name. A task is the layers that share an input, so that its
sampled rows travel once and what GPTQ makes of them, up to ten times as large, is made where it is used.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from .. import __version__
from ..errors import CalibQuantError
from ..evidence.calibration import Calibration, Rows
from ..files.text import counted
from ..formats import FileTensors
from ..models.folding import Merge
from ..models.source import Source
from ..planning.plan import Plan
from ..reports.report import LayerReport
from ..rounding.choice import Rounder
from ..rounding.layerplan import LayerPlan
from ..rounding.pack import pick_device
from .layer import Made, bias_key, rounded

if TYPE_CHECKING:
    from typing_extensions import Self

Job = TypeVar("Job")
UNIT = 1 << 27  # weights that a task rounds at most, if it has more than one layer
AHEAD = 2  # tasks for each that the cluster can run at once: rounded, but not yet written, or waiting
ANSWER = 10.0  # seconds for a cluster to take a connection
CANCELLING = 20.0  # seconds for tasks to clean up
INSTALL = "needs the package ray: pip install 'calibquant[ray]'"


class Cluster:
    """A Ray cluster at ``address``: auto, local (this machine alone) or HOST:PORT. Use as a context manager.

    A program that is connected already stays so, whatever the address.
    """

    def __init__(self, address: str) -> None:
        self._address, self._own = address, False

    def __enter__(self) -> Self:
        try:
            import ray
        except ImportError as e:
            raise CalibQuantError(f"--ray {INSTALL}") from e
        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            self._connect()
        self._task = ray.remote(_task)
        self._has = ray.cluster_resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._memory = int(max((node.get("memory", 0) for node in nodes), default=0))
        self._cpus = int(max((node.get("CPU", 1) for node in nodes), default=1))
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            self._ray.shutdown()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for it to report home
        host, _, port = self._address.rpartition(":")
        here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if self._address == "local" else {}
        ours = signal.getsignal(signal.SIGTERM)
        try:
            if host and port.isdecimal() and "/" not in host:  # Ray itself would try for many minutes
                socket.create_connection((host, int(port)), timeout=ANSWER).close()
            # what workers print would be mixed with the results on stdout
            self._ray.init(self._address, log_to_driver=False, logging_level="ERROR", **here)
        except (OSError, OverflowError, RuntimeError, ValueError) as e:
            raise CalibQuantError(
                f"--ray {self._address}: no Ray cluster answers there ({_first_line(e)}): start one with "
                "`ray start --head`, give its token as Ray wants it (RAY_AUTH_MODE), or use --ray local"
            ) from e
        finally:
            if threading.current_thread() is threading.main_thread():  # Ray puts its own in place
                signal.signal(signal.SIGTERM, ours)

    @property
    def slots(self) -> int:
        """How many tasks of one CPU (or GPU) it runs at once."""
        return max(1, int(self._has.get("GPU", 0) or self._has.get("CPU", 1)))

    def device(self, name: str) -> torch.device:
        """As ``pick_device``, for its workers: all of one kind, as a GPU may round otherwise in a last bit."""
        there = self._has.get("GPU", 0) > 0
        if name == "cuda" and not there:
            raise CalibQuantError(f"--device cuda: the Ray cluster {self._address} has no GPU: use --device cpu")
        return torch.device("cuda" if there and name != "cpu" else "cpu")

    def start(self, function: Callable[..., Any], *arguments: Any, device: str, memory: int, cpus: int = 1) -> Any:
        """Begin a task; ``memory``: bytes that it will need at most. Its ``result`` is the function's."""
        cpus, memory = min(cpus, self._cpus), min(memory, self._memory)  # more would be waited for for ever
        how = {"num_cpus": cpus, "num_gpus": int(self.device(device).type == "cuda"), "memory": memory}
        return self._task.options(**how).remote(_versions(), cpus, function, *arguments)

    def result(self, task: Any, where: str) -> Any:
        """Waits; raises a task's CalibQuantError, or one that begins with ``where`` for what Ray could not mend."""
        from ray.exceptions import RayError, RayTaskError

        try:
            found = self._ray.get(task)
        except RayTaskError as e:
            raise CalibQuantError(f"{where}: failed on a Ray worker: {e.cause!r}") from e
        except RayError as e:
            raise CalibQuantError(
                f"{where}: Ray gave up: {_first_line(e)}: see that every machine has calibquant, and memory to spare"
            ) from e
        if isinstance(found, CalibQuantError):
            raise found
        return found

    def cancel(self, tasks: Sequence[Any], seconds: float) -> None:
        """Tell tasks to stop, and wait until they have cleaned up, but no longer than this."""
        for task in tasks:
            self._ray.cancel(task)
        if tasks:
            self._ray.wait(list(tasks), num_returns=len(tasks), timeout=seconds)

    def each(
        self, function: Callable[[Job], Any], jobs: Sequence[Job], names: Sequence[str], device: str, memory: int
    ) -> Iterator[tuple[int, Any]]:
        """Every job's place and what the function makes of it, or the CalibQuantError, as they are done."""
        cpus = max(1, int(self._has.get("CPU", 1)) // len(jobs))
        doing = {
            self.start(function, job, device=device, memory=memory, cpus=cpus): place for place, job in enumerate(jobs)
        }
        try:
            while doing:
                (done, *_), _ = self._ray.wait(list(doing))
                place = doing.pop(done)
                try:
                    yield place, self.result(done, names[place])
                except CalibQuantError as e:
                    yield place, e
        finally:
            self.cancel(list(doing), CANCELLING)


@dataclass(frozen=True)
class _Unit:
    """Layers to be rounded by one task, and all that it needs to know."""

    path: str
    fingerprint: str
    architecture: str
    kinds: tuple[str, ...]
    layers: dict[str, LayerPlan]
    calibration: Calibration | None  # of these layers alone
    rounding: str
    merge: Merge
    device: str


class Layers:
    """The layers of one file, rounded by a cluster. ``made``: in the file's order, or many are held in memory.

    skip: layers that need not be rounded.
    """

    def __init__(
        self,
        cluster: Cluster,
        source: Source,
        plan: Plan,
        calibration: Calibration | None,
        rounding: str,
        device: torch.device,
        merge: Merge,
        skip: Callable[[str], object],
    ) -> None:
        self._cluster, self._source, self._calibration, self._skip = cluster, source, calibration, skip
        path = os.path.abspath(source.path)
        known = path, source.checkpoint.fingerprint(), source.architecture.name, source.kinds
        self._unit = _Unit(*known, plan.quantized(), calibration, rounding, merge, device.type)
        self._waiting = deque(units(source, plan, calibration))
        self._doing: deque[tuple[Any, str]] = deque()
        self._made: dict[str, Made] = {}

    def made(self, layer: str) -> Made:
        """Waits; CalibQuantError names the layer, or the first of those of its task."""
        while layer not in self._made:
            while self._waiting and len(self._doing) < AHEAD * self._cluster.slots:
                self._start([name for name in self._waiting.popleft() if not self._skip(name)])
            self._made |= _unpacked(self._cluster.result(*self._doing[0]))
            self._doing.popleft()
        return self._made.pop(layer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.cancel([task for task, _ in self._doing], 0)  # they hold nothing

    def _start(self, layers: list[str]) -> None:
        if not layers:
            return
        whole, shapes = self._unit, [self._source.shape(layer) for layer in layers]
        keys = [key for layer in layers for key in (f"{layer}.weight", bias_key(layer)) if key in whole.merge]
        unit = replace(
            whole,
            layers={layer: whole.layers[layer] for layer in layers},
            calibration=self._calibration and _part(self._calibration, [self._source.short(name) for name in layers]),
            merge={key: whole.merge[key] for key in keys},
        )
        need = memory(shapes, self._calibration is not None) + 2 * sum(map(_count, shapes))
        more = f" and {counted(len(layers) - 1, 'layer')} with its input" * (len(layers) > 1)
        where = f"{self._source.path}: layer {layers[0]}{more}"
        self._doing.append((self._cluster.start(_round, unit, device=whole.device, memory=need), where))


def units(source: Source, plan: Plan, calibration: Calibration | None) -> list[list[str]]:
    """The layers to be rounded: together those that share an input, up to UNIT weights, in the order of the first."""
    found: list[list[str]] = []
    last: dict[str, tuple[list[str], int]] = {}
    for layer in plan.quantized():
        seen = calibration.layers.get(source.short(layer)) if calibration else None
        count = _count(source.shape(layer))
        unit, weights = last.get(seen.group, ([], 0)) if seen else ([], 0)
        if not unit or weights + count > UNIT:
            unit, weights = [], 0
            found.append(unit)
        unit.append(layer)
        if seen:
            last[seen.group] = unit, weights + count
    return found


def memory(shapes: Sequence[tuple[int, ...]], calibrated: bool) -> int:
    """Bytes that rounding layers of these shapes one by one takes at most (README): torch itself, the widest layer,
    and what GPTQ needs of its inputs.
    """
    widest = max((shape[1] for shape in shapes if len(shape) == 2), default=0)
    return 300_000_000 + 12 * max(map(_count, shapes), default=0) + 16 * widest**2 * calibrated


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _part(whole: Calibration, layers: list[str]) -> Calibration:
    """What is known of some layers."""
    seen = {name: whole.layers[name] for name in layers if name in whole.layers}
    samples = {name: whole.rows[name] for name in {stats.group for stats in seen.values()} if name in whole.rows}
    here = {name: Rows(sample.rows, sample.keys, sample.runs) for name, sample in samples.items()}  # not in a file
    return Calibration(seen, here, whole.info)


# --- what runs on the workers


def _task(versions: tuple[str, ...], cpus: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """A problem that the user can act on is a result: as an exception Ray would wrap it into its own."""
    if versions != _versions():
        return CalibQuantError(
            f"a Ray worker on {platform.node()} has calibquant, torch, comfy-kitchen {' '.join(_versions())}, not "
            f"{' '.join(versions)} as here: install the same on every machine"
        )
    torch.set_num_threads(cpus)
    try:
        return function(*arguments)
    except CalibQuantError as e:
        return e


def _round(unit: _Unit) -> _Sent:
    with ExitStack() as files:
        source = files.enter_context(Source(unit.path, unit.architecture, unit.kinds, lossy=True))
        if source.checkpoint.fingerprint() != unit.fingerprint:
            raise CalibQuantError(
                f"{unit.path}: is another file on the machine {platform.node()}: use storage that all machines share"
            )
        rounder = Rounder(pick_device(unit.device), unit.calibration, unit.rounding, source.short)
        sent: _Sent = {}
        for layer, entry in unit.layers.items():
            made = rounded(source, layer, entry, source.load(layer), rounder, unit.merge)
            sent[layer] = _bytes_of(made.tensors), made.report, _bytes_of(made.branch)
        return sent


# float8 tensors cannot be pickled (torch 2.13), and Ray moves arrays without a copy
_Bytes = dict[str, tuple[np.ndarray, torch.dtype, torch.Size]]
_Sent = dict[str, tuple[_Bytes, LayerReport, _Bytes]]


def _bytes_of(tensors: FileTensors) -> _Bytes:
    flat = {key: tensor.cpu().contiguous().view(-1).view(torch.uint8) for key, tensor in tensors.items()}
    return {key: (flat[key].numpy(), tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def _tensors_of(sent: _Bytes) -> FileTensors:
    return {key: torch.from_numpy(raw.copy()).view(dtype).view(shape) for key, (raw, dtype, shape) in sent.items()}


def _unpacked(sent: _Sent) -> dict[str, Made]:
    return {
        layer: Made(_tensors_of(tensors), report, _tensors_of(branch))
        for layer, (tensors, report, branch) in sent.items()
    }


def _versions() -> tuple[str, ...]:
    return __version__, torch.__version__, version("comfy-kitchen")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
