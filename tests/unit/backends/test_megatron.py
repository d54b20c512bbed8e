"""What the Megatron path says where it cannot run."""

from __future__ import annotations

import sys

import pytest
import torch

from promoe_ds.backends.megatron import require_megatron
from promoe_ds.errors import ConfigError


def test_megatron_not_installed_is_said(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(
        ConfigError,
        match=r"parallel.dispatch=megatron needs megatron-core, which cannot be imported .*: pip "
        r"install 'promoe_ds\[megatron\]', or use parallel.dispatch=alltoall",
    ):
        require_megatron()


def test_megatron_on_the_cpu_of_a_cuda_process_is_refused(monkeypatch) -> None:
    from promoe_ds.backends.megatron_private import cpu_construction

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    with (
        pytest.raises(ConfigError, match="needs a process that sees no CUDA device: set"),
        cpu_construction(),
    ):
        pass
    assert torch.cuda.current_device is before
