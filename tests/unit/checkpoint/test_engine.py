"""Checkpoint files hold tensors and a few named records, and nothing that runs."""

from __future__ import annotations

from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch
import xxhash
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.checkpoint.torch_file import ALLOWED_RECORDS

BACKGROUND = pytest.mark.parametrize("background", [False, True])


@BACKGROUND
def test_save_records_size_and_checksum_of_what_was_there(tmp_path: Path, background: bool) -> None:
    storage, path = RecordingStorage(background=background), tmp_path / "a.pt"
    value = torch.arange(1_000_000.0)
    nested = [{"stage": ZeroStageEnum.gradients}]
    state = OrderedDict(w=value, part=value[10:13], nested=nested, size=(2, 3))
    storage.save(state, str(path))
    value.zero_()
    storage.wait()
    assert not storage.is_writing
    record, loaded = storage.records["a.pt"], storage.load(str(path))
    assert record.bytes == path.stat().st_size
    assert record.xxh3 == xxhash.xxh3_64_hexdigest(path.read_bytes())
    assert torch.equal(loaded["w"], torch.arange(1_000_000.0))
    assert loaded["part"].tolist() == [10, 11, 12]
    assert (loaded["nested"], loaded["size"]) == ([{"stage": 2}], (2, 3))


def test_save_enums_become_numbers_so_that_no_call_is_stored(tmp_path: Path) -> None:
    storage, path = RecordingStorage(), tmp_path / "a.pt"
    slices = {"w": fragment_address(numel=3, start=1)}
    storage.save({"zero_stage": ZeroStageEnum.gradients, "slices": slices}, str(path))
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    allowed = {f"{record.__module__}.{record.__qualname__}" for record in ALLOWED_RECORDS}
    loaded = storage.load(str(path))
    assert set(unsafe) <= allowed
    assert loaded["zero_stage"] == ZeroStageEnum.gradients
    assert not isinstance(loaded["zero_stage"], Enum)
    assert loaded["slices"]["w"].start == 1


@BACKGROUND
def test_save_failure_is_remembered_not_raised(tmp_path: Path, background: bool) -> None:
    storage = RecordingStorage(background=background)
    storage.save({"x": 1}, str(tmp_path / "missing" / "a.pt"))
    storage.save({"x": 1}, str(tmp_path / "b.pt"))
    storage.wait()
    assert "No such file or directory" in storage.failure
    assert not (tmp_path / "b.pt").exists(), "nothing more is written after a failure"
    storage.create(None)
    assert storage.failure is None
