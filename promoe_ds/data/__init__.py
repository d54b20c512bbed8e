"""Data: digits, emoji, images, packed latents and captions, and their order in training."""

from promoe_ds.data.buckets.dataset import bucket_lengths, largest_bucket
from promoe_ds.data.build import build_dataset, with_resolved_data
from promoe_ds.data.dataset import LatentDataset
from promoe_ds.data.order import batch_indices, sample_indices

__all__ = [
    "LatentDataset",
    "batch_indices",
    "bucket_lengths",
    "build_dataset",
    "largest_bucket",
    "sample_indices",
    "with_resolved_data",
]
