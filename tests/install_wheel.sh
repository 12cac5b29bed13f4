#!/usr/bin/env bash
# Build the wheel, install it into a fresh environment, and train, generate and evaluate from another folder.
#   tests/install_wheel.sh PYTHON [PIP-ARGUMENTS ...]
set -euo pipefail
python=$1; shift
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone -q "$root" "$work/source"  # builds leave files behind
"$python" -m venv --upgrade-deps "$work/venv"
. "$work/venv/bin/activate"
pip wheel -q --no-deps -w "$work" "$work/source" "$@"
pip install -q "$work"/gt_jax-*.whl "$@"
cd "$work"
gt-jax train --config=tiny --workdir=run --config.train.steps=5 --config.train.batch_size=4 \
  --config.train.eval_tokens=2048 --config.train.sample_tokens=16
gt-jax generate --checkpoint=run --prompt="ROMEO:" --max_tokens=20
gt-jax evaluate --checkpoint=run
gt-jax models > models.txt
head -n 2 models.txt
