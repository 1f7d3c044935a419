"""What ships with the package: bases, MCMs, nets that judge, a data set. Each folder holds its recipe."""

import pathlib
import re

from mcm_jax.errors import UserError

_ROOT = pathlib.Path(__file__).parent


def shipped() -> list[str]:
    """Names of the shipped folders."""
    return sorted(p.name for p in _ROOT.iterdir() if p.is_dir() and not p.name.startswith(("_", ".")))


def resolve_base(path: str) -> str:
    """What :func:`mcm_jax.load_base` takes for a config's ``base.path``: as :func:`resolve`, or a hub name."""
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not pathlib.Path(path).parent.exists()
    return path if is_hub_name else str(resolve(path))


def resolve(path: str) -> pathlib.Path:
    """Returns the folder of ``path``: one on disk, or else the shipped one of this name.

    Raises:
      UserError: there is neither.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.exists():
        return folder
    if (_ROOT / path).is_dir() and path in shipped():
        return _ROOT / path
    raise UserError(f"{path!r} is neither a folder nor a shipped name; shipped are {', '.join(shipped())}")
