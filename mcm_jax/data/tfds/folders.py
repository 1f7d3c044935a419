"""Folders of the user's own: pairs as docs/data.md lays them out, and pictures whose page publishes no conditions."""

import dataclasses
import pathlib

from mcm_jax.data.captions import find_captions
from mcm_jax.data.classes import FILE, classes_path, read_classes
from mcm_jax.data.folder import has_split, held_out_names, read_tree
from mcm_jax.data.problems import few, refuse
from mcm_jax.data.reading import read_caption
from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard, picture, shards
from mcm_jax.errors import UserError, expect
from mcm_jax.modalities import PICTURES, Modality, known, open_picture


@dataclasses.dataclass(frozen=True)
class PairedFolder(Layout):
    """Pairs: whatever folders stand beside DATA/train/image become modalities, whose kinds the config says.

    Attributes:
      held_out_share: how many of the pairs test where there is no test split, by a hash of their names; 0 is none.
    """

    name = "paired_folder"
    page = "docs/data.md"
    licence = "yours"
    download = """--manual_dir has train/image/NAME.jpg and one folder a modality with the same names,
        train/segmentation/NAME.png and so on, train/caption/NAME.txt where there are prompts, and perhaps the same of
        test."""

    held_out_share: float = 0.1

    def __post_init__(self):
        expect(0 <= self.held_out_share < 1, "held_out_share", "at least 0 and below 1", self.held_out_share)

    def holds(self, folder: pathlib.Path) -> Holds:
        """The folders beside train/image, as maps with the channels of their first pictures, and classes.json."""
        self.need(folder, "train/image")
        beside = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir() and not p.name.startswith("."))
        names = [name for name in beside if name not in ("image", "caption")]
        modalities = tuple(Modality(name, "map", _channels(folder / "train" / name)) for name in names)
        files = {name: classes_path(folder, name) for name in names}
        labels = {n: p for n, p in files.items() if p and (p.name != FILE or getattr(known(n), "kind", "") == "labels")}
        classes = {name: read_classes(path) for name, path in labels.items()}
        return Holds(modalities, bool(find_captions(folder / "train")), classes, certain=False)

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """Train, and test where there is one or some are held out."""
        held = self.holds(folder)
        found = [split for split in ("train", "test") if has_split(folder, split, self.held_out_share)]
        return {split: self._shards(folder, split, held) for split in found}

    def _shards(self, folder: pathlib.Path, split: str, held: Holds) -> list[Shard]:
        tree = read_tree(folder, split, held.modalities, held.captions, held_out_share=self.held_out_share)
        refuse(tree.problems)

        def read(name: str) -> Record:
            paths = {key: tree.root / key / files[name] for key, files in tree.files.items()}
            record: Record = {key: picture(path) for key, path in paths.items() if key != "caption"}
            if held.captions:
                record["caption"] = tree.prompts[name] if tree.prompts else read_caption(paths["caption"])
            return record

        return shards(tree.names, read)


@dataclasses.dataclass(frozen=True)
class Pictures(PairedFolder):
    """Pictures in one folder: image alone. With train/image and folders beside it, as for pairs, those too.

    Attributes:
      held_out_share: how many of the pictures test where there is no test split, by a hash of their names; 0 is none.
    """

    held_out_share: float = 0.05

    def holds(self, folder: pathlib.Path) -> Holds:
        """Nothing but the image, if the pictures lie in the folder itself."""
        return super().holds(folder) if (folder / "train").is_dir() else Holds()

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """By a hash of the names, if the pictures lie in the folder itself."""
        if (folder / "train").is_dir():
            return super().splits(folder)
        found = folder.iterdir() if folder.is_dir() else ()
        files = {p.name for p in found if p.suffix.lower() in PICTURES and not p.name.startswith(".")}
        if not files:
            raise UserError(
                f"{self.name}: {folder} has no pictures. From {self.page}: {' '.join(self.download.split())}"
            )
        stems = {pathlib.PurePath(name).stem: name for name in sorted(files)}
        if len(stems) < len(files):
            raise UserError(
                f"{folder}: two pictures of one name, e.g. {few(sorted(files - set(stems.values())), 1)}. Keep one"
            )

        def read(name: str) -> Record:
            return {"image": picture(folder / stems[name])}

        held = held_out_names(stems, self.held_out_share)
        names = {"train": [n for n in stems if n not in held], "test": [n for n in stems if n in held]}
        return {split: shards(part, read) for split, part in names.items() if part}


@dataclasses.dataclass(frozen=True)
class LHQ(Pictures):
    """LHQ: 90,000 landscapes; Skorokhodov et al., Aligning Latent and Image Spaces, ICCV 2021 (counts by its
    README)."""

    name = "lhq"
    page = "https://github.com/universome/alis"
    licence = "CC BY 2.0; single pictures: Unsplash, Creative Commons or U.S. Government Works"
    download = """unpack LHQ256, LHQ1024, LHQ1024_jpg or LHQ, so that --manual_dir is the folder of 90,000 pictures; or
        a folder of pairs made of them (python -m mcm_jax.data make), train/image and its conditions."""
    counts = {"": 90_000}


@dataclasses.dataclass(frozen=True)
class FlickrMountains(Pictures):
    """Flickr Mountains, of the paper's second base; Park et al., Swapping Autoencoder, NeurIPS 2020: never
    published."""

    name = "flickr_mountains"
    page = "https://github.com/taesungp/swapping-autoencoder-pytorch"
    licence = "each picture has its Flickr licence; the set must not be shared"
    download = """the set itself is not public; its README names the Flickr group that it was collected from, Mountains
        Anywhere (https://flickr.com/groups/62119907@N00), and whom to ask. --manual_dir is the folder of pictures that
        you collected; or a folder of pairs made of them (python -m mcm_jax.data make), train/image and its
        conditions."""


def _channels(folder: pathlib.Path) -> int:
    """As many as the first picture of a folder has; a palette's are one, labels."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES and not path.name.startswith("."):
            with open_picture(path) as opened:
                return len(opened.getbands())
    raise UserError(f"{folder}: holds no pictures. Fill it, or remove it")
