"""The frozen base model: all that knows the diffusers file format lives here."""

from mcm_jax.base.loading import Base, BaseLoadError, load_base

__all__ = ["Base", "BaseLoadError", "load_base"]
