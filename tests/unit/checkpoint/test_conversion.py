"""What a conversion refuses, and where it writes: every bad source is one message, and destinations
of all kinds are filled.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.conversion.targets import Content, TrainingTarget
from promoe_ds.checkpoint.manifest import FileRecord, checksum, read_manifest, step_folder
from promoe_ds.checkpoint.zero_reader import MODEL_STATES, MOMENTS
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names, state_shapes

from ..builders import random_tensor, small_config

LENGTHS = (0.05, 0.1)
KINDS = ("weights", "ema", *(f"ema_power_{length:g}" for length in LENGTHS), *MOMENTS)


def write_checkpoint(root: Path, step: int) -> Path:
    """Write a checkpoint with power-function averages and moments, of random values."""
    config = small_config(optimizer={"ema_decays": (0.5,), "ema_sigma_rels": LENGTHS})
    shapes = state_shapes(config)
    content = Content(
        config=config,
        step=step,
        samples_seen=step * 256,
        optimizer_step=step,
        dtype=torch.float32,
        origin={},
        kinds=dict.fromkeys(KINDS, shapes),
        buffers=frozenset(buffer_names(config)),
        averages_since={},
    )
    root.mkdir(parents=True, exist_ok=True)
    target = TrainingTarget(root, content)
    for kind in KINDS:
        for number, (name, shape) in enumerate(shapes.items()):
            target.write(kind, name, random_tensor(*shape, seed=1000 * step + number))
    target.close()
    return root / step_folder(step)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of step 4, and those of 1 to 3 beside it."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    return [write_checkpoint(root, step) for step in (1, 2, 3, 4)][-1]


def go(source: Path, destination: Path, to: str = "single", **options: Any) -> str:
    """Convert and return the note, or the error."""
    try:
        return convert(source, Request(destination=destination, to=to, **options)).note
    except CheckpointError as error:
        return str(error)


def test_another_length_from_a_checkpoint_of_another_name_or_the_working_folder(
    checkpoint, tmp_path, monkeypatch
) -> None:
    assert go(checkpoint, tmp_path / "a", ema_sigma_rel=0.08).startswith("mixed from 8 averages")
    monkeypatch.chdir(checkpoint)
    assert go(Path(), tmp_path / "b", ema_sigma_rel=0.08).startswith("mixed from 8 averages")
    best = Path(shutil.copytree(checkpoint, tmp_path / "best"))
    assert go(best, tmp_path / "c", ema_sigma_rel=0.08).startswith("mixed from 2 averages")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], value) for name, value in b.items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_export_of_a_type_that_fp32_does_not_hold_is_named(checkpoint, tmp_path, dtype) -> None:
    go(checkpoint, tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    tensors = load_file(file)
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"].to(dtype)
    save_file(tensors, file)
    assert "final_layer.linear.bias is of type " in go(
        tmp_path / "export", tmp_path / "x", "deepspeed"
    )


def test_optimizer_state_beside_rounded_weights_is_refused(checkpoint, tmp_path) -> None:
    go(checkpoint, tmp_path / "export", with_optimizer=True)
    file = tmp_path / "export" / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    assert "is of type torch.bfloat16" in go(
        tmp_path / "export", tmp_path / "x", "deepspeed", with_optimizer=True
    )
    assert go(tmp_path / "export", tmp_path / "y", "deepspeed") == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "abc"),
        ("step", None),
        ("step", -1),
        ("samples_seen", 1.5),
        ("kind", "../../x"),
        ("kind", ["a"]),
        ("training_state", ["ema"]),
        ("averages_since", [1]),
        ("averages_since", {"ema": "x"}),
        ("training_state", 3),
        ("training_state", [["a"]]),
        ("optimizer_step", "x"),
    ],
)
def test_export_origin_that_cannot_be_is_named(checkpoint, tmp_path, name, value) -> None:
    go(checkpoint, tmp_path / "export")
    path = tmp_path / "export" / "config.json"
    values = json.loads(path.read_text())
    values["origin"][name] = value
    path.write_text(json.dumps(values))
    assert f"origin.{name}={value!r} cannot be understood" in go(
        tmp_path / "export", tmp_path / "x"
    )


def _change_layout(folder: Path, **layout: Any) -> None:
    manifest = read_manifest(folder)
    replace(manifest, layout=replace(manifest.layout, **layout)).write(folder)


def _change_model(folder: Path, content: Any) -> None:
    torch.save(content, folder / MODEL_STATES)
    manifest = read_manifest(folder)
    manifest.files[MODEL_STATES] = FileRecord(
        (folder / MODEL_STATES).stat().st_size, checksum(folder / MODEL_STATES)
    )
    manifest.write(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: _change_layout(folder, zero_stage=2, world_size=0),
            "are not what manifest.json says of them, 0 ranks",
        ),
        (lambda folder: _change_layout(folder, zero_stage=2), "does not list zero_pp_rank_0"),
        (
            lambda folder: _change_layout(folder, dispatch="deepspeed"),
            "does not list layer_0_expert_0",
        ),
        (
            lambda folder: _change_model(folder, {"a": 1}),
            "its files are not what manifest.json says of them",
        ),
        (
            lambda folder: _change_model(folder, [1]),
            "its files are not what manifest.json says of them",
        ),
        (
            lambda folder: _change_model(folder, {"module": {"denoiser.x": torch.ones(2)}}),
            "do not fit the config in manifest.json",
        ),
        (
            lambda folder: _change_model(folder, {"module": {}, "global_steps": 3}),
            "says 4 where mp_rank_00_model_states.pt has global_steps=3",
        ),
    ],
)
def test_checkpoint_whose_files_do_not_fit_its_manifest_is_named(
    checkpoint, tmp_path, change, message
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    change(folder)
    assert message in go(folder, tmp_path / "x")


def test_checkpoint_whose_config_is_another_architecture_s_is_named_before_anything_is_written(
    checkpoint, tmp_path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    manifest = read_manifest(folder)
    manifest.config["routing"]["expert_width"] = 24
    manifest.write(folder)
    assert "up_weight has shape (4, 32, 16) instead of (4, 24, 16)" in go(
        folder, tmp_path / "x", verify=False
    )


@pytest.mark.parametrize("to", ["single", "official", "diffusers", "deepspeed"])
def test_destination_that_is_an_empty_folder_is_filled_and_stays_itself(
    checkpoint, tmp_path, to
) -> None:
    """It may be a mount or a link, which no folder can be renamed to; what a killed conversion left
    there is no obstacle.
    """
    folder, link = tmp_path / "disk", tmp_path / "link"
    (folder / ".unfinished").mkdir(parents=True)
    link.symlink_to(folder)
    before = folder.stat().st_ino
    assert go(checkpoint, link, to) == ""
    assert link.stat().st_ino == before
    assert go(checkpoint, tmp_path / "fresh", to) == ""
    assert sorted(path.name for path in link.iterdir()) == sorted(
        path.name for path in (tmp_path / "fresh").iterdir()
    )
    assert "exists already" in go(checkpoint, link, to)


def test_destination_that_is_a_link_to_nothing_is_refused_at_once(checkpoint, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert f"is a link to {tmp_path / 'gone'}, which is not there" in go(
        checkpoint, tmp_path / "link"
    )


def test_pipeline_of_a_solver_that_diffusers_does_not_know_says_so(checkpoint, tmp_path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    manifest = read_manifest(folder)
    manifest.config["sampling"]["solver"] = "heun"
    manifest.write(folder)
    assert (
        go(folder, tmp_path / "x", "diffusers")
        == "the recipe samples with heun, the pipeline with euler"
    )
    assert go(folder, tmp_path / "y", "single") == ""
