"""The folder of a sampling job: resumed, repaired, recorded, and refused where it is another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation.images import SampleFolder
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest
from promoe_ds.evaluation.sampling import LatentSampler

from .made import make_export


@pytest.fixture
def request_(tmp_path: Path) -> SampleRequest:
    """Return a request for nine images of pixels."""
    common = {"num": 9, "steps": 3, "exact": True}
    return SampleRequest(model=make_export(tmp_path), out=tmp_path / "out", **common)


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Return the indices of images as they are drawn; after a -1 in it, drawing is interrupted."""
    real, indices_drawn = LatentSampler.sample, []

    def sample(self, indices, *conditions):
        if -1 in indices_drawn and len(indices_drawn) == 5:
            raise KeyboardInterrupt
        indices_drawn.extend(indices)
        return real(self, indices, *conditions)

    monkeypatch.setattr(LatentSampler, "sample", sample)
    return indices_drawn


def npz(request_: SampleRequest) -> bytes:
    return (request_.out / "samples.npz").read_bytes()


def test_sampling_stopped_resumes_and_draws_only_what_is_missing(
    request_: SampleRequest, drawn: list[int], tmp_path: Path
) -> None:
    whole = replace(request_, out=tmp_path / "whole")
    draw_samples(whole)
    drawn[:] = [-1]
    with pytest.raises(KeyboardInterrupt):
        draw_samples(request_)
    names = [path.name for path in request_.out.iterdir()]
    assert "samples.npz" not in names and len(names) == 5  # four images and the record
    drawn.clear()
    draw_samples(replace(request_, batch_size=2))
    assert drawn == [4, 5, 6, 7, 8] and npz(request_) == npz(whole)
    draw_samples(replace(request_, num=11))  # more of them
    assert drawn == [4, 5, 6, 7, 8, 9, 10]


def test_sampling_draws_damaged_files_anew(
    request_: SampleRequest, drawn: list[int], monkeypatch
) -> None:
    draw_samples(request_)
    whole, files = npz(request_), sorted(request_.out.glob("*.png"))
    files[2].write_bytes(b"")
    files[5].write_bytes(files[5].read_bytes()[:40])
    Image.new("L", (5, 5)).save(files[7])
    drawn.clear()
    draw_samples(request_)
    assert drawn == [2, 5, 7] and npz(request_) == whole

    def unreadable(folder, index):
        raise DataError("unreadable")

    monkeypatch.setattr(SampleFolder, "read", unreadable)
    (request_.out / "samples.npz").unlink()
    with pytest.raises(ConfigError, match="9 samples, the first of them 0, cannot be read"):
        draw_samples(request_)


def test_sampling_latents_whose_part_is_damaged_draws_it_anew(tmp_path: Path, monkeypatch) -> None:
    export, real = make_export(tmp_path, model={"in_channels": 4}), SampleFolder.assemble

    def draw(name: str) -> bytes:
        draw_samples(SampleRequest(model=export, out=tmp_path / name, num=3, steps=3, exact=True))
        return (tmp_path / name / "latents.safetensors").read_bytes()

    def assemble_damaged(self):
        monkeypatch.setattr(SampleFolder, "assemble", real)
        (self.path / "parts" / "img000001_class1.npy").write_bytes(b"cut")
        return self.assemble()

    whole = draw("whole")
    monkeypatch.setattr(SampleFolder, "assemble", assemble_damaged)
    assert draw("out") == whole


def test_sampling_records_what_decides_the_images_and_every_software_that_took_part(
    request_: SampleRequest, monkeypatch
) -> None:
    request_ = replace(request_, classes=(3, 1), grid=True)
    written = draw_samples(replace(request_, num=5))
    assert [path.name for path in written] == ["img*.png (5 files)", "samples.npz", "grid.png"]
    draw_samples(replace(request_, num=7))
    monkeypatch.setattr("promoe_ds.evaluation.sample_job.versions_of", lambda *names: {"a": "9"})
    draw_samples(request_)
    settings = json.loads((request_.out / "samples.json").read_text())
    expected = {"seed": 0, "steps": 3, "classes": [3, 1], "exact": True, "num": 9}
    assert settings.items() >= {**expected, "origin": {"step": 5}}.items()
    assert settings["weights"].startswith("xxh3_64:")
    first, second = settings["environments"]
    assert first["device"] == second["device"] == "cpu" and second["versions"] == {"a": "9"}
    with np.load(request_.out / "samples.npz") as data:
        assert data["arr_0"].shape == (9, 4, 4, 1) and data["arr_0"].dtype == np.uint8
        assert data["labels"].tolist() == [3, 1, 3, 1, 3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"steps": 4, "cfg_scale": 3.0}, r"steps is 3 .* 4 here; cfg_scale is 1\.5 .* 3\.0 here"),
        ({"num": 3}, "holds 9 samples, 3 are asked for"),
    ],
)
def test_sampling_into_other_samples_is_refused(
    request_: SampleRequest, values: dict, message: str
) -> None:
    draw_samples(request_)
    with pytest.raises(ConfigError, match=message):
        draw_samples(replace(request_, **values))


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("thesis.txt", "", ConfigError, "out: holds something else"),
        ("samples.json", "[1]", DataError, r"samples\.json: not a readable record"),
        ("samples.json", '{"num": "9"}', DataError, r"samples\.json: .*num"),
    ],
)
def test_sampling_into_a_folder_of_something_else_is_refused(
    request_: SampleRequest, name: str, content: str, kind: type[Exception], message: str
) -> None:
    request_.out.mkdir()
    (request_.out / name).write_text(content)
    with pytest.raises(kind, match=message):
        draw_samples(request_)
