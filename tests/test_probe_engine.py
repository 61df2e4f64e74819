"""The probe: statistics against SciPy, measured errors against the real formats, decisions against plain formulas."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

from quant_core.errors import CalibQuantError, OptionError
from quant_core.evidence import measure, probe
from quant_core.formats import FORMATS
from quant_core.models.source import Source
from quant_core.planning import recipes, scoring
from quant_core.reports import probe_report
from quant_core.rounding import pack


def heavy_tailed(shapes: dict[str, tuple[int, int]], seed: int = 3) -> dict[str, torch.Tensor]:
    """Student-t weights whose degrees of freedom differ from layer to layer, bfloat16."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = random.standard_t(random.uniform(2.5, 30), shape) * 0.02
        tensors[name] = torch.from_numpy(values.astype(np.float32)).bfloat16()
    return tensors


def zimage_file(folder: Path) -> Path:
    shapes = {k: tuple(v.shape) for k, v in models.zimage(layers=9).items() if v.dim() == 2 and k.endswith(".weight")}
    second = {k.replace("_refiner.0.", "_refiner.1."): s for k, s in shapes.items() if "_refiner.0." in k}
    tensors = heavy_tailed({**shapes, **second})
    tensors["noise_refiner.0.attention.k_norm.weight"] = torch.ones(32).bfloat16()
    save_file(tensors, folder / "zimage.safetensors")
    return folder / "zimage.safetensors"


def wan_file(folder: Path) -> Path:
    shapes: dict[str, tuple[int, int]] = {"head.head.weight": (64, 64)}
    for container, blocks in (("blocks", 12), ("vace_blocks", 2)):
        for i in range(blocks):
            attention = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"]
            shapes |= {f"{container}.{i}.{part}.weight": (64, 64) for part in attention}
            shapes |= {f"{container}.{i}.ffn.0.weight": (128, 64), f"{container}.{i}.ffn.2.weight": (64, 128)}
    save_file({**heavy_tailed(shapes), "head.modulation": torch.zeros(1, 2, 64)}, folder / "wan.safetensors")
    return folder / "wan.safetensors"


# --- statistics and errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_statistics_equal_scipy(
    tmp_path: Path, dtype: torch.dtype, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "CHUNK", 1000)  # rows of 200 in several chunks
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(96, 200, generator=generator) * 0.1).pow(3).mul(9).add(shift).to(dtype)
    weight[3, :5] = 0
    save_file({"blocks.0.a.weight": weight}, tmp_path / "m.safetensors")
    layer = probe.probe(tmp_path / "m.safetensors").layers[0]
    x = weight.double().numpy().ravel()
    far = np.abs(x - x.mean()) > 3 * x.std(ddof=1)
    assert layer.mean == pytest.approx(x.mean(), abs=1e-6)
    assert layer.std == pytest.approx(x.std(ddof=1), rel=1e-4)
    wanted = ((x - x.mean()) ** 4).mean() / x.std(ddof=1) ** 4 - 3
    assert layer.kurtosis == pytest.approx(wanted, rel=2e-3)
    assert (layer.amax, layer.amin, layer.zeros) == (
        pytest.approx(np.abs(x).max()), pytest.approx(np.abs(x).min()), int((x == 0).sum()),
    )  # fmt: skip
    assert layer.outlier_share == pytest.approx(far.mean(), abs=2 / x.size)
    rows = np.abs(weight.double().numpy()).max(1)
    assert layer.row_spread == pytest.approx(np.log2(rows).std(), rel=1e-4)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("seed", range(3))
def test_measured_errors_are_those_of_the_real_formats(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 320, generator=generator) * 0.02
    weight *= torch.randn(64, 1, generator=generator).exp() if seed else 1.0
    packed = pack.nearest(weight, FORMATS[name], torch.device("cpu"), "w")
    nearest, searched = measure.errors(weight.numpy(), float(weight.abs().max()))[name]
    assert nearest == pytest.approx(packed.error / packed.energy, rel=1e-3)
    assert searched <= nearest * (1 + 1e-6)


def test_scaled_fp8_sources_are_dequantized_first(tmp_path: Path) -> None:
    tensors = models.zimage()
    plain = models.save(tmp_path / "plain.safetensors", tensors)
    scaled = models.hswq(tensors)
    path = models.save(tmp_path / "hswq.safetensors", scaled.tensors)
    ours = {layer.name: layer for layer in probe.probe(path).layers}
    for layer in probe.probe(plain).layers:
        assert ours[layer.name].std == pytest.approx(layer.std, rel=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(tmp_path: Path, value: float) -> None:
    tensors = models.zimage()
    tensors["layers.1.attention.out.weight"][2, 3] = value
    path = models.save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(
        CalibQuantError, match=r"m\.safetensors: tensor layers\.1\.attention\.out\.weight has NaN or Inf"
    ):
        probe.probe(path)


def test_correlations_equal_scipy(tmp_path: Path) -> None:
    probed = probe.probe(zimage_file(tmp_path))
    layers = [layer for layer in probed.layers if not layer.protected]
    for name, row in probe.correlations(probed).items():
        for fmt, value in row.items():
            a, b = [getattr(x, name) for x in layers], [x.errors[fmt][0] for x in layers]
            assert value == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-9)
    assert probe.spearman(np.array([1.0, 1, 2]), np.array([3.0, 4, 4])) == pytest.approx(
        scipy.stats.spearmanr([1, 1, 2], [3, 4, 4]).statistic
    )


@pytest.mark.parametrize("command", ["probe", "inspect"])
def test_no_torch_is_imported(tmp_path: Path, command: str) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage())
    code = "import sys; sys.modules['torch'] = None; from quant_core.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(path)], capture_output=True, text=True, cwd=models.ROOT
    )
    assert done.returncode == 0, done.stderr


# --- quant_probe's decisions, computed again here from its published formulas (facts/seeds.md §A1)


def reference(layers: list[probe.LayerProbe], pattern: str, refiner: str, o: scoring.ScoreOptions) -> dict[str, str]:
    found = []
    for w in layers:
        main, side = re.search(pattern, w.name), re.search(refiner, w.name)
        if main:
            found.append((w, main[2], int(main[1]), "main"))
        elif side:
            found.append((w, f"{side[1]}.{side[3]}", int(side[2]), side[1]))
    kurtosis = np.array([w.kurtosis for w, *_ in found])
    q25, q75 = np.quantile(kurtosis, [0.25, 0.75])
    lo, hi = q25 - 1.5 * (q75 - q25), q75 + 1.5 * (q75 - q25)
    scores = []
    for w, kind, _, _ in found:
        ranges = [v.dynamic_range for v, k, *_ in found if k == kind]
        spread = max(ranges) - min(ranges)
        part = (w.dynamic_range - min(ranges)) / spread if spread else 0
        scores.append(o.kurtosis_weight * (min(max(w.kurtosis, lo), hi) - lo) / (hi - lo) + o.range_weight * part)
    fp8, keep = np.quantile(scores, o.fp8_percentile / 100), np.quantile(scores, o.keep_percentile / 100)

    def verdict(score: float, top: float) -> str:
        if top >= o.kurtosis_keep or score >= keep:
            return "KEEP"
        return "FP8" if score >= fp8 and score >= o.fp8_min_score else "NVFP4"

    total = max(b for *_, b, where in found if where == "main") + 1
    ends = max(1, round(total * o.extreme_pct / 100))
    own = {(k, b, s): verdict(score, w.kurtosis) for (w, k, b, s), score in zip(found, scores, strict=True)}
    rows: dict[tuple[str, str, int], list[int]] = {}
    for i, (_, kind, block, where) in enumerate(found):
        position = 0 if where != "main" else 1 if block < ends else 3 if block >= total - ends else 2
        rows.setdefault((kind, where, position), []).append(i)
    means = {key: np.mean([scores[i] for i in members]) for key, members in rows.items()}
    result: dict[str, str] = {}
    for (kind, where, position), members in rows.items():
        group = verdict(means[kind, where, position], max(found[i][0].kurtosis for i in members))
        same = [m for (k, s, _), m in means.items() if k == kind and s == "main"]
        flat = where == "main" and max(same) - min(same) < o.min_group_spread
        for i in members:
            w, _, block, _ = found[i]
            mine = own[kind, block, where]
            if where != "main" or kind in o.spread_filter_exempt:
                result[w.name] = mine
            elif flat and group != "NVFP4":
                result[w.name] = "NVFP4" if group == "FP8" else "FP8"
            else:
                result[w.name] = mine if group == "KEEP" else group
    return result


WAN = r"blocks\.(\d+)\.((?:self|cross)_attn\.[kvqo]|ffn\.[02])$"
ZIMAGE = r"layers\.(\d+)\.(attention\.(?:qkv|out)|feed_forward\.w[123]|adaLN_modulation\.0)$"
REFINER = r"((?:context|noise)_refiner)\.(\d+)\.(attention\.(?:qkv|out)|feed_forward\.w[123])$"
OPTIONS = [
    {},
    {"kurtosis_keep": float("inf")},
    {"kurtosis_keep": 40.0, "min_group_spread": 0.3, "extreme_pct": 25.0},
    {"kurtosis_keep": float("inf"), "fp8_percentile": 30.0, "keep_percentile": 70.0, "min_group_spread": 0.0},
]


@pytest.mark.parametrize("change", OPTIONS)
@pytest.mark.parametrize(("family", "pattern"), [("wan", WAN), ("zimage", ZIMAGE)])
def test_compat_decides_by_quant_probes_formulas(
    tmp_path: Path, family: str, pattern: str, change: dict[str, float]
) -> None:
    path = wan_file(tmp_path) if family == "wan" else zimage_file(tmp_path)
    probed = probe.probe(path)
    assert probed.architecture == family
    exempt = ("self_attn.q",) if family == "wan" else ()
    options = replace(scoring.defaults(family), spread_filter_exempt=exempt, **change)
    decided = scoring.decide(probed, options, compat=True)
    refiner = REFINER if family == "zimage" else "(?!)"
    assert {d.layer.name: d.decision for d in decided.decisions} == reference(probed.layers, pattern, refiner, options)


def test_by_default_the_floor_is_the_last_word_and_groups_overrule_nobody(tmp_path: Path) -> None:
    probed = probe.probe(wan_file(tmp_path))
    options = replace(scoring.defaults("wan"), kurtosis_keep=20.0, min_group_spread=10.0)
    floored = scoring.decide(probed, options)
    high = {layer.name for layer in probed.layers if layer.block is not None and layer.kurtosis >= 20}
    assert high
    assert {d.layer.name for d in floored.decisions if d.decision == "KEEP"} == high
    free = scoring.decide(probed, replace(options, min_group_spread=0.0))
    assert all(d.decision == d.own for d in free.decisions)
    theirs = scoring.decide(probed, replace(options, min_group_spread=0.0), compat=True)
    assert any(d.decision != d.own for d in theirs.decisions)
    assert all(" (" in line and "quant_probe" in line for line in scoring.differences(free, theirs))


def test_two_refiner_blocks_get_no_range_term(tmp_path: Path) -> None:
    probed = probe.probe(zimage_file(tmp_path))
    options = replace(scoring.defaults("zimage"), kurtosis_weight=0.0, range_weight=1.0, ar_weight=0.0)
    ours = {d.layer.name: d.score for d in scoring.decide(probed, options).decisions}
    theirs = {d.layer.name: d.score for d in scoring.decide(probed, options, compat=True).decisions}
    assert {ours[n] for n in theirs if "_refiner" in n} == {0.0}
    assert {theirs[n] for n in theirs if "_refiner" in n} == {0.0, 1.0}


def test_csv_has_quant_probes_columns_and_json_everything(tmp_path: Path) -> None:
    path = zimage_file(tmp_path)
    probed = probe.probe(path)
    scored = scoring.decide(probed)
    columns = "key,layer_type,block_idx,subgraph,rows,cols,excess_kurtosis,dynamic_range,std,outlier_pct,aspect_ratio"
    wanted = [*columns.split(","), "score", "recommendation", "effective_recommendation", "reason"]
    theirs = list(csv.DictReader(probe_report.csv(probed, scored, compat=True).splitlines()))
    ours = list(csv.DictReader(probe_report.csv(probed, scored).splitlines()))
    assert list(theirs[0]) == wanted
    assert list(ours[0])[: len(wanted)] == wanted
    assert len(ours) == len(probed.layers) > len(theirs) == len(scored.decisions)
    document = json.loads(probe_report.to_json(probed, scored, None, str(path)))
    assert [entry["name"] for entry in document["layers"]] == [layer.name for layer in probed.layers]


# --- plans and the command line


def test_plans_from_a_probe(tmp_path: Path) -> None:
    path = zimage_file(tmp_path)
    probed = probe.probe(path)
    with Source(path) as source:
        kept = recipes.keep_worst(source, probed, 0.2, "mxfp8")
        scored = recipes.by_score(source, probed, replace(scoring.defaults("zimage"), kurtosis_keep=float("inf")))
    free = [layer for layer in probed.layers if layer.block is not None and not layer.protected]
    worst = sorted(free, key=lambda layer: -layer.errors["mxfp8"][0])[: int(len(free) * 0.2)]
    names = {name for name, entry in kept.layers.items() if entry.format == "bf16" and entry.reason.startswith("error")}
    assert names == {layer.name for layer in worst}
    assert {"nvfp4", "float8_e4m3fn", "bf16"} <= set(scored.count())
    assert all(entry.reason for plan in (kept, scored) for entry in plan.layers.values())


BAD = [
    ["--fp8-percentile", "120"], ["--keep-percentile", "-1"], ["--fp8-percentile", "95", "--keep-percentile", "90"],
    ["--kurtosis-weight", "0.9"], ["--range-weight", "x"], ["--ar-weight", "-0.1"], ["--extreme-pct", "60"],
    ["--fp8-min-score", "-1"], ["--min-group-spread", "nan"], ["--kurtosis-keep", "nan"], ["--outlier-sigma", "0"],
    ["--spread-filter-exempt", "nothing.like.it"], ["--model", "flux9"], ["--compat", "hswq"], ["--device", "cuda"],
    ["--model", "generic", "--compat", "quant_probe"],
]  # fmt: skip


@pytest.mark.parametrize("options", BAD, ids=" ".join)
def test_a_bad_option_is_one_line_and_exit_2(tmp_path: Path, options: list[str]) -> None:
    path = models.save(tmp_path / "m.safetensors", models.zimage())
    command = [sys.executable, "-m", "quant_core.cli", "probe", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1


def test_bad_values_in_the_engine_name_the_option() -> None:
    with pytest.raises(OptionError, match="--keep-percentile 101"):
        scoring.ScoreOptions(keep_percentile=101).check()
