"""Deliberate faults in near saves: (name, file, old text, new text, test that fails with it)."""

from __future__ import annotations

NEAR = "pretrain/checkpoint/near/"
TESTS = "tests/pretrain/checkpoint/test_near.py::"
RUNS = "tests/pretrain/train/test_near.py::"
KILL = TESTS + "test_kill_9_during_a_save"
FAIL = TESTS + "test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_is_tried"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    (
        "near: no buddy's copy",
        NEAR + "tier.py",
        "for each, buddy in buddies if buddy is not None]",
        "for each, buddy in buddies if buddy is not None and False]",
        TESTS + "test_every_part_lies_on_two_hosts_and_comes_back_wherever_the_ranks_are",
    ),
    (
        "near: the buddy is on the same host",
        NEAR + "hosts.py",
        "(order.index(self.of[rank]) + 1) % len(order)",
        "(order.index(self.of[rank]) + 0) % len(order)",
        TESTS + "test_who_keeps_whose_copy",
    ),
    (
        "near: the older save goes before the new one is passed on",
        NEAR + "tier.py",
        '        self._share("writing", own)\n',
        '        self._share("writing", own)\n        self.store.keep_newest(self.config.keep)\n',
        KILL + "[near: before the buddy's]",
    ),
    (
        "near: an incomplete save is taken for complete",
        NEAR + "choice.py",
        "if rank not in self.holders]",
        "if not self.holders]",
        KILL + "[near: half of own]",
    ),
    (
        "near: what arrives is not compared",
        NEAR + "exchange.py",
        "if bytes(writer.sums) != self.sums:",
        "if not writer.sums:",
        FAIL + "[flipped]",
    ),
    (
        "near: parts are not checked before they are read",
        NEAR + "parts.py",
        'return next((str(fault) for fault in file.check()), "")',
        'return ""',
        TESTS + "test_a_flipped_bit_is_found_and_the_other_copy_taken[00001.data]",
    ),
    (
        "near: blocks are not compared",
        NEAR + "choice.py",
        "if any(found.blocks[rank] != each for rank, each in enumerate(blocks)):",
        "if not blocks:",
        TESTS + "test_another_layout_goes_on_from_the_checkpoint",
    ),
    (
        "near: an older save than the checkpoint is taken",
        NEAR + "choice.py",
        "save.base < self.newest[0] and save.step <= self.newest[1]",
        "save.base < self.newest[0] and save.step < self.newest[1]",
        TESTS + "test_only_what_is_newer_than_the_newest_checkpoint",
    ),
    (
        "near: the run keeps its identity when it forgets",
        NEAR + "tier.py",
        'identity = self.agreement.decide("forgetting near saves", self._new_identity)',
        "identity = self.store.identity",
        TESTS + "test_forgotten_saves_do_not_come_back_with_a_host_that_still_has_them",
    ),
    (
        "near: room is not looked at",
        NEAR + "tier.py",
        "if needed[host] > free:",
        "if free < 0:",
        TESTS + "test_no_room_turns_it_off",
    ),
    (
        "near: a failed save stays",
        NEAR + "tier.py",
        "            self.store.remove(save)\n",
        "            pass\n",
        FAIL + "[flipped]",
    ),
    (
        "near: the copy holds the tensors themselves",
        "pretrain/train/near.py",
        "copy = self.snapshots.take({**state, **own})",
        "copy = {**state, **own}",
        RUNS + "test_training_does_not_wait_and_a_save_holds_the_moment_it_was_begun_at",
    ),
    (
        "near: random streams are not kept",
        "pretrain/train/near.py",
        "for name, tensor in random_state(run.processes.device).items()",
        "for name, tensor in ()",
        RUNS + "test_killed_and_resumed_from_near_memory_equals_uninterrupted[FSDP2]",
    ),
    (
        "near: a finished run leaves its saves",
        "pretrain/train/near.py",
        "            self.tier.clear()\n",
        "            pass\n",
        RUNS + "test_killed_and_resumed_from_near_memory_equals_uninterrupted[FSDP2]",
    ),
]
