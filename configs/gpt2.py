"""GPT-2: the attention baseline, trained like the hybrids. Otherwise like configs/gf_mh.py.

    python -m gt_jax.train --config=configs/gpt2.py

Expected: the validation loss and the time that docs/results.md has under "What the presets end at".
"""

from gt_jax.config import default_config


def get_config():
    config = default_config()
    config.model.preset = "gpt2"
    config.optim.lr = 1e-3
    return config
