"""The collector against brute force in float64, merging, the file, and the command line; no ComfyUI needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from quant_core.errors import CalibQuantError
from quant_core.evidence import calibration
from quant_core.evidence.calibration import Calibration
from quant_core.evidence.collector import Collector
from quant_core.evidence.watch import watch

LAYERS = {"a.q": (24, 8), "a.k": (24, 12), "b.ffn": (16, 24)}  # a.q and a.k see one tensor
RUNS = ["seed 1 fox", "seed 2 owl"]


def group_of(layer: str) -> str:
    return "a" if layer.startswith("a.") else ""


def calls(run: str, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(layer, input, output) of three model evaluations with differing numbers of rows."""
    generator = torch.Generator().manual_seed(sum(run.encode()))
    made = []
    for step in range(3):
        shared = torch.randn(2, 5 + step, 24, generator=generator).to(dtype)
        inputs = {"a.q": shared, "a.k": shared, "b.ffn": torch.randn(7, 16, generator=generator).to(dtype) + 2}
        for name, (width, out) in LAYERS.items():
            weight = torch.linspace(-1, 1, width * out).view(out, width).to(dtype)
            made.append((name, inputs[name], inputs[name] @ weight.T))
    return made


def collect(
    runs: list[str], rows: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32, memory: int = 0
) -> Calibration:
    collector = Collector(group_of, rows, seed, memory)
    collector.expect({name: width for name, (width, _) in LAYERS.items()})
    for run in runs:
        collector.start_run(run)
        for i, call in enumerate(calls(run, dtype)):
            if i % len(LAYERS) == 0:
                collector.model_call(torch.tensor([1.0 - i / 10]), [1, 0])
            collector.add(*call)
        collector.finish_run()
    return collector.result({"architecture": "test", "source_fingerprint": "f"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_equal_brute_force(dtype: torch.dtype) -> None:
    found = collect(RUNS, dtype=dtype)
    for name, (width, out) in LAYERS.items():
        mine = [(x, y) for run in RUNS for layer, x, y in calls(run, dtype) if layer == name]
        x = torch.cat([x.reshape(-1, width) for x, _ in mine]).double()
        y = torch.cat([y.reshape(-1, out) for _, y in mine]).double()
        stats = found.layers[name]
        assert (stats.count, stats.calls) == (len(x), len(mine))
        torch.testing.assert_close(stats.input_mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.input_absmean.double(), x.abs().mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(stats.input_sqmean.double(), x.square().mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(stats.input_amax.double(), x.abs().amax(0))
        torch.testing.assert_close(stats.output_channel_sqmean.double(), y.square().mean(0), rtol=1e-5, atol=1e-6)
        # HSWQ's own definition: every call weighs the same
        means, squares = [y.double().mean() for _, y in mine], [y.double().square().mean() for _, y in mine]
        variance = sum(squares) / len(mine) - (sum(means) / len(mine)) ** 2
        assert stats.output_variance == pytest.approx(variance.item(), rel=1e-5)
    assert found.info["sigmas"] == {"1": 2, "0.7": 2, "0.4": 2}
    assert (found.info["cond_rows"], found.info["uncond_rows"]) == (6, 6)


def test_sampled_rows_are_seen_rows_and_shared_by_layers_with_one_input() -> None:
    found = collect(RUNS)
    seen = torch.cat([x.reshape(-1, 24) for run in RUNS for layer, x, _ in calls(run) if layer == "a.q"]).bfloat16()
    rows = found.rows_of("a.q")
    assert found.rows_of("a.k") is rows and set(found.rows) == {"a.q", "b.ffn"}
    assert len(rows) == 16 and all((row == seen).all(1).any() for row in rows)
    assert torch.equal(rows, collect(RUNS).rows_of("a.q"))  # deterministic
    assert not torch.equal(rows, collect(RUNS, seed=1).rows_of("a.q"))


def test_every_row_is_as_likely_to_be_sampled() -> None:
    hits = np.zeros(60)
    for seed in range(400):
        collector = Collector(lambda _: "", rows=12, seed=seed)
        collector.start_run("run")
        for start in (0, 10, 40):  # calls of 10, 30 and 20 rows
            x = torch.arange(start, {0: 10, 10: 40, 40: 60}[start]).float().view(-1, 1)
            collector.add("layer", x, x)
        collector.finish_run()
        hits[collector.result().rows_of("layer").flatten().long().numpy()] += 1
    assert hits.sum() == 400 * 12
    expected = 400 * 12 / 60
    assert ((hits - expected) ** 2 / expected).sum() < 100  # chi-square, 59 degrees of freedom: p < .001 above 98


def test_merging_equals_calibrating_in_one_go() -> None:
    one, parts = collect(RUNS), [collect([run]) for run in RUNS]
    for merged in (calibration.merge(*parts, 16), calibration.merge(*reversed(parts), 16)):
        for name, stats in one.layers.items():
            other = merged.layers[name]
            assert (other.count, other.calls) == (stats.count, stats.calls)
            torch.testing.assert_close(other.input_sqmean, stats.input_sqmean)
            torch.testing.assert_close(other.input_amax, stats.input_amax)
            assert other.output_variance == pytest.approx(stats.output_variance, rel=1e-6)
        for name, sample in one.rows.items():
            assert np.array_equal(np.sort(merged.rows[name].keys), np.sort(sample.keys))
        assert merged.info["sigmas"] == one.info["sigmas"] and sorted(merged.info["runs"]) == sorted(RUNS)
    foreign = Calibration({}, {}, {"architecture": "other"})
    with pytest.raises(CalibQuantError, match="different models"):
        calibration.merge(parts[0], foreign)


HALF = 2 * (24 * 12 + 16 * 8)  # bytes in bfloat16 of half as many rows as a.q and b.ffn are wide


@pytest.mark.parametrize(
    ("memory", "kept"), [(0, (4, 4)), (100, (4, 4)), (HALF, (12, 8)), (HALF + 24, (12, 8)), (1 << 20, (24, 16))]
)
def test_wide_layers_keep_more_rows_as_far_as_memory_goes(memory: int, kept: tuple[int, int]) -> None:
    """Never fewer than asked for; in one go as in parts; a uniform sample, so that of fewer is the first of more."""
    one, parts = collect(RUNS, 4, memory=memory), [collect([run], 4, memory=memory) for run in RUNS]
    everything = collect(RUNS, 64)
    for found in (one, calibration.merge(*parts, 4), calibration.merge(*reversed(parts), 4)):
        for name, count in zip(("a.q", "b.ffn"), kept, strict=True):
            assert sorted(found.rows[name].keys) == sorted(everything.rows[name].keys)[-count:]
        assert found.info.get("rows_memory", 0) == memory and found.layers["a.q"].count == one.layers["a.q"].count


@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 20_000), min_size=1, max_size=8),
    st.integers(0, 4096),
    st.integers(0, 10**10),
)
def test_memory_is_shared_out_by_width_and_used_up(widths: dict[str, int], rows: int, memory: int) -> None:
    found = calibration.capacities(widths, rows, memory)
    assert all(rows <= found[name] <= max(rows, width) for name, width in widths.items())
    spent = sum(2 * width * found[name] for name, width in widths.items())
    more = {name: width for name, width in widths.items() if found[name] > rows}
    assert spent <= memory or not more
    if any(found[name] < width for name, width in widths.items()):  # one row more of each would not fit
        grown = sum(2 * width * (found[name] + (found[name] < width)) for name, width in widths.items())
        assert grown > memory - 2e-6 * sum(2 * width**2 for width in widths.values())
    shares = [found[name] / width for name, width in more.items() if width > 1000]
    assert not shares or max(shares) - min(shares) < 2e-3


def test_rows_know_their_run() -> None:
    def of_run(found: Calibration) -> dict[str, list[int]]:
        """Run -> rows of each group, by looking for them in what the run saw."""
        for name, sample in found.rows.items():
            for row, place in zip(sample.rows, sample.runs, strict=True):
                seen = [x for layer, x, _ in calls(found.info["runs"][place]) if layer == name]
                assert any((row == x.bfloat16()).all(-1).any() for x in seen)
        return {name: np.bincount(sample.runs, minlength=2).tolist() for name, sample in found.rows.items()}

    one, parts = collect(RUNS), [collect([run]) for run in RUNS]
    assert of_run(one) == of_run(calibration.merge(*parts, 16)) and min(map(min, of_run(one).values())) > 0
    assert {name: counts[::-1] for name, counts in of_run(one).items()} == of_run(calibration.merge(*parts[::-1], 16))
    for name in one.rows:
        held_out, runs = one.held_out(name)
        assert runs == 1 and 0 < held_out.sum() < len(held_out)
        assert len(set(one.rows[name].runs[held_out.numpy()])) == 1
        assert calibration.merge(*parts[::-1], 16).held_out(name)[0].sum() == held_out.sum()  # the same run
        assert parts[0].held_out(name)[1] == 0
        assert collect([RUNS[0], RUNS[0]]).held_out(name)[1] == 0  # one run drawn twice tells nothing new


def test_a_dropped_run_leaves_rows_but_no_run() -> None:
    collector = Collector(lambda _: "", rows=4)
    for name in ("kept", "cancelled"):
        collector.start_run(name)
        collector.add("layer", torch.ones(2, 8), torch.ones(2, 8))
        collector.finish_run() if name == "kept" else collector.drop_run()
    assert collector.result().rows["layer"].runs.tolist() == [0, 0, calibration.UNKNOWN, calibration.UNKNOWN]


def test_a_file_of_version_2_still_loads_and_merges(tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    calibration.save(collect(RUNS), path)
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys() if not k.endswith("row_runs")}
        info = json.loads(file.metadata()[calibration.METADATA_KEY])
    old = models.save(
        tmp_path / "old.safetensors", tensors, {calibration.METADATA_KEY: json.dumps({**info, "format_version": 2})}
    )
    read = calibration.load(old)
    assert all((sample.runs == calibration.UNKNOWN).all() for sample in read.rows.values())
    assert read.held_out("a.q")[1] == 0
    merged = calibration.merge(read, collect(["seed 3 elk", "seed 4 cat"]), 64)
    assert set(merged.rows["a.q"].runs) == {calibration.UNKNOWN, 2, 3} and merged.held_out("a.q")[1] == 1
    calibration.save(merged, tmp_path / "both.safetensors")
    again = calibration.load(tmp_path / "both.safetensors")
    assert (
        np.array_equal(again.rows["a.q"].runs, merged.rows["a.q"].runs)
        and again.info["format_version"] == calibration.FORMAT_VERSION
    )


def test_the_file_holds_everything(tmp_path: Path) -> None:
    found, path = collect(RUNS), tmp_path / "m.calibration.safetensors"
    calibration.save(found, path)
    read = calibration.load(path)
    assert read.info == {k: v for k, v in found.info.items()}
    for name, stats in found.layers.items():
        for key in ("input_mean", "input_absmean", "input_sqmean", "input_amax", "output_channel_mean"):
            assert torch.equal(getattr(read.layers[name], key), getattr(stats, key))
        assert (read.layers[name].output_mean, read.layers[name].count) == (stats.output_mean, stats.count)
        assert torch.equal(read.rows_of(name), found.rows_of(name))
        assert np.array_equal(read.rows[stats.group].runs, found.rows[stats.group].runs)
    with pytest.raises(CalibQuantError, match="is no calibration of this tool"):
        calibration.load(models.save(tmp_path / "model.safetensors", models.zimage()))


def test_nan_names_layer_and_step_and_a_dropped_run_leaves_no_trace() -> None:
    collector = Collector(group_of, rows=4)
    collector.start_run("bad")
    for step in (1, 2):
        collector.model_call(None, [0])
        x = torch.ones(3, 16)
        collector.add("b.ffn", x, x * (float("nan") if step == 2 else 1))
    with pytest.raises(CalibQuantError, match=r"layer b\.ffn: NaN or Inf .* at step 2"):
        collector.finish_run()
    collector.start_run("cancelled")
    collector.add("b.ffn", torch.ones(3, 16), torch.ones(3, 16))
    collector.drop_run()
    assert collector.result().layers == {} and collector.result().info["runs"] == []


def cli(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quant_core.cli", "calibration", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT)


def test_info_and_merge_on_the_command_line(tmp_path: Path) -> None:
    files = []
    for i, run in enumerate(RUNS):
        files.append(tmp_path / f"{i}.safetensors")
        calibration.save(collect([run]), files[-1])
    merged = tmp_path / "both.safetensors"
    assert cli("merge", *files, "-o", merged).returncode == 0
    assert calibration.load(merged).layers["b.ffn"].count == 2 * 3 * 7
    info = cli("info", merged)
    assert info.returncode == 0 and "3 layers, 2 runs" in info.stdout and "b.ffn" in info.stdout
    again = cli("merge", *files, "-o", merged)
    assert (again.returncode, "--overwrite" in again.stderr) == (1, True)
    assert cli("merge", *files).returncode == 2
    assert cli("info", tmp_path / "none.safetensors").returncode == 1


def test_any_torch_model_can_be_watched() -> None:
    """As in a notebook: no ComfyUI, no file, a plain nn.Module; its outputs stay the same to the bit."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x, seen = torch.randn(32, 8), Collector(lambda layer: "")
    with torch.no_grad():
        alone = model(x)
        seen.start_run("run")
        with watch(model, seen):
            watched = model(x)
        seen.finish_run()
        model(x)  # no longer watched
    found = seen.result()
    assert torch.equal(alone, watched)
    assert set(found.layers) == {"0", "2"} and all(stats.count == 32 for stats in found.layers.values())
    assert torch.equal(found.layers["0"].input_amax, x.abs().amax(0))
    assert torch.equal(found.rows_of("0"), x.bfloat16())


def test_rows_that_stay_in_the_file_are_those_that_were_saved(tmp_path: Path) -> None:
    made, path = collect(["a", "b", "c"]), tmp_path / "c.calibration.safetensors"
    calibration.save(made, path)
    left = calibration.load(path, leave_rows=True)
    assert left.fingerprint() == made.fingerprint() and list(left.rows) == list(calibration.load(path).rows)
    for name, sample in made.rows.items():
        assert torch.equal(left.rows[name].rows, sample.rows)
        assert left.held_out(name)[1] == made.held_out(name)[1]
    calibration.save(left, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_rows_of_a_file_that_was_replaced_meanwhile_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.calibration.safetensors"
    calibration.save(collect(["a", "b"]), path)
    left = calibration.load(path, leave_rows=True)
    path.write_bytes(b"another")
    with pytest.raises(CalibQuantError, match=r"c\.calibration\.safetensors: was changed or removed"):
        next(iter(left.rows.values())).rows  # noqa: B018
