"""The loader that works ahead: the same batches whatever was asked before, errors in the step that
needed the batch.
"""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from promoe_ds.config import plan_batches
from promoe_ds.data import build_dataset
from promoe_ds.diffusion import build_objective
from promoe_ds.distributed.context import DistributedContext
from promoe_ds.errors import DataError
from promoe_ds.training.loader import BatchLoader, Place

from ..builders import small_config

CONFIG = small_config(
    train={"global_batch_size": 8, "micro_batch_size": 2},
    data={"dataset": "synthetic", "synthetic_samples": 50},
)
BUCKETS = small_config(
    model={"buckets": [4, [2, 6]]},
    train={"global_batch_size": 8, "micro_batch_size": 2},
    data={"dataset": "synthetic", "synthetic_samples": 10},
)
SECOND_OF_TWO = DistributedContext(rank=1, world_size=2, device=torch.device("cpu"))


def make_loader(dataset=None, config=CONFIG) -> BatchLoader:
    return BatchLoader(
        dataset or build_dataset(config),
        build_objective(config.diffusion),
        config,
        plan_batches(config, 2),
        SECOND_OF_TWO,
    )


def tensors(batch) -> list[torch.Tensor]:
    return [batch.clean_BZHW, batch.noise_BZHW, batch.sigma_B, batch.condition.labels_B]


@pytest.mark.parametrize("config", [CONFIG, BUCKETS], ids=["one size", "buckets"])
def test_loader_batches_are_a_function_of_their_place_alone(config) -> None:
    loader, batches = make_loader(config=config), plan_batches(config, 2)
    place, places = Place(0, 0), []
    for _ in range(6):
        places.append(place)
        place = place.next(batches)
    assert [(p.step, p.samples_seen, p.micro_step) for p in places] == [
        (0, 0, 0),
        (0, 0, 1),
        (1, 8, 0),
        (1, 8, 1),
        (2, 16, 0),
        (2, 16, 1),
    ]
    in_order = [tensors(loader.take(place)) for place in places]
    for position in (4, 1, 5, 0):  # as after resumes, with nothing of the right place made ahead
        slots = batches.slots(places[position].micro_step, 1)
        alone = tensors(make_loader(config=config).make(places[position], slots))
        assert all(torch.equal(a, b) for a, b in zip(in_order[position], alone, strict=True))
        assert all(
            torch.equal(a, b)
            for a, b in zip(in_order[position], tensors(loader.take(places[position])), strict=True)
        )
    loader.close()


def test_loader_of_buckets_gives_one_size_a_global_batch_and_every_sample_once_an_epoch() -> None:
    loader, sizes, seen = make_loader(config=BUCKETS), [], []
    for step in range(4):  # two epochs of 10 + 10 samples in batches of 8: 2 * 16 of 2 * 20
        whole, _ = loader.samples(Place(step, 8 * step), range(8))
        parts = [loader.samples(Place(step, 8 * step), range(s, s + 2))[0] for s in (0, 2, 4, 6)]
        assert torch.equal(torch.cat(parts), whole)
        sizes.append(tuple(whole.shape[2:]))
        seen += [latent.numpy().tobytes() for latent in whole]
    assert sorted(set(sizes)) == [(2, 6), (4, 4)]
    counts = Counter(seen)
    assert len(counts) == 20 and set(counts.values()) == {1, 2}
    loader.close()


class Failing:
    """Has a record that cannot be read; says by which thread it was asked."""

    def __init__(self, bad_start: int) -> None:
        self.inner, self.bad_start, self.threads = build_dataset(CONFIG), bad_start, set()

    def __len__(self) -> int:
        return len(self.inner)

    def take(self, indices, positions=None):
        self.threads.add(threading.current_thread().name)
        if positions[0] == self.bad_start:
            raise DataError("record 12 is not finite")
        return self.inner.take(indices, positions)


def test_loader_raises_an_error_in_the_step_that_needed_the_batch_and_leaves_no_thread() -> None:
    dataset = Failing(bad_start=8 + plan_batches(CONFIG, 2).slots(0, 1).start)
    loader = make_loader(dataset)
    loader.take(Place(0, 0, 0))
    loader.take(Place(0, 0, 1))
    with pytest.raises(DataError, match="record 12"):
        loader.take(Place(1, 8, 0))
    loader.close()
    assert not any(thread.name in dataset.threads for thread in threading.enumerate())
    assert threading.current_thread().name not in dataset.threads
