"""Evaluating the averaged weights while they are trained: the Fréchet distance of samples."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from promoe_ds.condition import ClassCondition, Condition
from promoe_ds.config import RunConfig
from promoe_ds.config.model import read_size
from promoe_ds.data import LatentDataset, largest_bucket
from promoe_ds.data.vae import Vae
from promoe_ds.diffusion import choose_scale
from promoe_ds.diffusion.sampler import SamplingPlan
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.features import load_extractor
from promoe_ds.evaluation.frechet import frechet_distance, warn_of_few
from promoe_ds.evaluation.images import draws_pixels, image_shape, to_uint8
from promoe_ds.evaluation.reference import check_fits, open_reference, read_reference
from promoe_ds.evaluation.sampling import LatentSampler, even_passes, sampling_dtype
from promoe_ds.evaluation.statistics import RunningGaussian
from promoe_ds.training.trainer import Trainer

_WANTED = ("pool", RunningGaussian)


class OnlineEvaluation:
    """Samples the same noise and conditions each time, and compares them with the reference."""

    def __init__(self, config: RunConfig, ranks: DistributedContext) -> None:
        """Load extractor, reference and autoencoder; all ranks call this together, before training.

        Raises: ConfigError or DataError for what cannot be loaded or does not fit the model.
        """
        self._config, self._team = config, ranks
        settings = config.evaluation
        # The default is no guidance: a recipe that states more asks for it.
        scale, _ = choose_scale(config, max(settings.cfg_scale, 1.0), "evaluation.cfg_scale")
        self._extractor = load_extractor(settings.extractor, ranks.device)
        self._vae = None
        if not draws_pixels(config):
            if config.data.vae is None:
                raise ConfigError(
                    "evaluation.every: latents must be decoded to be evaluated: set data.vae to the"
                    " folder or hub id of their autoencoder"
                )
            self._vae = Vae(config.data.vae, device=ranks.device)
            if misfit := self._vae.identity.misfit(config):
                raise ConfigError(f"data.vae={config.data.vae}: has {misfit}")
        *shape, channels = image_shape(config, self._vae)
        size = read_size(shape)
        opened = open_reference(Path(settings.reference), size=size, channels=channels)
        features = check_fits(
            opened, self._extractor, size=size, channels=channels, need_images=False
        )
        if ranks.is_main:
            warn_of_few(Path("evaluation.samples"), settings.samples, features)
        known, _ = read_reference(
            opened, self._extractor, self._team, batch_size=settings.batch_size, wanted=[_WANTED]
        )
        self._reference = known[_WANTED]
        self._plan = SamplingPlan.of(config, steps=settings.steps, cfg_scale=scale)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Return this step's figures, NaN where the samples have none; all ranks call this
        together.

        Every rank makes equally many passes, as experts on several ranks need, the last ones
        possibly for nothing.
        """
        started, settings, team = time.perf_counter(), self._config.evaluation, self._team
        passes, size = even_passes(
            settings.samples, batch_size=settings.batch_size, world_size=team.world_size
        )
        running = None
        device, dtype = team.device.type, sampling_dtype(team.device)
        with trainer.averaged_network() as network, torch.no_grad():
            sampler = LatentSampler(
                network, self._config, self._plan, seed=settings.seed, device=team.device
            )
            for number in range(passes):
                first = (number * team.world_size + team.rank) * size
                count = max(0, min(size, settings.samples - first))
                indices = range(first, first + max(count, 1))
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    latents = sampler.sample(indices, self._conditions(indices, trainer.dataset))
                features = self._extractor(self._images(latents)).pool
                running = running or RunningGaussian(settings.samples, features.shape[1])
                running.add(first, features[:count])
        distance = frechet_distance(running.result(team), self._reference)
        return {"frechet_distance": distance, "evaluation_seconds": time.perf_counter() - started}

    def _conditions(self, indices: range, dataset: LatentDataset) -> Condition:
        """Return the condition of each image: the classes in turn, or captions spread evenly over
        the training data.
        """
        model = self._config.model
        if model.condition == "class":
            labels = torch.tensor([index % model.num_classes for index in indices])
            return ClassCondition(labels, model.null_label)
        dataset = largest_bucket(dataset)
        rows = np.array(indices) * len(dataset) // self._config.evaluation.samples
        return dataset.take(rows % len(dataset))[1]

    def _images(self, latents: torch.Tensor) -> np.ndarray:
        values = latents if self._vae is None else self._vae.decode(latents)
        # What is not finite becomes black: a diverged model has a bad figure, or none (NaN).
        return to_uint8(torch.nan_to_num(values, nan=-1.0, posinf=1.0, neginf=-1.0).cpu().numpy())
