#!/bin/sh
# Everything that needs a GPU, in one go: build for this GPU, all tests, compute-sanitizer over the op tests, benchmarks.
#
#   sh scripts/gpu_check.sh OUT        (PYTHON=... chooses the interpreter, which must have torch, pytest and pybind11)
#
# Needs no network and installs nothing: the module is built into the source tree. A part that fails does not stop the next;
# the exit code is 1 if any failed. OUT receives a log of each part, results.json and results.md.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:?usage: gpu_check.sh OUT}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PYTHONUNBUFFERED=1
export PYTHONPATH PYTHONUNBUFFERED
failed=""

now() { date +%s; }
start=$(now)

# report NAME STATUS SECONDS: one line, and remember a failure
report() {
  if [ "$2" -eq 0 ]; then word=ok; elif [ "$2" -eq 124 ]; then word="out of time"; else word="failed ($2)"; fi
  echo "gpu-check: $1: $word, $3 s"
  [ "$2" -eq 0 ] || failed="$failed $1"
}

# part NAME LIMIT COMMAND...: run it into OUT/NAME.log
part() {
  name=$1 limit=$2
  shift 2
  began=$(now)
  # An interrupt lets pytest finish its report and write what it has.
  timeout -s INT -k 20 "$limit" "$@" >"$OUT/$name.log" 2>&1
  report "$name" $? $(($(now) - began))
}

# ---- the machine ----
{
  nvidia-smi
  nvcc --version
  "$PYTHON" -c "import sys, torch; print(sys.version); print('torch', torch.__version__, torch.cuda.is_available())"
  "$PYTHON" -c "import transformers; print('transformers', transformers.__version__)"
  git log -1 --oneline
} >"$OUT/machine.log" 2>&1

# ---- build, for the GPU in the machine ----
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
build() {
  rm -rf build/gpu-check
  command -v ninja >/dev/null && set -- -G Ninja
  cmake -S . -B build/gpu-check "$@" -DCMAKE_BUILD_TYPE=Release -DVLPRUNE_CUDA="${VLPRUNE_CUDA:-ON}" \
    ${arch:+-DCMAKE_CUDA_ARCHITECTURES="$arch"} -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
    cmake --build build/gpu-check -j "$(nproc)" && cmake --install build/gpu-check --prefix "$PWD"
}
began=$(now)
build >"$OUT/build.log" 2>&1
status=$?
report build $status $(($(now) - began))
if [ $status -ne 0 ]; then
  tail -n 30 "$OUT/build.log"
  echo "gpu-check: nothing to test"
  exit 1
fi

# ---- tests and the sanitizers, side by side ----
workers=""
"$PYTHON" -c "import xdist" 2>/dev/null && workers="-n 6 --dist loadgroup"
pytest() { echo "$PYTHON -m pytest -p no:cacheprovider -W default -q $*"; }
# Only this extension's kernels are instrumented: torch's own are not ours to check, and each costs time.
sanitizer() { echo "compute-sanitizer --tool $1 --kernel-regex kns=vlprune --report-api-errors no --error-exitcode 9"; }
op_tests="tests/ops -m gpu --deselect tests/ops/test_native.py"

( # shellcheck disable=SC2046,SC2086
  part tests 300 $(pytest tests $workers --durations=15)
  exit ${#failed}
) &
tests=$!
(
  # shellcheck disable=SC2046,SC2086
  part memcheck 300 $(sanitizer memcheck) $(pytest $op_tests -k "not 2_31")
  exit ${#failed}
) &
memcheck=$!
(
  # shellcheck disable=SC2046,SC2086
  part racecheck 300 $(sanitizer racecheck) $(pytest $op_tests -k "not 2_31")
  exit ${#failed}
) &
racecheck=$!
wait $tests || failed="$failed tests"
wait $memcheck || failed="$failed memcheck"
wait $racecheck || failed="$failed racecheck"

# ---- benchmarks, alone on the machine ----
# shellcheck disable=SC2046
part bench 180 $(pytest benchmarks -o "python_files=bench_*.py" --bench-out "$OUT" --bench-name results)

echo "gpu-check: $(($(now) - start)) s in all, logs in $OUT"
[ -f "$OUT/results.md" ] && cat "$OUT/results.md"
if [ -n "$failed" ]; then
  for name in $failed; do echo "---- $name"; tail -n 25 "$OUT/$name.log"; done
  exit 1
fi
