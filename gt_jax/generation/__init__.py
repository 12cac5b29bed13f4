r"""Text from a trained model, for many prompts at once.

    model, params, tokenizer = gt_jax.load("runs/gf_mh")
    request = Request(tokenizer.encode("ROMEO:"), max_tokens=200, top_p=0.9, stop=("\n\n",))
    [completion] = complete(model, params, [request], tokenizer=tokenizer)

`stream` gives the same in deltas, as they come; `prefill` reads a text once so that many requests
can continue it; `save_context` and `load_context` keep what was read as a file. A `Worker` draws
for clients that come and go.
"""

from gt_jax.generation.ahead import lower_ahead, sample
from gt_jax.generation.contexts import Context, load_context, prefill, save_context
from gt_jax.generation.engine import complete, generate, stream
from gt_jax.generation.requests import Completion, Delta, Request
from gt_jax.generation.worker import Worker

__all__ = [
    "Completion",
    "Context",
    "Delta",
    "Request",
    "Worker",
    "complete",
    "generate",
    "load_context",
    "lower_ahead",
    "prefill",
    "sample",
    "save_context",
    "stream",
]
