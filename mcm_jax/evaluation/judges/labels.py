"""The judge of label maps."""

import numpy as np

from mcm_jax.errors import UserError
from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement
from mcm_jax.evaluation.judges.readers import Reader, at_size, resize_images
from mcm_jax.modalities import Modality

INTERIOR = "interior:"
"""Before a reader's name: pixels through which a border runs are left out."""


def labels(modality: Modality, reader: Reader, held_out: HeldOut, interior: bool = False) -> Judge:
    """Intersection over union of the labels that a reader finds.

    Pixels whose true label is unknown (``modality.ignore``) count in neither, whatever a sample has there.

    Args:
      modality: of labels.
      reader: finds labels in pictures.
      held_out: has the true ones.
      interior: whether only pixels count that are of one class at twice the resolution, too. Where a pixel has parts
        of two classes its colour is neither's, so that even of real pictures a reader is then wrong (Pascal VOC leaves
        a band along borders out for the same reason).

    Raises:
      UserError: with ``interior``, a data set that is not at hand at twice the resolution.
    """
    names = reader.classes or tuple(map(str, range(modality.channels)))
    size = reader.size or held_out.images.shape[1:3]
    targets = held_out.at(*size)[modality.name]
    counts = targets != modality.ignore
    if interior:
        try:
            finer = held_out.at(2 * size[0], 2 * size[1])[modality.name]
        except UserError as e:
            raise UserError(
                f"the judge {INTERIOR}{reader.name} needs the labels at twice its resolution, {2 * size[0]}x"
                f"{2 * size[1]}, where the data set is not ({e}); give one that counts all pixels, "
                f"--judge={modality.name}={reader.name} or evaluation.judges.{modality.name} of the config"
            ) from e
        parts = [finer[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        counts &= np.all([part == targets for part in parts], axis=0)

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = reader(resize_images(images, *size))
        each = [
            metrics.confusion_matrix(labels[counts[i]], targets[i][counts[i]], modality.channels)
            for labels, i in zip(found, which, strict=True)
        ]
        total = np.sum(each, axis=0)
        values = zip(names, metrics.class_iou(total), strict=True)
        numbers = {
            "miou": float(metrics.mean_iou(total)) if total.any() else "no pixel counts",
            "class_iou": {n: "in no map and in no picture" if np.isnan(v) else float(v) for n, v in values},
        }
        scores = [metrics.mean_iou(confusion) if confusion.any() else np.nan for confusion in each]
        return Judgement(numbers, np.array(scores))

    how = f"mean IoU of {modality.channels} classes, read by {reader.name} {at_size(size, held_out.images)}"
    own = counts[held_out.present[modality.name]]
    if only := ["have a label"] * (modality.ignore != -1) + ["no border runs through"] * interior:
        how += f", over the {own.mean():.0%} of the pixels that {' and that '.join(only)}"
    return Judge(modality.name, how, judge, ("miou",), ("mean_iou",))
