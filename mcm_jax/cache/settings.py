"""The config's section ``cache``."""

import dataclasses
import os
import pathlib

from mcm_jax.cache.build import DTYPES
from mcm_jax.errors import expect

MODES = ("off", "on", "build")


@dataclasses.dataclass(frozen=True)
class CacheSettings:
    """Where the base's predictions come from, and how they are kept: docs/cache.md. The config's section ``cache``.

    Attributes:
      mode: ``off``: the base predicts each batch; ``on``: a cache serves in its place; ``build``: that, made if needed.
      path: a folder; '' is the workdir's own.
      dtype: of the predictions on disk: ``float16``, ``bfloat16``, ``float32``, ``int8``.
      shard_draws: predictions in a file: what a kill can lose.
      batch_size: predictions at a time, over all devices of a process: each builds shards of its own.
      verify: whether all checksums are compared before training.
      load_base: whether the base is loaded all the same, for validation pictures and control while training.
    """

    mode: str = "off"
    path: str = ""
    dtype: str = "float16"
    shard_draws: int = 1_024
    batch_size: int = 32
    verify: bool = True
    load_base: bool = False

    def __post_init__(self):
        expect(self.mode in MODES, "mode", f"one of {', '.join(MODES)}", self.mode)
        expect(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        expect(self.shard_draws >= 1, "shard_draws", "at least 1", self.shard_draws)
        expect(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)

    def folder(self, workdir: str | os.PathLike) -> pathlib.Path:
        """Where the cache of a workdir is."""
        return pathlib.Path(self.path).expanduser() if self.path else pathlib.Path(workdir).expanduser() / "cache"
