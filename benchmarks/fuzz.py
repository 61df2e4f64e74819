"""Damaged inputs and killed runs: every problem must be one clear line, every output absent or whole.

    python benchmarks/fuzz.py [--headers 50000] [--files 5000] [--kills 60] [--seed 0]

Headers and files are mutated in this process and go through the public functions: anything but a CalibQuantError of one
printable line is a failure, and so is a case of more than 5 s or 500 MB. Killed are runs of `calibquant quantize
--verify`: by SIGKILL, by bursts of SIGTERM and SIGINT; and pairs of runs race for one name. Exit code 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quant_core import jobs
from quant_core.cli import main as cli
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration, promptset
from quant_core.evidence.collector import Collector
from quant_core.models.source import Source
from quant_core.planning import plan as plans
from quant_core.planning import recipes
from quant_core.planning.layout import predicted_size
from quant_core.reports import describe

SECONDS, MEGABYTES = 5.0, 500.0
FORMATS = ("nvfp4", "mxfp8", "fp8", "int8")
LAYERS = [f"layers.{i}.{name}" for i in range(2) for name in ("attention.qkv", "attention.out")]
WIDTH = 64


@dataclass
class Counts:
    """What became of the cases: "accepted", "refused", and failures with enough to repeat them."""

    name: str
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    largest: float = 0.0  # MB by which one case raised the peak

    def __str__(self) -> str:
        parts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        measured = f"; slowest {self.slowest:.2f} s, most memory {self.largest:.0f} MB" if self.slowest else ""
        return f"{self.name}: {self.outcomes.total()} cases: {parts}; {len(self.failures)} failures{measured}"

    def run(self, case: str, work: Callable[[], Any]) -> None:
        began, before = time.perf_counter(), _peak()
        try:
            with _alarm(4 * SECONDS):
                work()
            outcome = "accepted"
        except CalibQuantError as e:
            outcome = "refused"
            if not str(e).isprintable():
                self.failures.append(f"{case}: not one printable line: {e!r}")
        except Exception as e:
            outcome = type(e).__name__
            self.failures.append(f"{case}: {e!r:.200}")
        seconds, grown = time.perf_counter() - began, _peak() - before
        if seconds > SECONDS or grown > MEGABYTES:
            self.failures.append(f"{case}: {seconds:.1f} s, {grown:.0f} MB")
        self.outcomes[outcome] += 1
        self.slowest, self.largest = max(self.slowest, seconds), max(self.largest, grown)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- sound files to be damaged


class Corpus:
    """One small sound file of every kind, made by the tool itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        shapes = {"x_embedder": (WIDTH, 16), **{n: (3 * WIDTH if "qkv" in n else WIDTH, WIDTH) for n in LAYERS}}
        generator = torch.Generator().manual_seed(0)
        weights = {f"{n}.weight": torch.randn(s, generator=generator).mul(0.02).bfloat16() for n, s in shapes.items()}
        weights |= {f"{LAYERS[0]}.bias": torch.ones(3 * WIDTH).bfloat16(), "cap_embedder.0.weight": torch.ones(WIDTH)}
        self.model = folder / "model.safetensors"
        save_file(weights, self.model, {"title": "model"})
        self.source = Source(self.model)
        self.calibration = folder / "m.calibration.safetensors"
        calibration.save(self._collected(weights, generator), self.calibration)
        self.seen = calibration.load(self.calibration)
        self.quantized = {name: folder / f"{name}.safetensors" for name in FORMATS}
        for name, path in self.quantized.items():
            jobs.quantize(self.source, recipes.make_plan(self.source, name), path, device="cpu")
        self.plan = folder / "plan.json"
        self.made = recipes.calibrated(self.source, recipes.make_plan(self.source, "nvfp4"), self.seen)
        self.made.save(self.plan)
        self.index = folder / "m.safetensors.index.json"
        self.index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, self.model.name)}))
        self.prompts = folder / "prompts.safetensors"
        options = {"pooled_output": torch.ones(1, 8), "guidance": 3.5}
        encoded = [{"text": t, "cond": torch.randn(1, 4, 8), "options": dict(options)} for t in ("a fox", "an owl")]
        promptset.save(encoded, self.prompts)

    def _collected(self, weights: dict[str, torch.Tensor], generator: torch.Generator) -> calibration.Calibration:
        collector = Collector(lambda _: "", rows=16)
        collector.start_run("seed 1")
        collector.model_call(torch.tensor([1.0]), [0])
        for layer in LAYERS:
            x = torch.randn(1, 24, WIDTH, generator=generator)
            collector.add(layer, x, x @ weights[f"{layer}.weight"].float().T)
        collector.finish_run()
        identity = {"architecture": self.source.architecture.name, "source_file": self.model.name}
        return collector.result({**identity, "source_fingerprint": self.source.checkpoint.fingerprint()})


# --- damage

EVIL: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 10**9, 2**63, 1.5, -0.0, 1e300, "", "x", "bf16", "nvfp4", "a\nb\x1b[2J", "../x",
    "\ud800", float("nan"), float("inf"), [], {}, [1], [0], [10**18] * 4, [2] * 40, {"a": {"b": []}}, "é" * 50,
    "9" * 20,
]  # fmt: skip
RAW = {  # what json.dumps will not write
    "@deep@": "[" * 5000 + "]" * 5000, "@deeper@": '{"a":' * 100_000, "@digits@": "9" * 5000, "@exponent@": "1e999",
    "@dims@": "[" + ",".join(["999999999999999999"] * 3000) + "]", "@nested@": "[" * 80 + "]" * 80,
    "@huge@": "1" * 30,
}  # fmt: skip


def damaged_json(rng: random.Random, value: Any) -> str:
    """The JSON of a value with one to three things wrong in it, or a few bytes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        value = _damaged(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", "{", "]", '"', "\\u", "0", "\0", ","]) + text[at + rng.randint(0, 3) :]
    return text


def _damaged(rng: random.Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice([*EVIL, *RAW]))  # they may be damaged further
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, what = rng.choice(keys), rng.random()
    if what < 0.12:
        del value[key]
    elif what < 0.3 and isinstance(value, dict):
        names = ["", "9" * 5000, "layers." + "9" * 30 + ".a.weight", "a\x1b[31m", "é", "\udc00", "x.comfy_quant"]
        value[rng.choice([*names, rng.choice(keys) + "x"])] = (
            copy.deepcopy(value[key]) if rng.random() < 0.5 else value.pop(key)
        )
    else:
        value[key] = _damaged(rng, value[key])
    return value


def damaged_header(rng: random.Random, path: Path, target: Path) -> None:
    """The file with something wrong in its header, the JSON texts in its metadata, or any of its bytes."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    kind = rng.random()
    if kind < 0.25:
        mutated = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(min(len(raw), 8 + length))] = rng.randrange(256)
        target.write_bytes(mutated[: rng.randrange(len(raw))] if rng.random() < 0.2 else mutated)
        return
    texts = [key for key, text in header.get("__metadata__", {}).items() if text.startswith("{")]
    if kind < 0.5 and texts:
        key = rng.choice(texts)
        header["__metadata__"][key] = damaged_json(rng, json.loads(header["__metadata__"][key]))
        text = json.dumps(header)
    else:
        text = damaged_json(rng, header)
    encoded = text.encode("utf-8", "surrogatepass")
    target.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def damaged_tensors(rng: random.Random, path: Path, target: Path) -> None:
    """A well-formed file of which one to three tensors are not what they should be."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(list(tensors))
        what = rng.randrange(5)
        if what == 0:
            del tensors[key]
        elif what == 1:
            tensors[rng.choice(["x", key + "s", rng.choice(list(tensors))])] = tensors.pop(key).clone()
        elif what == 2:
            tensors[key] = _odd_tensor(rng)
        elif what == 3:
            flat = tensors[key].clone().reshape(-1)
            if flat.is_floating_point() and flat.numel() and flat.element_size() > 1:
                flat[rng.randrange(flat.numel())] = rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e38])
            elif flat.numel():
                flat.view(torch.uint8)[rng.randrange(flat.nbytes)] = rng.randrange(256)
            tensors[key] = flat.view(tensors[key].shape)
        else:
            other = rng.choice([torch.float32, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int64])
            tensors[key] = tensors[key].float().nan_to_num().clamp(-100, 100).to(other)
        if not tensors:
            tensors["x"] = torch.ones(1)
    save_file(tensors, target, metadata)


def _odd_tensor(rng: random.Random) -> torch.Tensor:
    shape = rng.choice([(), (0,), (1,), (2,), (WIDTH,), (0, WIDTH), (WIDTH, 0), (WIDTH, WIDTH), (1, 1, 1), (3, 5)])
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.float8_e4m3fn])
    return torch.full(shape, rng.choice([0.0, 1.0, 2.0]), dtype=torch.float32).to(dtype)


# --- through the public functions


def headers(cases: int, folder: Path, seed: int = 0) -> list[Counts]:
    """Mutated headers of a model, quantized files and a calibration, through inspect and as a source."""
    corpus, counts, rng = Corpus(folder / "headers"), Counts("mutated headers"), random.Random(seed)
    files, target = (
        [corpus.model, corpus.calibration, *corpus.quantized.values()],
        corpus.folder / "damaged.safetensors",
    )
    for case in range(cases):
        path = rng.choice(files)
        damaged_header(rng, path, target)
        counts.run(f"header {case} of {path.name}, seed {seed}", lambda: _inspect(target))
    return [counts]


def _inspect(path: Path) -> None:
    json.dumps(describe.inspect(path)).encode()
    with Source(path) as source:
        recipes.make_plan(source, recipes.RECIPES["nvfp4"])


def files(cases: int, folder: Path, seed: int = 0) -> list[Counts]:
    """Mutated plans, calibrations, indexes, prompt sets and quantized files, through what reads them."""
    corpus, rng = Corpus(folder / "files"), random.Random(seed)
    made = [Counts(name) for name in ("plans", "calibrations", "indexes", "prompt sets", "quantized files")]
    for counts, damage in zip(made, (_plan, _calibration, _index, _prompt_set, _quantized), strict=True):
        for case in range(cases // len(made)):
            counts.run(f"{counts.name} {case}, seed {seed}", damage(rng, corpus))
    return made


def _plan(rng: random.Random, corpus: Corpus) -> Callable[[], Any]:
    target = corpus.folder / "damaged.plan.json"
    target.write_bytes(damaged_json(rng, json.loads(corpus.plan.read_text())).encode("utf-8", "surrogatepass"))
    return lambda: predicted_size(corpus.source, plans.load(target))


def _safetensors(rng: random.Random, path: Path, target: Path) -> Path:
    (damaged_tensors if rng.random() < 0.6 else damaged_header)(rng, path, target)
    return target


def _calibration(rng: random.Random, corpus: Corpus) -> Callable[[], Any]:
    target = _safetensors(rng, corpus.calibration, corpus.folder / "damaged.calibration.safetensors")

    def use() -> None:
        seen, output = calibration.load(target), corpus.folder / "out.safetensors"
        calibration.describe(seen)
        calibration.merge(seen, corpus.seen)
        calibration.merge(corpus.seen, seen)
        recipes.check_widths(corpus.source, seen)  # the one check that --force-calibration keeps
        plan = recipes.calibrated(corpus.source, corpus.made, seen)
        jobs.quantize(corpus.source, plan, output, calibration=seen, rounding="search", overwrite=True, device="cpu")
        jobs.compare(corpus.source, output, calibration=seen)

    return use


def _index(rng: random.Random, corpus: Corpus) -> Callable[[], Any]:
    target = corpus.folder / "damaged.safetensors.index.json"
    target.write_bytes(damaged_json(rng, json.loads(corpus.index.read_text())).encode("utf-8", "surrogatepass"))
    return lambda: describe.inspect(target)


def _prompt_set(rng: random.Random, corpus: Corpus) -> Callable[[], Any]:
    target = _safetensors(rng, corpus.prompts, corpus.folder / "damaged.prompts.safetensors")
    return lambda: promptset.save(promptset.load(target), corpus.folder / "again.safetensors")


def _quantized(rng: random.Random, corpus: Corpus) -> Callable[[], Any]:
    path = rng.choice(list(corpus.quantized.values()))
    target = _safetensors(rng, path, corpus.folder / "damaged.quantized.safetensors")

    def use() -> None:
        describe.inspect(target)
        jobs.compare(corpus.source, target, calibration=corpus.seen).to_json()

    return use


# --- killed runs


def kills(cases: int, folder: Path, seed: int = 0) -> list[Counts]:
    """Runs of the command line killed at random moments, and pairs of runs with one target. To be called first: runs
    are forks of this process, which must not have used torch's threads before.
    """
    folder = folder / "kills"
    folder.mkdir()
    rng, model = random.Random(seed), folder / "model.safetensors"
    save_file({f"layers.{i}.attention.out.weight": torch.randn(512, 512) for i in range(12)}, model)
    whole, work = {}, 60.0
    for recipe in ("nvfp4", "mxfp8", "mxfp8"):
        path = folder / recipe / "o.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        pid = _start(model, path, recipe, folder / "log")
        _begun(path.parent)
        began = time.perf_counter()
        assert os.waitpid(pid, 0)[1] == 0
        whole[recipe], work = _digest(path), min(work, time.perf_counter() - began)
    counts = [Counts("SIGKILL"), Counts("bursts of SIGTERM and SIGINT"), Counts("pairs of runs with one target")]
    for case in range(cases):
        _kill(counts[case % 2], rng, model, folder, rng.uniform(0, 1.1) * work, case % 2 == 0, whole)
    for _ in range(cases // 3):
        _race(counts[2], rng, model, folder, whole)
    return counts


def _start(model: Path, output: Path, recipe: str, log: Path, *options: str) -> int:
    """A run of the command line in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if stream == 1 else os.O_WRONLY), stream)
        sys.argv = ["calibquant", "quantize", str(model), "-o", str(output), "--recipe", recipe, "--verify", *options]
        code = cli()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _begun(folder: Path) -> None:
    """Wait until a run writes its temporary file there."""
    deadline = time.monotonic() + 30
    while not any(name.endswith(".partial") for name in os.listdir(folder)) and time.monotonic() < deadline:
        time.sleep(0.0005)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _kill(
    counts: Counts, rng: random.Random, model: Path, folder: Path, delay: float, hard: bool, whole: dict[str, str]
) -> None:
    output, log = folder / "out" / "o.safetensors", folder / "log"
    output.parent.mkdir(exist_ok=True)
    old = rng.random() < 0.5  # something to be replaced
    if old:
        output.write_bytes(b"old")
    pid = _start(model, output, "mxfp8", log, *["--overwrite"] * old)
    if rng.random() < 0.9:  # else while it reads
        _begun(output.parent)
    time.sleep(delay)
    for _ in range(1 if hard else rng.randint(1, 8)):
        os.kill(pid, signal.SIGKILL if hard else rng.choice([signal.SIGTERM, signal.SIGINT]))
        time.sleep(0 if hard else rng.choice([0, 0.001, 0.01]))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    case = f"{counts.name} after {delay:.3f} s, exit {code}"
    if not output.exists():
        outcome, wrong = "absent", old
    elif output.read_bytes() == b"old":
        outcome, wrong = "as before", not old
    else:
        outcome, wrong = "whole", _digest(output) != whole["mxfp8"]
    others = [path.name for path in output.parent.iterdir() if path != output]
    wrong |= code not in ((-signal.SIGKILL, 0) if hard else (130, 0)) and not (code == -signal.SIGTERM and delay < 0.05)
    wrong |= (not hard and bool(others)) or "Traceback" in log.read_text()
    wrong |= any(not name.endswith((".partial", ".journal")) for name in others)
    if wrong:
        counts.failures.append(f"{case}: {outcome}, beside it {others}, {log.read_text()[-300:]!r}")
    counts.outcomes[outcome] += 1
    output.unlink(missing_ok=True)
    if hard:  # the next run removes what the killed one left
        assert os.waitpid(_start(model, output, "mxfp8", log), 0)[1] == 0
        if [path.name for path in output.parent.iterdir()] != [output.name] or _digest(output) != whole["mxfp8"]:
            counts.failures.append(f"{case}: the next run did not clean up")
        output.unlink()


def _race(counts: Counts, rng: random.Random, model: Path, folder: Path, whole: dict[str, str]) -> None:
    """Two runs that begin together; without --overwrite exactly one of them may win."""
    output, replace = folder / "out" / "o.safetensors", rng.random() < 0.5
    options = ["--overwrite"] * replace
    pids = [_start(model, output, recipe, folder / f"log-{recipe}", *options) for recipe in whole]
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)
    if codes != ([0, 0] if replace else [0, 1]) or _digest(output) not in whole.values():
        counts.failures.append(f"exit codes {codes} with {options}, {(folder / 'log-nvfp4').read_text()[-300:]!r}")
    if len(list(output.parent.iterdir())) != 1:
        counts.failures.append(f"left: {[path.name for path in output.parent.iterdir()]}")
    counts.outcomes["last wins" if replace else "first wins"] += 1
    output.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("headers", 50_000), ("files", 5_000), ("kills", 60), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=number, metavar="N")
    args = parser.parse_args()
    jobs_of = {kills: args.kills, headers: args.headers, files: args.files}  # kills first: see there
    failures: list[str] = []
    folder = Path(tempfile.mkdtemp())
    torch.set_num_threads(1)
    try:
        for job, cases in jobs_of.items():
            for counts in job(cases, folder, args.seed) if cases else []:
                print(counts, flush=True)
                failures += counts.failures
    finally:
        shutil.rmtree(folder)
    print("\n".join(failures[:50]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
