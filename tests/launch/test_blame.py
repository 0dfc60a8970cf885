"""Which hosts are left out: by whose ranks failed first, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.blame import excluded, guilty, write_file
from launch.outcome import RankEnd

Record = dict[str, Any]


def end(
    host: str, started: float, *ranks: tuple[int, int, float], message: str = "", at_fault: tuple[int, ...] = ()
) -> Record:
    """ranks: (rank, code, time)."""
    ends = [RankEnd(rank, rank % 2, code, time, message=message)._asdict() for rank, code, time in ranks]
    return {
        "event": "end", "host": host, "started": started, "time": max(time for _, _, time in ranks) + 5, "ranks": ends,
        "at_fault": list(at_fault),
    }  # fmt: skip


def causes(*records: Record) -> list[tuple[str, str]]:
    return [(record["host"], kind) for record, kind in guilty(records)]


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [(-9, "", "killed"), (-7, "", "killed"), (-11, "", None), (1, "", None), (-15, "", None), (75, "", None),
     (1, "RuntimeError: CUDA error: uncorrectable ECC error encountered", "device"),
     (1, "RuntimeError: HIP error: an illegal memory access was encountered", "device"),
     (1, "OutOfMemoryError: CUDA out of memory. Tried to allocate", None),
     (1, "RuntimeError: CUDA error: out of memory", None), (76, "", None), (79, "", None)],
)  # fmt: skip
def test_what_counts_against_a_host(code: int, message: str, kind: str | None) -> None:
    assert causes(end("a", 0.0, (0, code, 10.0), message=message)) == ([] if kind is None else [("a", kind)])


def test_the_first_to_fail_is_the_cause() -> None:
    a, b = end("a", 0.0, (0, 1, 11.0), (1, -9, 41.0)), end("b", 1.0, (2, -9, 10.0), (3, 1, 11.0))
    assert causes(a, b) == causes(b, a) == [("b", "killed")]  # what torchrun kills half a minute later is no cause
    assert causes(end("a", 0.0, (0, -9, 12.0)), b) == [("b", "killed")]
    assert causes(end("a", 0.0, (0, -9, 10.0)), end("b", 0.0, (1, -9, 10.0))) == []  # at once: something else did it
    assert causes(end("a", 0.0, (0, 1, 10.0), (1, -9, 10.0))) == [("a", "killed")]  # within a second


def test_lines_of_another_make_are_passed_over() -> None:
    assert causes({"event": "end", "host": "a", "time": 1.0}, end("a", 0.0, (0, -9, 10.0))) == [("a", "killed")]


def test_launches_are_kept_apart() -> None:
    earlier, later = end("a", 0.0, (0, -9, 10.0)), end("b", 20.0, (2, -9, 30.0))
    assert causes(earlier, end("b", 0.0, (2, 1, 10.0)), later, end("a", 20.0, (0, 1, 30.0))) == [
        ("a", "killed"),
        ("b", "killed"),
    ]


def test_a_hang_and_a_numerical_fault_are_on_the_ranks_that_are_named() -> None:
    for code, kind in ((76, "hang"), (79, "numerical")):
        a = end("a", 0.0, (0, code, 10.0), (1, code, 10.0), at_fault=(2,))
        b = end("b", 0.0, (2, code, 12.0), (3, code, 12.0), at_fault=(2,))
        assert causes(a, b) == [("b", kind)]
        both = (0, 2)
        a, b = end("a", 0.0, (0, code, 10.0), at_fault=both), end("b", 0.0, (2, code, 10.0), at_fault=both)
        assert causes(a, b) == []  # all alike


def test_hosts_are_left_out_after_so_many_times() -> None:
    killed = [end("a", 100.0 * n, (0, -9, 100.0 * n + 10)) for n in range(3)]
    assert excluded(killed[:2], 3) == {}
    assert excluded(killed, 3) == {"a": "first to fail 3 time(s) (killed, killed, killed)"}
    assert excluded(killed, 0) == {}
    pardon = {"event": "readmit", "host": "a", "time": 290.0}
    assert excluded([*killed, pardon], 3) == {}
    assert excluded([*killed, pardon, *(end("a", 300.0 + n, (0, -9, 310.0 + n)) for n in (0, 100, 200))], 3).keys() == {
        "a"
    }


def test_a_numerical_fault_is_enough_once() -> None:
    assert excluded([end("a", 0.0, (0, 79, 10.0), at_fault=(0,))], 3).keys() == {"a"}
    assert excluded([end("a", 0.0, (0, 79, 10.0))], 3) == {}


def test_the_file_for_the_scheduler(tmp_path: Path) -> None:
    write_file(tmp_path, {"n2": "", "n10": ""})
    assert (tmp_path / "excluded_hosts").read_text() == "n10\nn2\n"
    write_file(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
