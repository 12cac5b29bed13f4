#!/usr/bin/env bash
# tensorboardX 2.6.5, Python 3.11, 2026-11-29.
#
# SummaryWriter.flush() says that it makes sure that all pending events have been written to disk. One would expect
# what was added before it to be in the file after it, whatever happens to the process then.
# Events wait in a queue that a thread empties; flush() flushes the file and leaves the queue as it is, so the last
# events of a run that is killed right after a flush are lost. close() waits for the thread.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tensorboardX==2.6.5
cat > "$work/show.py" <<'PY'
import pathlib
import sys

from tensorboardX import SummaryWriter


def complete_after_flush(folder):
    writer = SummaryWriter(str(folder))
    for step in range(20):
        writer.add_scalar("loss", 1 / (step + 1), step)
    writer.flush()
    (file,) = folder.iterdir()
    flushed = file.stat().st_size
    writer.close()
    return flushed == file.stat().st_size


rounds = [complete_after_flush(pathlib.Path(sys.argv[1]) / str(i)) for i in range(10)]
print("everything on disk after flush(), in each of 10 rounds:", all(rounds))
PY
found=$("$work/venv/bin/python" "$work/show.py" "$work/runs" 2>/dev/null)
echo "$found"
expected="everything on disk after flush(), in each of 10 rounds: False"
[ "$found" = "$expected" ] || { echo "this has changed: it was"; echo "$expected"; exit 1; }
