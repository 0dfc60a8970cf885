"""The measurement on real ranks: right answers for every op, wrong ones flagged, the command's output, files and errors."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from parallel.bench.__main__ import main
from tests.parallel.bench import bench_ranks
from tests.ranks import QUIET, ROOT, launch, run_ranks

QUICK = ("--backend", "gloo", "--iterations", "2", "--warmup", "1")


def rows_of(world: int, path: Path, *arguments: str) -> list[dict[str, Any]]:
    answers = run_ranks(bench_ranks.read, world, str(path), *QUICK, *arguments)
    assert [answer[0][0] for answer in answers] == [0] * world, answers[0][0]
    rows: list[dict[str, Any]] = answers[0][1]["rows"]
    return rows


def test_every_op_in_and_out_of_place_on_an_odd_number_of_ranks(tmp_path: Path) -> None:
    rows = rows_of(3, tmp_path / "a.json", "all", "--sizes", "4,1000,40000", "--place", "both", "--root", "2")
    assert all(row["wrong"] == 0 for row in rows if row["op"] != "barrier")
    both = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce")
    out_only = ("all_to_all", "all_to_all_uneven", "send_recv", "send_recv_pairs")
    found = {(row["op"], row["in_place"]) for row in rows}
    assert found == {(op, place) for op in both for place in (False, True)} | {
        (op, False) for op in (*out_only, "barrier")
    }
    sizes = {op: [row["bytes"] for row in rows if row["op"] == op and not row["in_place"]] for op in (*both, *out_only)}
    assert sizes["all_reduce"] == [4, 1000, 40000]
    assert sizes["all_gather"] == sizes["all_to_all"] == [12, 996, 39996]  # whole shards, at least one element each
    counts = {(row["op"], row["bytes"]): row["count"] for row in rows}
    assert counts["all_reduce", 1000] == 250
    assert counts["reduce_scatter", 996] == 83  # as nccl-tests prints it: of one shard
    for row in rows:
        assert row["group"] == "world"
        assert row["ranks"] == 3
        assert row["iterations"] == 2
        assert row["backend"] == "gloo"
        assert row["min"] <= row["p50"] <= row["p95"] <= row["p99"] <= row["max"]
        assert row["min"] <= row["microseconds"] <= row["max"]
        assert row["root"] == (2 if row["op"] in ("broadcast", "reduce") else None)
        if row["op"] == "all_reduce":
            assert row["algbw"] == pytest.approx(row["bytes"] / row["microseconds"] / 1e3)
            assert row["busbw"] == pytest.approx(row["algbw"] * 4 / 3)
    (barrier,) = (row for row in rows if row["op"] == "barrier")
    assert (barrier["bytes"], barrier["algbw"], barrier["busbw"], barrier["wrong"]) == (0, None, None, None)


def test_dtypes_and_reductions(tmp_path: Path) -> None:
    every = "fp32,fp64,fp16,bf16,int8,uint8,int32,int64"
    for redop in ("sum", "prod", "min", "max"):
        ops = ("all_reduce", "reduce_scatter", "reduce") if redop != "sum" else ("all",)
        rows = rows_of(2, tmp_path / "a.json", *ops, "--sizes", "4K", "--dtype", every, "--redop", redop)
        assert {row["dtype"] for row in rows} == set(every.split(","))
        assert all(row["wrong"] == 0 for row in rows if row["op"] != "barrier")


def test_several_groups_of_a_training_mesh_in_one_run(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("mesh: {tp: 2}\n")
    arguments = ("all_gather", "reduce_scatter", "send_recv", "--sizes", "6K", "--config", str(config))
    answers = run_ranks(bench_ranks.read, 4, str(tmp_path / "a.json"), *QUICK, *arguments)
    (code, text, _), result = answers[0]
    assert code == 0
    shapes = [(row["group"], row["ranks"]) for row in result["rows"] if row["op"] == "all_gather"]
    assert shapes == [("dp", 2), ("tp", 2), ("edp", 4)]
    assert result["groups"][0] == {"name": "dp", "ranks": 2, "stride": 2, "also": ["shard", "dp_cp", "shard_cp"]}
    assert all(row["wrong"] == 0 for row in result["rows"])
    assert "all_gather over dp (also shard, dp_cp, shard_cp): 2 groups of 2 ranks, 2 apart, all at once" in text
    assert [answer[0][1] for answer in answers[1:]] == ["", "", ""]  # one rank talks


def test_one_group_works_while_the_others_wait(tmp_path: Path) -> None:
    arguments = ("all", "--groups", "2,world", "--sizes", "4K", "--one-group")
    rows = rows_of(4, tmp_path / "a.json", *arguments)
    assert {row["group"] for row in rows} == {"n=2", "world"}
    assert all(row["wrong"] == 0 for row in rows if row["op"] != "barrier")
    assert all(row["microseconds"] > 0 for row in rows)
    rows = rows_of(4, tmp_path / "a.json", "all_reduce", "--groups", "2", "--sizes", "4K", "--one-group", "--isolated")
    assert rows[0]["wrong"] == 0


@pytest.mark.parametrize(
    ("fault", "op", "wrong"), [("stale", "all_reduce", 3), ("shifted", "all_to_all", None), ("one bit", "broadcast", 1)]
)
def test_a_wrong_collective_is_flagged(fault: str, op: str, wrong: int | None, tmp_path: Path) -> None:
    arguments = (*QUICK, op, "--sizes", "4K")
    answers = run_ranks(bench_ranks.with_fault, 2, fault, str(tmp_path / "a.json"), *arguments)
    assert [answer[0][0] for answer in answers] == [1, 1]
    (_, text, _), result = answers[0]
    (row,) = result["rows"]
    # Checked twice. Each round has data of its own; by chance some of the shifted parts may agree.
    assert row["wrong"] == 2 * wrong if wrong and fault == "one bit" else row["wrong"] > (2 if wrong else 1500)
    assert "FAILED" in text
    assert f"# WRONG: {op} over world, 4 KiB fp32" in text
    assert "on rank(s) 1" in text
    assert result["complete"]


def test_a_collective_that_does_nothing_is_flagged_for_every_op_and_place(tmp_path: Path) -> None:
    arguments = (*QUICK, "all", "--sizes", "4K", "--place", "both")
    answers = run_ranks(bench_ranks.without_collectives, 2, str(tmp_path / "a.json"), *arguments)
    (code, _, _), result = answers[0]
    assert code == 1
    rows = [row for row in result["rows"] if row["op"] != "barrier"]
    assert len(rows) == 14
    for row in rows:  # a quarter of the elements at least (the shards that a rank has anyway are right)
        assert row["wrong"] > row["bytes"] / 4 / 4, row


def test_without_a_check_nothing_is_claimed(tmp_path: Path) -> None:
    (row,) = rows_of(2, tmp_path / "a.json", "all_reduce", "--sizes", "4K", "--no-check")
    assert row["wrong"] is None


def test_the_time_is_that_of_the_last_rank() -> None:
    # 200 ms, and what a busy machine adds.
    for mean, all_took in run_ranks(bench_ranks.slow_rank, 2, 0.2):
        assert 200_000 <= mean <= all_took / 3


def test_the_time_of_a_pair_is_that_of_one_way() -> None:
    for least, _ in run_ranks(bench_ranks.slow_messages, 2, 0.1):
        assert 60_000 <= least < 190_000


def test_overlap_measures_both_alone_and_beside_each_other(tmp_path: Path) -> None:
    arguments = (*QUICK, "all_reduce", "--sizes", "256K", "--overlap", "64")
    answers = run_ranks(bench_ranks.read, 2, str(tmp_path / "a.json"), *arguments)
    (code, text, _), result = answers[0]
    assert code == 0
    (record,) = result["overlap"]
    (row,) = result["rows"]
    assert record["matmul"] == [64, 64, 64]
    assert record["matmul_dtype"] == "fp32"
    assert record["collective_alone"] == row["microseconds"]
    assert record["collective_slowdown"] == pytest.approx(record["collective_beside"] / record["collective_alone"])
    assert record["matmul_slowdown"] == pytest.approx(record["matmul_beside"] / record["matmul_alone"])
    assert 0 <= record["hidden"] <= 1
    assert "matmul 64x64x64 fp32" in text


def test_buffers_that_do_not_fit_are_left_out_on_all_ranks(tmp_path: Path) -> None:
    arguments = (*QUICK, "all_reduce", "--sizes", "4K,64T")
    answers = run_ranks(bench_ranks.read, 2, str(tmp_path / "a.json"), *arguments)
    (code, text, _), result = answers[0]
    assert code == 0
    assert [row["bytes"] for row in result["rows"]] == [4096]
    assert "all_reduce, world: 64 TiB and beyond left out: buffers of 64 TiB a rank do not fit" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--sizes", "12Q"), "'12Q' is no size: a size is a number of bytes"),
        (("--sizes", "8K:1K"), "write the smaller size first: 1K:8K"),
        (("all_redcue",), "did you mean 'all_reduce'?"),
        (("--dtype", "fp31"), "choose among fp32, fp64"),
        (("--redop", "xor"), "choose among sum, prod, min, max, avg"),
        (("--redop", "avg"), "gloo has no average"),
        (("--redop", "avg", "--dtype", "int8"), "choose a floating-point --dtype"),
        (("--iterations", "0"), "must be at least 1"),
        (("--max-iterations", "5"), "is below --min-iterations 20"),
        (("--confidence", "0"), "must be above 0"),
        (("--plot", "x.jpeg"), "must end in one of .png, .svg, .pdf"),
        (("--groups", "3"), "groups of 3 ranks do not divide 1 ranks"),
        (("--groups", "tp"), "--mesh tp=SIZE"),
        (("--mesh", "tp=2"), "mesh: tp=2 does not divide 1 rank(s)"),
        (("--config", "nowhere.yaml"), "no such file"),
        (("broadcast", "--root", "1"), "--root 1: the groups of world have 1 rank(s)"),
        (("send_recv",), "nothing to measure: send_recv over world left out: it takes 2 ranks"),
        (("all_to_all", "--place", "in"), "it has no in-place form"),
        (("--json", "/nowhere/x.json"), "--json: /nowhere/x.json cannot be written: No such file"),
        (("--hardware", "mi3000"), "there are h100, h200, mi300x"),
        (("--overlap", "--cuda-graph"), "leave out --cuda-graph"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
)  # fmt: skip
def test_bad_usage_says_what_would_do(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    try:
        code = main(["--backend", "gloo", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    assert code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--cuda-graph",), ("--stream", "own"), ("--high-priority",)])
def test_options_of_gpus_are_refused_without_one(option: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backend", "gloo", *option]) == 2
    assert f"{option[0]}: only with a GPU, and " in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["nccl", "rccl"])
def test_gpu_backends_are_refused_without_one(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["--backend", backend]) == 2
    assert f"--backend {backend} needs a GPU, and torch {torch.__version__} sees none" in capsys.readouterr().err


def test_one_process_reports_algbw_only(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    arguments = ("all", "--sizes", "1K:4K", *QUICK, "--json", str(file), "--csv", str(tmp_path / "a.csv"))
    done = launch(["-m", "parallel.bench", *arguments], nproc=None)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["complete"]
    assert result["machine"]["ranks"] == 1
    moved = [row for row in result["rows"] if row["bytes"]]
    assert len(moved) == 7 * 3
    assert all(row["busbw"] is None and row["algbw"] > 0 and row["wrong"] == 0 for row in moved)
    assert "send_recv over world left out: it takes 2 ranks" in done.stdout
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(result["rows"])


def test_a_signal_to_one_rank_stops_all_and_leaves_the_results_so_far(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    arguments = ("all_reduce", "all_gather", "--backend", "gloo", "--sizes", "1K,2K,4K,8K", "--iterations", "15")
    answers = run_ranks(bench_ranks.told_to_stop, 3, str(file), *arguments, "--csv", str(tmp_path / "a.csv"))
    assert [answer[0][0] for answer in answers] == [143] * 3
    (_, text, _), result = answers[0]
    assert "# stopped by SIGTERM: these are the results so far" in text
    assert result["complete"] is False
    assert [row["bytes"] for row in result["rows"]] == [1024]  # the 30th call belongs to the second size
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_ctrl_c_of_the_real_command(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["parallel.bench", "--backend", "gloo", "--sizes", "1K,2K,1M:512M", "--iterations", "20"]
    process = subprocess.Popen(
        [*command, "--json", str(file)],
        cwd=ROOT,
        env={**QUIET, **os.environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    lines = []
    end = threading.Timer(120, process.kill)  # or a job that says nothing would be read for ever
    end.start()
    for line in process.stdout:
        lines.append(line)
        if line.split()[:1] == ["2048"]:
            process.send_signal(signal.SIGINT)
            break
    end.cancel()
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "# stopped by SIGINT: these are the results so far" in "".join(lines) + out, err
    result = json.loads(file.read_text())
    assert result["complete"] is False
    assert [row["bytes"] for row in result["rows"]][:2] == [1024, 2048]
    assert len(result["rows"]) < 12
    assert "cannot go on" not in err


@pytest.mark.parametrize("world", [2, 4])
def test_the_clock_says_of_the_same_iterations_what_a_bare_loop_says(world: int) -> None:
    """Whatever the machine does meanwhile: it does it to both."""
    for size in (64 << 10, 1 << 20):
        for found in run_ranks(bench_ranks.same_iterations, world, size, 200):
            assert found["apart"] < 0.02 * found["bare"]
            assert 0 < found["added"] < 0.02 * found["bare"]  # microseconds that taking the time costs


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
def test_within_two_percent_of_a_bare_loop(world: int) -> None:
    """Medians of ratios of neighbours in time: a shared machine changes more from minute to minute than the two differ."""
    sizes = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
    found = run_ranks(bench_ranks.against_bare, world, sizes, 25.0, timeout=1500)[0]
    off = []
    for each in found:
        pairs = [(each["ours"], each["bare"]), (each["ours"], each["again"])]
        ratios = [ours / bare for one, other in pairs for ours, bare in zip(one, other, strict=True)]
        same = [again / bare for again, bare in zip(each["again"], each["bare"], strict=True)]
        off.append(statistics.median(ratios) - 1)
        print(
            f"\n{world} ranks, {each['bytes']:>9} B, {each['iterations']:>3} iterations x {len(same):>5} turns: "
            f"ours {statistics.median(each['ours']):9.1f} us, bare {statistics.median(each['bare']):9.1f} us, "
            f"{off[-1]:+.2%} (bare against itself {statistics.median(same) - 1:+.2%})",
            end="",
        )
    print(f"\nload {Path('/proc/loadavg').read_text().strip()}")
    assert max(map(abs, off)) <= 0.02
