"""`calibquant queue`: its grid, its journal, servers that misbehave, and a real one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from comfy_env import ComfyUINotFound, Server, _free_port, start_server
from hypothesis import given
from hypothesis import strategies as st

from quant_core import cli
from quant_core.errors import CalibQuantError, OptionError
from quant_core.evidence import calibration
from quant_core.queue import journal, merging, workflow
from quant_core.queue import run as batch
from quant_core.queue.journal import Entry, Journal
from quant_core.queue.run import Limits, Row
from quant_core.queue.server import Outcome, address

pytest.importorskip("aiohttp")  # comes with ComfyUI
from fake_comfy import FakeComfy

API = models.ROOT / "workflows" / "api"
GRAPH: workflow.Graph = {
    "1": {"class_type": "Work", "inputs": {"kind": "ok", "n": 1, "on": True, "m": ["2", 0], "s": [1]}},
    "2": {"class_type": "Load", "inputs": {"name": "a.b", "n.b": 1.5}, "_meta": {"title": "Load 1.0 Model"}},
    "3": {"class_type": "Load", "inputs": {"name": "c"}},
}
QUICK = Limits(in_flight=2, patience=5.0, poll=0.05)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "w.api.json").write_text(json.dumps(GRAPH))
    return tmp_path / "w.api.json"


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    try:
        returned = cli.main(["queue", *map(str, arguments)])
    except SystemExit as left:  # argparse
        returned = left.code
    out, err = capsys.readouterr()
    assert returned == code, err
    return out, err


# --- the grid


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda word: not word.endswith("\\"))


@given(st.lists(WORDS, min_size=1, max_size=5, unique=True))
def test_text_values_are_what_was_written(words: list[str]) -> None:
    joined = ",".join(word.replace(",", "\\,") for word in words)
    jobs = workflow.grid(GRAPH, [f"1.kind={joined}"])
    assert [job.graph["1"]["inputs"]["kind"] for job in jobs] == words


@given(st.lists(st.integers(-(2**64), 2**64) | st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_stay_the_numbers_they_are(numbers: list[float]) -> None:
    numbers = list(dict.fromkeys(numbers))
    jobs = workflow.grid(GRAPH, [f"1.n={','.join(map(repr, numbers))}"])
    found = [job.graph["1"]["inputs"]["n"] for job in jobs]
    assert [(type(x), x) for x in found] == [(type(x), x) for x in numbers]


def test_every_combination_is_a_job_and_the_workflow_stays_as_it_was() -> None:
    before = json.dumps(GRAPH)
    jobs = workflow.grid(GRAPH, ["Work.n=1,2.5", "1.on=true,False", "Load 1.0 Model.n.b=3", "1.n=7"])
    made = [(j.graph["1"]["inputs"]["n"], j.graph["1"]["inputs"]["on"], j.graph["2"]["inputs"]["n.b"]) for j in jobs]
    assert made == list(product([1, 2.5, 7], [True, False], [3]))
    assert jobs[0].settings == {"Work.n": 1, "1.on": True, "Load 1.0 Model.n.b": 3}
    assert len({job.key for job in jobs}) == 6 and json.dumps(GRAPH) == before
    assert [job.graph for job in workflow.grid(GRAPH, [])] == [GRAPH]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("4.n=1", "no such node: the workflow has 1 (Work), 2 (Load 1.0 Model), 3 (Load)"),
        ("nothing=1", "no such node"),
        ("1.q=1", "node 1 (Work) has no such input: it has kind, n, on, m, s"),
        ("Load.name=x", "means nodes 2 and 3"),
        ("1.n=1,x", "is a number, not 'x'"),
        ("1.n=", "is a number, not ''"),
        ("1.n=1e999", "is a number"),
        ("1.n=١", "is a number"),
        ("1.on=1", "is a switch, true or false"),
        ("1.m=1", "is linked to node 2 (Load 1.0 Model)"),
        ("1.s=1", "holds no number, switch or text"),
        ("1.n=1,1.0", "has 1.0 twice"),
        ("1.n", "write NODE.INPUT=VALUE"),
    ],
)
def test_a_wrong_setting_is_wrong_usage_and_says_what_there_is(
    setting: str, said: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = call(capsys, path, "--set", setting, code=2)[1]
    assert said in err and err.count("\n") == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_grid_has_a_limit() -> None:
    many = ",".join(map(str, range(101)))
    with pytest.raises(OptionError, match="10201 jobs"):
        workflow.grid(GRAPH, [f"1.n={many}", f"2.n.b={many}"])


@pytest.mark.parametrize("text", ["[]", "{}", '{"1": {"inputs": {}}}', '{"nodes": [], "links": []}', "{", '{"a": 1}'])
def test_what_is_no_api_workflow_is_refused(text: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(text)
    err = call(capsys, path, code=1)[1]
    assert "Export (API)" in err and str(path) in err and err.count("\n") == 1


def test_addresses() -> None:
    assert address("box:8188/") == "http://box:8188" and address("https://h/a/") == "https://h/a"
    for wrong in ("", "ftp://x", "http://", "h:x", "h:99999", "http://h?q=1"):
        with pytest.raises(OptionError, match="is no address"):
            address(wrong)


# --- the journal


def entries(count: int) -> list[Entry]:
    return [
        Entry(f"j{i % 3}", ("sent", "done")[i % 2], "http://ö", f"p{i}", i / 7, [f"output/{i}"]) for i in range(count)
    ]


def test_a_journal_torn_at_any_byte_has_every_entry_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written = tmp_path / "j.jsonl", entries(5)
    with Journal(path) as made:
        for entry in written:
            made.add(entry)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # seconds, a thousand times
    text = path.read_bytes()
    for end in range(len(text) + 1):
        path.write_bytes(text[:end])
        whole = max(0, text[:end].count(b"\n") - 1)
        with Journal(path) as read:
            assert list(read.entries.values()) == list({entry.job: entry for entry in written[:whole]}.values())
            read.add(written[0])
        with Journal(path) as read:
            assert read.entries["j0"] == written[0]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path) as made:
        made.add(entries(1)[0])
    for line in (b"nonsense\n", b"{}\n", b'{"job": 1}\n', b"\xff\n"):
        path.write_bytes(before := journal.HEAD + line + path.read_bytes().splitlines(True)[1])
        with pytest.raises(CalibQuantError, match="line 2 is damaged"):
            Journal(path)
        assert path.read_bytes() == before
        path.write_bytes(journal.HEAD + before.splitlines(True)[2])


def test_a_file_that_is_no_journal_is_left_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = path.read_bytes()
    assert "is no journal" in call(capsys, path, "--journal", path, code=1)[1]
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_two_batches_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j"), pytest.raises(CalibQuantError, match="another batch"):
        Journal(tmp_path / "j")


# --- servers that misbehave


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[list[Row], list[str]]]:
    """run(server…, kinds of jobs): the rows, and what was said."""

    def runs(*servers: FakeComfy, kinds: str, limits: Limits = QUICK) -> tuple[list[Row], list[str]]:
        said: list[str] = []
        jobs = workflow.grid(GRAPH, [f"1.kind={kinds}"])
        with Journal(tmp_path / "j.jsonl") as kept:
            rows = batch.run(jobs, [s.url for s in servers], kept, limits, lambda *_: None, said.append)
        return rows, said

    return runs


def kinds(count: int) -> str:
    return ",".join(f"ok{i}" for i in range(count))


def states(rows: list[Row]) -> list[str]:
    return [row.state for row in rows]


def test_jobs_are_dealt_to_all_servers_and_none_has_more_than_its_share(run: Any) -> None:
    with FakeComfy() as a, FakeComfy() as b:
        rows, said = run(a, b, kinds=kinds(12))
    assert states(rows) == ["done"] * 12 and said == []
    assert {row.server for row in rows} == {a.url, b.url}
    assert a.most == b.most == 2 and set((a.ran + b.ran).values()) == {1}
    assert rows[0].outcome.seconds == 2.5 and rows[0].outcome.results == ["output/x/a.png"]


def test_progress_tells_node_and_share(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    jobs = workflow.grid(GRAPH, ["1.kind=ok,ok2"])
    batch_tick, batch.TICK = batch.TICK, 0.005
    try:
        with FakeComfy() as server, Journal(tmp_path / "j") as kept:
            batch.run(jobs, [server.url], kept, QUICK, lambda *state: told.append(state), print)
    finally:
        batch.TICK = batch_tick
    assert (0, 2, "Work 50 %") in told and told[-1] == (2, 2, "")


def test_it_works_without_a_websocket_and_with_ids_of_the_servers_own(run: Any) -> None:
    with FakeComfy(mints=True, deaf=True) as server:
        assert states(run(server, kinds=kinds(3))[0]) == ["done"] * 3
    assert set(server.ran.values()) == {1}


def test_a_connection_lost_after_the_job_was_taken_does_not_run_it_twice(run: Any) -> None:
    with FakeComfy(drops=2) as server:
        rows, said = run(server, kinds=kinds(4))
    assert states(rows) == ["done"] * 4 and set(server.ran.values()) == {1}
    assert any("does not answer: waiting" in line for line in said)


def test_what_the_history_does_not_know_is_sent_again(run: Any) -> None:
    with FakeComfy(forgets=2) as server:
        rows, said = run(server, kinds=kinds(4))
    assert states(rows) == ["done"] * 4 and sorted(server.ran.values()) == [1, 1, 2, 2]
    assert sum("does not know it any more: sent again" in line for line in said) == 2


def test_a_job_that_brings_its_server_down_is_given_up_and_the_others_are_not(run: Any) -> None:
    with FakeComfy() as server:
        rows, _ = run(server, kinds="ok1,crash,ok2,ok3")
    assert states(rows) == ["done", "failed", "done", "done"]
    assert "times, the last time by" in rows[1].outcome.error
    (crashes,) = (count for label, count in server.ran.items() if "crash" in label)
    assert 3 <= crashes <= QUICK.attempts  # three that were seen; one right after a start may go unseen


def test_a_job_that_fails_by_itself_is_not_tried_again_until_the_next_run(run: Any) -> None:
    with FakeComfy() as server:
        rows, said = run(server, kinds="ok1,fails")
        assert states(rows) == ["done", "failed"]
        assert rows[1].outcome.error == "node 1 (Work): out of memory"
        assert said == ["job 2 failed: node 1 (Work): out of memory"]
        run(server, kinds="ok1,fails,ok3")
    assert sorted(server.ran.values()) == [1, 1, 2]  # ok1 was done


def test_a_refused_job_says_why_and_leaves_nothing_behind(run: Any) -> None:
    with FakeComfy() as server:
        rows, said = run(server, kinds="bad,half,explodes,ok")
        assert server.pending == [] and states(rows) == ["failed", "failed", "failed", "done"]
    assert "job 1 failed: node 1 (Work): Value not in list: kind: 'bad'" in said
    assert rows[1].outcome.error == rows[0].outcome.error
    assert sum(server.ran.values()) <= 2  # ok, and perhaps the half one before it was stopped


def test_jobs_of_a_server_that_stays_away_go_to_the_others(run: Any) -> None:
    with FakeComfy(stuck=True) as a, FakeComfy() as b:
        a.later(0.2, a.down)
        rows, said = run(a, b, kinds=kinds(6), limits=Limits(patience=0.3, poll=0.05))
    assert states(rows) == ["done"] * 6 and {row.server for row in rows} == {b.url}
    assert said[-1] == f"note: {a.url} did not come back: its jobs go to the others"


def test_without_any_server_left_the_rest_is_not_run_and_the_next_run_does_it(run: Any) -> None:
    with FakeComfy(stuck=True) as server:
        server.later(0.2, server.down)
        rows, _ = run(server, kinds=kinds(3), limits=Limits(patience=0.3, poll=0.05))
        assert not {"done", "failed"} & set(states(rows))
        server.stuck = False
        server.call(server.up())
        assert states(run(server, kinds=kinds(3))[0]) == ["done"] * 3


# --- the command


def test_the_table_the_exit_code_and_what_the_next_call_does(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeComfy() as server:
        words = [path, "--server", server.url, "--set", "1.kind=ok,fails", "1.n=1,2"]
        out, err = call(capsys, *words, code=1)
        assert [line.split()[:3] for line in out.splitlines()] == [
            ["job", "1.kind", "1.n"], ["1", "ok", "1"], ["2", "ok", "2"], ["3", "fails", "1"], ["4", "fails", "2"],
        ]  # fmt: skip
        assert out.splitlines()[1].endswith(f"{server.url}  2.5      output/x/a.png")
        assert out.splitlines()[4].endswith("failed: node 1 (Work): out of memory")
        assert "of 4 jobs 2 failed and 0 did not run" in err and "Traceback" not in err
        facts = json.loads(call(capsys, *words[:-1], "--json", code=1)[0])
        assert [job["state"] for job in facts] == ["done", "failed"]
        call(capsys, path, "--server", server.url, "--set", "1.kind=ok", "1.n=1,2")
        assert sum(server.ran.values()) == 5  # ok 1, ok 2, fails 1 twice, fails 2
    assert (path.parent / "w.queue.jsonl").exists()


def test_a_server_that_is_down_or_none_is_said_in_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = _free_port()
    err = call(capsys, path, "--server", f"localhost:{port}", code=1)[1]
    assert f"error: http://localhost:{port}: does not answer: start ComfyUI" in err and err.count("\n") == 1
    with FakeComfy() as server:
        assert "is no ComfyUI" in call(capsys, path, "--server", f"{server.url}/x", code=1)[1]
    assert "has an address twice" in call(capsys, path, "--server", "a:1", "http://a:1/", code=2)[1]


def test_without_aiohttp_one_line_says_so(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert "needs aiohttp: pip install aiohttp" in call(capsys, path, code=1)[1]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "quant_core.cli", "queue", *map(str, arguments)]
    return subprocess.Popen(command, cwd=models.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_batch_goes_on_where_its_jobs_are(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeComfy(stuck=True) as server:
        words = (path, "--server", server.url, "--in-flight", 2, "--set", f"1.kind={kinds(5)}")
        first = start(*words)
        until(lambda: server.running and server.pending)
        first.kill()
        first.communicate()
        server.stuck = False
        until(lambda: len(server.history) == 2)  # those it had sent
        out, _ = call(capsys, *words)
    assert out.count("output/x/a.png") == 5 and set(server.ran.values()) == {1}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_batch_takes_its_jobs_back(
    sign: signal.Signals, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeComfy(stuck=True) as server:
        words = (path, "--server", server.url, "--in-flight", 2, "--set", f"1.kind={kinds(3)}")
        first = start(*words)
        until(lambda: server.running and server.pending)
        first.send_signal(sign)
        _, err = first.communicate(timeout=60)
        assert first.returncode == 130 and "Traceback" not in err
        assert f"2 jobs taken back from {server.url}; the same command goes on" in err
        assert not server.running and not server.pending
        server.stuck = False
        call(capsys, *words)
    assert len(server.ran) == 3 and set(server.ran.values()) == {1}


# --- ComfyUI itself


@pytest.mark.core
def test_a_real_server_that_is_killed_and_started_again_makes_every_file(tmp_path: Path) -> None:
    graph, port = API / "quantize_demo_model.json", _free_port()
    words = ["--server", f"127.0.0.1:{port}", "--journal", tmp_path / "j", "--json", "--set", "3.filename_prefix=q/x"]
    words += ["CalibQuantPlan.strategy.recipe=nvfp4,mxfp8,fp8", "3.rounding=nearest,search"]
    base = tmp_path / "comfy"
    try:
        with start_server(base, port):
            client = start(graph, *words)
            until(lambda: (tmp_path / "j").exists() and b'"done"' in (tmp_path / "j").read_bytes())
        with start_server(base, port):
            out, err = client.communicate(timeout=280)
    except ComfyUINotFound as missing:
        pytest.skip(str(missing))
    assert client.returncode == 0, err
    rows = json.loads(out)
    assert [(row["state"], row["error"]) for row in rows] == [("done", "")] * 6 and "waiting for it" in err
    made = {name for row in rows for name in row["results"]}
    assert len(made) == 6 and all((base / name).stat().st_size > 500_000 for name in made)
    assert {tuple(row["settings"].values())[1:] for row in rows} == set(
        product(("nvfp4", "mxfp8", "fp8"), ("nearest", "search"))
    )


@pytest.mark.core
def test_a_dealt_calibration_is_that_of_a_single_run(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = workflow.load(API / "calibrate_with_prompts.json")
    graph["4"]["inputs"] |= {"samples": 5, "steps": 2}
    graph["5"]["inputs"]["filename_prefix"] = "dealt/x"
    (path := tmp_path / "c.json").write_text(json.dumps(graph))
    (named,) = server.post(graph)["outputs"]["5"]["calibquant_result"]
    single = calibration.load(server.base_dir / named["path"])
    call(capsys, path, "--server", server.url, "--merge", out := tmp_path / "m.calibration.safetensors", "--parts", 2)
    merged = calibration.load(out)
    assert merged.info["runs"] == single.info["runs"] and len(single.info["runs"]) == 5
    assert merged.info["sigmas"] == single.info["sigmas"] and merged.layers.keys() == single.layers.keys()
    for name, one in single.layers.items():
        dealt = merged.layers[name]
        assert (dealt.count, dealt.calls, dealt.group) == (one.count, one.calls, one.group)
        assert torch.equal(dealt.input_amax, one.input_amax)
        for field in ("input_mean", "input_absmean", "input_sqmean", "output_channel_mean", "output_channel_sqmean"):
            torch.testing.assert_close(getattr(dealt, field), getattr(one, field), rtol=1e-5, atol=1e-6)
        assert dealt.output_sqmean == pytest.approx(one.output_sqmean, rel=1e-6)
    for group, sample in single.rows.items():  # random keys come from the sample's name: the same rows are kept
        assert sorted(merged.rows[group].keys) == sorted(sample.keys)
    assert "exists already" in call(capsys, path, "--server", server.url, "--merge", out, code=1)[1]

    def joined(*results: str) -> None:
        rows = [Row(n, made, "done", server.url, outcome=Outcome(results=[name])) for n, name in enumerate(results, 1)]
        merging.merge(rows, tmp_path / "again.safetensors", False)

    made = workflow.Job({}, graph)
    with pytest.raises(CalibQuantError, match=r"job 2.*holds a sample of an earlier job, .*seed 2000: set merge_with"):
        joined(named["path"], named["path"])
    with pytest.raises(CalibQuantError, match=r"^output/calibrations/gone.*answers 404: is the file still there"):
        joined(f"output/calibrations/gone{merging.SUFFIX}")
    with pytest.raises(CalibQuantError, match="job 1 names no calibration file: update ComfyUI-CalibQuant"):
        joined("output/x.png")
    assert {file.name for file in tmp_path.iterdir()} == {path.name, out.name, "c.queue.jsonl"}


def test_only_a_plain_calibration_can_be_dealt_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--merge", path.parent / "m.safetensors")
    assert "one Calibrate and one Save Calibration" in call(capsys, path, *out, code=2)[1]
    assert "give each --set one value" in call(capsys, path, *out, "--set", "1.n=1,2", code=2)[1]
    assert "name it *.calibration" in call(capsys, path, "--merge", path.parent / "m.txt", code=2)[1]
    assert "are for --merge" in call(capsys, path, "--parts", 2, code=2)[1]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9))
def test_parts_draw_each_sample_once(samples: int, parts: int, first: int) -> None:
    nodes = ((workflow.CALIBRATE, {"samples": samples, "first": first}), (workflow.SAVE_CALIBRATION, {}))
    graph = {str(i): {"class_type": name, "inputs": inputs} for i, (name, inputs) in enumerate(nodes)}
    made = [job.graph["0"]["inputs"] for job in workflow.deal(workflow.Job({}, graph), parts)]
    drawn = [n for part in made for n in range(part["first"], part["first"] + part["samples"])]
    assert drawn == list(range(first, first + samples)) and len(made) == min(parts, samples)
    assert max(part["samples"] for part in made) - min(part["samples"] for part in made) <= 1
