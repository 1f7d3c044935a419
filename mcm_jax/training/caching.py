"""From a config to its cache: built, completed, repaired, or refused if it is something else's."""

import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax

from mcm_jax import config as config_lib
from mcm_jax import distributed, sharding
from mcm_jax.base import Base, BaseCard
from mcm_jax.cache import Cache, build, store
from mcm_jax.data import DataSettings, Emoji, Folder, Scenes
from mcm_jax.data.inputs import PREPROCESSING
from mcm_jax.data.unreadable import said
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import check_writable
from mcm_jax.modalities import Modality
from mcm_jax.training.settings import RunSettings, read_run
from mcm_jax.version import __version__, source_digest


def precompute(config: Any, workdir: str | os.PathLike, *, verify: bool = True) -> Cache:
    """Makes the config's cache of predictions: :func:`build_cache`.

    Args:
      config: as configs/default.py has it; ``cache.mode`` does not matter.
      workdir: holds the cache, in ``cache/``, unless ``cache.path`` says otherwise. Nothing else is written there.
      verify: whether the checksums of a cache that is already there are compared.
    """
    settings = read_run(config, workdir)
    agree_on(settings)
    if not (pathlib.Path(workdir).expanduser() / config_lib.FILE).exists():
        settings.check_new()
    return build_cache(settings, workdir, verify=verify)


def agree_on(settings: RunSettings) -> None:
    """Refuses processes of a cluster that do not run the same config by the same code. Raises UserError on all."""
    distributed.check_watched()
    code = {"version of mcm-jax": __version__, "source files of mcm-jax": source_digest()[:16]}
    distributed.agree({f"config.{k}": repr(v) for k, v in config_lib.flatten(settings).items()} | code)


def build_cache(
    settings: RunSettings,
    workdir: str | os.PathLike,
    check: Callable[[BaseCard], object] = lambda card: None,
    *,
    verify: bool = True,
) -> Cache:
    """Makes a run's cache of predictions, or completes or repairs the one that is there.

    Every process of a cluster calls this; they share the shards out, on one file system. Where the run shall be
    evaluated on held-out examples, their predictions are made too: a small cache within.

    Args:
      settings: of the run.
      workdir: of the run.
      check: is told of the base before anything is built, and may refuse it.
      verify: whether the checksums of a cache that is already there are compared, and damaged shards built again.

    Returns:
      The complete cache. One that is there already is only read: any number of runs may share it.

    Raises:
      UserError: bad input, another cache in the folder, a full disk: see its message. Complete shards stay.
      Interrupted: Ctrl-C, or SIGTERM in a script; complete shards stay.
    """
    folder = settings.cache.folder(workdir)
    mesh = sharding.local_mesh(settings.mesh)
    sharding.check_batch_size(settings.cache.batch_size, mesh, "config.cache.batch_size")
    loaded = functools.cache(lambda: settings.base.load(mesh))  # once, and not where all is there
    cache = _build(settings, "train", folder, loaded, check, verify)
    if settings.train.evaluate_every and settings.data.has_test_split():
        held_out = held_out_folder(settings, workdir)
        if (held_out / store.MANIFEST).is_file() or os.access(folder, os.W_OK):  # a shared cache may be read-only
            _build(settings.held_out(), "test", held_out, loaded, check, verify)
    loaded.cache_clear()
    gc.collect()  # training has the memory to itself
    return cache


def _build(
    settings: RunSettings,
    split: str,
    folder: pathlib.Path,
    loaded: Callable[[], Base],
    check: Callable[[BaseCard], object],
    verify: bool,
) -> Cache:
    """The cache of one split."""
    first = distributed.is_first()
    there = store.Manifest.find(folder)
    distributed.agree({f"{folder}, complete": str(bool(there and there.shards))})
    if there and there.shards:
        check_made_of(settings, folder, there, split)
        check(there.card)
        mine = store.verify(folder, there.shards) if verify else {}
        wrong = dict(item for each in distributed.everyones(mine).values() for item in each.items())
        if not wrong:
            print(f"{folder}: the cache is complete")
            return Cache(folder, verify=False)
        print(f"{store.describe_damage(folder, wrong, len(there.shards))}\nbuilding these again")
    if first:
        check_writable(folder, "config.cache.path" if settings.cache.path else "--workdir")
    distributed.synchronise("cache folder")
    with store.lock(folder) if first else nullcontext():
        there = store.Manifest.find(folder)  # again: another may have come first
        base = loaded()
        check(base.card)
        source = settings.data.open(split, settings.modalities.shown, base.card, size=_size(settings, split))
        plan = _plan(settings, base.card, len(source), split)
        distributed.agree({"the data": store.fingerprint(plan.made_of)})
        if there:
            check_made_of(settings, folder, there, split)
            plan = dataclasses.replace(plan, shard_examples=there.shard_examples)
        recipe = build.Recipe(
            base=base,
            source=source,
            modalities=settings.modalities.shown,
            draws=settings.draws_for(base.card),
            dtype=settings.cache.dtype,
            batch_size=settings.cache.batch_size,
            mesh=sharding.local_mesh(settings.mesh),
            grid=settings.mcm.modulator(settings.modalities.shown, base).grid(base),
        )
        try:
            built = build.build(folder, plan, recipe)
        except KeyboardInterrupt:
            if jax.process_count() > 1:
                raise  # a failure, which ends the others, too: they would wait for this process
            raise Interrupted(
                f"{folder}: stopped; the same command goes on from the shards that are complete"
            ) from None
    cache = Cache(folder, verify=verify)
    shards = cache.manifest.shards
    print(
        f"{folder}: {len(cache):,} examples x {cache.manifest.draws} draws in {len(shards)} shards, "
        f"{sum(s['bytes'] for s in shards.values()) / 2**20:,.1f} MiB; {len(built)} shard(s) built now"
    )
    if skipped := cache.manifest.skipped:
        print(said(skipped, len(cache), getattr(source, "names", ())))
    return cache


def open_cache(
    settings: RunSettings,
    workdir: str | os.PathLike,
    check: Callable[[BaseCard], object] = lambda card: None,
) -> Cache:
    """A run's cache, for training from it.

    Args:
      settings: of the run.
      workdir: of the run.
      check: is told of the base before all else, and may refuse it.

    Raises:
      UserError: there is none, it is not complete, it is damaged (names each such shard), or it was made of something
        else than the config says (lists what differs).
    """
    folder = settings.cache.folder(workdir)
    manifest = store.Manifest.read(folder)
    check(manifest.card)
    check_made_of(settings, folder, manifest)
    return Cache(folder, verify=settings.cache.verify)


def held_out_folder(settings: RunSettings, workdir: str | os.PathLike) -> pathlib.Path:
    """Where the predictions for a run's held-out examples are, or are to be: ``held_out-N`` in its cache.

    So ``train.held_out`` may change on the way. Where ``held_out``, as it was called first, holds what the config says,
    that is it.

    Raises:
      UserError: the old one's manifest is damaged.
    """
    folder = settings.cache.folder(workdir)
    named, old = folder / f"{store.HELD_OUT}-{settings.train.held_out}", folder / store.HELD_OUT
    if (named / store.MANIFEST).is_file() or not (there := store.Manifest.find(old)):
        return named
    return old if there.made_of == _wanted(settings.held_out(), there, "test") else named


def open_held_out(settings: RunSettings, workdir: str | os.PathLike) -> Cache | None:
    """The cache of held-out examples beside a run's; None, and a word on why, where there is none.

    Raises:
      UserError: it is damaged, or was made of something else than the config says.
    """
    folder, held_out = held_out_folder(settings, workdir), settings.held_out()
    if not (folder / store.MANIFEST).is_file():
        why = "precompute.py makes them" if settings.data.has_test_split() else "the data have no test split"
        print(
            f"the held-out loss is left out: {folder.parent} has no predictions for {settings.train.held_out} held-out "
            f"examples ({why})"
        )
        return None
    check_made_of(held_out, folder, store.Manifest.read(folder), "test")
    return Cache(folder, verify=settings.cache.verify)


def _size(settings: RunSettings, split: str) -> int | None:
    """How many examples at most; of a folder's training split all."""
    return settings.data.size if split == "test" else None


def _plan(settings: RunSettings, card: BaseCard, rows: int, split: str) -> store.Manifest:
    """The manifest of a cache, without its shards."""
    source = _find(settings, card, split)
    return store.Manifest(
        made_of=made_of(settings, card, settings.data.fingerprints(source)),
        base=card.to_json(),
        stamps={"base": settings.base.stamp(), "data": source.stamp()},
        examples=rows // settings.data.views,
        views=settings.data.views,
        draws=settings.draws.count,
        shard_examples=max(1, settings.cache.shard_draws // settings.draws.count),
        versions={"mcm_jax": __version__, "jax": importlib.metadata.version("jax")},
    )


def _find(settings: RunSettings, card: BaseCard, split: str) -> Scenes | Emoji | Folder:
    return settings.data.find(split, settings.modalities.shown, card, size=_size(settings, split))


def made_of(settings: RunSettings, card: BaseCard, data: dict[str, str]) -> dict[str, str]:
    """All that decides the values in a cache, as texts."""
    schedule = hashlib.sha256(card.schedule.alphas_cumprod.tobytes() + card.schedule.prediction_type.encode())
    d = settings.data
    views = f"{d.views}" if d.views == 1 else f"{d.views}, flip {d.flip}, crop {float(d.crop)}"
    views += f", jitter {float(d.jitter)}" if d.jitter else ""
    views += f", seed {d.seed}" if d.crop < 1 or d.jitter else ""
    density = [float(part) / sum(settings.draws.density) for part in settings.draws.density]
    text = {"prompt_drop_rate": f"{float(d.prompt_drop_rate)}"} if card.is_text_conditional else {}
    offset = {"draws.offset": f"{float(settings.draws.offset)}"} if settings.draws.offset else {}
    full = {"conditions": "at the pictures' resolution"} if _finer(settings, card) else {}
    return {
        "format": str(store.FORMAT),
        "preprocessing": str(PREPROCESSING),
        "base": card.fingerprint,
        "base.dtype": settings.base.dtype,
        "schedule": schedule.hexdigest(),
        **{f"data.{name}": value for name, value in data.items()},
        **({"partial": "True"} if d.partial else {}),
        "views": views,
        **text,
        **{f"modalities.{m.name}": _facts(m) for m in settings.modalities.shown},
        **full,
        "draws.count": str(settings.draws.count),
        "draws.seed": str(settings.draws.seed),
        "draws.density": str(density),
        **offset,
        "draws.numbers": settings.draws_for(card).fingerprint(),
        "cache.dtype": settings.cache.dtype,
    }


def _finer(settings: RunSettings, card: BaseCard) -> bool:
    """Whether conditions are kept finer than the latent grid."""
    return settings.mcm.conditions == "encoder" and not card.is_of_pixels


def _facts(m: Modality) -> str:
    return f"{m.kind}, channels={m.channels}" + ("" if m.ignore == -1 else f", ignore={m.ignore}")


def shared_by(settings: RunSettings, card: BaseCard) -> str:
    """A short name, the same for all runs on a base that one cache can serve.

    It is made of the settings that :func:`made_of` depends on, so that the data need not be at hand. That some of them
    may not matter, such as ``data.crop`` with one view, or ``data.held_out_share`` while a folder is not there that has
    a test split, costs a cache.
    """
    s, without_text = settings, {"prompt_drop_rate": DataSettings.prompt_drop_rate}
    data = s.data if card.is_text_conditional else dataclasses.replace(s.data, **without_text)
    parts = [s.base, data, s.draws, s.modalities.shown, s.cache.dtype]
    parts += [_facts(m) for m in s.modalities.shown if m.ignore != -1]
    parts += ["partial"] if s.data.partial else []
    parts += ["full resolution"] if _finer(s, card) else []
    parts += [f"jitter={float(s.data.jitter)}"] if s.data.jitter else []
    parts += [f"held_out_share={float(s.data.shares_out)}"] if s.data.shares_out else []
    return store.fingerprint({str(i): repr(part) for i, part in enumerate(parts)})[:8]


def known_card(settings: RunSettings, workdir: str | os.PathLike) -> BaseCard:
    """What is known of the config's base: by its cache if there is one, by loading it if not."""
    folder = settings.cache.folder(workdir)
    if (folder / store.MANIFEST).is_file():
        return store.Manifest.read(folder).card
    return settings.base.outline().card


def _wanted(settings: RunSettings, there: store.Manifest, split: str) -> dict[str, str]:
    """What a cache is to be made of, as far as base and data are at hand; else as it says itself."""
    card, stamp = there.card, settings.base.stamp()
    changed = stamp != there.stamps.get("base") or settings.base.dtype != there.made_of.get("base.dtype")
    if stamp is not None and changed:
        card = settings.base.outline().card
    data = there.data
    if settings.data.is_at_hand(split):
        source = _find(settings, card, split)
        data = settings.data.fingerprints(source, data if source.stamp() == there.stamps.get("data") else None)
    wanted = made_of(settings, card, data)
    if card.is_of_pixels and "conditions" in there.made_of:  # some caches of pixels say it, where it is nothing else
        wanted["conditions"] = there.made_of["conditions"]
    return wanted


def check_made_of(settings: RunSettings, folder: pathlib.Path, there: store.Manifest, split: str = "train") -> None:
    """Compares what a cache was made of with the config, the base's files and the data.

    Base and data need not be at hand, as training needs neither: then the cache is taken at its word, and this is
    printed. Files that have not changed since are not read again.

    Raises:
      UserError: the cache is of something else; lists what differs.
    """
    if settings.base.stamp() is None:
        print(f"base {settings.base.path!r} is not at hand: the cache says that it is of {there.card.name!r}")
    if not settings.data.is_at_hand(split):
        print(f"data {settings.data.path!r} are not at hand: the cache is taken at its word")
    wanted = _wanted(settings, there, split)
    if lines := store.differences(there.made_of, wanted):
        if [line.split(":")[0].strip() for line in lines] == ["draws.numbers"]:
            raise UserError(
                f"{folder}: this JAX ({jax.__version__}) draws other random numbers from the cache's seed than the one "
                f"that built it ({there.versions.get('jax')}), so its noise cannot be made again. Build it again in "
                f"another folder (config.cache.path), or go back to that JAX and its settings"
            )
        differs = "\n".join(lines)
        if settings.data.splits_itself() and any(line.strip().startswith("data.") for line in lines):
            differs += (
                "\nA cache that is older than config.data.held_out_share is of all pairs of a folder without a test "
                "split: 0 trains on all"
            )
        raise UserError(
            f"{folder}: the cache there has fingerprint {there.fingerprint[:16]}, this config wants "
            f"{store.fingerprint(wanted)[:16]}. They differ in\n{differs}\n"
            f"Take another folder (config.cache.path), or the values that the cache was made with"
        )
