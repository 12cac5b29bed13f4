"""The twin-debate block: x += RMSNorm(fuse(rwkv(n), n + mamba(n))), weighed by a minGRU.

It has no feed-forward, as in the original's notebooks. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/phase1_twin_debate.py

Expected: not measured as it stands; docs/results.md compares it with GF-MH after 2000 steps of
all of Shakespeare, under "Residual paths" of "What the laboratory says".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "twin-debate"
    return config
