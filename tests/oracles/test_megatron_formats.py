"""Pairs that megatron-core writes and reads, and ours: the same bytes, and the same samples from its own data sets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data import Corpus, DataError, Loader
from pretrain.data.index import DTYPES, read_modes
from pretrain.data.megatron import indexed_dataset
from pretrain.data.writer import PairWriter, dtype_for

pytest.importorskip("megatron.core")
T = 16
Documents = list[list[list[int]]]
"""Documents of sequences of token ids."""


def random_documents(seed: int, largest: int, count: int = 40) -> Documents:
    chance = np.random.default_rng(seed)
    return [
        [chance.integers(0, largest + 1, chance.integers(1, 30)).tolist() for _ in range(chance.integers(1, 4))]
        for _ in range(count)
    ]


def write_theirs(prefix: Path, documents: Documents, dtype: Any, modes: list[list[int]] | None = None) -> None:
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=modes is not None)
    for number, sequences in enumerate(documents):
        sizes = [len(sequence) for sequence in sequences]
        flat = torch.tensor([token for sequence in sequences for token in sequence])
        builder.add_document(flat, sizes, *([] if modes is None else [modes[number]]))
    builder.finalize(f"{prefix}.idx")


def write_ours(prefix: Path, documents: Documents, dtype: Any, modes: list[list[int]] | None = None) -> None:
    with PairWriter(prefix, dtype, modes=modes is not None) as writer:
        for first in range(0, len(documents), 7):  # some at a time, as a preparation does
            some = documents[first : first + 7]
            flat = [sequence for sequences in some for sequence in sequences]
            kinds = [mode for each in modes[first : first + 7] for mode in each] if modes else None
            ids = np.array([token for sequence in flat for token in sequence])
            writer.add(ids, [len(sequence) for sequence in flat], [len(sequences) for sequences in some], kinds)


def same_bytes(one: Path, other: Path) -> bool:
    return all(Path(f"{one}.{end}").read_bytes() == Path(f"{other}.{end}").read_bytes() for end in ("bin", "idx"))


@pytest.mark.parametrize("code", DTYPES)
def test_the_same_bytes_for_every_type(tmp_path: Path, code: int) -> None:
    dtype = DTYPES[code]
    assert indexed_dataset().DType.code_from_dtype(dtype) == code
    documents = random_documents(code, min(int(np.iinfo(dtype).max), 2**40))
    write_ours(tmp_path / "ours", documents, dtype)
    write_theirs(tmp_path / "theirs", documents, dtype)
    assert same_bytes(tmp_path / "ours", tmp_path / "theirs")
    corpus = Corpus.open(tmp_path / "theirs")
    assert corpus.dtype == np.dtype(dtype)
    flat = [[token for sequence in sequences for token in sequence] for sequences in documents]
    assert [corpus.read(i).tolist() for i in range(corpus.documents)] == flat
    # Read as training would, a row's tokens are those of the documents one after the other.
    loader = Loader(corpus, sequence_length=T, global_batch=1, micro_batch=1, seed=0)
    stream = [token for document in flat for token in document]
    windows = {tuple((stream * 2)[i : i + T]): i for i in range(len(stream))}
    # Documents are apart, the sequences of one document are not.
    borders = np.cumsum([0, *(len(document) for document in flat)])
    for step in range(20):
        (batch,) = loader.batches(step)
        assert batch.tokens.dtype == torch.int64
        first = windows[tuple(batch.tokens[0].tolist())]
        inside = {int(border) - first for border in [*borders, *(borders[1:] + len(stream))]} & set(range(1, T))
        assert batch.cu_seqlens.tolist() == [0, *sorted(inside), T]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_that_are_not_token_ids(tmp_path: Path, dtype: Any) -> None:
    write_theirs(tmp_path / "theirs", [[[1, 2]]], dtype)
    with pytest.raises(DataError, match=rf"dtype code \d at byte 17: {np.dtype(dtype)}, which are not token ids"):
        Corpus.open(tmp_path / "theirs")


def test_every_code_of_theirs_is_known() -> None:
    theirs = indexed_dataset().DType
    assert {each.value for each in theirs} == {*DTYPES, 6, 7}
    for size in (1, 65_499, 65_500, 65_537, 10**6):
        assert dtype_for(size) == np.dtype(theirs.optimal_dtype(size))


def test_modes(tmp_path: Path) -> None:
    documents = random_documents(1, 500)
    modes = [[i % 3 for i in range(len(sequences))] for sequences in documents]
    write_ours(tmp_path / "ours", documents, np.uint16, modes)
    write_theirs(tmp_path / "theirs", documents, np.uint16, modes)
    assert same_bytes(tmp_path / "ours", tmp_path / "theirs")
    theirs = indexed_dataset().IndexedDataset(str(tmp_path / "ours"), multimodal=True)
    flat = [(sequence, mode) for pair in zip(documents, modes) for sequence, mode in zip(*pair)]
    assert [(theirs[i][0].tolist(), int(theirs[i][1])) for i in range(len(theirs))] == flat
    found = read_modes(tmp_path / "theirs")
    assert found is not None
    assert found.tolist() == [mode for _, mode in flat]
    corpus = Corpus.open(tmp_path / "theirs")
    assert corpus.documents == len(documents)
    assert corpus.read(2).tolist() == [token for sequence in documents[2] for token in sequence]


def test_items_and_pairs_that_were_joined(tmp_path: Path) -> None:
    # The other two ways in which Megatron's tools build a pair.
    builder = indexed_dataset().IndexedDatasetBuilder(f"{tmp_path}/items.bin", dtype=np.int32)
    for sequences in ([[1, 2], [3]], [], [[4]]):
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{tmp_path}/items.idx")
    write_ours(tmp_path / "ours", [[[100_000, 5]], [[6], [7, 8]]], np.int32)
    joined = indexed_dataset().IndexedDatasetBuilder(f"{tmp_path}/joined.bin", dtype=np.int32)
    for name in ("items", "ours", "items"):
        joined.add_index(f"{tmp_path}/{name}")
    joined.finalize(f"{tmp_path}/joined.idx")
    corpus = Corpus.open(tmp_path / "joined")
    items = [[1, 2, 3], [], [4]]
    assert [corpus.read(i).tolist() for i in range(corpus.documents)] == [*items, [100_000, 5], [6, 7, 8], *items]


@pytest.mark.parametrize("mapped", [True, False])
def test_their_reader_on_a_prepared_corpus(corpus: Path, mapped: bool) -> None:
    theirs = indexed_dataset().IndexedDataset(str(corpus / "train"), mmap=mapped)
    ours = Corpus.open(corpus)
    assert len(theirs) == ours.documents == len(theirs.document_indices) - 1
    assert theirs.sequence_lengths.tolist() == ours.lengths.tolist()
    for i in (0, ours.documents // 2, ours.documents - 1):
        assert theirs[i].tolist() == ours.read(i).tolist()
        assert theirs.get(i, 1, 3).tolist() == ours.read(i, 1, 3).tolist()


class _Tokenizer:
    """What a GPTDataset asks of one."""

    def __init__(self, size: int, eos: int) -> None:
        self.vocab_size, self.eod, self.pad = size, eos, -1
        self.unique_identifiers = {"class": "test"}


def their_splits(blend: Any, split: str, sizes: list[int | None], tokenizer: _Tokenizer, length: int) -> list[Any]:
    """Their train, validation and test data sets, by the builder that their training script calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        config = GPTDatasetConfig(
            random_seed=5,
            sequence_length=length,
            blend=blend,
            split=split,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def check_samples(dataset: Any, corpus: Corpus, length: int) -> int:
    """That each sample of a GPTDataset is what it would be if our reader had read it; returns how many there are."""
    stream = np.concatenate([corpus.read(int(i)) for i in dataset.document_index]).astype(np.int64)
    for number, place in enumerate(dataset.shuffle_index.tolist()):
        window = stream[place * length : (place + 1) * length + 1]
        sample = dataset[number]
        assert np.array_equal(sample["tokens"].numpy(), window[:-1])
        assert np.array_equal(sample["labels"].numpy(), window[1:])
    return len(dataset)


def test_their_training_data_of_a_prepared_corpus(corpus: Path, tmp_path: Path) -> None:
    ours, prefix = Corpus.open(corpus), tmp_path / "train"
    for end in ("bin", "idx"):  # it writes a cache beside the pair
        Path(f"{prefix}.{end}").symlink_to(corpus / f"train.{end}")
    assert ours.vocabulary_size is not None
    assert ours.eos is not None
    tokenizer = _Tokenizer(ours.vocabulary_size, ours.eos)
    length = 512
    train, validation, test = their_splits(([str(prefix)], None), "80,20,0", [None, None, 0], tokenizer, length)
    assert test is None
    both = [*train.document_index.tolist(), *validation.document_index.tolist()]
    assert sorted(both) == list(range(ours.documents))
    tokens = [sum(int(ours.lengths[i]) for i in each.document_index) for each in (train, validation)]
    assert sum(tokens) == ours.tokens
    assert check_samples(train, ours, length) == (tokens[0] - 1) // length
    assert check_samples(validation, ours, length) == (tokens[1] - 1) // length


def test_their_blend_of_ours_and_theirs(tmp_path: Path) -> None:
    # In both: documents of one sequence, which is what their data sets take for a document.
    texts = [[[sequences[0]] for sequences in random_documents(seed, 900, 60)] for seed in (1, 2)]
    write_ours(tmp_path / "a", texts[0], np.uint16)
    write_theirs(tmp_path / "b", texts[1], np.int32)
    prefixes = [str(tmp_path / name) for name in "ab"]
    blend, _, _ = their_splits((prefixes, [0.7, 0.3]), "1,0,0", [100, 0, 0], _Tokenizer(1000, 0), T)
    corpora = [Corpus.open(prefix) for prefix in prefixes]
    for dataset, corpus in zip(blend.datasets, corpora, strict=True):
        check_samples(dataset, corpus, T)
    assert len(blend) >= 100
    counts = np.bincount(blend.dataset_index[:100], minlength=2)
    assert counts.tolist() == [70, 30]
    for number in range(0, 100, 9):
        sample, inside = blend[number], int(blend.dataset_sample_index[number])
        assert torch.equal(sample["tokens"], blend.datasets[int(sample["dataset_id"])][inside]["tokens"])
