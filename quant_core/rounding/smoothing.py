"""``pre_quant_scale``: divide loud input channels by a factor that the weights are multiplied by.

The loader multiplies a layer's input by ``pre_quant_scale`` (bfloat16 [in]) before it quantizes it; the stored weight
is W / pre_quant_scale, column by column. FP4 blocks of activations then lose less to their loudest channel. The factor
is E|x|**alpha / max|w|**(1 - alpha), as in SmoothQuant (Xiao et al., arXiv 2211.10438) and AWQ (Lin et al.,
arXiv 2306.00978).

Only NVFP4 and only newer cores know it: ComfyUI 0.29 ignores the tensor and would render noise. A LoRA added to such
a layer later is scaled by the factor too, so bake LoRAs first.
"""

from __future__ import annotations

import torch

FORMATS = ("nvfp4",)
ALPHAS = (0.0, 0.25, 0.5)  # 0: no smoothing; larger ones were always worse (facts/peers.md §3.3)
KEY = "pre_quant_scale"


def pre_quant_scale(weight: torch.Tensor, input_absmean: torch.Tensor, alpha: float) -> torch.Tensor:
    """bfloat16 [in] for a weight [out, in] and E|x| float32 [in]: the inverse of the factor, geometric mean 1."""
    if alpha == 0:
        return torch.ones_like(input_absmean, dtype=torch.bfloat16)
    tiny = 1e-8
    loud, peak = input_absmean.clamp(min=tiny), weight.float().abs().amax(0).clamp(min=tiny)
    factor = loud**alpha / peak ** (1 - alpha)
    return (factor.log().mean().exp() / factor).clamp(2.0**-16, 2.0**16).bfloat16()
