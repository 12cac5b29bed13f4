"""Gates of the block's input weigh the branches; no memory.

Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/phase1_glu.py

Expected: not measured as it stands; docs/results.md compares it with GF-MH after 2000 steps of
all of Shakespeare, under "Arbiters" of "What the laboratory says".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "glu"
    return config
