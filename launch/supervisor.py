"""The loop of one host's supervisor: start torchrun, wait for its end, note it, look around, decide.

Hosts of one job share the run folder, and with it the journal; nothing else passes between their supervisors. This imports no
torch: it starts at once, holds a few megabytes, and has little that could fail.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from launch import agent, blame, fitness
from launch.journal import Journal, Record
from launch.outcome import REPORT, Outcome, begun, read
from launch.policy import Decision, Policy, decide
from pretrain import exit as codes

SETTLE = 60.0  # seconds, at most, for the other hosts to note how it ended for them
MEETING = 900.0  # seconds in which hosts that do not meet are not counted as crashes: one may be slow to end its ranks
TORCHRUN = Path(__file__).with_name("elastic.py")
CHECKPOINT = re.compile(r"step_(\d{8,})(?:\.(\d+))?")


class Supervisor:
    """options: of launch/supervise.py."""

    def __init__(self, options: argparse.Namespace, requests: agent.Requests):
        self.options, self.requests, self.run = options, requests, options.run
        self.least, self.most = options.nnodes
        self.elastic = self.least < self.most
        self.journal = Journal(self.run)
        self.name = uuid.uuid4().hex[:12]
        # A job that was requeued has other hosts.
        self.job = f"{options.rdzv_id}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        self.logs = self.run / "supervise" / options.host
        self.policy = Policy(
            options.max_restarts, options.wait, options.max_wait, f"{options.seed} {self.run.resolve()} {options.rdzv_id}",
            options.restart_preempted, options.exclude_after,
        )  # fmt: skip
        self.restarts = 0  # in a row without a newer checkpoint
        self.met = time.monotonic()  # when ranks last ran here
        self.since = 0  # the place in the journal up to which this supervisor has looked around

    def supervise(self) -> int:
        """Until the job is over, or over for this host; returns the exit code."""
        try:
            self.logs.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.logs.parent / f"{self.options.host}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            say(f"the run folder cannot be used: {error}")
            return codes.ERROR
        if not _lock(lock, fcntl.LOCK_EX):
            holder = os.pread(lock, 100, 0).decode(errors="replace").strip()
            say(f"{self.run} is supervised on this host already, by process {holder}; stop that one first")
            return codes.ERROR
        with contextlib.suppress(OSError):  # it only serves the line above
            os.truncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        decision = self._welcome() or self._preflight()
        while decision is None:
            decision = self._once()
        return decision.code

    def _once(self) -> Decision | None:
        """One start of torchrun and what comes of it; None to start again."""
        if (busy := self._wait_for_run()) is not None:
            return busy
        before, started = committed(self.run), time.time()
        place = self._note("start", nodes=f"{self.least}:{self.most}", processes=self.options.nproc_per_node, pid=os.getpid(),
                   newest=newest(before))  # fmt: skip
        self.since = self.since or place or 0
        outcome = self._launch(started)
        after = committed(self.run)
        if after - before:
            self.restarts = 0
        decision = decide(outcome, self.requests.name, self.restarts, newest(after), self.policy)
        self._note(
            "end", started=started, processes=outcome.processes, launcher=outcome.launcher, at_fault=outcome.at_fault,
            ranks=[end._asdict() for end in outcome.ranks], step=self._step(outcome), newest=newest(after),
            **self._told(decision),
        )  # fmt: skip
        if decision.action == "restart":
            if outcome.processes or self.most == 1 or time.monotonic() - self.met > MEETING:
                self.restarts += 1
            if outcome.processes:
                self.met = time.monotonic()
            self._pause(decision.wait)
        elif decision.code == codes.NUMERICAL and self.most > 1:
            self._settle()
        final = self._look_around(decision, started)
        if final != decision:
            self._note("after", **self._told(final, settled=True))
        return None if final.action == "restart" else final

    def _launch(self, started: float) -> Outcome:
        try:
            shutil.rmtree(self.logs, ignore_errors=True)
            self.logs.mkdir(parents=True, exist_ok=True)
            code = agent.run(
                self._command(), self.requests, lambda: self._others() is not None, lambda: begun(self.logs) > 0
            )
            return read(self.logs, code, self.run, started)
        except OSError as error:  # of a file server, say, that is away for a while
            return Outcome((), 1, 0, trouble=f"could not start torchrun: {error}")
        finally:
            shutil.rmtree(self.logs, ignore_errors=True)  # the journal has what is in there

    def _command(self) -> list[str]:
        options = self.options
        nodes = str(self.most) if self.least == self.most else f"{self.least}:{self.most}"
        # -P: this folder must not come before the standard library on that program's path. No restarts by torchrun itself: a
        # rank that was preempted must not be started again.
        command = [
            sys.executable, "-P", str(TORCHRUN), str(self.logs / REPORT), str(os.getpid()), "--nnodes", nodes,
            "--nproc-per-node", options.nproc_per_node, "--max-restarts", "0", "--log-dir", str(self.logs),
        ]  # fmt: skip
        if self.elastic:
            # torchrun's hosts would share one store over all rounds, and tell a host that joins later not where it is: it waits a
            # minute in vain, and takes the job down with it. Without sharing, each round has a store of its own.
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if options.rdzv_endpoint:
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", options.rdzv_endpoint]
            command += ["--rdzv-id", options.rdzv_id]
        for name in ("rdzv_conf", "local_addr"):
            if getattr(options, name):
                command += [f"--{name.replace('_', '-')}", getattr(options, name)]
        return [*command, *options.command]

    # ------------------------------------------------------------------------------------------------- other jobs, other hosts

    def _wait_for_run(self) -> Decision | None:
        """Waits while another job holds the run folder: its lock may outlive it on a network filesystem. A decision if too long.

        On several hosts the holder may be this very job, which this host joins: there, the ranks find out.
        """
        end = time.monotonic() + self.options.wait_for_run
        while self.most == 1 and (holder := held(self.run)) is not None and self.requests.first is None:
            if time.monotonic() > end:
                decision = Decision("stop", codes.ERROR, f"{self.run} is in use by {holder}; stop that job first")
                self._note("after", **self._told(decision, settled=True))
                return decision
            time.sleep(agent.POLL)
        return None

    def _welcome(self) -> Decision | None:
        """A decision not to begin, when this host is excluded."""
        why = self._excluded(self.journal.records()).get(self.options.host)
        if why is None:
            return None
        why = f"{self.options.host} is excluded: {why}; let it in again with --readmit {self.options.host} {self.run}"
        decision = Decision("leave" if self.elastic else "stop", codes.ERROR, why)
        self._note("after", **self._told(decision, settled=True))
        return decision

    def _preflight(self) -> Decision | None:
        """A decision not to begin, when this host is not fit for it, or another one of the job has found itself unfit."""
        if not self.options.preflight:
            return None
        began = time.time()
        place = self._note("preflight", pid=os.getpid())
        self.since = place or self.since  # another host may note that it is unfit while this one checks itself
        why = fitness.unfit(self.run, self.logs.parent / f"{self.options.host}.preflight.json", self.requests)
        if self.requests.first is not None:
            decision = Decision("stop", codes.PREEMPTED, f"stopped by {self.requests.name} before the first start")
        elif why is not None:
            why = f"{self.options.host} has failed its preflight: {why}"
            decision = Decision("leave" if self.elastic else "stop", codes.ERROR, why)
        elif other := self._others() or fitness.unfit_host(self.journal.records(), self.job, self.options.host, began):
            decision = Decision("stop", other["code"], f"{other['host']}: {other['why']}")
        else:
            return None
        self._note("after", unfit=why is not None, **self._told(decision, settled=True))
        return decision

    def _look_around(self, decision: Decision, started: float) -> Decision:
        """The decision, after what the other hosts have noted meanwhile."""
        if decision.action == "restart" and self.requests.first is not None:
            return Decision("stop", codes.PREEMPTED, f"stopped by {self.requests.name} between two starts")
        records, seen = self.journal.read()
        excluded = self._excluded(records)
        here = self.options.host
        if decision.action == "restart":
            other = self._others()
            self.since = max(self.since, seen)
            if other is not None:
                return Decision("stop", other["code"], f"{other['host']}: {other['why']}")
            bad = {record["host"] for record in records if record.get("job") == self.job} & set(excluded)
            if here in bad and self.elastic:
                return Decision("leave", decision.code, f"{here} is excluded: {excluded[here]}")
            if bad and not self.elastic:
                why = "; ".join(f"{host} is excluded: {excluded[host]}" for host in sorted(bad))
                return Decision("stop", codes.PREEMPTED if self.options.slurm else codes.ERROR, why)
        elif decision.code == codes.NUMERICAL and self.elastic:
            causes = {record["host"] for record, kind in blame.guilty(records) if record["time"] >= started}
            if here in causes and here in excluded:
                return Decision("leave", decision.code, f"{here} is excluded: {excluded[here]}")
            if causes & set(excluded):
                return Decision("restart", decision.code, f"{', '.join(causes)} leaves; the job goes on")
        return decision

    def _others(self) -> Record | None:
        """What another host of this job has noted, since this one last looked around, to be the end of the whole job."""
        for record in self.journal.records(self.since):
            ours = record.get("job") == self.job and record.get("supervisor") != self.name
            over = record.get("decision") == "stop" and record.get("scope") == "job"
            goes_on = record.get("code") == codes.PREEMPTED and self.elastic and self.options.restart_preempted
            if ours and over and not goes_on:
                return record
        return None

    def _excluded(self, records: list[Record]) -> dict[str, str]:
        """Hosts that this job does without; none when it has no other."""
        if self.most == 1 and not self.options.slurm:
            return {}
        excluded = blame.excluded(records, self.policy.exclude_after)
        blame.write_file(self.run, excluded)
        return excluded

    # ----------------------------------------------------------------------------------------------------------------- details

    def _told(self, decision: Decision, settled: bool = False) -> dict[str, Any]:
        """Says the decision, and returns it for the journal. scope: whether it is about the job or about this host."""
        say(
            f"{decision.why}; " + (f"again in {decision.wait:.1f} s" if decision.wait else f"ends with {decision.code}")
        )
        alone = decision.action == "leave"
        if self.elastic:  # the other hosts go on
            alone |= decision.why.startswith("gave up") or (
                self.policy.restart_preempted and self.requests.first is not None
            )
            alone |= decision.code == codes.NUMERICAL and not settled  # not before it is known whose fault it is
        return {
            "decision": decision.action, "code": decision.code, "why": decision.why, "wait": decision.wait,
            "scope": "host" if alone else "job",
        }  # fmt: skip

    def _note(self, event: str, **what: Any) -> int | None:
        return self.journal.append(
            {"event": event, "host": self.options.host, "supervisor": self.name, "job": self.job, **what}
        )

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.requests.first is None:
            time.sleep(min(agent.POLL, seconds))

    def _settle(self) -> None:
        """Waits until the hosts that were under way when this one noted its end have noted theirs."""
        end = time.monotonic() + SETTLE
        while self._under_way() and time.monotonic() < end and self.requests.first is None:
            time.sleep(agent.POLL)

    def _under_way(self) -> set[str]:
        """Hosts that had begun when this one noted its end, and have not noted theirs."""
        records = [record for record in self.journal.records() if record.get("job") == self.job]
        mine = [
            n for n, record in enumerate(records) if (record["event"], record.get("supervisor")) == ("end", self.name)
        ]
        hosts: set[str] = set()
        for n, record in enumerate(records):
            if record["event"] == "start" and mine and n < mine[-1]:
                hosts.add(record["host"])
            elif record["event"] == "end":
                hosts.discard(record["host"])
        return hosts

    def _step(self, outcome: Outcome) -> int | None:
        """The step that the run has come to: what the ranks said that failed, or else the newest in metrics.jsonl."""
        steps = [end.step for end in outcome.ranks if end.step is not None]
        if steps:
            return max(steps)
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            with (self.run / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
                whole = file.read().rpartition(b"\n")[0]  # the last line may be under way
            return int(json.loads(whole.splitlines()[-1])["step"])
        return None


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def committed(run: Path) -> set[str]:
    """The names of the run's checkpoints. A folder gets such a name when the checkpoint is complete."""
    try:
        return {path.name for path in (run / "checkpoints").iterdir() if CHECKPOINT.fullmatch(path.name)}
    except OSError:
        return set()


def newest(names: set[str]) -> str | None:
    """The one of the highest step; of two saves of a step, the second."""
    found = [match for name in names if (match := CHECKPOINT.fullmatch(name))]
    return max(found, key=lambda match: (int(match[1]), int(match[2] or 1))).string if found else None


def held(run: Path) -> str | None:
    """Who holds the run folder (pretrain/checkpoint/lease.py), in words; None when nobody does."""
    try:
        descriptor = os.open(run / "lease.lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        if _lock(descriptor, fcntl.LOCK_SH):
            return None
    finally:
        os.close(descriptor)
    try:
        holder = json.loads((run / "lease.json").read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another job"


def _lock(descriptor: int, kind: int) -> bool:
    """False when another process has the lock. A filesystem without locks protects nobody, and stops nobody."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
