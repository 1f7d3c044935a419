"""Writes a layout's downloads as a data set of TensorFlow Datasets: array_record files that random access reads.

TensorFlow is not needed: the builder is TFDS' ``ShardBasedBuilder``, whose records keep their order and go straight to
their files (``GeneratorBasedBuilder`` shuffles, and from 1 GB on does it by TensorFlow's files), and its images are
bytes of picture files, which nothing encodes.
"""

import dataclasses
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard
from mcm_jax.data.tfds.records import library
from mcm_jax.errors import UserError
from mcm_jax.files import check_writable

VERSION = "1.0.0"
"""Of what is written. Raised whenever a layout's records come out otherwise."""


def build(
    layout: Layout,
    manual_dir: str | os.PathLike = ".",
    data_dir: str | os.PathLike | None = None,
    *,
    config: str = "",
    overwrite: bool = False,
) -> pathlib.Path:
    """Builds a data set.

    Args:
      layout: of the downloads, with its options.
      manual_dir: where they are.
      data_dir: where TFDS keeps its data sets; its own default, ``$TFDS_DATA_DIR`` or ``~/tensorflow_datasets``, if
      left
        out.
      config: what this version of the data set is called; by the options that are no defaults if left out.
      overwrite: whether one of its name is replaced.

    Returns:
      ``DATA_DIR/NAME/CONFIG/VERSION``; it appears when it is complete.

    Raises:
      UserError: the extra or a file is missing, a file is not as published, or there is one of its name.
    """
    tfds = library()
    manual_dir = pathlib.Path(manual_dir).expanduser().absolute()
    config = config or _config_name(layout)
    if not re.fullmatch(r"\w[\w.-]*", config):
        raise UserError(f"--config: expected letters, digits, _, . and -, got {config!r}")
    held = layout.holds(manual_dir)
    found = layout.splits(manual_dir)
    if data_dir is not None:
        check_writable(data_dir, "--data_dir")
    builder = _builder_class(layout, held, found, config)(data_dir=data_dir, file_format="array_record")
    target = pathlib.Path(builder.data_dir)
    if target.exists() and not overwrite:
        raise UserError(f"{target}: is there already. --overwrite replaces it, --config=NAME builds beside it")
    modes = tfds.download.GenerateMode
    mode = modes.REUSE_CACHE_IF_EXISTS if overwrite else modes.REUSE_DATASET_IF_EXISTS
    with tempfile.TemporaryDirectory() as downloads:  # there are none
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, download_mode=mode),
        )
    return target


def _config_name(layout: Layout) -> str:
    changed = [
        f"{field.name}-{getattr(layout, field.name)}"
        for field in dataclasses.fields(layout)
        if getattr(layout, field.name) != field.default
    ]
    return "_".join(changed) or "default"


def _builder_class(layout: Layout, held: Holds, found: dict[str, list[Shard]], config: str) -> type:
    """The TFDS builder of a layout. Made when it is used: TFDS is an extra."""
    tfds = library()
    known = tfds.core.BuilderConfig(name=config, description=f"{layout}")

    class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
        """Of what :mod:`mcm_jax.data.tfds` lays out."""

        name = layout.name
        VERSION = tfds.core.Version(VERSION)
        BUILDER_CONFIGS = [known]
        MANUAL_DOWNLOAD_INSTRUCTIONS = f"{layout.page}: {layout.download}"

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=type(layout).__doc__,
                homepage=layout.page,
                license=layout.licence,
                features=_features(tfds, held),
                metadata=tfds.core.MetadataDict(_metadata(held)),
            )

        def _shard_iterators_per_split(self, dl_manager):
            del dl_manager
            return {
                split: [functools.partial(_show, f"{split} {i + 1}/{len(parts)}", part) for i, part in enumerate(parts)]
                for split, parts in found.items()
            }

    return Builder


def _show(title: str, shard: Shard) -> Iterator[tuple[str, Record]]:
    for name, record in tqdm(shard(), desc=title, unit="example"):
        yield name, {"name": name} | record


def _features(tfds, held: Holds):
    features = {"name": tfds.features.Text(), "image": tfds.features.Image()}
    for m in held.modalities:
        channels = 1 if m.kind == "labels" else m.channels
        depth = np.uint16 if m.kind == "labels" and max(m.channels, m.ignore) > 256 else np.uint8
        features[m.name] = tfds.features.Image(shape=(None, None, channels), dtype=depth)
    if held.captions:
        features["caption"] = tfds.features.Text()
    return tfds.features.FeaturesDict(features)


def _metadata(held: Holds) -> dict:
    """What :func:`.records.describe` reads."""
    certain = held.modalities if held.certain else ()
    modalities = {m.name: {"kind": m.kind, "channels": m.channels, "ignore": m.ignore} for m in certain}
    classes = {name: dataclasses.asdict(c) for name, c in held.classes.items()}
    for known in classes.values():
        known["colors"] = None if known["colors"] is None else known["colors"].tolist()
    return {"modalities": modalities, "classes": classes}
