"""WS: one learned weight per layer. Otherwise as configs/gf_mh.py.

    python -m gt_jax.train --config=configs/ws.py

Expected: not measured yet.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.preset = "ws"
    return config
