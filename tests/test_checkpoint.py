"""The streaming reader and writer: damaged files are named with a remedy, and no half-written file is ever left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quant_core.errors import CalibQuantError
from quant_core.files import checkpoint, disk
from quant_core.files.checkpoint import Checkpoint, TensorSpec, Writer, file_size
from quant_core.files.text import change_of_size

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX only")
REMEDY = r": [^:]*\b(download|give|save|convert|remove|name|check|make)\b[^:]*$"


def refusal(path: Path) -> str:
    """The message with which the file is refused: one line that begins with a path and ends with a remedy."""
    with pytest.raises(CalibQuantError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and re.search(REMEDY, message), message
    return message


# --- reader: damaged files

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


def raw(header: object, data: bytes = bytes(12)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "a few bytes": (b"{}", "too few"),
    "garbage": (b"\x89PNG\r\n\x1a\n" * 40, "is no safetensors file"),
    "truncated header": (raw({"a": A, "b": B})[:40], "is truncated"),
    "truncated data": (raw({"a": A, "b": B}, bytes(11)), "is truncated"),
    "header length too large": (b"\xff" * 8 + raw({})[8:], "is no safetensors file"),
    "header length beyond the limit": ((200_000_000).to_bytes(8, "little") + b"{}", "is no safetensors file"),
    "header length too small": ((7).to_bytes(8, "little") + raw({"a": A, "b": B})[8:], "header is damaged"),
    "header is no JSON": (raw(b"{'a': 1}    "), "header is damaged"),
    "header is no UTF-8": (raw(b'{"\xff": 1}'), "header is damaged"),
    "header is a list": (raw([A, B]), "header is damaged"),
    "header nested without end": (raw(b"[" * 100_000), "header is damaged"),
    "entry is no object": (raw({"a": 5}), "header is damaged"),
    "entry without offsets": (raw({"a": {"dtype": "F32", "shape": [2]}}), "header is damaged"),
    "unknown dtype": (raw({"a": A, "b": {**B, "dtype": "F3"}}), "tensor b has dtype F3"),
    "negative shape": (raw({"a": {**A, "shape": [-2]}}), "tensor a has a bad shape"),
    "endless shape": (raw({"a": {**A, "shape": [10**18] * 100_000}, "b": B}), "tensor a has a bad shape"),
    "immense shape": (
        raw({"a": {**A, "shape": [10**18] * 9 + [0], "data_offsets": [0, 0]}}, b""),
        "tensor a has 0 bytes",
    ),
    "true as a size": (raw({"a": {**A, "shape": [True, 2]}}), "tensor a has a bad shape"),
    "endless number": (raw(b'{"a": {"dtype": "F32", "shape": [%s]}}' % (b"9" * 5000)), "a number of 5000 digits"),
    "infinite number": (raw(b'{"a": {"dtype": "F32", "shape": [1e999]}}'), "a / shape / 0 is 1e999"),
    "endless name": (raw({f"layers.{'9' * 5000}.w": A, "b": B}), "is no name of a tensor"),
    "escape code in a name": (raw({"a\x1b[2J\n": A, "b": B}), "is no name of a tensor"),
    "half a character": (raw({"\ud800": A, "b": B}), "surrogates"),
    "fractional shape": (raw({"a": {**A, "shape": [2.0]}}), "tensor a has a bad shape"),
    "size against shape": (raw({"a": {**A, "shape": [3]}, "b": B}), "tensor a has 8 bytes"),
    "overlap": (raw({"a": A, "b": {**B, "data_offsets": [4, 8]}}, bytes(8)), "tensor b overlaps"),
    "gap": (
        raw({"a": A, "b": {**B, "data_offsets": [12, 16]}}, bytes(16)),
        "tensor b overlaps another or leaves a gap",
    ),
    "trailing bytes": (raw({"a": A, "b": B}, bytes(13)), "1 bytes after the last tensor"),
    "key twice": (raw(b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), bytes(8)), "a key occurs twice"),
    "metadata is no object": (raw({"__metadata__": "x", "a": A, "b": B}), "__metadata__"),
    "metadata is no text": (raw({"__metadata__": {"x": 1}, "a": A, "b": B}), "__metadata__"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_file_is_named_with_a_remedy(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(FAULTS[fault][0])
    message = refusal(path)
    assert message.startswith(f"{path}: ") and FAULTS[fault][1] in message


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = models.save(tmp_path / "whole.safetensors", {"a": torch.ones(3), "b": torch.ones(2)}).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refusal(path).startswith(f"{path}: ")


def test_a_file_cut_while_open_is_noticed(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", {"a": torch.ones(3), "b": torch.ones(2)})
    with Checkpoint(path) as opened:
        os.truncate(path, path.stat().st_size - 4)
        with pytest.raises(CalibQuantError, match=r"m\.safetensors: ends inside tensor b: download"):
            opened.read("b")


def test_a_missing_file_and_a_missing_tensor(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    with Checkpoint(models.save(tmp_path / "m.safetensors", {"a": torch.ones(1)})) as opened:
        with pytest.raises(CalibQuantError, match="has no tensor b"):
            opened.read("b")


# --- reader: shards and folders


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return models.save_sharded(tmp_path / "model", {name: torch.full((2,), i) for i, name in enumerate("abcd")})


@pytest.mark.parametrize("as_folder", [False, True], ids=["index", "folder"])
def test_shards_read_as_one_model(index: Path, as_folder: bool) -> None:
    with Checkpoint(index.parent if as_folder else index) as opened:
        assert {name: opened.read(name)[0].item() for name in opened.entries} == {"a": 0, "b": 1, "c": 2, "d": 3}
        assert opened.nbytes() == sum(f.stat().st_size for f in index.parent.glob("*.safetensors"))


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    models.save(tmp_path / "m.safetensors", {"a": torch.ones(1)})
    with Checkpoint(tmp_path) as opened:
        assert list(opened.entries) == ["a"]


def test_a_folder_with_two_files_or_none_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path}: no .safetensors file")
    for name in "ab":
        models.save(tmp_path / f"{name}.safetensors", {"a": torch.ones(1)})
    assert refusal(tmp_path).startswith(f"{tmp_path}: 2 candidates")


def test_a_missing_shard_is_named(index: Path) -> None:
    shard = index.parent / "a-2-of-2.safetensors"
    shard.unlink()
    assert refusal(index).startswith(f"{shard}: this shard of a.safetensors.index.json is missing")


def test_an_index_that_does_not_fit_its_shards_is_refused(index: Path) -> None:
    content = json.loads(index.read_text())
    content["weight_map"]["e"] = "a-1-of-2.safetensors"
    index.write_text(json.dumps(content))
    assert "tensor e is not in a-1-of-2.safetensors" in refusal(index)


def test_a_tensor_in_two_shards_is_refused(index: Path) -> None:
    save_file({"b": torch.ones(2), "d": torch.ones(2), "a": torch.ones(2)}, index.parent / "a-2-of-2.safetensors")
    assert "tensor a is also in" in refusal(index)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {"a": "../a.safetensors"}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(index: Path, text: str) -> None:
    index.write_text(text)
    assert refusal(index).startswith(f"{index}: is no safetensors index")


# --- writer: what it writes

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "wide": torch.arange(5, dtype=torch.float64),
    "half": torch.arange(3, dtype=torch.bfloat16).view(3, 1),
    "codes": torch.arange(4, dtype=torch.float32).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 4),
    "ünïcode": torch.tensor([True]),
}
METADATA = {"format": "pt", "note": "größer"}


def write(path: Path, tensors: models.Tensors = TENSORS, **options: bool) -> Path:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with Writer(path, specs, METADATA, **options) as writer:
        for name in reversed(tensors):  # any order
            writer.write(name, tensors[name])
    assert path.stat().st_size == file_size(specs, METADATA)
    return path


def test_safetensors_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    with safe_open(write(tmp_path / "m.safetensors"), "pt") as file:
        assert file.metadata() == METADATA
        assert set(file.keys()) == set(TENSORS)
        for name, expected in TENSORS.items():
            found = file.get_tensor(name)
            assert found.dtype == expected.dtype and torch.equal(found.double(), expected.double())


def test_the_reader_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    path = models.save(tmp_path / "m.safetensors", TENSORS, METADATA)
    with Checkpoint(path) as opened:
        assert opened.metadata == METADATA
        for name, expected in TENSORS.items():
            found = opened.read(name)
            assert found.dtype == expected.dtype and torch.equal(found.double(), expected.double())
            assert b"".join(opened.chunks(name)) == expected.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_larger_than_a_chunk_is_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "COPY_CHUNK", 7)
    data = torch.arange(50, dtype=torch.uint8)
    with Checkpoint(models.save(tmp_path / "m.safetensors", {"a": data})) as opened:
        assert b"".join(bytes(part) for part in opened.chunks("a")) == bytes(range(50))


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    with Checkpoint(write(tmp_path / "m.safetensors")) as opened:
        assert all(e.start % max(1, TENSORS[name].element_size()) == 0 for name, e in opened.entries.items())


def test_the_same_tensors_make_the_same_bytes(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_metadata_can_change_as_long_as_its_length_stays(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with Writer(path, [TensorSpec("a", torch.uint8, (1,))], {"hash": "0000"}) as writer:
        writer.write("a", torch.ones(1, dtype=torch.uint8))
        writer.set_metadata({"hash": "beef"})
        with pytest.raises(ValueError, match="keep its length"):
            writer.set_metadata({"hash": "a whole lot more than before"})
    with Checkpoint(path) as opened:
        assert opened.metadata == {"hash": "beef"} and opened.read("a").item() == 1


# --- writer: what it refuses


def test_an_existing_target_needs_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: exists already.*--overwrite"):
        write(path)
    assert path.read_bytes() == b"precious"
    assert Checkpoint(write(path, overwrite=True)).entries.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("name", "why"),
    [("m.gguf", "must be named"), ("none/m.safetensors", "no such folder"), ("file/m.safetensors", "no such folder")],
)
def test_an_impossible_target_is_refused(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CalibQuantError, match=why):
        write(tmp_path / name)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: needs .* GB, .* are free: make room"):
        write(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder in which this process may not write; root lends itself another identity for it."""
    if os.name != "posix":
        pytest.skip("POSIX only")
    folder = Path(tempfile.mkdtemp())  # not below pytest's folders, which only root may enter
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_named(read_only_folder: Path) -> None:
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: cannot be written: Permission denied"):
        write(read_only_folder / "m.safetensors")


def test_a_folder_that_may_not_be_entered_is_named(read_only_folder: Path) -> None:
    inside = read_only_folder / "closed"
    os.seteuid(0) if os.getuid() == 0 else read_only_folder.chmod(0o755)
    inside.mkdir(mode=0o600)
    os.seteuid(65534) if os.getuid() == 0 else None
    try:
        for use in (write, Checkpoint):
            with pytest.raises(CalibQuantError, match=r"m\.safetensors: cannot be reached: Permission denied"):
                use(inside / "m.safetensors")
    finally:
        os.seteuid(0) if os.getuid() == 0 else inside.chmod(0o700)


def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibQuantError, match="tensor a came out as"):
        with Writer(tmp_path / "m.safetensors", [TensorSpec("a", torch.uint8, (2,))], {}) as writer:
            writer.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibQuantError, match="1 tensors were never written: a"):
        with Writer(tmp_path / "m.safetensors", [TensorSpec("a", torch.uint8, (2,))], {}):
            pass
    assert list(tmp_path.iterdir()) == []


# --- writer: nothing is lost


@POSIX
def test_a_link_at_any_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, path = tmp_path / "precious", tmp_path / "m.safetensors"
    precious.write_bytes(b"precious")
    monkeypatch.setattr(disk.secrets, "token_hex", lambda n: "0" * 2 * n)
    for name in ("m.safetensors.partial", f"m.safetensors.calibquant-{'0' * 16}.partial"):
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(CalibQuantError, match=r"m\.safetensors: "):
        write(path)
    assert precious.read_bytes() == b"precious" and len(list(tmp_path.iterdir())) == 3


def test_a_source_named_like_a_temporary_file_stays(tmp_path: Path) -> None:
    source = models.save(tmp_path / "m.safetensors.partial", TENSORS)
    before = source.read_bytes()
    write(tmp_path / "m.safetensors")
    assert source.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("links", [False, True], ids=["no hard links", "hard links"])
def test_of_two_writers_one_wins_whole(
    overwrite: bool, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:  # as on exFAT
        monkeypatch.setattr(os, "link", refuse)
    path, specs = tmp_path / "m.safetensors", [TensorSpec("a", torch.uint8, (1,))]
    first, second = (Writer(path, specs, {}, overwrite) for _ in range(2))
    with contextlib.nullcontext() if overwrite else pytest.raises(CalibQuantError, match="another run made it meanwh"):
        with second:
            second.write("a", torch.tensor([2], dtype=torch.uint8))
            with first:
                first.write("a", torch.tensor([1], dtype=torch.uint8))
            assert Checkpoint(path).read("a").item() == 1
    assert Checkpoint(path).read("a").item() == (2 if overwrite else 1)
    assert list(tmp_path.iterdir()) == [path]


@POSIX
def test_only_what_a_dead_run_left_for_this_target_is_removed(tmp_path: Path) -> None:
    path, specs = tmp_path / "m.safetensors", [TensorSpec("a", torch.uint8, (1,))]
    names = [f"{stem}.calibquant-{'0' * 16}.partial" for stem in ("m.safetensors", "n.safetensors", "m")]
    names += ["m.safetensors.partial", "m.safetensors.calibquant-1.partial"]
    for name in names:
        (tmp_path / name).touch()
    with Writer(tmp_path / "m.safetensors", specs, {}, overwrite=True) as at_work:
        write(path)  # while another is at work
        at_work.write("a", torch.ones(1, dtype=torch.uint8))
    assert {p.name for p in tmp_path.iterdir()} == {path.name, *names[1:]}


# --- writer: interruptions


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing_and_spares_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error):
        with Writer(path, [TensorSpec("a", torch.uint8, (2,))], {}, overwrite=True) as writer:
            writer.write("a", torch.zeros(2, dtype=torch.uint8))
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"] and path.read_bytes() == b"old"


# A process that writes one of two tensors, says so, and waits.
WRITE_AND_WAIT = """
import sys, time, torch
from quant_core.files.checkpoint import TensorSpec, Writer
with Writer(sys.argv[1], [TensorSpec(n, torch.uint8, (1 << 20,)) for n in "ab"], {}) as writer:
    writer.write("a", torch.ones(1 << 20, dtype=torch.uint8))
    print("half", flush=True)
    time.sleep(60)
"""


def test_kill_during_the_write_leaves_the_final_name_free(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with subprocess.Popen(models.python(WRITE_AND_WAIT, path), stdout=subprocess.PIPE, cwd=models.ROOT) as process:
        assert process.stdout and process.stdout.readline().strip() == b"half"
        process.kill()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"m\.safetensors\.calibquant-[0-9a-f]{16}\.partial", left.name)
    write(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


# A process that may write files of 64 KB at most: what a disk looks like that fills up during the write.
FILL_UP = """
import resource, signal, sys, torch
from quant_core.files.checkpoint import TensorSpec, Writer
from quant_core.errors import CalibQuantError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
header, tensor, last = (int(n) for n in sys.argv[2:])
specs = [TensorSpec("a", torch.uint8, (tensor,)), TensorSpec("b", torch.uint8, (last,))]
try:
    with Writer(sys.argv[1], specs, {"x": "y" * header}) as writer:
        for spec in specs:
            writer.write(spec.name, torch.ones(spec.shape, dtype=spec.dtype))
        writer.set_metadata({"x": "z" * header})
except CalibQuantError as e:
    print(e)
"""


@POSIX
@pytest.mark.parametrize("sizes", [(100_000, 9, 9), (9, 100_000, 9), (9, 64_000, 3000)], ids=["header", "body", "end"])
def test_a_disk_that_fills_up_leaves_nothing(sizes: tuple[int, ...], tmp_path: Path) -> None:
    done = subprocess.run(
        models.python(FILL_UP, tmp_path / "m.safetensors", *sizes), capture_output=True, text=True, cwd=models.ROOT
    )
    assert re.fullmatch(r".*m\.safetensors: cannot be written: File too large\n", done.stdout), done.stderr
    assert list(tmp_path.iterdir()) == []


@POSIX
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_mode_follows_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = write(tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


# --- memory

# Prints by how many bytes the peak grows while a model is quantized, after one that is tiny.
PEAK = """
import sys
from quant_core import jobs
from quant_core.models.source import Source
from quant_core.planning import recipes
def run(path):
    with Source(path) as source:
        jobs.quantize(source, recipes.make_plan(source, sys.argv[3]), path + ".out.safetensors", device="cpu")
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
small = run(sys.argv[1])
print(run(sys.argv[2]) - small)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_memory_is_a_few_times_the_largest_tensor(tmp_path: Path) -> None:
    small = models.save(tmp_path / "small.safetensors", models.zimage())
    large = models.save(tmp_path / "large.safetensors", models.zimage(dim=1024, ffn=2048, layers=4))
    largest = 3 * 1024 * 1024 * 2
    assert large.stat().st_size > 18 * largest
    command = models.python(PEAK, small, large, "nvfp4")
    # On one thread, and what is freed goes back at once: else threads keep chunks, and glibc more or less of the rest.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **models.FREED_AT_ONCE}
    done = subprocess.run(command, capture_output=True, text=True, cwd=models.ROOT, env=environment, check=True)
    assert int(done.stdout) < 5 * largest


def test_two_sizes_have_one_unit() -> None:
    assert change_of_size(150_000_000, 74_000_000) == "150.00 MB → 74.00 MB"
    assert change_of_size(12_300_000_000, 3_460_000_000) == "12.30 GB → 3.46 GB"


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX systems")
def test_a_run_whose_new_file_another_took_for_abandoned_makes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, flock, rivals = tmp_path / "out.bin", disk.fcntl.flock, [1]

    def late(file: Any, how: int) -> None:
        if rivals:  # between the file's making and its lock
            rivals.pop()
            disk.remove_abandoned(target)
        flock(file, how)

    monkeypatch.setattr(disk.fcntl, "flock", late)
    with disk.NewFile(target) as new:
        new.file.write(b"whole")
        new.publish(overwrite=False)
    assert not rivals and target.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [target]
