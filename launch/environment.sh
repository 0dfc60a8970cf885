# Makes the Python environment of this checkout. Sourced by quickstart.sh and test.sh; sets PYTHON.
#
#   source launch/environment.sh [extra ...]        extras of pyproject.toml: test, triton, oracles
#
# On a machine with only Python 3.11+ and pip: a virtual environment in .venv, torch first and pinned, the rest under
# launch/constraints.txt. Where torch 2.11 or newer is there already (a CUDA or ROCm container, an active virtual environment)
# that torch is used as it is and never replaced. A second run finds everything in place and takes no time.

TORCH_VERSION=2.13.0

find_python() {
  local candidate
  for candidate in "${BRAID_PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed, and none was found; install it, or set BRAID_PYTHON to its path" >&2
  return 1
}

# Prints "VERSION TRITON_VERSION", or nothing when this python has no torch that will do.
torch_of() {
  "$1" - 2>/dev/null <<'PY'
import importlib.metadata as metadata, re
def version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
torch = version_of("torch")
if torch and tuple(map(int, re.findall(r"\d+", torch)[:2])) >= (2, 11):
    print(torch, version_of("triton"))
PY
}

make_environment() {
  local extras="$1" base existing mark stamp constraints triton
  base=$(find_python) || return 1
  stamp=$(cat pyproject.toml launch/constraints.txt launch/environment.sh | "$base" -c 'import sys, hashlib; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')
  if [ "$("$base" -c 'import os, sys; print(os.path.realpath(sys.prefix))')" = "$(realpath -m .venv)" ]; then
    existing="" # our own environment, activated
  else
    existing=$(torch_of "$base") || return 1
  fi
  if [ -n "$existing" ] && "$base" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
    PYTHON=$("$base" -c 'import sys; print(sys.executable)') # an active virtual environment with torch: use it
    mark=".venv-marks/$("$base" -c 'import sys, hashlib; print(hashlib.sha256(sys.prefix.encode()).hexdigest()[:12])')"
    mkdir -p .venv-marks
  else
    PYTHON="$PWD/.venv/bin/python"
    mark=.venv/braid-ready
    if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
      echo "making a virtual environment in .venv"
      base=$("$base" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
      rm -rf .venv
      if ! "$base" -m venv ${existing:+--system-site-packages} .venv; then
        echo "error: $base cannot make virtual environments; install its venv package (on Debian: python3-venv)" >&2
        return 1
      fi
    fi
  fi
  if [ "$(cat "$mark" 2>/dev/null)" = "$stamp $extras" ] || [ "$(cat "$mark-all" 2>/dev/null)" = "$stamp" ]; then
    return 0
  fi
  constraints=$(mktemp)
  if [ -n "$existing" ]; then
    read -r TORCH_VERSION triton <<<"$existing"
    echo "using torch $TORCH_VERSION that is already here"
    printf 'torch==%s\n' "$TORCH_VERSION" >"$constraints"
    [ -z "$triton" ] || printf 'triton==%s\n' "$triton" >>"$constraints"
  else
    cp launch/constraints.txt "$constraints"
    echo "installing torch $TORCH_VERSION"
    "$PYTHON" -m pip install --quiet "torch==$TORCH_VERSION" || return 1
  fi
  echo "installing Braid and what it needs${extras:+ ($extras)}; a few minutes the first time"
  "$PYTHON" -m pip install --quiet --constraint "$constraints" --editable ".${extras:+[$extras]}" || return 1
  rm -f "$constraints"
  echo "$stamp $extras" >"$mark"
  [ "$extras" != "test,triton,oracles" ] || echo "$stamp" >"$mark-all" # holds everything the smaller sets ask for
}

make_environment "${1:-}"
