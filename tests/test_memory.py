"""Peak memory is that of the largest tensor, however many layers a file has (figures: benchmarks/memory.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

WIDTH, FEW, MANY = 1024, 2, 26
ADDED = 2 * WIDTH * WIDTH * (MANY - FEW)  # bytes, 50 MB in bfloat16
# The peak of this program alone; Linux counts what a parent held in ru_maxrss.
SCRIPT = """
import sys
from quant_core.cli import main
assert main(sys.argv[1:]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak(*words: str | Path) -> int:
    """Bytes."""
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    environment = {**os.environ, **models.FREED_AT_ONCE}
    done = subprocess.run(
        command, cwd=models.ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    return 1024 * int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("job", ["probe", "quantize"])
def test_peak_memory_does_not_grow_with_the_number_of_layers(job: str, tmp_path: Path) -> None:
    more = {
        "probe": ["--device", "cpu"],
        "quantize": ["--recipe", "mxfp8", "--verify", "--device", "cpu", "-o", tmp_path / "out.safetensors"],
    }[job]
    peaks = []
    for layers in (FEW, MANY):
        tensors = {f"blocks.{i}.fc.weight": torch.randn(WIDTH, WIDTH).bfloat16() for i in range(layers)}
        path = models.save(tmp_path / f"{layers}.safetensors", tensors)
        peaks.append(peak(job, path, *more, *(["--overwrite"] if job == "quantize" else [])))
    assert peaks[1] - peaks[0] < ADDED / 2, peaks
