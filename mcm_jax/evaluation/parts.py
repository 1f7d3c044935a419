"""What an evaluation has done so far, kept on disk, so that the same command goes on."""

import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically

_STAMP = "of.json"  # what the parts are of


class Parts:
    """The folder that keeps what is measured until all is.

    Args:
      folder: which.
      of: what is measured; parts of something else are thrown away.

    Raises:
      UserError: what is there is no such folder.
    """

    def __init__(self, folder: pathlib.Path, of: Mapping[str, Any]):
        self.folder, self._stamp = folder, json.dumps(of, sort_keys=True, default=str)
        path = folder / _STAMP
        if path.is_file():
            if path.read_text() != self._stamp:
                self._begin_anew("has parts of another evaluation")
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"{folder}: expected a new folder, to keep what is done in. Remove it or take another --out"
            )
        self._begin()

    def _begin(self) -> None:
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / _STAMP, self._stamp.encode())

    def _begin_anew(self, why: str) -> None:
        print(f"{self.folder} {why}: it begins anew")
        shutil.rmtree(self.folder)
        self._begin()

    def check(self, real: Mapping[str, float | str]) -> None:
        """Begins anew where real pictures are not judged as they were: a judge, or the data, has changed meanwhile.

        Args:
          real: numbers of real pictures, which cost little, now.
        """
        before = self.get("real")
        if before is not None and not _agree(before[0], real):
            self._begin_anew("has parts that were judged otherwise")
        self.put("real", real, {})

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"

    def get(self, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """What :meth:`put` was given; None where it was not."""
        if not self._path(name).is_file():
            return None
        with np.load(self._path(name), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return json.loads(str(arrays.pop("numbers"))), arrays

    def kept(
        self, name: str, make: Callable[[], tuple[dict[str, Any], dict[str, np.ndarray]]]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What was put by that name; else what `make` gives, and keeps that."""
        found = self.get(name)
        if found is None:
            found = make()
            self.put(name, *found)
        return found

    def put(self, name: str, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps numbers and arrays."""
        data = io.BytesIO()
        np.savez(data, numbers=np.array(json.dumps(numbers)), **arrays)
        write_atomically(self._path(name), data.getvalue())


def _agree(these: Mapping[str, float | str], those: Mapping[str, float | str]) -> bool:
    """Whether numbers are the same, but for what an accelerator may sum in another order."""
    kinds, others = ({name: type(value) for name, value in of.items()} for of in (these, those))
    if kinds != others:
        return False
    return all(v == those[k] if isinstance(v, str) else np.isclose(v, those[k], 1e-3, 1e-3) for k, v in these.items())
