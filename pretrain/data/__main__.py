"""`python -m pretrain.data`: prepare and inspect a corpus, trace what a run reads of it.

Heavy imports happen inside the commands, so --help is quick.
"""

from __future__ import annotations

import argparse
import sys

from pretrain.data import interruption
from pretrain.data.errors import DataError, PrepareFailure, UsageError
from pretrain.exit import ERROR

OVERRIDES = "any field by its dotted name, such as train.batch=64"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m pretrain.data", description="Turn text into tokens, and look at them."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="prepare|merge|inspect|trace|statistics|bench")

    p = commands.add_parser(
        "prepare",
        help="text -> tokenizer, .bin/.idx, manifest",
        description="Read text, train or take a tokenizer, write training and validation tokens in Megatron's format.",
        epilog="example: python -m pretrain.data prepare --input '/usr/lib/python3*/**/*.py' --output data/python",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _prepare_arguments(p)
    m = commands.add_parser(
        "merge",
        help="finished shards -> .bin/.idx, manifest",
        description="Merge what `prepare --shard` made, on one machine or several, as one `prepare` would have written it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    m.add_argument(
        "--output", required=True, metavar="FOLDER", help="the --output of the shards; appears when complete"
    )
    m.add_argument(
        "--parts", action="append", default=[], metavar="FOLDER",
        help="folder of units of a shard; may be repeated; OUTPUT.parts if left out",
    )  # fmt: skip
    m.add_argument("--overwrite", action="store_true", help="replace a folder that prepare wrote before")
    m.add_argument("--keep", action="store_true", help="do not remove the units")

    i = commands.add_parser(
        "inspect",
        help="show what a corpus holds",
        description="Tables of a prepared folder or of a bare Megatron prefix, and samples as training would see them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    i.add_argument(
        "words", nargs="*", metavar="FOLDER|key=value",
        help=f"folder written by prepare, or the prefix of a .bin/.idx pair; with --config: {OVERRIDES}",
    )  # fmt: skip
    _step_arguments(i, required=False)
    i.add_argument("--documents", type=int, default=0, metavar="N", help="show the beginning of N documents")
    i.add_argument("--samples", type=int, default=2, metavar="N", help="show N packed training sequences")
    i.add_argument("--sequence-length", type=int, default=256, metavar="T", help="tokens per packed sequence")
    i.add_argument("--seed", type=int, default=0, metavar="N", help="order of the sequences")
    i.add_argument("--tokenizer", default=None, metavar="PATH", help="SentencePiece .model, for a bare prefix")
    i.add_argument("--verify", action="store_true", help="read everything: hashes, every token id, byte counts")
    t = commands.add_parser(
        "trace",
        help="show which documents every rank sees at a step",
        description="Which documents, and which tokens of them, every rank of a run sees at a step.",
        epilog="example: python -m pretrain.data trace --config configs/runs/quickstart.yaml --step 100 train.batch=64",
    )
    t.add_argument("words", nargs="*", metavar="key=value", help=OVERRIDES)
    _step_arguments(t, required=True)

    s = commands.add_parser(
        "statistics",
        help="document lengths, bytes per token and shares of sources, as tables and a picture",
        description="Document lengths, bytes per token and each source's share, of corpora or of what a run trains on.",
        epilog="example: python -m pretrain.data statistics data/web data/code --plot data.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    s.add_argument(
        "words", nargs="*", metavar="FOLDER|key=value",
        help=f"folders written by prepare, or prefixes of .bin/.idx pairs; with --config: {OVERRIDES}",
    )  # fmt: skip
    s.add_argument("--config", default=None, metavar="FILE", help="configuration of a run, in place of folders")
    s.add_argument("--set", action="append", default=[], dest="settings", help=argparse.SUPPRESS)
    s.add_argument("--tokenizer", default=None, metavar="PATH", help="tokenizer of bare pairs, to count bytes with")
    s.add_argument("--plot", default=None, metavar="FILE", help="picture to write (.png, .svg or .pdf)")
    s.add_argument("--json", default=None, metavar="FILE", help="numbers to write")

    b = commands.add_parser(
        "bench",
        help="time the loader against raw slices, or the building of an index",
        description="Time the loader against slices of a memory map, and finding steps in a synthetic index.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    b.add_argument("--tokens", type=int, default=50_000_000, metavar="N", help="tokens of the file to read")
    b.add_argument("--document", type=int, default=1000, metavar="N", help="tokens of a document on average")
    b.add_argument("--length", type=int, default=4096, metavar="T", help="tokens per packed sequence")
    b.add_argument(
        "--rows", type=_numbers, default="1,4,16,64,256", metavar="N,N", help="sequences per batch, one or several"
    )
    b.add_argument("--steps", type=int, default=4, metavar="N", help="batches per round at least, and")
    b.add_argument("--round-tokens", type=int, default=2_000_000, metavar="N", help="tokens per round at least")
    b.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds, of which the median counts")
    b.add_argument("--index", type=int, default=1_000_000_000, metavar="N", help="tokens of the synthetic index")
    others = b.add_subparsers(dest="bench", metavar="[index|prepare]")
    x = others.add_parser(
        "index",
        help="time and memory of building and opening an index",
        description="Build and open the index of a synthetic corpus: seconds, and the memory that each takes at most.",
        epilog="example: python -m pretrain.data bench index --documents 100000000",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    x.add_argument("--documents", type=int, default=10_000_000, metavar="N", help="documents of the index")
    x.add_argument("--mean", type=int, default=1000, metavar="N", help="tokens of a document on average")
    x.add_argument("--peer", type=int, default=1_000_000, metavar="N", help="documents for megatron-core's builder")
    x.add_argument("--folder", default=None, metavar="FOLDER", help="where to write; a temporary folder if not given")
    y = others.add_parser(
        "prepare",
        help="time a preparation against the tokenizer alone",
        description="Time the preparation of Python sources against the SentencePiece library alone, by one process and several.",
        epilog="example: python -m pretrain.data bench prepare --processes 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    y.add_argument(
        "--input", action="append", default=[], metavar="GLOB", help="text to use; Python's own sources if not given"
    )
    y.add_argument("--bytes", type=int, default=60_000_000, metavar="N", help="text to use at most")
    y.add_argument("--vocabulary", type=int, default=8192, metavar="N", help="token ids of the tokenizer")
    y.add_argument("--sample-bytes", type=int, default=4_000_000, metavar="N", help="text to train it on")
    y.add_argument("--processes", type=int, default=2, metavar="N", help="how many several are")
    y.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds, of which the median counts")
    return top


def _prepare_arguments(p: argparse.ArgumentParser) -> None:
    inputs = p.add_argument_group("input")
    inputs.add_argument(
        "--input", action="append", default=[], metavar="GLOB",
        help="files to read; may be repeated; ** crosses folders",
    )  # fmt: skip
    inputs.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="paths to leave out, such as '*/tests/*'"
    )
    inputs.add_argument(
        "--dataset", action="append", default=[], metavar="NAME[:CONFIG]",
        help="Hugging Face dataset by name, or a local folder; may be repeated",
    )  # fmt: skip
    inputs.add_argument("--split", default="train", metavar="NAME", help="split of the datasets")
    inputs.add_argument("--revision", default=None, metavar="NAME", help="branch, tag or commit of the datasets")
    inputs.add_argument("--streaming", action="store_true", help="read datasets from where they lie, without a copy")
    inputs.add_argument(
        "--format",
        default="auto",
        choices=["auto", "text", "jsonl", "parquet"],
        help="auto goes by the suffix of each file",
    )
    inputs.add_argument("--text-field", default="text", metavar="NAME", help="column of rows that holds the text")
    inputs.add_argument(
        "--on-bad",
        default="error",
        choices=["error", "skip"],
        help="what to do with unreadable files, row groups and rows",
    )

    chosen = p.add_argument_group("documents")
    chosen.add_argument("--min-length", type=int, default=None, metavar="N", help="fewest characters of a document")
    chosen.add_argument("--max-length", type=int, default=None, metavar="N", help="most characters of a document")
    chosen.add_argument("--language", default=None, metavar="CODES", help="languages that stay, such as en,de")
    chosen.add_argument(
        "--language-field",
        default=None,
        metavar="NAME",
        help="column that holds the language; else the text is looked at",
    )
    chosen.add_argument(
        "--near-duplicates", type=float, nargs="?", const=0.8, default=None, metavar="SIMILARITY",
        help="leave out documents that resemble an earlier one, from this similarity on (0.8 without a number)",
    )  # fmt: skip
    chosen.add_argument(
        "--document-bytes",
        type=int,
        default=0,
        metavar="N",
        help="cut longer documents at line breaks; 0 keeps them whole",
    )
    chosen.add_argument(
        "--validation", type=float, default=0.05, metavar="SHARE",
        help="share of the documents to hold out, chosen by content",
    )  # fmt: skip
    chosen.add_argument(
        "--limit-bytes", type=int, default=None, metavar="N",
        help="stop once this much text is taken, from files in shuffled order",
    )  # fmt: skip
    chosen.add_argument("--seed", type=int, default=0, metavar="N", help="fixes the split, the sample and the shuffle")
    chosen.add_argument(
        "--no-shuffle", dest="shuffle", action="store_false", help="keep documents in the order of the input"
    )

    words = p.add_argument_group("tokenizer")
    words.add_argument("--vocabulary", type=int, default=4096, metavar="N", help="token ids of the tokenizer to train")
    words.add_argument(
        "--sample-bytes", type=int, default=32_000_000, metavar="N", help="text to train the tokenizer on"
    )
    words.add_argument(
        "--no-byte-fallback",
        dest="byte_fallback",
        action="store_false",
        help="rare characters become unknown, not bytes",
    )
    words.add_argument(
        "--user-symbols", default=None, metavar="LIST", help="strings that are one id each: a,b,c or a file, one a line"
    )
    words.add_argument(
        "--tokenizer", default=None, metavar="PATH",
        help="use this instead of training one: a SentencePiece .model, a tokenizer.json or a folder with one",
    )  # fmt: skip

    how = p.add_argument_group("output")
    how.add_argument("--output", required=True, metavar="FOLDER", help="where to write; appears only when complete")
    how.add_argument("--overwrite", action="store_true", help="replace a folder that prepare wrote before")
    how.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="processes that encode (the output does not depend on it)",
    )
    how.add_argument(
        "--shard",
        default=None,
        metavar="I/N",
        help="make only this shard's units, I from 1 to N; `merge` does the rest",
    )
    how.add_argument(
        "--restart",
        action="store_true",
        help="discard the finished units of an earlier run instead of going on from them",
    )
    how.add_argument(
        "--unit-bytes", type=int, default=None, metavar="N",
        help="input of a unit, which is what a kill can cost; by default 1 to 32 MB",
    )  # fmt: skip


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def _step_arguments(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument("--config", required=required, metavar="FILE", help="configuration of a run (with --step)")
    command.add_argument("--set", action="append", default=[], dest="settings", help=argparse.SUPPRESS)
    command.add_argument("--step", type=int, required=required, metavar="N", help="a step of the run, from 0")
    command.add_argument("--ranks", type=int, default=None, metavar="R", help="data-parallel ranks; mesh.dp if set")
    command.add_argument("--rank", type=int, default=None, metavar="R", help="only this rank's sequences")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The parsed command line. Where a command takes overrides, they may stand between its options: `overrides` and `paths`."""
    top = parser()
    args, rest = top.parse_known_args(arguments)
    words = getattr(args, "words", None)
    if rest and (words is None or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if words is not None:
        words += rest
        given = [word for word in words if args.config is not None and "=" in word]
        args.overrides, args.paths = args.settings + given, [word for word in words if word not in given]
    return args


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 failed, 2 usage, 77 corrupt or missing data)."""
    args = parse(arguments)
    try:
        with interruption.noted():
            if args.command == "prepare":
                from pretrain.data.report import run_prepare

                run_prepare(args)
            elif args.command == "merge":
                from pretrain.data.report import run_merge

                run_merge(args)
            elif args.command == "trace":
                from pretrain.data.trace import run_trace

                run_trace(args)
            elif args.command == "statistics":
                from pretrain.data.statistics import run_statistics

                run_statistics(args)
            elif args.command == "bench" and args.bench == "index":
                from pretrain.data.index_bench import run_bench as run_index_bench

                run_index_bench(args)
            elif args.command == "bench" and args.bench == "prepare":
                from pretrain.data.prepare_bench import run_bench as run_prepare_bench

                run_prepare_bench(args)
            elif args.command == "bench":
                from pretrain.data.bench import run_bench

                run_bench(args)
            elif args.config is not None or args.step is not None:
                from pretrain.data.trace import run_inspect_step

                if args.config is None or args.step is None or args.paths:
                    raise UsageError("inspect takes a FOLDER, or --config and --step together (and key=value)")
                run_inspect_step(args)
            else:
                from pretrain.data.inspect import run_inspect

                if len(args.paths) != 1:
                    raise UsageError("inspect takes a FOLDER, or --config and --step together (and key=value)")
                run_inspect(args)
    except (DataError, UsageError, PrepareFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        kept = f"; {interrupt}" if interrupt.args else ". Run the same command to start again"
        print(f"interrupted; nothing half-written was left behind{kept}", file=sys.stderr)
        return ERROR
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
