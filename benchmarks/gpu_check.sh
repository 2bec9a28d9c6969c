#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, on one such machine without a network, in under nine minutes.
#
#   benchmarks/gpu_check.sh --pack DIR                 where there is a package index: fetch the wheels into DIR
#   benchmarks/gpu_check.sh --wheels DIR [--out DIR]   on the GPU machine: tests, sanitizer, benchmarks, summary
#   ... --parts "tests engine"                         only some of: tests sanitizer benchmarks engine
#
# The GPU machine brings Python 3.12 (PYTHON=), torch >= 2.11, triton >= 3.6, a C++ compiler and cmake.
# ENGINE_OPTIONS: further ones of bench_engine_gpu.py. A part that fails or runs out of time does not stop the others;
# the exit status is 0 only if every part passed. --out (benchmarks/results) receives kernels-<device>.csv,
# engine-<device>.csv and a log of each part. The parts' limits add up to more than the whole's: where all are slow,
# run `engine` by itself.
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
LIMIT=530  # seconds in all
WHEELS="" PACK="" OUT=$ROOT/benchmarks/results PARTS="tests sanitizer benchmarks engine"
# accelerate is left out: it would pull torch, which the GPU machine has.
PACKAGES="diffusers>=0.42 transformers>=5.0 pyarrow>=18 pillow>=11.3 tqdm numpy>=2.0 safetensors>=0.5
  scikit-image>=0.25 scikit-learn>=1.6 pywavelets>=1.8
  pytest>=8 pytest-benchmark>=5 hypothesis>=6.100 pybind11>=3.0 scikit-build-core>=1.1 setuptools>=77 wheel ninja"

usage() {
  sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

pack() {
  mkdir -p "$PACK" || exit 1
  # shellcheck disable=SC2086  # a list
  "$PYTHON" -m pip download --disable-pip-version-check --quiet --dest "$PACK" --constraint "$ROOT/constraints.txt" \
    --only-binary=:all: --implementation cp --python-version 3.12 --abi cp312 --abi abi3 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform any $PACKAGES || exit 1
  local heavy
  heavy=$(find "$PACK" \( -name 'torch-*' -o -name 'triton-*' -o -name 'nvidia_*' \) -print)
  if [[ -n $heavy ]]; then
    echo "these belong to the GPU machine and must not be packed: $heavy" >&2
    exit 1
  fi
  echo "$(find "$PACK" -name '*.whl' | wc -l) wheels, $(du -sh "$PACK" | cut -f1), in $PACK"
}

# part NAME SECONDS FUNCTION...: runs it in a shell of its own into NAME.log, notes how it ended.
part() {
  local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status verdict
  shift 2
  if ((left < 5)); then
    record "$name" "NOT RUN" 0 "no time left"
    return 1
  fi
  echo "== $name"
  timeout --kill-after=5 $((limit < left ? limit : left)) bash -c '"$@"' "$name" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict=passed ;;
    124 | 137) verdict="TIMED OUT" ;;
    *) verdict="FAILED ($status)" ;;
  esac
  ((status == 0)) || tail -n 25 "$OUT/$name.log"
  record "$name" "$verdict" $((SECONDS - start)) "$(last_words "$OUT/$name.log")"
  return "$status"
}

wanted() {
  [[ " $PARTS " == *" $1 "* ]]
}

last_words() {
  grep -vE '^[[:space:]]*$' "$1" | tail -n 1 | cut -c1-110
}

SUMMARY=()
FAILED=0
record() {
  SUMMARY+=("$(printf '%-12s %-12s %4ss  %s' "$@")")
  [[ $2 == passed || $2 == skipped ]] || FAILED=1
}

# Where PYTHON is itself a virtual environment, one made from it does not see that one's packages.
see_packages_of_python() {
  local target
  target=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') &&
    "$PYTHON" -c 'import site; print("\n".join(site.getsitepackages()))' >"$target/parent.pth"
}

# shellcheck disable=SC2086  # PACKAGES is a list
install_amg() {
  "$PYTHON" -m venv --system-site-packages "$VENV" && see_packages_of_python &&
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-index --find-links "$WHEELS" \
      $PACKAGES &&
    cd "$ROOT" &&
    CMAKE_PREFIX_PATH=$("$VENV/bin/python" -m pybind11 --cmakedir) \
      "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --no-index --no-deps \
      --no-build-isolation -e . &&
    "$VENV/bin/python" -c '
import torch, triton
from amg.kernels.extension import REASON
assert torch.cuda.is_available(), "torch sees no CUDA device"
versions = f"torch {torch.__version__}, triton {triton.__version__}"
print(torch.cuda.get_device_name(), versions, REASON or "C++ extension built", sep=", ")'
}

# Only files with such tests are collected: others import packages that are not needed here.
# shellcheck disable=SC2086  # options
run_tests() {
  cd "$ROOT" && grep -rlE --include='test_*.py' 'mark\.gpu' tests |
    xargs "$VENV/bin/python" -m pytest -q -m gpu -p no:cacheprovider ${PYTEST_ARGS:-}
}

# Small launches of every kernel under memcheck; without torch's caching allocator each tensor has its own bounds.
run_sanitizer() {
  cd "$ROOT" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$1" --tool memcheck --error-exitcode 9 \
    "$VENV/bin/python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_gpu.py \
    -k "closed_sample or ties_go_to or predict_x0 or (nl2 and 13-130) or (search_finds and 5-257)"
}

# shellcheck disable=SC2086  # options
run_engine() {
  cd "$ROOT" && "$VENV/bin/python" benchmarks/bench_engine_gpu.py --out "$OUT" --seconds 100 ${ENGINE_OPTIONS:-}
}

run_benchmarks() {
  cd "$ROOT" && "$VENV/bin/python" benchmarks/bench_kernels_gpu.py --out "$OUT" --seconds 150
}

check() {
  mkdir -p "$OUT" || exit 1
  OUT=$(cd "$OUT" && pwd) WHEELS=$(cd "$WHEELS" && pwd) || exit 1
  VENV=$(mktemp -d)/venv
  trap 'rm -rf "$(dirname "$VENV")"' EXIT
  unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE  # they slow the rivals
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WHEELS VENV ROOT OUT PYTHON PACKAGES
  export -f see_packages_of_python install_amg run_tests run_sanitizer run_benchmarks run_engine
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer)

  if part install 150 install_amg; then
    wanted tests && part tests 170 run_tests
    if wanted sanitizer && [[ -n $sanitizer ]]; then
      part sanitizer 70 run_sanitizer "$sanitizer"
    elif wanted sanitizer; then
      record sanitizer skipped 0 "no compute-sanitizer on this machine"
    fi
    wanted benchmarks && part benchmarks 200 run_benchmarks
    wanted engine && part engine 150 run_engine
  fi
  [[ -f $OUT/benchmarks.log ]] && sed -n '/^case  /,$p' "$OUT/benchmarks.log"
  echo
  printf '%s\n' "${SUMMARY[@]}"
  exit "$FAILED"
}

while (($#)); do
  case $1 in
    --wheels) WHEELS=${2:?--wheels needs a folder} && shift 2 ;;
    --pack) PACK=${2:?--pack needs a folder} && shift 2 ;;
    --out) OUT=${2:?--out needs a folder} && shift 2 ;;
    --parts) PARTS=${2:?--parts needs a list} && shift 2 ;;
    *) usage ;;
  esac
done
if [[ -n $PACK && -z $WHEELS ]]; then
  pack
elif [[ -n $WHEELS && -z $PACK ]]; then
  check
else
  usage
fi
