"""Our SentencePiece tokenizer as tokenizer.json, which AutoTokenizer loads; and tokenizer files carried in and out as they are.

The translation: pieces and their merges (every cut of a piece into two pieces, in the order of the pieces' scores), byte
fallback, U+2581 for a space, and user-defined pieces as added tokens. One difference remains: U+2581 itself in a text is read
as a space, where our Tokenizer spells its bytes. Control pieces written out in a text ("</s>") stay text, as with SentencePiece.
"""

from __future__ import annotations

import base64
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.data.tokenizer import SPACE, Tokenizer, is_json

# What belongs to a tokenizer in a Hugging Face folder.
FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
PROBES = (
    "", "a", " a", "a  b   c", "def f(x):\n    return x\n\n\n        y\n", "\t\ttabs\tand\r\nreturns \n",
    "<s> </s> <unk> <0x0A>", "naïve café Größe", "数学 и русский язык", "🙂👩‍👩‍👧 emoji", "á a\u0301 \u00a0 \u200b ﬁ",
    "    " * 7 + "x", "\n" * 9, "aaaaaaaaaaa 1234567",
)  # fmt: skip

NEVER = -1e6  # a score that no path through a text survives

Ids = dict[str, int | None]


def export(run: Path, folder: Path, elsewhere: Sequence[Path], vocabulary: int) -> tuple[Ids, list[str]]:
    """Writes a run's tokenizer into `folder`. Returns (bos_token_id and eos_token_id for config.json, notes).

    elsewhere: where it may lie when the run folder has none. Raises ValueError if it has more ids than the model.
    """
    nothing: Ids = {"bos_token_id": None, "eos_token_id": None}
    own = [run / name for name in ("tokenizer.json", "tokenizer.model")]
    path = next((place for place in [*own, *elsewhere] if place.is_file()), None)
    if path is None:
        return nothing, ["the run has no tokenizer: none was written"]
    tokenizer = Tokenizer(path)
    if tokenizer.vocabulary_size > vocabulary:
        raise ValueError(f"{path} has {tokenizer.vocabulary_size} ids, but the model's vocabulary is {vocabulary}")
    ids = _ids(tokenizer)
    if is_json(path):
        for name in FILES:
            if (path.parent / name).is_file():
                shutil.copyfile(path.parent / name, folder / name)
        shutil.copyfile(path, folder / "tokenizer.json")
        return ids, []
    shutil.copyfile(path, folder / "tokenizer.model")
    try:
        translated, settings = translate(path)
    except ValueError as error:
        return ids, [f"no tokenizer.json was written, only tokenizer.model: {error}"]
    target = folder / "tokenizer.json"
    target.write_text(json.dumps(translated, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    odd = disagreement(tokenizer, target)
    if odd is not None:
        target.unlink()
        return ids, [
            f"no tokenizer.json was written, only tokenizer.model: a translation would encode {odd!r} otherwise"
        ]
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return ids, []


def _ids(tokenizer: Tokenizer) -> Ids:
    try:
        return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    except ValueError:  # neither end is marked
        return {"bos_token_id": None, "eos_token_id": None}


def intake(folder: Path, run: Path) -> list[str]:
    """Keeps the tokenizer files of a Hugging Face folder. Returns notes."""
    found = [name for name in FILES if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, run / name)
    if {"tokenizer.json", "tokenizer.model"} & set(found):
        return []
    return ["the folder has neither tokenizer.json nor tokenizer.model: the imported model has no tokenizer"]


def disagreement(tokenizer: Tokenizer, translated: Path) -> str | None:
    """The first of some tricky texts that the two encode differently; None if there is none."""
    other = Tokenizer(translated)
    return next((text for text in PROBES if other.encode(text) != tokenizer.encode(text)), None)


def translate(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A SentencePiece .model -> (tokenizer.json, tokenizer_config.json).

    Raises ValueError for a model whose rules cannot be translated.
    """
    try:
        schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        raise ValueError("reading a .model file's rules needs the protobuf package: pip install protobuf") from None
    model = schema.ModelProto()
    model.ParseFromString(path.read_bytes())
    kinds = schema.ModelProto.SentencePiece
    pieces = list(model.pieces)
    trainer, rules = model.trainer_spec, model.normalizer_spec
    special = [i for i, piece in enumerate(pieces) if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    added = [i for i, piece in enumerate(pieces) if piece.type == kinds.USER_DEFINED]
    unknown = next(i for i in special if pieces[i].type == kinds.UNKNOWN)
    byte_fallback = any(piece.type == kinds.BYTE for piece in pieces)
    table: dict[str, Any]
    if trainer.model_type == schema.TrainerSpec.BPE:
        table = {
            "type": "BPE",
            "unk_token": pieces[unknown].piece,
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
            "merges": _merges({p.piece: p.score for p in pieces if p.type == kinds.NORMAL}),
        }
    elif trainer.model_type == schema.TrainerSpec.UNIGRAM:
        table = {
            "type": "Unigram",
            "unk_id": unknown,
            # Bytes and control pieces are never what a text spells.
            "vocab": [[piece.piece, piece.score if piece.type == kinds.NORMAL else NEVER] for piece in pieces],
            "byte_fallback": byte_fallback,
        }
    else:
        raise ValueError("it is neither byte-pair encoding nor a unigram model")
    bos, eos = (pieces[i].piece if i >= 0 else None for i in (trainer.bos_id, trainer.eos_id))
    normalizer, decoder = _spaces(rules)
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    template = {
        "type": "TemplateProcessing",
        "single": [*start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*start, {"Sequence": {"id": "A", "type_id": 0}}, *start, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [trainer.bos_id], "tokens": [bos]}} if bos else {},
    }
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    tokens = [{"id": i, "content": pieces[i].piece, **plain, "normalized": False, "special": True} for i in special]
    tokens += [{"id": i, "content": pieces[i].piece, **plain, "normalized": True, "special": False} for i in added]
    translated = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": template,
        "decoder": decoder,
        "model": table,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": pieces[unknown].piece,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is text
    }
    return translated, settings


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, best pieces first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, left, right))
    return [[left, right] for _, left, right in sorted(found, key=lambda merge: merge[0])]


def _spaces(rules: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(normalizer, decoder) for the rules of a SentencePiece model."""
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        # Of spaces only: line breaks stay, unless the normalisation has made spaces of them.
        steps.append({"type": "Replace", "pattern": {"Regex": "\\A +| +\\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if rules.add_dummy_prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "normalizers": steps}, {"type": "Sequence", "decoders": back}
