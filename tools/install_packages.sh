#!/usr/bin/env bash
# Installs the Debian packages that the build needs; with --tests also those of the tests, the benchmarks and CI.
# Does not touch apt (nor the network) when all are there.
set -euo pipefail

packages=(
  build-essential cmake ninja-build ccache git ca-certificates
  libboost-dev libcli11-dev libfmt-dev libspdlog-dev libtomlplusplus-dev nlohmann-json3-dev
)
case "${1:-}" in
  "") ;;
  --tests) packages+=(doctest-dev libbenchmark-dev libopenblas-dev pkg-config python3 python3-numpy clang clang-format libomp-dev) ;;
  *)
    echo "usage: $0 [--tests]" >&2
    exit 2
    ;;
esac

installed() { [[ "$(dpkg-query --show --showformat='${Status}' "$1" 2>/dev/null)" == "install ok installed" ]]; }
missing=()
for package in "${packages[@]}"; do
  installed "$package" || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  as_root=(sudo)
fi
echo "Installing: ${missing[*]}" >&2
"${as_root[@]}" apt-get update -q >&2
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >&2
