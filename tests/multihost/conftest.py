"""Clusters of two and three hosts, and a launcher to start on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, why_not


def _cluster(size: int, factory: pytest.TempPathFactory, network: str) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(size, factory.mktemp("cluster") / "hosts", network) as cluster:
        for name in cluster.addresses:
            (cluster.home(name) / ".deepspeed_env").write_text(
                "# one CPU a rank\n\nDS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n"
            )
        yield cluster


@pytest.fixture(scope="session")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield two hosts."""
    yield from _cluster(2, tmp_path_factory, "10.87.2")


@pytest.fixture(scope="session")
def three_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield three hosts."""
    yield from _cluster(3, tmp_path_factory, "10.87.3")


@pytest.fixture(scope="session")
def single_host_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Train on two ranks of one host, without any launcher of hosts: the losses that every other
    layout must repeat.
    """
    from tests.distributed.jobs import Job, metrics, run_jobs

    folder = tmp_path_factory.mktemp("single")
    jobs = {
        "four_experts": Job(
            run_dir=folder / "four", overrides=("parallel.ep_size=2", "train.max_steps=40")
        ),
        "six_experts": Job(
            run_dir=folder / "six",
            overrides=(
                "parallel.ep_size=2",
                "train.max_steps=40",
                "routing.num_experts=6",
                "train.global_batch_size=12",
            ),
        ),
    }
    assert run_jobs(2, list(jobs.values()), folder) == ["", ""]
    return {
        name: [line["loss"] for line in metrics(Path(job.run_dir))] for name, job in jobs.items()
    }
