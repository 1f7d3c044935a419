"""Training the MCM; the base is an argument that is never differentiated."""

from mcm_jax.training.assembly import train_and_evaluate
from mcm_jax.training.caching import precompute
from mcm_jax.training.settings import RunSettings, read_run

__all__ = ["RunSettings", "precompute", "read_run", "train_and_evaluate"]
