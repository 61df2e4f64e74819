"""Makes ``import torchvision`` and ``import torchaudio`` work where only their compiled halves cannot load.

The package index offers CUDA builds of both. Beside a CPU build of torch their libraries find no CUDA runtime, and
then torchvision fails on ``operator torchvision::nms does not exist`` and torchaudio on its own library. ComfyUI
imports both but calls none of that compiled code for diffusion models, so declaring it absent is enough. On a machine
where both import, this does nothing.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType

# Schemas of the operators that torchvision's Python code registers fake kernels for at import.
_VISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_repaired: list[str] = []
_kept_alive: list[object] = []  # a torch Library takes its schemas with it when it is collected


def install() -> list[str]:
    """Import torchvision and torchaudio, repairing those that do not import; the names repaired in this process."""
    for name, repair in _REPAIRS.items():
        if name not in _repaired and not _imports(name):
            _repair(name, repair)
            _repaired.append(name)
    return list(_repaired)


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
        return True
    except ModuleNotFoundError as error:
        if error.name == name:
            raise  # not installed at all: nothing to repair
        return False
    except (ImportError, OSError, RuntimeError):
        return False


def _repair(name: str, repair: Callable[[], None]) -> None:
    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[module]
    repair()
    importlib.import_module(name)  # what still fails now is a real defect: let it be seen


def _declare_vision_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _VISION_SCHEMAS:
        library.define(schema)
    _kept_alive.append(library)


def _leave_out_audio_library() -> None:
    # The same names, with the same values, as torchaudio sets itself when it was built without its library.
    extension = ModuleType("torchaudio._extension")
    extension._IS_TORCHAUDIO_EXT_AVAILABLE = False
    extension._IS_ALIGN_AVAILABLE = False
    extension.fail_if_no_align = lambda function: function
    sys.modules[extension.__name__] = extension


_REPAIRS = {"torchvision": _declare_vision_operators, "torchaudio": _leave_out_audio_library}
