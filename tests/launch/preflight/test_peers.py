"""`--peers`: differences between nodes, skew of clocks, links; and the whole of it under torchrun."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import alike, peers, skew
from launch.preflight.check import Result
from launch.preflight.node import Probed
from launch.preflight.skew import Skew
from launch.preflight.tools import Answer
from tests.launch.preflight.machines import by_subject, node, nvidia, pci
from tests.ranks import launch

# ---------------------------------------------------------------------------------------------------------------- differences

SAME = {"source": "abc", "torch": "2.13.0", "NCCL": "2.26", "GPU driver": "570", "kernel": "6.8"}


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        ({"source": "abd"}, "fail", "abc on n0, n1; abd on n2"),
        ({"torch": "2.12.0"}, "fail", "2.13.0 on n0, n1; 2.12.0 on n2"),
        ({"GPU driver": "550"}, "warn", "570 on n0, n1; 550 on n2"),
        ({"$NCCL_IB_HCA": "mlx5"}, "warn", "not set on n0, n1; mlx5 on n2"),
    ],
)
def test_a_node_that_differs(changes: dict[str, str], status: str, text: str) -> None:
    (result,) = alike.compare({"n0": SAME, "n1": SAME, "n2": SAME | changes})
    assert (result.status, result.subject) == (status, next(iter(changes))) and text in result.text
    assert result.values["hosts"][next(iter(changes.values()))] == ["n2"]


def test_nodes_that_are_alike_and_a_node_alone() -> None:
    (result,) = alike.compare({"n0": SAME, "n1": dict(SAME)})
    assert (result.status, result.text) == ("pass", "2 nodes alike in 5 respects")
    assert alike.compare({"n0": SAME})[0].status == "not checked"


def test_many_hosts_are_counted_not_listed() -> None:
    hosts = {f"n{n}": SAME | ({"torch": "1"} if n == 7 else {}) for n in range(1000)}
    (result,) = alike.compare(hosts)
    assert "2.13.0 on n0, n1, n2, n3, n4, n5 and 993 more; 1 on n7" in result.text


def test_the_facts_of_a_node(tmp_path: Path) -> None:
    of = node(tmp_path, pci("0000:18:00.0"), {"nvidia-smi": nvidia(1)}, environ={"NCCL_DEBUG": "INFO", "HOME": "/x"})
    of.environ = {**of.environ, "PATH": str(tmp_path / "bin")}
    stages = {"import": {"version": "2.13.0"}, "devices": {"nccl": "2.26"}}
    of._known["torch"] = Probed(stages, "", Answer(0, "", ""))
    facts = alike.facts(of)
    assert facts["GPUs"] == "1 x NVIDIA H100 80GB HBM3" and facts["GPU driver"] == "570.86.15"
    assert (facts["torch"], facts["NCCL"], facts["$NCCL_DEBUG"]) == ("2.13.0", "2.26", "INFO") and "$HOME" not in facts
    assert facts["source"] == alike.source() and len(facts["source"]) == 12


# ---------------------------------------------------------------------------------------------------------------------- clocks


def ask(offsets: dict[int, float], hosts: dict[int, str], limit: float = 10.0) -> dict[str, Skew | str]:
    """Rank 0 asks others, whose clocks are ahead by so many seconds."""
    server = skew.Server("127.0.0.1")
    others = [
        threading.Thread(
            target=skew.answer,
            args=(rank, server.address, limit),
            kwargs={"now": lambda ahead=ahead: time.time() + ahead},
        )
        for rank, ahead in offsets.items()
    ]
    for other in others:
        other.start()
    found = server.ask(hosts, limit)
    for other in others:
        other.join()
    return found


def test_the_skew_of_clocks_is_found() -> None:
    found = ask({8: 5.0, 16: -0.5, 24: 0.0}, {0: "n0", 8: "n1", 16: "n2", 24: "n3"})
    assert list(found) == ["n1", "n2", "n3"]
    for host, ahead in (("n1", 5.0), ("n2", -0.5), ("n3", 0.0)):
        each = found[host]
        assert isinstance(each, Skew) and abs(each.offset - ahead) <= each.error < 0.2
    assert {host: result.status for host, result in by_subject(skew.judge(found)).items()} == {
        "n1": "fail", "n2": "warn", "": "pass",
    }  # fmt: skip


def test_a_node_that_does_not_answer_about_its_clock() -> None:
    found = ask({8: 0.0}, {0: "n0", 8: "n1", 16: "n2"}, limit=1.0)
    results = by_subject(skew.judge(found))
    assert results["n2"].status == "fail" and results["n2"].text == "did not connect: its clock could not be asked"
    assert results[""].text.startswith("1 host(s) within")


@pytest.mark.parametrize(
    ("offset", "error", "status"),
    [
        (0.05, 0.01, "pass"), (0.15, 0.1, "pass"), (0.15, 0.01, "warn"), (-3.0, 0.5, "fail"), (-3.0, 1.5, "warn"),
        (3.0, 5.0, "pass"),
    ],
)  # fmt: skip
def test_only_what_is_certain_of_a_clock_counts(offset: float, error: float, status: str) -> None:
    (result,) = skew.judge({"n1": Skew(offset, error)})
    assert result.status == status


# ----------------------------------------------------------------------------------------------------------------------- links


def measured(**changes: Any) -> dict[str, Any]:
    """What `parallel.bench pairs --json` writes, for two ranks."""
    places = [{"rank": n, "host": f"n{n}", "node": n, "local": 0} for n in range(2)]
    table = [[[None, 10.0], [12.5, None]], [[None, 900.0], [800.0, None]]]
    return {"places": places, "sizes": [8, 1 << 20], "microseconds": table, "bandwidth_gbs": [[None, 1.5], [1.25, None]],
            "findings": [], "complete": True} | changes  # fmt: skip


def test_what_is_made_of_the_links() -> None:
    (result,) = peers.judge_links(measured())
    assert (result.status, result.text) == (
        "pass", "1 pair(s), none slower than its like; latency up to 12.5 us, bandwidth from 1.25 GB/s",
    )  # fmt: skip
    finding = {"text": "slow link: rank 0 (n0) -> rank 1 (n1): 4 times the latency", "ranks": [0, 1], "ratio": 4.0}
    (result,) = peers.judge_links(measured(findings=[finding]))
    assert result.status == "warn" and result.text == finding["text"] and result.values["sizes"] == [8, 1 << 20]
    results = peers.judge_links(measured(complete=False, findings=[finding]))
    assert [r.status for r in results] == ["warn", "fail"]


def test_labels_of_nodes() -> None:
    assert peers.labels({0: "n0", 8: "n1"}) == {0: "n0", 8: "n1"}
    assert peers.labels({0: "n", 2: "n", 4: "m"}) == {0: "n (rank 0)", 2: "n (rank 2)", 4: "m"}


def test_of_many_nodes_only_the_bad_lines_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"check": "ecc", "subject": "gpu 1", "status": "fail", "text": "broken", "values": {}},
        {"check": "shm", "subject": "", "status": "pass", "text": "large enough", "values": {}},
        {"check": "rdma", "subject": "", "status": "not checked", "text": "no cards", "values": {}},
    ]
    nodes = [{"host": f"n{n}", "results": rows[n == 0 :], "seconds": 1.0} for n in range(3)]
    shown = {}
    for count in (1, 3, 9):
        peers.show_nodes((nodes * 3)[:count])
        shown[count] = capsys.readouterr().out
    assert "large enough" in shown[1] and "no cards" in shown[1]
    assert "1 passed, 0 warnings, 1 failed, 1 not checked" in shown[3]
    assert "large enough" not in shown[3] and "no cards" in shown[3] and "broken" in shown[3]
    assert "no cards" not in shown[9] and "preflight of n1" in shown[9] and "preflight of n0" not in shown[9]


# -------------------------------------------------------------------------------------------------------------- under torchrun


def together(tmp_path: Path, *argv: str, ranks: int = 2) -> tuple[int, str, dict[str, Any]]:
    file = tmp_path / "found.json"
    done = launch(["-m", "launch.preflight", "--peers", "--json", str(file), *argv], ranks, timeout=100)
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else {}


def test_two_ranks_of_one_node(tmp_path: Path) -> None:
    names = ["peer_nodes", "peer_clock", "peer_links", "shm", "limits"]
    code, said, found = together(tmp_path, "--only", *names)
    assert code == 0, said
    (own,) = found["nodes"]
    assert {row["check"] for row in own["results"]} == {"shm", "limits"}
    status = {row["check"]: row["status"] for row in found["results"]}
    assert status["peer_nodes"] == status["peer_clock"] == "not checked"
    assert status["peer_links"] in ("pass", "warn")  # two ranks on two busy cores may differ
    (links,) = (row for row in found["results"] if row["values"].get("ranks") == 2)
    assert len(links["values"]["microseconds"]) == 2
    assert found["complete"] and not found["failed"] and found["failing_hosts"] == []
    assert "nodes that failed: none" in said


class Store:
    """The launcher's store, in one process."""

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.known[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.known for key in keys)

    def get(self, key: str) -> bytes:
        return self.known[key].encode()


def lead(
    tmp_path: Path,
    told: dict[str, Any],
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    world: int = 2,
    **options: Any,
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Rank 0 of a job whose other ranks have told this: (exit code, what it has told, what it has written)."""
    import argparse

    given = argparse.Namespace(names=names, strict=False, json=tmp_path / "f.json", **options)
    store = Store()
    me = peers.Peers(store, 0, world, 0, "0")
    for name, content in told.items():
        me.tell(name, content)
    monkeypatch.setattr(peers, "_pairs", lambda *_: [Result("pass", "measured")])
    code = peers._lead(given, node(tmp_path, limit=0.2), me, 0.2)
    heard = {name.removeprefix("preflight/"): json.loads(value) for name, value in store.known.items()}
    return code, heard, json.loads((tmp_path / "f.json").read_text())


def a_node(host: str, *rows: tuple[str, str, str], **facts: str) -> dict[str, Any]:
    results = [{"check": c, "subject": "", "status": s, "text": t, "values": {}} for c, s, t in rows]
    bad = any(status == "fail" for _, status, _ in rows)
    return {"host": host, "seconds": 1.0, "complete": True, "failed": bad, "results": results, "facts": facts}


HERE = {f"here/{rank}": {"host": f"n{rank}", "group": str(rank), "leader": True} for rank in range(2)}


def test_two_nodes_one_of_which_has_a_broken_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = HERE | {"node/0": a_node("n0", ("shm", "pass", "")), "node/1": a_node("n1", ("matmul", "fail", "wrong"))}
    code, heard, found = lead(tmp_path, told | {"bye/1": True}, ["peer_links"], monkeypatch)
    assert code == 1 and heard["end"] == {"code": 1} and "links" not in heard["plan"]
    assert found["failing_hosts"] == ["n1"] and found["failed"]
    (links,) = found["results"]
    assert links["status"] == "not checked" and "GPUs are not well on n1" in links["text"]
    assert "nodes that failed: n1" in capsys.readouterr().out


def test_a_node_of_which_nothing_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = HERE | {"node/0": a_node("n0"), "bye/1": True}
    code, _, found = lead(tmp_path, told, ["peer_nodes", "peer_links"], monkeypatch)
    assert code == 1
    results = {row["subject"]: row for row in found["results"] if row["check"] == "peer_nodes"}
    assert results["n1"]["status"] == "fail" and results["n1"]["text"] == "has sent no results"


def test_a_rank_that_has_not_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"here/0": HERE["here/0"], "node/0": a_node("n0")}
    code, heard, found = lead(tmp_path, told, ["peer_links"], monkeypatch)
    assert code == 1 and "links" not in heard["plan"] and not found["complete"]
    texts = {row["subject"]: row["text"] for row in found["results"]}
    assert texts["rank 1"] == "has not come: no word from it" and "not all ranks are here" in texts[""]


def test_two_nodes_that_are_well_go_on_to_the_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = HERE | {f"node/{n}": a_node(f"n{n}", ("shm", "warn", ""), torch="2") for n in range(2)} | {"bye/1": True}
    code, heard, found = lead(tmp_path, told, ["peer_nodes", "peer_links"], monkeypatch)
    assert code == 0 and heard["plan"]["leaders"] == [0, 1] and heard["plan"]["links"]["port"] > 0
    assert {row["check"]: row["status"] for row in found["results"]} == {"peer_nodes": "pass", "peer_links": "pass"}
