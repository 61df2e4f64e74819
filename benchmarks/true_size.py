"""Time and memory at the true size of Z-Image (12.3 GB), by the command line, in processes of their own.

    python benchmarks/true_size.py [--folder DIR] [--jobs probe,mxfp8,nvfp4,search,gptq,w4a8] [--layers 30]

Random weights in the true shapes (``synthetic``; a block's weights are those of the first, rolled). Every job stands
beside a copy of its source (``cp``, then fsync, as our writer does), made just before it. GPTQ takes two files of
``--blocks`` and one blocks, with made up inputs of 2048 rows: their difference, by the number of blocks, is the time
of a block, times 34 that of the model (extrapolated: the largest layers and everything else are in each block).
Columns: wall seconds, the copy's, CPU seconds, peak resident GB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from benchmarks.timing import Cost, measure  # noqa: E402

DIM, FFN, TEXT, ROWS = 3840, 10240, 2560, 2048
BLOCKS = 34  # of the model: 30 and four refiners
COPY = "import os, shutil, sys\nshutil.copyfile(*sys.argv[1:])\nwith open(sys.argv[2], 'rb') as f: os.fsync(f)"
WHOLE = {
    "mxfp8": ["--recipe", "mxfp8", "--rounding", "nearest"],
    "nvfp4": ["--recipe", "nvfp4", "--rounding", "nearest"],
    "search": ["--recipe", "nvfp4", "--rounding", "search"],
}
CALIBRATED = {"gptq": "nvfp4", "w4a8": "w4a8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="for the files, some 30 GB")
    parser.add_argument("--jobs", default=",".join(("probe", *WHOLE, *CALIBRATED)))
    parser.add_argument("--layers", type=int, default=30, help="of the model; 30 is Z-Image")
    parser.add_argument("--blocks", type=int, default=3, help="of the larger file for GPTQ")
    options = parser.parse_args()
    jobs = options.jobs.split(",")
    print("| job | wall s | copy s | CPU s | peak GB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        if whole := [job for job in jobs if job not in CALIBRATED]:
            _in_own_process(make, folder / "whole", options.layers, True)
            for job in whole:
                _whole(folder / "whole", job)
        if calibrated := [job for job in jobs if job in CALIBRATED]:
            for name, blocks in (("few", 1), ("many", options.blocks)):
                _in_own_process(make, folder / name, blocks, False)
            for job in calibrated:
                _calibrated(folder, job, options.blocks)


def _whole(folder: Path, job: str) -> None:
    source, output = str(folder / "m.safetensors"), str(folder / "out.safetensors")
    copied = measure([sys.executable, "-c", COPY, source, output])
    Path(output).unlink()
    words = ["probe", source] if job == "probe" else ["quantize", source, "-o", output, *WHOLE[job]]
    _say(job, _command(*words, "--device", "cpu"), f"{copied.wall:.0f}")
    Path(output).unlink(missing_ok=True)


def _calibrated(folder: Path, job: str, blocks: int) -> None:
    costs = []
    for name in ("few", "many"):
        source, output, seen = (str(folder / name / f"{each}.safetensors") for each in ("m", "out", "c"))
        how = ["--recipe", CALIBRATED[job], "--calibration", seen, "--architecture", "zimage", "--device", "cpu"]
        costs.append(_command("quantize", source, "-o", output, *how))
        Path(output).unlink()
        _say(f"{job}, {1 if name == 'few' else blocks} blocks", costs[-1])
    more = (blocks - 1) / (BLOCKS - 1)
    few, many = costs
    wall, cpu = (one + (other - one) / more for one, other in ((few.wall, many.wall), (few.cpu, many.cpu)))
    _say(f"{job}, {BLOCKS} blocks, extrapolated", Cost(wall, many.peak, cpu))


def _command(*words: str) -> Cost:
    return measure([sys.executable, "-m", "quant_core.cli", *words])


def _say(job: str, cost: Cost, copied: str = "") -> None:
    print(f"| {job} | {cost.wall:.0f} | {copied} | {cost.cpu:.0f} | {cost.peak:.2f} |", flush=True)


def _in_own_process(function: object, *arguments: object) -> None:
    """Linux counts what a parent holds in the peak of its children."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("the files could not be made")


def shapes(layers: int, whole: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    from benchmarks import synthetic

    for name, out, width in synthetic.linears(DIM, FFN, layers, TEXT):
        if whole or name.startswith("layers."):
            yield f"{name}.weight", (out, width)
            if name.endswith("attention.qkv"):
                block = name.partition(".attention")[0]
                for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                    yield f"{block}.{norm}.weight", (DIM,)
                for norm in ("q_norm", "k_norm"):
                    yield f"{block}.attention.{norm}.weight", (synthetic.HEAD,)
    if whole:
        yield "cap_embedder.0.weight", (TEXT,)


def make(folder: Path, layers: int, whole: bool) -> None:
    """``m.safetensors``, and for a part of a model its calibration."""
    import torch

    from benchmarks import synthetic
    from quant_core.files.checkpoint import TensorSpec, Writer

    folder.mkdir()
    generator, known = torch.Generator().manual_seed(1), dict[tuple[int, ...], torch.Tensor]()
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes(layers, whole)]
    with Writer(folder / "m.safetensors", specs, {}) as writer:
        for i, spec in enumerate(specs):
            if len(spec.shape) == 1:
                writer.write(spec.name, torch.ones(spec.shape, dtype=torch.bfloat16))
                continue
            if spec.shape not in known:
                known[spec.shape] = synthetic.weight(*spec.shape, generator)
            writer.write(spec.name, known[spec.shape].roll(i, 0))
    if not whole:
        _calibrate(folder, specs)


def _calibrate(folder: Path, specs: list) -> None:
    """Inputs with a dozen strong directions and a few loud channels; q, k and v share theirs, w1 and w3, too."""
    import torch

    from quant_core.evidence import calibration
    from quant_core.evidence.collector import Collector
    from quant_core.models.source import Source

    generator = torch.Generator().manual_seed(2)
    with Source(folder / "m.safetensors", "zimage") as source:
        seen = Collector(lambda layer: source.architecture.describe(layer).shared_input, ROWS)
        inputs: dict[str, torch.Tensor] = {}
        for run in range(2):
            seen.start_run(f"random {run}")
            inputs.clear()
            for spec in (spec for spec in specs if len(spec.shape) == 2):
                layer = spec.name.removesuffix(".weight")
                group = source.layers[layer].shared_input or layer
                if group not in inputs:
                    width = spec.shape[1]
                    x = (
                        torch.randn(ROWS // 2, 64, generator=generator)
                        @ torch.randn(64, width, generator=generator)
                        / 8
                    )
                    x += torch.randn(ROWS // 2, width, generator=generator)
                    x[:, ::97] *= 10
                    inputs[group] = x
                seen.add(layer, inputs[group], torch.zeros(ROWS // 2, spec.shape[0]))
            seen.finish_run()
        identity = {"architecture": "zimage", "source_fingerprint": source.checkpoint.fingerprint()}
    calibration.save(seen.result(identity), folder / "c.safetensors")


if __name__ == "__main__":
    main()
