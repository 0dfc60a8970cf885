"""One token order, whatever the ranks and restarts: with every packing, with blends and stages, over spans passed over."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from pretrain.data import Batch, Corpus, DataError, Loader
from pretrain.data.batch import IGNORE
from pretrain.data.best_fit import BestFit
from pretrain.data.stages import Stage
from tests.pretrain.data.test_store import patch, write_megatron

T, LONG = 8, 20
STAGES = [
    Stage(0, 24, 1, T, (3.0, 2.0, 1.0)),
    Stage(3 * 24 * T - 5, 48, 2, T, (3.0, 2.0, 1.0)),  # from step 3 on
    Stage(5 * 48 * T, 48, 1, T, (1.0, 0.0, 1.0)),
    Stage(7 * 48 * T, 24, 1, LONG, (1.0, 0.0, 1.0), 500_000.0, run=1),
    Stage(7 * 48 * T + 4 * 24 * LONG, 24, 1, LONG, (1.0, 1.0, 1.0), 500_000.0, run=1),
]
STEPS = 14
WAYS = [("concatenate", True), ("concatenate", False), ("best_fit", True), ("best_fit", False)]


def write(prefix: Path, seed: int, documents: int) -> Corpus:
    """Documents of 0 to 60 tokens that are all different, so that a token says where it was."""
    lengths = np.random.default_rng(seed).choice([0, 1, 2, 3, 7, 8, 9, 15, 30, 60], documents)
    ends = np.cumsum(lengths) + seed * 100_000
    write_megatron(prefix, [[list(range(end - size, end))] for end, size in zip(ends, lengths)])
    return Corpus.open(prefix, vocabulary_size=1_000_000)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("sources")
    return [write(folder / f"s{i}", i, documents) for i, documents in enumerate((400, 250, 150))]


def loader(sources: list[Corpus], **changes: Any) -> Loader:
    return Loader(sources, **{"stages": STAGES, "seed": 5, **changes})


def rows(batches: list[Batch], length: int) -> torch.Tensor:
    return torch.cat([torch.stack([b.tokens.view(-1, length), b.targets.view(-1, length)], 1) for b in batches])


def step_rows(loaders: list[Loader], step: int) -> torch.Tensor:
    """The global batch of a step in its order, from all ranks."""
    each = [one.batches(step) for one in loaders]
    length = loaders[0].stage(step).sequence_length
    return rows([mine[m] for m in range(len(each[0])) for mine in each], length)


@pytest.mark.parametrize(("packing", "masked"), WAYS)
def test_one_stream_for_any_number_of_ranks_and_over_restarts(
    packing: str, masked: bool, sources: list[Corpus]
) -> None:
    ways: dict[str, Any] = {"packing": packing, "masked": masked}
    whole = loader(sources, **ways)
    expected = [step_rows([whole], step) for step in range(STEPS)]
    assert [len(found) for found in expected] == [24] * 3 + [48] * 6 + [24] * 5
    assert [found.shape[2] for found in expected] == [T] * 9 + [LONG] * 5
    chance = np.random.default_rng(packing == "best_fit")
    for ranks in (2, 3, 4, 8):
        stop = int(chance.integers(1, STEPS - 1))
        first = [loader(sources, rank=r, ranks=ranks, **ways) for r in range(ranks)]
        for step in range(stop):
            assert torch.equal(step_rows(first, step), expected[step])
        states = [one.state_dict() for one in first]
        assert all(state == states[0] for state in states)
        saved = json.loads(json.dumps(states[0]))
        others = int(chance.choice([1, 2, 3, 4, 8]))
        second = [loader(sources, rank=r, ranks=others, prefetch=r == 0, **ways) for r in range(others)]
        for one in second:
            one.load_state_dict(saved)
            assert one.state_dict() == saved
        for step in range(stop, STEPS):
            assert torch.equal(step_rows(second, step), expected[step]), (ranks, stop, others, step)
        assert second[0].state_dict() == whole.state_dict()
        for one in second:
            one.close()


@pytest.mark.parametrize(("packing", "masked"), WAYS)
def test_targets_follow_tokens(packing: str, masked: bool, sources: list[Corpus]) -> None:
    one = loader(sources, packing=packing, masked=masked)
    ends = {int(c.read(d)[-1]) for c in sources for d in range(c.documents) if c.lengths[d]}
    for step in (0, 4, 12):
        for batch in one.batches(step):
            tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
            length, borders = one.stage(step).sequence_length, batch.cu_seqlens.tolist()
            # What fills a row up stands in a sequence of its own: the only one without any target that is no document's end.
            padding = {
                i for a, b in pairwise(borders) for i in range(a, b)
                if b % length == 0 and set(targets[a:b]) == {IGNORE} and set(tokens[a:b]) == {0}
            }  # fmt: skip
            assert len(padding) == batch.padding
            for i, (token, target) in enumerate(zip(tokens, targets)):
                if i in padding:
                    continue
                if token not in ends:
                    assert target == token + 1
                elif masked or (packing == "best_fit" and (i + 1) % length == 0) or i + 1 in padding:
                    assert target == IGNORE
                elif (i + 1) % length:
                    assert target == tokens[i + 1]  # the first token of the document that follows
                else:
                    assert target != IGNORE
            inner = {i + 1 for i, token in enumerate(tokens) if token in ends and i not in padding} if masked else set()
            edges = {i for i in range(len(tokens) + 1) if i % length == 0}
            starts = {min(padding & set(range(e, e + length)), default=0) for e in edges}
            assert set(borders) == edges | inner | starts


def test_no_sequence_twice_in_a_pass_and_passes_are_counted(sources: list[Corpus]) -> None:
    stages = [Stage(0, 16, 1, T, (2.0, 1.0, 0.0))]
    one = loader(sources, stages=stages)
    windows = [one.stream.arrangement(0, s).windows_per_epoch for s in range(3)]
    steps = 3 * windows[0] // 16
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(steps):
        for reference in one.references(step, 0, 1)[0:]:
            seen.update((each.source, each.sequence) for each in reference)
    assert max(seen.values()) == 1 and {source for source, _ in seen} == {0, 1}
    counts = [sum(source == s for source, _ in seen) for s in range(3)]
    np.testing.assert_allclose(one.passes(steps), [count / size for count, size in zip(counts, windows)])
    assert abs(counts[0] - 2 * counts[1]) <= 2 and one.passes(steps)[0] > 1.9
    firsts = [
        {(p.document, p.start) for i in range(windows[0]) for p in one.stream.arrangement(0, 0).row(e * windows[0] + i).pieces}
        for e in range(2)
    ]  # fmt: skip
    alike = firsts[0] == firsts[1]
    assert not alike  # another pass cuts elsewhere


def test_windows_are_shuffled_anew_in_every_epoch(sources: list[Corpus]) -> None:
    """How far each window lies from the one before it does not depend on where the epoch's cuts begin."""
    order, corpus = loader(sources, stages=[Stage(0, 8, 1, T, (1.0,) * 3)]).stream.arrangement(0, 0), sources[0]
    numbers = np.arange(int(order.windows_per_epoch))
    leaps = []
    for epoch in range(3):
        row, first, _ = order.pieces(numbers + epoch * len(numbers))
        begins = first[np.flatnonzero(np.diff(row, prepend=-1))]
        leaps.append(tuple(np.diff(begins) % int(corpus.starts[-1])))
    different = len(set(leaps))  # apart from the assertion, which would print them all
    assert different == 3


def test_sources_and_lengths_are_shuffled_apart(sources: list[Corpus]) -> None:
    """The same text given twice, and cut a second time, is read in three orders."""
    stages = [Stage(0, 8, 1, T, (1.0, 1.0)), Stage(800, 8, 1, T + 1, (1.0, 1.0), None, run=1)]
    for packing in ("concatenate", "best_fit"):
        stream = loader([sources[0], sources[0]], stages=stages, packing=packing).stream
        firsts = [
            [stream.arrangement(run, source).row(number).pieces[0].document for number in range(50)]
            for run, source in ((0, 0), (0, 1), (1, 0))
        ]
        assert len({tuple(each) for each in firsts}) == 3, packing


def test_nothing_is_used_twice_as_weights_and_batches_change(sources: list[Corpus]) -> None:
    one = loader(sources)
    used = Counter(each for step in range(STEPS) for batch in one.references(step, 0, 1) for each in batch)
    assert max(used.values()) == 1 and len(used) == sum(one.stage(step).batch for step in range(STEPS))
    numbers: dict[tuple[int, int], list[int]] = {}
    for each in used:
        numbers.setdefault((each.run, each.source), []).append(each.sequence)
    assert all(sorted(found) == list(range(len(found))) for found in numbers.values())  # and nothing is left out


def test_weights_hold_at_every_step_of_every_stage(sources: list[Corpus]) -> None:
    one = loader(sources)
    used = np.zeros(3)
    for step in range(STEPS):
        stage = one.stage(step)
        found = Counter(r.source for batch in one.references(step, 0, 1) for r in batch)
        used += [found[s] for s in range(3)]
        if step < 5 + 1:
            share = np.array(STAGES[0].weights) / 6 * one.first_sequence(step + 1)
            assert abs(used - share).max() <= 1
        elif stage.weights == (1.0, 0.0, 1.0):
            assert found[1] == 0 and abs(found[0] - found[2]) <= 1
    assert one.tokens(9) == 3 * 24 * T + 6 * 48 * T and one.tokens(10) == one.tokens(9) + 24 * LONG


def test_a_rollback_over_a_border_skips_in_both_stages(sources: list[Corpus]) -> None:
    one = loader(sources)
    state: dict[str, Any] = {}
    for step in range(11):
        if step == 8:
            state = one.state_dict()
        one.batches(step)
    lost = {r for step in range(8, 11) for batch in one.references(step, 0, 1) for r in batch}
    before = {r for step in range(8) for batch in one.references(step, 0, 1) for r in batch}
    end = one.position(11)
    one.load_state_dict(state)
    one.skip_to(end)
    assert {(run, source) for _, _, source, run in (s for s in one.skipped if len(s) == 4)} >= {(0, 2), (1, 0), (1, 2)}
    after = {r for step in range(8, 16) for batch in one.references(step, 0, 1) for r in batch}
    assert not after & (lost | before) and len(after) == 48 + 7 * 24
    again = loader(sources, rank=1, ranks=2)
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert again.skipped == one.skipped
    assert [r for b in again.references(12, 0, 1) for r in b] == [r for b in one.references(12, 0, 1) for r in b]


# A change here changes what checkpoints go on with: give the order another version.
DIGESTS = {
    ("concatenate", 1): "4d599f51efbf17abd4ddd2ebab82eba5",
    ("concatenate", 2): "fd93f7f103ce2924c90e52b9c6646cad",
    ("best_fit", 2): "f4a9c8e2220217892c243f4299032eee",
}


@pytest.mark.parametrize(("packing", "version"), [("concatenate", 1), ("concatenate", 2), ("best_fit", 2)])
def test_the_stream_is_fixed_for_all_time(packing: str, version: int, sources: list[Corpus]) -> None:
    simple = {"stages": [Stage(0, 24, 2, LONG)], "version": 1}
    one = loader(sources[:1] if version == 1 else sources, packing=packing, **(simple if version == 1 else {}))
    found = b"".join(
        each.numpy().tobytes()
        for step in [*range(STEPS), 200]
        for batch in one.batches(step)
        for each in (batch.tokens, batch.targets, batch.cu_seqlens)
    )
    assert xxhash.xxh3_128(found).hexdigest() == DIGESTS[packing, version]


def test_best_fit_by_hand() -> None:
    # 7, 5, 5, 3, 2, 12 (8 and 4) tokens into rows of 8: [7] [5, 3] [5, 2] [8] [4].
    starts = np.cumsum([0, 7, 5, 5, 3, 2, 12, 1])
    packed = BestFit(starts, 8, 0)
    held = sorted(sorted(p.length for p in packed.row(i).pieces) for i in range(packed.windows_per_epoch))
    assert held == [[2, 5], [3, 5], [4], [7], [8]]
    assert packed.padding == pytest.approx(1 - 34 / 40)


def test_best_fit_keeps_documents_whole_in_every_epoch(sources: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.best_fit.BLOCK", 16)
    monkeypatch.setattr("pretrain.data.best_fit.GROUP", 3)
    corpus = sources[0]
    packed = BestFit(corpus.starts, 32, 3)
    orders = []
    for epoch in range(2):
        rows = [packed.row(epoch * packed.windows_per_epoch + i) for i in range(packed.windows_per_epoch)]
        orders.append([row.pieces[0] for row in rows])
        assert all(0 < row.inputs <= 32 for row in rows)
        pieces = Counter(piece.document for row in rows for piece in row.pieces)
        assert all(corpus.lengths[d] > 32 for d, count in pieces.items() if count > 1)
        tokens = {(p.document, p.start + i) for row in rows for p in row.pieces for i in range(p.length)}
        assert len(tokens) == sum(row.inputs for row in rows)
        # But for documents of one token, and a last one by itself: all tokens are inputs.
        assert {d for d, _ in tokens} == {d for d in range(corpus.documents) if corpus.lengths[d] > 1}
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])


def test_best_fit_shuffles_within_a_group(sources: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that follow each other come from all blocks of a group."""
    monkeypatch.setattr("pretrain.data.best_fit.BLOCK", 16)
    monkeypatch.setattr("pretrain.data.best_fit.GROUP", 5)
    packed = BestFit(sources[0].starts, 32, 3)
    blocks = [packed.row(number).pieces[0].document // 16 for number in range(40)]
    assert len(set(blocks)) == 5
    assert sum(a != b for a, b in pairwise(blocks)) > 20


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_damaged_documents_are_left_out_and_counted(packing: str, tmp_path: Path) -> None:
    write_megatron(tmp_path / "pair", [[list(range(10))] for _ in range(20)])
    patch(tmp_path / "pair.bin", 4 * 73, b"\xff\xff\xff\x7f")
    corpus = Corpus.open(tmp_path / "pair", vocabulary_size=10)
    given: dict[str, Any] = {"sequence_length": 10, "global_batch": 1, "micro_batch": 1, "seed": 0, "packing": packing}
    strict, lenient = Loader(corpus, **given), Loader(corpus, **given, skip_bad=True)
    with pytest.raises(DataError, match="byte 292 is outside"):
        for step in range(20):
            strict.batches(step)
    windows = lenient.order.windows_per_epoch
    batches = [lenient.batches(step)[0] for step in range(windows)]
    assert all(int(batch.tokens.max()) < 10 and int(batch.targets.max()) < 10 for batch in batches)
    assert 0 < lenient.damaged <= 11 and lenient.damaged == sum(batch.damaged for batch in batches)
    assert lenient.numbers(windows, batches)["damaged_tokens"] == lenient.damaged


def test_a_checkpoint_of_version_1_goes_on_with_it(sources: list[Corpus]) -> None:
    given: dict[str, Any] = {"sequence_length": T, "global_batch": 8, "micro_batch": 2, "seed": 5}
    old = Loader(sources[0], **given, version=1)
    # As version 1 wrote it.
    keys = ("order_version", "corpus", "seed", "sequence_length", "step", "sequences", "skipped")
    for step in range(3):
        old.batches(step)
    state = {key: old.state_dict()[key] for key in keys}
    assert state["order_version"] == 1
    new = Loader(sources[0], **given, prefetch=True)
    assert not torch.equal(rows(new.batches(3), T), rows(old.batches(3), T))
    new.load_state_dict(state)
    assert torch.equal(rows(new.batches(3), T), rows(old.batches(3), T)) and new.state_dict()["order_version"] == 1
    new.close()
    with pytest.raises(ValueError, match="order_version 1, this run has 2"):
        Loader(sources[0], **given, packing="best_fit").load_state_dict({**state, "packing": "best_fit"})
