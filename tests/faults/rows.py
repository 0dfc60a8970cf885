"""The table of failures: what may happen to a job, and the tests that make it happen.

Rows 1, 4 and 20 have random trials besides, in the campaign itself.
"""

from __future__ import annotations

from typing import NamedTuple

CHECKPOINT = "tests/pretrain/checkpoint"
TRAIN = "tests/pretrain/train"
WATCH = "tests/pretrain/watch"
DATA = "tests/pretrain/data"
LAUNCH = "tests/launch"


class Row(NamedTuple):
    """tests: pytest nodes: files, or single tests with all their cases."""

    what: str
    tests: tuple[str, ...]


ROWS: dict[int, Row] = {
    1: Row(
        "kill -9 of one rank, at any time and at every point of a save",
        (
            f"{CHECKPOINT}/test_lifecycle.py::test_kill_9_before_the_commit_leaves_the_previous_one",
            f"{CHECKPOINT}/test_lifecycle.py::test_kill_9_after_the_commit_keeps_the_new_one",
            f"{CHECKPOINT}/test_near.py::test_kill_9_during_a_save",
            f"{LAUNCH}/test_kills.py::test_kill_9_of_a_rank_or_of_torchrun",
        ),
    ),
    2: Row(
        "kill -9 of all ranks, of the watcher, of torchrun, of the supervisor: no orphans",
        (
            f"{WATCH}/test_ends.py::test_a_watcher_that_is_killed_takes_the_training_process_along",
            f"{WATCH}/test_ends.py::test_torchrun_killed_together_with_its_supervisor_leaves_no_ranks",
            f"{LAUNCH}/test_kills.py::test_kill_9_of_the_supervisor_ends_all_below_it_after_a_save",
            f"{TRAIN}/test_near.py::test_killed_and_resumed_from_near_memory_equals_uninterrupted",
        ),
    ),
    3: Row("power cut: every disk that a save could leave behind", (f"{CHECKPOINT}/test_crash_replay.py",)),
    4: Row(
        "files truncated, deleted, swapped, of another save, one bit flipped",
        (f"{CHECKPOINT}/test_damage.py", f"{CHECKPOINT}/test_blocks.py"),
    ),
    5: Row(
        "a bit flipped between memory and disk",
        (f"{CHECKPOINT}/test_blocks.py::test_damage_between_hashing_and_the_disk_is_seen",),
    ),
    6: Row(
        "full disk",
        (
            f"{CHECKPOINT}/test_lifecycle.py::test_full_disk_and_failing_disk_reach_every_rank_and_leave_nothing",
            f"{CHECKPOINT}/test_near.py::test_no_room_turns_it_off",
            f"{TRAIN}/test_faults.py::test_training_goes_on_after_a_failed_save",
            f"{TRAIN}/test_faults.py::test_a_run_that_cannot_save_ends_with_the_reason_on_every_rank",
        ),
    ),
    7: Row(
        "errors of the disk on write, fsync, rename; a folder that one rank sees and another does not",
        (
            f"{CHECKPOINT}/test_lifecycle.py::test_full_disk_and_failing_disk_reach_every_rank_and_leave_nothing",
            f"{CHECKPOINT}/test_lifecycle.py::test_the_coordinator_decides_what_exists",
            f"{CHECKPOINT}/test_background.py::test_a_failure_comes_back_at_the_next_call",
            f"{CHECKPOINT}/test_background.py::test_ranks_save_beside_collectives_and_fail_alike",
        ),
    ),
    8: Row(
        "a disk slower than the interval between saves",
        (
            "tests/faults/test_slow.py",
            f"{TRAIN}/test_near.py::test_training_does_not_wait_and_a_save_holds_the_moment_it_was_begun_at",
        ),
    ),
    9: Row(
        "SIGTERM and SIGUSR1 in every phase, to one, to all, to the launcher, twice",
        (f"{WATCH}/test_signals.py", f"{WATCH}/test_ends.py::test_torchrun_passes_a_signal_on_and_reads_the_accounts"),
    ),
    10: Row(
        "hangs: a stopped rank, a held lock, a left-out collective, a rank that never comes",
        (f"{WATCH}/test_hangs.py",),
    ),
    11: Row("the network falls in two and heals", ("tests/faults/test_partition.py",)),
    12: Row(
        "NaN or infinity on one rank: gradient, loss, batch, router",
        (
            f"{TRAIN}/test_numerics.py::test_a_number_that_is_not_finite_on_one_rank_stops_the_update_on_all",
            f"{TRAIN}/test_numerics.py::test_steps_in_a_row_are_counted_over_a_restart",
            f"{TRAIN}/test_faults.py::test_a_step_with_nan_on_one_rank_is_skipped_by_all",
            f"{TRAIN}/test_faults.py::test_persistent_nan_ends_with_79_and_keeps_the_checkpoint",
        ),
    ),
    13: Row(
        "a loss spike: warn, skip, roll back and jump over the data, restart within the window",
        (
            f"{TRAIN}/test_spikes.py",
            f"{TRAIN}/test_rollback.py",
            f"{TRAIN}/test_numerics.py::test_a_spike_is_skipped",
            f"{TRAIN}/test_numerics.py::test_the_same_decisions_after_a_restart_within_the_window",
        ),
    ),
    14: Row(
        "a flipped bit of a parameter or a gradient on one rank, once and always",
        (
            f"{TRAIN}/test_corruption.py",
            f"{TRAIN}/test_numerics.py::test_a_fault_that_does_not_come_again_costs_nothing",
            f"{TRAIN}/test_numerics.py::test_a_rank_with_too_many_such_faults_ends_the_run",
            f"{TRAIN}/test_numerics.py::test_a_fault_that_always_comes_again_ends_the_run",
            "tests/parallel/test_replicas.py",
        ),
    ),
    15: Row(
        "another number of ranks, another engine, another layout at every start",
        (
            f"{TRAIN}/test_resume.py::test_a_checkpoint_crosses_engines_and_world_sizes",
            f"{LAUNCH}/test_elastic.py",
            "tests/parallel/test_reshape.py::test_any_layout_reads_what_any_layout_wrote",
            f"{DATA}/test_loader.py::test_resume_with_another_global_batch_repeats_and_skips_nothing",
        ),
    ),
    16: Row(
        "a killed data worker; damaged index, data, rows, manifest, tokenizer; another vocabulary",
        (
            f"{DATA}/test_commands.py::test_a_killed_worker",
            f"{DATA}/test_store.py",
            f"{DATA}/test_prepare.py::test_bad_files_and_rows_can_be_skipped",
            "tests/pretrain/test_main.py::test_truncated_data_file",
            "tests/pretrain/test_main.py::test_vocabulary_smaller_than_the_tokenizer",
        ),
    ),
    17: Row("no memory for the copy of the state", ("tests/faults/test_memory.py",)),
    18: Row(
        "two jobs on one run folder, clocks that jump, wrong numbers of ranks, a peer that is not there",
        (
            f"{CHECKPOINT}/test_lease.py",
            "tests/faults/test_clock.py",
            f"{LAUNCH}/test_supervise.py::test_two_supervisors_of_one_run",
            f"{WATCH}/test_signals.py::test_a_rank_that_waits_for_another_one_to_start_leaves_at_once",
            "tests/pretrain/test_main.py::test_a_run_in_use_is_refused_and_after_sigterm_goes_on",
        ),
    ),
    19: Row(
        "deadlock probes: saves beside collectives, removals beside reading, signals during saves and evaluations",
        (
            f"{CHECKPOINT}/test_background.py::test_ranks_save_beside_collectives_and_fail_alike",
            f"{CHECKPOINT}/test_lifecycle.py::test_what_is_removed_loses_its_name_before_its_files",
            f"{WATCH}/test_signals.py::test_during_a_save",
            f"{WATCH}/test_signals.py::test_an_evaluation_is_cut_short_and_done_by_the_next_start",
        ),
    ),
    20: Row(
        "any legal layout, saved, and loaded in any other",
        ("tests/parallel/test_reshape.py", "tests/faults/test_campaign.py::test_runs_that_change_their_layout"),
    ),
    21: Row(
        "deliberate faults in the recovery code itself (all of them: python -m tests.faults.mutations)",
        ("tests/faults/test_mutants.py",),
    ),
}
