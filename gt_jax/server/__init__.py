"""OpenAI's API over HTTP: what a request may hold, the answers, and the connections."""

from gt_jax.server.app import make_app
from gt_jax.server.connections import make_server

__all__ = ["make_app", "make_server"]
