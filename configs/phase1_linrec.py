"""A weighted mean of all tokens so far weighs the branches.

Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/phase1_linrec.py

Expected: not measured yet.
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "linrec"
    return config
