"""Peak memory of every job on a file with one tensor far larger than the others, and on one with many more layers.

    python benchmarks/memory.py [--folder DIR] [--jobs probe,gptq] [--small]

The files have an embedding table that no job quantizes, one large Linear, and 8 or 32 smaller ones with calibrated
inputs of their own. A job runs in a process of its own, by the command line, on the CPU. Columns: its peak above that
of the same job on a tiny file, in MB and in the large Linear's size as float32; and by how much the peak grows from 8
to 32 layers, in MB and per MB of layers that were added (16 bit). A job that held layers would grow by 1 and more.
gptq keeps Hessians for layers that share an input, 1 GiB at most (choice.FACTOR_BYTES), and the calibration with
all its rows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.timing import measure  # noqa: E402

LAYERS = (8, 32)
MB = 1e6


@dataclass(frozen=True)
class Sizes:
    table: tuple[int, int]
    linear: tuple[int, int]
    layer: tuple[int, int]
    rows: int


LARGE = Sizes((150_000, 1024), (16_384, 4096), (2048, 2048), 512)
SMALL = Sizes((40_000, 512), (4096, 2048), (1024, 1024), 128)
TINY = Sizes((64, 64), (64, 64), (64, 64), 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="for the files, some 3 GB")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--small", action="store_true", help="files of a tenth of the size")
    options = parser.parse_args()
    sizes = SMALL if options.small else LARGE
    unit = 4 * sizes.linear[0] * sizes.linear[1] / MB
    added = 2 * sizes.layer[0] * sizes.layer[1] * (LAYERS[1] - LAYERS[0]) / MB
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        for name, of, layers in (("tiny", TINY, 2), ("few", sizes, LAYERS[0]), ("many", sizes, LAYERS[1])):
            maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder / name, of, layers))
            maker.start()
            maker.join()
        print(f"the large Linear in float32: {unit:.0f} MB; layers added, in 16 bit: {added:.0f} MB\n")
        print(f"| job | peak, {LAYERS[0]} layers | of the Linear | {LAYERS[1]} layers | growth | per MB added |")
        print("|---|---|---|---|---|---|")
        for job in options.jobs.split(","):
            tiny, few, many = (peak(folder / name, job) for name in ("tiny", "few", "many"))
            growth = f"{many - few:.0f} MB | {(many - few) / added:.2f}"
            print(
                f"| {job} | {few - tiny:.0f} MB | {(few - tiny) / unit:.2f} × | {many - tiny:.0f} MB | {growth} |",
                flush=True,
            )


def make(folder: Path, sizes: Sizes, layers: int) -> None:
    """``m.safetensors`` and its calibration, written tensor by tensor.

    In a process of its own, where all is imported: Linux counts what a parent holds in the peak of its children.
    """
    import torch

    from quant_core.evidence import calibration
    from quant_core.evidence.collector import Collector
    from quant_core.files.checkpoint import TensorSpec, Writer
    from quant_core.files.header import Headers

    folder.mkdir()
    shapes = {"blocks.0.large.weight": sizes.linear, "embedding.weight": sizes.table}
    shapes |= {f"blocks.{i}.layer.weight": sizes.layer for i in range(layers)}
    generator = torch.Generator().manual_seed(0)
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    with Writer(folder / "m.safetensors", specs, {}) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, generator=generator).mul_(0.02).bfloat16())
    seen = Collector(lambda layer: "", sizes.rows)
    seen.start_run("random")
    for name, (out, width) in shapes.items():
        if name.startswith("blocks."):
            x = torch.randn(sizes.rows, width, generator=generator)
            seen.add(name.removesuffix(".weight"), x, torch.randn(sizes.rows, out, generator=generator))
    seen.finish_run()
    with Headers(folder / "m.safetensors") as file:
        identity = {"architecture": "generic", "source_fingerprint": file.fingerprint()}
    calibration.save(seen.result(identity), folder / "c.safetensors")


_MODEL = ["{0}/m.safetensors"]
_TO = ["-o", "{0}/{1}.safetensors", "--overwrite", "--device", "cpu"]
_SEEN = ["--calibration", "{0}/c.safetensors"]
JOBS = {
    "inspect": ["inspect", *_MODEL],
    "probe": ["probe", *_MODEL, "--device", "cpu"],
    "plan": ["plan", *_MODEL, "--bits", "6", *_SEEN, "-o", "{0}/plan.json"],
    "mxfp8": ["quantize", *_MODEL, "--recipe", "mxfp8", "--rounding", "nearest", *_TO],
    "nvfp4": ["quantize", *_MODEL, "--recipe", "nvfp4", "--rounding", "nearest", *_TO],
    "search": ["quantize", *_MODEL, "--recipe", "nvfp4", "--rounding", "search", *_TO],
    "gptq": ["quantize", *_MODEL, "--recipe", "nvfp4", "--rounding", "gptq", *_SEEN, *_TO],
    "verify": ["quantize", *_MODEL, "--recipe", "nvfp4", "--rounding", "nearest", "--verify", *_TO],
    "compare": ["compare", "{0}/m.safetensors", "{0}/nvfp4.safetensors", *_SEEN],
}


def peak(folder: Path, job: str) -> float:
    """MB."""
    words = [word.format(folder, job) for word in JOBS[job]]
    return 1000 * measure([sys.executable, "-m", "quant_core.cli", *words]).peak


if __name__ == "__main__":
    main()
