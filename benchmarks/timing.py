"""Commands as processes of their own: wall seconds and peak memory, and pairs of them as a table."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
Pair = tuple[tuple[float, float], tuple[float, float]]


def measure(command: list[str], python_path: Path = ROOT) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a command; exits when it fails. POSIX only."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(python_path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def table(what: str, names: tuple[str, str], pairs: list[Pair]) -> str:
    """Markdown: min / median / max seconds and worst memory of both, and the ratio of each pair."""
    lines = [f"{what}, n = {len(pairs)}, {os.cpu_count()} cores, {platform.machine()}, no GPU used", ""]
    lines += ["| | seconds min / median / max | peak GB (worst) |", "|---|---|---|"]
    for i, name in enumerate(names):
        seconds = [pair[i][0] for pair in pairs]
        lines.append(f"| {name} | {spread(seconds, 1)} | {max(pair[i][1] for pair in pairs):.2f} |")
    lines.append(f"| ratio | {spread([a[0] / b[0] for a, b in pairs], 2)} | |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    return " / ".join(f"{f(values):.{digits}f}" for f in (min, median, max))
