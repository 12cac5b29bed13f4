import os

# Threads of JAX's CPU backend, read when it starts: the warpgroups of an interpreted kernel wait for
# each other in threads of their own, and would wait forever with fewer.
os.environ.setdefault("NPROC", "8")
