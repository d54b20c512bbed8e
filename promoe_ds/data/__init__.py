"""Data: digits, emoji, images, packed latents and captions, and their order in training."""

from promoe_ds.data.build import build_dataset, with_text_encoder
from promoe_ds.data.dataset import LatentDataset
from promoe_ds.data.order import sample_indices

__all__ = ["LatentDataset", "build_dataset", "sample_indices", "with_text_encoder"]
