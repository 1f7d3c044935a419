"""The frozen base model: all that knows the diffusers file format lives here."""

from mcm_jax.base.base import Base
from mcm_jax.base.loading import load_base
from mcm_jax.base.weights import BaseLoadError

__all__ = ["Base", "BaseLoadError", "load_base"]
