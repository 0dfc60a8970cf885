"""`python -m pretrain.evaluate --checkpoint runs/quickstart --tasks perplexity,mqar,needle`: measures a trained model."""

from __future__ import annotations

import argparse
import sys

from pretrain.options import add_model_options, at_least, exit_code, list_of

EXAMPLES = """tasks:
  perplexity     nats per token and bits per byte of text, every token scored once (default: what the run validates on)
  mqar           recall of key-value pairs of random tokens from context, by number of pairs (Arora et al. 2023)
  needle         a fact hidden in a long text and asked for at its end, by length and depth
  lm_eval:NAME   a task of lm-evaluation-harness, such as lm_eval:arc_easy (pip install lm-eval)

examples:
  python -m pretrain.evaluate --checkpoint runs/quickstart --tasks perplexity
  python -m pretrain.evaluate --checkpoint runs/quickstart --tasks perplexity --text README.md LICENSE --stride 64
  git show | python -m pretrain.evaluate --checkpoint runs/quickstart --tasks perplexity --text -
  python -m pretrain.evaluate --checkpoint runs/quickstart --tasks mqar --mqar-pairs 4,16,32
  python -m pretrain.evaluate --checkpoint runs/quickstart --tasks needle --needle-lengths 128,256 --plot needle.png
  python -m pretrain.evaluate --checkpoint runs/big --tasks lm_eval:arc_easy,lm_eval:piqa --limit 100 --json result.json
  python -m pretrain.evaluate --checkpoint runs/big --tasks perplexity --memory-limit 16GiB --offload /scratch/layers
Exit codes: 0 done, 1 error, 2 bad usage, 77 corrupt or missing data, 78 no loadable checkpoint."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.evaluate",
        description="Measure a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--tasks", required=True, type=list_of(str), metavar="TASK,...", help="what to measure; see below"
    )
    parser.add_argument(
        "--context", type=at_least(2), metavar="T", help="tokens that the model sees at most (default: as in training)"
    )
    parser.add_argument("--batch", type=at_least(1), default=8, metavar="N", help="sequences at a time (default 8)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the matrix products")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn at random (default 0)")
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="perplexity: tokens of each source; lm_eval: examples"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results here")
    parser.add_argument("--plot", metavar="FILE.png", help="needle: draw the grid")

    text = parser.add_argument_group("perplexity, and the haystack of needle")
    text.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="UTF-8 text, a document each; - is standard input"
    )
    text.add_argument("--data", metavar="FOLDER", help="a prepared corpus, or the prefix of a Megatron .bin/.idx pair")
    text.add_argument("--split", default="validation", metavar="NAME", help="of a prepared corpus (default validation)")
    text.add_argument(
        "--stride",
        type=at_least(1),
        metavar="N",
        help="tokens scored by a window after the first (default: half the context)",
    )

    recall = parser.add_argument_group("mqar")
    recall.add_argument(
        "--mqar-pairs", type=list_of(at_least(1)), metavar="N,...", help="pairs to remember (default 4,8,16,...)"
    )
    recall.add_argument("--mqar-length", type=at_least(5), metavar="T", help="tokens of a row (default: the context)")
    recall.add_argument(
        "--mqar-examples", type=at_least(1), default=32, metavar="N", help="rows per number of pairs (default 32)"
    )

    needle = parser.add_argument_group("needle")
    needle.add_argument(
        "--needle-lengths",
        type=list_of(at_least(1)),
        metavar="T,...",
        help="(default: a half and the whole of the context)",
    )
    needle.add_argument(
        "--needle-depths", type=list_of(depth), default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="D,...",
        help="0 is the beginning, 1 the end (default 0,0.25,0.5,0.75,1)",
    )  # fmt: skip
    needle.add_argument("--needle-samples", type=at_least(1), default=4, metavar="N", help="facts per cell (default 4)")
    needle.add_argument("--synthetic", action="store_true", help="made-up sentences as the haystack")

    harness = parser.add_argument_group("lm_eval")
    harness.add_argument("--lm-eval-tasks", metavar="FOLDER", help="more task definitions (YAML)")
    harness.add_argument(
        "--fewshot", type=at_least(0), metavar="N", help="examples in the prompt, in place of the task's own"
    )
    arguments = parser.parse_args(argv)
    if arguments.plot and "needle" not in arguments.tasks:
        parser.error("--plot draws the grid of needle; add needle to --tasks")
    return arguments


def depth(text: str) -> float:
    """An argument type: a number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from pretrain.evaluate.tasks import check_names

    try:
        check_names(arguments.tasks)  # before torch is imported, let alone a model loaded
        from pretrain.evaluate.commands import run

        return run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
