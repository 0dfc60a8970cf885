"""The table, the files and the picture, from rows with known numbers."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from parallel.bench import files, fits, plot
from parallel.bench.rows import Row, bandwidths
from parallel.bench.table import Table, number


def row(
    op: str = "all_reduce", size: int = 1 << 20, microseconds: float = 1000.0, ranks: int = 2, **other: object
) -> Row:
    algbw, busbw = bandwidths("all_reduce" if op == "all_reduce" else "all_to_all", ranks, size, microseconds)
    made = Row(
        op=op, group="world", ranks=ranks, bytes=size, count=size // 4, dtype="fp32", in_place=True,
        microseconds=microseconds, p50=microseconds, p95=1200.0, p99=1500.0, min=900.0, max=1600.0, error=0.0123, algbw=algbw,
        busbw=busbw, wrong=0, iterations=40, backend="gloo", redop="sum", root=None,
    )  # fmt: skip
    return replace(made, **other)  # type: ignore[arg-type]


def test_one_place_has_the_columns_of_nccl_tests_and_percentiles() -> None:
    table = Table(both=False, places=(True,), room=200)
    over, names, units = table.head()
    assert over.split() == ["#", "in-place"]
    assert names.split() == [
        "#", "size", "count", "type", "redop", "root", "time", "algbw", "busbw", "#wrong", "p50", "p95", "p99", "+-%", "iters",
    ]  # fmt: skip
    assert units.split()[:4] == ["#", "(B)", "(elements)", "(us)"]
    line = table.line(row())
    assert line is not None
    assert line.split() == [
        "1048576", "262144", "float", "sum", "-1", "1000", "1.049", "1.049", "0", "1000", "1200", "1500", "1.2", "40",
    ]  # fmt: skip
    # Cells stand under their names.
    assert line.index("1.049") + 5 == names.index("algbw") + 5
    assert len(line) == len(names)


def test_both_places_have_exactly_the_thirteen_columns_of_nccl_tests() -> None:
    table = Table(both=True, places=(False, True), room=80)  # not narrowed: scripts read it
    assert table.head()[0].split() == ["#", "out-of-place", "in-place"]
    assert table.line(row(in_place=False, microseconds=2000.0)) is None
    line = table.line(row(wrong=None))
    assert line is not None
    assert line.split() == [
        "1048576", "262144", "float", "sum", "-1", "2000", "0.5243", "0.5243", "0", "1000", "1.049", "1.049", "N/A",
    ]  # fmt: skip
    assert table.rest() is None


def test_a_place_that_does_not_exist_or_was_not_reached_is_not_available() -> None:
    table = Table(both=True, places=(False,), room=200)
    line = table.line(row("all_to_all", in_place=False, redop=None))
    assert line is not None
    assert line.split()[3:] == ["none", "-1", "1000", "1.049", "0.5243", "0", "N/A", "N/A", "N/A", "N/A"]
    table = Table(both=True, places=(False, True), room=200)
    table.line(row(in_place=False))
    rest = table.rest()
    assert rest is not None
    assert rest.split()[-5:] == ["0", "N/A", "N/A", "N/A", "N/A"]


@pytest.mark.parametrize("room", [80, 60, 40])
def test_a_narrow_terminal_keeps_size_time_and_bandwidth(room: int) -> None:
    table = Table(both=False, places=(True,), room=room)
    lines = [*table.head(), table.line(row()) or ""]
    assert max(map(len, lines)) <= max(room, 48)
    assert {"size", "time", "algbw", "busbw", "#wrong"} <= set(lines[1].split())
    assert ("p99" in lines[1]) == (room >= 60)


def test_share_of_a_ceiling() -> None:
    table = Table(both=False, places=(True,), room=200, ceiling=2.097152)
    assert table.head()[1].split()[-1] == "%ceil"
    line = table.line(row())
    assert line is not None
    assert line.split()[-1] == "50.0"


def test_numbers_have_four_digits() -> None:
    values = [None, 0, 0.00001234, 0.01234, 1.2345, 12.345, 123.45, 1234.5, 1e6]
    assert [number(value) for value in values] == [
        "N/A", "0", "1.2e-05", "0.0123", "1.234", "12.35", "123.5", "1234", "1000000",
    ]  # fmt: skip


def test_json_and_csv_hold_every_field(tmp_path: Path) -> None:
    rows = [row(), row("barrier", size=0, algbw=None, busbw=None, wrong=None)]
    text = files.to_json({"ranks": 2}, [{"name": "world"}], rows, [], [], None, False)
    read = json.loads(text)
    assert list(read) == ["convention", "complete", "machine", "groups", "rows", "overlap", "fits", "advice"]
    assert read["convention"] == "nccl-tests"
    assert read["complete"] is False
    assert Row(**read["rows"][0]) == rows[0]
    assert read["rows"][1]["algbw"] is None
    assert sum(line.startswith('  {"op"') for line in text.splitlines()) == 2  # a row a line
    first, second = csv.DictReader(io.StringIO(files.to_csv(rows)))
    assert first["microseconds"] == "1000.0"
    assert first["op"] == "all_reduce"
    assert second["busbw"] == ""
    file = tmp_path / "a.json"
    file.write_text("old")
    files.replace(file, text)
    assert json.loads(file.read_text()) == read
    assert list(tmp_path.iterdir()) == [file]


def test_where_a_file_cannot_be_written(tmp_path: Path) -> None:
    assert files.writable(tmp_path / "x.json") is None
    assert list(tmp_path.iterdir()) == []
    assert "is a folder" in (files.writable(tmp_path) or "")
    assert "No such file or directory" in (files.writable(tmp_path / "no" / "x.json") or "")


def alpha_beta(op: str, group: str, ranks: int, alpha: float, beta: float, **other: object) -> list[Row]:
    """Rows of seconds = alpha (us) + S * factor / beta (GB/s)."""
    factor = {"all_reduce": 2 * (ranks - 1) / ranks, "all_to_all_uneven": (ranks - 1) / ranks}[op]
    sizes = [1 << power for power in range(10, 27)]
    return [row(op, size, alpha + size * factor / beta / 1e3, ranks, group=group, **other) for size in sizes]


def test_fits_are_per_op_group_dtype_and_place() -> None:
    rows = alpha_beta("all_reduce", "world", 4, 50, 10) + alpha_beta("all_reduce", "n=2", 2, 20, 5)
    rows += alpha_beta("all_to_all_uneven", "world", 4, 30, 8, in_place=False)
    rows += [*alpha_beta("all_reduce", "world", 4, 60, 10, dtype="bf16"), row("barrier", 0)]
    found = fits.curves(rows)
    assert [(c.fit.op, c.fit.group, c.dtype, c.in_place) for c in found] == [
        ("all_reduce", "world", "fp32", True),
        ("all_reduce", "n=2", "fp32", True),
        ("all_to_all_uneven", "world", "fp32", False),
        ("all_reduce", "world", "bf16", True),
    ]
    assert [round(c.fit.alpha_us, 3) for c in found] == [50, 20, 30, 60]
    assert [round(c.fit.busbw_gbs or 0, 3) for c in found] == [10, 5, 8, 10]
    # 90 % at alpha * beta / factor * 9 = 3 MB: the next measured size is 4 MiB.
    advice = fits.conclusion(found)
    assert advice is not None
    assert advice.bucket_bytes == 4 << 20
    text = "\n".join(fits.lines(found, advice))
    assert "bucket for gradients: 4 MiB: all_reduce over world (4 ranks)" in text
    assert "all_reduce bf16" in text
    json.dumps([c.as_json() for c in found])


def test_advice_prefers_the_place_that_torch_uses() -> None:
    rows = alpha_beta("all_reduce", "world", 4, 5, 10, in_place=False) + alpha_beta("all_reduce", "world", 4, 50, 10)
    advice = fits.conclusion(fits.curves(rows))
    assert advice is not None
    assert advice.bucket_bytes == 4 << 20
    only = fits.conclusion(fits.curves(rows[:17]))
    assert only is not None
    assert only.bucket_bytes == 512 << 10


def test_two_sizes_make_no_fit() -> None:
    found = fits.curves([row(), row(size=1 << 21)])
    assert found == []
    assert fits.lines(found, None) == []


def test_the_picture_has_a_curve_for_each_group_size(tmp_path: Path) -> None:
    rows = alpha_beta("all_reduce", "world", 4, 50, 10) + alpha_beta("all_reduce", "n=2", 2, 20, 5)
    rows += [*alpha_beta("all_to_all_uneven", "world", 4, 30, 8), row("barrier", 0)]
    found = plot.curves(rows)
    assert {op: list(lines) for op, lines in found.items()} == {
        "all_reduce": [("world", 4, "fp32", True), ("n=2", 2, "fp32", True)],
        "all_to_all_uneven": [("world", 4, "fp32", True)],
    }
    assert plot.labels(list(found["all_reduce"])) == ["world (4 ranks)", "n=2 (2 ranks)"]
    assert plot.labels([("world", 4, "fp32", True), ("world", 4, "bf16", False)]) == [
        "world (4 ranks), fp32, in place",
        "world (4 ranks), bf16, out of place",
    ]
    file = tmp_path / "curves.svg"
    assert plot.draw(rows, file, "a machine")
    assert file.stat().st_size > 10_000
    assert not plot.draw([row("barrier", 0)], tmp_path / "none.png", "")
    assert not (tmp_path / "none.png").exists()
