"""Drawing samples from an export: the recipe's defaults, the command line's wishes, and images that
keep to themselves.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from promoe_ds.data.vae import Vae
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.evaluation import sampling
from promoe_ds.evaluation.images import SampleFolder
from promoe_ds.evaluation.sample_job import SampleRequest, choose_labels, draw_samples, make_plan
from promoe_ds.evaluation.sampling import LatentSampler, aligned_passes, even_passes
from promoe_ds.model.export import load_model, save_export
from promoe_ds.pipeline import ProMoEPipeline, ProMoETransformer2DModel

from ..builders import of_method, random_network, small_config
from ..data.made import save_vae

FLOW = {"objective": "rectified_flow"}
DDPM = {"objective": "ddpm"}


def make_export(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write a model whose samples are latents, which no pixel's range cuts off."""
    network = random_network(model={"in_channels": 4}, **sections)
    save_export(folder / "export", network.state_dict(), network.config, origin={})
    return folder / "export"


def draw(export: Path, **request: Any) -> Tensor:
    """Return the samples of one request."""
    out = export.parent / f"samples{len(list(export.parent.iterdir()))}"
    draw_samples(SampleRequest(model=export, out=out, **request))
    return load_file(out / "latents.safetensors")["latents"]


@pytest.mark.parametrize(
    ("diffusion", "request_", "expected"),
    [
        (FLOW, {}, ("euler", 7, 2.0)),
        (FLOW, {"solver": "auto"}, ("euler", 7, 2.0)),
        (FLOW, {"steps": 2000}, ("euler", 2000, 2.0)),
        (DDPM, {}, ("ddpm", 7, 2.0)),
        (DDPM, {"solver": "ddim", "steps": 5, "cfg_scale": 1.0}, ("ddim", 5, 1.0)),
    ],
)
def test_sampling_plan_is_the_recipes_unless_asked_otherwise(
    tmp_path, monkeypatch, diffusion, request_, expected
) -> None:
    plans = []
    monkeypatch.setattr(
        sampling,
        "sample_latents",
        lambda model, noise, labels, plan, generators: plans.append(plan) or noise,
    )
    export = make_export(tmp_path, diffusion=diffusion, sampling={"steps": 7, "cfg_scale": 2.0})
    draw(export, num=1, **request_)
    assert [(plan.solver, plan.steps, plan.cfg_scale) for plan in plans] == [expected]


@pytest.mark.parametrize("method", ["diff_moe", "expert_race", "ec_dit"])
def test_every_sampler_splits_guidance_where_the_method_mixes_samples(tmp_path, method) -> None:
    export = make_export(tmp_path, sampling={"steps": 2, "cfg_scale": 2.0}, **of_method(method))
    network, passes = load_model(export), []
    config = network.config
    network.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    pipeline = ProMoEPipeline(
        ProMoETransformer2DModel(config.model_dump(mode="json")), FlowMatchEulerDiscreteScheduler()
    )
    pipeline.transformer.denoiser = network
    pipeline([0, 1, 2], output_type="latent")
    LatentSampler(
        network,
        config,
        make_plan(SampleRequest(model=export, out=tmp_path), config),
        seed=0,
        device=torch.device("cpu"),
    ).sample(range(3), np.zeros(3, dtype=np.int64))
    assert passes == ([3] * 8 if method == "diff_moe" else [6] * 4)


def test_sampling_plan_keeps_the_recipes_solver(tmp_path, monkeypatch) -> None:
    plans = []
    monkeypatch.setattr(
        sampling,
        "sample_latents",
        lambda model, noise, labels, plan, generators: plans.append(plan) or noise,
    )
    export = make_export(tmp_path, diffusion=DDPM, sampling={"steps": 7, "solver": "ddim"})
    draw(export, num=1)
    draw(export, num=1, solver="auto")
    assert [plan.solver for plan in plans] == ["ddim", "ddpm"]


@pytest.mark.parametrize(
    ("diffusion", "request_", "message"),
    [
        (
            FLOW,
            {"solver": "ddpm"},
            (
                "--solver=ddpm cannot sample diffusion.objective=rectified_flow: set it to euler,"
                " heun, unipc or dpmpp, or to auto"
            ),
        ),
        (
            DDPM,
            {"solver": "euler"},
            (
                "--solver=euler cannot sample diffusion.objective=ddpm: set it to ddpm or ddim, or"
                " to auto"
            ),
        ),
        (
            DDPM,
            {"steps": 1001},
            (
                "--steps=1001: diffusion.objective=ddpm is sampled in 2 ..."
                " diffusion.num_train_timesteps=1000 steps"
            ),
        ),
        (DDPM, {"steps": 0}, "--steps 0: must be at least 1"),
    ],
)
def test_sampling_that_does_not_fit_the_export_is_refused(
    tmp_path, diffusion, request_, message
) -> None:
    export = make_export(tmp_path, diffusion=diffusion)
    with pytest.raises(ConfigError) as caught:
        draw(export, num=1, **request_)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("diffusion", "solver"),
    [
        (FLOW, "euler"),
        (FLOW, "heun"),
        (FLOW, "unipc"),
        (FLOW, "dpmpp"),
        (DDPM, "ddpm"),
        (DDPM, "ddim"),
    ],
)
def test_samples_do_not_depend_on_the_batch_size_to_the_bit(tmp_path, diffusion, solver) -> None:
    export = make_export(tmp_path, diffusion=diffusion)
    whole, cut = (
        draw(export, num=7, steps=6, solver=solver, batch_size=size, exact=True) for size in (7, 3)
    )
    assert len({sample.numpy().tobytes() for sample in whole}) == 7
    assert torch.equal(cut, whole)


def test_samples_in_batches_agree_to_the_rounding(tmp_path) -> None:
    export = make_export(tmp_path)
    exact, batched = (
        draw(export, num=7, steps=6, exact=True),
        draw(export, num=7, steps=6, batch_size=3),
    )
    torch.testing.assert_close(batched, exact, rtol=1e-4, atol=1e-4)


def test_passes_are_aligned_blocks_whoever_asks() -> None:
    assert aligned_passes([0, 1, 2, 3, 4, 5, 6], size=3, num=7) == [
        range(0, 3),
        range(3, 6),
        range(6, 7),
    ]
    assert aligned_passes([4, 6], size=3, num=7) == [range(3, 6), range(6, 7)]


@pytest.mark.parametrize(
    ("samples", "batch_size", "world_size", "expected"),
    [(5000, 64, 1, (79, 64)), (5000, 64, 64, (2, 40)), (50, 16, 2, (2, 13)), (3, 64, 8, (1, 1))],
)
def test_even_passes_draw_few_more_than_are_asked_for(
    samples: int, batch_size: int, world_size: int, expected: tuple
) -> None:
    passes, size = even_passes(samples, batch_size=batch_size, world_size=world_size)
    assert (passes, size) == expected
    assert (
        size <= batch_size
        and samples <= passes * size * world_size < samples + passes * world_size + world_size
    )


# Labels.


def test_labels_in_turn_or_drawn_depend_on_the_index_only() -> None:
    config = small_config()

    def labels(**values: Any) -> list[int]:
        return choose_labels(
            SampleRequest(model=Path("m"), out=Path("o"), **values), config
        ).tolist()

    assert labels(num=12) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert labels(classes=(7, 3), num=5) == [7, 3, 7, 3, 7]
    drawn = labels(labels="random", num=400)
    assert (
        labels(labels="random", num=50) == drawn[:50]
        and labels(labels="random", num=50, seed=1) != drawn[:50]
    )
    assert set(drawn) == set(range(10)) and min(drawn.count(label) for label in range(10)) > 15
    assert set(labels(labels="random", classes=(2, 5), num=40)) == {2, 5}


# Going on.


def make_pixel_export(folder: Path) -> Path:
    network = random_network()
    save_export(folder / "export", network.state_dict(), network.config, origin={"step": 5})
    return folder / "export"


def pixel_request(export: Path, **values: Any) -> SampleRequest:
    return replace(
        SampleRequest(model=export, out=export.parent / "out", num=9, steps=3, exact=True), **values
    )


def test_sampling_stopped_goes_on_and_draws_only_what_is_missing(tmp_path, monkeypatch) -> None:
    request = pixel_request(make_pixel_export(tmp_path))
    draw_samples(replace(request, out=tmp_path / "whole"))
    real, drawn = LatentSampler.sample, []

    def draw_four(self, indices, labels):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.extend(indices)
        return real(self, indices, labels)

    monkeypatch.setattr(LatentSampler, "sample", draw_four)
    with pytest.raises(KeyboardInterrupt):
        draw_samples(request)
    assert not (request.out / "samples.npz").exists() and len(list(request.out.glob("*.png"))) == 4
    drawn.clear()
    monkeypatch.setattr(
        LatentSampler,
        "sample",
        lambda self, indices, labels: drawn.extend(indices) or real(self, indices, labels),
    )
    draw_samples(replace(request, batch_size=2))
    assert drawn == [4, 5, 6, 7, 8]
    assert (request.out / "samples.npz").read_bytes() == (
        tmp_path / "whole" / "samples.npz"
    ).read_bytes()
    draw_samples(replace(request, num=11))  # more of them
    assert drawn == [4, 5, 6, 7, 8, 9, 10]


def test_sampling_draws_damaged_files_anew(tmp_path, monkeypatch) -> None:
    request = pixel_request(make_pixel_export(tmp_path))
    draw_samples(request)
    whole = (request.out / "samples.npz").read_bytes()
    damages = {
        2: lambda file: file.write_bytes(b""),
        5: lambda file: file.write_bytes(file.read_bytes()[:40]),
        7: lambda file: Image.new("L", (5, 5)).save(file),
    }
    for index, damage in damages.items():
        damage(next(request.out.glob(f"img00000{index}_*.png")))
    real, drawn = LatentSampler.sample, []
    monkeypatch.setattr(
        LatentSampler,
        "sample",
        lambda self, indices, labels: drawn.extend(indices) or real(self, indices, labels),
    )
    draw_samples(request)
    assert drawn == [2, 5, 7] and (request.out / "samples.npz").read_bytes() == whole
    monkeypatch.setattr(
        SampleFolder, "read", lambda self, index: (_ for _ in ()).throw(DataError("unreadable"))
    )
    with pytest.raises(
        ConfigError,
        match="9 samples, the first of them 0, cannot be read back after they were written twice",
    ):
        draw_samples(request)


def test_sampling_latents_whose_part_is_damaged_draws_it_anew(tmp_path, monkeypatch) -> None:
    request = SampleRequest(
        model=make_export(tmp_path), out=tmp_path / "out", num=3, steps=3, exact=True
    )
    draw_samples(replace(request, out=tmp_path / "whole"))
    real = SampleFolder.assemble

    def assemble_damaged(self):
        monkeypatch.setattr(SampleFolder, "assemble", real)
        (self.path / "parts" / "img000001_class1.npy").write_bytes(b"cut")
        return self.assemble()

    monkeypatch.setattr(SampleFolder, "assemble", assemble_damaged)
    draw_samples(request)
    assert (request.out / "latents.safetensors").read_bytes() == (
        tmp_path / "whole" / "latents.safetensors"
    ).read_bytes()


def test_sampling_notes_every_software_and_machine_that_took_part(tmp_path, monkeypatch) -> None:
    request = pixel_request(make_pixel_export(tmp_path))
    draw_samples(replace(request, num=3))
    draw_samples(replace(request, num=5))
    monkeypatch.setattr(
        "promoe_ds.evaluation.sample_job.versions_of", lambda *packages: {"torch": "9.9"}
    )
    draw_samples(request)
    found = json.loads((request.out / "samples.json").read_text())["environments"]
    assert [environment["device"] for environment in found] == ["cpu", "cpu"] and found[1][
        "versions"
    ] == {"torch": "9.9"}


def test_sampling_where_the_record_of_the_job_is_none_is_refused(tmp_path) -> None:
    request = pixel_request(make_pixel_export(tmp_path))
    request.out.mkdir()
    (request.out / "samples.json").write_text("[1]")
    with pytest.raises(DataError, match=r"samples\.json: not a readable record"):
        draw_samples(request)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_of_latents_are_no_images_however_few_their_channels(
    tmp_path, channels: int
) -> None:
    network = random_network(
        model={"in_channels": channels}, data={"dataset": "latents", "latent_scale": 0.5}
    )
    save_export(tmp_path / "export", network.state_dict(), network.config, origin={})
    written = draw_samples(
        SampleRequest(model=tmp_path / "export", out=tmp_path / "out", num=2, steps=2)
    )
    assert [path.name for path in written] == ["latents.safetensors"] and not list(
        (tmp_path / "out").glob("*.png")
    )


def test_decoder_takes_a_few_images_at_a_time(tmp_path, monkeypatch) -> None:
    vae, sizes = Vae(str(save_vae(tmp_path / "vae"))), []
    vae._network.decoder.register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0]))
    )
    images = vae.decode(torch.zeros(19, 1, 4, 4))
    assert sizes == [8, 8, 3] and images.shape == (19, 3, 8, 8)


def test_sampling_records_what_decides_the_images(tmp_path) -> None:
    request = pixel_request(make_pixel_export(tmp_path), classes=(3, 1), grid=True)
    written = draw_samples(request)
    settings = json.loads((request.out / "samples.json").read_text())
    assert (
        settings["origin"] == {"step": 5}
        and settings["weights"].startswith("xxh3_64:")
        and settings["num"] == 9
    )
    assert (settings["seed"], settings["steps"], settings["classes"], settings["exact"]) == (
        0,
        3,
        [3, 1],
        True,
    )
    assert [path.name for path in written] == ["img*.png (9 files)", "samples.npz", "grid.png"]
    with np.load(request.out / "samples.npz") as data:
        assert data["arr_0"].shape == (9, 4, 4, 1) and data["arr_0"].dtype == np.uint8
        assert data["labels"].tolist() == [3, 1, 3, 1, 3, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1. Choose another folder"),
        ({"steps": 4, "cfg_scale": 3.0}, "steps was 3 and is 4; cfg_scale was 1.5 and is 3.0"),
        ({"num": 3}, "holds 9 samples, 3 are asked for"),
    ],
)
def test_sampling_into_other_samples_is_refused(tmp_path, values, message) -> None:
    request = pixel_request(make_pixel_export(tmp_path))
    draw_samples(request)
    with pytest.raises(ConfigError, match=re.escape(message)):
        draw_samples(replace(request, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 99999999999999999999999}, r"--seed 9{23}: must be at least 0 and below 2\*\*63"),
        (
            {"device": "meta"},
            "--device meta: computes nothing: name cpu, or cuda for this process's GPU",
        ),
        ({"device": "nothing"}, "--device nothing: Expected one of cpu"),
    ],
)
def test_sampling_with_a_seed_or_device_that_cannot_be_is_refused(
    tmp_path, values, message
) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_samples(pixel_request(make_pixel_export(tmp_path), **values))


def test_sampling_into_a_folder_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="out: holds something else"):
        draw_samples(pixel_request(make_pixel_export(tmp_path)))


def test_sampling_with_an_autoencoder_that_does_not_fit_is_refused(tmp_path) -> None:
    vae = str(save_vae(tmp_path / "vae"))
    with pytest.raises(ConfigError, match="this is a model of pixels, leave it out"):
        draw_samples(pixel_request(make_pixel_export(tmp_path), vae=vae))
    with pytest.raises(
        ConfigError,
        match=r"has 1 latent channels scaled by 0\.5, this model was trained on 4 scaled by 1\.0",
    ):
        draw(make_export(tmp_path), num=1, vae=vae)
