"""What a conversion refuses, and where it writes: every bad source is one message, and destinations
of all kinds are filled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file
from torch import Tensor

from promoe_ds.checkpoint.conversion import Request, convert
from promoe_ds.checkpoint.conversion.convert import open_source
from promoe_ds.checkpoint.conversion.targets import Content, TrainingTarget
from promoe_ds.checkpoint.manifest import FileRecord, checksum, read_manifest, step_folder
from promoe_ds.checkpoint.zero_files import MODEL_STATES, MOMENTS
from promoe_ds.config import change_config
from promoe_ds.errors import CheckpointError
from promoe_ds.model.state import buffer_names, state_shapes
from promoe_ds.pipeline import ProMoEPipeline

from ..builders import random_tensor, small_config

LENGTHS = (0.05, 0.1)
CONFIG = small_config(optimizer={"ema_decays": (0.5,), "ema_sigma_rels": LENGTHS})
KINDS = ("weights", "ema", *(f"ema_power_{length:g}" for length in LENGTHS), *MOMENTS)


def write_checkpoint(root: Path, step: int) -> Path:
    """Write a checkpoint with power-function averages and moments, of random values."""
    shapes = state_shapes(CONFIG)
    content = Content(
        config=CONFIG,
        step=step,
        samples_seen=step * 256,
        optimizer_step=step,
        dtype=torch.float32,
        origin={},
        kinds=dict.fromkeys(KINDS, shapes),
        buffers=frozenset(buffer_names(CONFIG)),
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


def go(source: Path, destination: Path, to: str = "single", config=None, **options: Any) -> str:
    """Convert and return the note, or the error."""
    try:
        return convert(source, Request(destination=destination, to=to, **options), config).note
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


def test_another_length_of_a_start_from_converted_weights_is_refused(checkpoint, tmp_path) -> None:
    """It has the averages of the run that it comes from, which are no profile of its own steps."""
    assert go(checkpoint, tmp_path / "start", "deepspeed") == ""
    message = go(tmp_path / "start", tmp_path / "x", ema_sigma_rel=0.08)
    assert "step_0000000: holds no power-function averages of its own training" in message


def test_pipeline_of_a_checkpoint_says_what_it_is_when_it_is_saved(checkpoint, tmp_path) -> None:
    ProMoEPipeline.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    saved = open_source(tmp_path / "saved")
    assert (saved.info.step, saved.info.samples_seen, list(saved.kinds)) == (4, 1024, ["ema"])


@pytest.fixture(scope="module")
def whole_export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export with the state of training."""
    folder = tmp_path_factory.mktemp("whole") / "export"
    assert go(checkpoint, folder, with_optimizer=True) == ""
    return folder


@pytest.fixture
def export(whole_export: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(whole_export, tmp_path / "export"))


def change_weights(export: Path, change: Callable[[Tensor], Tensor], *names: str) -> None:
    """Change tensors of an export, all if none is named."""
    file = export / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]) for name in names or tensors}, file)


def change_origin(export: Path, **values: Any) -> None:
    path = export / "config.json"
    content = json.loads(path.read_text())
    content["origin"] |= values
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_export_of_a_type_that_fp32_does_not_hold_is_named(export, tmp_path, dtype) -> None:
    change_weights(export, lambda value: value.to(dtype), "final_layer.linear.bias")
    assert "final_layer.linear.bias is of type " in go(export, tmp_path / "x", "deepspeed")


def test_value_beyond_fp16_is_named(export, tmp_path) -> None:
    change_weights(export, lambda value: value + 1e6, "final_layer.linear.bias")
    message = go(export, tmp_path / "x", dtype="fp16")
    assert "ema of final_layer.linear.bias reaches 1e+06, beyond fp16" in message


def test_optimizer_state_beside_rounded_weights_is_refused(export, tmp_path) -> None:
    change_weights(export, Tensor.bfloat16)
    message = go(export, tmp_path / "x", "deepspeed", with_optimizer=True)
    assert "is of type torch.bfloat16" in message
    assert go(export, tmp_path / "y", "deepspeed") == ""


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
def test_export_origin_that_cannot_be_is_named(export, tmp_path, name, value) -> None:
    change_origin(export, **{name: value})
    assert f"origin.{name}={value!r} cannot be understood" in go(export, tmp_path / "x")


def test_export_state_that_its_config_does_not_name_is_left_over(export, tmp_path) -> None:
    change_origin(export, training_state=["weights", "exp_avg"])
    assert "belongs to none of weights, exp_avg" in go(export, tmp_path / "x", "deepspeed")


@pytest.mark.parametrize("to", ["single", "official", "diffusers"])
def test_damaged_export_is_refused_by_name(checkpoint, tmp_path, to) -> None:
    go(checkpoint, tmp_path / "export", to)
    files = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    source = (file, CONFIG) if to == "official" else (tmp_path / "export", None)
    message = go(source[0], tmp_path / "x", "deepspeed", config=source[1])
    assert f"{file.name}: " in message and " does not match its " in message
    assert not (tmp_path / "x").exists()


def test_published_file_of_another_architecture_or_structure_is_refused_even_unverified(
    checkpoint, tmp_path
) -> None:
    go(checkpoint, tmp_path / "official", "official", with_optimizer=True)
    file = tmp_path / "official" / "ckpt_step_4.pth"
    wider = change_config(CONFIG, routing={"expert_width": 24})
    message = go(file, tmp_path / "x", config=wider, verify=False)
    assert "weights: " in message and "has shape (32, 16) instead of (24, 16)" in message
    content = torch.load(file, weights_only=True)
    for change, expected in (
        ({"step": "three"}, "is not laid out as"),
        ({"model_state_dict": [1]}, "is not laid out as"),
        ({"optimizer_state_dict": {"state": {1: {}}}}, "holds the state of 1 parameters"),
    ):
        torch.save({**content, **change}, tmp_path / "broken.pth")
        message = go(tmp_path / "broken.pth", tmp_path / "x", config=CONFIG)
        assert "broken.pth" in message and expected in message


def changed(checkpoint: Path, tmp_path: Path, content: Any = None, **changes: Any) -> Path:
    """Return a copy of a checkpoint with another content of its file, or with other values of its
    manifest's layout or a section of its config.
    """
    folder = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    manifest, file = read_manifest(folder), folder / MODEL_STATES
    if content is not None:
        torch.save(content, file)
    manifest.files[MODEL_STATES] = FileRecord(file.stat().st_size, checksum(file))
    layout = replace(manifest.layout, **changes.pop("layout", {}))
    for section, fields in changes.items():
        manifest.config[section] |= fields
    replace(manifest, layout=layout).write(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"layout": {"zero_stage": 2, "world_size": 0}},
            "are not what manifest.json says of them, 0 ranks",
        ),
        ({"layout": {"zero_stage": 2}}, "does not list zero_pp_rank_0"),
        ({"layout": {"dispatch": "deepspeed"}}, "does not list layer_0_expert_0"),
        ({"content": {"a": 1}}, "its files are not what manifest.json says of them"),
        ({"content": [1]}, "its files are not what manifest.json says of them"),
        (
            {"content": {"module": {"denoiser.x": torch.ones(2)}}},
            "do not fit the config in manifest.json",
        ),
        ({"content": {"module": {}, "global_steps": 3}}, "has global_steps=3"),
        (
            {"routing": {"expert_width": 24}},
            "up_weight has shape (4, 32, 16) instead of (4, 24, 16)",
        ),
    ],
)
def test_checkpoint_whose_files_do_not_fit_its_manifest_is_named_before_anything_is_written(
    checkpoint, tmp_path, change, message
) -> None:
    assert message in go(changed(checkpoint, tmp_path, **change), tmp_path / "x", verify=False)


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
    names, fresh = ({path.name for path in one.iterdir()} for one in (link, tmp_path / "fresh"))
    assert names == fresh
    assert "exists already" in go(checkpoint, link, to)


def test_destination_that_is_a_link_to_nothing_is_refused_at_once(checkpoint, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert f"is a link to {tmp_path / 'gone'}, which is not there" in go(
        checkpoint, tmp_path / "link"
    )


def test_pipeline_of_a_solver_that_diffusers_does_not_know_says_so(checkpoint, tmp_path) -> None:
    folder = changed(checkpoint, tmp_path, sampling={"solver": "heun"})
    note = go(folder, tmp_path / "x", "diffusers")
    assert note == "the recipe samples with heun, the pipeline with euler"
    assert go(folder, tmp_path / "y", "single") == ""
