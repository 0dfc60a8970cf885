"""Runs tests of Triton kernels on the CPU, under Triton's interpreter.

`TRITON_INTERPRET` is read when a kernel is decorated, so the same process can never both interpret and compile, and
a test run that imports a kernel module first decides for everybody. Hence a subprocess: the tests proper go into a
file whose name pytest does not collect by itself, and a normal test file runs it as one outer test.

    tests/kernels/delta_rule/interpreted_triton.py
        an ordinary pytest file: imports kernels.delta_rule.triton and tests values
    tests/kernels/delta_rule/test_triton.py
        from tests.kernels.interpreter import run_interpreted

        def test_triton_forms_under_the_interpreter():
            run_interpreted(__file__, "interpreted_triton.py")

To run the inner file by hand:  TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
                                python -m pytest tests/kernels/delta_rule/interpreted_triton.py

What the interpreter does not show: bf16 arithmetic is wrong in it (widen bf16 loads to fp32 in the kernel, test in
fp32 or fp16), races and missing barriers never show, `tl.dot` is exact whatever its `input_precision`, unmasked
lanes read 0, and `for i in range(n)` yields a Python int (`i.to(tl.int64)` raises; write `tl.cast(i, tl.int64)` or
fold it into a pointer sum).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(outer: str | Path, inner: str, *, campaign: bool = False, timeout: float = 600.0) -> str:
    """Runs the test file `inner` (beside the file `outer`) in a process with TRITON_INTERPRET=1, and fails as it fails.

    campaign: the tests that are marked so, and no others, for an outer test that is marked so itself. timeout: seconds.
    Returns the inner report. Skips where triton is not installed; an inner run in which nothing passed is a failure.
    """
    pytest.importorskip("triton")
    path = Path(outer).resolve().parent / inner
    command = [sys.executable, "-m", "pytest", str(path), "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--campaign", "-m", "campaign"] if campaign else ["-m", "not campaign"]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        # numpy's and torch's thread pools fight over few cores: the same tests took 0.3 to 5 s with default threads.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    environment.pop("BRAID_KERNELS", None)
    environment.pop("PYTEST_ADDOPTS", None)
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        text = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        pytest.fail(f"{path.name} did not finish in {timeout:.0f} s under the interpreter\n{text}", pytrace=False)
    report = run.stdout + run.stderr
    if run.returncode != 0:
        pytest.fail(f"{path.name} under the interpreter (exit {run.returncode}):\n{report}", pytrace=False)
    if not re.search(r"\b[1-9]\d* passed", run.stdout):
        pytest.fail(f"{path.name} under the interpreter: no test passed\n{report}", pytrace=False)
    return report
