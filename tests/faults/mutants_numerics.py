"""Deliberate faults in what guards a run's numbers: (name, file, old text, new text, test that fails with it)."""

from __future__ import annotations

NUMERICS = "tests/pretrain/train/test_numerics.py::"
ROLLBACK = "tests/pretrain/train/test_rollback.py::"
CORRUPTION = "tests/pretrain/train/test_corruption.py::"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    (
        "each rank judges by its own loss",
        "pretrain/train/step.py",
        "fault = judge(sums[0].item(), norm)",
        "fault = judge(share.item() * processes.world, norm)",
        NUMERICS + "test_the_same_decisions_after_a_restart_within_the_window",
    ),
    (
        "the window is forgotten at resume",
        "pretrain/train/save.py",
        'run.faults = FaultState.from_meta(resumed.meta.get("faults"))',
        "run.faults = FaultState()",
        NUMERICS + "test_the_same_decisions_after_a_restart_within_the_window",
    ),
    (
        "bad steps in a row are forgotten at resume",
        "pretrain/train/faults/state.py",
        "return FaultState() if meta is None else FaultState(**meta)",
        'return FaultState() if meta is None else FaultState(**{**meta, "bad": 0})',
        NUMERICS + "test_steps_in_a_row_are_counted_over_a_restart",
    ),
    (
        "a replay draws other random numbers",
        "pretrain/train/step.py",
        "        restore_random_state(random)\n",
        "",
        NUMERICS + "test_a_fault_that_does_not_come_again_costs_nothing[fsdp2]",
    ),
    (
        "a replay counts the routers' tokens again",
        "pretrain/train/step.py",
        "        forget_loads(model)\n",
        "",
        NUMERICS + "test_a_fault_that_does_not_come_again_costs_nothing[one rank]",
    ),
    (
        "a vetoed update is made",
        "parallel/engines/torch.py",
        "if math.isfinite(norm) and not (veto is not None and veto(norm)):",
        "if math.isfinite(norm) and (veto is None or veto(norm) is not None):",
        NUMERICS + "test_a_spike_is_skipped[fsdp2]",
    ),
    (
        "DeepSpeed never hears of the veto",
        "parallel/engines/deepspeed.py",
        "return torch.full_like(norm, math.inf) if self.called_off else norm",
        "return norm",
        NUMERICS + "test_a_spike_is_skipped[zero2]",
    ),
    (
        "DeepSpeed's stage 3 never hears of the veto",
        "parallel/engines/deepspeed.py",
        "return [whole] if self.called_off else norms",
        "return norms",
        NUMERICS + "test_a_spike_is_skipped[zero3]",
    ),
    (
        "a skipped step moves the routers' biases",
        "pretrain/train/balance.py",
        ' and "skipped" not in run.record',
        "",
        NUMERICS + "test_a_spike_is_skipped[one rank]",
    ),
    (
        "evidence is taken after the sum over ranks",
        "parallel/engines/torch.py",
        "module.set_custom_reduce_scatter(WatchedReduceScatter(self.seen))",
        "module.set_custom_reduce_scatter(WatchedReduceScatter(Evidence()))",
        NUMERICS + "test_a_fault_that_does_not_come_again_costs_nothing[fsdp2]",
    ),
    (
        "skipped spans are lost at a restart",
        "pretrain/data/loader.py",
        'self.stream.set_skipped(state.get("skipped", []))',
        "self.stream.set_skipped([])",
        ROLLBACK + "test_a_rollback_equals_a_run_that_never_had_the_data[fsdp2, restarted]",
    ),
    (
        "the data of the faulty step itself is used again",
        "pretrain/train/loop.py",
        "self.rewind.to(step - least, past=step)",
        "self.rewind.to(step - least, past=step - 1)",
        ROLLBACK + "test_a_rollback_equals_a_run_that_never_had_the_data[fsdp2, restarted]",
    ),
    (
        "rollbacks are counted anew after each",
        "pretrain/train/faults/state.py",
        "return FaultState(earlier.window, 0, self.rollbacks, self.transient, self.corrupted)",
        "return FaultState(earlier.window, 0, earlier.rollbacks, self.transient, self.corrupted)",
        "tests/pretrain/train/test_spikes.py::test_the_window_follows_and_survives_json",
    ),
    (
        "after a rollback nothing is saved until the next interval",
        "pretrain/train/save.py",
        "        self.begun = -1\n",
        "",
        ROLLBACK + "test_validation_lines_of_undone_steps_are_dropped",
    ),
    (
        "a rollback goes to the newest checkpoint, however near",
        "pretrain/checkpoint/lifecycle.py",
        "if at_most is None or entry.step <= at_most]",
        "if True]",
        ROLLBACK + "test_two_rollbacks_and_then_the_end",
    ),
    (
        "going back leaves the routers' counts",
        "pretrain/train/faults/rewind.py",
        "        forget_loads(run.model)\n",
        "",
        CORRUPTION + "test_a_flipped_bit_is_found_and_the_run_ends_as_if_it_had_not_been[optimizer of replicas]",
    ),
    (
        "saves are not checked",
        "pretrain/train/loop.py",
        "saving=self.save.due(run)",
        "saving=False",
        CORRUPTION + "test_what_is_saved_has_passed_the_check",
    ),
    (
        "the optimizer's state is not compared",
        "parallel/replicas.py",
        "several = (counts[inverse] > 1) & (keys != 0)",
        "several = (counts[inverse] > 1) & (keys != 0)\n"
        '        several[processes.rank][: len(places)] &= torch.tensor([place[0][:5] == "model" for place in places])',
        CORRUPTION + "test_a_flipped_bit_is_found_and_the_run_ends_as_if_it_had_not_been[optimizer of replicas]",
    ),
    (
        "a rank that differs again is forgiven",
        "pretrain/train/faults/replica_check.py",
        "step - known[label] <= self.every]",
        "step - known[label] < 0]",
        CORRUPTION + "test_a_rank_that_differs_again_ends_the_run",
    ),
]
