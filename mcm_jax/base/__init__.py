"""The frozen base model: all that knows the diffusers file format lives here."""

from mcm_jax.base.base import Base, BaseCard
from mcm_jax.base.loading import BaseSettings, find_folder, load_base, outline
from mcm_jax.base.weights import BaseLoadError

__all__ = ["Base", "BaseCard", "BaseLoadError", "BaseSettings", "find_folder", "load_base", "outline"]
