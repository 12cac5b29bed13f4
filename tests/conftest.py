import os

# Threads of JAX's CPU backend, read when it starts. The warpgroups of an interpreted kernel wait
# for one another in threads of their own, and would wait forever if there were fewer.
os.environ.setdefault("NPROC", "8")
