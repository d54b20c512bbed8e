"""What is drawn: the recipe's defaults, the command line's wishes, and images that keep to
themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from promoe_ds.condition import ClassCondition
from promoe_ds.data.vae import Vae
from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.images import read_record, read_samples
from promoe_ds.evaluation.sample_job import _with_dtype, draw_samples
from promoe_ds.evaluation.sample_request import SampleRequest, choose_labels, make_plan
from promoe_ds.evaluation.sampling import LatentSampler, aligned_passes, even_passes
from promoe_ds.model.export import load_model
from promoe_ds.pipeline import ProMoEPipeline, ProMoETransformer2DModel

from ..builders import of_method, small_config
from ..data.made import save_vae
from .made import make_export

FLOW, DDPM = {"objective": "rectified_flow"}, {"objective": "ddpm"}
LATENTS = {"in_channels": 4}


def asked(**values: Any) -> SampleRequest:
    return SampleRequest(**{"model": Path("m"), "out": Path("o"), **values})


def draw(export: Path, **request: Any) -> Tensor:
    """Return the latents of one request, which no pixel's range cuts off."""
    out = export.parent / f"samples{len(list(export.parent.iterdir()))}"
    draw_samples(asked(model=export, out=out, **request))
    return load_file(out / "latents.safetensors")["latents"]


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (None, "cuda", "bf16"),
        (None, "cpu", "fp32"),
        ("fp32", "cuda", "fp32"),
        ("bf16", "cpu", "bf16"),
    ],
)
def test_dtype_follows_the_device_unless_asked_otherwise_and_is_said(
    dtype: str | None, device: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "promoe_ds"):
        found = _with_dtype(asked(dtype=dtype), torch.device(device))
    assert found.dtype == expected
    assert f"sampling in {expected} on {device}" in caplog.text
    assert ("default" in caplog.text) == (dtype is None)


@pytest.mark.parametrize(
    ("diffusion", "recipe", "request_", "expected"),
    [
        (FLOW, {}, {}, ("euler", 7, 2.0)),
        (FLOW, {}, {"solver": "auto"}, ("euler", 7, 2.0)),
        (FLOW, {}, {"steps": 2000}, ("euler", 2000, 2.0)),
        (DDPM, {}, {}, ("ddpm", 7, 2.0)),
        (DDPM, {}, {"solver": "ddim", "steps": 5, "cfg_scale": 1.0}, ("ddim", 5, 1.0)),
        (DDPM, {"solver": "ddim"}, {}, ("ddim", 7, 2.0)),
        (DDPM, {"solver": "ddim"}, {"solver": "auto"}, ("ddpm", 7, 2.0)),
    ],
)
def test_sampling_plan_is_the_recipes_unless_asked_otherwise(
    diffusion: dict, recipe: dict, request_: dict, expected: tuple
) -> None:
    sampling = {"steps": 7, "cfg_scale": 2.0, **recipe}
    plan = make_plan(asked(**request_), small_config(diffusion=diffusion, sampling=sampling))
    assert (plan.solver, plan.steps, plan.cfg_scale) == expected


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_what_every_rank_finds_is_said_once(
    rank: str, lines: int, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    make_plan(asked(), small_config(diffusion={"label_dropout": 0.0}, sampling={"cfg_scale": 2.0}))
    assert len(told) == lines


@pytest.mark.parametrize(
    ("diffusion", "request_", "message"),
    [
        (FLOW, {"solver": "ddpm"}, "--solver=ddpm .*rectified_flow.*euler"),
        (DDPM, {"solver": "euler"}, "--solver=euler .*ddpm.*ddim"),
        (DDPM, {"steps": 1001}, "--steps=1001.* 2 .*1000"),
        (DDPM, {"steps": 0}, "--steps=0.* 2 .*1000"),
        (FLOW, {"steps": 0}, "--steps=0: must be at least 1"),
        (FLOW, {"device": "meta"}, "--device meta"),
        (FLOW, {"device": "nothing"}, "--device nothing: .*Expected one of cpu"),
        (FLOW, {"vae": "vae"}, "--vae vae: .*leave it out"),
    ],
)
def test_sampling_that_does_not_fit_the_export_is_refused(
    tmp_path: Path, diffusion: dict, request_: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(make_export(tmp_path, diffusion=diffusion), num=1, **request_)


def test_sampling_with_an_autoencoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    vae = str(save_vae(tmp_path / "vae"))
    with pytest.raises(ConfigError, match=r"1 latent channels scaled by 0\.5, .* 4 .* by 1\.0"):
        draw(make_export(tmp_path, model=LATENTS), num=1, vae=vae)


@pytest.mark.parametrize("method", ["diff_moe", "expert_race", "ec_dit"])
def test_every_sampler_splits_guidance_where_the_method_mixes_samples(
    tmp_path: Path, method: str
) -> None:
    export = make_export(tmp_path, sampling={"steps": 2, "cfg_scale": 2.0}, **of_method(method))
    network, passes = load_model(export), []
    config = network.config
    network.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    transformer = ProMoETransformer2DModel(config.model_dump(mode="json"))
    transformer.denoiser = network
    transformer.eval()
    pipeline = ProMoEPipeline(transformer, FlowMatchEulerDiscreteScheduler())
    pipeline([0, 1, 2], output_type="latent")
    plan = make_plan(asked(), config)
    sampler = LatentSampler(network, config, plan, seed=0, device=torch.device("cpu"))
    sampler.sample(range(3), ClassCondition(torch.zeros(3, dtype=torch.int64), 10))
    assert passes == ([3] * 8 if method == "diff_moe" else [6] * 4)


@pytest.mark.parametrize(
    ("diffusion", "solver"),
    [
        *((FLOW, each) for each in ("euler", "heun", "unipc", "dpmpp")),
        (DDPM, "ddpm"),
        (DDPM, "ddim"),
    ],
)
def test_samples_do_not_depend_on_the_batch_size_to_the_bit(
    tmp_path: Path, diffusion: dict, solver: str
) -> None:
    export = make_export(tmp_path, diffusion=diffusion, model=LATENTS)
    request = {"num": 7, "steps": 6, "solver": solver}
    whole, cut = (draw(export, batch_size=size, exact=True, **request) for size in (7, 3))
    assert len({sample.numpy().tobytes() for sample in whole}) == 7
    assert torch.equal(cut, whole)
    if solver == "euler":
        batched = draw(export, batch_size=3, **request)
        torch.testing.assert_close(batched, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 4])
def test_samples_have_the_size_that_is_asked_for(
    tmp_path: Path, channels: int, told: list[str]
) -> None:
    model = {"input_size": [6, 4], "buckets": [[6, 4], 4], "in_channels": channels}
    export = make_export(tmp_path, model=model)
    for size, expected in ((None, (6, 4)), (4, (4, 4)), ((2, 6), (2, 6))):
        out = tmp_path / str(size)
        draw_samples(asked(model=export, out=out, num=3, steps=2, size=size, grid=True))
        record = read_record(out)
        assert record.get("size") == (None if size is None else "x".join(map(str, expected)))
        if channels == 1:
            images, labels = read_samples(out)
            assert (images.shape, labels.tolist()) == ((3, *expected, 1), [0, 1, 2])
            (high, wide), zoom = expected, 40 // expected[0]
            assert Image.open(out / "grid.png").size == (wide * zoom + 4, 3 * high * zoom + 8)
        else:
            latents = load_file(out / "latents.safetensors")["latents"]
            assert latents.shape == (3, channels, *expected)
    (warning,) = [line for line in told if line.startswith("--size")]
    assert warning.startswith("--size 2x6: the model was trained at 6x4, 4x4")
    with pytest.raises(ConfigError, match=r"--size 3x4: .* model\.patch_size=2"):
        draw(export, num=1, size=(3, 4))
    draw_samples(asked(model=export, out=tmp_path / "None", num=3, steps=2, size=(6, 4)))
    with pytest.raises(ConfigError, match="size is '4x4' there and None here"):
        draw_samples(asked(model=export, out=tmp_path / "4", num=3, steps=2))


def test_passes_are_aligned_blocks_whoever_asks() -> None:
    blocks = [range(0, 3), range(3, 6), range(6, 7)]
    assert aligned_passes(range(7), size=3, num=7) == blocks
    assert aligned_passes([4, 6], size=3, num=7) == blocks[1:]


@pytest.mark.parametrize(
    ("samples", "batch_size", "world_size", "expected"),
    [(5000, 64, 1, (79, 64)), (5000, 64, 64, (2, 40)), (50, 16, 2, (2, 13)), (3, 64, 8, (1, 1))],
)
def test_even_passes_draw_few_more_than_are_asked_for(
    samples: int, batch_size: int, world_size: int, expected: tuple
) -> None:
    passes, size = even_passes(samples, batch_size=batch_size, world_size=world_size)
    assert (passes, size) == expected and size <= batch_size
    assert 0 <= passes * size * world_size - samples < passes * world_size + world_size


def test_labels_in_turn_or_drawn_depend_on_the_index_only() -> None:
    def labels(**values: Any) -> list[int]:
        return choose_labels(asked(**values), small_config()).tolist()

    assert labels(num=12) == [*range(10), 0, 1]
    assert labels(classes=(7, 3), num=5) == [7, 3, 7, 3, 7]
    drawn = labels(labels="random", num=400)
    assert labels(labels="random", num=50) == drawn[:50]
    assert labels(labels="random", num=50, seed=1) != drawn[:50]
    assert np.bincount(drawn, minlength=10).min() > 15
    assert set(labels(labels="random", classes=(2, 5), num=40)) == {2, 5}


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_of_latents_are_no_images_however_few_their_channels(
    tmp_path: Path, channels: int
) -> None:
    data = {"dataset": "latents", "latent_scale": 0.5}
    export = make_export(tmp_path, model={"in_channels": channels}, data=data)
    assert draw(export, num=2, steps=2).shape == (2, channels, 4, 4)
    assert not list(tmp_path.rglob("*.png"))


def test_decoder_takes_a_few_images_at_a_time(tmp_path: Path) -> None:
    vae, sizes = Vae(str(save_vae(tmp_path / "vae"))), []
    vae._network.decoder.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    images = vae.decode(torch.zeros(19, 1, 4, 4))
    assert sizes == [8, 8, 3] and images.shape == (19, 3, 8, 8)
