"""Plans: complete, exact to the byte, and the same decisions as convert_to_quant's."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import models
import pytest
import reference
import torch
from keys import make_keys

from quant_core import jobs
from quant_core.errors import CalibQuantError
from quant_core.evidence import probe
from quant_core.formats import FORMATS
from quant_core.models.source import Source
from quant_core.planning import convert_to_quant, plan, recipes, scoring
from quant_core.planning.layout import predicted_size
from quant_core.planning.plan import Plan
from quant_core.reports import probe_report
from quant_core.rounding.layerplan import LayerPlan

# Every kind of source: how its file is made in a folder.
SOURCES: dict[str, Callable[[Path], Path]] = {
    "bare": lambda f: models.save(f / "m.safetensors", models.zimage(), {"format": "pt", "title": "Größe"}),
    "prefix": lambda f: models.save(f / "m.safetensors", models.prefixed(models.zimage(), "diffusion_model.")),
    "all-in-one": lambda f: models.save(f / "m.safetensors", models.all_in_one(models.zimage())),
    "sharded": lambda f: models.save_sharded(f / "shards", models.zimage(dtype=torch.float32)),
    "fp8 native": lambda f: save_scaled(f, models.native(models.zimage())),
    "fp8 per row": lambda f: save_scaled(f, models.native(models.zimage(), per_row=True)),
    "fp8 legacy": lambda f: save_scaled(f, models.legacy(models.zimage(), models.PREFIX)),
    "fp8 hswq": lambda f: save_scaled(f, models.hswq(models.zimage())),
    "wan": lambda f: models.save(f / "m.safetensors", models.wan()),
    "sd15": lambda f: models.save(f / "m.safetensors", models.sd15()),
    "sd15 hswq": lambda f: save_scaled(f, models.hswq(models.sd15())),
}
RECIPES = list(recipes.RECIPES)


def save_scaled(folder: Path, model: models.ScaledFP8) -> Path:
    return models.save(folder / "m.safetensors", model.tensors, model.metadata)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return models.save(tmp_path / "m.safetensors", models.zimage())


def make_plan(file: Path, recipe: recipes.Recipe | str) -> Plan:
    with Source(file) as source:
        return recipes.make_plan(source, recipe)


# --- size


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", SOURCES)
def test_the_size_is_foretold_to_the_byte(kind: str, recipe: str, tmp_path: Path) -> None:
    with Source(SOURCES[kind](tmp_path)) as source:
        if recipe.startswith("zimage") and source.architecture.name != "zimage":
            with pytest.raises(CalibQuantError, match="is for zimage"):
                recipes.make_plan(source, recipe)
            return
        made = recipes.make_plan(source, recipe)
        output = tmp_path / "out.safetensors"
        jobs.quantize(source, made, output, device="cpu")
        assert output.stat().st_size == made.size


# --- what is decided


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_layer_has_a_reason(recipe: str, file: Path) -> None:
    with Source(file) as source:
        made = recipes.make_plan(source, recipe)
        assert list(made.layers) == list(source.layers)
    assert all(entry.reason for entry in made.layers.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_protected_layers_stay(recipe: str, file: Path) -> None:
    made = make_plan(file, recipe)
    kept = {name for name, entry in made.layers.items() if entry.format == "bf16"}
    assert kept >= {
        *("x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        *("final_layer.linear", "final_layer.adaLN_modulation.1"),
    }


# A router beside its experts, and a table; both divide by everything.
NO_LINEARS = {
    f"{name}.weight": torch.ones(64, 64, dtype=torch.bfloat16)
    for name in ("layers.1.moe.gate", "layers.1.moe.experts.0.w1", "style_embedder")
}


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_what_is_no_linear_stays_even_where_a_rule_names_it(fmt: str, tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage() | NO_LINEARS)
    named = recipes.Recipe("mine", "mine", "bf16", (recipes.Rule("moe|style_embedder", fmt, "mine"),))
    made = make_plan(path, named).layers
    assert made["layers.1.moe.experts.0.w1"].format == fmt
    assert (made["layers.1.moe.gate"].format, made["style_embedder"].format) == ("bf16", "bf16")
    assert "router" in made["layers.1.moe.gate"].reason and "embeddings" in made["style_embedder"].reason


def test_convolutions_are_quantized_in_the_unscaled_dialect_only(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", models.sd15())
    convolutions = {"input_blocks.1.0.in_layers.2", "input_blocks.1.1.proj_in"}
    for recipe in ("nvfp4", "mxfp8", "fp8", "int8"):
        assert not convolutions & set(make_plan(path, recipe).layers)
    assert convolutions <= set(make_plan(path, "fp8-unscaled").quantized())


@pytest.mark.parametrize(
    ("recipe", "shape", "expected", "reason"),
    [
        ("nvfp4", (64, 48), "float8_e4m3fn", "64x48 does not divide by 32"),
        ("nvfp4", (64, 64), "nvfp4", "recipe nvfp4"),
        ("mxfp8", (40, 64), "float8_e4m3fn", "40x64 does not divide by 32"),
        ("int8", (5, 3), "int8_tensorwise", "recipe int8"),
        ("fp8", (5, 3), "float8_e4m3fn", "recipe fp8"),
    ],
)
def test_a_shape_that_does_not_divide_falls_back_with_its_reason(
    recipe: str, shape: tuple[int, int], expected: str, reason: str, tmp_path: Path
) -> None:
    tensors = models.zimage() | {"layers.0.attention.out.weight": torch.ones(shape, dtype=torch.bfloat16)}
    entry = make_plan(models.save(tmp_path / "m.safetensors", tensors), recipe).layers["layers.0.attention.out"]
    assert entry.format == expected and reason in entry.reason


# --- the published Z-Image recipes on the true shapes (facts/seeds.md E)


@pytest.fixture(scope="module")
def true_zimage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 GB of zeros that take no room."""
    return models.save_sparse(tmp_path_factory.mktemp("z") / "z.safetensors", make_keys.load("zimage"))


@pytest.mark.parametrize(
    ("recipe", "counts", "size"),
    [
        ("zimage-nvfp4-mixed", {"nvfp4": 120, "mxfp8": 66, "bf16": 16}, 4.84e9),
        ("zimage-mxfp8-uniform", {"mxfp8": 185, "bf16": 17}, 6.67e9),
    ],
)
def test_the_published_recipes(recipe: str, counts: dict[str, int], size: float, true_zimage: Path) -> None:
    with Source(true_zimage) as source:
        made = recipes.make_plan(source, recipe)
        listed = {name: entry for name, entry in made.layers.items() if source.layers[name].block is not None}
    assert len(listed) == 202
    assert replace(made, layers=listed).count() == counts
    assert made.size == pytest.approx(size, rel=0.01)


# --- JSON


def test_a_plan_survives_json(file: Path, tmp_path: Path) -> None:
    for recipe in RECIPES:
        made = make_plan(file, recipe)
        made.save(tmp_path / "plan.json")
        assert plan.load(tmp_path / "plan.json") == made


def test_a_plan_never_replaces_a_model(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: is a model's name"):
        make_plan(file, "mxfp8").save(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "scale", ["NaN", "Infinity", "-Infinity", "0", "-1", "1e39", "1e-39", "1" * 400, '"1"', "true"]
)
def test_an_input_scale_that_no_loader_can_use_is_refused(scale: str, file: Path) -> None:
    text = make_plan(file, "fp8").to_json()
    message = r"layer layers\.0\.attention\.out: input_scale "
    layer = text.index('"layers.0.attention.out"')
    damaged = text[:layer] + text[layer:].replace('"input_scale": null', f'"input_scale": {scale}', 1)
    # What is no number in JSON is named by its place in the document, a number of 400 digits by its length.
    no_number = "number of 400 digits" if len(scale) > 20 else r"layers\.0\.attention\.out / input_scale is"
    with pytest.raises(CalibQuantError, match=f"^p.json: ({message}|is no plan .*{no_number})"):
        plan.from_json(damaged, "p.json")
    made = make_plan(file, "fp8")
    entry = replace(made.layers["layers.0.attention.out"], input_scale=json.loads(scale))
    with Source(file) as source, pytest.raises(CalibQuantError, match=message):
        predicted_size(source, replace(made, layers={**made.layers, "layers.0.attention.out": entry}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(format_version=2), "plan format version 2 is not 1"),
        (lambda p: p.pop("format_version"), "plan format version None"),
        (lambda p: p.pop("layers"), "is no plan"),
        (lambda p: p.update(layers=["layers.0.attention.out"]), "is no plan"),
        (lambda p: p["layers"].update({"layers.0.attention.out": "nvfp4"}), "is no plan"),
        (lambda p: p["layers"]["layers.0.attention.out"].pop("format"), "is no plan"),
        (
            lambda p: p["layers"]["layers.0.attention.out"].update(format="fp3"),
            "layers.0.attention.out: unknown format",
        ),
    ],
)
def test_a_damaged_plan_is_refused(change: Callable[[dict], object], message: str, file: Path) -> None:
    raw = json.loads(make_plan(file, "mxfp8").to_json())
    change(raw)
    with pytest.raises(CalibQuantError, match=f"^p.json: .*{message}"):
        plan.from_json(json.dumps(raw), "p.json")


@pytest.mark.parametrize("text", ["", "[]", "5", "{"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(CalibQuantError, match=r"^p\.json: "):
        plan.from_json(text, "p.json")


@pytest.mark.parametrize(
    ("layer", "fmt", "message"),
    [
        ("layers.9.attention.out", "mxfp8", "has no layer layers.9.attention.out"),
        ("layers.0.attention_norm", "bf16", "has no layer layers.0.attention_norm"),
        ("cap_embedder.1", "nvfp4", "layer cap_embedder.1 cannot be nvfp4: ComfyUI reads"),
        ("layers.0.attention.out", "nvfp4", "layer layers.0.attention.out cannot be nvfp4: 64x48"),
        ("layers.0.attention.out", "mxfp8", "layer layers.0.attention.out cannot be mxfp8: 64x48"),
        ("patch.conv", "int8_tensorwise", "layer patch.conv cannot be int8_tensorwise: only 2-D"),
        ("layers.1.moe.gate", "float8_e4m3fn", "layer layers.1.moe.gate cannot be float8_e4m3fn: router of a mixture"),
        ("style_embedder", "int8_tensorwise", "layer style_embedder cannot be int8_tensorwise: table of embeddings"),
    ],
)
def test_a_plan_that_does_not_fit_the_file_is_refused(layer: str, fmt: str, message: str, tmp_path: Path) -> None:
    odd = {"layers.0.attention.out.weight": torch.ones(64, 48), "patch.conv.weight": torch.ones(32, 32, 1, 1)}
    path = models.save(tmp_path / "m.safetensors", models.zimage() | odd | NO_LINEARS)
    with Source(path) as source:
        by_hand = Plan("zimage", "by hand", "m.safetensors", {layer: LayerPlan(fmt, "a wish")})
        with pytest.raises(CalibQuantError, match=f"^{re.escape(str(path))}: {message}"):
            predicted_size(source, by_hand)


# --- convert_to_quant: the real tool decides on the same file

NEEDS_TOOL = pytest.mark.skipif(
    importlib.util.find_spec("convert_to_quant") is None, reason="convert_to_quant is not installed"
)
CUSTOM = r"layers\.0\.attention|adaLN_modulation\.0|refiner\.0\.feed_forward\.w2"
EXCLUDED = r"layers\.0\.attention\.out|layers\.1\.feed_forward|noise_refiner|final"
# Without a GPU the tool refuses mixtures, unless the device is spelled like this; few samples for its bias step.
ON_CPU = ["--device", "cpu:0", "--calib_samples", "8", "--simple", "--custom-simple", "--comfy_quant"]


def formats_of(made: Plan) -> dict[str, str]:
    return {name: entry.format for name, entry in made.layers.items()}


@NEEDS_TOOL
def test_a_probes_printed_command_makes_the_tool_decide_so(tmp_path: Path) -> None:
    file = models.save(tmp_path / "m.safetensors", models.zimage())
    probed = probe.probe(file)
    options = scoring.ScoreOptions(fp8_percentile=40, keep_percentile=80, kurtosis_keep=float("inf"))
    scored = scoring.decide(probed, options)
    assert all(scored.count().values())  # KEEP, FP8 and NVFP4 all occur
    program, *words = shlex.split(probe_report.suggestion(probed, scored, str(file)))
    output = Path(words[words.index("-o") + 1])
    assert program == "convert_to_quant" and output.parent == tmp_path
    wanted = scoring.formats(scored, [layer.name for layer in probed.layers])
    assert run_tool(words, output) == {name: fmt for name, fmt in wanted.items() if fmt != "bf16"}


def run_tool(arguments: list[str], output: Path) -> dict[str, str]:
    """Layer -> format as the real tool decided."""
    command = models.python("from convert_to_quant import main; main()", *arguments, *ON_CPU)
    done = subprocess.run(command, capture_output=True, text=True)
    assert output.exists(), done.stderr[-2000:] + done.stdout[-2000:]
    return {layer: str(config["format"]) for layer, config in reference.File(output).configs().items()}


@NEEDS_TOOL
@pytest.mark.parametrize(
    ("base", "custom", "presets"),
    [("nvfp4", "mxfp8", ["zimage"]), ("mxfp8", "fp8", []), ("fp8", "nvfp4", ["zimage_refiner"])],
)
def test_the_same_words_decide_as_the_real_tool(
    base: str, custom: str, presets: list[str], file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tool.safetensors"
    words = ["-i", str(file), "-o", str(output), "--custom-layers", CUSTOM, "--custom-type", custom]
    words += ["--exclude-layers", EXCLUDED, *(f"--{p}" for p in presets), *([] if base == "fp8" else [f"--{base}"])]
    tool = run_tool(words, output)
    with Source(file) as source:
        ours = recipes.make_plan(source, recipes.from_convert_to_quant(base, CUSTOM, custom, EXCLUDED, presets))
        infos = source.layers
    differing = {name for name, entry in ours.layers.items() if entry.format != tool.get(name, "bf16")}
    # Our vetoes: layers outside the blocks, which the tool quantizes unless a preset names them.
    assert all(infos[name].protected and ours.layers[name].format == "bf16" for name in differing)
    assert differing <= {"x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"}
    # What this model and these words must show: custom beats exclusion and preset, exclusion beats base.
    out_0, gate_1, modulation = "layers.0.attention.out", "layers.1.feed_forward.w1", "layers.1.adaLN_modulation.0"
    assert tool[out_0] == tool[modulation] == convert_to_quant.TYPES[custom] and gate_1 not in tool


@NEEDS_TOOL
def test_the_real_tool_makes_our_plan_from_our_command(file: Path, tmp_path: Path) -> None:
    made = make_plan(file, "zimage-nvfp4-mixed")
    assert set(made.count()) == {"nvfp4", "mxfp8", "bf16"}
    output = tmp_path / "tool.safetensors"
    program, *words = shlex.split(convert_to_quant.to_command(formats_of(made), str(file), str(output)))
    assert program == "convert_to_quant"
    tool = run_tool(words, output)
    assert tool == {name: fmt for name, fmt in formats_of(made).items() if fmt != "bf16"}


@pytest.mark.parametrize("formats", [["float8_e4m3fn_unscaled"], ["bf16"], ["nvfp4", "mxfp8", "int8_tensorwise"]])
def test_what_the_tool_cannot_say_is_refused(formats: list[str]) -> None:
    with pytest.raises(CalibQuantError, match="convert_to_quant takes one base format"):
        convert_to_quant.to_command({f"layers.{i}.w1": fmt for i, fmt in enumerate(formats)}, "a", "b")


def test_a_folded_pattern_matches_exactly_its_layers() -> None:
    layers = ["layers.1.attention.out", "layers.11.attention.out", "x_embedder", "layers.2.w1"]
    others = ["layers.111.attention.out", "control_layers.1.attention.out", "layers.1.attention.out2", "layers.1.w1"]
    pattern = re.compile(convert_to_quant.exact_pattern(layers))
    assert all(pattern.search(f"{name}.weight") for name in layers)
    assert not any(pattern.search(f"{name}.weight") for name in others)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fp3",), "unknown convert_to_quant type 'fp3'"),
        (("fp8", "x"), "belong together"),
        (("fp8", None, None, None, ["flux2"]), "unknown preset 'flux2'"),
    ],
)
def test_words_the_tool_would_not_take_are_refused(words: tuple, message: str) -> None:
    with pytest.raises(CalibQuantError, match=message):
        recipes.from_convert_to_quant(*words)


def test_a_pattern_that_is_no_regular_expression_is_refused(file: Path) -> None:
    with pytest.raises(CalibQuantError, match=r"layer pattern '\(' is no regular expression"):
        make_plan(file, recipes.from_convert_to_quant("fp8", "(", "mxfp8"))


def test_patterns_that_match_nothing_are_named(file: Path) -> None:
    with Source(file) as source:
        words = recipes.from_convert_to_quant("nvfp4", r"atention", "mxfp8", r"\.w1", presets=("zimage",))
        assert recipes.unmatched(source, words) == [
            "the pattern 'atention' (custom layer) matches no layer of this model"
        ]
        assert not recipes.unmatched(source, recipes.by_recipe_name("nvfp4"))
