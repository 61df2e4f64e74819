"""Plans refined by sampling: the arithmetic by a sampler whose damages are known, in ComfyUI against real files."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from comfy_env import Server
from test_calibrate_nodes import execute, hooks_on, ksampler, of_type, prompt_set
from test_split import emulate_native

from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration, probe
from quant_core.models.source import Source
from quant_core.planning import budget, costs, plan, recipes, refine
from quant_core.planning.plan import Plan
from quant_core.planning.refine import Block, Entries
from quant_core.reports import planned

MODEL = "calibquant_digits_wan.safetensors"
DEMO = models.ROOT / "workflows" / "models" / MODEL
DIGITS = models.ROOT / "workflows" / "calibrations" / "digits.calibration.safetensors"
N, WIDTH = 6, 1000  # samples, and values of a latent


# --- the arithmetic


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """Six blocks, whose guessed damages are much alike."""
    path = models.save(tmp_path_factory.mktemp("refine") / "m.safetensors", models.zimage(layers=4))
    with Source(path) as opened:
        yield opened


def asked(source: Source, kind: str = "bits", amount: float = 8.0, formats: str = "nvfp4,mxfp8,bf16") -> Plan:
    how = costs.made_with(source, "blackwell", costs.choose_options(formats, "blackwell", None))
    table = costs.guess(source, probe.probe(source.path), how)
    return budget.plan(source, table, budget.Wish(kind, amount))


def place(source: Source, name: str) -> str:
    return f"{source.layers[name].subgraph} {source.layers[name].block}"


class Sampler:
    """Latents whose error is the sum of the layers' guessed damages, times what the block of each is truly worth."""

    def __init__(self, source: Source, made: Plan, worth: dict[str, float], scatter: float = 0.0) -> None:
        self.source, self.worth, self.scatter, self.calls = source, worth, scatter, []
        self.damages = made.asked.damages(source)[1]
        self.random = torch.Generator().manual_seed(0)

    def error(self, entries: Entries) -> float:
        option = {"nvfp4": "nvfp4", "mxfp8": "mxfp8"}
        return sum(self.damages[n][option[e.format]] * self.worth.get(place(self.source, n), 1.0)
                   for n, e in entries.items())  # fmt: skip

    def __call__(self, entries: Entries, what: str) -> list[torch.Tensor]:
        self.calls.append((what, dict(entries)))
        exact = torch.ones(WIDTH)
        noise = torch.exp(self.scatter * torch.randn(N, generator=self.random)) if entries else torch.ones(N)
        return [exact * (1 + (self.error(entries) * k) ** 0.5) for k in noise.tolist()]


WORTH = {"main 0": 8.0, "main 2": 0.2}


def test_the_refined_plan_is_the_best_for_what_blocks_are_truly_worth(source: Source) -> None:
    made = asked(source)
    sampler = Sampler(source, made, WORTH)
    found = refine.refine(source, made, sampler)
    assert found.kept and found.clear and len(found.before) == N
    assert found.before[0] == pytest.approx(sampler.error(made.quantized()), rel=1e-4)
    assert found.after[0] == pytest.approx(sampler.error(found.plan.quantized()), rel=1e-4)
    truth = {n: min(WORTH.get(place(source, n), 1.0), refine.LIMIT) for n in made.asked.table.layers}
    best = budget.plan(source, made.asked.table, made.asked.wish, scale=truth)
    assert found.after[0] < 0.9 * found.before[0]
    assert found.after[0] <= 1.05 * sampler.error(best.quantized())
    assert found.plan.predicted["bits"] <= 8.0 and found.plan.asked.wish == made.asked.wish
    assert set(found.moved) == {n for n, e in found.plan.layers.items() if e.format != made.layers[n].format}
    for _, entries in sampler.calls[2:-1]:  # one block each
        assert len({place(source, n) for n in entries}) == 1
    said = "\n".join(refine.words(found))
    assert f"{found.before[0]:.2e} -> {found.after[0]:.2e} (n = {N}" in said
    assert f"layers that changed: {len(found.moved)}" in said and "weighs 0." in said


def test_a_plan_that_samples_worse_is_not_kept(source: Source) -> None:
    made = asked(source)

    class Grudging(Sampler):
        def error(self, entries: Entries) -> float:
            return super().error(entries) * (3 if self.calls[-1][0] == "the refined plan" else 1)

    found = refine.refine(source, made, Grudging(source, made, WORTH))
    assert found.after[0] > found.before[0] and not found.kept
    assert found.plan.layers == made.layers and found.plan.predicted["sampled"] == pytest.approx(found.before[0])
    assert refine.words(found)[0].startswith("the plan stays: ")


def test_a_plan_for_an_error_gets_smaller_or_stays(source: Source) -> None:
    made = asked(source, "max_error", 0.003)
    for worth in (WORTH, {"main 1": 0.1}, {"main 3": 30.0}):
        found = refine.refine(source, made, Sampler(source, made, worth))
        assert found.plan.size <= made.size and found.plan.predicted["sampled"] <= found.before[0] * (1 + 1e-6)


def test_time_goes_to_the_most_damaging_blocks(source: Source) -> None:
    made, clock = asked(source), [0.0]
    sampler = Sampler(source, made, WORTH)

    def sample(entries: Entries, what: str) -> list[torch.Tensor]:
        clock[0] += 60
        return sampler(entries, what)

    found = refine.refine(source, made, sample, minutes=5.5, now=lambda: clock[0])
    assert found.seconds <= 5.5 * 60
    order = [block.predicted for block in found.blocks]
    assert order == sorted(order, reverse=True)
    assert [bool(block.measured) for block in found.blocks] == [True, True] + [False] * (len(order) - 2)
    assert "2 of 6 blocks were measured alone" in "\n".join(refine.words(found))
    none = refine.refine(source, made, sample, minutes=0, now=lambda: clock[0])
    assert not none.kept and none.plan.layers == made.layers and not any(b.measured for b in none.blocks)


def test_controls_are_measured_beside_what_is_predicted_of_them(source: Source) -> None:
    made = asked(source)
    sampler = Sampler(source, made, {})
    found = refine.refine(source, made, sampler, measure_controls=True)
    controls = found.plan.predicted["controls"]
    assert controls and [c["name"] for c in controls] == [c["name"] for c in made.predicted["controls"]]
    for control in controls:
        entries = next(e for what, e in sampler.calls if what == f"control: {control['name']}")
        assert control["measured"] == pytest.approx(sampler.error(entries), rel=1e-4)
        assert f"{control['error']:.2e}, measured {control['measured']:.2e}" in "\n".join(planned.lines(found.plan))
    assert plan.from_json(found.plan.to_json()).predicted == json.loads(json.dumps(found.plan.predicted))


def blocks(*ratios: float, noise: float = 0.0) -> list[Block]:
    """Blocks of predicted damage 1e-3 with so much more measured, two samples each."""
    values = [(1e-3 * r * (1 - noise), 1e-3 * r * (1 + noise)) for r in ratios]
    return refine.weighed([Block(str(i), [], 1e-3, v) for i, v in enumerate(values)])


def test_blocks_are_weighed_by_measured_over_predicted() -> None:
    exact = [b.scale for b in blocks(1, 2, 3)]
    assert exact == pytest.approx([0.5, 1.0, 1.5])  # relative to all; a common factor says nothing of a block
    assert [b.scale for b in blocks(10, 20, 30)] == pytest.approx(exact)
    low, high = (b.scale for b in blocks(1, 1000))
    assert high / low == pytest.approx(2 * refine.LIMIT, rel=0.01)  # 1/4 against 1000 / 500.5
    # By hand: ln(1/2), ln(3/2) about the mean of 2; each relative variance of a mean of two is noise**2.
    logs, noise = [math.log(0.5), math.log(1.5)], 0.3
    between = sum(x * x - noise**2 for x in logs) / 2
    shrunk = [math.exp(x * between / (between + noise**2)) for x in logs]
    assert [b.scale for b in blocks(1, 3, noise=noise)] == pytest.approx([s * 2 / sum(shrunk) for s in shrunk])
    assert [b.scale for b in blocks(1, 1.2, noise=0.9)] == [1.0, 1.0]  # nothing but scatter
    assert [b.scale for b in refine.weighed([Block("0", [], 1e-3, (1.0,)), Block("1", [], 1e-3)])] == [1.0, 1.0]


def test_what_cannot_be_refined_says_what_to_do(source: Source) -> None:
    made = asked(source)
    split = replace(made, layers={n: replace(e, rank=4) for n, e in made.quantized().items()})
    other = replace(made, asked=replace(made.asked, table=replace(
        made.asked.table, made_with=replace(made.asked.table.made_with, source="f")
    )))  # fmt: skip
    for wrong, words in (
        (plan.from_json(made.to_json()), "does not hold what it was made of: choose the strategy size"),
        (recipes.make_plan(source, "nvfp4"), "does not hold what it was made of: choose the strategy size"),
        (split, "the plan has a split, which cannot be sampled"),
        (other, "was made for another file"),
    ):
        with pytest.raises(CalibQuantError, match=words):
            refine.refine(source, wrong, lambda *_: pytest.fail("sampled"))
    with pytest.raises(CalibQuantError, match="a sample is NaN or Inf"):
        refine.refine(source, made, lambda entries, _: [torch.full((3,), math.nan if entries else 1.0)])


# --- in ComfyUI

HOW = {"samples": 2, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "width": 64, "height": 64}
HOW |= {"frames": 1, "seed": 70, "minutes": 10.0, "measure_controls": False}


@pytest.fixture(scope="module")
def pack(comfy: Path) -> dict[str, Any]:
    nodes = importlib.import_module("nodes")
    assert asyncio.run(nodes.load_custom_node(str(models.ROOT)))
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture
def model(pack: dict[str, Any]) -> Any:
    with torch.inference_mode():
        return importlib.import_module("nodes").UNETLoader().load_unet(MODEL, "default")[0]


@pytest.fixture(scope="module")
def linked() -> SimpleNamespace:
    seen = calibration.load(DIGITS)
    return SimpleNamespace(current=lambda: seen)


def budgeted(pack: dict[str, Any], linked: Any, formats: str, bits: float) -> Plan:
    words = {"strategy": "bits", "bits": bits, "gpu": "blackwell", "formats": formats, "weighting": "auto"}
    words |= {"tie": False, "max_slow": 1.0}
    return execute(pack["CalibQuantPlan"], model_name=MODEL, strategy=words, calibration=linked).result[0]


def untouched(model: Any) -> bool:
    return hooks_on(model) == 0 and not any("forward" in vars(m) for m in model.model.diffusion_model.modules())


@pytest.mark.core
@pytest.mark.parametrize(("formats", "bits"), [("nvfp4", 16), ("mxfp8", 16), ("nvfp4,mxfp8,fp8,bf16", 6.2)])
def test_in_memory_a_plan_samples_as_its_file(
    formats: str, bits: float, pack: dict[str, Any], model: Any, linked: Any, comfy: Path, monkeypatch: Any
) -> None:
    made = budgeted(pack, linked, formats, bits)
    assert len(made.count()) == (4 if "bf16" in formats else 2)  # what lies outside the blocks stays
    words = {"model_name": MODEL, "filename_prefix": "refine/file", "verify": False}
    name = execute(pack["CalibQuantQuantize"], plan=made, **words).result[0]
    module, positive = sys.modules[pack["CalibQuantRefinePlan"].__module__], [[prompt_set(pack)[3]["cond"], {}]]
    with torch.inference_mode(), Source(DEMO) as source:
        drawn = module._sampler(model, source, made, lambda m, _: [ksampler(m, positive, steps=4)], None)
        exact, memory = drawn({}, "")[0], drawn(made.quantized(), "")[0]
        assert untouched(model) and torch.equal(ksampler(model, positive, steps=4), exact)
        emulate_native(monkeypatch)
        path = importlib.import_module("folder_paths").get_full_path("diffusion_models", name)
        loaded = ksampler(importlib.import_module("comfy.sd").load_diffusion_model(path), positive, steps=4)
    error, apart = ((a - b).square().sum().item() for a, b in ((loaded, exact), (memory, loaded)))
    assert error / exact.square().sum().item() > 1e-5
    assert apart < 1e-4 * error


def test_the_node_refines_and_a_cancel_leaves_nothing_behind(
    pack: dict[str, Any], model: Any, linked: Any, comfy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, node = budgeted(pack, linked, "nvfp4,mxfp8", 6.0), pack["CalibQuantRefinePlan"]
    inputs = {"model": model, "plan": made, "conditioning": prompt_set(pack), **HOW}
    done = execute(node, **inputs | {"measure_controls": True})
    refined, text = done.result
    (data,) = done.ui["calibquant_refined"]
    assert done.ui["text"] == (text,) and untouched(model)
    assert data["samples"] == 2 and len(data["blocks"]) == 6 and refined.seen is made.seen and refined.path == made.path
    assert refined.predicted["sampled"] == min(data["before"], data["after"] or 1) > 1e-5
    assert refined.predicted["bits"] <= 6.0 and all(c["measured"] > 0 for c in refined.predicted["controls"])
    assert "measured error of the final latent" in text and "6 of 6 blocks were measured alone" in text
    assert execute(node, **inputs | {"plan": refined, "minutes": 0.0}).result[0].predicted["sampled"] == pytest.approx(
        refined.predicted["sampled"]
    )
    files = sorted(comfy.rglob("*"))
    sampling = sys.modules[node.__module__].sampling
    interrupt, draws = importlib.import_module("comfy.model_management").InterruptProcessingException, []

    def draw(*words: Any) -> Any:
        def step(done: int, _of: int, _preview: Any) -> None:
            if len(draws) == 6 and done == 2:  # of a block
                assert not untouched(model)
                raise interrupt

        draws.append(words)
        return original(*words[:-1], step)

    original = sampling.draw
    monkeypatch.setattr(sampling, "draw", draw)
    with pytest.raises(interrupt):
        execute(node, **inputs)
    assert untouched(model) and sorted(comfy.rglob("*")) == files


def test_a_model_that_the_plan_is_not_for_is_refused(pack: dict[str, Any], model: Any, linked: Any) -> None:
    made, node = budgeted(pack, linked, "nvfp4,mxfp8", 6.0), pack["CalibQuantRefinePlan"]
    inputs = {"conditioning": prompt_set(pack), **HOW}
    nameless = model.clone()
    nameless.cached_patcher_init = None
    with pytest.raises(Exception, match="does not say which file it came from: load it with Load Diffusion Model"):
        execute(node, model=nameless, plan=made, **inputs)
    bypassed = model.clone()
    bypassed.set_injections("bypass_lora", [])
    with pytest.raises(Exception, match="the linked MODEL runs a bypass LoRA"):
        execute(node, model=bypassed, plan=made, **inputs)
    loaded = plan.from_json(made.to_json())
    with pytest.raises(Exception, match="does not hold what it was made of"):
        execute(node, model=model, plan=loaded, **inputs)
    with pytest.raises(Exception, match="cfg 2 needs a negative prompt"):
        execute(node, model=model, plan=made, **inputs | {"cfg": 2.0})


# --- through a real server


def test_the_workflow_saves_a_refined_plan(server: Server) -> None:
    prompt = json.loads((models.ROOT / "workflows" / "api" / "refine_demo_plan.json").read_text("utf-8"))
    prompt[of_type(prompt, "CalibQuantRefinePlan")]["inputs"] |= {"samples": 2, "steps": 4, "measure_controls": False}
    entry = server.post(prompt)
    refined, saved = (entry["outputs"][of_type(prompt, f"CalibQuant{name}")] for name in ("RefinePlan", "Quantize"))
    (data,) = refined["calibquant_refined"]
    assert (
        data["samples"] == 2
        and data["kept"] in ("refined", "given")
        and "blocks were measured alone" in refined["text"][0]
    )
    name = saved["text"][0].splitlines()[0]
    assert (server.output_dir / "diffusion_models" / name).stat().st_size < 0.6 * DEMO.stat().st_size
