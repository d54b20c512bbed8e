"""One entry under deepspeed, torchrun, srun's variables and plain python; then convert and sample
without deepspeed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from promoe_ds.cli.train import main

from ..processes import Forks, environment, free_port
from .commands import REPOSITORY, TWO, losses, run, succeed, tool, train, train_arguments

BLOCKER = """
import sys
from importlib.machinery import PathFinder
find_spec, absent = PathFinder.find_spec, ("deepspeed", "megatron", "transformer_engine")
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: (
        None if name.split(".")[0] in absent else find_spec(name, path, target)
    )
)
sys.argv = ["sample"] + sys.argv[1:]
import runpy
runpy.run_module("promoe_ds.cli.sample", run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Train in one process with plain `python -m`."""
    succeed(train(cwd=folder, run_dir="plain", fork=False))
    assert len(losses(folder / "plain")) == 4
    return folder / "plain"


@pytest.mark.parametrize(
    "launcher",
    [("deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module"), TWO],
    ids=["deepspeed", "torchrun"],
)
def test_launcher_two_ranks_equals_plain_python(plain, folder, launcher) -> None:
    command = [str(free_port()) if part == "PORT" else part for part in launcher]
    arguments = train_arguments(run_dir=launcher[0])
    succeed(run(*command, "promoe_ds.cli.train", *arguments, cwd=folder))
    assert losses(folder / launcher[0]) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    ("common", "of_rank", "job"),
    [
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_ID": "0",
            },
            ("SLURM_PROCID", "SLURM_LOCALID"),
            "SLURM_JOB_ID",
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_RANK"),
            "PMIX_NAMESPACE",
        ),
    ],
    ids=["srun", "mpirun"],
)
def test_variables_of_two_ranks_equal_plain_python(plain, folder, common, of_rank, job) -> None:
    """What `srun --ntasks 2` or `mpirun -np 2` sets, on two processes; the job gives the port."""
    # The port is 20000 and the job's number.
    port = next(port for port in iter(free_port, 0) if port >= 20000)
    base = environment(**common, **{job: str(port - 20000)})
    with Forks(
        main,
        [train_arguments(run_dir=job)],
        [{**base, **dict.fromkeys(of_rank, str(rank))} for rank in range(2)],
        cwd=folder,
    ) as ranks:
        assert ranks.wait(300) == [0, 0], ranks.texts()
    assert losses(folder / job) == pytest.approx(losses(plain), rel=1e-5)


def test_deepspeed_dispatch_one_rank_equals_local(plain, folder) -> None:
    succeed(train("parallel.dispatch=alltoall", cwd=folder, run_dir="dispatch"))
    assert losses(folder / "dispatch") == pytest.approx(losses(plain), rel=1e-6)


def test_packaged_bf16_config_trains_near_fp32(plain, folder) -> None:
    config = str(REPOSITORY / "ds_configs" / "zero2_bf16.json")
    assert "ZeRO 2, bf16" in succeed(train(cwd=folder, run_dir="bf16", config=config))
    # Eight bits of mantissa: near, and not the same.
    assert losses(folder / "bf16") == pytest.approx(losses(plain), rel=2e-2)
    assert losses(folder / "bf16") != losses(plain)


@pytest.fixture(scope="module")
def exports(plain: Path, folder: Path) -> dict[str, Path]:
    """Convert the averaged and the trained weights."""
    for weights in ("ema", "raw"):
        arguments = (str(plain), weights, "--to", "single", "--weights", weights)
        succeed(tool("convert_checkpoint", *arguments, cwd=folder, fork=weights == "raw"))
    return {"ema": folder / "ema", "raw": folder / "raw"}


def test_sample_without_deepspeed_installed(exports, folder) -> None:
    options = ("--num", "12", "--steps", "3", "--grid", "--classes", "3,5")
    model = ("--model", str(exports["ema"]), "--out", "samples")
    succeed(run(sys.executable, "-c", BLOCKER, *model, *options, cwd=folder))
    names = sorted(path.name for path in (folder / "samples").glob("img*.png"))
    assert (names[:2], len(names)) == (["img000000_class3.png", "img000001_class5.png"], 12)
    with np.load(folder / "samples" / "samples.npz") as data:
        images = data["arr_0"]
    assert (images.shape, images.dtype) == ((12, 8, 8, 1), np.uint8)
    assert np.array_equal(images[0, ..., 0], np.asarray(Image.open(folder / "samples" / names[0])))
    assert Image.open(folder / "samples" / "grid.png").size[1] == 2 * 42 + 2


def test_export_output_equals_live_model(plain, exports) -> None:
    """The raw export computes what the weights inside the checkpoint's module file compute."""
    import promoe_ds
    from promoe_ds.checkpoint.torch_file import load_torch

    model = promoe_ds.load_model(exports["raw"])
    states = plain / "checkpoints" / "step_0000004" / "mp_rank_00_model_states.pt"
    live = load_torch(states)["module"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, live[f"denoiser.{name}"]), name
    output = model(torch.zeros(2, 1, 8, 8), torch.tensor([500.0, 1.0]), torch.tensor([0, 10]))
    assert output.shape == (2, 1, 8, 8) and torch.isfinite(output).all()
