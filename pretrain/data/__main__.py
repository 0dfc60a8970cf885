"""`python -m pretrain.data`: prepare and inspect a corpus, trace what a run reads of it.

Heavy imports happen inside the commands, so --help is quick.
"""

from __future__ import annotations

import argparse
import sys

from pretrain.data import interruption
from pretrain.data.errors import DataError, PrepareFailure, UsageError
from pretrain.exit import ERROR


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m pretrain.data", description="Turn text into tokens, and look at them."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="prepare|inspect|trace|bench")

    p = commands.add_parser(
        "prepare",
        help="text -> tokenizer, .bin/.idx, manifest",
        description="Read text, train or take a tokenizer, write training and validation tokens in Megatron's format.",
        epilog="example: python -m pretrain.data prepare --input '/usr/lib/python3*/**/*.py' --output data/python",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="GLOB",
        help="files to read; may be repeated; ** crosses folders",
    )
    p.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="paths to leave out, such as '*/tests/*'"
    )
    p.add_argument("--output", required=True, metavar="FOLDER", help="where to write; appears only when complete")
    p.add_argument(
        "--format",
        default="auto",
        choices=["auto", "text", "jsonl", "parquet"],
        help="auto goes by the suffix of each file",
    )
    p.add_argument(
        "--text-field", default="text", metavar="NAME", help="column of jsonl and parquet that holds the text"
    )
    p.add_argument("--vocabulary", type=int, default=4096, metavar="N", help="token ids of the tokenizer to train")
    p.add_argument(
        "--tokenizer", default=None, metavar="PATH", help="use this SentencePiece .model instead of training one"
    )
    p.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of the documents to hold out, chosen by content",
    )
    p.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="N",
        help="processes that encode (the output does not depend on it)",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="fixes the split and the sample")
    p.add_argument(
        "--limit-bytes",
        type=int,
        default=None,
        metavar="N",
        help="stop once this much text is taken, from files in shuffled order",
    )
    p.add_argument("--sample-bytes", type=int, default=32_000_000, metavar="N", help="text to train the tokenizer on")
    p.add_argument(
        "--document-bytes",
        type=int,
        default=0,
        metavar="N",
        help="cut longer documents at line breaks; 0 keeps them whole",
    )
    p.add_argument(
        "--on-bad", default="error", choices=["error", "skip"], help="what to do with unreadable files and rows"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a folder that prepare wrote before")

    i = commands.add_parser(
        "inspect",
        help="show what a corpus holds",
        description="Tables of a prepared folder or of a bare Megatron prefix, and samples as training would see them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    i.add_argument(
        "path", nargs="?", metavar="FOLDER", help="folder written by prepare, or the prefix of a .bin/.idx pair"
    )
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
        epilog="example: python -m pretrain.data trace --config configs/runs/quickstart.yaml --step 100",
    )
    _step_arguments(t, required=True)

    b = commands.add_parser(
        "bench",
        help="time the loader against raw slices, or the building of an index",
        description="Time the loader against slices of a memory map, and finding steps in a synthetic index.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    b.add_argument("--tokens", type=int, default=50_000_000, metavar="N", help="tokens of the file to read")
    b.add_argument("--document", type=int, default=1000, metavar="N", help="tokens of a document on average")
    b.add_argument("--length", type=int, default=4096, metavar="T", help="tokens per packed sequence")
    b.add_argument("--rows", type=int, default=16, metavar="N", help="sequences per batch")
    b.add_argument("--steps", type=int, default=20, metavar="N", help="batches per round")
    b.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds, of which the median counts")
    b.add_argument("--index", type=int, default=1_000_000_000, metavar="N", help="tokens of the synthetic index")
    others = b.add_subparsers(dest="bench", metavar="[index]")
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
    return top


def _step_arguments(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument("--config", required=required, metavar="FILE", help="configuration of a run (with --step)")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override; may be repeated"
    )
    command.add_argument("--step", type=int, required=required, metavar="N", help="a step of the run, from 0")
    command.add_argument("--ranks", type=int, default=None, metavar="R", help="data-parallel ranks; mesh.dp if set")
    command.add_argument("--rank", type=int, default=None, metavar="R", help="only this rank's sequences")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code (0 done, 1 failed, 2 usage, 77 corrupt or missing data)."""
    args = parser().parse_args(arguments)
    try:
        with interruption.noted():
            if args.command == "prepare":
                from pretrain.data.report import run_prepare

                run_prepare(args)
            elif args.command == "trace":
                from pretrain.data.trace import run_trace

                run_trace(args)
            elif args.command == "bench" and args.bench == "index":
                from pretrain.data.index_bench import run_bench as run_index_bench

                run_index_bench(args)
            elif args.command == "bench":
                from pretrain.data.bench import run_bench

                run_bench(args)
            elif args.config is not None or args.step is not None:
                from pretrain.data.trace import run_inspect_step

                if args.config is None or args.step is None or args.path is not None:
                    raise UsageError("inspect takes a FOLDER, or --config and --step together")
                run_inspect_step(args)
            else:
                from pretrain.data.inspect import run_inspect

                if args.path is None:
                    raise UsageError("inspect takes a FOLDER, or --config and --step together")
                run_inspect(args)
    except (DataError, UsageError, PrepareFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind. Run the same command to start again", file=sys.stderr)
        return ERROR
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
