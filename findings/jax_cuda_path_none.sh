#!/usr/bin/env bash
# jax and jaxlib 0.12.0.1 with nvidia-cuda-runtime 13.0.96, Python 3.12 or newer, on a machine without CUDA, 2026-11-30.
#
# JAX looks for CUDA's tools in the package nvidia.cu13, where nvidia-cuda-nvcc puts bin/ptxas, and without them Mosaic
# GPU falls back to /usr/local/cuda. The wheels of CUDA 13's libraries make that package too, so one would expect an
# environment that has the libraries without the compiler (as PyTorch installs them) to be like one without the package.
# There the path is the text 'None', which is true: the fallback is never taken, and importing
# jax.experimental.mosaic.gpu leaves MOSAIC_GPU_CUDA_ROOT=None in the environment of the process and of its children.
# Why one looks: a kernel needs nvdisasm or ptxas from a CUDA that is installed and is not found.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for python in "$HOME"/.pyenv/versions/3.1[23]*/bin/python python3.12 python3.13; do
  "$python" -m venv "$work/venv" 2>/dev/null && break
done
cat > "$work/show.py" <<'PY'
import subprocess
import sys

import jax.experimental.mosaic.gpu  # noqa: F401

code = "import os; print(repr(os.environ.get('MOSAIC_GPU_CUDA_ROOT')))"
print(sys.argv[1], subprocess.check_output([sys.executable, "-c", code], text=True).strip())
PY
show() {
  env -u CUDA_ROOT -u MOSAIC_GPU_CUDA_ROOT JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/show.py" "$1" 2>/dev/null
}
"$work/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
found=$(show "jax alone:")$'\n'
"$work/venv/bin/pip" install -q nvidia-cuda-runtime==13.0.96
found+=$(show "beside a library of CUDA 13:")$'\n'
echo -n "$found"
expected="jax alone: '/usr/local/cuda'
beside a library of CUDA 13: 'None'
"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo -n "$expected"; exit 1; }
