import asyncio
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from gt_jax.data import tokenizer_from_dict
from gt_jax.generation import Delta, Worker
from gt_jax.generation.worker import _arriving
from tests.models.small_models import small_model

ROOT = Path(__file__).parents[2]
LETTERS = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmnopq"})
DELTA = Delta(0, [1], [-1.0], "a", None)


@pytest.mark.parametrize("turns", range(5))
def test_leaving_is_never_lost_to_a_delta_that_comes_at_the_same_time(turns):
    async def leave_as_a_delta_comes():
        arrived, seen = asyncio.Queue(), []

        async def listen():
            async for delta in _arriving(arrived, asyncio.get_running_loop().time() + 60, {0: 0}):
                seen.append(delta)

        task = asyncio.create_task(listen())
        for _ in range(5):
            await asyncio.sleep(0)
        arrived.put_nowait(DELTA)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=60)
        assert done and task.cancelled()

    asyncio.run(leave_as_a_delta_comes())


LEAVES = """
import asyncio, atexit, sys

from gt_jax.data import tokenizer_from_dict
from gt_jax.generation import Request, Worker
from tests.models.small_models import small_model

atexit.register(lambda: print("runs" if worker._thread.is_alive() else "ended"))  # runs last
small = small_model("gf")
letters = tokenizer_from_dict({"kind": "char", "alphabet": "abcdefghijklmnopq"})
worker = Worker(small.model, small.params, letters, 1)

async def leave_while_it_draws():
    async with worker.deltas([Request([1], max_tokens=10**8)] * 3, 600) as deltas:
        await anext(deltas)
        sys.exit(7)

if sys.argv[1] == "draws":
    asyncio.run(leave_while_it_draws())
elif sys.argv[1] == "fails":
    raise RuntimeError("of its own")
elif sys.argv[1] == "waits for no client":
    worker.clients[-1] = (asyncio.new_event_loop(), asyncio.Queue())
    worker._queue.append((-1, Request([1], max_tokens=10**8)))
    worker._some.set()
"""


@pytest.mark.parametrize(
    ("how", "status"), [("idles", 0), ("draws", 7), ("fails", 1), ("waits for no client", 0)]
)
def test_a_process_leaves_without_stopping_its_worker(how, status):
    """Its own exit status, no abort, and the thread is not in XLA's code when Python ends."""
    ended = subprocess.run(
        [sys.executable, "-c", LEAVES, how],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (ended.returncode, ended.stdout.split()) == (status, ["ended"]), ended.stderr


def test_a_stopped_worker_is_no_longer_kept_until_the_exit():
    small = small_model("gf")
    worker = Worker(small.model, small.params, LETTERS, 1)
    worker.stop(60)
    gone = weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None
