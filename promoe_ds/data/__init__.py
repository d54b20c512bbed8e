"""Data: sets of latents and the order in which they are trained on."""

from promoe_ds.data.build import build_dataset, with_resolved_data
from promoe_ds.data.dataset import LatentDataset
from promoe_ds.data.order import sample_indices

__all__ = ["LatentDataset", "build_dataset", "sample_indices", "with_resolved_data"]
