"""Sample files as a loader runs them on one card of `--gpu`: what that card has no kernels for is unpacked to 16 bit.

Arguments are those of nodes/sample_digits.py with --native, preceded by the card.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nodes")]

import sample_digits  # noqa: E402

from quant_core.planning import targets  # noqa: E402
from quant_core.rounding.layerplan import LayerPlan  # noqa: E402

ASKED = {"nvfp4": "nvfp4", "mxfp8": "mxfp8", "fp8": "float8_e4m3fn"}  # by ComfyUI's supports_…_compute -> our name


def main() -> int:
    gpu, every = sys.argv[1], sample_digits.emulate_native

    def emulate() -> None:
        every()
        management = importlib.import_module("comfy.model_management")
        for name, fmt in ASKED.items():
            native = targets.speed(LayerPlan(fmt, ""), gpu) == targets.NATIVE
            setattr(management, f"supports_{name}_compute", lambda *_, native=native, **__: native)

    sample_digits.emulate_native = emulate
    return sample_digits.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
