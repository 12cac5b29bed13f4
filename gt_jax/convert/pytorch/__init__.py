"""The parts of modeling_gt_jax.py, the PyTorch file that an exported model brings along.

gt_jax imports none of them and needs no torch: `gt_jax.convert.modeling` copies those definitions
into the file that a model uses. Parameters have the names of the Flax modules, but for what PyTorch
calls otherwise: weight for scale and kernel, whose axes nn.Linear swaps.
"""
