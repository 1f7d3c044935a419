"""Paired examples: an image and its conditions."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from mcm_jax.base import BaseCard
from mcm_jax.config import setting
from mcm_jax.data import emoji, scenes
from mcm_jax.data.classes import Classes, classes_path, read_classes, write_classes
from mcm_jax.data.emoji import Emoji
from mcm_jax.data.folder import Folder, has_split
from mcm_jax.data.pipeline import InMemory
from mcm_jax.data.scenes import Scenes
from mcm_jax.data.tfds.records import Description, Records, describe, find
from mcm_jax.data.unreadable import UNREADABLE, Skipping
from mcm_jax.data.views import Views, check_views
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import Modality


@dataclasses.dataclass(frozen=True)
class _Known:
    """What is known of a data set before it is opened, by modality: its kind, judge, classes and their colours."""

    holds: tuple[Modality, ...] = ()
    judges: Mapping[str, str] = dataclasses.field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    palettes: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _drawn(classes: Sequence[str], palette: np.ndarray, **judges: str) -> _Known:
    """A data set of segmentations and sketches."""
    holds = Modality("segmentation", "labels", len(classes)), Modality("sketch", "lines", 1)
    return _Known(holds, judges, {"segmentation": tuple(classes)}, {"segmentation": palette})


_SOURCES = {
    "scenes": _drawn(scenes.CLASSES, scenes.PALETTE, segmentation="scenes", sketch="edges:size=32"),
    "emoji": _drawn(
        emoji.CLASSES, emoji.PALETTE, segmentation="interior:palette", sketch="edges:size=32", fidelity="emoji"
    ),
    "folder": _Known(),
    "tfds": _Known(),
}
_WITH_PATH = ("folder", "tfds")

_STREAM = ("auto", "on", "off")
_SWAP = ".swap"  # after a modality's name


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The data set. The config's section ``data``.

    Attributes:
      name: ``scenes``, procedural landscapes at the base's resolution; ``emoji``, drawn art at 32x32 or 64x64;
        ``folder``: your own pairs; or ``tfds``: a data set of TensorFlow Datasets.
      path: of a folder of pairs, see docs/data.md; of a data set of TFDS, or its name, see docs/tfds.md; else ''.
      size: training examples of scenes.
      seed: of scenes: another seed is another data set (0 trained the base, 1 the segmentation net); and of crops.
      prompt_drop_rate: how often the base is shown the empty prompt; for text-conditional bases.
      views: augmented versions of each example, the first one as it is; see docs/data.md.
      flip: whether every other view is mirrored.
      crop: the least share of the picture's sides that a view shows.
      jitter: how far views change the picture's brightness, contrast and saturation, each by a factor of at most 1 +
        jitter and at least 1 - jitter; the conditions stay.
      unreadable: what becomes of a training example whose files turn out to be damaged or wrong: ``fail``; or ``skip``:
        the next one takes its place, which is counted and told, up to 5% of the examples.
      stream: whether training without a cache reads (and encodes) examples for each batch, ``on``, or all of them once
        and keeps them, ``off``; ``auto`` streams what would take more than 4 GiB. The batches are the same, latents to
        rounding. Prompts are not streamed in several processes.
      partial: whether pictures of a folder may miss modalities.
      held_out_share: of a folder without a test split, how much of it is held out, by a hash of the names; 0 is none.
      discover: whether the modalities of a folder are found in it, as configs/folder.py has it: the workdir's config
        holds what was found. What the section ``modalities`` says counts before that.
    """

    name: str = "scenes"
    path: str = ""
    size: int = 2_000
    seed: int = 2
    prompt_drop_rate: float = 0.1
    views: int = 1
    flip: bool = False
    crop: float = 1.0
    # Names of caches are made of the others' repr.
    jitter: float = dataclasses.field(default=0.0, repr=False)
    unreadable: str = dataclasses.field(default="fail", repr=False)
    stream: str = dataclasses.field(default="auto", repr=False)
    partial: bool = dataclasses.field(default=False, repr=False)
    held_out_share: float = setting(0.1, before=0.0, repr=False)
    discover: bool = dataclasses.field(default=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "path", os.path.expanduser(self.path))
        expect(self.name in _SOURCES, "name", f"one of {', '.join(_SOURCES)}", self.name)
        expect(
            bool(self.path) == (self.name in _WITH_PATH),
            "path",
            "a folder of pairs where data.name is 'folder', a data set of TFDS where it is 'tfds', and '' elsewhere",
            self.path,
        )
        expect(self.size >= 1, "size", "at least 1", self.size)
        expect(self.seed >= 0, "seed", "at least 0", self.seed)
        expect(0 <= self.prompt_drop_rate <= 1, "prompt_drop_rate", "in [0, 1]", self.prompt_drop_rate)
        expect(0 <= self.held_out_share < 1, "held_out_share", "at least 0 and below 1", self.held_out_share)
        only = "False unless data.name is 'folder'"
        expect(not self.partial or self.name == "folder", "partial", only, True)
        only += " (of other data say each modality, --config.modalities.NAME.kind=..., .channels=...)"
        expect(not self.discover or self.name == "folder", "discover", only, True)
        expect(self.unreadable in UNREADABLE, "unreadable", f"one of {', '.join(UNREADABLE)}", self.unreadable)
        expect(self.stream in _STREAM, "stream", f"one of {', '.join(_STREAM)}", self.stream)
        check_views(self.views, self.flip, self.crop, self.jitter)

    def check_holds(self, modalities: Sequence[Modality]) -> None:
        """Raises UserError where scenes have no such modality; what a folder has is seen when it is opened."""
        known = {(m.name, m.continuous, m.channels, m.planes) for m in self.holds}
        for m in modalities if known else ():
            if (m.name, m.continuous, m.channels, m.planes) not in known:
                held = ", ".join(f"{m.name} ({m.kind}, channels={m.channels})" for m in self.holds)
                raise UserError(
                    f"modalities.{m.name} is kind={m.kind!r}, channels={m.channels}, but the data set {self.name!r} "
                    f"holds {held}; config.modalities.{m.name}.kind=none leaves it out"
                )

    @property
    def holds(self) -> tuple[Modality, ...]:
        """The modalities that the data set is known to hold; what a folder has is seen when it is opened."""
        return self._of_tfds.modalities or _SOURCES[self.name].holds

    @property
    def judges(self) -> Mapping[str, str]:
        """Of these, what judges each: see :mod:`mcm_jax.evaluation.judges`."""
        return _SOURCES[self.name].judges

    def classes(self, modality: str) -> tuple[str, ...] | None:
        """The names of a modality's classes, where the data set knows them."""
        described = self.described(modality)
        return described.names if described else _SOURCES[self.name].classes.get(modality)

    def palette(self, modality: str, workdir: str | os.PathLike | None = None) -> np.ndarray | None:
        """The colours of a modality's classes, uint8 ``[C, 3]``, where :meth:`described` or the data set knows them."""
        described = self.described(modality, workdir)
        return described.colors if described else _SOURCES[self.name].palettes.get(modality)

    def described(self, modality: str, workdir: str | os.PathLike | None = None) -> Classes | None:
        """What a folder's ``classes.json``, or a data set of TFDS, says of a modality of labels, if it does.

        Args:
          modality: which.
          workdir: of a run, where what :meth:`keep_described` wrote counts first: the data set may have moved since.
        """
        if workdir is not None and (kept := classes_path(workdir, modality)):
            return read_classes(kept)
        if self.name == "tfds":
            return self._of_tfds.classes.get(modality)
        path = classes_path(self.path, modality) if self.name == "folder" else None
        return read_classes(path) if path else None

    def keep_described(
        self, modalities: Sequence[Modality], folder: str | os.PathLike, workdir: str | os.PathLike | None = None
    ) -> None:
        """Writes what is :meth:`described` of some modalities into a folder, for samples without the data set.

        What the folder has of others stays: a data set that is not at hand describes none.

        Raises:
          UserError: a ``classes.json`` is wrong; nothing was written.
        """
        known = {m.name: self.described(m.name, workdir) for m in modalities if m.kind == "labels"}
        for name, classes in known.items():
            if classes:
                write_classes(classes, folder, name)

    def is_at_hand(self, split: str = "train") -> bool:
        """Whether a split's examples can be read."""
        if self.name == "tfds":
            return split in self._of_tfds.splits
        return self.name != "folder" or has_split(self.path, split, self.held_out_share)

    def splits_itself(self) -> bool:
        """Whether the held-out examples are some of the folder that would train otherwise."""
        return self.name == "folder" and self.shares_out > 0 and self.has_test_split()

    @property
    def shares_out(self) -> float:
        """:attr:`held_out_share` where it matters: 0 of other data, and of a folder that has its own test split."""
        matters = self.name == "folder" and not (pathlib.Path(self.path) / "test").is_dir()
        return self.held_out_share if matters else 0.0

    @property
    def _of_tfds(self) -> Description:
        """Empty where the data set is not of TFDS, or not at hand: a cache can train without it."""
        try:
            return describe(find(self.path)) if self.name == "tfds" else Description()
        except UserError:
            return Description()

    def has_test_split(self) -> bool:
        """Whether there are held-out examples."""
        return self.is_at_hand("test")

    def find(
        self, split: str, modalities: Sequence[Modality], card: BaseCard, *, size: int | None = None
    ) -> Scenes | Emoji | Folder | Records:
        """What :meth:`open` opens, by the same arguments, but as it is: nothing is rendered or read yet."""
        height, width, _ = card.image_shape
        if self.name == "folder":
            return Folder(
                self.path,
                split,
                modalities,
                height,
                width,
                card.is_text_conditional,
                size,
                partial=self.partial,
                held_out_share=self.held_out_share,
            )
        if self.name == "tfds":
            return Records(self.path, split, modalities, height, width, card.is_text_conditional, size)
        if self.name == "emoji":
            return Emoji(split, height, width, size)
        return Scenes(split, size or self.size, height, width, self.seed)

    def open(
        self, split: str, modalities: Sequence[Modality], card: BaseCard, *, size: int | None = None
    ) -> Sequence[dict]:
        """The examples, at a base's resolution, with prompts where the base takes them.

        Args:
          split: ``train`` (with its views, :class:`mcm_jax.data.views.Views`) or ``test``.
          modalities: which conditions are read.
          card: of the base.
          size: how many scenes, in place of :attr:`size`; of the others at most so many.

        Returns:
          Random access to examples of ``image`` (uint8 ``[height, width, 3]``), the modalities on the same grid (labels
          as integers, maps as value * 255), ``caption`` (a text, if the base takes it; scenes always have it), and
          where examples may miss modalities ``present`` (uint8 ``[len(modalities)]``, 0 for those that it lacks).

        Raises:
          UserError: a folder that is not as docs/data.md says.
        """
        found = self.find(split, modalities, card, size=size)
        source = InMemory.render(found) if isinstance(found, Scenes) else found
        if self.partial and split == "train" and size is None:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in found.shares().items())
            print(f"{self.path}: of {len(found)} pictures, so many have each modality: {shares}")
        if split != "train":
            return source  # figures are of these: none is another's
        if self.views > 1:
            how = dict(views=self.views, flip=self.flip, crop=self.crop, jitter=self.jitter, seed=self.seed)
            source = Views(source, modalities, swaps=self._swaps(found), **how)
        if self.unreadable == "skip" and isinstance(found, Folder | Records):
            source = Skipping(source, self.views, getattr(found, "names", ()))
        return source

    def without_views(self) -> "DataSettings":
        """The same examples, each as it is."""
        return dataclasses.replace(self, views=1, flip=False, crop=1.0, jitter=0.0)

    def _swaps(self, found: Sequence[dict]) -> dict[str, np.ndarray]:
        """What mirroring makes of the classes of each modality, where the data set says that it exchanges some."""
        known = getattr(found, "classes", {}) if self.flip else {}
        return {name: classes.mirrored for name, classes in known.items() if classes.swap}

    def fingerprints(self, found: Scenes | Emoji | Folder, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """SHA-256, by name, of all that the examples of what :meth:`find` found are made of.

        Args:
          found: the data set.
          known: an earlier result, where its files are known to be the same since: then they are not read.
        """
        digests = found.fingerprints() if known is None else {k: v for k, v in known.items() if not k.endswith(_SWAP)}
        swaps = {name: json.dumps(becomes.tolist()).encode() for name, becomes in self._swaps(found).items()}
        return digests | {name + _SWAP: hashlib.sha256(text).hexdigest() for name, text in swaps.items()}
