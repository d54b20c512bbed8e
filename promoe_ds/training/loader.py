"""Batches made ahead of the step that needs them; each is a function of the seed and its place in
the training stream.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from promoe_ds.condition import Condition
from promoe_ds.config import BatchPlan, RunConfig
from promoe_ds.data import LatentDataset, batch_indices, bucket_lengths
from promoe_ds.diffusion import DiffusionBatch, draw_batch
from promoe_ds.diffusion.objective import Objective
from promoe_ds.distributed.context import DistributedContext

#: Batches that are ready or being made while a step runs.
_AHEAD = 2


@dataclass(frozen=True)
class Place:
    """Where a batch is in training: the step, the samples of all ranks before that step, the pass
    within it.
    """

    step: int
    samples_seen: int
    micro_step: int = 0

    def next(self, batches: BatchPlan) -> Place:
        """Return the place after it."""
        if self.micro_step + 1 < batches.accumulation:
            return replace(self, micro_step=self.micro_step + 1)
        return Place(self.step + 1, self.samples_seen + batches.global_batch)


class BatchLoader:
    """Makes a rank's batches on a thread of its own, the next ones while a step runs.

    A place has always the same batch, whatever was asked for before, also after a resume.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        objective: Objective,
        config: RunConfig,
        batches: BatchPlan,
        context: DistributedContext,
    ) -> None:
        """Make nothing yet."""
        self._dataset, self._objective, self._config = dataset, objective, config
        self._batches, self._context = batches, context
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._waiting: deque[tuple[Place, Future[DiffusionBatch]]] = deque()

    def take(self, place: Place) -> DiffusionBatch:
        """Return the batch of a place, in pinned memory where the device is a GPU, and begin to
        make the next ones.

        Raises: what making this batch raised, in the step that needed it.
        """
        if not self._waiting or self._waiting[0][0] != place:
            for _, batch in self._waiting:
                batch.cancel()
            self._waiting = deque([self._begin(place)])
        batch = self._waiting.popleft()[1]
        ahead = place if not self._waiting else self._waiting[-1][0]
        while len(self._waiting) < _AHEAD:
            ahead = ahead.next(self._batches)
            self._waiting.append(self._begin(ahead))
        return batch.result()

    def make(self, place: Place, slots: range) -> DiffusionBatch:
        """Return the samples of some slots of a step's global batch, noise and dropout drawn."""
        clean, condition = self.samples(place, slots)
        return draw_batch(
            clean,
            condition,
            self._objective,
            seed=self._config.train.seed,
            step=place.step,
            slots=slots,
        )

    def close(self) -> None:
        """End the thread; what is being made is finished and dropped."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def samples(self, place: Place, slots: range) -> tuple[Tensor, Condition]:
        """Return the latents and conditions of some slots of a step's global batch, before
        dropout.
        """
        indices = batch_indices(
            bucket_lengths(self._dataset),
            seed=self._config.train.seed,
            start=place.samples_seen,
            batch=self._batches.global_batch,
            slots=slots,
        )
        return self._dataset.take(indices, place.samples_seen + np.array(slots))

    def _begin(self, place: Place) -> tuple[Place, Future[DiffusionBatch]]:
        return place, self._worker.submit(self._make_own, place)

    def _make_own(self, place: Place) -> DiffusionBatch:
        batch = self.make(place, self._batches.slots(place.micro_step, self._context.rank))
        return batch.pin_memory() if self._context.device.type == "cuda" else batch
