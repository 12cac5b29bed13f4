#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with jax 0.10.2, Python 3.11, 2026-11-29.
#
# AsyncOptions takes a post_finalization_callback. By its name one would expect it to run when a checkpoint is final:
# the folder has its name, and whoever lists the steps sees it.
# It runs before: inside the callback the folder is still the temporary one, and no step can be listed or read.
# What waits for a complete step (a link to the newest, a message to another program) has to wait elsewhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$work/show.py" <<'PY'
import logging
import pathlib
import sys

logging.disable(logging.WARNING)
import numpy as np
import orbax.checkpoint as ocp

folder = pathlib.Path(sys.argv[1])
names = lambda: sorted(path.name for path in folder.iterdir())
seen = []
options = ocp.CheckpointManagerOptions(
    async_options=ocp.AsyncOptions(post_finalization_callback=lambda: seen.extend(names()))
)
with ocp.CheckpointManager(folder, options=options) as manager:
    manager.save(1, args=ocp.args.StandardSave({"weights": np.arange(4)}))
    manager.wait_until_finished()
    print("in the callback:", seen)
    print("after the wait:", names(), manager.all_steps())
PY
found=$(JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/show.py" "$work/steps" 2>/dev/null)
echo "$found"
expected="in the callback: ['1.orbax-checkpoint-tmp']
after the wait: ['1'] [1]"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
