"""mcm-jax: spatial control for diffusion models that nobody may touch."""

from mcm_jax.base import load_base
from mcm_jax.mcm import MCM, modulate
from mcm_jax.pipeline import Pipeline
from mcm_jax.version import __version__

__all__ = ["MCM", "Pipeline", "__version__", "load_base", "modulate"]
