"""Where memory is short and jobs meet: a small GPU is simulated, no card is needed."""

from __future__ import annotations

import asyncio
import importlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.formats import FORMATS
from quant_core.jobs import quantization
from quant_core.models import architectures
from quant_core.models.source import Source
from quant_core.planning import recipes, splitting
from quant_core.rounding import gptq, pack, room
from quant_core.rounding.choice import Rounder
from quant_core.rounding.layerplan import LayerPlan

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OUT, IN, SEEN = 512, 64, 96  # rows and columns of the weight, sampled rows
Weight = Callable[[], torch.Tensor]


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A "GPU" that takes tensors of so many elements; what is moved there stays on the CPU."""
    real = torch.Tensor.to

    def make(elements: int, error: Exception | None = None) -> None:
        def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
                if self.numel() > elements:
                    raise error or torch.OutOfMemoryError("CUDA out of memory")
                args = CPU, *args[1:]
            return real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", to)

    return make


def weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02


def collected() -> Calibration:
    collector = Collector(lambda _: "", SEEN)
    for run in ("a", "b"):
        collector.start_run(run)
        x = models.correlated(SEEN, IN, len(run))
        collector.add("layer", x, x @ weight().T)
        collector.finish_run()
    return collector.result()


# --- the ladder: whole, in parts, on the CPU


@pytest.mark.parametrize(
    ("elements", "fallback"),
    [(OUT * IN, ""), (OUT * IN // 4, "in 4 parts"), (IN * SEEN, "in 16 parts"), (IN * 16, "on the CPU")],
)
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8", "float8_e4m3fn", "int8_tensorwise", "asym_w4a8_int8"])
@pytest.mark.parametrize("rounding", ["nearest", "search", "gptq"])
def test_a_layer_goes_down_the_ladder_and_loses_nothing(
    small_gpu: Any, rounding: str, fmt: str, elements: int, fallback: str
) -> None:
    """The arithmetic of this "GPU" is the CPU's, so bytes must be the CPU's, too, however small the parts are."""
    seen, how = collected(), ("layer", LayerPlan(fmt, ""), weight(), "w")
    wanted = Rounder(CPU, seen, rounding).round(*how)
    small_gpu(elements)
    found = Rounder(GPU, seen, rounding).round(*how)
    assert found.fallback == fallback and wanted.fallback == ""
    assert found.rounding == wanted.rounding
    for key, tensor in wanted.packed.tensors.items():
        assert torch.equal(
            found.packed.tensors[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )
    assert found.packed.error == pytest.approx(wanted.packed.error, rel=1e-4)


@pytest.mark.parametrize("says", ["CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "CUDA error: out of memory"])
def test_libraries_say_it_in_their_own_words(small_gpu: Any, says: str) -> None:
    small_gpu(0, RuntimeError(says))
    assert Rounder(GPU, None, "nearest").round("layer", LayerPlan("nvfp4", ""), weight(), "w").fallback == "on the CPU"


@pytest.mark.parametrize("error", [RuntimeError("illegal memory access"), CalibQuantError("w: bad"), MemoryError()])
def test_other_errors_are_not_swallowed(error: Exception) -> None:
    tried = []

    def attempt(where: room.Room) -> None:
        tried.append(where)
        raise error

    with pytest.raises(type(error)):
        room.in_room(GPU, attempt)
    assert len(tried) == 1


def test_what_the_gpu_keeps_for_other_layers_is_freed_first(small_gpu: Any) -> None:
    """A layer that does not fit makes way for itself before it is tried in parts."""
    small_gpu(OUT * IN)
    rounder, entry = Rounder(GPU, collected(), "gptq"), LayerPlan("nvfp4", "")
    rounder.round("layer", entry, weight(), "w")
    kept = [weakref.ref(factor) for factor in rounder._factors.values()]
    assert kept and all(ref() for ref in kept)
    rounder.round("other", entry, torch.cat([weight(), weight()]), "w")
    assert not any(ref() for ref in kept)


def test_the_report_names_the_layers_and_warns_once(
    small_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, out = models.save(tmp_path / "m.safetensors", models.wan()), [tmp_path / "a.safetensors"]
    out.append(tmp_path / "b.safetensors")
    with Source(path) as source:
        plan = recipes.make_plan(source, "nvfp4")
        jobs.quantize(source, plan, out[0], device="cpu")
        sizes = sorted({source.shape(name)[0] * source.shape(name)[1] for name in plan.quantized()})
        small_gpu(sizes[0])
        monkeypatch.setattr(quantization, "pick_device", lambda _: GPU)
        report = jobs.quantize(source, plan, out[1])
    counts = Counter(layer.fallback for layer in report.layers)
    assert counts[""] and sum(map(bool, [layer.fallback for layer in report.layers]))
    warnings = [line for line in report.summary().splitlines() if "GPU's memory" in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: ")
    assert all(fallback in warnings[0] for fallback in counts)
    assert '"fallback": "in ' in report.to_json()
    assert out[0].read_bytes() == out[1].read_bytes()


def test_ranks_of_a_split_are_found_on_the_cpu_where_the_gpu_is_full(
    small_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = models.ROOT / "workflows"
    seen = calibration.load(demo / "calibrations" / "digits.calibration.safetensors")
    with Source(demo / "models" / "calibquant_digits_wan.safetensors") as source:
        plan = recipes.sized(source, recipes.make_plan(source, "nvfp4"))
        wanted = splitting.split(source, plan, seen, "4", device="cpu").ranks()
        small_gpu(0)
        monkeypatch.setattr(splitting, "pick_device", lambda _: GPU)
        assert splitting.split(source, plan, seen, "4").ranks() == wanted


# --- how much a layer needs


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive at most, of those made in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: Counter[int] = Counter()
        self._known: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and self._known.get(id(tensor)) is not tensor:
                self._known[id(tensor)] = tensor
                place, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                self.now += 0 if self._held[place] else nbytes
                self._held[place] += 1
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._gone, place, nbytes)
        return made

    def _gone(self, place: int, nbytes: int) -> None:
        self._held[place] -= 1
        self.now -= 0 if self._held[place] else nbytes


@pytest.mark.parametrize("shape", [(512, 1024), (2048, 512)])
def test_a_layer_takes_no_more_than_is_asked_for_and_not_much_less(shape: tuple[int, int]) -> None:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, threads = models.correlated(2 * shape[1], shape[1], 1), torch.get_num_threads()
    torch.set_num_threads(1)  # else threads that the block does not see do the work
    try:
        with Live() as live:
            factor = gptq.factor(rows.clone())
            assert isinstance(factor, gptq.Factor)
            pack.by_gptq(made.clone(), FORMATS["nvfp4"], CPU, "w", factor)
    finally:
        torch.set_num_threads(threads)
    asked = room.needed([shape, (32, 32)], True)
    assert live.peak <= asked <= 3 * live.peak


# --- jobs that meet


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_jobs_for_one_name_both_end_well(overwrite: bool, tmp_path: Path) -> None:
    """Both have begun before either is done: the file is whole, and who comes second is told unless it may replace."""
    path, out = models.save(tmp_path / "m.safetensors", models.wan()), tmp_path / "out.safetensors"
    together, threads = threading.Barrier(2), torch.get_num_threads()

    def job() -> str:
        with Source(path) as source:
            plan = recipes.make_plan(source, "nvfp4")
            wait = lambda _done, _total, text: together.wait(60) if text == "done" else None  # noqa: E731
            try:
                jobs.quantize(source, plan, out, overwrite=overwrite, device="cpu", progress=wait)
            except CalibQuantError as error:
                return str(error)
        return ""

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(2) as pool:
            said = sorted(done.result() for done in [pool.submit(job) for _ in range(2)])
    finally:
        torch.set_num_threads(threads)
    assert said[0] == "" and ("another run made it meanwhile" in said[1]) == (not overwrite)
    with Source(path) as source:
        jobs.quantize(source, recipes.make_plan(source, "nvfp4"), tmp_path / "alone.safetensors", device="cpu")
    assert out.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def recorders(nodes_of_pack: dict[str, Any], tmp_path: Path) -> list[Any]:
    """Of two ComfyUI servers that share an output folder, on one file."""
    calibrate = importlib.import_module(nodes_of_pack["CalibQuantMonitor"].__module__)
    made = [calibrate.Recorder(tmp_path / "shared.calibration.safetensors") for _ in range(2)]
    for recorder in made:
        recorder.prepare(architectures.by_name("wan"), {"architecture": "wan", "source_fingerprint": "f"}, 8)
    return made


def record(recorder: Any, seed: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    run = SimpleNamespace(seed=seed, steps=1, sampler="euler", cfg=1.0, resolution=[1], patched=0)
    collector = recorder.start(run)
    x = models.correlated(4, 16, seed)
    collector.add("blocks.0.ffn.0", x, x)
    meanwhile()
    recorder.finish()


def runs_in(path: Path) -> list[str]:
    held = calibration.load(path)
    assert held.layers["blocks.0.ffn.0"].count == 4 * len(held.info["runs"])
    return sorted(held.info["runs"])


@pytest.mark.core
def test_servers_that_take_turns_add_up_in_one_file(recorders: list[Any], tmp_path: Path) -> None:
    one, other = recorders
    for seed in (1, 2, 3, 4):
        record(one if seed % 2 else other, seed)
    assert runs_in(one.path) == ["seed 1", "seed 2", "seed 3", "seed 4"]
    assert [path.name for path in tmp_path.iterdir()] == ["shared.calibration.safetensors"]


@pytest.mark.core
def test_servers_that_sample_at_once_lose_no_run(recorders: list[Any], tmp_path: Path) -> None:
    """Who saves second goes on in a file of its own."""
    one, other = recorders
    record(one, 1, meanwhile=lambda: record(other, 2))
    record(one, 3)
    assert runs_in(tmp_path / "shared.calibration.safetensors") == ["seed 2"]
    assert runs_in(tmp_path / "shared_2.calibration.safetensors") == ["seed 1", "seed 3"]


@pytest.mark.core
@pytest.mark.parametrize(("gigabytes", "kept"), [(0.0, {128: 20, 512: 20}), (1.0, {128: 96, 512: 96})])
def test_monitor_keeps_more_rows_of_wide_layers(
    nodes_of_pack: dict[str, Any], comfy: Path, gigabytes: float, kept: dict[int, int]
) -> None:
    """Of the 96 rows that a run of 2 steps on 3 x 16 tokens has; where there is memory, of narrow layers, too."""
    with torch.inference_mode():
        model = importlib.import_module("nodes").UNETLoader().load_unet(DEMO, "default")[0]
    words = {"model": model, "name": f"pressure{gigabytes:g}", "rows": 20, "reset": True, "rows_memory": gigabytes}
    watched, handle = execute(nodes_of_pack["CalibQuantMonitor"], **words).result
    positive = execute(nodes_of_pack["CalibQuantLoadPromptSet"], prompt_set=PROMPTS, index=0).result[0]
    sample, latent = importlib.import_module("comfy.sample"), torch.zeros(1, 16, 3, 8, 8)
    cond = [[positive[0]["cond"], {}]]
    with torch.inference_mode():
        noise = sample.prepare_noise(latent, 1)
        sample.sample(watched, noise, 2, 1.0, "euler", "simple", cond, cond, latent, seed=1, disable_pbar=True)
    rows = handle.current().rows
    assert {rows[f"blocks.0.{name}"].rows.shape for name in ("ffn.0", "ffn.2")} == {
        (kept[width], width) for width in (128, 512)
    }


# --- ComfyUI is asked for room, and told


DEMO = "calibquant_digits_wan.safetensors"
PROMPTS = "digits.safetensors"
BITS = {"strategy": "bits", "bits": 6.0, "gpu": "blackwell", "formats": "nvfp4,mxfp8", "weighting": "auto"}


@pytest.fixture
def told(comfy: Path, small_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ComfyUI's model management was asked and told, with a GPU that has room for all."""
    management, said = importlib.import_module("comfy.model_management"), []
    small_gpu(1 << 40)
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(management, "free_memory", lambda nbytes, device: said.append((nbytes, device)))
    monkeypatch.setattr(management, "soft_empty_cache", lambda: said.append("over"))
    return said


@pytest.fixture
def nodes_of_pack(comfy: Path) -> dict[str, Any]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return nodes.NODE_CLASS_MAPPINGS


def execute(node: Any, **inputs: Any) -> Any:
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**inputs)


@pytest.mark.core
def test_nodes_ask_for_room_before_they_round_and_say_when_it_is_over(
    nodes_of_pack: dict[str, Any], told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the largest layer, 512 x 128: in Plan's cost table, Save and Refine; also when a job fails."""
    seen = calibration.load(models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors")
    gpu, linked = torch.device("cuda", 0), SimpleNamespace(current=lambda: seen)
    largest = room.needed([(512, 128), (128, 512)], True)
    asked = [(largest, gpu), "over"]
    strategy = BITS | {"tie": False, "max_slow": 1.0}
    plan = execute(nodes_of_pack["CalibQuantPlan"], model_name=DEMO, strategy=strategy, calibration=linked).result[0]
    assert told == asked
    done = execute(nodes_of_pack["CalibQuantQuantize"], plan=plan, filename_prefix="pressure/m", verify=False)
    assert told == 2 * asked and not any(layer.fallback for layer in done.result[1].layers)
    execute(nodes_of_pack["CalibQuantEasy"], model_name=DEMO, card="RTX 50", size=0.0)
    assert told[4:] == [(room.needed([(512, 128), (128, 512)], False), gpu), "over"]
    module = importlib.import_module(nodes_of_pack["CalibQuantQuantize"].__module__)
    monkeypatch.setattr(module.jobs, "quantize", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        execute(nodes_of_pack["CalibQuantQuantize"], plan=plan, filename_prefix="pressure/m", verify=False)
    assert told[6:] == asked


@pytest.mark.core
def test_where_comfyui_uses_no_gpu_neither_do_the_nodes(
    nodes_of_pack: dict[str, Any], told: list[Any], monkeypatch: Any
) -> None:
    """python main.py --cpu on a machine with a card."""
    management = importlib.import_module("comfy.model_management")
    monkeypatch.setattr(management, "get_torch_device", lambda: CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = execute(
        nodes_of_pack["CalibQuantPlan"], model_name=DEMO, strategy={"strategy": "recipe", "recipe": "nvfp4"}
    ).result[0]
    monkeypatch.setattr(quantization, "pick_device", lambda name: pytest.fail(name) if name != "cpu" else CPU)
    execute(nodes_of_pack["CalibQuantQuantize"], plan=plan, filename_prefix="pressure/cpu", verify=False)
    assert not told
