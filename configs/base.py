"""Every setting with its default; `python -m gt_jax.train --help` says what each of them is.

    python -m gt_jax.train --config=base --config.optim.lr=3e-4

The other files in this folder set only what differs. Any setting can also follow on the command
line, as above. None means "as the preset says".
"""

from gt_jax.config import default_config


def get_config():
    return default_config()
