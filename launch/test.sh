#!/usr/bin/env bash
# Makes the environment, then: format, lint, types, floors, tests. Arguments go to pytest.
#
#   bash launch/test.sh                       everything that CI runs, in as many processes as there are cores (at most 8)
#   bash launch/test.sh -n 0 --campaign       the long campaigns too, one after the other: some of them measure
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
workers=$(($(nproc) < 8 ? $(nproc) : 8))
# A test that hangs for a quarter of an hour is no reason to lose the others: where each thread is gets printed, the process of the
# test ends, and it counts as failed. Single tests of a campaign may take longer.
guard=(-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true --max-worker-restart 2)
case " $* " in *" --campaign "*) guard=() ;; esac
# A file's tests stay together and in order (they share what is slow to make); tests/conftest.py puts the longest files first.
step "tests" "$PYTHON" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder ${guard[@]+"${guard[@]}"} "$@"
