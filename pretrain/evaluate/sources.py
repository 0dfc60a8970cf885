"""What perplexity is measured on: text files and standard input, or a prepared corpus."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.config import RunConfig
from pretrain.data.errors import DataError, UsageError
from pretrain.data.opening import sources_of
from pretrain.data.store import Corpus
from pretrain.data.tokenizer import Tokenizer
from pretrain.exit import USAGE, Exit


@dataclass(frozen=True)
class Source:
    """Documents of token ids, each from the token that begins one to the token that ends it.

    lengths: tokens of each document. bytes: of text in the whole source, when that is known other than by its tokens.
    """

    name: str
    lengths: Sequence[int] | np.ndarray
    ids: np.ndarray | Corpus
    bytes: int | None = None

    def documents(self, limit: int | None = None) -> Iterator[np.ndarray]:
        """The documents; only as many that `limit` tokens are predicted, the last one cut."""
        left = int(np.sum(self.lengths)) if limit is None else limit
        for number, length in enumerate(self.lengths):
            if left <= 0:
                return
            kept = min(int(length), left + 1)
            if isinstance(self.ids, Corpus):
                yield self.ids.read(number, 0, kept)
            else:
                yield self.ids[:kept]
            left -= kept - 1

    def targets(self, limit: int | None = None) -> list[int]:
        """How many tokens each of those documents predicts."""
        counts, left = [], int(np.sum(self.lengths)) if limit is None else limit
        for length in self.lengths:
            counts.append(max(0, min(int(length) - 1, left)))
            left -= counts[-1]
        return counts

    def some_ids(self, count: int) -> list[int]:
        """About `count` ids of running text, without those that begin and end documents."""
        found: list[int] = []
        for document in self.documents():
            found += document[1:-1].tolist()
            if len(found) >= count:
                break
        return found[:count]


def of_text(path: str, tokenizer: Tokenizer) -> Source:
    """A UTF-8 file (or "-", standard input) as one document, tokenized as `pretrain.data prepare` does it."""
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}; convert it first, for example with iconv") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give the path of a text file") from None
    ids = np.array([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], np.int64)
    return Source("standard input" if path == "-" else path, [len(ids)], ids, len(raw))


def of_corpus(path: str | Path, split: str, tokenizer: Tokenizer) -> Source:
    """A split of a prepared folder, or a bare Megatron pair, written with the model's own tokenizer."""
    folder = Path(path).is_dir()
    corpus = Corpus.open(path, split) if folder else Corpus.open(path, tokenizer=tokenizer.path)
    other = corpus.tokenizer_path
    if folder and other is not None and other.read_bytes() != tokenizer.path.read_bytes():
        raise UsageError(
            f"{path} was tokenized with another tokenizer than the model's ({tokenizer.path}), so its ids mean other text; "
            f"prepare it with --tokenizer {tokenizer.path}, or give the text itself with --text"
        )
    return Source(f"{path} ({split})" if folder else str(path), corpus.lengths, corpus)


def of_run(config: RunConfig, tokenizer: Tokenizer) -> list[Source]:
    """What the run validates on, source by source; a text that several share once. Raises Exit when one of them is not here."""
    paths: dict[Path, None] = {}
    try:
        for source in sources_of(config.data):
            if source.validation_path is None and not source.path.is_dir():
                raise UsageError(f"{source.path} is not a prepared folder with a validation split")
            if source.validation_path is None and source.stream is not None:
                raise UsageError(f"{source.path} is streamed, which has no validation split")
            paths[source.validation_path or source.path] = None
        return [of_corpus(path, "validation", tokenizer) for path in paths]
    except (DataError, UsageError) as error:
        raise Exit(
            f"the run's own validation text cannot be used ({error}); give --text FILE or --data FOLDER", USAGE
        ) from None
