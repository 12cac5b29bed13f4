"""Mamba-2: the pure recurrence, trained like the hybrids. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/mamba2.py

Expected: the validation loss and the time that docs/results.md has under "What the presets end at".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "mamba2"
    return config
