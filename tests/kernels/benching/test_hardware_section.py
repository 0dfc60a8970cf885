"""Ceilings in a hardware file: that section is written and everything else stays, byte for byte."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path

import pytest

from kernels.benching.hardware import section
from kernels.benching.hardware.matmul import Product
from kernels.benching.hardware.plateau import ceilings
from kernels.benching.hardware.section import Results
from pretrain.estimate.hardware import FOLDER, read
from tests.kernels.benching.hardware_rows import product

FACTS = {"date": "2026-11-21", "device": "AMD Instinct MI300X", "threads": None, "torch": "2.13.0", "commit": "abc123+"}
MEMORY = {"copy": 4330.25, "triad": 4123.456}
ROWS = [
    product(8192, 8192, 8192, 668.44),
    product(4096, 4096, 4096, 610.0),
    product(2048, 2048, 2048, 100.0, layout="nn"),
    product(8192, 8192, 8192, 101.5, "fp32", "tn"),
    product(1024, 1024, 1024, 900.0, note="WRONG: off by 1e-1 of its size"),
]


def _results(rows: list[Product] | None = None, **changes: object) -> Results:
    rows = ROWS if rows is None else rows
    given = {"facts": FACTS, "past_caches": True, "gpu": True, **changes}
    return Results(memory=MEMORY, ceilings=ceilings(rows), products=rows, memory_bytes=192 * 2**30, **given)  # type: ignore[arg-type]


def _write(path: Path, rows: list[Product] | None = None, **changes: object) -> str:
    return section.write(path, _results(rows, **changes))


@pytest.fixture
def mi300x(tmp_path: Path) -> Path:
    return Path(shutil.copy(FOLDER / "mi300x.yaml", tmp_path))


def test_an_existing_file_gets_the_section_and_keeps_everything_else(mi300x: Path) -> None:
    before, chip = mi300x.read_text(), read(mi300x)
    mi300x.chmod(0o640)
    # 668.44 of 1307, 101.5 of 163, 4330 of 5300.
    shares = "of its nominal figures: bf16 51%, fp32 62%, memory 82%"
    assert _write(mi300x) == f"wrote the section `measured:` of {mi300x}; {shares}"
    text = mi300x.read_text()
    assert text.startswith(before)
    assert max(map(len, text.removeprefix(before).splitlines())) <= 120
    assert mi300x.stat().st_mode & 0o777 == 0o640
    found = read(mi300x)
    assert found.model_dump(exclude={"measured"}) == chip.model_dump(exclude={"measured"})
    measured = found.measured
    assert measured is not None
    assert (measured.device, measured.threads, measured.torch) == ("AMD Instinct MI300X", None, "2.13.0")
    assert measured.date == datetime.date(2026, 11, 21)
    assert measured.memory_gbs == {"copy": 4330.0, "triad": 4123.0}
    assert measured.matmul_tflops == {"bf16": 668.4, "fp32": 101.5}
    assert measured.plateau_gflop == {"bf16": 137.4, "fp32": 1100.0}  # 610 is more than 90 % of 668; 2 x 4096^3
    assert measured.matmul == [
        (8192, 8192, 8192, "bf16", "nt", 668.4),
        (4096, 4096, 4096, "bf16", "nt", 610.0),
        (2048, 2048, 2048, "bf16", "nn", 100.0),
        (8192, 8192, 8192, "fp32", "tn", 101.5),
    ]
    assert [path.name for path in mi300x.parent.iterdir()] == ["mi300x.yaml"]  # no temporary file stays


def test_a_second_measurement_replaces_the_first(mi300x: Path) -> None:
    _write(mi300x)
    once = mi300x.read_text()
    _write(mi300x, [*ROWS, product(64, 64, 64, 1.0)])
    assert read(mi300x).measured.matmul[-1] == (64, 64, 64, "bf16", "nt", 1.0)  # type: ignore[union-attr]
    _write(mi300x)
    assert mi300x.read_text() == once


def test_the_faster_library_of_a_shape_is_kept(mi300x: Path) -> None:
    _write(
        mi300x,
        [product(64, 64, 64, rate, library=name) for name, rate in (("ck", 1.0), ("hipblaslt", 2.0), ("hipblas", 1.5))],
    )
    assert read(mi300x).measured.matmul == [(64, 64, 64, "bf16", "nt", 2.0)]  # type: ignore[union-attr]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "old",
    [
        "measured:  # by hand\n  device: X\n  # inside\n  matmul: [\n    [1, 2, 3, bf16, nn, 1.0],\n  ]\n",
        "measured: {device: X,\n  torch: '2'}\n",
        "measured:\n",
        "measured: null\n",
    ],
)
def test_what_stands_around_the_section_stays(old: str, end: str, tmp_path: Path) -> None:
    before = "# head\nname: X  # the name\nmatch: []\n\n# about the section\n"
    after = "\n\n# about memory\nmemory_gib: 3\n# the end\n"
    path = tmp_path / "chip.yaml"
    with path.open("w", newline="") as file:
        file.write((before + old + after).replace("\n", end))
    _write(path)
    with path.open(newline="") as file:
        text = file.read()
    new = section.render(_results())
    assert text == (before + new + after).replace("\n", end)


def test_the_section_at_the_end_of_a_file_without_a_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "chip.yaml"
    for old in ("", "\nmeasured:\n  device: Y"):
        path.write_text("name: X" + old)
        _write(path)
        joint = "\n" if old else "\n\n"
        assert path.read_text() == f"name: X{joint}{section.render(_results())}"


def test_a_link_stays_a_link(mi300x: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(mi300x)
    _write(link)
    assert link.is_symlink()
    assert read(mi300x).measured is not None


@pytest.mark.parametrize("gpu", [True, False])
def test_a_new_file_is_a_hardware_file(gpu: bool, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    facts = FACTS | {"device": 'Processor "X": 3', "threads": None if gpu else 4}
    assert "a new file, whose nominal figures are the measured ones" in _write(path, facts=facts, gpu=gpu)
    chip = read(path)
    assert (chip.name, chip.match) == ('Processor "X": 3', ['Processor "X": 3'] if gpu else [])
    assert (chip.bf16_tflops, chip.fp32_tflops, chip.memory_gib, chip.memory_bandwidth_gbs) == (668.4, 101.5, 192, 4330)
    assert chip.measured is not None
    assert chip.measured.threads == (None if gpu else 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no/such/chip.yaml", None, "there is no folder"),
        ("chip.txt", None, "a hardware file is named .yaml"),
        ("new.yaml", None, "a new file needs bf16 and fp32; add fp32 to --dtypes"),
        ("chip.yaml", "a: [", "is not YAML"),
        ("chip.yaml", "- 1", "is not a hardware file"),
        ("chip.yaml", "run: x", "is not a hardware file: it has no `name:`"),
        ("chip.yaml", "name: x\nmatch: H100", "its `match` is not a list of names"),
        ("chip.yaml", "name: x\nmatch: [H100, H200]", "that file is of H100, H200, and this is AMD Instinct MI300X"),
        ("chip.yaml", "name: x", "that file is of x, and this is AMD"),
        ("chip.yaml", "name: x\nmeasured: {device: y}", "that file is of y, and this is AMD"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_at_once(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        section.check(path, "AMD Instinct MI300X", True, ["bf16"])


def test_a_file_that_fits_is_not_refused(mi300x: Path, tmp_path: Path) -> None:
    section.check(mi300x, "AMD Instinct MI300X OAM", True, ["bf16"])
    section.check(tmp_path / "new.yaml", "any", True, ["bf16", "fp32"])
    (tmp_path / "cpu.yaml").write_text("name: my laptop\nmatch: []\nmeasured: {device: Processor}")
    section.check(tmp_path / "cpu.yaml", "Processor", False, ["bf16"])
    with pytest.raises(ValueError, match="that file is of Processor, and this is Another"):
        section.check(tmp_path / "cpu.yaml", "Another", False, ["bf16"])


def test_a_file_in_one_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chip.yaml"
    path.write_text("{name: X, measured: {device: Y}}\n")
    with pytest.raises(ValueError, match="does not begin a line"):
        _write(path)
    assert path.read_text() == "{name: X, measured: {device: Y}}\n"


def test_arrays_that_caches_hold_are_told(mi300x: Path) -> None:
    _write(mi300x)
    assert "copy: 4330, triad: 4123}  # past the caches\n" in mi300x.read_text()
    _write(mi300x, past_caches=False)
    assert "copy: 4330, triad: 4123}  # partly from the caches: larger arrays were not measured\n" in mi300x.read_text()
