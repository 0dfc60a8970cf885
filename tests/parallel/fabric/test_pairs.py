"""Pairs measured between real ranks: who was slowed is named, what was measured is in the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from parallel.bench import pairs
from tests.parallel.fabric import pairs_ranks
from tests.ranks import launch, run_ranks


def test_a_process_that_is_slowed_on_purpose_is_named() -> None:
    slow = 2
    matrix, complete = run_ranks(pairs_ranks.measure, 4, slow, [8, 1 << 16, 1 << 20], None)[1]
    assert complete
    found = matrix.findings(2.0)
    text = "\n".join(each.text(matrix.places) for each in found)
    assert found, matrix
    # On a busy machine a link between others may stand out, too, but no other rank.
    assert {each.ranks for each in found if each.kind == "rank"} == {(slow,)}, text
    assert "compute" in {each.what for each in found}, text


def test_all_ranks_know_all_links() -> None:
    results = run_ranks(pairs_ranks.together, 5)
    for matrix in results:
        links = matrix.seconds[:, ~np.eye(5, dtype=bool)]
        assert np.isfinite(links).all() and (links > 0).all()
        assert np.isnan(matrix.seconds[:, np.eye(5, dtype=bool)]).all()
        assert (matrix.compute > 0).all()
        np.testing.assert_array_equal(matrix.seconds, results[0].seconds)


def test_one_rank_that_is_told_to_stop_stops_all_between_two_rounds() -> None:
    for matrix, complete in run_ranks(
        pairs_ranks.measure, 3, None, [8, 1024], 2
    ):  # once after the work, twice for pairs
        assert not complete
        assert np.isfinite(matrix.latency).sum() == 4  # two pairs of three


def test_places() -> None:
    found = run_ranks(pairs_ranks.arranged, 4, 2)[3]
    assert [(place.node, place.local) for place in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = run_ranks(pairs_ranks.arranged, 2, None)[0]
    assert [(place.node, place.local) for place in found] == [(0, 0), (0, 1)]
    with pytest.raises(AssertionError, match="nodes of 3 ranks do not divide 4 ranks"):
        run_ranks(pairs_ranks.arranged, 4, 3)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    arguments = [
        "-m",
        "parallel.bench",
        "pairs",
        "--sizes",
        "8,64K,256K",
        "--seconds",
        "0.05",
        "--tolerance",
        "1000000",  # whatever else the machine does meanwhile
        "--json",
        str(file),
    ]
    done = launch([*arguments, "--strict"], 2)
    assert done.returncode == 0, done.stderr
    assert "# 2 ranks on 1 node, 1 of 1 pairs, 8 B to 256 KiB" in done.stdout
    assert "only the two directions of one link can be compared" in done.stdout
    assert "no rank and no link is slower than its like" in done.stdout
    written = json.loads(file.read_text())
    assert written["complete"] and written["sizes"] == [8, 1 << 16, 1 << 18] and written["findings"] == []
    assert {each["group"] for each in written["fits"]} == {"0>1", "1>0"}
    assert written["microseconds"][0][0][0] is None and written["microseconds"][0][0][1] > 0
    assert len(written["bandwidth_gbs"]) == len(written["compute_microseconds"]) == 2


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "this job has one"),
        (["--sizes", "12Q"], "'12Q' is no size"),
        (["--tolerance", "1"], "--tolerance 1: should be above 1"),
        (["--seconds", "0"], "--seconds 0: should be above 0"),
        (["--sorted"], "unrecognized arguments: --sorted"),
        (["--apart", "--together"], "not allowed with"),
    ],
)
def test_bad_usage_in_one_line(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pairs.main(arguments) == 2
    told = capsys.readouterr().err
    assert part in told and told.count("\n") == 1, told
