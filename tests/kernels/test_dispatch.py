"""Which form serves a request, and the words when none does."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import Form, Request, choose, explain

CPU = Request("op", torch.device("cpu"), torch.float32, {"K": 64})
FORMS = (
    Form("triton", "absent.triton", "f", dispatch.triton_objection),
    Form("chunked", "absent.chunked", "f", lambda request: "K is odd" if request.shape["K"] % 2 else None),
    Form("reference", "absent.reference", "f"),
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("BRAID_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_first_form_without_objection_serves():
    assert choose(FORMS, CPU).name == "chunked"
    assert choose(FORMS, Request("op", torch.device("cpu"), torch.float32, {"K": 3})).name == "reference"


def test_triton_serves_gpus_and_the_interpreter_but_not_float64(monkeypatch):
    pytest.importorskip("triton")
    gpu = torch.device("cuda")
    assert choose(FORMS, Request("op", gpu, torch.bfloat16, {"K": 64})).name == "triton"
    assert choose(FORMS, Request("op", gpu, torch.float64, {"K": 64})).name == "chunked"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose(FORMS, CPU).name == "triton"


def test_triton_objects_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    assert dispatch.triton_objection(Request("op", torch.device("cuda"), torch.bfloat16)) == "triton is not installed"


def test_explain_gives_every_form_its_verdict():
    verdicts = dict(explain(FORMS, CPU))
    assert verdicts["triton"].startswith("the tensors are on cpu")
    assert (verdicts["chunked"], verdicts["reference"]) == ("chosen", "able")


def test_a_forced_form_is_used(monkeypatch):
    monkeypatch.setenv("BRAID_KERNELS", "reference")
    assert choose(FORMS, CPU).name == "reference"
    assert dict(explain(FORMS, CPU))["chunked"] == "BRAID_KERNELS=reference forces another form"


def test_a_forced_form_that_cannot_serve_is_an_error_with_the_reasons(monkeypatch):
    monkeypatch.setenv("BRAID_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"no form of op can serve.*triton: the tensors are on cpu.*chunked: BRAID"):
        choose(FORMS, CPU)


def test_a_misspelt_form_is_an_error_that_lists_the_names(monkeypatch):
    monkeypatch.setenv("BRAID_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast' is not a form; choose one of triton, chunked, reference"):
        choose(FORMS, CPU)


def test_a_form_is_imported_only_when_it_is_loaded(monkeypatch):
    assert "absent.chunked" not in sys.modules  # choosing did not import it
    monkeypatch.setitem(sys.modules, "absent.chunked", SimpleNamespace(f=lambda x: x + 1))
    assert choose(FORMS, CPU).load()(2) == 3
