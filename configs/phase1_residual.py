"""GF-MH whose Mamba branch adds its input before the fusion. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/phase1_residual.py

Expected: not measured as it stands; docs/results.md compares it with GF-MH after 2000 steps of
all of Shakespeare, under "Residual paths" of "What the laboratory says".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.residual = "mamba"
    return config
