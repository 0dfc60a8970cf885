"""Command-line: see options.py, or --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from parallel.ending import end


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: see --help."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["pairs"]:
        from parallel.bench.pairs import main as pairs

        return pairs(given[1:])
    from parallel.bench.options import parse

    options = parse(given)
    from parallel.bench.session import run  # torch takes seconds to import: after what can be said without it

    return run(options)


if __name__ == "__main__":
    end(main)
