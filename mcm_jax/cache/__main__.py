"""What is in a cache, and is it whole?

python -m mcm_jax.cache inspect FOLDER
python -m mcm_jax.cache verify FOLDER
"""

import argparse
import pathlib
import sys

from mcm_jax.cache.reader import Cache
from mcm_jax.cache.store import MANIFEST, REPAIR, Manifest, describe_damage, verify
from mcm_jax.errors import UserError


def inspect(folder: pathlib.Path) -> str:
    """A report of what a cache holds. Raises UserError where there is none, or a shard's header is damaged."""
    cache = Cache(folder, verify=False)
    m, card = cache.manifest, cache.card
    size = sum(shard["bytes"] for shard in m.shards.values())
    lines = [
        f"{folder}: a cache of {m.examples:,} examples x {m.draws} draws ({m.views} view(s) each)",
        f"{size / 2**20:,.1f} MiB in {len(m.shards)} shards, {size / m.examples / 1024:,.1f} KiB an example",
        f"fingerprint {m.fingerprint}",
        f"base {card.name!r}: U-Net of {card.unet_parameters:,} parameters, latents "
        f"{'x'.join(map(str, card.latent_shape))}, images {'x'.join(map(str, card.image_shape))}",
        "",
        "made of",
        *(f"  {key:28}{value}" for key, value in sorted(m.made_of.items())),
        "",
        "of each example",
        *(
            f"  {name:28}{m.draws if name.startswith('eps') else m.views} x {dtype}{list(shape)}"
            for name, (dtype, shape) in cache.fields.items()
        ),
        "",
        "built with " + ", ".join(f"{name} {version}" for name, version in sorted(m.versions.items())),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; exits with status 1 and one message where a cache is damaged or there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m mcm_jax.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("inspect", "verify"), help="what is in it; or: read all, compare checksums")
    parser.add_argument("folder", type=pathlib.Path, help="of the cache, e.g. runs/scenes/cache")
    args = parser.parse_args(arguments)
    try:
        if args.command == "inspect":
            print(inspect(args.folder))
            return
        m = Manifest.read(args.folder)
        total = sum(shard["bytes"] for shard in m.shards.values())
        if wrong := verify(args.folder, m.shards):
            raise UserError(f"{describe_damage(args.folder, wrong, len(m.shards))}\n{REPAIR}")
        Cache(args.folder, verify=False)  # the headers, against the manifest
        print(f"{args.folder}: {len(m.shards)} shards, {total / 2**20:,.1f} MiB, all as {MANIFEST} says")
    except UserError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
