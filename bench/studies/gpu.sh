#!/usr/bin/env bash
# `make gpu`: build the extensions for this machine, test the kernels on its GPU, look for races and stray accesses, and
# measure. BUILT=1 uses the extensions that are already in fastkd/. No network; nothing is installed into GPU_PYTHON,
# the interpreter whose torch and Triton are used.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
python=${GPU_PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" FASTKD_NATIVE=1 FASTKD_CUDA=1
if [ -n "${WHEELS:-}" ]; then # unpacked where nothing else is, because Triton reads the source of its kernels
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    for wheel in "$WHEELS"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$packages" || exit 1
    done
    PYTHONPATH="$PYTHONPATH:$packages"
fi
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU here"' || exit 1

status=0
step() {
    echo "== $*"
    "$@" || { echo "== failed: $*"; status=1; }
}
# This device's alone; an older device has no clusters, and its extension is only for the tests of the build.
FASTKD_CUDA_ARCH=$("$python" -c 'import torch; print(max(90, int("{}{}".format(*torch.cuda.get_device_capability()))))')
export FASTKD_CUDA_ARCH
[ -n "${BUILT:-}" ] || step "$python" setup.py -q build_ext --inplace
step "$python" -m fastkd info
step "$python" -m pytest -q tests/backends/test_gpu.py tests/backends/cuda/test_cuda_build.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$python" bench/studies/gpu.py --sanitize
    done
else
    echo "compute-sanitizer is not on PATH: left out"
fi
step "$python" bench/studies/gpu.py
exit "$status"
