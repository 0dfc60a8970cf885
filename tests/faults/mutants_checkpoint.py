"""Faults in checkpoints and in resuming: (name, path, old text, new text, the test that must fail)."""

from __future__ import annotations

REPLAY = "tests/pretrain/checkpoint/test_crash_replay.py"
DAMAGE = "tests/pretrain/checkpoint/test_damage.py"
LIFECYCLE = "tests/pretrain/checkpoint/test_lifecycle.py"
BLOCKS = "tests/pretrain/checkpoint/test_blocks.py"
RESUME = "tests/pretrain/test_verify_resume.py::test_what_is_compared"
FIRST_SAVE = f"{REPLAY}::test_the_first_save_leaves_nothing_or_all"
LATER_SAVE = f"{REPLAY}::test_a_save_leaves_the_old_checkpoint_or_the_new"
WALK_BACK = f"{DAMAGE}::test_damage_is_named_and_walked_back_over_or_refused"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    # ------------------------------------------------------------------------------------------- what must be on disk
    (
        "no fsync of the data",
        "pretrain/checkpoint/blocks.py",
        "            os.fsync(self._descriptor)\n",
        "            pass\n",
        LATER_SAVE,
    ),
    (
        "no fsync of sums, index and meta",
        "pretrain/checkpoint/durable.py",
        '    with path.open("xb") as file:\n        try:\n            file.write(data)\n            file.flush()\n'
        "            os.fsync(file.fileno())\n",
        '    with path.open("xb") as file:\n        try:\n            file.write(data)\n            file.flush()\n',
        LATER_SAVE,
    ),
    (
        "no fsync of the pointer's text",
        "pretrain/checkpoint/durable.py",
        "            file.flush()\n            os.fsync(file.fileno())\n        temporary.replace(path)\n",
        "            file.flush()\n        temporary.replace(path)\n",
        LATER_SAVE,
    ),
    (
        "no fsync of the folder before its rename",
        "pretrain/checkpoint/lifecycle.py",
        "        fsync_folder(fresh)\n",
        "",
        LATER_SAVE,
    ),
    (
        "no fsync of the rename",
        "pretrain/checkpoint/lifecycle.py",
        '            points.reached("renamed")\n            fsync_folder(self.folder)\n',
        '            points.reached("renamed")\n',
        LATER_SAVE,
    ),
    (
        "no fsync of the run folder's name",
        "pretrain/checkpoint/durable.py",
        "            fsync_folder(each.parent)\n",
        "            pass\n",
        FIRST_SAVE,
    ),
    (
        "no fsync of what is deleted",
        "pretrain/checkpoint/lifecycle.py",
        "            path.rename(trash)\n            fsync_folder(path.parent)\n",
        "            path.rename(trash)\n",
        LATER_SAVE,
    ),
    # ------------------------------------------------------------------------------------------------ in which order
    (
        "the pointer before the data",
        "pretrain/checkpoint/lifecycle.py",
        "        fresh.rename(final)\n",
        '        write_text(self.folder / on_disk.LATEST, final.name + "\\n")\n        fresh.rename(final)\n',
        FIRST_SAVE,
    ),
    (
        "retention before the commit",
        "pretrain/checkpoint/lifecycle.py",
        "        fresh.rename(final)\n",
        "        for entry in previous:\n            self._remove(entry.path)\n        fresh.rename(final)\n",
        LATER_SAVE,
    ),
    (
        "deleted under its own name",
        "pretrain/checkpoint/lifecycle.py",
        "            path.rename(trash)\n",
        "            trash = path\n",
        LATER_SAVE,
    ),
    (
        "the newest is the highest step",
        "pretrain/checkpoint/folder.py",
        "key=lambda e: (not e.record, e.sequence, e.step, e.attempt)",
        "key=lambda e: (not e.record, e.step, e.sequence, e.attempt)",
        f"{LIFECYCLE}::test_newest_is_what_was_committed_last",
    ),
    (
        "retention counts damaged ones",
        "pretrain/checkpoint/lifecycle.py",
        "        good = [entry for entry in found if not entry.fault]\n        supersedes",
        "        good = [entry for entry in found]\n        supersedes",
        f"{LIFECYCLE}::test_retention_counts_only_complete_ones",
    ),
    (
        "a failed save leaves its folder",
        "pretrain/checkpoint/lifecycle.py",
        '            self.agreement.decide("removing a failed save", lambda: self._try(lambda: self._remove(fresh)))\n',
        "",
        f"{LIFECYCLE}::test_full_disk_and_failing_disk_reach_every_rank_and_leave_nothing",
    ),
    # ------------------------------------------------------------------------------------------------ what is damaged
    (
        "the hash of what is on disk, not in memory",
        "pretrain/checkpoint/blocks.py",
        "        self.sums += xxhash.xxh3_128_digest(memoryview(block)[:size])\n",
        "        self._wait()\n        with self.path.open('rb') as file:\n"
        "            file.seek(self.position - size)\n"
        "            self.sums += xxhash.xxh3_128_digest(file.read(size))\n",
        f"{BLOCKS}::test_damage_between_hashing_and_the_disk_is_seen",
    ),
    (
        "blocks are not checked",
        "pretrain/checkpoint/blocks.py",
        "        if xxhash.xxh3_128_digest(view) != record[:_HASH]:\n",
        "        if len(view) == 1:\n",
        WALK_BACK,
    ),
    (
        "a damaged index or meta.json is believed",
        "pretrain/checkpoint/sealed.py",
        "    if hashlib.sha256(blank.encode()).hexdigest() != found[1]:\n",
        "    if not blank:\n",
        f"{BLOCKS}::test_a_sealed_file_refuses_any_change",
    ),
    (
        "sums of another save are believed",
        "pretrain/checkpoint/planned.py",
        "        if xxhash.xxh3_128_hexdigest(sums) != digest:\n",
        "        if not digest:\n",
        WALK_BACK,
    ),
    (
        "an index of another save is believed",
        "pretrain/checkpoint/folder.py",
        '    if seal(path / INDEX) != record["index"]:\n',
        "    if not record:\n",
        WALK_BACK,
    ),
    (
        "a meta.json of another step is believed",
        "pretrain/checkpoint/folder.py",
        '    if record["step"] != step:\n',
        "    if not record:\n",
        WALK_BACK,
    ),
    (
        "sizes are not looked at",
        "pretrain/checkpoint/folder.py",
        "        if found != size:\n",
        "        if found < 0:\n",
        WALK_BACK,
    ),
    (
        "going back says nothing",
        "pretrain/checkpoint/lifecycle.py",
        '                    self._skip(f"skipping checkpoint {entry.path}: {fault}")\n',
        "                    pass\n",
        WALK_BACK,
    ),
    (
        "strict goes back from a cut file",
        "pretrain/checkpoint/folder.py",
        "    if strict and found and found[0].fault:\n",
        "    if strict and not found:\n",
        WALK_BACK,
    ),
    (
        "strict goes back from a damaged block",
        "pretrain/checkpoint/lifecycle.py",
        "                if self.strict:\n",
        "                if self.strict and not fault:\n",
        WALK_BACK,
    ),
    (
        "damage does not cross ranks",
        "pretrain/checkpoint/blocks.py",
        "        return DamagedBlock, (str(self), self.start, self.end)\n",
        "        return DamagedBlock, (str(self),)\n",
        f"{DAMAGE}::test_two_ranks_say_it_once_and_refuse_alike",
    ),
    (
        "vanished checkpoints are a fresh start",
        "pretrain/checkpoint/folder.py",
        "    if (folder / LATEST).exists():\n",
        "    if not folder:\n",
        f"{LIFECYCLE}::test_vanished_checkpoints_are_not_a_fresh_start",
    ),
    # -------------------------------------------------------------------------------------------- what is saved, and when
    (
        "a save beside training sees later steps",
        "pretrain/checkpoint/snapshot.py",
        "        return held.copy_(source.detach(), non_blocking=True)\n",
        "        return source.detach()\n",
        "tests/pretrain/checkpoint/test_background.py::test_a_save_holds_the_moment_it_was_begun_at",
    ),
    (
        "a failure beside training is forgotten",
        "pretrain/checkpoint/background.py",
        "        if error is not None:\n            raise error\n",
        "",
        "tests/pretrain/checkpoint/test_background.py::test_a_failure_comes_back_at_the_next_call",
    ),
    (
        "two jobs in one folder",
        "pretrain/checkpoint/lease.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)\n",
        "tests/pretrain/checkpoint/test_lease.py::test_a_second_job_is_refused_until_the_first_is_killed",
    ),
    # ------------------------------------------------------------------------------------------------- what comes back
    (
        "random streams are forgotten",
        "pretrain/train/save.py",
        "        restore_random_state(resumed.per_rank)\n",
        "        pass\n",
        RESUME,
    ),
    (
        "the data goes on one sequence too far",
        "pretrain/data/loader.py",
        'int(count) for count in place["counts"]',
        'int(count) + 1 for count in place["counts"]',
        RESUME,
    ),
    (
        "the optimizer's step is lost",
        "parallel/state.py",
        '                _copy(own[f"optimizer/{name}/{key}"], tensors[f"optimizer/{name}/{key}"])\n',
        '                _copy(own[f"optimizer/{name}/{key}"], tensors[f"optimizer/{name}/{key}"])\n'
        '                if key == "step":\n                    value.zero_()\n',
        RESUME,
    ),
    (
        "buffers are not saved",
        "parallel/state.py",
        "            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:\n",
        "            if True or buffer is None or id(buffer) in seen:\n",
        RESUME,
    ),
    (
        "the count of tokens begins anew",
        "pretrain/train/save.py",
        '    run.step, run.tokens = resumed.meta["step"], resumed.meta["tokens"]\n',
        '    run.step, run.tokens = resumed.meta["step"], 0\n',
        RESUME,
    ),
]
