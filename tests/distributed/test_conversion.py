"""Conversion of real checkpoints: round trips bit for bit, the export is the live model, nothing is
lost on the way.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from promoe_ds import load_model
from promoe_ds.checkpoint.conversion import Conversion, Request, convert
from promoe_ds.checkpoint.conversion.convert import open_source
from promoe_ds.checkpoint.manifest import list_checkpoints
from promoe_ds.errors import CheckpointError
from promoe_ds.model.export import read_export_config

from ..processes import environment, run
from .jobs import TEXT, Job, run_jobs

#: Name -> ranks, ZeRO stage, bf16, recipe, overrides.
RUNS = {
    "zero2_ep2": (2, 2, False, "digits_promoe", ("parallel.ep_size=2",)),
    "zero1_bf16": (2, 1, True, "digits_promoe", ("parallel.ep_size=2",)),
    "zero0_ep2": (2, 0, False, "digits_promoe", ("parallel.ep_size=2",)),
    "local": (1, 0, False, "digits_promoe", ("parallel.ep_size=1",)),
    "diffmoe": (2, 2, False, "digits_diffmoe", ("parallel.ep_size=2",)),
    "expert_choice": (2, 2, False, "digits_promoe_ec", ()),
    "dit": (2, 2, False, "digits_dit", ()),
    "kmeans": (2, 2, False, "digits_kmeans", ("parallel.ep_size=2",)),
    "text": (2, 2, False, "digits_promoe", ("parallel.ep_size=2", *TEXT)),
    "modern": (2, 2, True, "digits_promoe_modern", ("parallel.ep_size=2",)),
}
#: A method, a condition or a block that was never published has no official layout.
NEVER = (("official", "kmeans"), ("official", "text"), ("official", "modern"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train a few steps on several layouts, with several methods."""
    folder = tmp_path_factory.mktemp("conversion")
    for ranks in (1, 2):
        jobs = [
            Job(
                run_dir=folder / name,
                recipe=recipe,
                zero_stage=stage,
                bf16=bf16,
                overrides=(*overrides, "train.max_steps=3"),
            )
            for name, (world, stage, bf16, recipe, overrides) in RUNS.items()
            if world == ranks
        ]
        assert run_jobs(ranks, jobs, folder) == [""] * len(jobs)
    return {name: folder / name for name in RUNS}


def contents(path: Path, config=None) -> dict[tuple[str, str], torch.Tensor]:
    """Read everything that a checkpoint of any format holds."""
    source = open_source(path, config)
    values = {
        (kind, name): source.read(kind, name).clone()
        for kind in source.kinds
        for name in source.kinds[kind]
    }
    for kind in source.kinds:
        source.check(kind)
    return values


def go(source: Path, destination: Path, to: str, config=None, **options) -> Conversion:
    return convert(source, Request(destination=destination, to=to, **options), config)


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize(
    ("name", "over"),
    [(name, over) for over in ("official", "single") for name in RUNS if (over, name) not in NEVER],
)
def test_round_trip_with_everything_is_bit_exact(runs, tmp_path, name, over) -> None:
    go(runs[name], tmp_path / over, over, with_optimizer=True, max_shard_bytes=50_000)
    source, config = tmp_path / over, None
    if over == "official":
        source, config = tmp_path / over / "ckpt_step_3.pth", open_source(runs[name]).info.config
    else:
        assert (source / "model.safetensors.index.json").is_file()
    go(source, tmp_path / "back", "deepspeed", config, with_optimizer=True)
    assert_equal(contents(tmp_path / "back"), contents(runs[name]))
    back = open_source(tmp_path / "back")
    assert (back.info.step, back.info.samples_seen, back.optimizer_step) == (3, 48, 3)


def test_export_equals_official_and_live_model(runs, tmp_path) -> None:
    go(runs["zero2_ep2"], tmp_path / "a", "single")
    go(runs["zero2_ep2"], tmp_path / "official", "official")
    config, _ = read_export_config(tmp_path / "a")
    go(tmp_path / "official" / "ckpt_step_3.pth", tmp_path / "b", "single", config)
    a, b = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    latents, timestep = (
        torch.randn(4, config.model.in_channels, 8, 8),
        torch.tensor([0.0, 20.0, 500.0, 999.0]),
    )
    labels = torch.tensor([0, 1, config.model.null_label, 3])
    with torch.no_grad():
        assert torch.equal(a(latents, timestep, labels), b(latents, timestep, labels))


def test_round_trip_over_diffusers_is_bit_exact_and_draws_the_same(runs, tmp_path) -> None:
    """Both formats load without deepspeed, in a process of their own, and draw the same images."""
    runs = {name: run_dir for name, run_dir in runs.items() if name != "text"}
    for name, run_dir in runs.items():
        folder = tmp_path / name
        go(run_dir, folder / "pipeline", "diffusers", max_shard_bytes=50_000)
        go(run_dir, folder / "single", "single")
        go(folder / "pipeline", folder / "back", "single")
        assert_equal(contents(folder / "back"), contents(folder / "single"))
    code = (
        "import os, sys; sys.modules['deepspeed'] = None\n"
        "import numpy as np, torch\n"
        "from promoe_ds import ProMoEPipeline, load_model\n"
        "from promoe_ds.evaluation.sample_job import SampleRequest, draw_samples\n"
        "from pathlib import Path\n"
        "def check():\n"
        "  pipeline = ProMoEPipeline.from_pretrained('pipeline')\n"
        "  x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([10.0, 500.0, 990.0]), torch.tensor([1,"
        " 10, 3])\n"
        "  with torch.no_grad():\n"
        "      assert torch.equal(pipeline.transformer(x, t, y).sample, load_model('single')(x, t,"
        " y))\n"
        "  images = pipeline([0, 1, 2, 3], num_inference_steps=3, guidance_scale=1.5, seed=5,"
        " output_type='np').images\n"
        "  draw_samples(SampleRequest(model=Path('single'), out=Path('out'), num=4, steps=3,"
        " cfg_scale=1.5, seed=5,\n"
        # one batch, as the pipeline's
        "                             classes=(0, 1, 2, 3), exact=False))\n"
        "  drawn = np.load('out/samples.npz')['arr_0']\n"
        "  assert np.array_equal((images * 255).round().astype('uint8'), drawn)\n"
        "  pipeline.save_pretrained('again')\n"
        "  again = ProMoEPipeline.from_pretrained('again')\n"
        "  assert all(torch.equal(a, b) for a, b in zip(again.transformer.state_dict().values(),\n"
        "                                               pipeline.transformer.state_dict().values(),"
        " strict=True))\n"
        "for folder in sys.argv[1:]:\n"
        "  os.chdir(folder)\n"
        "  check()\n"
    )
    done = run(
        [sys.executable, "-c", code, *(str(tmp_path / name) for name in runs)],
        cwd=tmp_path,
        env=environment(),
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_published_file_opens_with_plain_torch(runs, tmp_path) -> None:
    go(runs["zero2_ep2"], tmp_path / "official", "official", with_optimizer=True)
    content = torch.load(tmp_path / "official" / "ckpt_step_3.pth", weights_only=True)
    assert list(content) == [
        "step",
        "model_state_dict",
        "ema_model_state_dict",
        "optimizer_state_dict",
    ]
    names, states = list(content["model_state_dict"]), content["optimizer_state_dict"]["state"]
    assert names[0] == "pos_embed"
    assert 0 not in states
    assert len(states) == len(names) - 1
    for index, state in states.items():
        assert state["exp_avg"].shape == content["model_state_dict"][names[index]].shape
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(value) for value in content["model_state_dict"].values()]
    )
    optimizer.load_state_dict(content["optimizer_state_dict"])


def test_weights_by_name_and_type(runs, tmp_path) -> None:
    go(runs["zero2_ep2"], tmp_path / "raw", "single", weights="raw", dtype="bf16")
    everything = contents(runs["zero2_ep2"])
    for (kind, name), value in contents(tmp_path / "raw").items():
        assert kind == "weights"
        assert torch.equal(value, everything["weights", name].bfloat16())
    network = load_model(tmp_path / "raw")
    assert next(network.parameters()).dtype == torch.bfloat16
    refusals = (
        (
            runs["zero2_ep2"],
            "single",
            {"weights": "ema_0.5"},
            "holds no ema_0.5 weights, only raw, ema",
        ),
        (runs["zero2_ep2"], "single", {"ema_sigma_rel": 0.1}, "holds no power-function averages"),
        (tmp_path / "raw", "single", {"weights": "ema"}, "holds no ema weights, only raw"),
        (tmp_path / "raw", "official", {"with_optimizer": True}, "leave --with-optimizer out"),
        (runs["kmeans"], "official", {}, "never published"),
        (runs["text"], "official", {}, "model.condition=text was never published"),
        (runs["modern"], "official", {}, "model.block=modern was never published"),
    )
    for source, to, options, message in refusals:
        with pytest.raises(CheckpointError, match=re.escape(message)):
            go(source, tmp_path / "x", to, **options)
    assert not (tmp_path / "x").exists()
    assert list(tmp_path.glob("*.unfinished")) == []


def test_running_state_of_an_average_that_differs_is_named(runs, tmp_path) -> None:
    go(runs["diffmoe"], tmp_path / "official", "official")
    file, config = (
        tmp_path / "official" / "ckpt_step_3.pth",
        open_source(runs["diffmoe"]).info.config,
    )
    content = torch.load(file, weights_only=True)
    average = content["ema_model_state_dict"]
    average |= {key: average[key] + 1 for key in average if key.endswith("expert_threshold")}
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="take one set of weights"):
        go(file, tmp_path / "x", "deepspeed", config)


def test_damaged_source_is_refused_by_name(runs, tmp_path) -> None:
    newest = list_checkpoints(runs["zero2_ep2"] / "checkpoints")[0]
    damaged = Path(shutil.copytree(newest, tmp_path / "damaged"))
    file = damaged / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=file.name):
        go(damaged, tmp_path / "x", "single")
    assert not (tmp_path / "x").exists()


def test_new_run_starts_from_converted_weights_on_other_ranks(runs, tmp_path) -> None:
    go(runs["zero2_ep2"], tmp_path / "start", "deepspeed")
    assert (
        json.loads((tmp_path / "start" / "step_0000000" / "manifest.json").read_text())["step"] == 0
    )
    job = Job(
        run_dir=tmp_path / "run",
        resume=str(tmp_path / "start"),
        overrides=("parallel.ep_size=2", "train.max_steps=2"),
    )
    assert run_jobs(2, [job], tmp_path) == [""]
    assert "step 2" in (tmp_path / "run" / "train.log").read_text()


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with several averages and many checkpoints, and keep the length that will be asked for
    as well.
    """
    folder = tmp_path_factory.mktemp("averaged")
    overrides = (
        "parallel.ep_size=2",
        "train.max_steps=24",
        "train.checkpoint_every=4",
        "train.keep_last=1",
        "train.keep_every=4",
        "optimizer.ema_decays=[0.9,0.5]",
        "optimizer.ema_sigma_rels=[0.05,0.15]",
    )
    longer = (*overrides[:-1], "optimizer.ema_sigma_rels=[0.1]")
    jobs = [
        Job(run_dir=folder / "run", overrides=overrides),
        Job(run_dir=folder / "oracle", overrides=longer),
    ]
    assert run_jobs(2, jobs, folder) == ["", ""]
    return folder


def test_averages_of_several_decays_are_exported_by_name(averaged, tmp_path) -> None:
    everything = contents(averaged / "run")
    assert {kind for kind, _ in everything} == {
        "weights",
        "ema",
        "ema_0.5",
        "ema_power_0.05",
        "ema_power_0.15",
        "exp_avg",
        "exp_avg_sq",
    }
    for kind in ("ema", "ema_0.5", "ema_power_0.05"):
        go(averaged / "run", tmp_path / kind, "single", weights=kind)
        assert_equal(
            contents(tmp_path / kind),
            {key: value for key, value in everything.items() if key[0] == kind},
        )
    go(averaged / "run", tmp_path / "all", "single", with_optimizer=True)
    go(tmp_path / "all", tmp_path / "back", "deepspeed", with_optimizer=True)
    assert_equal(contents(tmp_path / "back"), everything)


def test_average_of_another_length_is_nearly_the_one_kept_in_training(averaged, tmp_path) -> None:
    report = go(averaged / "run", tmp_path / "mixed", "single", ema_sigma_rel=0.1)
    assert report.kinds == {"ema_power_0.1": "ema_power_0.1"}
    mixed, everything, oracle = (
        contents(tmp_path / "mixed"),
        contents(averaged / "run"),
        contents(averaged / "oracle"),
    )
    far, near = 0.0, 0.0
    for (kind, name), value in mixed.items():
        if not name.endswith("qkv.bias"):
            near += (value - oracle[kind, name]).square().sum().item()
            far += (everything["ema_power_0.05", name] - oracle[kind, name]).square().sum().item()
    assert near < 0.05**2 * far
    for options, message in (
        ({"ema_sigma_rel": 0.29}, "between 0 and 0.289"),
        ({"ema_sigma_rel": 0.005}, "off it: ask for"),
        ({"ema_sigma_rel": 0.1, "with_optimizer": True}, "leave --with-optimizer out"),
    ):
        with pytest.raises(CheckpointError, match=message):
            go(averaged / "run", tmp_path / "x", "single", **options)
