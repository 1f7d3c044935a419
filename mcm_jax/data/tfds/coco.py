"""COCO-Stuff: the pictures of COCO 2017 with 182 classes of things and stuff, and a caption each.

Sources: Caesar et al., COCO-Stuff: Thing and Stuff Classes in Context, CVPR 2018; Chen et al., Microsoft COCO Captions,
2015. https://github.com/nightrome/cocostuff gives the layout (its README's Setup), the values of the maps (0 to 181,
and 255 for unlabelled) and the names (``labels.txt``, there counted from 1). 11 of the 91 things never occur, but keep
their number. https://cocodataset.org gives 118,287 pictures to train on and 5,000 to validate.

There are about five captions a picture. The one with the lowest id is the prompt: an example has one prompt, which the
cached predictions of the base are made with.
"""

import dataclasses
import pathlib

from mcm_jax.data.classes import Classes
from mcm_jax.data.tfds.layout import Holds, Layout, Record, Shard, picture, plain_name, read_json, shards
from mcm_jax.errors import UserError
from mcm_jax.modalities import Modality

_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack,
    umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
    mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
    toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble,
    floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel,
    ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper,
    pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug,
    salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table,
    tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone,
    wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
CLASSES = tuple(" ".join(_NAMES.split()).split(", "))
"""Names of the 182 classes; the position is the value in the maps."""

_SPLITS = {"train": "train2017", "test": "val2017"}


@dataclasses.dataclass(frozen=True)
class COCOStuff(Layout):
    """Pictures (JPEG) of about 640x480, segmentations and captions. COCO's validation tests; its test has no labels."""

    name = "coco_stuff"
    page = "https://github.com/nightrome/cocostuff"
    licence = "annotations CC BY 4.0; each picture has its Flickr licence"
    download = """unpack train2017.zip and val2017.zip into images, stuffthingmaps_trainval2017.zip into annotations (as
        its Setup says), and annotations_trainval2017.zip of https://cocodataset.org/#download beside them, so that
        --manual_dir has images/train2017/000000000009.jpg, annotations/train2017/000000000009.png,
        annotations/captions_train2017.json, and the same of val2017."""
    counts = {"train": 118_287, "test": 5_000}

    def holds(self, folder: pathlib.Path) -> Holds:
        """182 classes of segmentation, 255 where unknown, and captions."""
        del folder
        labels = Modality("segmentation", "labels", len(CLASSES), ignore=255)
        return Holds((labels,), True, {"segmentation": Classes(CLASSES, ignore=255)})

    def splits(self, folder: pathlib.Path) -> dict[str, list[Shard]]:
        """train2017 trains, val2017 tests."""
        for part in _SPLITS.values():
            self.need(folder, f"images/{part}", f"annotations/{part}", f"annotations/captions_{part}.json")
        return {split: self._shards(folder, part) for split, part in _SPLITS.items()}

    def _shards(self, folder: pathlib.Path, part: str) -> list[Shard]:
        path = folder / "annotations" / f"captions_{part}.json"
        captions = _captions(path)
        stems = {name: pathlib.PurePosixPath(name).stem for name in captions}
        self.need(folder, *(f"images/{part}/{name}" for name in captions))
        self.need(folder, *(f"annotations/{part}/{stem}.png" for stem in stems.values()))
        files = {stem: name for name, stem in stems.items()}

        def read(stem: str) -> Record:
            return {
                "image": picture(folder / "images" / part / files[stem]),
                "segmentation": picture(folder / "annotations" / part / f"{stem}.png"),
                "caption": captions[files[stem]],
            }

        return shards(list(files), read)


def _captions(path: pathlib.Path) -> dict[str, str]:
    """The first caption of each picture, by its file's name, in the order of ids."""
    content = read_json(path)
    try:
        images = {image["id"]: plain_name(image["file_name"], str(path)) for image in content["images"]}
        first: dict[int, tuple[int, str]] = {}
        for found in content["annotations"]:
            caption = found["id"], " ".join(found["caption"].split())
            first[found["image_id"]] = min(caption, first.get(found["image_id"], caption))
        names = {images[i]: first[i][1] if i in first else "" for i in sorted(images)}
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not as COCO writes it ({type(e).__name__}: {e}). Expected images with id and file_name, "
            f"annotations with id, image_id and caption"
        ) from e
    if without := [name for name, caption in names.items() if not caption]:
        raise UserError(f"{path}: expected a caption for each of its images, found none for {without[0]}")
    return names
