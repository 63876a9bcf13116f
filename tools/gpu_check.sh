#!/usr/bin/env bash
# Builds with CUDA, then on the GPU: every test of label gpu, compute-sanitizer's four tools on their cases, and the quickstart
# study. Prints one summary and fails if any part failed. Without a GPU it runs nothing and exits with 77.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

readonly build=build/release
readonly logs=$build/gpu_check
readonly parts=(tests memcheck racecheck initcheck synccheck quickstart)
readonly limit=30m # of one program; a kernel that waits for ever must not

# The cases (module of tests/, then doctest filters) that the sanitizers run. racecheck and initcheck slow a kernel down up to a
# thousandfold: they get those that reach every kernel on small shapes. The others run all but what compares times, which a
# sanitizer distorts. A module that is not listed runs whole.
readonly slow_tools_cases=(
  "device|GPU: *,GPU timing: the variants*"
  "kv|*histories*"
  "ops|*small cache*,*pool and group_reduce*,*mean_keys*,GPU: topk takes*,GPU: antidiagonal_mass equals*"
  "attention|*head sizes*,*several sequences*,*selections of pieces*,*listed twice*,*sliding window*"
  "strategies|*example plug-in*"
)
readonly fast_tools_cases=(
  "device|GPU: *,GPU timing: the variants*,GPU timing: what cannot*"
)

usage() {
  cat <<EOF
usage: tools/gpu_check.sh [--no-build] [--only PART]... [--module MODULE]...
  --only PART      one of: ${parts[*]} (default: all)
  --module MODULE  sanitizers: only this folder of tests/ (default: all that have GPU tests)
  --no-build       takes $build as it is
Logs are written to $logs/.
EOF
}

only=() modules=() with_build=1
while (($# > 0)); do
  case $1 in
    --no-build) with_build=0 ;;
    --only | --module)
      if (($# < 2)); then
        usage >&2
        exit 2
      fi
      if [[ $1 == --module ]]; then
        modules+=("$2")
      elif [[ " ${parts[*]} " == *" $2 "* ]]; then
        only+=("$2")
      else
        echo "gpu_check: no part '$2'; expected one of: ${parts[*]}" >&2
        exit 2
      fi
      shift
      ;;
    --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done
((${#only[@]} > 0)) || only=("${parts[@]}")

has_gpu() {
  compgen -G '/dev/nvidia[0-9]*' >/dev/null ||
    { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; }
}
if ! has_gpu; then
  echo "gpu_check: there is no NVIDIA GPU on this machine; nothing was run" >&2
  exit 77
fi

rows=() failed=0
# check PART WHAT COMMAND...: runs it, its output to a log, and adds a row. The command's status decides.
check() {
  local part=$1 what=$2 log begin status result
  shift 2
  log=$logs/$part-$what.log
  echo "gpu_check: $part $what" >&2
  begin=$EPOCHREALTIME
  timeout "$limit" "$@" >"$log" 2>&1
  status=$?
  case $status in
    0) result=pass ;;
    77) result="FAIL (the program found no GPU)" ;;
    124) result="FAIL (longer than $limit)" ;;
    *) result="FAIL ($status, see $log)" ;;
  esac
  add_row "$part" "$what" "$begin" "$result"
}
add_row() {
  local seconds
  seconds=$(awk -v a="$3" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
  rows+=("$(printf '%-10s  %-12s  %8s  %s' "$1" "$2" "$seconds" "$4")")
  [[ $4 == pass* ]] || failed=1
}
summary() {
  printf '\n%-10s  %-12s  %8s  %s\n' part what seconds result
  ((${#rows[@]} == 0)) || printf '%s\n' "${rows[@]}"
}

build() {
  tools/install_packages.sh --tests &&
    cmake --preset release -DLACUNA_CUDA=ON -DLACUNA_TESTS=ON &&
    cmake --build --preset release --target gpu_tests lacuna_cli lacuna_strategies
}
# ctest takes a skipped test for a passed one.
gpu_tests() {
  ctest --test-dir "$build" -L gpu --output-on-failure --no-tests=error | tee "$logs/ctest.txt"
  ((PIPESTATUS[0] == 0)) && ! grep -q 'Skipped' "$logs/ctest.txt"
}
# filter_of MODULE LIST...
filter_of() {
  local module=$1 entry
  shift
  for entry in "$@"; do
    if [[ ${entry%%|*} == "$module" ]]; then
      echo "${entry#*|}"
      return
    fi
  done
  echo '*'
}
# A filter that fits no case must not pass.
sanitized() {
  local tool=$1 program=$2 filter=$3
  if ! "$program" --list-test-cases --test-case="$filter" | grep -q 'passing the current filters: [1-9]'; then
    echo "no case of $program fits '$filter'"
    return 1
  fi
  "$sanitizer" --tool "$tool" --report-api-errors no --error-exitcode 9 "$program" --test-case="$filter"
}
export -f gpu_tests sanitized

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/{bin,compute-sanitizer}/compute-sanitizer 2>/dev/null | head -n 1)
export sanitizer build logs
export OMP_WAIT_POLICY=passive
mkdir -p "$logs"

if ((with_build)); then
  begin=$EPOCHREALTIME
  echo "gpu_check: build" >&2
  if build >"$logs/build.log" 2>&1; then
    add_row build release "$begin" pass
  else
    add_row build release "$begin" "FAIL (see $logs/build.log)"
    summary
    exit 1
  fi
fi

for part in "${only[@]}"; do
  case $part in
    tests) check tests ctest bash -c gpu_tests ;;
    quickstart) check quickstart cuda "$build/bin/lacuna" run scenarios/quickstart.toml --device cuda ;;
    *)
      if [[ -z $sanitizer ]]; then
        add_row "$part" all "$EPOCHREALTIME" "FAIL (compute-sanitizer is not installed)"
        continue
      fi
      checked=0
      for program in "$build"/bin/test_*_gpu; do
        module=${program##*/test_} module=${module%_gpu}
        ((${#modules[@]} == 0)) || [[ " ${modules[*]} " == *" $module "* ]] || continue
        case $part in
          racecheck | initcheck) filter=$(filter_of "$module" "${slow_tools_cases[@]}") ;;
          *) filter=$(filter_of "$module" "${fast_tools_cases[@]}") ;;
        esac
        check "$part" "$module" bash -c 'sanitized "$@"' sanitized "$part" "$program" "$filter"
        checked=1
      done
      ((checked)) || add_row "$part" "${modules[*]:-all}" "$EPOCHREALTIME" "FAIL (no such test program in $build/bin)"
      ;;
  esac
done

summary | tee "$logs/summary.txt"
exit "$failed"
