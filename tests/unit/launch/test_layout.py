"""On which hosts and with which ep_size a job restarts when some hosts are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from promoe_ds.config import load_config
from promoe_ds.errors import LaunchError
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.layout import Job, choose_layout


def _job(*overrides: str) -> Job:
    return Job(
        hosts=(),
        arguments=("--recipe", "x"),
        recipe="digits_promoe",
        overrides=overrides,
        deepspeed_config="",
        config=load_config("digits_promoe", overrides),
        run_dir=Path(),
    )


def _hosts(*slots: int) -> list[Host]:
    return [Host(f"h{number}", count) for number, count in enumerate(slots)]


@pytest.mark.parametrize(
    ("slots", "batch", "ep", "experts", "expected"),
    [
        ((8, 8), 256, 4, 12, (2, 16, 4)),  # nothing changes
        ((2,), 16, 4, 4, (1, 2, 2)),  # half the ranks: ep_size lowered to fit
        ((1, 1, 1), 16, 3, 6, (2, 2, 2)),  # 3 do not divide the batch: one host idles
        ((3, 3), 12, 2, 4, (2, 6, 2)),
        ((3,), 12, 2, 4, (1, 3, 1)),  # 2 do not divide 3 ranks
    ],
)
def test_layout_most_hosts_and_largest_legal_ep_size(slots, batch, ep, experts, expected) -> None:
    job = _job(
        f"train.global_batch_size={batch}",
        f"parallel.ep_size={ep}",
        f"routing.num_experts={experts}",
    )
    chosen = choose_layout(job, _hosts(*slots))
    assert (len(chosen.hosts), chosen.ranks, chosen.config.parallel.ep_size) == expected
    assert chosen.arguments[2:] == (
        () if expected[2] == ep else ("--set", f"parallel.ep_size={expected[2]}")
    )


def test_layout_none_legal_says_why() -> None:
    with pytest.raises(LaunchError, match=r"h0: 7 ranks: train.global_batch_size=16"):
        choose_layout(_job("train.global_batch_size=16"), _hosts(7))
