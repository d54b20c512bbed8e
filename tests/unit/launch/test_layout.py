"""On which hosts and with which ep_size a run resumes when some hosts are gone."""

from __future__ import annotations

import pytest

from promoe_ds.errors import ConfigError, LaunchError
from promoe_ds.launch.hostfile import Host
from promoe_ds.launch.layout import choose_layout


def _hosts(*slots: int) -> list[Host]:
    return [Host(f"h{number}", count) for number, count in enumerate(slots)]


@pytest.mark.parametrize(("slots", "batch", "ep", "experts", "expected"), [
    ((8, 8), 256, 8, 12, None),                # 12 experts on 8 ranks: no such recipe
    ((8, 8), 256, 4, 12, (2, 16, 4)),          # nothing changes
    ((2,), 16, 4, 4, (1, 2, 2)),               # half the ranks: ep_size lowered to fit
    ((1, 1, 1), 16, 3, 6, (2, 2, 2)),          # 3 do not divide the batch: one host idles
    ((3, 3), 12, 2, 4, (2, 6, 2)),
    ((3,), 12, 2, 4, (1, 3, 1)),               # 2 do not divide 3 ranks
])
def test_layout_most_hosts_and_largest_legal_ep_size(slots, batch, ep, experts, expected) -> None:
    overrides = (f"train.global_batch_size={batch}", f"parallel.ep_size={ep}", f"routing.num_experts={experts}")
    if expected is None:
        with pytest.raises(ConfigError, match=r"does not divide routing.num_experts=12"):
            choose_layout("digits_promoe", overrides, _hosts(*slots))
        return
    layout = choose_layout("digits_promoe", overrides, _hosts(*slots))
    assert (len(layout.hosts), layout.ranks, layout.config.parallel.ep_size) == expected


def test_layout_none_legal_says_why() -> None:
    with pytest.raises(LaunchError, match=r"no legal layout on h0: 7 ranks: train.global_batch_size=16 cannot be cut"):
        choose_layout("digits_promoe", ("train.global_batch_size=16",), _hosts(7))
