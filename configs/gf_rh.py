"""GF-RH: one gate per position that begins at 70 % RWKV. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/gf_rh.py

Expected: validation loss 1.631 nats/character (one seed) in 3.5 minutes on an H100 that
trains twelve configs at once (`python -m experiments presets --jobs=12`), compilation included.
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gf-rh"
    return config
