#!/usr/bin/env bash
# From a fresh checkout to a trained model, in minutes, on a CPU: makes the environment, prepares the Python standard library's
# own sources as a corpus, trains a small hybrid mixture of experts, kills it, resumes it, and lets it write.
#
#   bash launch/quickstart.sh                      everything, in data/quickstart and runs/quickstart
#   bash launch/quickstart.sh train.steps=50       overrides go to the training run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh ""  # without an argument it would see those of this script
exec "$PYTHON" -m launch.quickstart "$@"
