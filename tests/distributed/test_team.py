"""Sampling, encoding and judging on 1, 2 and 4 processes: the same images bit for bit, the same
files, the same figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from promoe_ds.data.encode import encode
from promoe_ds.data.sources.packing import EncodeRequest
from promoe_ds.distributed.context import single_process
from promoe_ds.evaluation.metrics import EvaluateRequest, evaluate
from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples
from promoe_ds.evaluation.sampling import one_thread
from promoe_ds.model.export import load_model

from ..processes import run_ranks
from ..unit.builders import random_network, randomise, save_export
from ..unit.data.made import SCALE, save_images, save_vae
from ..unit.evaluation.made import TinyNetwork, text_sections
from .team_worker import run_team_worker

#: Eleven images: no number of ranks or batch size divides them.
COMMON = {"num": 11, "steps": 5, "cfg_scale": 1.5, "seed": 3, "device": "cpu", "exact": True}
MODELS = {
    "token_choice": {"routing": {"num_experts": 4, "top_k": 2}},
    "expert_choice": {"routing": {"method": "expert_choice", "num_experts": 4, "top_k": 2}},
    "ddpm": {"routing": {"num_experts": 4}, "diffusion": {"objective": "ddpm"}},
    "text": {"routing": {"num_experts": 4}},
}
#: What a model is asked for besides.
ASKED = {"text": {"prompts": ("a red apple", "", "heart of gold"), "negative_prompt": "purple"}}
#: What each number of ranks draws: batch sizes and sets of experts cut over ranks.
LAYOUTS = {
    2: ({"batch_size": 1}, {"batch_size": 8}, {"ep_size": 2}),
    4: ({"batch_size": 8}, {"ep_size": 4}, {"ep_size": 2, "batch_size": 1}),
}


def run_team(world_size: int, tasks: list[tuple[str, dict]], folder: Path) -> list[list[str]]:
    """Run tasks on `world_size` processes; return every rank's messages."""
    target = folder / f"messages_{world_size}.json"
    run_ranks(world_size, run_team_worker, tasks, target)
    return json.loads(target.read_text())


def latents_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "latents.safetensors")["latents"]


def tasks_of(folder: Path, world_size: int) -> list[tuple[str, dict]]:
    """Return what a number of ranks does; the last task must be refused."""
    pictures = {"vae": str(folder / "vae"), "out": folder / f"latent_{world_size}"}
    figures = {
        "samples": folder / "samples.npz",
        "reference": folder / "reference.npz",
        "batch_size": 5,
        "extractor": str(folder / "tiny.pt"),
        "out": folder / f"metrics_{world_size}.json",
    }
    bad = {"out": folder / f"bad_{world_size}", "ep_size": 3}
    return [
        ("share", {"model": folder / "token_choice", "ep_size": world_size}),
        *(
            (
                "sample",
                {
                    "model": folder / name,
                    "out": folder / f"{name}_{world_size}_{number}",
                    **COMMON,
                    **ASKED.get(name, {}),
                    **layout,
                },
            )
            for name in MODELS
            for number, layout in enumerate(LAYOUTS[world_size])
        ),
        ("sample", {"model": folder / "latent", **COMMON, **pictures}),
        ("encode", encoding(folder, f"encoded_{world_size}")),
        ("evaluate", figures),
        ("sample", {"model": folder / "pixels", **COMMON, **bad}),
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Draw, encode and judge everything on 2 and on 4 ranks."""
    folder = tmp_path_factory.mktemp("team")
    sizes = {"in_channels": 4, "hidden_size": 48, "depth": 4, "num_heads": 4}
    for name, sections in MODELS.items():
        texts = text_sections(folder) if name == "text" else {"model": {}}
        sections = texts | sections | {"model": {**texts["model"], **sizes}}
        # Small weights: a chain of wild noise predictions would overflow.
        network = random_network(**sections)
        randomise(network, std=0.1)
        save_export(folder / name, network)
    for name, data in (("pixels", {}), ("latent", {"latent_scale": SCALE, "dataset": "latents"})):
        network = random_network(
            data={"dataset": "synthetic", **data}, model={"hidden_size": 48, "num_heads": 4}
        )
        save_export(folder / name, network)
    save_vae(folder / "vae")
    save_images(folder / "images")
    torch.jit.script(TinyNetwork()).save(str(folder / "tiny.pt"))
    random = np.random.default_rng(0)
    for name in ("samples", "reference"):
        np.savez(
            folder / f"{name}.npz", arr_0=random.integers(0, 256, (53, 9, 9, 3), dtype=np.uint8)
        )
    for world_size in LAYOUTS:
        messages = run_team(world_size, tasks_of(folder, world_size), folder)
        layers = load_model(folder / "token_choice").moe_layers().values()
        routed = sum(
            parameter.numel() for layer in layers for parameter in layer.routed.parameters()
        )
        assert {rank[0] for rank in messages} == {
            str(routed // world_size)
        }  # this rank's experts only
        assert {message for rank in messages for message in rank[1:-1]} == {""}
        assert all(
            "--ep-size 3 must divide the model's 4 routed experts" in rank[-1] for rank in messages
        )
    return folder


def encoding(folder: Path, out: str) -> dict:
    return {
        "source": folder / "images",
        "vae": str(folder / "vae"),
        "vae_name": "tiny",
        "out": folder / out,
        "image_size": 8,
        "shard_size": 4,
        "batch_size": 3,
    }


@pytest.mark.parametrize("name", MODELS)
def test_samples_of_1_2_and_4_ranks_any_batch_and_ep_size_are_equal_bit_for_bit(
    drawn: Path, name: str
) -> None:
    for batch_size in (1, 8):
        draw_samples(
            SampleRequest(
                model=drawn / name,
                out=drawn / f"{name}_1_{batch_size}",
                batch_size=batch_size,
                **COMMON,
                **ASKED.get(name, {}),
            )
        )
    expected = latents_of(drawn / f"{name}_1_1")
    assert len({sample.numpy().tobytes() for sample in expected}) == COMMON["num"]
    found = [
        f"{name}_1_8",
        *(
            f"{name}_{world}_{number}"
            for world, layouts in LAYOUTS.items()
            for number in range(len(layouts))
        ),
    ]
    assert {
        folder: torch.equal(latents_of(drawn / folder), expected) for folder in found
    } == dict.fromkeys(found, True)


def test_samples_that_are_not_exact_do_differ_in_their_last_digits(drawn: Path) -> None:
    """The test above could not fail were all shapes rounded alike."""
    draw_samples(
        SampleRequest(
            model=drawn / "token_choice",
            out=drawn / "inexact",
            batch_size=11,
            **COMMON | {"exact": False},
        )
    )
    found, expected = latents_of(drawn / "inexact"), latents_of(drawn / "token_choice_2_0")
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_decoded_samples_of_any_ranks_are_the_same_files(drawn: Path) -> None:
    draw_samples(
        SampleRequest(
            model=drawn / "latent", vae=str(drawn / "vae"), out=drawn / "latent_1", **COMMON
        )
    )
    names = sorted(path.name for path in (drawn / "latent_1").glob("*.png"))
    assert len(names) == COMMON["num"] and names[3] == "img000003_class3.png"
    for world_size in (2, 4):
        for name in (*names, "samples.npz"):
            assert (drawn / f"latent_{world_size}" / name).read_bytes() == (
                drawn / "latent_1" / name
            ).read_bytes()
    with np.load(drawn / "latent_4" / "samples.npz") as data:
        assert data["arr_0"].shape == (11, 8, 8, 3) and data["labels"].tolist() == [
            i % 10 for i in range(11)
        ]


def test_encoding_on_any_ranks_gives_the_same_files(drawn: Path) -> None:
    with one_thread():  # as many threads as the ranks had
        encode(EncodeRequest(**encoding(drawn, "encoded_1")), single_process())
    for world_size in (2, 4):
        files = {
            path.name: path.read_bytes() for path in (drawn / f"encoded_{world_size}").iterdir()
        }
        assert files == {path.name: path.read_bytes() for path in (drawn / "encoded_1").iterdir()}


def test_figures_of_any_ranks_are_equal(drawn: Path) -> None:
    request = EvaluateRequest(
        samples=drawn / "samples.npz",
        reference=drawn / "reference.npz",
        batch_size=64,
        extractor=str(drawn / "tiny.pt"),
    )
    expected = evaluate(request, single_process())["metrics"]
    for world_size in (2, 4):
        found = json.loads((drawn / f"metrics_{world_size}.json").read_text())["metrics"]
        assert found == pytest.approx(
            expected, rel=1e-5
        )  # fp32 features of other batches; sums in other order
