"""Text encoders in every format, loaded by ComfyUI's own CLIP loader: how far the conditioning moves.

    python benchmarks/encoders.py [ENCODER …] [--formats nvfp4,fp8]

Small models of ComfyUI's own classes with random weights and true key layouts (tests/small_encoders.py), BF16 files,
nearest rounding, on the CPU; the ComfyUI that the tests find (COMFYUI_PATH). Columns:

layers: how many the plan quantizes, of all matrices.
error: relative error of the conditioning against the 16-bit file's. Random weights: it compares formats, not encoders.
cosine: of each token's conditioning with the 16-bit file's, the least of all tokens, and the mean.
beside: relative error against the decoded weights in a file of FP32: what the loader does besides their rounding.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models  # noqa: E402
import torch  # noqa: E402
from comfy_env import import_comfy  # noqa: E402
from small_encoders import ENCODERS, encode, layout, load, random_state  # noqa: E402
from small_models import decoded, relative_error  # noqa: E402

from quant_core import jobs  # noqa: E402
from quant_core.models.source import Source  # noqa: E402
from quant_core.planning import recipes  # noqa: E402

FORMATS = ("nvfp4", "mxfp8", "fp8", "int8", "w4a8", "fp8-unscaled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    small = [name for name, encoder in ENCODERS.items() if encoder.narrow is not None]
    parser.add_argument("encoders", nargs="*", default=small)
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        import_comfy(Path(folder))
        logging.disable(logging.ERROR)
        from comfyui_version import __version__

        print(f"ComfyUI {__version__}\n\n| encoder | format | layers | error | cosine, least | mean | beside |")
        print("|---|---|---|---|---|---|---|")
        for name in options.encoders:
            if ENCODERS[name].known:
                encoder(name, options.formats.split(","), Path(folder))
            else:
                print(f"| {name} | | not in this ComfyUI | | | | |")


def encoder(name: str, formats: list[str], folder: Path) -> None:
    one = ENCODERS[name]
    path = models.save(folder / "m.safetensors", random_state(layout(one, narrow=True)[0], torch.bfloat16))
    wanted = encode(one, load(one, path))
    with Source(path) as source:
        for fmt in formats:
            plan = recipes.make_plan(source, fmt)
            out = folder / "q.safetensors"
            jobs.quantize(source, plan, out, device="cpu", overwrite=True)
            wide = {key: tensor.float() for key, tensor in decoded(source, out).items()}
            try:
                found = encode(one, load(one, out))
            except (KeyError, ValueError) as refused:  # this ComfyUI does not know the format
                print(f"| {name} | {fmt} | not loaded: {str(refused)[:60]} | | | | |")
                continue
            beside = relative_error(found, encode(one, load(one, models.save(folder / "d.safetensors", wide))))
            cosine = torch.cosine_similarity(found, wanted, dim=-1)
            figures = f"{relative_error(found, wanted):.1e} | {cosine.min():.5f} | {cosine.mean():.5f} | {beside:.0e}"
            print(f"| {name} | {fmt} | {len(plan.quantized())} of {len(source.layers)} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
