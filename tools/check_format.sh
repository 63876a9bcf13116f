#!/usr/bin/env bash
# Fails when a source that git knows of, or does not ignore, is not formatted as .clang-format says; --fix formats instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  "") mode=(--dry-run -Werror) ;;
  --fix) mode=(-i) ;;
  *)
    echo "usage: $0 [--fix]" >&2
    exit 2
    ;;
esac
git ls-files -z --cached --others --exclude-standard -- '*.cpp' '*.hpp' '*.cu' '*.cuh' |
  xargs -0 --no-run-if-empty clang-format --style=file "${mode[@]}"
