"""ParallelScan: a gated memory of both branches, weighed by the block's input.

Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/phase1_pscan.py

Expected: not measured as it stands; docs/results.md compares it with GF-MH after 2000 steps of
all of Shakespeare, under "Arbiters" of "What the laboratory says".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "pscan"
    return config
