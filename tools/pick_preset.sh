#!/usr/bin/env bash
# Prints the CMake preset that suits this machine: release (with CUDA) where there is an NVIDIA GPU and nvcc, else cpu.
set -euo pipefail

has_nvcc() { command -v nvcc >/dev/null || [[ -x /usr/local/cuda/bin/nvcc ]]; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }

if has_nvcc && has_gpu; then
  echo release
else
  echo cpu
fi
