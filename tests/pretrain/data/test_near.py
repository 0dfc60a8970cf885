from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import near

pytest.importorskip("rensa")

TEXT = (
    "The quick brown fox jumps over the lazy dog again and again until the evening comes, "
    "and all the animals of the wood go to sleep."
)

GOLDEN = [121440551, 1498895176, 1146262417, 2730066789]


def words(draw: random.Random, count: int) -> list[str]:
    return ["".join(draw.choices("abcdefgh", k=6)) for _ in range(count)]


def runs(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + near.WORDS]) for i in range(len(text) - near.WORDS + 1)}


def test_signature_is_fixed_for_ever() -> None:
    found = near.signature(TEXT)
    assert (found.dtype, found.shape) == (np.uint32, (128,))
    assert found[:4].tolist() == GOLDEN


@pytest.mark.parametrize("other", [TEXT.upper(), TEXT.replace(" ", "\n\n "), TEXT.replace(",", " \u2014 ") + "!"])
def test_case_spaces_and_punctuation_do_not_count(other: str) -> None:
    assert near.signature(other).tolist() == near.signature(TEXT).tolist()


def test_composed_and_decomposed_letters_are_one() -> None:
    a, b = (f"un caf{e} noir et un th{e} vert pour la table" for e in ("\u00e9", "e\u0301"))
    assert near.signature(a).tolist() == near.signature(b).tolist()
    assert (near.signature(a) == near.signature(a.replace("\u00e9", "e"))).mean() < 0.5


def test_estimates_the_similarity_of_runs_of_words() -> None:
    draw = random.Random(0)
    errors = []
    for changed in (1, 3, 10, 30):
        text = words(draw, 400)
        other = list(text)
        for place in draw.sample(range(400), changed):
            other[place] = "changed"
        a, b = runs(text), runs(other)
        truth = len(a & b) / len(a | b)
        estimate = (near.signature(" ".join(text)) == near.signature(" ".join(other))).mean()
        errors.append(abs(estimate - truth) / max((truth * (1 - truth) / near.SLOTS) ** 0.5, 1e-9))
    assert max(errors) < 3, errors  # in standard deviations


def test_wide_characters_are_words() -> None:
    text = "今天天气很好我们一起去公园散步然后回家吃饭看书睡觉"
    a, b = near.signature(text), near.signature(text.replace("公园", "河边"))
    truth = len(runs(list(text)) & runs(list(text.replace("公园", "河边")))) / len(
        runs(list(text)) | runs(list(text.replace("公园", "河边")))
    )
    assert (a == b).mean() == pytest.approx(truth, abs=0.13)
    assert near.signature("、".join(["今天天气", "很好"])).tolist() == near.signature("今天天气很好").tolist()


def test_short_documents_are_alike_only_if_equal() -> None:
    found = near.signatures(["one two three four", "one two three five", "!!!", "???", "", "ONE two three four"])
    same = [[bool((a == b).all()) for b in found] for a in found]
    assert same == [[i == j or {i, j} == {0, 5} for j in range(6)] for i in range(6)]


def test_a_signature_depends_on_its_text_alone() -> None:
    draw = random.Random(1)
    long = " ".join(words(draw, 200_000))  # more than a block
    texts = [" ".join(words(draw, draw.randrange(40))) for _ in range(50)] + [long, "x" * (near._BLOCK + 7), "a b"]
    together = near.signatures(texts)
    assert all(together[i].tolist() == near.signature(text).tolist() for i, text in enumerate(texts))
    assert (near.signature(long) == near.signature(long + " and then some")).mean() > 0.98
    # However a long document is cut in blocks, its words are the same.
    shifted = near._words_of([long.encode()])[0]
    whole = np.concatenate([near._hash_words(half.encode())[0] for half in (long[:699_999], long[699_999:])])
    assert shifted.tolist() == whole.tolist()


def families(draw: random.Random) -> list[str]:
    """Texts of which some are copies of others with few or many words changed."""
    texts = []
    for _ in range(40):
        base = words(draw, 150)
        for changed in draw.choices((0, 1, 2, 3, 6, 12, 40), k=draw.randrange(1, 10)):
            other = list(base)
            for place in draw.sample(range(150), changed):
                other[place] = "".join(draw.choices("xyz", k=6))
            texts.append(" ".join(other))
    draw.shuffle(texts)
    return texts


def by_hand(rows: np.ndarray, threshold: float) -> list[bool]:
    """All pairs, no bands: whether a document is linked to an earlier one."""
    similar = (rows[:, None, :] == rows[None, :, :]).mean(axis=2) >= threshold
    component = list(range(len(rows)))
    for i, j in np.argwhere(similar):
        low, high = sorted((component[i], component[j]))
        component = [low if c == high else c for c in component]
    return [c != i for i, c in enumerate(component)]


@pytest.mark.parametrize(("threshold", "count"), [(0.6, 123), (0.8, 72), (1.0, 8)])
def test_finds_what_a_comparison_of_all_pairs_finds(threshold: float, count: int) -> None:
    rows = near.signatures(families(random.Random(2)))
    found = near.near_duplicates(rows, threshold)
    assert found.tolist() == by_hand(rows, threshold)
    assert found.sum() == count


def test_parts_on_disk_give_the_same(tmp_path: Path) -> None:
    rows = near.signatures(families(random.Random(3)))
    np.save(tmp_path / "part.npy", rows[20:])
    parts = [rows[:7], rows[7:7], rows[7:20], np.load(tmp_path / "part.npy", mmap_mode="r")]
    assert near.near_duplicates(parts, scratch=tmp_path).tolist() == near.near_duplicates(rows).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["part.npy"]


def test_the_first_stays_and_a_chain_is_followed() -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 32, (6, near.SLOTS), dtype=np.uint32)
    for number, (source, changed) in {2: (0, 20), 4: (2, 20), 5: (3, 30)}.items():
        rows[number] = rows[source]
        rows[number, 20 * number : 20 * number + changed] = 0
    # 4 is like 2, which is like 0; 4 and 0 agree in 88 of 128. 5 and 3 agree in 100 of 128, which is too little.
    assert (rows[4] == rows[0]).sum() == 88
    assert near.near_duplicates(rows, 0.8).tolist() == [False, False, True, False, True, False]


def test_many_that_share_a_band_without_being_similar() -> None:
    rows = np.random.default_rng(0).integers(0, 1 << 32, (500, near.SLOTS), dtype=np.uint32)
    rows[:, :6] = 7
    rows[400] = rows[3]
    assert np.flatnonzero(near.near_duplicates(rows)).tolist() == [400]
    rows[450] = rows[440]  # beyond the 64 that others of the band are compared with, found by the other bands
    assert np.flatnonzero(near.near_duplicates(rows)).tolist() == [400, 450]


def test_members_of_one_band_are_compared_with_neighbours_and_leaders() -> None:
    chance = np.random.default_rng(0).integers(0, 1 << 32, (300, near.SLOTS), dtype=np.uint32)
    copies = {100: 0, 150: 30, 250: 241, 290: 200}  # of the first; of the 31st leader; of a neighbour; of neither
    chance[list(copies)] = chance[list(copies.values())]
    labels = np.arange(300, dtype=np.uint32)
    near._link(near._Rows([chance]), (np.arange(300), np.zeros(300, np.uint64)), labels, 103)
    assert {int(i): int(labels[i]) for i in np.flatnonzero(labels != np.arange(300))} == {100: 0, 150: 30, 250: 241}


def test_none_and_one() -> None:
    assert near.near_duplicates(np.zeros((0, near.SLOTS), np.uint32)).tolist() == []
    assert near.near_duplicates([]).tolist() == []
    assert near.near_duplicates(np.zeros((1, near.SLOTS), np.uint32)).tolist() == [False]


def test_bands_are_chosen_by_the_threshold() -> None:
    for threshold, rows in ((1.0, 128), (0.9, 10), (0.8, 6), (0.5, 3)):
        assert near.band_rows(threshold) == rows
        assert 1 - (1 - threshold**rows) ** (near.SLOTS // rows) >= 0.99


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_threshold_out_of_range(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"pass a number above 0 up to 1, such as 0\.8"):
        near.near_duplicates(np.zeros((2, near.SLOTS), np.uint32), threshold)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert near.version() == "rensa 2/128/5"
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match=r"need the rensa package: pip install 'braid\[clean\]'"):
        near.signature("x")
