"""Where things are: a ComfyUI on this machine and the files that ship with the pack. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent  # not resolve(): a link in custom_nodes must still see its ComfyUI

BROUGHT = ROOT / ".comfyui"  # where bootstrap.py puts the ComfyUI that it brings


def find_comfyui() -> Path | None:
    """Folder of the ComfyUI to work with: COMFYUI_PATH, else the one this checkout sits in, else ~/comfy/ComfyUI, else
    the one that bootstrap.py brought.

    Raises FileNotFoundError when COMFYUI_PATH is set but holds no main.py: a typo must not pass as "no ComfyUI".
    """
    if named := _named("COMFYUI_PATH"):
        return named
    candidates = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    candidates += [Path.home() / "comfy" / "ComfyUI", BROUGHT]
    return next((path for path in candidates if (path / "main.py").is_file()), None)


def find_newer_comfyui() -> Path | None:
    """Folder of a second, newer ComfyUI for the tests: COMFYUI_PATH_NEW, else beside the first with "-next" added.

    Raises FileNotFoundError as find_comfyui() does.
    """
    if named := _named("COMFYUI_PATH_NEW"):
        return named
    first = find_comfyui()
    beside = first.with_name(first.name + "-next") if first else None
    return beside if beside and (beside / "main.py").is_file() else None


def _named(variable: str) -> Path | None:
    named = os.environ.get(variable)
    if not named:
        return None
    path = Path(named).expanduser().absolute()
    if not (path / "main.py").is_file():
        raise FileNotFoundError(f"{variable}={named} holds no main.py: set it to the ComfyUI folder or unset it")
    return path


def asset(relative: str) -> Path:
    """A file of the repository that ships with the package: beside ``quant_core``, or inside it in a wheel."""
    beside = ROOT / relative
    return beside if beside.exists() else Path(__file__).absolute().parent / "_assets" / relative
