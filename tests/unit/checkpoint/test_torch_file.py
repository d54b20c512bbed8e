"""Files of torch.save by ranges: exact, without running anything, and refused by name when damaged."""

from __future__ import annotations

import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.torch_file import TorchFile, TorchFileWriter
from promoe_ds.errors import CheckpointError

from ..builders import small_config

VALUES = {"a": torch.arange(60.0).view(5, 12), "nested": {"list": [torch.arange(3), 7], "half": torch.randn(9).bfloat16()}}


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_file_whole_tensors_and_ranges_are_exact(tmp_path: Path) -> None:
    torch.save({**VALUES, "view": VALUES["a"][1:3], "turned": VALUES["a"].t()}, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        content = file.content
        assert torch.equal(file.read(content["a"]), VALUES["a"])
        assert torch.equal(file.read(content["view"]), VALUES["a"][1:3])
        assert torch.equal(file.read(content["turned"]), VALUES["a"].t())
        assert torch.equal(file.read(content["nested"]["half"]), VALUES["nested"]["half"])
        assert file.item(content["nested"]["list"][1]) == 7
        out = torch.empty(7)
        file.read_into(out, content["a"], 11)
        assert torch.equal(out, VALUES["a"].view(-1)[11:18])
        with pytest.raises(CheckpointError, match=r"x\.pt: holds 60 values"):
            file.read_into(out, content["a"], 55)


def test_writer_filled_in_afterwards_equals_torch_save(tmp_path: Path) -> None:
    writer = TorchFileWriter(tmp_path / "x.pt", {"a": torch.empty(5, 12), "b": [torch.empty(0), 3]})
    with pytest.raises(CheckpointError, match="does not fit"):
        writer.write(writer.content["a"], torch.zeros(5, 11))
    writer.write(writer.content["a"], VALUES["a"])
    writer.write(writer.content["b"][0], torch.empty(0))
    writer.close()
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    for mmap in (False, True):
        found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        assert torch.equal(found["a"], VALUES["a"])
        assert found["b"][1] == 3


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_file_truncated_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    torch.save({"a": torch.randn(4000)}, tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", (tmp_path / "x.pt").stat().st_size - cut)
    with pytest.raises(CheckpointError, match=r"x\.pt: cannot be read"):
        TorchFile(tmp_path / "x.pt")


def test_file_flipped_bit_is_named(tmp_path: Path) -> None:
    torch.save(VALUES, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        file.check_records()
    content, wanted = bytearray((tmp_path / "x.pt").read_bytes()), VALUES["a"].numpy().tobytes()
    content[content.index(wanted) + 17] ^= 1
    (tmp_path / "x.pt").write_bytes(bytes(content))
    with TorchFile(tmp_path / "x.pt") as file, pytest.raises(CheckpointError, match=r"x\.pt: its record x/data/0 does not match"):
        file.check_records()


def test_malicious_published_file_is_refused_and_does_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"step": 1, "model_state_dict": {"x": Malicious(trace)}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth: cannot be read"):
        convert(tmp_path / "evil.pth", Request(destination=tmp_path / "out", to="single"), small_config())
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def test_more_files_than_the_soft_limit_are_opened_and_the_hard_one_is_named(tmp_path: Path, monkeypatch) -> None:
    torch.save(VALUES, tmp_path / "x.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(list(Path("/proc/self/fd").iterdir())) + 4
    files = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        files += [TorchFile(tmp_path / "x.pt") for _ in range(20)]
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (few, few))
        with pytest.raises(CheckpointError, match=rf"x\.pt: cannot be opened beside all others: this process may hold {few} files"):
            TorchFile(tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in files:
            file.close()
