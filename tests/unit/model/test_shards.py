"""Safetensors files of one or several parts: whole, checked against their checksums, refused by
name when damaged.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from promoe_ds.errors import CheckpointError
from promoe_ds.model.shards import ShardReader, ShardWriter

VALUES = {
    "a.weight": torch.arange(60.0).view(5, 12),
    "b": torch.randn(300).bfloat16(),
    "c": torch.tensor(3.0),
    "d": torch.empty(0, 4),
}


def _write(folder: Path, max_bytes: int = 10**6) -> list[Path]:
    writer = ShardWriter(folder, "model", max_bytes=max_bytes)
    for name, value in VALUES.items():
        writer.write(name, value)
    writer.close()
    return sorted(folder.glob("*.safetensors"))


def _flip(path: Path, value: torch.Tensor) -> None:
    """Change one bit of a tensor in a file."""
    content, wanted = (
        bytearray(path.read_bytes()),
        value.view(-1).view(torch.uint8).numpy().tobytes(),
    )
    content[content.index(wanted) + len(wanted) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(("max_bytes", "count"), [(10**6, 1), (400, 3)])
def test_shards_are_read_back_exactly_by_us_and_by_others(
    tmp_path, max_bytes: int, count: int
) -> None:
    files = _write(tmp_path, max_bytes)
    assert len(files) == count
    reader = ShardReader(tmp_path, "model")
    found = {name: reader.read(name) for name in reader.shapes}
    assert found.keys() == VALUES.keys() == {name for file in files for name in load_file(file)}
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype
        for name, value in VALUES.items()
    )
    assert torch.equal(reader.read_rows("a.weight", 1, 3), VALUES["a.weight"][1:4])


@pytest.mark.parametrize("max_bytes", [10**6, 400])
@pytest.mark.parametrize("name", ["a.weight", "b"])
def test_shards_flipped_bit_is_named(tmp_path, max_bytes: int, name: str) -> None:
    files = _write(tmp_path, max_bytes)
    (file,) = (file for file in files if name in safe_open(file, "pt").keys())
    _flip(file, VALUES[name])
    reader = ShardReader(tmp_path, "model")
    with pytest.raises(CheckpointError, match=rf"{file.name}: {name} does not match its checksum"):
        reader.read(name)
    for other in VALUES.keys() - {name}:
        assert torch.equal(reader.read(other), VALUES[other])


def test_shards_of_other_programs_have_no_checksums_and_are_read(tmp_path) -> None:
    save_file(VALUES, tmp_path / "model.safetensors")
    assert torch.equal(ShardReader(tmp_path, "model").read("b"), VALUES["b"])


@pytest.mark.parametrize("text", ["3", "{", "[1]"])
def test_shards_with_senseless_checksums_are_refused(tmp_path, text: str) -> None:
    save_file(VALUES, tmp_path / "model.safetensors", metadata={"xxh3_64": text})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: xxh3_64 cannot be understood"):
        ShardReader(tmp_path, "model")
