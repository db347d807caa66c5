#!/usr/bin/env bash
# Everything that takes a GPU: the CUDA kernels, rung L4 of docs/plugins.md, and ONNX Runtime's CUDA provider end to end,
# docs/cuda.md.
#
#     benchmarks/gpu/run.sh [OUT]
#
# It needs an NVIDIA GPU (compute capability 8.0 or later) with its driver, nvcc 12.8 or later, CMake, a C++ compiler,
# and a Python (PYTHON, by default python3) with PyTorch for CUDA, typer and rich. transformers and
# flash-linear-attention are timed where they are installed, compute-sanitizer runs where it is. ONNX Runtime is run where
# the packages of zreward[gpu,export] are installed: `pip install -e '.[gpu,export]'`, without onnxruntime for CPUs. No
# network.
#
# OUT (by default build/gpu) gets the library, every figure in cases.json, times.json, onnxruntime.json, conformance-*.json and
# machine.txt, and the sanitizer's words. The exit status is 0 where all cases passed and the sanitizer found nothing. STEPS=kernels
# or STEPS=onnxruntime runs one part alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/gpu}
python=${PYTHON:-python3}
steps=${STEPS:-kernels onnxruntime}
for step in $steps; do
  if [ "$step" != kernels ] && [ "$step" != onnxruntime ]; then
    echo "STEPS: there is no step $step, only kernels and onnxruntime" >&2
    exit 2
  fi
done
mkdir -p "$out"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1

{
  date -u
  nvidia-smi --format=csv \
    --query-gpu=name,driver_version,compute_cap,clocks.max.sm,clocks.max.mem,memory.total,power.limit
  "$python" -c 'import sys, torch; print(sys.version, "torch", torch.__version__, "CUDA", torch.version.cuda)'
  git log -1 --format='commit %H' 2>/dev/null || true
} | tee "$out/machine.txt"

status=0

kernels() {
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1)
  echo "== the library, for compute capability $capability"
  "$python" -m zreward.cli plugins build --kernels-only --architectures "$capability" --output "$out"

  echo "== 200 random calls of each kernel against float64"
  "$python" -m benchmarks.gpu.check "$out/libzreward_kernels.so" --count 200 --json "$out/cases.json" || status=1

  # Each tool follows every access of a few calls. initcheck would report torch's own poison, and calls to CUDA that fail
  # are torch's, which asks for what a machine may not have.
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  if [ -n "$sanitizer" ]; then
    # torch's own kernels are left out where this version has an option for that; following them is slow.
    filter=$("$sanitizer" --help 2>&1 | grep -oE -- '--kernel-(regex|name)' | head -1 || true)
    for tool in memcheck racecheck synccheck; do
      echo "== compute-sanitizer, $tool"
      options=(--tool "$tool" --error-exitcode 9 ${filter:+"$filter" kns=zreward})
      if [ "$tool" = memcheck ]; then options+=(--report-api-errors no); fi
      if "$sanitizer" "${options[@]}" \
        "$python" -m benchmarks.gpu.check "$out/libzreward_kernels.so" --count 6 --most-work 60 --seed 1 \
        > "$out/sanitizer-$tool.txt" 2>&1; then
        tail -2 "$out/sanitizer-$tool.txt"
      else
        tail -30 "$out/sanitizer-$tool.txt"
        status=1
      fi
    done
  else
    echo "compute-sanitizer was not found: it did not run" | tee "$out/sanitizer-missing.txt"
  fi

  echo "== times"
  "$python" -m benchmarks.gpu.times "$out/libzreward_kernels.so" --json "$out/times.json" || status=1
}

onnxruntime() {
  echo "== ONNX Runtime's CUDA provider"
  # A GPU or a package that is missing is an error of each case.
  "$python" -m benchmarks.gpu.onnxruntime_cuda --out "$out/onnxruntime" --json "$out/onnxruntime.json" || status=1
  for bundle in "$out"/onnxruntime/bundles/*/; do
    echo "== zreward conformance of $(basename "$bundle")"
    "$python" -m zreward.cli conformance "$bundle" --provider cuda --force \
      --output "$out/conformance-$(basename "$bundle").json" || status=1
  done
}

for step in $steps; do
  "$step"
done
exit $status
