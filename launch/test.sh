#!/usr/bin/env bash
# Makes the environment, then: format, lint, types, floors, tests. Arguments go to pytest.
#
#   bash launch/test.sh                       everything that CI runs
#   bash launch/test.sh --campaign            the long campaigns too
#   bash launch/test.sh tests/kernels -k delta
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test,triton,oracles

step() {
  local start=$SECONDS
  echo "== $1"
  shift
  "$@"
  echo "   $((SECONDS - start)) s"
}

step "format" "$PYTHON" -m ruff format --check .
step "lint" "$PYTHON" -m ruff check .
step "types" "$PYTHON" -m mypy
step "floors" "$PYTHON" -c 'import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command([]))'
step "tests" "$PYTHON" -m pytest "$@"
