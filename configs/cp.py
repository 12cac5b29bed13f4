"""CP: both branches side by side through one projection. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/cp.py

Expected: the validation loss and the time that docs/results.md has under "What the presets end at".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "cp"
    return config
