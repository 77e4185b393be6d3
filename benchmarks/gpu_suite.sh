#!/usr/bin/env bash
# Tests and measures kvtier on one GPU: `benchmarks/gpu_suite.sh OUTDIR`, one command, under nine minutes.
#
# Each step has a time limit of its own, and a step that fails does not end the run. OUTDIR gets environment.json,
# steps.json (exit code and seconds of each step), a log of each step, and the JSON of each measurement.
# Exit code: 0 all steps passed, 1 some step failed, 2 bad use or no GPU.
#
# PYTHON           the interpreter (python3); it must have torch, triton, transformers, pytest and hypothesis
# KVTIER_WHEELS    a folder of wheels that it lacks (pydantic, typer, rich, xxhash, ...), for machines without a network
set -uo pipefail

ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/gpu_suite.sh OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)

export PYTHONSAFEPATH=1 HF_HUB_OFFLINE=1 TRITON_DEFAULT_FP_FUSION=1 KVTIER_HYPOTHESIS_PROFILE=ci
export TRITON_CACHE_DIR="$OUT/triton-cache"
unset TRITON_INTERPRET KVTIER_KERNELS

if ! told=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "none")' 2>&1); then
  echo "gpu_suite: torch cannot be imported by $PYTHON: ${told##*$'\n'}" >&2
  exit 2
fi
if [ "$told" = none ]; then
  echo "gpu_suite: no GPU here: torch sees no CUDA device, so nothing was run" >&2
  exit 2
fi
echo "gpu_suite: $told, results in $OUT"

# What Python imports: the wheels that were brought, and this checkout unless it is installed already. By links, because
# the checkout root on the path would offer its `kernels/` as the package of that name.
SITE="$OUT/site"
rm -rf "$SITE"
mkdir -p "$SITE"
for wheel in "${KVTIER_WHEELS:-/nonexistent}"/*.whl; do
  [ -e "$wheel" ] && "$PYTHON" -m zipfile -e "$wheel" "$SITE"
done
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" "$ROOT/benchmarks/gpu/link.py" "$SITE" || exit 2

failed=0
separator=
printf '{\n' > "$OUT/steps.json"

# step NAME SECONDS COMMAND...: runs it into NAME.log and notes how it went.
step() {
  local name=$1 limit=$2 begun code
  shift 2
  begun=$SECONDS
  timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 < /dev/null
  code=$?
  printf '%s "%s": {"exit": %d, "seconds": %d, "limit": %d}' "$separator" "$name" "$code" $((SECONDS - begun)) "$limit" >> "$OUT/steps.json"
  separator=$',\n'
  if [ "$code" -eq 0 ]; then
    echo "passed  $name ($((SECONDS - begun)) s)"
  else
    failed=1
    [ "$code" -eq 124 ] && echo "FAILED  $name: not done in $limit s; see $name.log" || echo "FAILED  $name: exit code $code; see $name.log"
    tail -n 3 "$OUT/$name.log" | sed 's/^/        /'
  fi
}

# Other versions of pytest and torch than the project's own warn of other things, and not every plugin is there.
PLAIN=(-p no:cacheprovider -W default -o minversion=7 -o strict=false -o strict_config=false
  -o addopts=--import-mode=importlib --rootdir "$ROOT")

pytest() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" -m pytest -q "${PLAIN[@]}" --durations=10 --basetemp="$OUT/tmp-$name" \
    --junitxml="$OUT/$name.xml" "$@"
}

bench() {
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$PYTHON" "$ROOT/benchmarks/run.py" "$@" --json "$OUT/$name.json"
}

cd "$ROOT" || exit 2
step environment 30 "$PYTHON" "$ROOT/benchmarks/gpu/environment.py" "$OUT/environment.json"
step test-kernels 90 "$PYTHON" benchmarks/gpu/shards.py tests/kernels -m gpu "${PLAIN[@]}"
pytest test-models 80 -m gpu $(grep -rlE 'mark\.gpu' tests --include='test_*.py' | grep -v ^tests/kernels/)
pytest test-engines 40 tests/storage_backends/engines/test_kvikio.py
step test-laws 100 "$PYTHON" benchmarks/gpu/shards.py tests/kernels/triton -m "not gpu" "${PLAIN[@]}" \
  --deselect tests/kernels/triton/test_aot.py
bench bandwidth 20 bandwidth --device cuda
bench kernels 90 kernels --device cuda
bench decode 60 decode --device cuda --parts attention,step --dtypes bfloat16
bench choices 25 choices --device cuda
printf '\n}\n' >> "$OUT/steps.json"
rm -rf "$SITE" "$TRITON_CACHE_DIR" "$OUT"/tmp-*
exit $failed
