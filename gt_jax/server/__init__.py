"""OpenAI's /v1/completions over HTTP: what a request may hold, the answers, and the connections."""

from gt_jax.server.app import make_app
from gt_jax.server.completions import Ask, parse
from gt_jax.server.connections import make_server

__all__ = ["Ask", "make_app", "make_server", "parse"]
