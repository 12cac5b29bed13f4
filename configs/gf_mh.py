"""GF-MH, the main job: 8 hybrid blocks of width 128, a gate per position that begins at 30 % RWKV.

500 steps of 64 x 64 characters of Shakespeare, as configs/base.py has it.

    python -m gt_jax.train --config=configs/gf_mh.py

Expected: to be measured.
"""

from configs import base


def get_config():
    return base.get_config()
