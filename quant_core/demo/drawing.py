"""Who draws: a ComfyUI in a process of its own, or the built-in reference sampler."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import CalibQuantError
from ..locate import asset
from ..progress import Progress
from . import digits, sampler, wan

FIRST_SEED = 1000  # of what is judged, in both


def by_comfyui(
    comfyui: Path, files: Sequence[Path], npz: Path, seeds: int, progress: Progress = lambda *_: None
) -> list[torch.Tensor]:
    """Pictures float32 [seeds * 10, 32, 32] per file; the latents stay in ``npz``. CalibQuantError says what failed."""
    script = asset("nodes/sample_digits.py")
    command = [sys.executable, script, "--comfyui", comfyui, "--out", npz, "--seeds", seeds, *files]
    # One pipe for both, so that neither can fill up unread; a line of JSON tells that a file is done.
    with subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        last: deque[str] = deque(maxlen=1)
        last.extend(_counted(process.stdout or (), files, progress))
    if process.returncode:
        said = last.pop().strip() if last else "no message"
        raise CalibQuantError(f"{comfyui}: this ComfyUI could not draw ({said}): check its installation")
    with np.load(npz) as latents:
        return [digits.latent_to_image(latents[str(i)]) for i in range(len(files))]


def _counted(lines: Iterator[str], files: Sequence[Path], progress: Progress) -> Iterator[str]:
    """The lines that are no results; results count."""
    done = 0
    for line in lines:
        if line.startswith('{"file"'):
            done += 1
            progress(done, len(files), "ComfyUI draws")
        elif line.strip():
            yield line


def built_in(file: Path, seeds: int, gpu: str = wan.UNQUANTIZED_CARD) -> torch.Tensor:
    """Pictures float32 [seeds * 10, 32, 32], drawn here as a card's loader would."""
    model = wan.load(file, gpu)
    return digits.latent_to_image(sampler.sample(model, range(FIRST_SEED, FIRST_SEED + seeds)))


def version(comfyui: Path) -> str:
    """ "ComfyUI 0.29.0", from its own text."""
    file = comfyui / "comfyui_version.py"
    found = re.search(r'__version__ = "([\w.+-]{1,20})"', file.read_text("utf-8")) if file.is_file() else None
    return f"ComfyUI {found[1]}" if found else "ComfyUI"
