"""Files of torch.save by ranges: exact, without running anything, and refused by name if
damaged.
"""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from pathlib import Path

import psutil
import pytest
import torch

from promoe_ds.checkpoint.torch_file import (
    TorchFileWriter,
    check_records,
    copy_range,
    copy_tensor,
    load_torch,
)
from promoe_ds.errors import CheckpointError

VALUES = {
    "a": torch.arange(60.0).view(5, 12),
    "nested": {"list": [torch.arange(3), 7], "half": torch.randn(9).bfloat16()},
}


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a file is written."""
    return tmp_path / "x.pt"


def test_mapped_tensors_and_ranges_are_exact_again_and_again(path: Path) -> None:
    torch.save({**VALUES, "view": VALUES["a"][1:3], "turned": VALUES["a"].t()}, path)
    content, out = load_torch(path, is_mapped=True), torch.empty(7)
    for _ in range(2):
        assert torch.equal(copy_tensor(content["view"]), VALUES["a"][1:3])
        assert torch.equal(copy_tensor(content["nested"]["half"]), VALUES["nested"]["half"])
        for name, expected in (("a", VALUES["a"]), ("turned", VALUES["a"].t())):
            assert torch.equal(copy_tensor(content[name]), expected)
            copy_range(out, content[name], 11)
            assert torch.equal(out, expected.reshape(-1)[11:18])
    for wrong, start in ((out, 55), (out.double(), 0)):
        with pytest.raises(ValueError, match="60 values"):
            copy_range(wrong, content["a"], start)


def test_values_that_are_not_mapped_are_kept_when_they_are_copied() -> None:
    value = torch.arange(100_000.0)
    assert torch.equal(copy_tensor(value), value)
    assert value[-1] == 99_999


def test_what_was_read_of_a_mapped_file_leaves_the_memory(path: Path) -> None:
    torch.save([torch.ones(2_000_000) for _ in range(20)], path)
    content, before = load_torch(path, is_mapped=True), psutil.Process().memory_info().rss
    for value in content:
        assert copy_tensor(value)[-1] == 1
        assert psutil.Process().memory_info().rss - before < 6 * value.nbytes


def test_written_file_equals_torch_save(path: Path) -> None:
    content = {"a": torch.empty(5, 12), "b": [torch.empty(0), 3]}
    writer = TorchFileWriter(path, content)
    with pytest.raises(CheckpointError):
        writer.write(content["a"], torch.zeros(5, 11))
    writer.write(content["a"], VALUES["a"])
    writer.write(content["b"][0], torch.empty(0))
    writer.close()
    assert zipfile.ZipFile(path).testzip() is None
    for is_mapped in (False, True):
        found = load_torch(path, is_mapped=is_mapped)
        assert torch.equal(found["a"], VALUES["a"])
        assert found["b"][1] == 3


@pytest.mark.parametrize("is_mapped", [False, True])
@pytest.mark.parametrize("size", [0, 7, 15_000, -1])
def test_truncated_file_is_refused_by_name(path: Path, size: int, is_mapped: bool) -> None:
    torch.save({"a": torch.randn(4000)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be read"):
        load_torch(path, is_mapped=is_mapped)


def test_tensor_that_claims_more_than_the_file_has_is_refused_by_name(path: Path) -> None:
    torch.save({"a": torch.randn(10**6)}, path)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(path.with_name("y.pt"), "w") as changed:
        for record in good.infolist():
            size, claimed = ((b"J" + each.to_bytes(4, "little")) for each in (10**6, 10**9))
            changed.writestr(record, good.read(record).replace(size, claimed))
    with pytest.raises(CheckpointError, match=r"y\.pt"):
        load_torch(path.with_name("y.pt"), is_mapped=True)


def test_flipped_bit_is_named_with_its_record(path: Path) -> None:
    torch.save(VALUES, path)
    check_records(path)
    content, wanted = bytearray(path.read_bytes()), VALUES["a"].numpy().tobytes()
    content[content.index(wanted) + 17] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"x\.pt: .* x/data/0 "):
        check_records(path)


def test_malicious_file_is_refused_and_does_nothing(path: Path, tmp_path: Path) -> None:
    trace, raw = tmp_path / "trace", tmp_path / "raw.pt"
    torch.save({"step": 1, "model_state_dict": {"x": Malicious(trace)}}, path)
    raw.write_bytes(pickle.dumps(Malicious(trace)))
    for file in (path, raw):
        with pytest.raises(CheckpointError, match=file.name):
            load_torch(file)
    assert not trace.exists()


def test_more_files_are_mapped_than_may_be_open(path: Path) -> None:
    torch.save(VALUES, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        few = len(list(Path("/proc/self/fd").iterdir())) + 4
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        files = [load_torch(path, is_mapped=True) for _ in range(20)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(torch.equal(file["a"], VALUES["a"]) for file in files)
