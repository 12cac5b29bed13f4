import asyncio

import pytest

from gt_jax.generation import Delta
from gt_jax.generation.worker import _arriving

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
