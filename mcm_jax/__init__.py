"""mcm-jax: spatial control for diffusion models that nobody may touch."""

from mcm_jax.base import load_base
from mcm_jax.mcm import MCM, modulate
from mcm_jax.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["MCM", "Pipeline", "load_base", "modulate"]
