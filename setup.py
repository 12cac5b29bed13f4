"""The top-level folder configs/ is installed as gt_jax.configs; pyproject.toml has the rest."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["gt_jax*"]), "gt_jax.configs"],
    package_dir={"gt_jax.configs": "configs"},
)
