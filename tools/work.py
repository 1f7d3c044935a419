"""The folder in which a tool keeps its work: a second start goes on with it, if it is of the same recipe."""

import json
import pathlib
from typing import Any

from mcm_jax.files import write_atomically


def claim(work: pathlib.Path, recipe: dict[str, Any]) -> None:
    """Makes a folder that of a recipe. Exits where it is another's, or nobody knows whose: files are found by names."""
    work.mkdir(parents=True, exist_ok=True)
    file, now = work / "work_of.json", json.loads(json.dumps(recipe))
    if not file.exists():
        if any(work.iterdir()):
            raise SystemExit(f"--work={work} holds files of an unknown recipe; take an empty folder")
        write_atomically(file, (json.dumps(now, indent=2) + "\n").encode())
    elif (there := json.loads(file.read_text())) != now:
        keys = sorted(key for key in {*there, *now} if there.get(key) != now.get(key))
        raise SystemExit(f"--work={work} holds work of another recipe ({', '.join(keys)} differ); take another --work")
