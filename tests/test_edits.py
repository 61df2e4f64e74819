"""Layers set by hand: in the optimum, over other strategies, on the command line; the document of the map."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import models
import pytest

from quant_core.cli import main
from quant_core.errors import CalibQuantError
from quant_core.evidence import probe
from quant_core.models.source import Source
from quant_core.planning import budget, costs, edits, outlook, plan, recipes, rotation, weighing
from quant_core.planning.budget import Wish
from quant_core.planning.plan import Plan
from quant_core.reports import plan_map

FORMATS = "nvfp4,fp8,mxfp8,bf16"
QKV, OUT = "layers.0.attention.qkv", "layers.1.attention.out"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


def table_of(source: Source, formats: str = FORMATS) -> costs.CostTable:
    how = costs.made_with(source, "blackwell", costs.choose_options(formats, "blackwell", None))
    return costs.guess(source, probe.probe(source.path), how)


def make(file: Path, wish: Wish, formats: str = FORMATS) -> Plan:
    with Source(file) as source:
        return budget.plan(source, table_of(source, formats), wish)


def test_with_fixed_layers_the_rest_is_the_best_that_trying_everything_finds(file: Path) -> None:
    with Source(file) as source:
        table = table_of(source, "nvfp4,mxfp8")
        fixed = dict(zip(table.layers, itertools.cycle(["mxfp8", "nvfp4", "bf16"])))
        free = list(table.layers)[:7]
        for name in free:
            del fixed[name]
        wish = Wish("bits", 8.0, fixed=fixed)
        made = budget.plan(source, table, wish)
        weights = {name: source.shape(name)[0] * source.shape(name)[1] for name in table.layers}
        kept = sum(2 * weights[name] for name, option in fixed.items() if option == "bf16")
    costs_of = {name: table.layers[name] for name in table.layers}
    known = [(n, o) for n, o in fixed.items() if o != "bf16"]
    allowed = 8.0 * sum(weights.values()) / 8 - kept - sum(costs_of[n][o].nbytes for n, o in known)
    best = min(
        sum(costs_of[n][o].error for n, o in zip(free, chosen, strict=True))
        for chosen in itertools.product(("nvfp4", "mxfp8"), repeat=len(free))
        if sum(costs_of[n][o].nbytes for n, o in zip(free, chosen, strict=True)) <= allowed
    )
    titles = {fmt: option for option, (fmt, _) in costs.OPTIONS.items() if option in ("nvfp4", "mxfp8", "bf16")}
    assert {n: titles[made.layers[n].format] for n in fixed} == fixed
    assert sum(costs_of[n][titles[made.layers[n].format]].error for n in free) == pytest.approx(best, rel=1e-3)
    assert all(made.layers[n].reason.startswith(edits.REASON) for n in fixed)


def test_a_layer_set_by_hand_leaves_its_tied_group(file: Path) -> None:
    w1, w3 = "layers.0.feed_forward.w1", "layers.0.feed_forward.w3"
    made = make(file, Wish("bits", 6.0, tied=True, fixed={w1: "bf16"}))
    assert made.layers[w1].format == "bf16" != made.layers[w3].format
    with Source(file) as source:
        assert made.size == recipes.sized(source, made).size


@pytest.mark.parametrize(
    ("layer", "option", "says"),
    [
        ("layers.9.attention.qkv", "mxfp8", "not in this file: take it out"),
        ("x_embedder", "mxfp8", "cannot be set by hand: embedder: .*: take it out"),
        ("t_embedder.mlp.2", "bf16", "cannot be set by hand"),
        (QKV, "fp4", "unknown format 'fp4': use one of nvfp4, "),
        (QKV, "int8", "not among the formats of this plan: add it to --formats"),
    ],
)
def test_what_cannot_be_set_is_one_error_that_names_file_layer_and_remedy(
    file: Path, layer: str, option: str, says: str
) -> None:
    with pytest.raises(CalibQuantError, match=rf"m\.safetensors: layer {layer}: .*{says}"):
        make(file, Wish("bits", 6.0, fixed={layer: option}))


def test_a_shape_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    layer = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    says = rf"m\.safetensors: layer {layer}: cannot be NVFP4: .*: set another format"
    with Source(models.save(tmp_path / "m.safetensors", models.sd15())) as source:
        with pytest.raises(CalibQuantError, match=says):
            edits.entry(source, layer, "nvfp4")
        assert edits.entry(source, layer, "fp8").format == "float8_e4m3fn"


def test_a_recipe_takes_edits_and_rotation_leaves_them_alone(file: Path) -> None:
    with Source(file) as source:
        recipe = recipes.make_plan(source, "int8")
        made = edits.applied(source, recipe, {QKV: "int8", OUT: "mxfp8"})
        turned = rotation.rotated(source, made, "always", but=[QKV])
        assert edits.applied(source, recipe, {}) is recipe
    assert made.layers[OUT].format == "mxfp8" and made.size > recipe.size
    assert turned.layers[QKV].format == "int8_tensorwise" and turned.layers[OUT].format == "mxfp8"
    assert [e.format for e in turned.layers.values()].count("int8_convrot") > 3


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 4}', '{"a": "nvfp4", "a": "fp8"}', "nvfp4"])
def test_edits_that_are_no_object_of_words_are_one_clear_error(text: str) -> None:
    with pytest.raises(CalibQuantError, match=r'^edits are .*: write {"LAYER": "FORMAT", …}, or leave them empty$'):
        edits.from_json(text)
    assert edits.from_json(" ") == {} and edits.from_json('{"a": "nvfp4"}') == {"a": "nvfp4"}


def test_the_command_line_sets_layers_by_name_and_by_pattern(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "p.json"
    words = ["--set", r".*\.attention\.out=mxfp8", "--set", f"{OUT}=bf16"]
    for way in (["--recipe", "nvfp4"], ["--bits", "6", "--gpu", "blackwell", "--formats", FORMATS]):
        assert main(["plan", str(file), *way, *words, "-o", str(out)]) == 0
        layers = plan.load(out).layers
        outs = {name for name in layers if name.endswith(".attention.out")}
        assert len(outs) == 4 and layers[OUT].format == "bf16"
        assert {layers[name].format for name in outs - {OUT}} == {"mxfp8"}
    capfd.readouterr()
    assert main(["plan", str(file), "--recipe", "nvfp4", "--set", "nothing=mxfp8", "-o", str(out)]) == 1
    assert "m.safetensors: --set nothing=mxfp8: matches no layer" in capfd.readouterr().err
    for wrong in ("layers", "(=mxfp8", f"{QKV}=fp4"):
        with pytest.raises(SystemExit, match="2"):
            main(["plan", str(file), "--recipe", "nvfp4", "--set", wrong, "-o", str(out)])
    assert main(["quantize", str(file), "--plan", str(out), "--set", f"{QKV}=bf16", "-o", str(tmp_path / "q")]) == 2


# --- the document of the map


def drawn(file: Path, wish: Wish, formats: str = FORMATS) -> tuple[dict[str, Any], Plan]:
    with Source(file) as source:
        table = table_of(source, formats)
        made = budget.plan(source, table, wish)
        priced = table, weighing.weigh(source, table)[1]
        return plan_map.document(source, made, table.options, wish.fixed, priced), made


def rows_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(document["fields"], row, strict=True)) for row in document["layers"]]


def size_of(document: dict[str, Any], chosen: list[int]) -> int:
    free = [row for row in rows_of(document) if not row["protected"]]
    return document["fixed"] + sum(sum(row["costs"][i][:2]) for row, i in zip(free, chosen, strict=True))


@pytest.mark.parametrize("fixed", [{}, {QKV: "bf16", OUT: "nvfp4"}])
def test_the_map_adds_up_to_the_plan(file: Path, fixed: dict[str, str]) -> None:
    document, made = drawn(file, Wish("bits", 6.0, fixed=fixed))
    free = [row for row in rows_of(document) if not row["protected"]]
    chosen = [row["chosen"] for row in free]
    assert size_of(document, chosen) == made.size == document["size"]
    assert made.predicted is not None
    damage = sum(row["costs"][i][3] for row, i in zip(free, chosen, strict=True))
    assert damage == pytest.approx(made.predicted["error"], rel=1e-3)
    bits = 8 * sum(row["costs"][i][0] for row, i in zip(free, chosen, strict=True)) / document["weights"]
    assert bits == pytest.approx(made.predicted["bits"]) and document["edits"] == fixed and document["kind"] == "bits"
    assert {row["name"]: document["options"][row["chosen"]][0] for row in free if row["name"] in fixed} == fixed


def test_every_point_of_the_curve_is_the_file_that_its_choice_makes(file: Path) -> None:
    with Source(file) as source:
        table = table_of(source)
        first = budget.plan(source, table, Wish("bits", 6.0))
        document = plan_map.document(source, first, table.options, {}, (table, weighing.weigh(source, table)[1]))
    free = [row["name"] for row in rows_of(document) if not row["protected"]]
    names = [name for name, _, _ in document["options"]]
    assert len(document["curve"]) == outlook.POINTS
    for point in document["curve"][::4]:
        chosen = [int(digit, 36) for digit in point["chosen"]]
        fixed = {name: names[i] for name, i in zip(free, chosen, strict=True)}
        with Source(file) as source:
            made = budget.plan(source, table, Wish("max_error", 1.0, fixed=fixed))
        longer = len(f"{edits.REASON}; ") * len(free)  # the header says of each that it is set by hand
        digits = 16 * len(free)  # of offsets in the header, which only the plan itself knows
        assert abs(made.size - longer - size_of(document, chosen)) < digits
        assert abs(point["size"] - size_of(document, chosen)) < digits
        assert made.predicted is not None and made.predicted["error"] == pytest.approx(point["error"], rel=1e-3)


def test_a_plan_without_a_table_draws_its_sizes_and_what_is_no_option(file: Path) -> None:
    with Source(file) as source:
        made = recipes.make_plan(source, "fp8-unscaled")
        document = plan_map.document(source, made, ["nvfp4", "mxfp8"], {})
    free = [row for row in rows_of(document) if not row["protected"]]
    assert document["options"] == [
        ["nvfp4", "NVFP4", True],
        ["mxfp8", "MXFP8", True],
        ["bf16", "BF16", True],
        ["float8_e4m3fn_unscaled", "FP8 without scale", False],
    ]
    assert {row["chosen"] for row in free} == {3} and all(len(row["costs"][0]) == 2 for row in free)
    assert size_of(document, [3] * len(free)) == made.size and "curve" not in document


def test_a_thousand_layers_stay_below_half_a_megabyte(tmp_path: Path) -> None:
    shapes = {name: tuple(t.shape) for name, t in models.zimage(layers=170).items()}
    path = models.save_sparse(tmp_path / "m.safetensors", shapes)
    options = tuple(costs.OPTIONS)
    with Source(path) as source:
        made = recipes.make_plan(source, "nvfp4")
        worst = {o: costs.Cost(0.0012345678, 123456789, "native", 0.000012345678) for o in options}
        how = costs.made_with(source, "blackwell", options)
        table = costs.CostTable(how, {name: worst for name, info in source.layers.items() if not info.protected})
        priced = table, {name: {o: 0.000012345678 for o in options} for name in table.layers}
        document = plan_map.document(source, made, options, {}, priced)
    assert len(document["layers"]) > 1000
    assert len(json.dumps(document)) < 500_000
