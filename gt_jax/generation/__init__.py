"""Text from a trained model, for many prompts at once.

    model, params, tokenizer = gt_jax.load("runs/gf_mh")
    request = Request(tokenizer.encode("ROMEO:"), max_tokens=200, top_p=0.9, stop=("\n\n",))
    [completion] = complete(model, params, [request], tokenizer=tokenizer)

`stream` gives the same in pieces, as they come; `read` reads a text once so that many requests can
start from it; `save_context` and `load_context` keep what was read as a file. A `Worker` draws for
clients that come and go.
"""

from gt_jax.generation.contexts import Context, load_context, read, save_context
from gt_jax.generation.engine import Completion, Piece, Request, complete, stream
from gt_jax.generation.worker import Worker

__all__ = [
    "Completion",
    "Context",
    "Piece",
    "Request",
    "Worker",
    "complete",
    "load_context",
    "read",
    "save_context",
    "stream",
]
