"""What an evaluation has done so far, kept on disk, so that the same command goes on."""

import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from mcm_jax.files import write_atomically


class Parts:
    """The folder that keeps what is measured until all is.

    Args:
      folder: which.
      of: what is measured; parts of something else are thrown away.
    """

    def __init__(self, folder: pathlib.Path, of: Mapping[str, Any]):
        self.folder, stamp = folder, json.dumps(of, sort_keys=True, default=str)
        path = folder / "of.json"
        if folder.is_dir() and not (path.is_file() and path.read_text() == stamp):
            print(f"{folder} has parts of another evaluation: it begins anew")
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        write_atomically(path, stamp.encode())

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"

    def get(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What :meth:`put` was given; None where it was not."""
        if not self._path(name).is_file():
            return None
        with np.load(self._path(name), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return json.loads(str(arrays.pop("numbers"))), arrays

    def put(self, name: str, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps numbers and arrays."""
        data = io.BytesIO()
        np.savez(data, numbers=np.array(json.dumps(numbers)), **arrays)
        write_atomically(self._path(name), data.getvalue())
