"""Commands as processes of their own: seconds and peak memory, and pairs of them as a table; other busy processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Cost(NamedTuple):
    """Of one process: wall seconds, peak resident GB, CPU seconds of all its threads."""

    wall: float
    peak: float
    cpu: float


Pair = tuple[Cost, Cost]


def measure(command: list[str], python_path: Path = ROOT) -> Cost:
    """What a command costs; exits when it fails. POSIX only."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(python_path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return Cost(time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9, usage.ru_utime + usage.ru_stime)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` other processes that each keep one core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def table(what: str, names: tuple[str, str], pairs: list[Pair]) -> str:
    """Markdown: min / median / max seconds and worst memory of both, and the ratio of each pair."""
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    lines = [f"{what}, n = {len(pairs)}, {os.cpu_count()} cores, {platform.machine()}, no GPU used, {load}", ""]
    lines += ["| | seconds min / median / max | CPU seconds | peak GB (worst) |", "|---|---|---|---|"]
    for i, name in enumerate(names):
        costs = [pair[i] for pair in pairs]
        wall, cpu = spread([c.wall for c in costs], 1), spread([c.cpu for c in costs], 1)
        lines.append(f"| {name} | {wall} | {cpu} | {max(c.peak for c in costs):.2f} |")
    wall, cpu = (spread([a[k] / b[k] for a, b in pairs], 2) for k in (0, 2))
    return "\n".join([*lines, f"| ratio | {wall} | {cpu} | |"])


def spread(values: list[float], digits: int) -> str:
    return " / ".join(f"{f(values):.{digits}f}" for f in (min, median, max))
