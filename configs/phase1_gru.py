"""A GRU reads both branches token by token and weighs them.

Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/phase1_gru.py

Expected: not measured as it stands; docs/results.md compares it with GF-MH after 2000 steps of
all of Shakespeare, under "Arbiters" of "What the laboratory says".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gru"
    return config
