"""`--peers`: every node checked, and then what only several of them can find out: differences, skew, slow links.

Ranks talk through the launcher's key-value store, which needs neither a GPU nor the fabric: so a node whose device hangs is still
named. Links are measured by `python -m parallel.bench pairs` in a process of its own, beside each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from launch.preflight import alike, report, skew
from launch.preflight.catalogue import PEERS
from launch.preflight.check import STATUSES, Result, failed, not_checked, passed, warned
from launch.preflight.execute import strict
from launch.preflight.node import Node
from launch.preflight.session import close, examine, record

MANY = 8  # nodes; beyond that only what is not well is shown
DEVICE_CHECKS = ("devices", "torch", "matmul", "memory_test")
PAIR_SECONDS = 0.2


class Peers:
    """This rank among the others, by way of a store that all reach."""

    def __init__(self, store: Any, rank: int, world: int, local_rank: int, group: str):
        self.store, self.rank, self.world, self.local_rank, self.group = store, rank, world, local_rank, group

    @property
    def leader(self) -> bool:
        """One rank of each node speaks for it."""
        return self.local_rank == 0

    def tell(self, name: str, content: Any) -> None:
        self.store.set(f"preflight/{name}", json.dumps(content, default=str))

    def hear(self, name: str, seconds: float) -> Any:
        """What somebody has told under that name; None when nobody has in time. Stays open to signals meanwhile."""
        end = time.monotonic() + seconds
        while not self.store.check([f"preflight/{name}"]):
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        return json.loads(self.store.get(f"preflight/{name}"))


def join(limit: float) -> Peers:
    """The job that torchrun describes in the environment. Raises ValueError for an incomplete description."""
    from torch import distributed as dist

    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=max(limit, 60.0))))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"the ranks cannot meet: {type(error).__name__}: {error}") from None
    return Peers(store, rank, world, local_rank, os.environ.get("GROUP_RANK", ""))


def together(options: argparse.Namespace, node: Node) -> int:
    """The whole of --peers on this rank; the exit code of the job on one rank of each node, 0 on the others."""
    try:
        peers = join(options.limit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        code = _checked(options, node, peers)
    except KeyboardInterrupt:
        if peers.rank == 0:
            print("interrupted", file=sys.stderr)
        return 130
    return code if peers.leader else 0


def _checked(options: argparse.Namespace, node: Node, peers: Peers) -> int:
    patience = 3 * node.limit + 6 * node.tool_limit + 60
    peers.tell(f"here/{peers.rank}", {"host": socket.gethostname(), "group": peers.group, "leader": peers.leader})
    if peers.leader:
        own, interrupted = examine(options, node)
        several = os.environ.get("LOCAL_WORLD_SIZE") != str(peers.world)
        facts = alike.facts(node) if several and "peer_nodes" in options.names else {}
        content = {**record(socket.gethostname(), own.results, own.seconds, own.complete), "facts": facts}
        peers.tell(f"node/{peers.rank}", content)
        if interrupted:
            if peers.rank == 0:
                show_nodes([content])
            raise KeyboardInterrupt
    if peers.rank == 0:
        return _lead(options, node, peers, patience)
    plan = peers.hear("plan", 2 * patience) or {"code": 1}
    if "clock" in plan and peers.rank in plan["leaders"]:
        skew.answer(peers.rank, plan["clock"], node.limit)
    if "links" in plan:
        _pairs(node, peers, plan["links"])
    code = (plan if "code" in plan else peers.hear("end", patience + _patience(node, peers.world)) or {"code": 1})[
        "code"
    ]
    peers.tell(f"bye/{peers.rank}", True)
    return int(code)


def _lead(options: argparse.Namespace, node: Node, peers: Peers, patience: float) -> int:
    """Rank 0: gathers what the nodes have found, begins what all do together, tells the end."""
    everyone = [peers.hear(f"here/{rank}", node.limit) for rank in range(peers.world)]
    results = [failed("has not come: no word from it", f"rank {rank}") for rank, who in enumerate(everyone) if not who]
    leaders = [rank for rank, who in enumerate(everyone) if who and who["leader"]]
    names = labels({rank: everyone[rank]["host"] for rank in leaders})
    nodes: dict[int, dict[str, Any]] = {}
    for rank in leaders:
        found = peers.hear(f"node/{rank}", patience)
        if found is None:
            results.append(failed("has sent no results", names[rank]))
        else:
            nodes[rank] = {**found, "host": names[rank]}
    several: dict[str, list[Result]] = {"peer_nodes": results} if results else {}
    if "peer_nodes" in options.names:
        several["peer_nodes"] = results + alike.compare({found["host"]: found["facts"] for found in nodes.values()})
    broken = sorted(
        {found["host"] for found in nodes.values() for row in found["results"]
         if row["status"] == "fail" and row["check"] in DEVICE_CHECKS}
    )  # fmt: skip
    whole = len(leaders) and all(everyone)
    plan: dict[str, Any] = {"leaders": leaders}
    server = None
    if "peer_clock" in options.names:
        if len(leaders) < 2:
            several["peer_clock"] = [not_checked("there is one node only")]
        else:
            server = skew.Server(os.environ.get("MASTER_ADDR", ""))
            plan["clock"] = server.address
    if "peer_links" in options.names:
        if peers.world < 2:
            several["peer_links"] = [not_checked("there is one rank only")]
        elif not whole or broken:
            why = f"GPUs are not well on {', '.join(broken)}" if broken else "not all ranks are here"
            several["peer_links"] = [not_checked(f"{why}: whoever sends to them may wait for ever")]
        else:
            plan["links"] = {"address": os.environ.get("MASTER_ADDR", "127.0.0.1"), "port": _free_port()}
    show_nodes(list(nodes.values()))
    peers.tell("plan", plan)
    if server is not None:
        several["peer_clock"] = skew.judge(server.ask(names, node.limit))
    if "links" in plan:
        several["peer_links"] = _pairs(node, peers, plan["links"])
    flat = [replace(r, check=name) for name in PEERS for r in several.get(name, ())]
    if options.strict:
        flat = strict(flat)
    unfit = sorted({found["host"] for found in nodes.values() if found["failed"]})
    if flat:
        report.show("among the ranks", flat)
    print(f"nodes that failed: {', '.join(unfit) or 'none'}", flush=True)
    seconds = max((found["seconds"] for found in nodes.values()), default=0.0)
    complete = bool(whole) and all(found["complete"] for found in nodes.values())
    content = {
        **record("all", flat, seconds, complete),
        "failed": bool(unfit) or any(result.status == "fail" for result in flat),
        "failing_hosts": unfit, "nodes": list(nodes.values()),
    }  # fmt: skip
    code = close(options, content, flat, interrupted=False) or int(content["failed"])
    peers.tell("end", {"code": code})
    # Where this rank keeps the store, the others lose it with us.
    for rank in (rank for rank, who in enumerate(everyone) if who and rank):
        peers.hear(f"bye/{rank}", 10.0)
    return code


def labels(hosts: dict[int, str]) -> dict[int, str]:
    """A name for the node of each rank: its host's, and the rank where several nodes have one host."""
    alone = {host for host in hosts.values() if list(hosts.values()).count(host) == 1}
    return {rank: host if host in alone else f"{host} (rank {rank})" for rank, host in hosts.items()}


def show_nodes(nodes: Sequence[dict[str, Any]]) -> None:
    """A single node in full; of several, what did not pass."""
    for found in nodes:
        everything = [Result(r["status"], r["text"], r["subject"], r["values"], r["check"]) for r in found["results"]]
        shown = (
            ("warn", "fail") if len(nodes) > MANY else ("warn", "fail", "not checked") if len(nodes) > 1 else STATUSES
        )
        if results := [result for result in everything if result.status in shown]:
            report.show(f"preflight of {found['host']}", results, found["seconds"], everything)
        print(flush=True)


# ------------------------------------------------------------------------------------------------------------------------- links


def _pairs(node: Node, peers: Peers, where: dict[str, Any]) -> list[Result]:
    """This rank's part of the measurement; on rank 0 what came of it."""
    environ = {
        **node.environ, "MASTER_ADDR": where["address"], "MASTER_PORT": str(where["port"]),
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # the launcher's store has this job's keys in it
    }  # fmt: skip
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        file = Path(folder) / "pairs.json"
        command = [sys.executable, "-P", "-m", "parallel.bench", "pairs", "--seconds", str(PAIR_SECONDS)]
        command += ["--timeout", str(node.limit), "--json", str(file)]
        answer = node.tools.run(command, _patience(node, peers.world), environ)
        if peers.rank:
            return []
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError):
            said = answer.why.strip() or "it wrote no results"
            return [failed(f"the measurement did not come to its end: {said}")]
    return judge_links(found)


def judge_links(found: dict[str, Any]) -> list[Result]:
    """found: what `parallel.bench pairs --json` writes."""
    ranks = len(found["places"])
    worst = {
        name: _extreme(found[key][-1] if key == "microseconds" else found[key], pick)
        for name, key, pick in (("slowest", "microseconds", max), ("narrowest", "bandwidth_gbs", min))
    }
    first = found["microseconds"][0]
    values = {"ranks": ranks, "sizes": found["sizes"], "microseconds": first, "bandwidth_gbs": found["bandwidth_gbs"]}
    results = [warned(each["text"], "links", ranks=each["ranks"], ratio=each["ratio"]) for each in found["findings"]]
    if not found["complete"]:
        results.append(failed("the measurement was stopped before its end"))
    if results:
        return [replace(results[0], values={**results[0].values, **values}), *results[1:]]
    text = f"{ranks * (ranks - 1) // 2} pair(s), none slower than its like"
    if worst["narrowest"] is not None:
        text += f"; latency up to {_extreme(first, max):.4g} us, bandwidth from {worst['narrowest']:.4g} GB/s"
    return [passed(text, **values)]


def _extreme(table: list[list[float | None]], pick: Callable[..., float]) -> float | None:
    known = [value for row in table for value in row if value is not None]
    return pick(known) if known else None


def _patience(node: Node, world: int) -> float:
    """Seconds for the measurement of the links: on CPUs one pair after the other."""
    return 2 * node.limit + 60 + 4 * PAIR_SECONDS * world * (world - 1) / 2


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
