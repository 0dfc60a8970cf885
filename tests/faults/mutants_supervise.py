"""Deliberate faults in the supervisor and in what belongs to it, each with the test that must notice it.

(name, file, text that is there once, text to put in its place, test). Data only: whoever applies them restores the file.
"""

from __future__ import annotations

AGENT, BLAME, ELASTIC, JOURNAL = "launch/agent.py", "launch/blame.py", "launch/elastic.py", "launch/journal.py"
OUTCOME, POLICY, SUPERVISOR = "launch/outcome.py", "launch/policy.py", "launch/supervisor.py"
LOOP, KILLS = "tests/launch/test_supervise.py::", "tests/launch/test_kills.py::"
AROUND = "tests/launch/test_looking_around.py::"
POLICIES, BLAMED = "tests/launch/test_policy.py::", "tests/launch/test_blame.py::"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    (
        "supervise: a line follows a torn one without a break",
        JOURNAL, '("\\n" if torn else "") + line', "line",
        "tests/launch/test_journal.py::test_a_torn_line_costs_that_line_only",
    ),
    (
        "supervise: the place after a line is where the file ends later",
        JOURNAL, "place = os.lseek(descriptor, 0, os.SEEK_CUR)", "os.fsync(descriptor); place = os.fstat(descriptor).st_size",
        AROUND + "test_the_place_after_a_line_is_before_what_another_host_adds",
    ),
    (
        "supervise: what was noted before a start is past",
        SUPERVISOR, "self.since = self.since or place or 0", "self.since = place or 0",
        AROUND + "test_a_stop_noted_between_a_look_around_and_the_next_start_counts",
    ),
    (
        "supervise: nobody waits for the others' notes of a numerical fault",
        SUPERVISOR, "            self._settle()\n", "            pass\n",
        LOOP + "test_a_numerical_fault_on_one_host",
    ),
    (
        "supervise: the first to note the end of a job ends the others' torchrun",
        AGENT, "(not begun() or now - empty > LAST_WORDS)", "True",
        LOOP + "test_a_host_whose_ranks_have_finished_says_so_itself",
    ),
    (
        "supervise: a torchrun's time to end counts from its ranks' end",
        AGENT, "empty = (empty or now) if over and not ranks else None", "empty = None if ranks else empty or now",
        LOOP + "test_a_host_whose_ranks_have_finished_says_so_itself",
    ),
    (
        "supervise: what torchrun ended passes for a preemption",
        OUTCOME, "if end.code not in (codes.PREEMPTED, -signal.SIGTERM)]", "if end.code not in ()]",
        POLICIES + "test_one_code_for_all_ranks",
    ),
    (
        "supervise: a rank that speaks for the job is not heard",
        OUTCOME, "        if spoken:\n", "        if spoken and False:\n",
        POLICIES + "test_one_code_for_all_ranks",
    ),
    (
        "supervise: what had to stop is started again",
        POLICY, "    if asked is not None:\n", "    if asked is not None and code == codes.PREEMPTED:\n",
        POLICIES + "test_told_to_stop",
    ),
    (
        "supervise: bad data is tried again",
        POLICY, '    codes.BAD_DATA: "corrupt or missing data",\n', "",
        LOOP + "test_codes_that_stop_at_once[77]",
    ),
    (
        "supervise: crashes are not counted",
        POLICY, "if restarts >= policy.max_restarts:", "if restarts >= 10**9:",
        POLICIES + "test_gives_up_after_restarts_in_a_row_without_a_newer_checkpoint",
    ),
    (
        "supervise: waits do not grow",
        POLICY, "policy.wait * 2.0 ** min(restarts, 60)", "policy.wait",
        POLICIES + "test_waits_double_up_to_the_cap_with_half_of_it_by_the_seed",
    ),
    (
        "supervise: a newer checkpoint is no progress",
        SUPERVISOR, "        if after - before:\n", "        if False:\n",
        LOOP + "test_a_newer_checkpoint_ends_the_row",
    ),
    (
        "supervise: signals go to torchrun",
        AGENT, "os.kill(pid, requests.for_ranks)", "os.kill(process.pid, requests.for_ranks)",
        LOOP + "test_a_signal_goes_to_the_ranks_which_save",
    ),
    (
        "supervise: a signal that comes twice ends torchrun",
        AGENT, "now - self._since > self.patience", "now - self._since >= 0",
        LOOP + "test_a_signal_goes_to_the_ranks_which_save",
    ),
    (
        "supervise: a second signal is not in a hurry",
        AGENT, "            self.insistent = True\n", "            pass\n",
        LOOP + "test_a_second_signal_ends_torchrun",
    ),
    (
        "supervise: ranks outlive a torchrun that was killed",
        AGENT, "    finally:\n        end_all()\n", "    finally:\n        pass\n",
        KILLS + "test_kill_9_of_a_rank_or_of_torchrun[torchrun]",
    ),
    (
        "supervise: nobody adopts the ranks of a torchrun that was killed",
        AGENT, "prctl(PR_SET_CHILD_SUBREAPER, 1)", "prctl(PR_SET_CHILD_SUBREAPER, 0)",
        KILLS + "test_kill_9_of_a_rank_or_of_torchrun[torchrun]",
    ),
    (
        "supervise: torchrun outlives the supervisor",
        ELASTIC, "prctl(PR_SET_PDEATHSIG, signal.SIGTERM)", "prctl(PR_SET_PDEATHSIG, 0)",
        KILLS + "test_kill_9_of_the_supervisor_ends_all_below_it_after_a_save",
    ),
    (
        "supervise: torchrun starts ranks again by itself",
        SUPERVISOR, '"--max-restarts", "0"', '"--max-restarts", "3"',
        LOOP + "test_a_job_that_finishes",
    ),
    (
        "supervise: two supervisors in one run",
        SUPERVISOR, "if not _lock(lock, fcntl.LOCK_EX):", "if False:",
        LOOP + "test_two_supervisors_of_one_run",
    ),
    (
        "supervise: starts beside another job",
        SUPERVISOR, "(holder := held(self.run)) is not None", "(holder := None) is not None",
        LOOP + "test_a_run_folder_that_another_job_holds",
    ),
    (
        "supervise: does not hear that the job is over",
        SUPERVISOR, "if ours and over and not goes_on:", "if False:",
        LOOP + "test_hosts_that_do_not_meet_learn_that_the_job_is_over",
    ),
    (
        "supervise: a host that fails again and again stays",
        SUPERVISOR, "if here in bad and self.elastic:", "if False:",
        LOOP + "test_a_host_that_fails_first_again_and_again_leaves_an_elastic_job",
    ),
    (
        "supervise: a host that was excluded comes back",
        SUPERVISOR, "decision = self._welcome() or self._preflight()", "decision = self._preflight()",
        LOOP + "test_a_host_that_fails_first_again_and_again_leaves_an_elastic_job",
    ),
    (
        "supervise: hosts that return share a store with those that stayed",
        SUPERVISOR, '            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"\n', "            pass\n",
        "tests/launch/test_elastic.py::test_two_ranks_one_two_with_the_same_batches",
    ),
    (
        "supervise: whoever fails is blamed, first or not",
        BLAME, "cause = all(own.time < other.time for other in others)", "cause = True",
        BLAMED + "test_the_first_to_fail_is_the_cause",
    ),
    (
        "supervise: all hosts are blamed for what all had",
        BLAME, "cause = not beside or alike < len(beside)", "cause = True",
        BLAMED + "test_a_hang_and_a_numerical_fault_are_on_the_ranks_that_are_named",
    ),
    (
        "supervise: what the environment has is overwritten",
        "launch/environment_of.py", "        if name in present:\n", "        if False:\n",
        "tests/launch/test_slurm.py::test_the_environment_of_the_hardware",
    ),
    (
        "supervise: a word that YAML reads as true is exported",
        "pretrain/estimate/hardware.py", "isinstance(text, bool) or not", "not",
        "tests/launch/test_environment.py::test_a_section_that_is_wrong_is_one_line",
    ),
]  # fmt: skip
