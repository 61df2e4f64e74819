"""Sample the 16-bit demo model with FP4 activations: what is left of W4A4's error when the weights are exact.

Arguments are those of nodes/sample_digits.py, preceded by a calibration file that gives the activation scales.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "nodes")]

import sample_digits  # noqa: E402

from quant_core.evidence import calibration  # noqa: E402
from quant_core.formats import FORMATS  # noqa: E402


def main() -> int:
    seen = calibration.load(sys.argv[1])
    load, nvfp4 = sample_digits._load, FORMATS["nvfp4"]

    def load_with_fp4_inputs(file: Path) -> Any:
        model = load(file)
        for name, layer in model.model.diffusion_model.named_modules():
            if name.startswith("blocks.") and name in seen.layers:
                scale = seen.layers[name].input_amax.max() / 2688

                def quantized(
                    _: object, args: tuple[torch.Tensor, ...], scale: torch.Tensor = scale
                ) -> tuple[Any, ...]:
                    x = args[0].reshape(-1, args[0].shape[-1])
                    fed = nvfp4.decode(nvfp4.kernel(x.float(), scale), tuple(x.shape))
                    return fed.to(x.dtype).view(args[0].shape), *args[1:]

                layer.register_forward_pre_hook(quantized)
        return model

    sample_digits._load = load_with_fp4_inputs
    return sample_digits.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
