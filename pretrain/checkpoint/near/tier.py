"""When a near save counts, and the way back from one. All ranks together, over a group of their own."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pretrain.checkpoint import points
from pretrain.checkpoint.agreement import Agreement
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.folder import Entry
from pretrain.checkpoint.lifecycle import Resumed
from pretrain.checkpoint.near import choice, parts, room
from pretrain.checkpoint.near.choice import Disk, Found
from pretrain.checkpoint.near.config import NearConfig
from pretrain.checkpoint.near.exchange import Move, exchange
from pretrain.checkpoint.near.hosts import Hosts
from pretrain.checkpoint.near.parts import Save
from pretrain.checkpoint.near.store import Store
from pretrain.checkpoint.sealed import read_sealed, write_sealed

IDENTITY = "near.json"  # in the folder of checkpoints
GIVE_UP = 3  # failed saves in a row after which no more are tried
T = TypeVar("T")


class Tier:
    """Near saves of one job. Every call is collective, and all ranks return the same.

    checkpoints: the folder of the shared checkpoints. layout: one line for how the job is cut into ranks. agreement: over a
    group that nothing else uses. committed: gives the sequence of the newest checkpoint that this job has committed; asked on
    the coordinator. Nothing that goes wrong with near folders ends a job: `off` then says what, and a line has been reported.
    """

    def __init__(
        self,
        config: NearConfig,
        checkpoints: Path,
        layout: str,
        *,
        agreement: Agreement | None = None,
        committed: Callable[[], int] = lambda: 0,
        report: Callable[[str], None] = print,
    ) -> None:
        self.config, self.checkpoints, self.layout = config, checkpoints, layout
        self.agreement, self.committed, self.report = agreement or Agreement(), committed, report
        self.off = ""
        self.opened = False
        self.number = 0  # of the newest save known
        self.base = 0  # the highest sequence among the checkpoints at the start
        self.failures = 0
        self.skipped = 0
        try:
            run, identity = self.agreement.decide("opening", self._identify)
            self.store = Store(config.folder, run, identity)
            self.hosts = Hosts(self._share("opening", self.store.open))
            self.opened = True
        except CheckpointError as error:
            self._turn_off(str(error))

    # ------------------------------------------------------------------------------------------------------- writing

    def save(self, step: int, state: Mapping[str, Tensor] | None, meta: Mapping[str, Any], unable: str = "") -> bool:
        """Makes a near save of `step`; returns whether it counts.

        state: what this rank holds, as `Snapshots.take` gave it; None if it has no copy of this step, and then no rank saves it.
        unable: why this rank will never have one; that turns near saves off.
        """
        if self.off:
            return False
        save: Save | None = None
        try:
            size = None if state is None else parts.size_of(state)
            answers = self._share("looking for room", lambda: (size, room.free_bytes(self.store.root), unable))
            begun = self.agreement.decide("beginning", lambda: self._begin(step, answers))
            if isinstance(begun, str):
                self._turn_off(begun)
            if not isinstance(begun, Save):
                self._skip(step)
                return False
            save = begun
            assert state is not None
            self._write(save, state, meta)
        except CheckpointError as error:
            self._failed(step, save, error)
            return False
        self.failures = 0
        points.reached("near: complete")
        if self.hosts.leads(self.agreement.rank):
            self.store.keep_newest(self.config.keep)
        points.reached("near: pruned")
        return True

    def _begin(self, step: int, answers: list[tuple[int | None, int, str]]) -> Save | str | None:
        """The save's identity; None if a rank has nothing to save, or why none ever will or there is no room."""
        for rank, (_, _, unable) in enumerate(answers):
            if unable:
                return f"step {step}, rank {rank}: {unable}"
        sizes = [size for size, _, _ in answers if size is not None]
        if len(sizes) < len(answers):
            return None
        needed = dict.fromkeys(self.hosts.members, 0)
        for rank, size in enumerate(sizes):
            for keeper in (rank, self.hosts.buddy(rank)):
                if keeper is not None:
                    needed[self.hosts.of[keeper]] += size
        for host, ranks in self.hosts.members.items():
            free = min(answers[rank][1] for rank in ranks)
            if needed[host] > free:
                where = f"{self.config.folder} on the host of rank {ranks[0]}"
                return f"step {step} takes {needed[host]} bytes in {where}, and {free} are left"
        self.number += 1
        base = max(self.base, self.committed())
        return Save(secrets.token_hex(4), self.number, step, base, self.agreement.world, self.layout)

    def _write(self, save: Save, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        folder, rank = self.store.folder_of(save), self.agreement.rank

        def own() -> None:
            folder.mkdir(exist_ok=True)
            parts.write(folder, save, rank, state, meta)

        self._share("writing", own)
        buddies = ((each, self.hosts.buddy(each)) for each in range(self.agreement.world))
        moves = [Move(each, each, buddy) for each, buddy in buddies if buddy is not None]
        self._exchange(save, moves)

    def _exchange(self, save: Save, moves: list[Move]) -> None:
        faults = exchange(self.store.folder_of(save), save, moves, self.agreement.rank, self.agreement.group)

        def judge() -> None:
            if faults:
                raise CheckpointError("; ".join(faults))

        self._share("passing parts on", judge)

    def _skip(self, step: int) -> None:
        self.skipped += 1
        if self.skipped == 1 and not self.off:
            self._say(
                f"step {step}: not kept in near memory, the save before it is under way; later ones are only counted"
            )

    def _failed(self, step: int, save: Save | None, error: CheckpointError) -> None:
        """Every rank has come here, so nobody is writing any more."""
        self.failures += 1
        if save is not None and self.hosts.leads(self.agreement.rank):
            self.store.remove(save)
        if self.failures >= GIVE_UP:
            self._turn_off(str(error))
        else:
            self._say(f"step {step}: not kept in near memory ({error}); the save before it stands")

    def _turn_off(self, why: str) -> None:
        self.off = why
        self._say(f"no more saves in near memory: {why}; training goes on, with checkpoints only")

    # ------------------------------------------------------------------------------------------------------- reading

    def resume(
        self,
        tensors: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        disk: Sequence[Entry],
        check: Callable[[dict[str, Any]], None],
    ) -> Resumed | None:
        """Fills `tensors` and `own` (this rank's random states) from the newest near save that is newer than the checkpoints.

        disk: all checkpoints, newest first. check: raises ValueError for a loop's state that does not belong to this job. Returns
        None when there is no such save, with a line to `report` for each that would have been newer; the tensors are then as
        they were. Raises CheckpointError if a part that was good a moment ago is not.
        """
        if self.off:
            return None
        on_disk = Disk.of(disk)
        self.base = max((entry.sequence for entry in disk), default=0)
        state = {**tensors, **{f"rank/{name}": tensor for name, tensor in own.items()}}
        try:
            found, blocks = self._look(state)
            chosen = self._choose(found, on_disk, blocks, check)
        except CheckpointError as error:
            self._turn_off(str(error))
            return None
        if chosen is not None:
            folder, rank = self.store.folder_of(chosen), self.agreement.rank
            self._share(f"reading {folder}", lambda: parts.fill(folder, rank, state))
        self._sweep([each.save for each in found if not each.lost])
        if chosen is None:
            return None
        folder = self.store.folder_of(chosen)
        meta = self.agreement.decide("reading", lambda: parts.read_description(parts.description(folder, 0))[2])
        self._say(f"resuming step {chosen.step} from near memory, {_newer(chosen, on_disk)}")
        return Resumed(folder, chosen.step, meta, dict(own))

    def _look(self, state: Mapping[str, Tensor]) -> tuple[list[Found], list[str]]:
        """All saves on all hosts, and the fingerprint of every rank of this job."""
        leads = self.hosts.leads(self.agreement.rank)
        answers = self._share("looking", lambda: (self.store.parts() if leads else [], parts.fingerprint(state)))
        found = choice.gathered({host: answers[ranks[0]][0] for host, ranks in self.hosts.members.items()})
        self.number = max((each.save.number for each in found), default=0)
        return found, [blocks for _, blocks in answers]

    def _choose(
        self, found: list[Found], disk: Disk, blocks: list[str], check: Callable[[dict[str, Any]], None]
    ) -> Save | None:
        """The newest save that can be read; the part of every rank is then on its host, and whole."""
        for each in found:
            if disk.as_new_as(each.save):
                continue
            fault = choice.fault(each, disk, self.layout, blocks) or self._bring(each) or self._refused(each, check)
            if not fault:
                return each.save
            self._say(f"step {each.save.step} in near memory cannot be used: {fault}")
        return None

    def _bring(self, found: Found) -> str:
        """Checks every bit of the parts, and has those that are missing on a rank's host sent there. Returns what failed."""
        save, rank = found.save, self.agreement.rank
        folder = self.store.folder_of(save)
        of = self.hosts.of
        here = [of[each] in found.holders[each] for each in range(save.world)]
        own = self._share("checking", lambda: parts.damage(folder, rank) if here[rank] else "")
        wanted = [each for each in range(save.world) if not here[each] or own[each]]
        # Where else each of them is, and who looks at it there.
        others = {
            part: [self.hosts.worker(host, part) for host in found.holders[part] if host != of[part]] for part in wanted
        }
        asked = [part for part in wanted if rank in others[part]]
        copies = self._share("checking copies", lambda: {part: parts.damage(folder, part) for part in asked})
        moves = []
        for part in wanted:
            good = [each for each in others[part] if not copies[each][part]]
            faults = [own[part], *(copies[each][part] for each in others[part])]
            if not good:
                return "; ".join(dict.fromkeys(filter(None, faults)))
            if own[part]:
                self._say(f"{own[part]}; the copy on another host is good")
            moves.append(Move(part, good[0], part))

        def make_room() -> None:
            folder.mkdir(exist_ok=True)

        self._share("bringing parts", make_room)
        try:
            self._exchange(save, moves)
        except CheckpointError as error:
            return str(error)
        return ""

    def _refused(self, found: Found, check: Callable[[dict[str, Any]], None]) -> str:
        path = parts.description(self.store.folder_of(found.save), 0)
        meta = self.agreement.decide("reading", lambda: parts.read_description(path)[2])
        try:
            self.agreement.everyone("checking", partial(check, meta))
        except ValueError as error:
            return str(error)
        return ""

    def _sweep(self, complete: list[Save]) -> None:
        """Removes what can never be resumed from: saves of which a part is on no host, and runs that are no more."""

        def sweep() -> None:
            if self.hosts.leads(self.agreement.rank):
                self.store.keep_only(complete)

        self._share("sweeping", sweep)

    # ---------------------------------------------------------------------------------------------------- forgetting

    def forget(self) -> None:
        """No near save made so far is ever resumed from: for a job that goes back to a checkpoint and on from there.

        It holds from the moment at which the run has another identity, whatever hosts then still have.
        """
        identity = self.agreement.decide("forgetting near saves", self._new_identity)
        if self.opened:
            self.store.identity = identity
            self._share("forgetting", lambda: self.store.root.mkdir(exist_ok=True))
            self._sweep([])

    def clear(self) -> None:
        """Removes everything of this run from all hosts: there is a checkpoint that is as new."""
        if not self.opened:
            return

        def clear() -> None:
            if self.hosts.leads(self.agreement.rank):
                self.store.clear()

        self._share("clearing", clear)
        self.agreement.decide("clearing", lambda: (self.checkpoints / IDENTITY).unlink(missing_ok=True))

    def _identify(self) -> tuple[str, str]:
        """(the run folder's path, the run's identity), the latter made at the first call."""
        run = str(self.checkpoints.parent.resolve())
        try:
            return run, str(read_sealed(self.checkpoints / IDENTITY)["run"])
        except (FileNotFoundError, ValueError, KeyError):
            return run, self._new_identity()

    def _new_identity(self) -> str:
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        identity = secrets.token_hex(8)
        write_sealed(self.checkpoints / IDENTITY, {"run": identity})
        return identity

    # ------------------------------------------------------------------------------------------------------- speaking

    def _share(self, doing: str, function: Callable[[], T]) -> list[T]:
        """What `function` gives on each rank, on every rank; what it raises anywhere, everywhere."""
        answers = self.agreement.everyone(f"near memory: {doing}", function)
        return self.agreement.decide(doing, lambda: answers)

    def _say(self, line: str) -> None:
        if self.agreement.coordinator:
            self.report(line)


def _newer(save: Save, disk: Disk) -> str:
    return f"newer than the checkpoint of step {disk.newest[1]}" if disk.newest else "there is no checkpoint"
