#!/usr/bin/env bash
# Installs what is missing, builds everything, and runs all tests through ctest. Arguments go to the configure step.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/install_packages.sh --tests
preset=$(tools/pick_preset.sh)
cmake --preset "$preset" -DLACUNA_TESTS=ON -DLACUNA_BENCH=ON "$@"
cmake --build --preset "$preset"
ctest --preset "$preset"
