"""From a config to its cache: built, completed, repaired, or refused if it is something else's."""

import dataclasses
import gc
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Callable
from contextlib import nullcontext

import jax
import ml_collections

from mcm_jax import assets, distributed, sharding
from mcm_jax import base as base_lib
from mcm_jax import config as config_lib
from mcm_jax.base import BaseCard, load_base
from mcm_jax.cache import Cache, build, store
from mcm_jax.data import Folder, Scenes, find_source, open_source
from mcm_jax.data.inputs import PREPROCESSING
from mcm_jax.errors import Interrupted, UserError
from mcm_jax.files import check_writable
from mcm_jax.version import __version__


def precompute(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    check: Callable[[BaseCard], object] = lambda card: None,
    *,
    verify: bool = True,
) -> Cache:
    """Makes the config's cache of predictions, or completes or repairs the one that is there.

    Every process of a cluster calls this; they share the shards out, on one file system.

    Args:
      config: as configs/default.py has it; ``cache.mode`` does not matter.
      workdir: holds the cache, in ``cache/``, unless ``cache.path`` says otherwise. Nothing else is written there.
      check: is told of the base before anything is built, and may refuse it.
      verify: whether the checksums of a cache that is already there are compared, and damaged shards built again.

    Returns:
      The complete cache. One that is there already is only read: any number of runs may share it.

    Raises:
      UserError: bad input, another cache in the folder, a full disk: see its message. Complete shards stay.
      Interrupted: Ctrl-C; complete shards stay.
    """
    config_lib.check(config)
    sharding.check_batch_size(config.cache.batch_size, sharding.local_mesh(), "config.cache.batch_size")
    folder = config_lib.cache_folder(config, workdir)
    process = jax.process_index()
    there = store.Manifest.find(folder)
    if there and there.shards:
        check_made_of(config, folder, there)
        check(there.card)
        wrong = store.verify(folder, there.shards) if verify else {}
        if not wrong:
            print(f"{folder}: the cache is complete")
            return Cache(folder, verify=False)
        print(f"{store.describe_damage(folder, wrong, len(there.shards))}\nbuilding these again")
    if process == 0:
        check_writable(folder, "config.cache.path" if config.cache.path else "--workdir")
    distributed.synchronise("cache folder")
    with store.lock(folder) if process == 0 else nullcontext():
        there = store.Manifest.find(folder)  # again: another may have come first
        base = load_base(assets.resolve_base(config.base.path), config.base.dtype)
        check(base.card)
        source = open_source(
            config.data,
            "train",
            config_lib.modalities(config),
            *base.image_shape[:2],
            captions=base.is_text_conditional,
        )
        plan = _plan(config, base, len(source))
        if there:
            check_made_of(config, folder, there)
            plan = dataclasses.replace(plan, shard_examples=there.shard_examples)
        recipe = build.Recipe(
            base=base,
            source=source,
            modalities=config_lib.modalities(config),
            draws=config_lib.draws(config, base),
            dtype=config.cache.dtype,
            batch_size=config.cache.batch_size,
        )
        try:
            built = build.build(folder, plan, recipe)
        except KeyboardInterrupt:
            if jax.process_count() > 1:  # the others have to be told: see distributed.cluster
                raise
            raise Interrupted(
                f"{folder}: stopped; the same command goes on from the shards that are complete"
            ) from None
    del base, source, recipe
    gc.collect()  # training has the memory to itself
    cache = Cache(folder, verify=verify)
    shards = cache.manifest.shards
    print(
        f"{folder}: {len(cache):,} examples x {cache.manifest.draws} draws in {len(shards)} shards, "
        f"{sum(s['bytes'] for s in shards.values()) / 2**20:,.1f} MiB; {len(built)} shard(s) built now"
    )
    return cache


def open_cache(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    check: Callable[[BaseCard], object] = lambda card: None,
) -> Cache:
    """The config's cache, for training from it.

    Args:
      config: as configs/default.py has it.
      workdir: of the run.
      check: is told of the base before all else, and may refuse it.

    Raises:
      UserError: there is none, it is not complete, it is damaged (names each such shard), or it was made of something
        else than the config says (lists what differs).
    """
    folder = config_lib.cache_folder(config, workdir)
    manifest = store.Manifest.read(folder)
    check(manifest.card)
    check_made_of(config, folder, manifest)
    return Cache(folder, verify=config.cache.verify)


def _plan(config: ml_collections.ConfigDict, base: base_lib.Base, rows: int) -> store.Manifest:
    """The manifest of the config's cache, without its shards."""
    card, source = base.card, source_of(config, base.card)
    return store.Manifest(
        made_of=made_of(config, card, source.fingerprints()),
        base=card.to_json(),
        stamps={"base": base_stamp(config), "data": source.stamp()},
        examples=rows // config.data.views,
        views=config.data.views,
        draws=config.draws.count,
        shard_examples=max(1, config.cache.shard_draws // config.draws.count),
        versions={"mcm_jax": __version__, "jax": importlib.metadata.version("jax")},
    )


def made_of(config: ml_collections.ConfigDict, card: BaseCard, data: dict[str, str]) -> dict[str, str]:
    """All that decides the values in a cache, as texts."""
    schedule = hashlib.sha256(card.schedule.alphas_cumprod.tobytes() + card.schedule.prediction_type.encode())
    d = config.data
    views = f"{d.views}" if d.views == 1 else f"{d.views}, flip {d.flip}, crop {float(d.crop)}"
    views += f", seed {d.seed}" if d.crop < 1 else ""
    density = [float(part) / sum(config.draws.density) for part in config.draws.density]
    text = {"prompt_drop_rate": f"{float(d.prompt_drop_rate)}"} if card.is_text_conditional else {}
    return {
        "format": str(store.FORMAT),
        "preprocessing": str(PREPROCESSING),
        "base": card.fingerprint,
        "base.dtype": config.base.dtype,
        "schedule": schedule.hexdigest(),
        **{f"data.{name}": value for name, value in data.items()},
        "views": views,
        **text,
        **{f"modalities.{m.name}": f"{m.kind}, channels={m.channels}" for m in config_lib.modalities(config)},
        "draws.count": str(config.draws.count),
        "draws.seed": str(config.draws.seed),
        "draws.density": str(density),
        "draws.numbers": config_lib.draws(config, card).fingerprint(),
        "cache.dtype": config.cache.dtype,
    }


def known_card(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> BaseCard:
    """What is known of the config's base: by its cache if there is one, by loading it if not."""
    folder = config_lib.cache_folder(config, workdir)
    if (folder / store.MANIFEST).is_file():
        return store.Manifest.read(folder).card
    return base_lib.outline(assets.resolve_base(config.base.path), config.base.dtype).card


def check_made_of(config: ml_collections.ConfigDict, folder: pathlib.Path, there: store.Manifest) -> None:
    """Compares what a cache was made of with the config, the base's files and the data.

    Base and data need not be at hand, as training needs neither: then the cache is taken at its word, and this is
    printed. Files that have not changed since are not read again.

    Raises:
      UserError: the cache is of something else; lists what differs.
    """
    card = there.card
    stamp = base_stamp(config)
    if stamp is None:
        print(f"base {config.base.path!r} is not at hand: the cache says that it is of {card.name!r}")
    elif stamp != there.stamps.get("base") or config.base.dtype != there.made_of.get("base.dtype"):
        card = base_lib.outline(assets.resolve_base(config.base.path), config.base.dtype).card
    known = there.data
    if config.data.name == "folder" and not (pathlib.Path(config.data.path) / "train").exists():
        print(f"data {config.data.path!r} are not at hand: the cache is taken at its word")
        data = known
    else:
        source = source_of(config, card)
        data = known if source.stamp() == there.stamps.get("data") else source.fingerprints()
    wanted = made_of(config, card, data)
    if lines := store.differences(there.made_of, wanted):
        if [line.split(":")[0].strip() for line in lines] == ["draws.numbers"]:
            raise UserError(
                f"{folder}: this JAX ({jax.__version__}) draws other random numbers from the cache's seed than the one "
                f"that built it ({there.versions.get('jax')}), so its noise cannot be made again. Build it again in "
                f"another folder (config.cache.path), or go back to that JAX and its settings"
            )
        differs = "\n".join(lines)
        raise UserError(
            f"{folder}: the cache there has fingerprint {there.fingerprint[:16]}, this config wants "
            f"{store.fingerprint(wanted)[:16]}. They differ in\n{differs}\n"
            f"Take another folder (config.cache.path), or the values that the cache was made with"
        )


def source_of(config: ml_collections.ConfigDict, card: BaseCard) -> Scenes | Folder:
    """The training data, found but not read: for their fingerprints."""
    modalities = config_lib.modalities(config)
    return find_source(config.data, "train", modalities, *card.image_shape[:2], captions=card.is_text_conditional)


def base_stamp(config: ml_collections.ConfigDict) -> str | None:
    """SHA-256 of the names, sizes and times of a base's files; None where it is not at hand."""
    try:
        path = assets.resolve_base(config.base.path)
    except UserError:
        return None
    folder = base_lib.find_folder(path)
    if folder is None:
        return None
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    facts = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
