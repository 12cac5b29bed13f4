"""The trainer's parts; gt_jax/train.py joins them."""
