import os

# Threads of JAX's CPU backend, read when it starts. The warpgroups of an interpreted kernel wait
# for one another in threads of their own, and would wait forever if there were fewer.
os.environ.setdefault("NPROC", "8")

# Several test processes share a GPU: each takes of its memory what it needs, not three quarters.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
