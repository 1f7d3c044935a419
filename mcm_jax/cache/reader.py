"""A complete cache, read by random access."""

import os
import pathlib

import numpy as np

from mcm_jax.cache import store
from mcm_jax.errors import UserError

_PER_DRAW = ("eps", "eps_scale")
_NOT_READ = ("index", "t")


class Cache:
    """Reads a cache's records, in any order, from any number of threads. Memory does not grow with what was read.

    Args:
      folder: of the cache.
      verify: whether to read all of it first and compare checksums.

    Attributes:
      manifest: what it is.
      card: what is known of the base.
      fields: dtype and shape of one example's value, by name, of all that :meth:`read` gives.

    Raises:
      UserError: there is no cache, it is not complete, or it is damaged; names each shard that is.
    """

    def __init__(self, folder: str | os.PathLike, verify: bool = True):
        self.folder = pathlib.Path(folder)
        self.manifest = m = store.Manifest.read(folder)
        path = self.folder / store.MANIFEST
        self.card = m.card
        names = [store.shard_name(i) for i in range(m.shard_count)]
        if sorted(m.shards) != names:
            raise UserError(f"{path}: names {len(m.shards)} shards, expected {len(names)}. Build the cache again")
        if wrong := store.verify(self.folder, m.shards if verify else {}):
            raise UserError(f"{store.describe_damage(self.folder, wrong, len(names))}\n{store.REPAIR}")
        self._paths = [self.folder / name for name in names]
        headers = [store.read_header(path) for path in self._paths]
        first = headers[0]
        self.fields = {name: (dtype, shape[2:]) for name, (dtype, shape, _) in first.items() if name not in _NOT_READ}
        for number, header in enumerate(headers):
            count = len(m.rows(number))
            for name, (dtype, shape) in self.fields.items():
                each = m.draws if name in _PER_DRAW else m.views
                if header.get(name, (None, None))[:2] != (dtype, (count, each, *shape)):
                    raise UserError(
                        f"{self._paths[number]}: found {header.get(name, ('nothing', ''))[:2]} for {name!r}, expected "
                        f"{dtype}{[count, each, *shape]}. Let precompute.py rebuild it"
                    )
        self._begins = [{name: header[name][2] for name in self.fields} for header in headers]
        # Each field's bytes, how many an example has of it, and whether they are counted by draws.
        self._sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, (dtype, shape) in self.fields.items()}

    def __len__(self) -> int:
        """Examples."""
        return self.manifest.examples

    def read(self, index: np.ndarray, draw: np.ndarray) -> dict[str, np.ndarray]:
        """Records, stacked.

        Args:
          index: which examples, int ``[B]``.
          draw: which draw of each, int ``[B]``, at least 0; draw d is draw d mod K.

        Returns:
          :attr:`fields`: ``latent`` or ``image``, the modalities, ``eps`` as it is stored, ``eps_scale`` for int8, and
          ``present`` where examples may miss modalities.

        Raises:
          IndexError: an example that is not there.
          UserError: a shard is gone or was cut off since the cache was opened.
        """
        m, count = self.manifest, len(index)
        if count and not 0 <= index.min() <= index.max() < m.examples:
            raise IndexError(f"examples {index.min()} to {index.max()}, but the cache has 0 to {m.examples - 1}")
        out = {name: np.empty((count, *shape), dtype) for name, (dtype, shape) in self.fields.items()}
        bytes_of = {name: values.reshape(count, -1).view(np.uint8) for name, values in out.items()}
        for i, (example, d) in enumerate(zip(index.tolist(), (draw % m.draws).tolist(), strict=True)):
            number, row = divmod(example, m.shard_examples)
            begins = self._begins[number]
            try:
                # Opened for each example: a few microseconds, and no limit on the number of shards.
                handle = os.open(self._paths[number], os.O_RDONLY)
                try:
                    for name, size in self._sizes.items():
                        at = row * m.draws + d if name in _PER_DRAW else row * m.views + d % m.views
                        if os.preadv(handle, [bytes_of[name][i]], begins[name] + at * size) != size:
                            raise OSError("the file ends before")
                finally:
                    os.close(handle)
            except OSError as e:
                raise UserError(
                    f"{self._paths[number]}: example {example} cannot be read any more ({e.strerror or e}). "
                    f"{store.REPAIR}"
                ) from e
        return out
