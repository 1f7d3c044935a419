"""Metrics of generated pictures, and the segmenter that reads label maps back out of them."""

from mcm_jax.evaluation.metrics import (
    class_iou,
    colour_distance,
    confusion_matrix,
    correct_keypoints,
    depth_errors,
    diversity,
    edge_f1,
    edge_map,
    mean_iou,
    ms_ssim,
)
from mcm_jax.evaluation.segmenter import SegmentationNet, Segmenter, load_segmenter

__all__ = [
    "SegmentationNet",
    "Segmenter",
    "class_iou",
    "colour_distance",
    "confusion_matrix",
    "correct_keypoints",
    "depth_errors",
    "diversity",
    "edge_f1",
    "edge_map",
    "load_segmenter",
    "mean_iou",
    "ms_ssim",
]
