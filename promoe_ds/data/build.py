"""The table of data sets, and from a recipe to one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from promoe_ds.config.schema import RunConfig
from promoe_ds.data.buckets.dataset import BucketedLatents, configs_of_buckets, largest_bucket
from promoe_ds.data.dataset import (
    DrawnLatents,
    LatentDataset,
    SyntheticLatents,
    with_normalization,
)
from promoe_ds.data.digits import TrainingDigits
from promoe_ds.data.emoji import TrainingEmoji
from promoe_ds.data.latents import open_latents
from promoe_ds.data.unpacked import EncodedImages
from promoe_ds.errors import DataError

#: How each data.dataset is opened, given the device where an autoencoder would run;
# `config.data.DATASETS` says what a recipe must know of it.
DATASETS: dict[str, Callable[[RunConfig, torch.device], LatentDataset]] = {
    "digits": TrainingDigits,
    "emoji": TrainingEmoji,
    "latents": open_latents,
    "images": EncodedImages,
    "synthetic": SyntheticLatents,
}


def build_dataset(config: RunConfig, device: torch.device | None = None) -> LatentDataset:
    """Open the data set of a recipe.

    Args:
        device: where an autoencoder or a text encoder runs, if they do; the CPU if left out.
    Raises: DataError if it is missing or does not fit the model.
    """
    data = config.data
    if data.path is None and data.traits.folder:
        raise DataError(
            f"data.path is not set: data.dataset={data.dataset} needs {data.traits.folder} "
            "(--set data.path=DIR)"
        )
    device, open_one = device or torch.device("cpu"), DATASETS[data.dataset]
    if not config.model.buckets:
        return open_one(config, device)
    return BucketedLatents(config, [open_one(each, device) for each in configs_of_buckets(config)])


def with_resolved_data(config: RunConfig, dataset: LatentDataset) -> RunConfig:
    """Return the config with what the data set has found: the weights of the text encoder, so that
    no other one is taken for it when the run is resumed or the model is sampled; and what latents
    are normalised by, so that samples are decoded without the data.
    """
    if isinstance(one := largest_bucket(dataset), DrawnLatents):
        config = with_normalization(config, one.normalization)
    identity = getattr(dataset, "text_identity", None)
    if identity is None:
        return config
    update = {"text_fingerprint": identity.fingerprint}
    return config.model_copy(update={"data": config.data.model_copy(update=update)})
