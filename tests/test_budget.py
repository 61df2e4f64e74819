"""Plans for a size, bits a weight or an error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import models
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_core import jobs
from quant_core.cli import main
from quant_core.errors import CalibQuantError
from quant_core.evidence import probe
from quant_core.models.source import Source
from quant_core.planning import budget, costs, outlook, plan, targets
from quant_core.planning.allocation import Item, least_bytes, least_damage
from quant_core.planning.budget import Wish
from quant_core.planning.plan import Plan
from quant_core.reports import planned
from quant_core.rounding.layerplan import LayerPlan

FORMATS = "nvfp4,fp8,mxfp8,int8,bf16"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


def make(file: Path, wish: Wish, gpu: str = "blackwell", formats: str = FORMATS, weighting: str | None = None) -> Plan:
    probed = probe.probe(file)
    with Source(file) as source:
        how = costs.made_with(source, gpu, costs.choose_options(formats, gpu, None))
        return budget.plan(source, costs.guess(source, probed, how), wish, weighting=weighting, probed=probed)


# --- the solver

# Items of one to four options each: damages over many orders of magnitude, bytes of any size.
ITEMS = st.lists(
    st.lists(st.tuples(st.floats(1e-8, 1.0), st.integers(1, 10**9), st.integers(0, 3)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
).map(lambda rows: [Item(*(np.array(column, np.float64) for column in zip(*row, strict=True))) for row in rows])


@settings(max_examples=60, deadline=None)
@given(ITEMS, st.floats(0, 1), st.sampled_from([None, 0.0, 3.0]), st.booleans())
def test_the_solver_finds_what_trying_everything_finds(
    items: list[Item], share: float, max_slow: float | None, fewest_bytes: bool
) -> None:
    wanted, bounded = [(i.nbytes, i.damage) if fewest_bytes else (i.damage, i.nbytes) for i in items], None
    low, high = (sum(pick(b) for _, b in wanted) for pick in (min, max))
    limit = low + share * (high - low)
    best = None
    for chosen in itertools.product(*(range(len(i.damage)) for i in items)):
        bounded = sum(b[c] for (_, b), c in zip(wanted, chosen, strict=True))
        slow = sum(i.slow[c] for i, c in zip(items, chosen, strict=True))
        if bounded <= limit * (1 + 1e-9) and (max_slow is None or slow <= max_slow):
            value = sum(w[c] for (w, _), c in zip(wanted, chosen, strict=True))
            best = value if best is None else min(best, value)
    found = (least_bytes if fewest_bytes else least_damage)(items, limit, max_slow)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.total([w for w, _ in wanted]) <= best * (1 + 2e-4)
        assert found.total([b for _, b in wanted]) <= limit * (1 + 1e-9)
        assert max_slow is None or found.total([i.slow for i in items]) <= max_slow


# --- plans


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.77])
def test_a_file_is_never_larger_than_asked_for_and_wastes_little(file: Path, share: float, tmp_path: Path) -> None:
    low, high = (make(file, Wish(*wish)).size for wish in (("max_error", 1e9), ("size", 1e9)))
    target = int(low + share * (high - low))
    made, output = make(file, Wish("size", target)), tmp_path / "q.safetensors"
    with Source(file) as source:
        jobs.quantize(source, made, output, device="cpu")
    assert output.stat().st_size == made.size
    assert target - 10_000 < made.size <= target  # the layers of this model differ by thousands of bytes


def test_bits_count_every_byte_of_the_layers_that_are_planned(file: Path, tmp_path: Path) -> None:
    made, output = make(file, Wish("bits", 7.0)), tmp_path / "q.safetensors"
    with Source(file) as source:
        report = jobs.quantize(source, made, output, device="cpu")
        planned_layers = [n for n, info in source.layers.items() if not info.protected]
        weights = sum(source.shape(n)[0] * source.shape(n)[1] for n in planned_layers)
    stored = sum(layer.nbytes for layer in report.layers if layer.name in planned_layers)
    assert made.predicted is not None and made.predicted["bits"] == pytest.approx(8 * stored / weights)
    assert 6.8 < 8 * stored / weights <= 7.0


def test_the_smallest_file_within_an_error_is_the_least_error_of_its_size(file: Path) -> None:
    made = make(file, Wish("max_error", 0.003))
    assert made.predicted is not None and 0.002 < made.predicted["error"] <= 0.003
    again = make(file, Wish("size", made.size + 8)).predicted  # the plan's name is as long, or a word shorter
    assert again is not None and again["error"] == pytest.approx(made.predicted["error"], rel=0.02)


def test_more_bytes_never_mean_more_error(file: Path) -> None:
    found = make(file, Wish("bits", 7.0)).predicted
    assert found is not None and len(found["curve"]) == outlook.POINTS
    errors, sizes = [p["error"] for p in found["curve"]], [p["size"] for p in found["curve"]]
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert errors[-1] == 0.0 < errors[-2]


def test_a_plan_shows_the_uniform_plan_of_its_size_and_is_no_worse(file: Path) -> None:
    made = make(file, Wish("bits", 8.3))
    assert made.predicted is not None
    control = made.predicted["controls"][0]
    assert control["name"].startswith("every layer") and control["size"] <= made.size
    assert made.predicted["error"] <= control["error"]
    assert any(p["name"] == "recipe zimage-nvfp4-mixed" for p in made.predicted["points"])
    uniform = next(p for p in made.predicted["points"] if p["name"] == "every layer mxfp8")
    by_error = make(file, Wish("max_error", uniform["error"]))
    assert by_error.size < uniform["size"]


def test_tied_layers_get_one_format(file: Path) -> None:
    pairs = [(f"layers.{i}.feed_forward.w1", f"layers.{i}.feed_forward.w3") for i in range(2)]

    def same(made: Plan) -> list[bool]:
        return [made.layers[a].format == made.layers[b].format for a, b in pairs]

    assert all(same(make(file, Wish("bits", 7.0, tied=True))))
    assert not all(same(make(file, Wish("bits", 7.0))))


def test_at_most_so_much_work_is_slow(file: Path) -> None:
    free, held = (make(file, Wish("bits", 10, max_slow=most), "ada", "nvfp4,int8,bf16") for most in (None, 0.05))
    assert free.predicted is not None and held.predicted is not None
    assert free.predicted["native_share"] < 0.9 < 0.95 <= held.predicted["native_share"]
    assert held.predicted["error"] > free.predicted["error"]


@pytest.mark.parametrize("wish", [Wish("size", 1000), Wish("bits", 4.0), Wish("size", 1e9, max_slow=0.0)])
def test_what_cannot_be_had_is_one_error_with_a_remedy(file: Path, wish: Wish) -> None:
    smallest = make(file, Wish("max_error", 1e9)).size
    formats = FORMATS if wish.max_slow is None else "nvfp4,bf16"
    with pytest.raises(CalibQuantError, match="allow more, or other formats") as caught:
        make(file, wish, "ada", formats)
    if wish.kind == "size" and wish.max_slow is None:
        named = int(str(caught.value).split(" bytes (")[0].split()[-1])
        assert abs(named - smallest) <= 16  # the wishes' names differ by 11 bytes, and headers are padded to 8
        assert make(file, Wish("size", named)).size <= named


def test_protected_layers_stay_and_every_layer_has_a_reason(file: Path) -> None:
    made = make(file, Wish("bits", 5.0))
    with Source(file) as source:
        assert all(made.layers[n].format == "bf16" for n, info in source.layers.items() if info.protected)
    assert all("damage" in entry.reason for entry in made.quantized().values())


@pytest.mark.parametrize("weighting", ["score", "uniform"])
def test_without_a_calibration_the_plan_says_that_it_guessed(file: Path, weighting: str) -> None:
    said = "\n".join(planned.lines(make(file, Wish("bits", 6.0), weighting=weighting)))
    assert "guessed: without a calibration" in said and "relative weight error" in said


def test_weightings_that_lack_their_evidence_say_so(file: Path) -> None:
    for weighting, lacks in (("gradient", "says nothing of sensitivity"), ("hswq", "needs a calibration")):
        with pytest.raises(CalibQuantError, match=lacks):
            make(file, Wish("bits", 6.0), weighting=weighting)


# --- words


@pytest.mark.parametrize(
    ("gpu", "native"),
    [
        ("blackwell", {"nvfp4", "mxfp8", "float8_e4m3fn", "asym_w4a8_int8", "int8_tensorwise"}),
        ("hopper", {"float8_e4m3fn", "asym_w4a8_int8", "int8_tensorwise"}),
        ("ada", {"float8_e4m3fn", "asym_w4a8_int8", "int8_tensorwise"}),
        ("ampere", {"asym_w4a8_int8", "int8_tensorwise"}),
        ("turing", {"int8_tensorwise"}),
        ("any", {"int8_tensorwise"}),
    ],
)
def test_what_runs_natively_where(gpu: str, native: set[str]) -> None:
    tried = ("nvfp4", "mxfp8", "float8_e4m3fn", "asym_w4a8_int8", "int8_tensorwise", "bf16", "float8_e4m3fn_unscaled")
    assert {fmt for fmt in tried if targets.speed(LayerPlan(fmt, ""), gpu) == "native"} == native
    rounded = {fmt for fmt in tried if targets.rounds_inputs(LayerPlan(fmt, ""), gpu)}
    # comfy/ops.py: mixed_precision_ops disables only nvfp4, mxfp8 and fp8; int8 layers quantize by themselves
    assert rounded == (set(tried[:5]) if gpu == "any" else native | {"asym_w4a8_int8", "int8_tensorwise"})
    assert targets.speed(LayerPlan("nvfp4", "", full_precision=True), gpu) == "emulated"
    assert not targets.rounds_inputs(LayerPlan("nvfp4", "", full_precision=True), gpu)


def test_the_plan_says_what_to_expect_on_the_card(file: Path) -> None:
    said = "\n".join(planned.lines(make(file, Wish("bits", 5.0), gpu="ampere", formats="nvfp4,w4a8,bf16")))
    for words in (
        "on Ampere: of the layers ",
        "emulated",
        "needs ComfyUI 0.31 or newer",
        "LoRAs: bake them in",
        "control: ",
    ):
        assert words in said


def test_formats_that_no_comfyui_at_hand_reads_are_taken_only_by_name() -> None:
    assert "w4a8" not in costs.choose_options(None, "ada", None)
    assert costs.choose_options("w4a8, bf16", "ada", None) == ("w4a8", "bf16")
    with pytest.raises(CalibQuantError, match="format 'fp4': use some of nvfp4,"):
        costs.choose_options("fp4", "ada", None)


# --- plans as files, the command line


def test_a_plan_comes_back_from_its_file_and_old_ones_load(file: Path, tmp_path: Path) -> None:
    made = make(file, Wish("bits", 6.0))
    made.save(tmp_path / "p.json")
    assert plan.load(tmp_path / "p.json") == made
    raw = json.loads(made.to_json())
    del raw["gpu"], raw["predicted"]
    assert plan.from_json(json.dumps(raw)).layers == made.layers


def test_the_command_line_plans_draws_and_quantizes(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    words = ["--bits", "6", "--gpu", "ada", "--formats", FORMATS]
    out, drawn, table = tmp_path / "p.json", tmp_path / "c.svg", tmp_path / "t.json"
    assert main(["plan", str(file), *words, "-o", str(out), "--plot", str(drawn), "--table", str(table)]) == 0
    said = capfd.readouterr().out
    assert "at 5." in said and "control: every layer" in said and "Highs" not in said
    assert "this plan" in "".join(ElementTree.parse(drawn).getroot().itertext())
    before = table.stat().st_mtime_ns
    again = tmp_path / "again.json"
    assert main(["plan", str(file), *words, "-o", str(again), "--table", str(table)]) == 0
    assert table.stat().st_mtime_ns == before and again.read_text() == out.read_text()
    assert main(["plan", str(file), "--bits", "6", "--gpu", "any", "--table", str(table), "-o", str(again)]) == 1
    assert "was made with another gpu" in capfd.readouterr().err
    assert main(["quantize", str(file), *words, "-o", str(tmp_path / "q.safetensors"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["bytes_after"] == plan.load(out).size


@pytest.mark.parametrize(
    "words", [["--bits", "5", "--size", "1"], ["--bits", "5", "--recipe", "nvfp4"], ["--recipe", "nvfp4", "--tie"]]
)
def test_budgets_go_with_nothing_else(file: Path, words: list[str], tmp_path: Path) -> None:
    assert main(["plan", str(file), *words, "-o", str(tmp_path / "p.json")]) == 2
