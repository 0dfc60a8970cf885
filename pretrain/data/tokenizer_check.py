"""Which tokenizer a corpus was written with, by hash: ids of another one mean other text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.data import manifest as manifests
from pretrain.data.errors import UsageError
from pretrain.data.tokenizer import find, fingerprint


def stated(corpus: Any) -> manifests.TokenizerRecord | None:
    """What the manifest of a corpus says; also of a pair that is named by its prefix inside of a prepared folder."""
    if getattr(corpus, "manifest", None) is not None:
        record: manifests.TokenizerRecord = corpus.manifest.tokenizer
        return record
    folder = corpus.prefix.parent
    if not (folder / manifests.NAME).is_file():
        return None
    manifest = manifests.read(folder)
    return manifest.tokenizer if f"{corpus.prefix.name}.bin" in manifest.files else None


def same_tokenizer(corpora: Sequence[Any], given: Path | None = None, name: str = "data.tokenizer") -> None:
    """Raises ValueError unless all sources of which it is known were written with the same tokenizer, and with `given`.

    corpora: `Corpus` or what stands in for one (prefix, manifest, tokenizer_path). given: what the person named as `name`. A bare
    pair knows its tokenizer only by what it was opened with.
    """
    chosen = None if given is None else fingerprint(find(given))
    first: tuple[Any, str] | None = None
    ends: tuple[Any, int, int] | None = None
    for each in corpora:
        record = stated(each)
        if record is not None and chosen not in (None, record.xxh3_128):
            raise UsageError(
                f"{name} = {given} (xxh3_128 {chosen}) is not the tokenizer that {each.prefix} was written with "
                f"({record.xxh3_128}), so its ids mean other text: leave {name} out, or prepare the text again with "
                f"`--tokenizer {given}`"
            )
        if record is not None:
            ends = ends or (each, record.bos, record.eos)
            if ends[1:] != (record.bos, record.eos):  # those of a tokenizer.json lie in a file of their own
                raise UsageError(
                    f"{each.prefix} was written with bos {record.bos} and eos {record.eos}, {ends[0].prefix} with {ends[1]} and "
                    f"{ends[2]}: prepare it again with the tokenizer_config.json of the other beside the tokenizer"
                )
        path = each.tokenizer_path
        found = record.xxh3_128 if record is not None else None if path is None else fingerprint(find(path))
        if found is None:
            continue
        if first is None:
            first = each, found
        elif found != first[1]:
            raise UsageError(
                f"{each.prefix} was written with another tokenizer (xxh3_128 {found}) than {first[0].prefix} "
                f"({first[1]}): prepare it again with `--tokenizer {first[0].tokenizer_path}`"
            )


def hash_of(corpora: Sequence[Any]) -> str | None:
    """xxh3_128 of the tokenizer that the sources share; None if none of them knows it."""
    for each in corpora:
        record = stated(each)
        if record is not None:
            return record.xxh3_128
        if each.tokenizer_path is not None:
            return fingerprint(find(each.tokenizer_path))
    return None
