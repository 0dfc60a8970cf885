"""Deliberate faults in the order of data and in its way to batches: (name, file, old text, new text, test that fails with it)."""

from __future__ import annotations

DATA, TESTS = "pretrain/data/", "tests/pretrain/data/"
ORDER, PACKING, BLEND, STAGES = DATA + "order.py", DATA + "packing.py", DATA + "blend.py", DATA + "stages.py"
LOADER, READING, LAYOUT, BATCH = DATA + "loader.py", DATA + "reading.py", DATA + "layout.py", DATA + "batch.py"
BEST_FIT, STREAM, ENCODE, PIECES = DATA + "best_fit.py", DATA + "stream.py", DATA + "encode.py", DATA + "pieces.py"
IN_ORDER, LOADED, PERMUTED = TESTS + "test_order.py::", TESTS + "test_loader.py::", TESTS + "test_permute.py::"
STREAMED, READ, SKIPPED = TESTS + "test_stream.py::", TESTS + "test_reading.py::", TESTS + "test_skipped.py::"
PREPARED, WORDS, SPELT = TESTS + "test_prepare.py::", TESTS + "test_tokenizer.py::", TESTS + "test_vocabulary.py::"
ALIKE = READ + "test_steps_read_together_are_as_read_piece_by_piece"
SHARES = PERMUTED + "test_counts_stay_within_one_of_the_weights"

MUTANTS: list[tuple[str, str, str, str, str]] = [
    # ---------------------------------------------------------------------------------------------------------- the order
    (
        "data: documents are shuffled alike in every epoch",
        ORDER,
        "permutation(len(self.lengths), self.seed, epoch, _DOCUMENTS)",
        "permutation(len(self.lengths), self.seed, 0, _DOCUMENTS)",
        IN_ORDER + "test_epochs_and_seeds_differ_and_position_needs_no_history",
    ),
    (
        "data: neighbouring windows share no token",
        ORDER,
        "int(windows[place]) * self.sequence_length, self.sequence_length + 1)",
        "int(windows[place]) * self.sequence_length + 1, self.sequence_length + (place % 2))",
        IN_ORDER + "test_each_token_is_a_target_once_an_epoch",
    ),
    (
        "data: a permutation of numbers falls out of its range",
        DATA + "permute.py",
        "            if i < self.n:\n                return i\n",
        "            return i % self.n\n",
        PERMUTED + "test_every_number_once_and_the_same_one_by_one",
    ),
    (
        "data: every epoch cuts at the same places",
        PACKING,
        "self.starts[hashed(*self.key, epoch, _START) % (len(self.starts) - 1)]",
        "0",
        STREAMED + "test_no_sequence_twice_in_a_pass_and_passes_are_counted",
    ),
    (
        "data: every epoch takes the windows in the same order",
        PACKING,
        "permutation_of(self.windows_per_epoch, *self.key, epoch, _WINDOWS)",
        "permutation_of(self.windows_per_epoch, *self.key, _WINDOWS)",
        STREAMED + "test_windows_are_shuffled_anew_in_every_epoch",
    ),
    (
        "data: around the file's end a token is lost",
        PACKING,
        "(firsts, 0), (counts, rest))",
        "(firsts, 1), (counts, rest))",
        LOADED + "test_an_epoch_covers_the_corpus",
    ),
    (
        "data: sources are shuffled alike",
        STREAM,
        "(self.seed, source, run)\n",
        "(self.seed, 0, run)\n",
        STREAMED + "test_sources_and_lengths_are_shuffled_apart",
    ),
    (
        "data: what a run passed over comes back by one sequence",
        ORDER,
        "        if used >= first:\n",
        "        if used > first:\n",
        SKIPPED + "test_numbers_past_spans",
    ),
    (
        "data: spans that touch are not joined",
        ORDER,
        "span[1] < first or span[0] > end]",
        "span[1] <= first or span[0] >= end]",
        SKIPPED + "test_spans_are_joined",
    ),
    # ----------------------------------------------------------------------------------------------------- blend and stages
    (
        "data: a source begins anew with every period of the blend",
        BLEND,
        "return source, turn * self.shares[source] + int(self._number[place])",
        "return source, int(self._number[place])",
        SHARES,
    ),
    (
        "data: of many sequences the period is forgotten",
        BLEND,
        "return sources, turns * np.array(self.shares)[sources] + self._number[places]",
        "return sources, 0 * turns + self._number[places]",
        ALIKE,
    ),
    (
        "data: the remainders of weights are dropped",
        BLEND,
        "for k in rest[: PERIOD - sum(rounded)]:",
        "for k in rest[:0]:",
        SHARES,
    ),
    (
        "data: a source of little weight gets none",
        BLEND,
        "max(made, 1) if share else 0",
        "made if share else 0",
        PERMUTED + "test_a_tenth_is_a_tenth",
    ),
    (
        "data: who is owed least may be next",
        BLEND,
        "if owed >= period or len(used) == 1:",
        "if owed > -slack * period:",
        SHARES,
    ),
    (
        "data: with new weights sources begin anew",
        STAGES,
        "base, begin = begin.counts, replace(begin, index=0, weights=stage.weights)",
        "base, begin = (0,) * sources, replace(begin, index=0, weights=stage.weights)",
        STREAMED + "test_nothing_is_used_twice_as_weights_and_batches_change",
    ),
    (
        "data: a stage begins a step late",
        STAGES,
        "steps = -(-(stages[number + 1].tokens - begin.tokens) // stage.step_tokens)",
        "steps = 1 + -(-(stages[number + 1].tokens - begin.tokens) // stage.step_tokens)",
        STREAMED + "test_one_stream_for_any_number_of_ranks_and_over_restarts",
    ),
    # ---------------------------------------------------------------------------------------------------- ranks and resuming
    (
        "data: a rank takes a stretch of the step, not every so many micro-batches",
        READING,
        "starts = range(self._rank * stage.micro_batch, stage.batch, self._ranks * stage.micro_batch)",
        "share = stage.batch // self._ranks\n"
        "        starts = range(self._rank * share, (self._rank + 1) * share, stage.micro_batch)",
        LOADED + "test_all_ranks_together_read_one_stream",
    ),
    (
        "data: a resumed loader goes on a step too far",
        LOADER,
        'self._next_step = self._base = int(state["step"])',
        'self._next_step = self._base = int(state["step"]) + 1',
        LOADED + "test_resume_goes_on_with_the_same_batches",
    ),
    (
        "data: what was read ahead outlives a resume",
        LOADER,
        '        self._drop_ahead()\n        if state["order_version"]',
        '        if state["order_version"]',
        LOADED + "test_resume_with_another_global_batch_repeats_and_skips_nothing[True]",
    ),
    (
        "data: a checkpoint forgets what was passed over",
        LOADER,
        'self.stream.set_skipped(state.get("skipped", []))',
        "self.stream.set_skipped([])",
        STREAMED + "test_a_rollback_over_a_border_skips_in_both_stages",
    ),
    (
        "data: another packing goes on from a checkpoint",
        LOADER,
        'for key in ("corpus", "seed", "sequence_length", "packing"):',
        'for key in ("corpus", "seed", "sequence_length"):',
        LOADED + "test_state_of_another_order_is_refused",
    ),
    # ----------------------------------------------------------------------------------------------------------------- packing
    (
        "data: the worst fit",
        BEST_FIT,
        "(fitting & -fitting).bit_length() - 1",
        "fitting.bit_length() - 1",
        STREAMED + "test_best_fit_by_hand",
    ),
    (
        "data: of many blocks the shortest documents go first",
        BEST_FIT,
        "by_size = np.where(rests > 1, length - rests, length) << bits | places",
        "by_size = np.where(rests > 1, rests, length) << bits | places",
        READ + "test_best_fit_of_many_blocks_is_that_of_each",
    ),
    (
        "data: the rest of a long document begins at its first token",
        BEST_FIT,
        "rest_starts = whole[kept] * self.sequence_length",
        "rest_starts = whole[kept] * 0",
        STREAMED + "test_best_fit_keeps_documents_whole_in_every_epoch",
    ),
    (
        "data: sequences of a group stay in their blocks' order",
        BEST_FIT,
        "*self.key, epoch, group, _BINS).many(np.arange(number))",
        "*self.key, epoch, group, _BINS).many(np.arange(number)).clip(0, 0) + np.arange(number)",
        STREAMED + "test_best_fit_shuffles_within_a_group",
    ),
    (
        "data: a document's end predicts the next one's beginning",
        LAYOUT,
        "ignored = np.concatenate([last, ends - 1, padded])",
        "ignored = np.concatenate([last[:0], ends - 1, padded])",
        STREAMED + "test_targets_follow_tokens",
    ),
    (
        "data: no border where padding begins",
        LAYOUT,
        "_borders([np.arange(total) * length, last + 1, ends], total",
        "_borders([np.arange(total) * length, last + 1], total",
        STREAMED + "test_targets_follow_tokens",
    ),
    (
        "data: read piece by piece, documents see each other",
        BATCH,
        "            if masked or not joined:\n",
        "            if not joined:\n",
        ALIKE,
    ),
    (
        "data: a damaged piece is not counted",
        BATCH,
        "damaged, joined, at = damaged + piece.length, False, at + piece.length",
        "damaged, joined, at = damaged + 0, False, at + piece.length",
        STREAMED + "test_damaged_documents_are_left_out_and_counted",
    ),
    # ------------------------------------------------------------------------------------------------------------ tokenizers
    (
        "data: documents do not end",
        ENCODE,
        "self.bos, *ids, self.eos))",
        "self.bos, *ids, self.bos))",
        PREPARED + "test_every_document_is_there_once_byte_for_byte",
    ),
    (
        "data: the tokenizer is trained on validation text",
        DATA + "sampling.py",
        'options.seed, options.validation) == "train":',
        "options.seed, options.validation):",
        PREPARED + "test_the_sample_is_shared_fairly_and_never_holds_validation_text",
    ),
    (
        "data: long texts are cut inside of pieces",
        PIECES,
        "re.compile(f\"(?<=[^ {re.escape(''.join(sorted(inner)))}]) \")",
        're.compile("(?<=.)[ \\n]")',
        SPELT + "test_long_texts_are_cut_where_no_piece_reaches_across",
    ),
    (
        "data: the mark that stands for a space is read as one",
        PIECES,
        "enumerate(text.split(SPACE) if SPACE in text and self._space_ids else [text])",
        "enumerate([text])",
        WORDS + "test_nasty_text_survives",
    ),
    (
        "data: bytes of an id are its characters",
        PIECES,
        'table[i] = len(processor.id_to_piece(i).replace(SPACE, " ").encode())',
        'table[i] = len(processor.id_to_piece(i).replace(SPACE, " "))',
        SPELT + "test_user_symbols_are_one_id_each",
    ),
    (
        "data: control ids in a tokenizer.json's text are obeyed",
        DATA + "tokenizer.py",
        "self._model.encode_special_tokens = True",
        "self._model.encode_special_tokens = False",
        SPELT + "test_a_folder_of_hugging_face",
    ),
    (
        "data: sources of different tokenizers are blended",
        DATA + "tokenizer_check.py",
        "        elif found != first[1]:\n",
        "        elif not found:\n",
        TESTS + "test_tokenizer_check.py::test_sources_of_different_tokenizers",
    ),
]
