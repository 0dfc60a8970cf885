"""What is read several steps at once, by any process and from any place on, is what is read piece by piece."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data import Batch, Corpus, DataError, Loader
from pretrain.data import best_fit as best_fits
from pretrain.data.__main__ import main
from pretrain.data.bench import lengths_of
from pretrain.data.best_fit import BestFit
from pretrain.data.layout import lay_out
from pretrain.data.loader import _reader
from pretrain.data.stages import Stage
from pretrain.data.stream import Reference, Stream
from tests.pretrain.data.test_store import patch, write_megatron
from tests.pretrain.data.test_stream import STAGES, STEPS, WAYS, loader, step_rows, write


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("sources")
    return [write(folder / f"s{i}", i, documents) for i, documents in enumerate((400, 250, 150))]


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and a.cu_seqlens.dtype == torch.int32
        and torch.equal(a.cu_seqlens, b.cu_seqlens)
        and (a.padding, a.damaged) == (b.padding, b.damaged)
        for a, b in zip(found, expected)
    )


@pytest.mark.parametrize(("packing", "masked"), WAYS)
def test_steps_read_together_are_as_read_piece_by_piece(packing: str, masked: bool, sources: list[Corpus]) -> None:
    chance = np.random.default_rng(3)
    for batch, micro_batch, ranks, corpora in ((6, 3, 2, sources), (4, 1, 1, sources), (8, 8, 1, sources[:1])):
        for length in (1, 4, 7, 32):
            stages = [Stage(0, batch, micro_batch, length, (3.0, 2.0, 1.0)[: len(corpora)])]
            one = loader(corpora, stages=stages, packing=packing, masked=masked, rank=ranks - 1, ranks=ranks)
            one.skipped = [[3, 5], [40, 60]]
            windows = one.order.windows_per_epoch
            # From the first pass into the third, in turn; then every third step, then here and there.
            steps = [*range(min(3 * windows // batch, 400)), *range(7, 60, 3), *chance.integers(0, 10**9, 5).tolist()]
            for step in steps[:: 2 if length == 7 else 9]:
                assert one._reader is not None
                found = one._reader.read(step)
                expected = [one._pack(references, length) for references in one.references(step, ranks - 1, ranks)]
                assert found is not None and len(found) == len(expected)
                for a, b in zip(found, expected):
                    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
                    assert a.cu_seqlens.dtype == torch.int32 and a.cu_seqlens.tolist() == b.cu_seqlens.tolist()
                    assert a.padding == b.padding and a.tokens.is_contiguous() and a.targets.is_contiguous()


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_who_reads_a_step_changes_nothing(workers: int, packing: str, sources: list[Corpus]) -> None:
    """What Workers run in processes of their own, here in this one: step s by reader s % workers, over a restart."""
    whole = loader(sources, packing=packing)
    expected = [step_rows([whole], step) for step in range(STEPS)]
    chance = np.random.default_rng(workers)
    for ranks in (1, 2, 8):
        ways: dict[str, Any] = {"stages": STAGES, "seed": 5, "packing": packing, "masked": True, "ranks": ranks}
        make = [partial(_reader, sources, {**ways, "rank": rank}) for rank in range(ranks)]
        readers = [[one() for _ in range(workers)] for one in make]
        stop = int(chance.integers(1, STEPS - 1))
        before = loader(sources, packing=packing)
        states = {0: before.state_dict(), stop: json.loads(json.dumps(before.state_at(stop)))}
        for first, end in ((0, stop), (stop, STEPS)):
            for step in range(first, end):
                each = [readers[rank][step % workers](states[first], step) for rank in range(ranks)]
                length = before.stage(step).sequence_length
                found = [
                    torch.stack([mine[m].tokens.view(-1, length), mine[m].targets.view(-1, length)], 1)
                    for m in range(len(each[0]))
                    for mine in each
                ]
                assert torch.equal(torch.cat(found), expected[step]), (ranks, step)


def test_any_run_is_one_stream(sources: list[Corpus]) -> None:
    """Runs drawn by chance: sources, weights, stages, packing, what is passed over, ranks and restarts."""
    for seed in range(8):
        chance = np.random.default_rng(seed)
        count = int(chance.integers(1, 4))
        corpora = [sources[i] for i in chance.permutation(3)[:count]]
        stages, tokens, run = [], 0, 0
        length = int(chance.integers(1, 40))
        for number in range(int(chance.integers(1, 4))):
            longer = number > 0 and bool(chance.integers(2))
            length, run = (length + int(chance.integers(1, 20)), run + 1) if longer else (length, run)
            weights = tuple(float(w) for w in chance.integers(1, 9, count))
            batch = 24 * int(chance.integers(1, 3))
            stages.append(Stage(tokens, batch, 1, length, weights, run=run))
            tokens += int(chance.integers(1, 5)) * batch * length + int(chance.integers(0, 9))
        ways: dict[str, Any] = {
            "stages": stages, "seed": seed, "packing": str(chance.choice(["concatenate", "best_fit"])),
            "masked": bool(chance.integers(2)),
        }  # fmt: skip
        skipped = [[5, 9], [30, 61]] if chance.integers(2) else []
        whole = Loader(corpora, **ways)
        whole.skipped = skipped
        steps = 9
        expected = [step_rows([whole], step) for step in range(steps)]
        state, at = whole.state_at(0), 0
        while at < steps:
            ranks, end = int(chance.choice([1, 2, 3, 4, 8])), int(chance.integers(at, steps)) + 1
            loaders = [Loader(corpora, **ways, rank=rank, ranks=ranks) for rank in range(ranks)]
            for one in loaders:
                one.load_state_dict(state)
            for step in range(at, end):
                assert torch.equal(step_rows(loaders, step), expected[step]), (seed, ranks, step)
            state, at = json.loads(json.dumps(loaders[-1].state_dict())), end
        assert state == {**whole.state_at(steps)}


def test_sources_of_other_types_and_vocabularies(tmp_path: Path) -> None:
    for name, dtype, first in (("a", np.uint16, 0), ("b", np.int32, 70_000)):
        write_megatron(tmp_path / name, [[list(range(first + 20 * i, first + 20 * i + 13))] for i in range(40)], dtype)
    corpora = [
        Corpus.open(tmp_path / "a", vocabulary_size=800),
        Corpus.open(tmp_path / "b", vocabulary_size=80_000),
    ]
    for packing in ("concatenate", "best_fit"):
        given: dict[str, Any] = {"stages": [Stage(0, 4, 2, 15, (1.0, 1.0))], "seed": 1, "packing": packing}
        one = Loader(corpora, **given)
        seen = set()
        for step in range(40):
            references = one.references(step, 0, 1)
            found = one.batches(step)
            assert same(found, [one._pack(each, 15) for each in references])
            seen |= {int(token) for batch in found for token in batch.tokens.unique()}
        assert min(seen) == 0 and max(seen) > 70_000
    # 900 is a token of the second source only: within the limit of both, but damage where it stands.
    patch(tmp_path / "a.bin", 2 * 100, np.uint16(900).tobytes())
    with pytest.raises(DataError, match="token id 900 at byte 200 is outside the vocabulary of 800"):
        one = Loader(corpora, **given)
        for step in range(40):
            one.batches(step)
    lenient = Loader(corpora, **given, skip_bad=True)
    for step in range(40):
        assert same(lenient.batches(step), [lenient._pack(each, 15) for each in lenient.references(step, 0, 1)])
    assert lenient.damaged > 0


def test_damage_is_found_at_its_step_and_not_before(tmp_path: Path) -> None:
    write_megatron(tmp_path / "pair", [[list(range(10))] for _ in range(64)])
    patch(tmp_path / "pair.bin", 4 * 333, b"\xff\xff\xff\x7f")
    corpus = Corpus.open(tmp_path / "pair", vocabulary_size=10)
    for packing in ("concatenate", "best_fit"):
        one = Loader(corpus, sequence_length=10, global_batch=1, micro_batch=1, seed=0, packing=packing)
        bad = [
            step for step in range(int(one.order.windows_per_epoch))
            for (reference,) in one.references(step, 0, 1)
            for piece in one.stream.row(reference).pieces
            if 0 <= 333 - int(corpus.starts[piece.document]) - piece.start < piece.length
        ]  # fmt: skip
        first = min(bad)
        assert first > 2  # so that steps before it were read together with it
        for step in range(first):
            one.batches(step)
        with pytest.raises(DataError, match="byte 1332 is outside"):
            one.batches(first)


def naive(sizes: list[int], length: int) -> list[list[int]]:
    """Best fit, decreasing, one by one: the documents of each sequence."""
    bins: list[list[int]] = []
    space: list[int] = []
    used: list[int] = []
    order = sorted((i for i, size in enumerate(sizes) if size > 1), key=lambda i: (-sizes[i], i))
    for turn, i in enumerate(order):
        fits = [(space[b], -used[b], b) for b in range(len(bins)) if space[b] >= sizes[i]]
        chosen = min(fits)[2] if fits else len(bins)
        if not fits:
            bins.append([])
            space.append(length)
            used.append(0)
        bins[chosen].append(i)
        space[chosen] -= sizes[i]
        used[chosen] = turn
    return bins


@pytest.mark.parametrize("length", [2, 9, 50, 1000, 5_000_000])
def test_best_fit_of_many_blocks_is_that_of_each(length: int) -> None:
    chance = np.random.default_rng(length)
    rests = chance.integers(0, min(length, 1000) + 1, (9, 64))
    rests[3] = np.maximum(rests[3] - length // 2, 0)
    rests[5, 10:] = 0  # blocks that end before the others
    rests[6] = chance.choice([0, 1], 64)
    bins, opened = best_fits.assign(rests, length)
    for block, sizes in enumerate(rests.tolist()):
        expected = naive(sizes, length)
        assert opened[block] == len(expected) == best_fits.assign_one(sizes, length)[1]
        alone = best_fits.assign_one(sizes, length)[0]
        assert all(alone[i] == bins[block, i] for i in range(64) if sizes[i] > 1)
        for number, documents in enumerate(expected):
            assert sorted(documents) == [i for i in range(64) if bins[block, i] == number and sizes[i] > 1]


def test_a_worker_is_given_the_packing(sources: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.loader.Workers", lambda make, count: make)
    one = loader(sources, packing="best_fit", workers=1)
    monkeypatch.setattr(best_fits, "table", lambda *given: pytest.fail("packed again"))
    read = pickle.loads(pickle.dumps(one._workers))()
    monkeypatch.undo()
    expected = loader(sources, packing="best_fit")
    for step in range(9):  # of the first sequence length
        assert same(read(expected.state_at(0), step), expected.batches(step))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_steps_of_a_large_corpus(packing: str) -> None:
    lengths = lengths_of(1_000_000_000, 2000)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    stream = Stream([starts], [Stage(0, 64, 64, 4096)], 3, packing)
    windows = int(stream.arrangement(0, 0).windows_per_epoch)
    assert windows > 240_000
    for step in (windows // 64 - 1, 10**9, 17):  # around the end of the first pass; far away; near
        sources, sequences = stream.sequences(step, np.arange(64))
        found = lay_out(stream, [starts], 0, sources, sequences, 4096, 64, True)
        for row in range(0, 64, 21):
            pieces = stream.row(Reference(0, 0, step * 64 + row)).pieces
            here = slice(int(found.begins[row]), int(found.begins[row + 1]))
            places = np.concatenate([np.arange(a, a + n) for a, n in zip(found.first[here], found.size[here])])
            expected = np.concatenate(
                [np.arange(n) + starts[p.document] + p.start for p, n in ((p, p.length) for p in pieces)]
            )
            assert np.array_equal(places[: len(expected)], expected) and len(places) - len(expected) in (0, 1)
    if packing == "best_fit":
        arrangement = stream.arrangement(0, 0)
        assert isinstance(arrangement, BestFit) and arrangement.table.bins.nbytes == 2 * len(lengths)
        assert arrangement.padding < 0.01


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "60000", "--document", "50", "--length", "64", "--index", "100000"]
    assert main(["bench", *sizes, "--rows", "1,3", "--round-tokens", "2000", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["rows", "a", "batch"]
    for line, rows in zip(lines[2:4], ("1", "3")):
        found = line.split()
        assert found[0] == rows and found[2] == "100%" and len(found) == 11
        assert all(float(found[i]) > 0 and found[i + 1].endswith("%") for i in range(1, 11, 2))
    assert [line.split(" opened")[0].strip() for line in lines[-3:]] == ["concatenated", "best fit", "version 1"]


def test_what_was_read_ahead_is_dropped_with_what_it_was_read_for(sources: list[Corpus]) -> None:
    stages = [Stage(0, 4, 2, 7, (1.0,))]
    one = loader(sources[:1], stages=stages)
    for step in range(6):
        one.batches(step)
    assert one._reader is not None and 6 in one._reader._ready
    one.skip_to({(0, 0): 40})
    for changed in ([[24, 40]], [[24, 30], [33, 34]]):
        if one.skipped != changed:
            one.skipped = changed
        fresh = loader(sources[:1], stages=stages)
        fresh.skipped = changed
        for step in range(6, 9):
            assert same(one.batches(step), fresh.batches(step))
