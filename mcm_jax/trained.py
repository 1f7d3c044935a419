"""The folder that holds a trained MCM: what is written, what is read, and what belongs together.

It has ``config.json`` and ``mcm.safetensors`` (averaged params, float32; its header names the base, its fingerprint,
and what a fine-tune of it has in common with it). A workdir is such a folder while it trains and after; the shipped
MCMs are folders with nothing else.
"""

import dataclasses
import hashlib
import pathlib
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from mcm_jax import assets
from mcm_jax import config as config_lib
from mcm_jax.base import Base, BaseCard, BaseSettings
from mcm_jax.data import DataSettings
from mcm_jax.errors import UserError
from mcm_jax.files import write_atomically
from mcm_jax.mcm import MCMSettings, Modulator
from mcm_jax.modalities import ModalitiesSettings
from mcm_jax.sampling import SamplingSettings
from mcm_jax.sharding import MeshSettings

WEIGHTS = "mcm.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What a folder's ``config.json`` says of its MCM; of how it was trained the data set alone, for its classes."""

    base: BaseSettings
    modalities: ModalitiesSettings
    mcm: MCMSettings
    sampling: SamplingSettings
    data: DataSettings = config_lib.setting(DataSettings(), before=DataSettings())
    mesh: MeshSettings = config_lib.setting(MeshSettings(), before=MeshSettings())


class Trained(NamedTuple):
    """An MCM for a base.

    Attributes:
      modulator: its network and settings.
      params: of the network; None where there are none, and it does nothing.
      step: how long it was trained.
      name: what messages call it: the folder it is from.
      data: what it was trained on, which knows the names and colours of classes; None where nobody asks.
    """

    modulator: Modulator
    params: Any | None = None
    step: int = 0
    name: str = ""
    data: DataSettings | None = None


def save_mcm(folder: pathlib.Path, params: Any, *, base: Base | BaseCard, step: int) -> None:
    """Writes ``mcm.safetensors`` into a folder; a file that was there is replaced when the new one is complete.

    Args:
      folder: where, beside ``config.json``.
      params: of the MCM.
      base: what it was trained for.
      step: how long, for the record.
    """
    flat = {k: np.asarray(v, np.float32) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
    metadata = {"base": base.name, "fingerprint": base.fingerprint, "step": str(step), **_diffusion(base)}
    write_atomically(folder / WEIGHTS, safetensors.numpy.save(flat, metadata))


def _diffusion(base: Base | BaseCard) -> dict[str, str]:
    """What an MCM needs its base to be, whatever its weights: a fine-tune has the same."""
    abar = base.schedule.alphas_cumprod
    digest = hashlib.sha256(np.asarray(abar, "<f4").tobytes()).hexdigest()
    schedule = f"{len(abar)} timesteps, alphas_cumprod {abar[0]:.6f} to {abar[-1]:.6f}, SHA-256 {digest[:16]}"
    return {"schedule": schedule, "latent_shape": "x".join(map(str, base.latent_shape))}


def check_same_shapes(found: dict[str, Any], expected: dict[str, Any], source: str) -> None:
    """Raises UserError, listing both sides, unless two MCMs have the same params; the values are shapes."""
    lines = [f"  missing there: {k} {tuple(v)}" for k, v in expected.items() if k not in found]
    lines += [f"  only there: {k} {tuple(v)}" for k, v in found.items() if k not in expected]
    lines += [
        f"  {k}: there {tuple(found[k])}, expected {tuple(v)}"
        for k, v in expected.items()
        if k in found and tuple(found[k]) != tuple(v)
    ]
    if lines:
        more = [f"  ... and {len(lines) - 12} more"] if len(lines) > 12 else []
        differs = "\n".join(lines[:12] + more)
        raise UserError(f"{source} holds another MCM than the config describes:\n{differs}")


def read_mcm(
    path: pathlib.Path, like: Any, base: Base | BaseCard, accept: BaseSettings | None = None, whose: str = ""
) -> tuple[Any, int]:
    """Reads the params of an MCM, and how long it was trained.

    Args:
      path: the file.
      like: params, or shapes, of its structure.
      base: the base that it shall work on.
      accept: takes another base than it was trained on, with one warning, where noise schedule and latents are the
        same; and says which base that was, which is looked at where the file is older than these in its header.
      whose: the other MCM that the base is of, which this one shall act together with.

    Raises:
      UserError: the file is not of this MCM, or of another base: lists what differs.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; train.py writes it with its first checkpoint")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            found = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path}: corrupt or cut short ({e}); export or train it again") from e
    if metadata.get("fingerprint") != base.fingerprint:
        _check_accepted(path, metadata, base, accept, whose)
    expected = traverse_util.flatten_dict(like, sep="/")
    check_same_shapes({k: v.shape for k, v in found.items()}, {k: v.shape for k, v in expected.items()}, str(path))
    return traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in found.items()}, sep="/"), int(
        metadata.get("step", 0)
    )


def _check_accepted(
    path: pathlib.Path, metadata: dict[str, str], base: Base | BaseCard, accept: BaseSettings | None, whose: str
) -> None:
    """Warns of a base that an MCM was not trained on. Raises UserError unless it is accepted, and can be."""
    found, now = metadata.get("fingerprint", ""), _diffusion(base)
    trained_on = f"{path} was trained on the base {metadata.get('base')!r} with fingerprint {found[:16]}"
    other = f"the base {base.name!r}{f' of {whose}' if whose else ''} has {base.fingerprint[:16]}"
    if accept is None:
        together = f"Sample with it and {whose} one at a time, MCMs act together on one base"
        alone = "Set base.path to the base that it was trained on"
        raise UserError(
            f"{trained_on}, but {other}. {together if whose else alone}; sample.py and evaluate.py take a fine-tune "
            f"of that base with --accept_base"
        )
    then = {k: metadata[k] for k in now if k in metadata} or _diffusion_of(accept, found)
    if lines := [f"  {k}: there {then[k]}, here {v}" for k, v in now.items() if then.get(k, v) != v]:
        differs = "\n".join(lines)
        raise UserError(f"{trained_on}; {other}, and is no fine-tune of it:\n{differs}\nTake the MCM's own base")
    unknown = ""
    if not then:
        unknown = (
            "; whether it has the same noise schedule and latents is not known, for the file does not say it, and its "
            "own base is not where config.json says"
        )
    warnings.warn(f"{trained_on}; {other} and is taken for a fine-tune of it{unknown}", stacklevel=4)


def _diffusion_of(settings: BaseSettings, fingerprint: str) -> dict[str, str]:
    """:func:`_diffusion` of the base with this fingerprint, if settings lead to it; else nothing."""
    try:
        base = settings.outline() if settings.stamp() else None  # never downloaded for this alone
    except UserError:
        return {}
    return _diffusion(base) if base and base.fingerprint == fingerprint else {}


def start_from(folder: str, settings: MCMSettings, modulator: Modulator, card: BaseCard) -> Any:
    """Params that a new training begins with: those of a trained MCM of the same network, on the same base.

    Modalities are matched by name. What the network makes of others than the trained one knew starts at zero: it begins
    as that MCM does without them.

    Args:
      folder: a workdir, or the name of a shipped MCM.
      settings: of the new MCM.
      modulator: the new MCM.
      card: of the base.

    Raises:
      UserError: another base, another network (lists what differs), a modality of the same name and another kind.
    """
    path = assets.resolve(folder)
    found = config_lib.load(ModelSettings, path, others=True)
    where = f"config.train.init_from={folder!r}"
    there, wanted = config_lib.flatten(found.mcm), config_lib.flatten(settings)
    if card.is_of_pixels:  # both ways to see conditions are the same
        wanted["conditions"] = there["conditions"]
    # Of a bound that nothing is held to, any value is the same.
    wanted["x0_clip"], there["x0_clip"] = (m.x0_bound(card) * ("x0" in m.inputs) for m in (settings, found.mcm))
    if lines := [
        f"  mcm.{k}: there {there[k]!r}, now {v!r}" for k, v in wanted.items() if there[k] != v and k in _MATHS
    ]:
        differs = "\n".join(lines)
        raise UserError(f"{where} is an MCM of another network:\n{differs}\nTake the same values, or another MCM")
    known = {m.name: m for m in found.modalities.shown}
    # Another value for unknown (`ignore`) is no other channel.
    same = [m for m in modulator.modalities if m.name in known]
    if odd := [m for m in same if (m.kind, m.channels) != (known[m.name].kind, known[m.name].channels)]:
        old = known[odd[0].name]
        raise UserError(
            f"{where} knows the modality {old.name} as {old.kind} of {old.channels} channel(s), this config as "
            f"{odd[0].kind} of {odd[0].channels}. Give it another name here, so that it starts anew"
        )
    trained = found.mcm.modulator(found.modalities.shown, card)
    like, wanted = trained.shapes(card), modulator.shapes(card)
    params, _ = read_mcm(path / WEIGHTS, like, card)
    first = ("encoder", "down_0", "conv") if "encoder" in params else ("unet", "conv_in")
    flat = traverse_util.flatten_dict(params)
    before = np.asarray(flat[*first, "kernel"])
    kernel = np.zeros(traverse_util.flatten_dict(wanted)[*first, "kernel"].shape, np.float32)
    places = [_channels(m, card.latent_shape[-1], "encoder" in params) for m in (trained, modulator)]
    for name in places[0].keys() & places[1].keys():
        kernel[:, :, places[1][name]] = before[:, :, places[0][name]]
    return traverse_util.unflatten_dict(flat | {(*first, "kernel"): jnp.asarray(kernel)})


# What two MCMs must have in common for the params of one to mean the same in the other.
_MATHS = {f.name for f in dataclasses.fields(MCMSettings)} - {"dtype", "remat"}


def _channels(modulator: Modulator, depth: int, has_encoder: bool) -> dict[str, slice]:
    """Which channels of the convolution that sees the conditions are whose; '' is all that is no modality."""
    begin = 0 if has_encoder else depth * len(modulator.module.inputs)
    found = {"": slice(0, begin)}
    for m in modulator.modalities:
        found[m.name] = slice(begin, begin + m.channels + 1)
        begin += m.channels + 1
    return found
