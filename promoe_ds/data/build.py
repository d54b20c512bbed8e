"""The table of data sets, and from a recipe to one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from promoe_ds.config.data import ON_DISK
from promoe_ds.config.schema import RunConfig
from promoe_ds.data.dataset import LatentDataset, SyntheticLatents
from promoe_ds.data.digits import TrainingDigits
from promoe_ds.data.latents import open_latents
from promoe_ds.data.unpacked import EncodedImages
from promoe_ds.errors import DataError

#: How each data.dataset is opened, given the device where an autoencoder would run.
DATASETS: dict[str, Callable[[RunConfig, torch.device], LatentDataset]] = {
    "digits": TrainingDigits,
    "latents": open_latents,
    "images": EncodedImages,
    "synthetic": SyntheticLatents,
}


def build_dataset(config: RunConfig, device: torch.device | None = None) -> LatentDataset:
    """Open the data set of a recipe.

    Args:
        device: where an autoencoder runs, if images are encoded on the fly; the CPU if left out.
    Raises: DataError if it is missing or does not fit the model.
    """
    data = config.data
    if data.path is None and data.dataset in ON_DISK:
        raise DataError(
            f"data.path is not set: data.dataset={data.dataset} needs {ON_DISK[data.dataset]} "
            "(--set data.path=DIR)"
        )
    return DATASETS[data.dataset](config, device or torch.device("cpu"))
