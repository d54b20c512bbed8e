"""Several checkpoints and guidance scales in one command: folders, what is skipped, what is
refused.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.cli.sample import main
from promoe_ds.errors import CheckpointError, ConfigError
from promoe_ds.evaluation.sample_job import draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest
from promoe_ds.evaluation.sampling import LatentSampler

from .made import make_export

RUN = Path(__file__).parents[2] / "fixtures/version_0_1/run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run with checkpoints of the steps 0 and 4."""
    shutil.copytree(RUN, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    convert(RUN, Request(destination=tmp_path / "start", to="deepspeed", weights="raw"))
    (tmp_path / "start/step_0000000").rename(checkpoints / "step_0000000")
    return tmp_path / "run"


def record(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


def test_checkpoints_and_scales_are_drawn_into_folders_of_their_own_and_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "promoe_ds")
    out = tmp_path / "out"
    command = ["--model", str(run), "--out", str(out), "--checkpoint-steps", "0,4,4"]
    command += ["--cfg-scale", "1.0", "1.5,1.0", "--num", "3", "--steps", "2", "--device", "cpu"]
    main(command)
    folders = sorted(str(path.parent.relative_to(out)) for path in out.rglob("samples.npz"))
    steps = "step_0000000", "step_0000004"
    assert folders == [f"{step}/cfg_{scale}" for step in steps for scale in (1.0, 1.5)]
    for step in steps:
        for scale in (1.0, 1.5):
            drawn = record(out / step / f"cfg_{scale}")
            assert drawn["cfg_scale"] == scale and drawn["model"] == str(out / "exports" / step)
    alone = SampleRequest(model=out / "exports" / steps[1], out=tmp_path / "alone", num=3, steps=2)
    draw_samples(alone)
    with (
        np.load(tmp_path / "alone/samples.npz") as one,
        np.load(out / "step_0000004/cfg_1.5/samples.npz") as other,
    ):
        assert np.array_equal(one["arr_0"], other["arr_0"])
    shutil.rmtree(out / "step_0000004/cfg_1.0")
    drawn, real = [], LatentSampler.sample
    monkeypatch.setattr(
        LatentSampler, "sample", lambda self, *given: drawn.append(given) or real(self, *given)
    )
    caplog.clear()
    main(command)
    assert len(drawn) == 1 and caplog.text.count("all 3 samples are there") == 3
    assert "exported" not in caplog.text


def test_one_scale_has_no_folder_and_several_of_an_export_have(tmp_path: Path) -> None:
    request = SampleRequest(model=make_export(tmp_path), out=tmp_path / "one", num=2, steps=2)
    draw_samples(request, cfg_scales=(3.0,))
    assert record(tmp_path / "one")["cfg_scale"] == 3.0
    with pytest.raises(ConfigError, match="samples of one job"):
        draw_samples(request, cfg_scales=(1.0, 3.0))
    several = SampleRequest(model=request.model, out=tmp_path / "several", num=2, steps=2)
    draw_samples(several, cfg_scales=(1.0, 3.0))
    assert {path.name for path in several.out.iterdir()} == {"cfg_1.0", "cfg_3.0"}


def test_series_that_cannot_be_is_refused_before_the_first_image(run: Path, tmp_path: Path) -> None:
    request = SampleRequest(model=run, out=tmp_path / "out", num=2, steps=2)
    with pytest.raises(CheckpointError, match=r"--checkpoint-steps 3: .* 0, 4"):
        draw_samples(request, checkpoint_steps=(4, 3))
    with pytest.raises(ConfigError, match=r"--cfg-scale=0\.5"):
        draw_samples(request, checkpoint_steps=(4,), cfg_scales=(1.0, 0.5))
    assert not list(request.out.rglob("*.png"))
    config = request.out / "exports/step_0000004/config.json"
    content = json.loads(config.read_text())
    content["origin"]["manifest"] = "of another"
    config.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"step_0000004 is not of .*remove it"):
        draw_samples(request, checkpoint_steps=(4,))


def test_sample_file_that_is_cut_is_put_together_anew(tmp_path: Path) -> None:
    request = SampleRequest(model=make_export(tmp_path), out=tmp_path / "out", num=2, steps=2)
    draw_samples(request)
    whole = (request.out / "samples.npz").read_bytes()
    (request.out / "samples.npz").write_bytes(whole[:50])
    draw_samples(request)
    assert (request.out / "samples.npz").read_bytes() == whole


def test_features_are_written_beside_the_samples_and_again_for_more_of_them(tmp_path: Path) -> None:
    request = SampleRequest(
        model=make_export(tmp_path), out=tmp_path / "out", num=5, steps=2, features="pixels"
    )
    assert draw_samples(request)[-1] == request.out / "features.npz"
    draw_samples(replace(request, num=6))
    with (
        np.load(request.out / "features.npz") as stated,
        np.load(request.out / "samples.npz") as data,
    ):
        pixels = data["arr_0"].reshape(6, -1) / 255
        np.testing.assert_allclose(stated["mu"], pixels.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(stated["sigma"], np.cov(pixels, rowvar=False), atol=1e-6)
        assert stated["count"] == 6 and "pixels" in str(stated["extractor"])


@pytest.mark.parametrize(
    ("values", "channels", "message"),
    [({}, 4, r"--features: latents .*--vae"), ({"num": 1}, 1, r"--features: .*--num")],
)
def test_features_of_what_has_none_are_refused(
    tmp_path: Path, values: dict, channels: int, message: str
) -> None:
    export = make_export(tmp_path, model={"in_channels": channels})
    request = SampleRequest(model=export, out=tmp_path / "out", steps=2, features="pixels")
    with pytest.raises(ConfigError, match=message):
        draw_samples(replace(request, **values))
    assert not request.out.exists()
