"""Streamed sources in a run: one token order, whatever the ranks, the processes that read, and the restarts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pretrain.data import Corpus, DataConfig, DataError, Loader
from pretrain.data.__main__ import main
from pretrain.data.errors import UsageError
from pretrain.data.opening import Source, loader_of, open_sources, open_validation, vocabulary_size
from pretrain.data.streaming import TextSource
from pretrain.data.streaming_lane import Lane, Position
from pretrain.data.streaming_loader import StreamingLoader
from pretrain.data.streaming_readers import Processes
from pretrain.data.streaming_state import joined
from tests.pretrain.data.conftest import SEED, VALIDATION
from tests.pretrain.data.test_stream import step_rows
from tests.pretrain.data.test_streaming import DOCUMENTS, T, jsonl, parquet
from tests.pretrain.train.small_run import configuration

STEPS = 9
STAGES: list[dict[str, Any]] = [
    {"tokens": 2 * 24 * T, "batch": 48},
    {"tokens": 2 * 24 * T + 2 * 48 * T, "weights": [1, 0, 2], "batch": 24},
    {"tokens": 2 * 24 * T + 2 * 48 * T + 24 * T, "sequence_length": 40},
]


@pytest.fixture(scope="module")
def data(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A blend of a prepared corpus, streamed lines and streamed row groups; lengths, batch and weights change."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "lines").mkdir()
    for number in range(2):
        # Enough for units of the least size: the test's documents several times.
        jsonl(folder / "lines" / f"{number}.jsonl", [f"{turn} {each}" for turn in range(12) for each in DOCUMENTS])
    (folder / "rows").mkdir()
    parquet(folder / "rows" / "0.parquet", DOCUMENTS)
    sources = [
        {"path": folder / "lines", "weight": 3, "stream": {}, "validation_path": prepared},
        {"path": prepared, "weight": 2},
        {"path": folder / "rows" / "*.parquet", "name": "rows", "stream": {"lanes": 6}, "validation_path": prepared},
    ]
    return {"sources": sources, "sequence_length": T, "seed": 5, "stages": STAGES}


def opened(data: dict[str, Any], **changes: Any) -> tuple[DataConfig, list[Source]]:
    config = DataConfig.model_validate({**data, **changes})
    return config, open_sources(config)


def some(config: DataConfig, corpora: list[Source], rank: int = 0, ranks: int = 1, **options: Any) -> StreamingLoader:
    found = loader_of(config, corpora, 24, 1, rank, ranks, **options)
    assert isinstance(found, StreamingLoader)
    return found


def whole_state(loaders: Sequence[Loader]) -> dict[str, Any]:
    """As a checkpoint has it."""
    first = loaders[0]
    assert isinstance(first, StreamingLoader)
    return first.whole(lambda state: [one.state_dict() for one in loaders])


def alone_streamed(data: dict[str, Any], *numbers: int) -> dict[str, Any]:
    """Some of the streamed sources by themselves, at one length and batch."""
    sources = [data["sources"][number] for number in numbers]
    return {**data, "sources": sources, "stages": [], "tokenizer": data["sources"][1]["path"] / "tokenizer.model"}


@pytest.mark.parametrize("masked", [True, False])
def test_one_stream_for_any_number_of_ranks_and_over_restarts(masked: bool, data: dict[str, Any]) -> None:
    config, corpora = opened(data, intra_document_masking=masked)
    whole = some(config, corpora)
    expected = [step_rows([whole], step) for step in range(STEPS)]
    assert [found.shape[0] for found in expected] == [24, 24, 48, 48, 24, 24, 24, 24, 24]
    assert [found.shape[2] for found in expected] == [T] * 5 + [40] * 4
    # Of the run of stages at the last length: that of the one before is not needed any more.
    assert {row[0] for row in whole.state_dict()["streams"]["positions"]} == {1}
    epochs = whole.numbers(STEPS, [])["epochs"]
    assert len(epochs) == 3 and epochs[1] == whole.stream.passes(STEPS)[1] > 0
    chance = np.random.default_rng(masked)
    for ranks in (2, 3, 4, 8):
        stop = int(chance.integers(1, STEPS - 1))
        first = [some(config, corpora, r, ranks) for r in range(ranks)]
        for step in range(stop):
            assert torch.equal(step_rows(first, step), expected[step])
        saved = json.loads(json.dumps(whole_state(first)))
        assert len(json.dumps(saved)) < 8000
        others = int(chance.choice([1, 2, 3, 4, 8]))
        # The state of one rank says less, and gives the same.
        for state in (saved, first[-1].state_dict()):
            second = [some(config, corpora, r, others, prefetch=r == 0) for r in range(others)]
            for one in second:
                one.load_state_dict(state)
            assert second[0].state_dict() == state
            for step in range(stop, STEPS if state is saved else stop + 1):
                assert torch.equal(step_rows(second, step), expected[step]), (ranks, stop, others, step)
            for one in second:
                one.close()
            if state is saved:
                together = whole_state(second)
                assert together == whole.state_dict()


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_processes_change_nothing_also_when_killed(workers: int, data: dict[str, Any]) -> None:
    config, corpora = opened(data)
    alone = some(config, corpora, 1, 2)
    with_processes = some(config, corpora, 1, 2, workers=workers, prefetch=workers % 2 == 0)
    for step in range(STEPS if workers == 2 else 4):
        length = alone.stage(step).sequence_length
        assert torch.equal(step_rows([with_processes], step), step_rows([alone], step))
        assert with_processes.state_dict() == alone.state_dict() and length in (T, 40)
        readers = with_processes.texts._readers
        assert isinstance(readers, Processes) and len(readers.pids) == workers
        if step == 1:
            os.kill(readers.pids[-1], signal.SIGKILL)
    with_processes.close()
    assert not any(each.process.is_alive() for each in readers._processes)


def test_each_rank_reads_only_its_lanes(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = TextSource.tokenizer

    def counted(self: TextSource) -> Any:
        tokenizer = real(self)
        encode = tokenizer.encode
        tokenizer.encode = lambda text: read.append(text) or encode(text)  # type: ignore[method-assign, func-returns-value]
        return tokenizer

    monkeypatch.setattr(TextSource, "tokenizer", counted)
    config, corpora = opened(alone_streamed(data, 0))
    used = []
    for ranks in (1, 4):
        for rank in range(ranks):
            one = some(config, corpora, rank, ranks)
            read.clear()
            for step in range(10):
                one.batches(step)
            used.append(len(read))
    # The text of ten steps, once over all ranks.
    assert sum(used[1:]) == used[0] and max(used[1:]) <= used[0] // 3
    # And going on reads none of what was before.
    state = json.loads(json.dumps(one.state_dict()))
    again = some(config, corpora, 3, 4)
    again.load_state_dict(state)
    read.clear()
    again.batches(10)
    assert 0 < len(read) < used[-1] // 3


@pytest.mark.parametrize("masked", [True, False])
def test_a_batch_is_the_windows_of_its_lanes(masked: bool, data: dict[str, Any]) -> None:
    config, corpora = opened(alone_streamed(data, 2), intra_document_masking=masked)
    one = loader_of(config, corpora, 12, 3)
    assert isinstance(one, StreamingLoader) and one.texts.lanes == {0: 6}
    (recipe,) = one.texts._recipes().values()
    lanes, borders = [Lane(recipe, lane, Position()) for lane in range(6)], 0
    for step in range(3):
        windows = [next(lanes[number % 6]) for number in range(12)]
        for number, batch in enumerate(one.batches(step)):
            mine = windows[number * 3 : number * 3 + 3]
            expected, begins = [], [0]
            for place, window in enumerate(mine):
                targets = window.ids[1:].tolist()
                for begin in window.begins.tolist() if masked else []:
                    targets[begin - 1] = -100
                    begins.append(place * T + begin)
                expected += targets
                begins.append(place * T + T)
            assert batch.tokens[0].tolist() == [token for window in mine for token in window.ids[:-1].tolist()]
            assert batch.targets[0].tolist() == expected
            assert batch.cu_seqlens.tolist() == sorted(set(begins)) and batch.cu_seqlens.dtype == torch.int32
            borders += len(batch.cu_seqlens)
    assert borders > 12 * 4 if masked else borders == 12 * 4


def test_what_was_passed_over_is_not_used_again(data: dict[str, Any]) -> None:
    config, corpora = opened(alone_streamed(data, 0, 2))
    for ranks in (1, 2):
        ways = [some(config, corpora, rank, ranks) for rank in range(ranks)]
        expected = [step_rows(ways, step) for step in range(2)]
        saved = whole_state(ways)
        expected += [step_rows(ways, step) for step in range(2, 7)]
        end = ways[0].position(5)
        for one in ways:
            one.load_state_dict(saved)
            one.skip_to(end)
        assert torch.equal(step_rows(ways, 2), expected[5])
        saved = whole_state(ways)
        assert saved["skipped"]
        alone = some(config, corpora)
        alone.load_state_dict(json.loads(json.dumps(saved)))
        assert torch.equal(step_rows([alone], 3), expected[6])
        # Without going on, a step may be asked for again, and a later one before an earlier one.
        assert torch.equal(step_rows([alone], 5), step_rows(ways, 5))
        assert torch.equal(step_rows([alone], 3), expected[6])


def test_lanes_are_those_that_the_run_began_with(data: dict[str, Any]) -> None:
    config, corpora = opened(alone_streamed(data, 0))
    (source,) = corpora
    assert isinstance(source, TextSource) and source.lanes_for(24) == 24 and source.lanes_for(7) == 7
    assert source.lanes_for(512) == 32 and source.units.count in range(32, 64)
    first = some(config, corpora)
    first.batches(0)
    other = loader_of(config, corpora, 12, 1)
    other.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([step_rows([other], step) for step in (1, 2)]), step_rows([first], 1))
    said = f"tokenised on the fly, {source.units.count} units of text in 24 lanes"
    assert first.describe() == [f"source {source.prefix}: {said}"]


def test_a_new_order_begins_at_the_beginning(data: dict[str, Any]) -> None:
    config, corpora = opened(data)
    one = some(config, corpora)
    first = step_rows([one], 0)
    one.load_state_dict(one.beginning(100, 24 * T))
    assert torch.equal(step_rows([one], 100), first)


def test_passes_are_those_of_the_lanes(data: dict[str, Any]) -> None:
    one = some(*opened(data))
    assert one.passes(0) == [0.0, 0.0, 0.0]
    one.texts.load({"lanes": {"2": 6}, "positions": [[0, 2, 0, 9, 1, 1, 0, 0, 0], [0, 2, 3, 9, 2, 0, 0, 4, 0]]})
    assert one.passes(0) == [0.0, 0.0, 1.75]  # 12 units: two in each lane


def test_states_of_ranks_are_joined() -> None:
    a = {"lanes": {"0": 2}, "positions": [[0, 0, 0, 5, 1, 0, 0, 2, 7], [0, 0, 1, 3, 0, 0, 0, 0, 0]]}
    b = {"lanes": {"0": 2}, "positions": [[0, 0, 1, 6, 0, 2, 0, 1, 1], [1, 0, 0, 1, 0, 0, 0, 0, 4]]}
    expected = [[0, 0, 0, 5, 1, 0, 0, 2, 7], [0, 0, 1, 6, 0, 2, 0, 1, 1], [1, 0, 0, 1, 0, 0, 0, 0, 4]]
    assert joined([a, b]) == joined([b, a]) == {"lanes": {"0": 2}, "positions": expected}


def test_bad_rows_end_the_run_or_are_counted(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.streaming._TRIED", 0)  # as if it were further on
    path = jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    lines = path.read_bytes().splitlines(keepends=True)
    at = sum(map(len, lines[:20]))
    path.write_bytes(b"".join([*lines[:20], b'{"text": 1}\n', *lines[20:]]))
    source = {"path": path, "stream": {"shuffle": False}, "validation_path": prepared}
    data = {"sources": [source], "sequence_length": T, "tokenizer": prepared / "tokenizer.model"}
    for workers in (0, 1):
        loader = loader_of(*opened(data), 4, 1, workers=workers)
        with pytest.raises(DataError, match=rf"a\.jsonl byte {at}: field 'text' holds int.*data\.on_bad=skip"):
            for step in range(9):
                loader.batches(step)
        loader.close()
    lenient = loader_of(*opened(data, on_bad="skip"), 4, 1)
    found = [step_rows([lenient], step) for step in range(8)]
    assert lenient.numbers(9, lenient.batches(8))["damaged_rows"] == 1
    path.write_bytes(b"".join(lines))
    sound = loader_of(*opened(data), 4, 1)
    assert all(torch.equal(step_rows([sound], step), found[step]) for step in range(8))
    assert "damaged_rows" not in sound.numbers(9, [])


def test_validation_text_of_a_preparation_is_left_out(prepared: Path, text_folder: Path) -> None:
    """What prepare holds out of a text, a stream of it never shows; and it shows the rest."""
    stream = {"held_out": VALIDATION, "held_out_seed": SEED, "format": "text"}
    source = {"path": text_folder, "stream": stream, "validation_path": prepared}
    data = {"sources": [source], "sequence_length": 256, "tokenizer": prepared / "tokenizer.model"}
    config, corpora = opened(data)
    loader = loader_of(config, corpora, 1, 1)
    assert isinstance(loader, StreamingLoader)
    units, (recipe,) = loader.texts.sources[0].units, loader.texts._recipes().values()
    shown, lane = set(), Lane(recipe, 0, Position())
    while lane.position.epoch < 1:
        shown |= {Path(units.where(piece.unit, piece.at)) for piece in next(lane).pieces}
    held_out = (prepared / "validation_text.bin").read_bytes()
    left = {path for path in text_folder.iterdir() if path.stat().st_size} - shown
    assert 2 < len(left) < len(shown) and all(path.read_bytes() in held_out for path in left)
    assert not any(path.read_bytes() in held_out for path in shown)
    (other,) = opened({**data, "sources": [{**source, "stream": {"format": "text"}}]})[1]
    assert other.fingerprint != corpora[0].fingerprint


def test_what_cannot_be_streamed_is_refused(data: dict[str, Any], prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="best_fit needs the length of every document before the first step"):
        DataConfig.model_validate({**data, "packing": "best_fit"})
    with pytest.raises(ValidationError, match="order = 1 knows no streamed sources"):
        DataConfig.model_validate({**data, "sources": data["sources"][:1], "order": 1, "stages": []})
    only = {**data, "sources": data["sources"][:1], "stages": []}
    with pytest.raises(UsageError, match=r"data\.tokenizer: not set"):
        opened(only)
    other = tmp_path / "other.model"
    other.write_bytes((prepared / "tokenizer.model").read_bytes() + b"\0")
    with pytest.raises(UsageError, match=r"is not the tokenizer that .* was written with"):
        opened(data, tokenizer=other)
    with pytest.raises(UsageError, match=r"stream\.lanes = 999, but the text has \d+ units"):
        opened(
            {**data, "sources": [{**data["sources"][0], "stream": {"lanes": 999}}, data["sources"][1]], "stages": []}
        )
    with pytest.raises(DataError, match=r"none of the first \d+ rows is readable.*'body'.*stream\.text_field"):
        wrong = {**data["sources"][0], "stream": {"text_field": "body"}}
        opened({**data, "sources": [wrong, data["sources"][1]], "stages": []}, on_bad="skip")
    without = {**data["sources"][0], "validation_path": None}
    config, corpora = opened({**data, "sources": [without, data["sources"][1]], "stages": []})
    with pytest.raises(UsageError, match=r"is streamed, which has no validation split; set data\.sources"):
        open_validation(config, corpora)
    config, corpora = opened(data)
    validation = open_validation(config, corpora)
    assert sorted(validation) == sorted(["lines", prepared.name, "rows"]) and vocabulary_size(config) == 512
    assert all(isinstance(each, Corpus) and each.prefix == prepared / "validation" for each in validation.values())
    state = some(config, corpora).state_dict()
    shutil.copytree(data["sources"][0]["path"], tmp_path / "lines")
    moved = [{**data["sources"][0], "path": tmp_path / "lines"}, *data["sources"][1:]]
    some(*opened({**data, "sources": moved})).load_state_dict(state)  # the folder may move, the text may not
    jsonl(tmp_path / "lines" / "2.jsonl", ["more"])
    with pytest.raises(UsageError, match="the checkpoint has corpus"):
        some(*opened({**data, "sources": moved})).load_state_dict(state)


def test_trace_and_inspect_show_streamed_text(
    data: dict[str, Any], prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [{**each, "path": str(each["path"])} for each in data["sources"]]
    sources = [{key: str(value) if isinstance(value, Path) else value for key, value in s.items()} for s in sources]
    overrides = (f"data.sources={json.dumps(sources)}", "train.batch=12", f"data.sequence_length={T}")
    config = configuration(tmp_path / "run", prepared, f"data.path={sources[0]['path']}", *overrides)
    given = ["--config", "configs/runs/quickstart.yaml", "--step", "2", "--ranks", "2", "train.micro_batch=3"]
    given += [*overrides, f"run={tmp_path}/run", f"data.path={sources[0]['path']}"]
    assert main(["trace", *given]) == 0
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 13 and found[0].startswith("step 2")
    corpora = open_sources(config.data)
    each = [loader_of(config.data, corpora, 12, 3, rank, 2) for rank in range(2)]
    pairs = [(rank, number) for rank in range(2) for number in range(2)]
    batches = {(rank, number): each[rank].batches(2)[number] for rank, number in pairs}
    checked = 0
    for line in found[1:]:
        if " lane " not in line:
            continue
        words = ("rank ", "micro-batch ", "sequence ")
        rank, number, place = (int(line.split(word)[1].split()[0].rstrip(":")) for word in words)
        piece = re.search(r": (\S+) (?:row group \d+ )?(byte|row) (\d+) \[(\d+), (\d+)\)", line)
        assert piece is not None
        name, kind, at, start, end = piece[1], piece[2], *map(int, piece.groups()[2:])
        tokens = batches[rank, number].tokens[0, place * T :][: end - start]
        if kind == "byte":
            with Path(name).open("rb") as file:
                file.seek(at)
                text = json.loads(file.readline())["text"]
        else:
            text = DOCUMENTS[at]
        tokenizer = corpora[0].tokenizer()
        whole = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        assert tokens.tolist() == whole[start:end]
        checked += 1
    assert checked > 4
    assert main(["inspect", *given]) == 0
    out = capsys.readouterr().out
    for batch in batches.values():
        assert tokenizer.decode(batch.tokens[0, :T].tolist()).split("\n")[0][:10] in out
