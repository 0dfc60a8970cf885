"""The command line: bad input in one clear line, real kills, full disks, and what inspect prints."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.__main__ import main
from pretrain.data.encode import Work, make_all, make_unit
from pretrain.data.errors import PrepareFailure
from pretrain.data.manifest import read
from pretrain.data.parts import UnitRecord
from pretrain.data.sources import Reading
from pretrain.data.units import plan
from tests.pretrain.data.test_store import patch, truncate, write_megatron

ROOT = Path(__file__).parents[3]
UNITS, UNIT_BYTES = 48, 200_000


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("def f(x):\n    return x\n")
    (folder / "bad.txt").write_bytes(b"good so far \xe9\n")
    (folder / "empty.txt").write_text("")
    (folder / "a.zip").write_bytes(b"PK")
    (folder / "rows.jsonl").write_text('{"body": "x", "n": 1}\n')
    (folder / "number.jsonl").write_text('{"text": 2}\n{"text": 3}\n')
    (folder / "broken.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    (folder / "latin.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9"}\n')
    (folder / "array.jsonl").write_text('{"text": "x"}\n[1, 2]\n')
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), folder / "t.parquet")
    (folder / "cut.parquet").write_bytes((folder / "t.parquet").read_bytes()[:-9])
    (folder / "bad.model").write_bytes(b"no model")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("--input {in}/none*.txt", 77, ["none*.txt' matches no file", "check the path"]),
        ("--input {in}", 77, ["matches only folders", "{in}/**/*"]),
        ("--input {in}/sub/*", 77, ["matches no file"]),
        ("--input {in}/a.txt --exclude *a.txt", 77, ["--exclude leaves none of 1 files"]),
        ("--input {in}/empty.txt", 77, ["no text in 1 files"]),
        ("--input {in}/bad.txt", 77, ["bad.txt is not UTF-8 at byte 12 (0xe9)", "--on-bad skip"]),
        ("--input {in}/bad.txt --on-bad skip", 77, ["no training text in 1 files"]),
        ("--input {in}/a.zip", 2, ["unknown format '.zip'", "--format text"]),
        ("--input {in}/rows.jsonl", 2, ["has no field 'text'; its fields are: body, n", "--text-field"]),
        ("--input {in}/t.parquet", 2, ["has no field 'text'; its fields are: body"]),
        ("--input {in}/number.jsonl", 77, ["number.jsonl row 1", "holds", "not text"]),
        ("--input {in}/broken.jsonl", 77, ["broken.jsonl row 2 (byte 15) is not readable", "mend the row"]),
        ("--input {in}/latin.jsonl", 77, ["latin.jsonl row 2 (byte 14) is not UTF-8"]),
        ("--input {in}/array.jsonl", 77, ["array.jsonl row 2 (byte 14)", "this is list"]),
        ("--input {in}/cut.parquet", 77, ["cut.parquet is not readable as parquet"]),
        ("--input {in}/a.txt --format parquet", 77, ["a.txt is not readable as parquet", "--format"]),
        ("--input {in}/a.txt --validation 0 --vocabulary 100000", 2, ["more than this text supports: use --vocabulary 2"]),
        ("--input {in}/a.txt --validation 0 --vocabulary 20", 2, ["use at least 260"]),
        ("--input {in}/a.txt --validation 1.5", 2, ["--validation 1.5 is not a share"]),
        ("--input {in}/a.txt --workers 0", 2, ["--workers 0"]),
        ("--input {in}/a.txt --document-bytes 10", 2, ["pass 1024 or more"]),
        ("--input {in}/a.txt --tokenizer {in}/none.model", 2, ["no tokenizer at"]),
        ("--input {in}/a.txt --tokenizer {in}/bad.model", 77, ["bad.model is not a SentencePiece model"]),
        ("--input {in}/a.txt --tokenizer {model} --validation 0.001", 2, ["none of the 1 documents fell to validation"]),
        ("--input {in}/a.txt --tokenizer {model} --validation 0.999", 77, ["all fell to validation"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    inputs: Path, prepared: Path, capsys: pytest.CaptureFixture[str], arguments: str, code: int, expected: list[str]
) -> None:
    words = arguments.replace("{in}", str(inputs)).replace("{model}", str(prepared / "tokenizer.model")).split()
    output = inputs.parent / "out"
    assert main(["prepare", "--output", str(output), "--workers", "1", *words]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    for text in expected:
        assert text.replace("{in}", str(inputs)) in error
    assert left(inputs.parent) == ["in"]


def test_bad_usage_is_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["prepare"], ["prepare", "--input", "x", "--output", "y", "--format", "csv"], ["burn"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
    assert "invalid choice: 'csv'" in capsys.readouterr().err


def test_a_folder_that_is_not_empty_is_kept(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--input", f"{inputs}/a.txt", "--output", str(inputs)]) == 2
    assert "exists and is not empty; pass `--overwrite`" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [2_000, 50_000, 200_000])
def test_full_disk(
    text_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    # The limit on file size stands in for a full disk: the same writes fail, with EFBIG. Python ignores SIGXFSZ.
    words = ["prepare", "--input", f"{text_folder}/*", "--output", str(tmp_path / "out"), "--workers", "1"]
    words += ["--tokenizer", str(prepared / "tokenizer.model"), "--validation", "0.2"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 1
    assert "no space for" in error
    assert "nothing was left behind. Free some space" in error
    assert left(tmp_path) == []


def test_a_disk_that_is_full_when_units_are_merged(
    text_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--input", f"{text_folder}/*", "--output", str(tmp_path / "out"), "--workers", "1"]
    words += ["--tokenizer", str(prepared / "tokenizer.model"), "--validation", "0.2", "--unit-bytes", "60000"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, before[1]))
    try:
        code = main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert code == 1
    assert "no space for" in error
    count = len(list((tmp_path / "out.parts" / "units").iterdir()))
    assert f"{count} units are finished and kept in {tmp_path}/out.parts: the same command goes on" in error
    assert left(tmp_path) == ["out.parts"]
    assert main(words) == 0
    assert f"{count} units: 0 made, {count} found finished" in capsys.readouterr().out


def test_unwritable_place(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--input", f"{inputs}/a.txt", "--output", "/proc/none/out"]) == 1
    assert "writing /proc/none/out failed" in capsys.readouterr().err


# `python -m pretrain.data`, but for the second half of the units, which its workers never get: all are made in two seconds, and
# the test's process may stand still for longer.
HELD = """
import sys, time
from pretrain.data import __main__, encode, prepare

def held(units):
    for number, unit in enumerate(units):
        while number == len(units) // 2:
            time.sleep(0.05)
        yield unit

prepare.make_all = lambda units, *rest: encode.make_all(held(units), *rest)
sys.exit(__main__.main(sys.argv[1:]))
"""


def start_long_run(tmp_path: Path, model: Path, wait_for: str) -> subprocess.Popen[str]:
    """A prepare of 9 MB, 48 units, on two workers, once `wait_for` is in its folder of units."""
    line = "".join(f"value_{i} = compute(value_{i - 1}, {i * 7919})\n" for i in range(UNIT_BYTES // 50))
    for i in range(UNITS):
        (tmp_path / f"big{i}.txt").write_text(f"# {i}\n{line}")
    words = ["prepare", "--input", f"{tmp_path}/big*.txt", "--output", str(tmp_path / "out" / "corpus")]
    words += ["--workers", "2", "--tokenizer", str(model), "--unit-bytes", str(UNIT_BYTES)]
    run = subprocess.Popen(
        [sys.executable, "-c", HELD, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True, process_group=0
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list((tmp_path / "out" / "corpus.parts").glob(wait_for)):
            return run
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.02)
    raise AssertionError("nothing was written in 120 s")


@pytest.mark.parametrize(
    ("wait_for", "signum"), [(f"units/{'?' * 16}/record.json", signal.SIGINT), ("tokenizer.model", signal.SIGTERM)]
)
def test_interrupted(prepared: Path, tmp_path: Path, wait_for: str, signum: int) -> None:
    # Ctrl-C goes to the workers too; a scheduler's SIGTERM to the parent alone, here before a unit is finished.
    run = start_long_run(tmp_path, prepared / "tokenizer.model", wait_for)
    os.killpg(run.pid, signum) if signum == signal.SIGINT else run.terminate()
    _, error = run.communicate(timeout=60)
    assert run.returncode == 1
    last = error.strip().splitlines()[-1]
    assert last.startswith("interrupted; nothing half-written was left behind")
    assert "Traceback" not in error
    kept = list((tmp_path / "out").glob("corpus.parts/units/*"))
    assert all((unit / "record.json").is_file() for unit in kept)
    if signum == signal.SIGINT:
        assert kept
        assert f" of {UNITS} units are finished and kept in" in last
    else:
        assert left(tmp_path / "out") in ([], ["corpus.parts"])


def test_an_interrupt_that_python_drops_is_not_lost(
    prepared: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Destroyed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)  # raised in here, KeyboardInterrupt is printed and forgotten

    def make(*arguments: Any) -> UnitRecord:
        Destroyed()
        return make_unit(*arguments)

    words = ["prepare", "--input", f"{inputs}/a.txt", "--output", str(tmp_path / "out"), "--workers", "1"]
    words += ["--tokenizer", str(prepared / "tokenizer.model"), "--validation", "0"]
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: None)
    monkeypatch.setattr("pretrain.data.encode.make_unit", make)
    assert main(words) == 1
    assert left(tmp_path) == ["in"]


def test_a_killed_worker(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} " + "x = 1\n" * 500}) for i in range(3000)))
    units = plan([(tmp_path / "a.jsonl", "jsonl", (tmp_path / "a.jsonl").stat().st_size)], (), 200_000)
    assert len(units) > 40
    me = psutil.Process()
    before = set(me.children())
    results = make_all(units, Work(tmp_path / "parts", Reading(), 0, 0.0), prepared / "tokenizer.model", 2)
    next(results)
    next(child for child in me.children() if child not in before and "spawn_main" in str(child.cmdline())).kill()
    with pytest.raises(PrepareFailure, match="a worker process was killed, most likely for want of memory; pass fewer"):
        list(results)


def test_killed_outright_and_run_again(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = start_long_run(tmp_path, prepared / "tokenizer.model", f"units/{'?' * 16}/record.json")
    workers = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.communicate(timeout=60)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) >= 2
    assert not alive  # no worker waits for a parent that is dead
    assert left(tmp_path / "out") == ["corpus.parts"]
    units = tmp_path / "out" / "corpus.parts" / "units"
    times = {
        path.parent.name: path.stat().st_mtime_ns for path in units.glob("*/record.json") if path.parent.suffix == ""
    }
    assert 1 <= len(times) < UNITS
    (units / "0123456789abcdef.x.partial").mkdir()  # of a unit of another shard, perhaps still at work

    words = ["prepare", "--input", f"{tmp_path}/big*.txt", "--unit-bytes", str(UNIT_BYTES)]
    words += ["--tokenizer", str(prepared / "tokenizer.model"), "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out" / "corpus"), "--shard", "1/1"]) == 0
    assert f"{UNITS} units: {UNITS - len(times)} made, {len(times)} found finished" in capsys.readouterr().out
    again = {path.parent.name: path.stat().st_mtime_ns for path in units.glob("*/record.json")}
    assert len(again) == UNITS
    assert {name: again[name] for name in times} == times
    assert main(["merge", "--output", str(tmp_path / "out" / "corpus")]) == 0
    assert left(tmp_path / "out") == ["corpus"]

    assert main([*words, "--output", str(tmp_path / "whole")]) == 0
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out/corpus")
    )
    assert one == other


def test_prepare_prints_counts_and_the_next_command(
    text_folder: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (tmp_path / "again.txt").write_bytes((text_folder / "nasty.txt").read_bytes())
    words = ["prepare", "--input", f"{text_folder}/*", "--input", f"{tmp_path}/*.txt", "--output", str(output)]
    words += ["--workers", "1", "--seed", "3"]
    assert main([*words, "--tokenizer", str(prepared / "tokenizer.model"), "--validation", "0.2"]) == 0
    out = capsys.readouterr().out
    manifest = read(output)
    for split in manifest.splits.values():
        assert f"{split.tokens:,}" in out
        assert f"{split.bytes:,}" in out
    assert f"{manifest.input_files} files in " in out
    assert "left out: 1 duplicate" in out
    assert f"python -m pretrain.data inspect {output}" in out
    assert f"data.path={output}" in out


def test_help_is_light() -> None:
    code = "import sys, pretrain.data.__main__ as m; m.parser().format_help(); import pretrain.data"
    code += "; print(sorted({'torch', 'datasets', 'megatron', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_inspect(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(prepared), "--verify", "--documents", "1", "--samples", "3", "--sequence-length", "40"]
    assert main(words) == 0
    out = capsys.readouterr().out
    manifest = read(prepared)
    assert f"verified: {len(manifest.files)} files match the hashes" in out
    assert f"verified: validation.bin: spells {manifest.splits['validation'].bytes:,} bytes of text" in out
    assert "most frequent tokens" in out
    assert "document 0 begins: tokens 0 to 40 of" in out
    assert out.count("\nsequence ") == 3
    bars = [line for line in out.splitlines() if "█" in line]
    assert sum(int(line.split()[3]) for line in bars) == manifest.splits["train"].documents
    shown = [line.split("│") for line in out.splitlines() if line.startswith("│")][2:]
    counts = [int(cells[3].replace(",", "")) for cells in shown]
    assert counts == sorted(counts, reverse=True)
    assert len(counts) == 20


def test_inspect_shows_where_documents_meet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_megatron(tmp_path / "pair", [[[10, 11, 12]], [[20, 21]]])
    assert main(["inspect", str(tmp_path / "pair"), "--samples", "1", "--sequence-length", "4"]) == 0
    out = capsys.readouterr().out
    assert "2 documents, 5 tokens of int32" in out
    assert "--- document 0 begins: tokens 0 to 3 of 3, ends ---\n10 11 12" in out
    assert "--- document 1 begins: tokens 0 to 2 of 2, ends ---\n20 21" in out


def test_inspect_verify_finds_damage(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = (copied / "train.bin").stat().st_size
    raw = (copied / "train.bin").read_bytes()
    patch(copied / "train.bin", size - 4, bytes([raw[size - 4] ^ 1]))  # another id of the vocabulary
    assert main(["inspect", str(copied), "--samples", "0"]) == 0
    assert main(["inspect", str(copied), "--verify"]) == 77
    assert "train.bin" in capsys.readouterr().err
    patch(copied / "train.bin", 100, struct.pack("<H", 700))
    assert main(["inspect", str(copied), "--verify"]) == 77
    assert "token id 700 at byte 100 is outside the vocabulary of 512" in capsys.readouterr().err
    (copied / "train.bin").write_bytes(raw)
    truncate(copied / "validation_text.bin", 1)
    assert main(["inspect", str(copied), "--verify"]) == 77
    assert "validation_text.bin is truncated" in capsys.readouterr().err


def test_inspect_bad_usage(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 77
    assert "neither a prepared folder nor the prefix" in capsys.readouterr().err
    assert main(["inspect", str(prepared), "--sequence-length", "99999999"]) == 2
    assert "lower sequence_length to at most" in capsys.readouterr().err


def test_manifest_says_nothing_about_the_machine(prepared: Path) -> None:
    raw = json.loads((prepared / "manifest.json").read_text())
    assert set(raw) == {
        *("format", "version", "dtype", "splits", "tokenizer", "files", "input_files", "dropped", "settings")
    }
    assert "workers" not in raw["settings"]
    assert "output" not in raw["settings"]
