"""What glibc's allocator does with freed blocks."""

from __future__ import annotations

import os
import resource
import sys

import pytest
import torch

from benchmarks.processes import in_fresh_process
from promoe_ds.distributed.host_memory import keep_freed_memory

BYTES = 256 * 2**20


def pages_of_a_second_block(variables: dict[str, str]) -> tuple[bool, float]:
    """Return whether freed memory is kept, and which share of a block's pages the kernel clears
    when it is freed and allocated again.
    """
    os.environ.update(variables)
    is_kept = keep_freed_memory()
    torch.ones(BYTES, dtype=torch.uint8)
    cleared = []
    for _ in range(5):  # a kernel short of memory may take pages back between two of them
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(BYTES, dtype=torch.uint8)
        cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return is_kept, min(cleared) * resource.getpagesize() / BYTES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
@pytest.mark.parametrize(("variables", "is_kept"), [({}, True), ({"MALLOC_ARENA_MAX": "1"}, False)])
def test_freed_blocks_are_kept_unless_the_environment_sets_the_allocator(
    variables, is_kept
) -> None:
    kept, cleared = in_fresh_process(pages_of_a_second_block, variables)
    assert (kept, cleared < 0.1) == (is_kept, is_kept)


def test_allocator_that_tunables_set_is_left_alone(monkeypatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert not keep_freed_memory()
