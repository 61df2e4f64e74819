"""Do planned formats pay? Plans of equal bytes, and what the planner believes, held against what ComfyUI draws.

    python benchmarks/plans.py [--out DIR] [--seeds 16]

Everything is calibrated on blends of two digits (benchmarks/quality.py), sensitivities too; what is drawn are the ten
digits, other seeds, the loader quantizing activations itself. GPTQ everywhere.

1. NVFP4, MXFP8 and 16 bit at 5.5 and 6.5 bits a weight. Rankings (percentiles of quant_probe's score, kurtosis, HSWQ's
   output variance, random) turn NVFP4 layers into MXFP8, worst first, until the bytes are spent; allocations minimize
   the sum of damages. Ceiling: an allocation by true damages, of one layer quantized at a time.
2. Predicted damages of single layers against the true ones, and predicted sums against what whole plans do.
3. All formats that a card may run: each plan against the best file of a single format with as many bytes or fewer.
4. Seconds of planning 200 layers once their costs are known.

Needs ComfyUI (`bootstrap.py test` brings everything else). Files and latents that --out holds are not made again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import synthetic
import torch
from below_floor import make_block, shapes_of, with_sensitivities
from quality import MODEL, calibrate_demo, prompts, sample, save_prompts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from timing import ROOT, measure, spread

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from models import save_sparse  # noqa: E402

from quant_core.demo import digits  # noqa: E402
from quant_core.evidence import calibration, probe  # noqa: E402
from quant_core.evidence.calibration import Calibration  # noqa: E402
from quant_core.evidence.sensitivity import ROWS, LayerSensitivity  # noqa: E402
from quant_core.formats import SOURCE  # noqa: E402
from quant_core.jobs.quantization import quantize  # noqa: E402
from quant_core.models.source import Source  # noqa: E402
from quant_core.planning import budget, costs, recipes, scoring, targets  # noqa: E402
from quant_core.planning.costs import CostTable  # noqa: E402
from quant_core.planning.layout import layer_specs  # noqa: E402
from quant_core.planning.plan import Plan  # noqa: E402
from quant_core.rounding.layerplan import LayerPlan  # noqa: E402

BITS = (5.5, 6.5)
MIX = ("nvfp4", "mxfp8", "bf16")
TABLES = ("nvfp4,mxfp8,bf16", "w4a8,bf16")  # of true shapes
WIDE_BITS = (4.6, 5.5, 6.5, 8.3)
_EVERYWHERE = ("w4a8", "int8", "int8-convrot", "bf16")  # and natively; no W6A8, that core 0.33 cannot multiply
CARDS = {"ampere": ("nvfp4", *_EVERYWHERE, "fp8"), "ada": ("nvfp4", *_EVERYWHERE, "fp8")}
SINGLES_SEED = 6000  # of true damages: other seeds than those of the pictures
SINGLES_SEEDS = 4
DRAWS = 4  # of random plans
AT_ONCE = 30  # files that one process draws
RESAMPLED = 10_000
CPU = torch.device("cpu")
Choice = Mapping[str, str]  # layer -> option
Errors = np.ndarray  # float64 [pictures]: ||Y' - Y||^2 / mean ||Y||^2


@dataclass
class Bench:
    """The demo model, what is known of it, and a folder of files and latents."""

    source: Source
    out: Path
    seen: Calibration  # without sensitivities
    seeds: int

    def table(self, name: str, gpu: str, options: tuple[str, ...], seen: Calibration) -> CostTable:
        how = costs.made_with(self.source, gpu, options, "gptq", True, seen)
        path = self.out / f"{name}.table.json"
        if path.exists():
            return costs.load(path, how)
        table = costs.measure(self.source, seen, how, CPU)
        table.save(path)
        return table

    def plan(self, table: CostTable, choice: Choice) -> Plan:
        """Every layer as chosen; bf16 where nothing is said."""
        made = costs.entries(self.source, table.made_with.options, self.seen)
        layers = {name: LayerPlan(SOURCE, "") for name in self.source.layers}
        layers |= {name: made[name][option] for name, option in choice.items()}
        plan = Plan(self.source.architecture.name, "benchmark", self.source.name, layers)
        return recipes.sized(self.source, plan)

    def every(self, option: str, table: CostTable) -> Path:
        """Every layer so, where it fits."""
        path = self.out / f"every-{option}.safetensors"
        if not path.exists():
            choice = {name: option for name, by in table.layers.items() if option in by}
            quantize(self.source, self.plan(table, choice), path, calibration=self.seen, rounding="gptq")
        return path

    def file(self, title: str, table: CostTable, choice: Choice) -> Path:
        """Put together from those of single formats, for no layer's rounding depends on another's: what ``quantize``
        would write, but for its header."""
        path = self.out / f"{title}.safetensors".replace(" ", "-")
        if not path.exists():
            tensors, metadata = load_file(MODEL), safe_open(MODEL, "pt").metadata()
            of = {option: load_file(self.every(option, table)) for option in set(choice.values()) - {"bf16"}}
            for key in {key for own in of.values() for key in own}:
                layer, _, _ = key.rpartition(".")
                if layer in choice and choice[layer] in of:
                    tensors |= {key: of[choice[layer]][key]} if key in of[choice[layer]] else {}
            save_file(tensors, path, metadata)
        return path

    def drawn(self, files: list[Path], seeds: int, first: int = 1000, gpu: str = "blackwell") -> list[Errors]:
        """Errors of the pictures of these files on a card, against those of the 16-bit model.

        blackwell: by the older ComfyUI; other cards by the newer, which reads W4A8.
        """
        newer, program = gpu != "blackwell", ["benchmarks/sample_card.py", gpu]
        found = [self.out / f"{path.stem}.{first}-{seeds}-{gpu}.npy" for path in (MODEL, *files)]
        missing = [(path, at) for path, at in zip((MODEL, *files), found, strict=True) if not at.exists()]
        for done in range(0, len(missing), AT_ONCE):
            paths, places = zip(*missing[done : done + AT_ONCE], strict=True)
            print(f"drawing {done + len(paths)} of {len(missing)} files", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                new = sample(paths, Path(folder), seeds, first, native=True, program=program, older=not newer)
            for place, latents in zip(places, new, strict=True):
                np.save(place, latents)
        reference, *others = (digits.from_wan_space(torch.from_numpy(np.load(path))).double() for path in found)
        energy = reference.square().flatten(1).sum(1).mean()
        return [((y - reference).square().flatten(1).sum(1) / energy).numpy() for y in others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep files here (default: a temporary folder)")
    parser.add_argument("--seeds", type=int, default=16, help="per digit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Source(MODEL) as source:
        out = (options.out or Path(temporary)).resolve()
        (out / "plans").mkdir(parents=True, exist_ok=True)
        seen = calibrate_demo(out)[0]
        bench = Bench(source, out / "plans", calibration.load(seen), options.seeds)
        informed = {name: informed_by(name, seen, bench.out) for name in ("gradient", "matched")}
        tables = {name: bench.table(name, "blackwell", MIX, known) for name, known in informed.items()}
        true = true_damages(bench, tables["gradient"])
        print(equal_bytes(bench, tables | {"true": with_damages(tables["gradient"], true)}), flush=True)
        print(beliefs(bench, tables, true), flush=True)
        print(all_options(bench, informed["gradient"]), flush=True)
        print(planning_time(), flush=True)
        print(true_shapes(bench.out), flush=True)


def informed_by(estimator: str, seen: Path, out: Path) -> Calibration:
    """The calibration with sensitivities, of ten blends of digits that are evenly spread, seeds 5000 and up."""
    path = with_sensitivities(seen, out / f"{estimator}.calibration.safetensors", blends_measured(), estimator)
    return calibration.load(path)


def blends_measured() -> dict[str, torch.Tensor]:
    return dict(list(prompts()[0].items())[::4])


# --- damages of single layers ------------------------------------------------------------------------------------


def true_damages(bench: Bench, table: CostTable) -> dict[str, dict[str, float]]:
    """Layer -> option -> error of the final latent when that layer alone is quantized."""
    singles = [(name, option) for option in MIX if option != "bf16" for name in table.layers]
    files = [bench.file(f"single-{option}-{name}", table, {name: option}) for name, option in singles]
    found: dict[str, dict[str, float]] = {name: {"bf16": 0.0} for name in table.layers}
    for (name, option), errors in zip(singles, bench.drawn(files, SINGLES_SEEDS, SINGLES_SEED), strict=True):
        found[name][option] = errors.mean()
    return found


def with_damages(table: CostTable, damages: Mapping[str, Mapping[str, float]]) -> CostTable:
    layers = {n: {o: replace(c, damage=float(damages[n][o])) for o, c in by.items()} for n, by in table.layers.items()}
    return replace(table, layers=layers)


# --- 1. equal bytes ----------------------------------------------------------------------------------------------


def equal_bytes(bench: Bench, tables: Mapping[str, CostTable]) -> str:
    table = tables["gradient"]
    lines = [
        f"Final latent of plans of {', '.join(MIX)}, blackwell, as loaded, n = {10 * bench.seeds} pictures; ratio of "
        "means with 95 % interval, paired bootstrap over pictures:",
        "",
        "| | bits a weight | bytes | predicted by gradient | final latent | × percentiles | × HSWQ variance |",
        "|---|---|---|---|---|---|---|",
    ]
    for bits in BITS:
        choices = {name: rank(table, order, bits) for name, order in rankings(bench, table).items()}
        choices |= {name: make(bits) for name, make in allocations(bench, tables).items()}
        plans = {name: bench.plan(table, choice) for name, choice in choices.items()}
        files = [bench.file(f"{bits}-{name}", table, choice) for name, choice in choices.items()]
        errors = dict(zip(plans, bench.drawn(files, bench.seeds), strict=True))
        predicted = {name: damage_of(table, choice) for name, choice in choices.items()}
        chance = [name for name in errors if name.startswith("random")]
        errors["random"] = np.mean([errors[name] for name in chance], axis=0)
        predicted["random"] = float(np.mean([predicted[name] for name in chance]))
        for name in (n for n in errors if n not in chance):
            shown = name if name in plans else chance[0]
            cells = [f"{bits_of(table, choices[shown]):.3f}", str(plans[shown].size)]
            cells += [f"{predicted[name]:.2e}", f"{errors[name].mean():.2e}"]
            cells += [ratio(errors[name], errors[other]) for other in ("percentiles", "HSWQ variance")]
            title = f"{name} (mean of {DRAWS})" if name == "random" else name
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rankings(bench: Bench, table: CostTable) -> dict[str, list[str]]:
    """Name -> layers, the worst first."""
    probed = probe.probe(MODEL)
    scores = {d.layer.name: d.score for d in scoring.decide(probed).decisions}
    kurtosis = {layer.name: layer.kurtosis for layer in probed.layers}
    variance = {name: bench.seen.layers[name].output_variance for name in table.layers}

    def worst_first(value: Mapping[str, float]) -> list[str]:
        return sorted(table.layers, key=lambda name: -value.get(name, -np.inf))

    found = {"percentiles": worst_first(scores), "kurtosis": worst_first(kurtosis)}
    found["HSWQ variance, ranked"] = worst_first(variance)
    for seed in range(DRAWS):
        found[f"random {seed}"] = random.Random(seed).sample(list(table.layers), len(table.layers))
    return found


def rank(table: CostTable, order: list[str], bits: float) -> Choice:
    """The first become MXFP8, and later ones that still fit."""
    choice = dict.fromkeys(table.layers, "nvfp4")
    for name in order:
        richer = choice | {name: "mxfp8"}
        if bits_of(table, richer) <= bits:
            choice = richer
    return choice


def bits_of(table: CostTable, choice: Choice) -> float:
    """A weight, of the layers in the table."""
    of_16_bit = sum(by["bf16"].nbytes for by in table.layers.values())
    return 16 * sum(table.layers[name][option].nbytes for name, option in choice.items()) / of_16_bit


def allocations(bench: Bench, tables: Mapping[str, CostTable]) -> dict[str, Callable[[float], Choice]]:
    def by(weighting: str, source: str) -> Callable[[float], Choice]:
        return lambda bits: allocated(bench, tables[source], bits, weighting)

    return {
        "HSWQ variance": by("hswq", "gradient"),
        "uniform": by("uniform", "gradient"),
        "gradient": by("gradient", "gradient"),
        "matched prediction": by("gradient", "matched"),
        "true damages": by("gradient", "true"),
    }


def allocated(bench: Bench, table: CostTable, bits: float, weighting: str) -> Choice:
    made = budget.plan(bench.source, table, budget.Wish("bits", bits), weighting=weighting, calibration=bench.seen)
    option_of = {fmt: option for option, (fmt, _) in costs.OPTIONS.items() if option in table.made_with.options}
    return {name: option_of[made.layers[name].format] for name in table.layers}


def ratio(a: Errors, b: Errors) -> str:
    """Of means, with the 95 % interval of a paired bootstrap."""
    drawn = np.random.default_rng(0).integers(0, len(a), (RESAMPLED, len(a)))
    low, high = np.quantile(a[drawn].mean(1) / b[drawn].mean(1), [0.025, 0.975])
    return f"{a.mean() / b.mean():.2f} ({low:.2f}-{high:.2f})"


# --- 2. what is believed -----------------------------------------------------------------------------------------


def beliefs(bench: Bench, tables: Mapping[str, CostTable], true: Mapping[str, Mapping[str, float]]) -> str:
    """Rank correlations of single damages, by format, and sums of them."""
    damages: dict[str, dict[str, dict[str, float]]] = {
        name: {n: {o: cost.damage or 0.0 for o, cost in by.items()} for n, by in table.layers.items()}
        for name, table in tables.items()
    }
    damages |= {"matched, this rounding": matched_damages(bench, tables["gradient"]), "true": dict(true)}
    lines = [
        f"Damage of single layers ({len(true)}), one quantized at a time. true: final latent, {SINGLES_SEEDS} seeds x "
        "10 digits; gradient and matched: as stored with a calibration, the latter from NVFP4 nearest; matched, this "
        "rounding: the very files' predictions at points of the 16-bit model's trajectories. Spearman's correlations:",
        "",
        f"| | {' | '.join(f'{option}: true | gradient | sum' for option in MIX[:2])} |",
        "|---|" + "---|" * 6,
    ]
    for name in damages:
        cells = []
        for option in MIX[:2]:
            values = {other: [by[option] for by in damages[other].values()] for other in (name, "true", "gradient")}
            cells += [f"{spearmanr(values[name], values[other])[0]:.3f}" for other in ("true", "gradient")]
            cells.append(f"{sum(values[name]):.2e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def matched_damages(bench: Bench, table: CostTable) -> dict[str, dict[str, float]]:
    """Layer -> option -> change of the prediction by the file with that layer quantized, on the blends."""
    singles = [(name, option) for option in MIX if option != "bf16" for name in table.layers]
    files = [bench.file(f"single-{option}-{name}", table, {name: option}) for name, option in singles]
    path = bench.out / "predictions.npy"
    if not path.exists():
        program = ["benchmarks/predict_points.py"]
        blends = save_prompts(blends_measured(), bench.out / "blends.promptset.safetensors")
        how = {"first": 5000, "native": True, "older": True, "program": [*program, "--promptset", str(blends)]}
        with tempfile.TemporaryDirectory() as folder:
            exact, *others = sample([MODEL, *files], Path(folder), 1, **how)
        energy = np.square(exact).sum(axis=tuple(range(2, exact.ndim)))
        np.save(path, [(np.square(y - exact).sum(axis=tuple(range(2, y.ndim))) / energy).mean() for y in others])
    found: dict[str, dict[str, float]] = {name: {"bf16": 0.0} for name in table.layers}
    for (name, option), damage in zip(singles, np.load(path), strict=True):
        found[name][option] = float(damage)
    return found


# --- 3. all options ----------------------------------------------------------------------------------------------


def all_options(bench: Bench, informed: Calibration) -> str:
    """Per card: plans over all that it may run against files of one format, drawn by the newer ComfyUI."""
    lines = [
        f"All options, gradient, as loaded by core 0.33, n = {10 * bench.seeds}; beside each plan the best file of a "
        "single format that is no larger:",
        "",
        "| card | bits | bytes | options | predicted | final latent | best single: bytes | final latent | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu, options in CARDS.items():
        table = bench.table(gpu, gpu, options, informed)
        singles = {o: {n: o if o in by else "bf16" for n, by in table.layers.items()} for o in options if o != "bf16"}
        choices: dict[str, Choice] = {f"{gpu} every {option}": choice for option, choice in singles.items()}
        choices |= {f"{gpu} {bits}": allocated(bench, table, bits, "gradient") for bits in WIDE_BITS}
        files = [bench.file(name, table, choice) for name, choice in choices.items()]
        errors = dict(zip(choices, bench.drawn(files, bench.seeds, gpu=gpu), strict=True))
        sizes = {name: bench.plan(table, choice).size for name, choice in choices.items()}
        for bits in WIDE_BITS:
            name = f"{gpu} {bits}"
            smaller = [s for s in choices if "every" in s and sizes[s] <= sizes[name]]
            best = min(smaller, key=lambda s: errors[s].mean(), default="")
            counts = Counter(choices[name].values())
            cells = [gpu, str(bits), str(sizes[name]), ", ".join(f"{counts[o]} {o}" for o in options if counts[o])]
            cells += [f"{damage_of(table, choices[name]):.1e}", f"{errors[name].mean():.2e}"]
            if best:
                cells += [f"{best.removeprefix(gpu)}: {sizes[best]}", f"{errors[best].mean():.2e}"]
                cells.append(ratio(errors[name], errors[best]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def damage_of(table: CostTable, choice: Choice) -> float:
    return sum(table.layers[name][option].damage or 0.0 for name, option in choice.items())


# --- 4. time -----------------------------------------------------------------------------------------------------


def planning_time(runs: int = 5) -> str:
    """Of the layers of a true Z-Image, all options, random costs, at random sizes."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = {f"{name}.weight": (o, i) for name, o, i in synthetic.linears(3840, 10240, 30, 2560)}
        norms = {f"layers.0.attention.{x}_norm.weight": (128,) for x in "qk"} | {"cap_embedder.0.weight": (2560,)}
        with Source(save_sparse(Path(folder) / "zimage.safetensors", shapes | norms)) as source:
            table, taken, cpu = random_table(source), [], []
            for run in range(runs):
                wish = budget.Wish("bits", 5 + 0.9 * run)
                began, busy = time.perf_counter(), time.process_time()
                budget.plan(source, table, wish)
                taken.append(time.perf_counter() - began)
                cpu.append(time.process_time() - busy)
    return (
        f"Planning {len(table.layers)} layers of {len(costs.OPTIONS)} options, curve and controls included: "
        f"{spread(taken, 2)} s, of the CPU {spread(cpu, 2)} s (min / median / max, n = {runs}; load average "
        f"{os.getloadavg()[0]:.1f})\n"
    )


def random_table(source: Source) -> CostTable:
    """Errors as the demo model has them, times a random number for each layer and each of its options."""
    usual = {"nvfp4": 5e-3, "nvfp4-w4a16": 5e-4, "w4a8": 3e-4, "w6a8": 5e-5, "fp8": 4e-4, "int8": 6e-5, "mxfp8": 4e-4}
    usual |= {"int8-convrot": 3e-5, "bf16": 0.0}
    random, layers = np.random.default_rng(0), {}
    for name, options in costs.entries(source, tuple(costs.OPTIONS)).items():
        gain, layers[name] = np.exp(1.5 * random.standard_normal()), {}
        for option, entry in options.items():
            error = usual[option] * np.exp(0.3 * random.standard_normal())
            nbytes = sum(spec.nbytes for spec in layer_specs(source, name, entry))
            speed = targets.speed(entry, "blackwell")
            layers[name][option] = costs.Cost(float(error), nbytes, speed, float(gain * error))
    return CostTable(costs.made_with(source, "blackwell", tuple(costs.OPTIONS)), layers)


# --- 5. true shapes ----------------------------------------------------------------------------------------------


def true_shapes(out: Path) -> str:
    """The whole command for one block of a true Z-Image; gradients are noise, of the right number."""
    model, seen, _ = make_block(out / "true-block", False, False, 3840, 10240)
    informed = out / "true-block" / "informed.calibration.safetensors"
    if not informed.exists():
        known, noise = calibration.load(seen), torch.Generator().manual_seed(0)
        layers = shapes_of(3840, 10240)
        gradients = {
            f"layers.0.{n}": torch.randn(2 * ROWS, o, generator=noise).bfloat16() for n, (o, _) in layers.items()
        }
        found = {n: LayerSensitivity(known.rows_of(n)[:ROWS], g[:ROWS], g[ROWS:]) for n, g in gradients.items()}
        calibration.save(replace(known, sensitivities=found), informed)
    plan = ["plan", str(model), "--calibration", str(informed), "--bits", "6", "--gpu", "blackwell"]
    lines = ["One Z-Image block, 3840 wide (177 M weights), cost table and plan, whole command:", ""]
    lines += ["| options | seconds | CPU seconds | peak GB |", "|---|---|---|---|"]
    for options in TABLES:
        command = [sys.executable, "-m", "quant_core.cli", *plan, "--formats", options]
        cost = measure([*command, "-o", str(out / "true-block" / "plan.json")])
        lines.append(f"| {options} | {cost.wall:.0f} | {cost.cpu:.0f} | {cost.peak:.2f} |")
    return "\n".join([*lines, "", f"Load average {os.getloadavg()[0]:.1f} at the end."]) + "\n"


if __name__ == "__main__":
    main()
