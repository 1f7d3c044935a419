"""Control without a picture of one's own: the base's own samples, with their conditions extracted, as a training set.

python -m mcm_jax.data synthesise --base=scenes-ddpm --out=DATA --count=2000 --extract=sketch,canny

For a base that takes prompts, --prompts names a file of one prompt a line: sample i has line i modulo their number, and
the prompt as its caption. What is there is not sampled again: the same command goes on after an interruption, and with
a larger count. The pictures are all in DATA/train.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import typing
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from mcm_jax import config, pictures, sampling, sharding
from mcm_jax.base import Base, BaseSettings
from mcm_jax.base.tokenizer import Cuts
from mcm_jax.data.extract import open_extractors
from mcm_jax.data.make import add_extract_argument, extract, pictures_in, write_png
from mcm_jax.errors import UserError, expect
from mcm_jax.files import check_writable, lock, user_path, write_atomically
from mcm_jax.pipeline import Pipeline
from mcm_jax.sampling import SamplingSettings
from mcm_jax.version import __version__

RECORD = "synthesised.json"
"""In DATA: the base, the seed and the settings that its pictures were sampled with."""

_OF_AN_MCM = (
    "guidance",
    "guidance_schedule",
    "modulate",
    "start",
    "end",
    "image_strength",
)  # settings of sampling that mean nothing without one


def synthesise(
    base: Base,
    out: str | os.PathLike,
    count: int,
    *,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    settings: SamplingSettings | None = None,
) -> int:
    """Writes a base's samples as ``OUT/train/image/000000.png`` ..., with captions if there are prompts.

    Picture i depends on the seed, i and the settings alone. Batches are cut at the same places whatever is missing, so
    an interrupted run ends with the same bytes as one that was not, on as many devices of the same kind.

    Args:
      base: the frozen model; its params lie on a mesh of this process's devices (:func:`mcm_jax.sharding.place`), or
        whole on one.
      out: the folder.
      count: how many pictures there shall be.
      seed: of the noise.
      prompts: for a text-conditional base: picture i has ``prompts[i % len(prompts)]``.
      settings: how to sample; the guidance of an MCM means nothing here.

    Returns:
      How many pictures were sampled, those that were not there.

    Raises:
      UserError: bad input, or a folder whose pictures were sampled otherwise.
    """
    settings, out = settings or SamplingSettings(), pathlib.Path(out)
    expect(count >= 1, "--count", "at least 1", count)
    expect(0 <= seed < 2**32, "--seed", "in 0..4294967295", seed)
    settings.check_for(base.schedule)
    if base.is_text_conditional and not prompts:
        raise UserError(f"--prompts: the base {base.name!r} takes prompts; give a file of one prompt a line")
    if prompts and not base.is_text_conditional:
        raise UserError(f"--prompts: the base {base.name!r} is unconditional, it has no text encoder")
    check_writable(out, "--out")
    with lock(out, "sampling pictures there", "--out"):
        _check_record(out, base, seed, prompts, settings)
        return _sample_missing(base, out, count, seed, prompts, settings)


def _sample_missing(
    base: Base, out: pathlib.Path, count: int, seed: int, prompts: Sequence[str] | None, settings: SamplingSettings
) -> int:
    mesh = sharding.local_mesh() if (found := sharding.mesh_of(base.params)) is None else found
    pipeline = Pipeline(base, (), settings, mesh)
    batch_size = pipeline.filled(settings.batch_size)
    images, captions = out / "train" / "image", out / "train" / "caption"
    for folder in (images, captions) if prompts else (images,):
        folder.mkdir(parents=True, exist_ok=True)
    files = [images / f"{i:06d}.png" for i in range(count)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    starts = sorted({i // batch_size * batch_size for i in missing})
    keys = sampling.sample_keys(seed, -(-count // batch_size) * batch_size)  # the last batch is sampled in full
    cuts = Cuts()
    with tqdm(desc="samples", total=count, initial=count - len(missing), unit=" pictures", leave=False) as progress:
        for start in starts:
            rows = np.arange(start, start + batch_size)
            contexts, texts = {}, []
            if prompts:
                texts, cut = [prompts[i % len(prompts)] for i in rows], {}
                embedded = np.asarray(base.embed_text(pipeline.base.params, [*texts, settings.negative_prompt], cut))
                cuts.add(texts, cut)
                contexts = {"context": embedded[:-1]}
                if pipeline.is_guided(settings):
                    contexts["negative_context"] = np.repeat(embedded[-1:], batch_size, axis=0)
            values = pipeline({}, keys[rows], **contexts)
            if odd := [str(i) for i, fine in zip(rows, np.isfinite(values).all((1, 2, 3)), strict=True) if not fine]:
                raise UserError(
                    f"pictures {', '.join(odd[:8])}{', ...' if len(odd) > 8 else ''} came out as NaN, and nothing of "
                    f"their batch was written; take --dtype=float32, or less text guidance"
                )
            shown = pictures.to_uint8(values)
            for i in (i for i in rows if i < count and not files[i].exists()):
                if prompts:  # before the picture, which says that both are there
                    write_atomically(captions / f"{i:06d}.txt", f"{texts[i - start]}\n".encode())
                write_png(files[i], Image.fromarray(shown[i - start]))
                progress.update()
    cuts.warn(stacklevel=3)
    return len(missing)


def _check_record(
    out: pathlib.Path, base: Base, seed: int, prompts: Sequence[str] | None, settings: SamplingSettings
) -> None:
    """Notes how pictures are sampled; refuses a folder of others, which would be mixed with these."""
    how = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _OF_AN_MCM}
    if not base.is_text_conditional:
        how = {k: v for k, v in how.items() if k not in ("text_guidance", "text_rescale", "negative_prompt")}
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest() if prompts else None
    how["timesteps"] = list(settings.timesteps)  # as JSON has them
    now = {"base": base.name, "fingerprint": base.fingerprint, "seed": seed, "prompts_sha256": digest, **how}
    path, begun = out / RECORD, any((out / "train").glob("image/*"))
    if not (path.is_file() and begun):  # of a call that ended before its first picture, nothing is to be kept
        if begun:
            raise UserError(
                f"{out / 'train' / 'image'}: holds pictures that this command has not sampled; take a new --out"
            )
        versions = {"mcm_jax": __version__, "jax": jax.__version__}
        record = now | {"device": jax.devices()[0].device_kind, "versions": versions}
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
        return
    try:
        before = json.loads(path.read_text())
        differs = [f"  {k}: there {before[k]!r}, now {v!r}" for k, v in now.items() if k in before and before[k] != v]
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: damaged ({e}); take a new --out") from e
    if differs:
        listed = "\n".join(differs)
        raise UserError(f"{out}: its pictures were sampled otherwise:\n{listed}\nTake the same values, or a new --out")


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a text file in UTF-8, one a line; empty lines are left out. Raises UserError where it has none."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {path}: no text file in UTF-8 ({e}); expected one prompt a line") from e
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise UserError(f"--prompts {path}: holds no prompts; expected one a line")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of :func:`main`."""
    add = parser.add_argument
    add("--base", required=True, help="a folder in diffusers format, a shipped one's name, or one on the hub")
    add("--dtype", default=BaseSettings.dtype, help="of the base (default: %(default)s)")
    add("--out", type=user_path, required=True, metavar="DATA", help="the folder of pairs, new or to go on with")
    add("--count", type=int, required=True, help="how many pictures there shall be")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--prompts", metavar="FILE", help="one prompt a line, for bases that take them")
    meanings, types = config.describe(SamplingSettings), typing.get_type_hints(SamplingSettings)
    for field in dataclasses.fields(SamplingSettings):
        if field.name not in _OF_AN_MCM:
            said = f"{meanings[field.name]} (default: {field.default!r})".replace("%", "%%")
            several = types[field.name] == tuple[float, ...]
            how = {"type": float, "nargs": "*"} if several else {"type": types[field.name]}
            add(f"--{field.name}", default=field.default, help=said, **how)
    add_extract_argument(parser)


def main(args: argparse.Namespace) -> None:
    """Runs the command. Raises UserError where something is wrong."""
    extractors = open_extractors(args.extract)
    names = [f.name for f in dataclasses.fields(SamplingSettings) if f.name not in _OF_AN_MCM]
    given = {name: getattr(args, name) for name in names}
    settings = SamplingSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    prompts = None if args.prompts is None else read_prompts(args.prompts)
    base = BaseSettings(args.base, args.dtype).load(sharding.local_mesh())
    sampled = synthesise(base, args.out, args.count, seed=args.seed, prompts=prompts, settings=settings)
    folder = args.out / "train" / "image"
    print(f"{len(pictures_in(folder))} pictures in {folder}, {sampled} of them sampled now")
    extract(args.out, extractors, args.workers)
