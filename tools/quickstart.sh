#!/usr/bin/env bash
# Installs what is missing, builds the release, and replays the shipped trace under the strategies of the quickstart study.
# Arguments go to `lacuna run`. The table is on stdout, all else on stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tools/install_packages.sh
preset=$(tools/pick_preset.sh)
cmake --preset "$preset" -DLACUNA_TESTS=OFF -DLACUNA_BENCH=OFF >&2
cmake --build --preset "$preset" --target lacuna_cli >&2
exec "build/$preset/bin/lacuna" run scenarios/quickstart.toml "$@"
