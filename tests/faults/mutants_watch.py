"""Deliberate faults in the watcher and in what belongs to it, each with the test that must notice it.

(name, file, text that is there once, text to put in its place, test). Data only: whoever applies them restores the file.
"""

from __future__ import annotations

WATCHER, START, LIMITS = "pretrain/watch/watcher.py", "pretrain/watch/start.py", "pretrain/watch/limits.py"
REPORT, BLAME, VALIDATION = "pretrain/watch/report.py", "pretrain/watch/blame.py", "pretrain/train/validation.py"
SIGNALS = "pretrain/train/signals.py"
PARTS, HANGS = "tests/pretrain/watch/test_parts.py::", "tests/pretrain/watch/test_hangs.py::"
ENDS, SIGNALLED = "tests/pretrain/watch/test_ends.py::", "tests/pretrain/watch/test_signals.py::"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    (
        "a signal waits although there is nothing to save",
        WATCHER, "if self.pulse.read().state == NOTHING:", "if False:",
        SIGNALLED + "test_c_code_that_keeps_pythons_lock_does_not_delay_it",
    ),
    (
        "a signal is not passed on",
        WATCHER, "        if first:\n            os.kill(self.child, number)\n", "",
        SIGNALLED + "test_in_a_step_all_ranks_save_once_and_the_run_goes_on[one rank]",
    ),
    (
        "a second signal is not in a hurry",
        WATCHER, "return not first and time.monotonic() - self.since > REPEAT", "return False",
        SIGNALLED + "test_a_second_signal_leaves_at_once[step]",
    ),
    (
        "what comes twice at once is taken for a second signal",
        WATCHER, "time.monotonic() - self.since > REPEAT", "time.monotonic() - self.since > 0",
        SIGNALLED + "test_in_a_step_all_ranks_save_once_and_the_run_goes_on[all ranks]",
    ),
    (
        "a rank that others left at a signal reports an error",
        WATCHER, "if failed and self.asked and beat.state == OWN:", "if False:",
        SIGNALLED + "test_an_error_after_a_signal[2-75]",
    ),
    (
        "a signal together with the end is lost",
        WATCHER, "in ASKED and self._leave_now(", 'in ASKED and process.state(self.child) != "ended" and self._leave_now(',
        SIGNALLED + "test_a_signal_together_with_the_end_is_heard",
    ),
    (
        "any error after a signal passes for a preemption",
        SIGNALS, "EVERYWHERE if self.signals.armed else OWN", "OWN",
        SIGNALLED + "test_an_error_after_a_signal[3-1]",
    ),
    (
        "there is never anything to save",
        SIGNALS, "        self.signals.armed = True\n", "",
        SIGNALLED + "test_in_a_step_all_ranks_save_once_and_the_run_goes_on[one rank]",
    ),
    (
        "an evaluation does not ask whether to stop",
        VALIDATION, "if number % ASK == 0 and run", "if False and run",
        SIGNALLED + "test_an_evaluation_is_cut_short_and_done_by_the_next_start",
    ),
    (
        "an evaluation that was cut short leaves a record",
        VALIDATION,
        "                run.stop = \"preempted\"\n                return\n", "                run.stop = \"preempted\"\n",
        SIGNALLED + "test_the_last_validation_is_left_too_and_done_by_the_next_start",
    ),
    (
        "the next start does not do what was cut short",
        VALIDATION, "if self._due(run) and run.processes.broadcast(missing):", "if False:",
        SIGNALLED + "test_an_evaluation_is_cut_short_and_done_by_the_next_start",
    ),
    (
        "a signal between fork and handler ends the child its own way",
        START, "        signal.signal(number, _leave)\n", "        signal.signal(number, signal.SIG_IGN)\n",
        SIGNALLED + "test_with_nothing_to_save_a_signal_leaves_also_without_the_watcher[start]",
    ),
    (
        "the training process outlives its watcher",
        START, "    _when_the_parent_dies(signal.SIGKILL)\n", "",
        ENDS + "test_a_watcher_that_is_killed_takes_the_training_process_along",
    ),
    (
        "the ranks outlive a torchrun that is killed",
        START, "_when_the_parent_dies(signal.SIGTERM)", "pass",
        ENDS + "test_torchrun_killed_together_with_its_supervisor_leaves_no_ranks",
    ),
    (
        "a kill passes for an error",
        WATCHER, "            outcome.die(-code)\n            return 128 - code", "            return 1",
        ENDS + "test_errors_and_kills_come_through_with_an_account[kill--9]",
    ),
    (
        "no account for torchrun",
        WATCHER, "        outcome.record(text, code, self.pulse.last())\n", "",
        ENDS + "test_errors_and_kills_come_through_with_an_account[error-1]",
    ),
    (
        "an interrupt meant for the watcher ends there",
        WATCHER, "os.kill(self.child, signal.SIGINT)", "pass",
        ENDS + "test_an_interrupt_sent_to_the_watcher_alone_reaches_the_training_process",
    ),
    (
        "the training process has no one to write its stacks",
        START, "    stacks.register()\n", "",
        HANGS + "test_a_hang_of_one_rank_ends_all_with_a_report[gil]",
    ),
    (
        "a hang is not noticed",
        WATCHER, "if self.limits.seconds > limit:", "if False:",
        HANGS + "test_one_process_alone",
    ),
    (
        "watchers do not hear of each other",
        WATCHER, "        return self.called.is_set()\n", "        return False\n",
        HANGS + "test_the_process_groups_own_time_out_gives_the_same_report",
    ),
    (
        "a time-out of the process group passes for an error",
        WATCHER, "if failed and self._gave_up():", "if False:",
        HANGS + "test_the_process_groups_own_time_out_gives_the_same_report",
    ),
    (
        "watchers do not wait for each other's reports",
        REPORT, "< world and time.monotonic() < deadline:", "< 1 and time.monotonic() < deadline:",
        HANGS + "test_a_hang_of_one_rank_ends_all_with_a_report[stop]",
    ),
    (
        "an old report is taken for what ranks say now",
        WATCHER, "report.within(MARK, partial(shutil.rmtree, self._folder(), ignore_errors=True))", "pass",
        HANGS + "test_a_rank_that_never_comes",
    ),
    (
        "time in which the job was suspended counts",
        LIMITS, "        passed = min(passed, BLINK)\n", "",
        PARTS + "test_time_in_which_the_watcher_was_away_does_not_count",
    ),
    (
        "the limit does not learn",
        LIMITS, 'settings["factor"] * self.longest', '0.0 * self.longest',
        PARTS + "test_a_limit_is_the_floor_or_a_multiple_of_the_longest_seen",
    ),
    (
        "of the times seen the last one counts",
        LIMITS, "max(self.longest.get(phase, 0.0), self.seconds)", "self.seconds",
        PARTS + "test_a_limit_is_the_floor_or_a_multiple_of_the_longest_seen",
    ),
    (
        "the first of its kind has the limit of those with a past",
        LIMITS, "if phase in ONCE or (phase not in self.longest and phase != \"end\"):", "if phase in ONCE:",
        PARTS + "test_a_limit_is_the_floor_or_a_multiple_of_the_longest_seen",
    ),
    (
        "those that wait are blamed",
        BLAME, "if not each.meets and each.place", "if each.meets and each.place",
        PARTS + "test_blame",
    ),
    (
        "those ahead are blamed",
        BLAME, "if each.count < ahead.count", "if each.count == ahead.count",
        PARTS + "test_blame",
    ),
    (
        "reports pile up",
        REPORT, "    _prune(folder.parent)\n", "",
        PARTS + "test_reports_are_shared_in_a_folder_of_which_few_are_kept",
    ),
]  # fmt: skip
