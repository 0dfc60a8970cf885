"""Training a SentencePiece model on a sample of the corpus.

Byte-pair encoding (Sennrich, Haddow and Birch, ACL 2016) over unnormalised text with byte fallback. Two choices
matter for source code (bytes per token on held-out Python standard library files, vocabulary 4096, 8 MB sample): text
enters in blocks that keep their line breaks and may merge across scripts, so `self.assertEqual(` or `):\\n` become
single pieces (3.32 -> 3.67), and the most frequent line breaks with the indentation after them are pieces from the
start, because SentencePiece begins a new word at a space and could never merge the two (3.67 -> 3.76). 16 of them: 8
gave 3.752, 48 gave 3.754. Letting merges run across words gave 4.01, but a prompt that ends inside such a piece is
then cut as the model never saw it.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from pretrain.data.errors import DataError, UsageError
from pretrain.data.seal import seal
from pretrain.data.tokenizer import SPACE

_BLOCK_CHARACTERS = 4000
_INDENTS = 16
_INDENT_SHARE = 2e-4
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# The space is there anyway, as U+2581.
_ALWAYS = "\t\n" + "".join(map(chr, range(0x21, 0x7F)))
_INDENT = re.compile(r"\n+(?:\t+| +)?")
# SentencePiece's own limits: 256 bytes, unknown, bos, eos.
SMALLEST_VOCABULARY = 260


def line_breaks(texts: Iterable[str]) -> list[str]:
    """The line breaks, with the indentation that follows, that save most tokens as single pieces; SentencePiece
    spelling.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_INDENT.findall(text))
    total = sum(counts.values())
    worth = [
        (count * (len(run) - 1), run)
        for run, count in counts.items()
        if len(run) > 1 and count >= total * _INDENT_SHARE
    ]
    return [run.replace(" ", SPACE) for _, run in sorted(worth, key=lambda pair: (-pair[0], pair[1]))[:_INDENTS]]


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    # NUL makes the trainer drop its block, U+2581 would pass for a space; encoding spells both in bytes.
    for text in texts:
        clean = text.replace("\0", "").replace(SPACE, "")
        for start in range(0, len(clean), _BLOCK_CHARACTERS):
            yield clean[start : start + _BLOCK_CHARACTERS]


def symbols_of(argument: str) -> tuple[str, ...]:
    """User-defined symbols as the command line gives them: a file with one a line, or a list with commas.

    Raises ValueError for symbols that cannot be pieces.
    """
    path = Path(argument)
    if path.is_file():
        try:
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--user-symbols {path} is not UTF-8 at byte {error.start}; give one symbol a line"
            ) from None
    else:
        found = argument.split(",")
    return check_symbols(found)


def check_symbols(symbols: Iterable[str]) -> tuple[str, ...]:
    """The symbols, if each can be a piece of its own. Raises ValueError naming the first that cannot, and why."""
    found = tuple(symbols)
    for number, symbol in enumerate(found):
        why = None
        if not symbol:
            why = "is empty"
        elif symbol in found[:number]:
            why = "is there twice"
        elif symbol in ("<unk>", "<s>", "</s>") or _BYTE_PIECE.fullmatch(symbol):
            why = "is the name of a control or byte piece"
        elif "\0" in symbol or SPACE in symbol:
            why = "holds NUL or U+2581, which SentencePiece keeps for itself"
        if why:
            raise UsageError(f"--user-symbols: {symbol!r} {why}; leave it out")
    return found


def train(
    texts: list[str],
    vocabulary: int,
    destination: Path,
    *,
    byte_fallback: bool = True,
    user_symbols: Iterable[str] = (),
) -> None:
    """Writes a .model with `vocabulary` ids, sealed with a hash, to `destination`. It depends on what is given, not on threads.

    byte_fallback: characters without a piece are spelled in bytes; without it they are lost as "unknown": the rarest
    (0.05 % of the text), NUL and U+2581, but nothing of ASCII that can be printed. user_symbols: strings that are one
    id each wherever a text spells them.
    Raises ValueError if the texts do not support so many pieces, with the number that they do support.
    """
    import sentencepiece

    chosen = check_symbols(user_symbols)
    # Unknown, bos, eos, and one piece that is learned.
    smallest = (SMALLEST_VOCABULARY if byte_fallback else 4) + len(chosen)
    if vocabulary < smallest:
        first = f"{'256 bytes and ' * byte_fallback}3 control ids{f' and {len(chosen)} symbols' * bool(chosen)}"
        raise UsageError(f"--vocabulary {vocabulary} is too small: {first} come first; use at least {smallest}")
    symbols = [found for found in line_breaks(texts) if found.replace(SPACE, " ") not in chosen]
    # A vocabulary with little room keeps it for merges.
    symbols = symbols[: max(0, (vocabulary - SMALLEST_VOCABULARY - len(chosen)) // 16)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_blocks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            user_defined_symbols=[*(symbol.replace(" ", SPACE) for symbol in chosen), *symbols],
            byte_fallback=byte_fallback,
            required_chars="" if byte_fallback else _ALWAYS,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentence_length=1 << 20,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocabulary) from None
    destination.write_bytes(seal(model.getvalue()))


def _explain(message: str, vocabulary: int) -> Exception:
    most = re.search(r"value <= (\d+)", message)
    if most:
        return UsageError(
            f"--vocabulary {vocabulary} is more than this text supports: use --vocabulary {most.group(1)} or less, "
            f"or add text"
        )
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if least:
        return UsageError(
            f"--vocabulary {vocabulary} cannot hold the characters of this text: "
            f"use --vocabulary {int(least.group(1)) + 1} or more"
        )
    return DataError(
        f"SentencePiece could not train on this text: {message.strip()}; check that --input names text files"
    )
