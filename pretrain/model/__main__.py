"""`python -m pretrain.model describe`: what a model consists of, before anybody pays for it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pretrain.exit import ERROR, FINISHED, USAGE

EXAMPLES = """examples:
  python -m pretrain.model describe --config configs/models/zaya1_8b.yaml
  python -m pretrain.model describe --config configs/runs/quickstart.yaml --vocabulary 1024 --plot stack.png
  python -m pretrain.model describe --config configs/models/qwen3_next_80b.yaml --sequence 262144 --json next.json
Exit codes: 0 described, 1 the file expects other parameter counts, 2 bad usage or configuration."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.model",
        description="Look at a model's architecture.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "describe",
        help="layers, parameters, FLOPs per token, cache sizes",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("--config", type=Path, required=True, metavar="FILE", help="a model file or a run file")
    one.add_argument("--vocabulary", type=int, metavar="N", help="tokens, where the file leaves them to the tokenizer")
    one.add_argument("--sequence", type=int, metavar="N", help="sequence length; default: the run's, or 4096")
    one.add_argument("--plot", type=Path, metavar="FILE", help="draw the stack (.png, .svg, .pdf)")
    one.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from pretrain.config import ConfigError

    try:
        return _describe(arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE


def _describe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from pretrain.model import describe

    file, raw = _read(arguments.config, arguments.vocabulary)
    tokens = arguments.sequence or (raw.get("data") or {}).get("sequence_length") or 4096
    try:
        description = describe.describe(file.model, tokens)
    except ValueError as error:
        from pretrain.config import ConfigError

        raise ConfigError(f"{arguments.config}: {error}") from None
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(describe.table(description, tokens))
    if arguments.plot:
        describe.draw(file.model, description, arguments.plot)
        print(f"wrote {arguments.plot}")
    if arguments.json:
        arguments.json.write_text(json.dumps(_numbers(description, tokens), indent=1) + "\n")
        print(f"wrote {arguments.json}")
    code = FINISHED
    for name, expected, found in (
        ("parameters", file.parameters, description.parameters),
        ("active_parameters", file.active_parameters, description.active),
    ):
        if expected is not None and expected != found:
            print(
                f"error: {arguments.config} expects {name}: {expected:_}, but the model has {found:_}", file=sys.stderr
            )
            code = ERROR
    return code


def _read(path: Path, vocabulary: int | None) -> tuple[Any, dict[str, Any]]:
    from pydantic import ValidationError

    from pretrain.config import ConfigError, explain, read_yaml
    from pretrain.model.files import ModelFile, model_section

    raw = read_yaml(path)
    if "model" not in raw:
        raise ConfigError(f"{path}: has no section `model:`; give a model file or a run file")
    expected = {key: raw[key] for key in ("parameters", "active_parameters") if key in raw}
    try:
        section = model_section(raw["model"], path)
        if vocabulary is not None and isinstance(section, dict):
            section = {**section, "vocabulary": vocabulary}
            expected = {}
        file = ModelFile.model_validate({"model": section, **expected})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in explain(error, raw))) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if file.model.vocabulary is None:
        raise ConfigError(f"{path}: model.vocabulary is left to the tokenizer; say --vocabulary N")
    return file, raw


def _numbers(description: Any, tokens: int) -> dict[str, Any]:
    groups = [
        {
            "layers": group.layers,
            "sublayers": group.name,
            "parameters": group.parameters,
            "active_parameters": group.active,
            "flops_per_token": group.flops,
            "cache_bytes_per_token": group.cache.per_token,
            "cache_bytes_per_sequence": group.cache.per_sequence,
            "cache_window": group.cache.window,
        }
        for group in description.groups
    ]
    return {
        "parameters": description.parameters,
        "active_parameters": description.active,
        "flops_per_token": description.flops,
        "sequence": tokens,
        "layers": groups,
    }


if __name__ == "__main__":
    sys.exit(main())
