"""Images, labels, patients and splits, from files to batches."""

from chanscale.data.augmentation import Strength, augment
from chanscale.data.images import read_image
from chanscale.data.loading import Batch, BatchLoader, DecodedImages, decode_images
from chanscale.data.sources import ImageRecord, ImageSet, open_images
from chanscale.data.splits import (
    Splits,
    read_splits,
    read_training_names,
    split_images,
    suggest_group_pattern,
    write_splits,
)
from chanscale.data.volumes import VolumeSpace, read_volume

__all__ = [
    "Batch",
    "BatchLoader",
    "DecodedImages",
    "ImageRecord",
    "ImageSet",
    "Splits",
    "Strength",
    "VolumeSpace",
    "augment",
    "decode_images",
    "open_images",
    "read_image",
    "read_splits",
    "read_training_names",
    "read_volume",
    "split_images",
    "suggest_group_pattern",
    "write_splits",
]
