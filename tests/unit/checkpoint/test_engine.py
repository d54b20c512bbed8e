"""Checkpoint files hold tensors and a few named records, and nothing that runs."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from enum import Enum
from pathlib import Path

import pytest
import torch
import xxhash
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from promoe_ds.checkpoint.engine import RecordingStorage
from promoe_ds.checkpoint.torch_file import ALLOWED_RECORDS, load_torch
from promoe_ds.errors import CheckpointError


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_save_records_size_and_checksum_of_what_lies_on_disk(tmp_path) -> None:
    storage, path = RecordingStorage(), tmp_path / "a.pt"
    storage.save({"x": torch.arange(1000.0)}, str(path))
    record = storage.records["a.pt"]
    assert record.bytes == path.stat().st_size
    assert record.xxh3 == xxhash.xxh3_64_hexdigest(path.read_bytes())
    assert torch.equal(storage.load(str(path))["x"], torch.arange(1000.0))


def test_save_enums_become_numbers_so_that_no_call_is_stored(tmp_path) -> None:
    storage, path = RecordingStorage(), tmp_path / "a.pt"
    state = {
        "zero_stage": ZeroStageEnum.gradients,
        "nested": [{"stage": ZeroStageEnum.weights}],
        "slices": {"w": fragment_address(numel=3, start=1)},
    }
    storage.save(state, str(path))
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert set(unsafe) <= {
        f"{record.__module__}.{record.__qualname__}" for record in ALLOWED_RECORDS
    }
    loaded = storage.load(str(path))
    assert loaded["zero_stage"] == ZeroStageEnum.gradients
    assert not isinstance(loaded["zero_stage"], Enum)
    assert loaded["slices"]["w"].start == 1


def test_save_failure_is_remembered_not_raised(tmp_path) -> None:
    storage = RecordingStorage()
    storage.save({"x": 1}, str(tmp_path / "missing" / "a.pt"))
    assert "No such file or directory" in storage.failure
    storage.save({"x": 1}, str(tmp_path / "b.pt"))
    assert not (tmp_path / "b.pt").exists(), "nothing more is written after a failure"
    storage.create(None)
    assert storage.failure is None


def test_save_in_the_background_writes_what_was_there_when_it_was_asked(tmp_path) -> None:
    storage, value = RecordingStorage(background=True), torch.arange(1_000_000.0)
    state = OrderedDict(
        w=value, part=value[10:13], nested=[{"stage": ZeroStageEnum.gradients}], size=(2, 3)
    )
    storage.save(state, str(tmp_path / "a.pt"))
    value.zero_()
    storage.wait()
    assert not storage.is_writing
    loaded = storage.load(str(tmp_path / "a.pt"))
    assert torch.equal(loaded["w"], torch.arange(1_000_000.0))
    assert loaded["part"].tolist() == [10, 11, 12]
    assert (loaded["nested"], loaded["size"]) == ([{"stage": 2}], (2, 3))
    assert storage.records["a.pt"].xxh3 == xxhash.xxh3_64_hexdigest(
        (tmp_path / "a.pt").read_bytes()
    )


def test_save_in_the_background_failure_is_remembered(tmp_path) -> None:
    storage = RecordingStorage(background=True)
    storage.save({"x": 1}, str(tmp_path / "missing" / "a.pt"))
    storage.wait()
    assert "No such file or directory" in storage.failure


def test_load_malicious_pickle_does_not_execute(tmp_path) -> None:
    target = tmp_path / "executed"
    torch.save({"x": _Bomb(target)}, tmp_path / "bomb.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(_Bomb(target)))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_torch(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off"])
def test_load_broken_file_is_named(tmp_path, content) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pt: cannot be read"):
        load_torch(tmp_path / "a.pt")
