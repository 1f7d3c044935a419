"""The judge of label maps."""

import numpy as np

from mcm_jax.evaluation import metrics
from mcm_jax.evaluation.held_out import HeldOut
from mcm_jax.evaluation.judges.judge import Judge, Judgement
from mcm_jax.evaluation.judges.readers import Reader, resize_images
from mcm_jax.modalities import Modality


def labels(modality: Modality, reader: Reader, held_out: HeldOut) -> Judge:
    """Intersection over union of the labels that a reader finds."""
    names = reader.classes or tuple(map(str, range(modality.channels)))
    size = reader.size or held_out.images.shape[1:3]
    targets = held_out.at(*size)[modality.name]

    def judge(images: np.ndarray, which: np.ndarray) -> Judgement:
        found = reader(resize_images(images, *size))
        each = [
            metrics.confusion_matrix(labels, targets[i], modality.channels)
            for labels, i in zip(found, which, strict=True)
        ]
        total = np.sum(each, axis=0)
        values = zip(names, metrics.class_iou(total), strict=True)
        numbers = {
            "miou": float(metrics.mean_iou(total)),
            "class_iou": {n: "in no map and in no picture" if np.isnan(v) else float(v) for n, v in values},
        }
        return Judgement(numbers, np.array([metrics.mean_iou(confusion) for confusion in each]))

    how = f"mean IoU of {modality.channels} classes, read by {reader.name} at {size[0]}x{size[1]}"
    return Judge(modality.name, how, judge, ("miou",), ("mean_iou",))
