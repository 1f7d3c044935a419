"""Training the MCM; the base is an argument that is never differentiated."""

from mcm_jax.training.caching import precompute
from mcm_jax.training.loop import train_and_evaluate

__all__ = ["precompute", "train_and_evaluate"]
