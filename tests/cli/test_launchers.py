"""One entry under deepspeed, torchrun, srun's variables and plain python; then convert and sample
without deepspeed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from promoe_ds.cli.train import main

from ..processes import Forks, environment, free_port
from .commands import REPOSITORY, run, train, train_arguments

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "megatron", "transformer_engine"):
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocker())
sys.argv = ["sample"] + sys.argv[1:]
import runpy
runpy.run_module("promoe_ds.cli.sample", run_name="__main__")
"""


def _losses(run_dir: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """Train in one process with plain `python -m`."""
    done = train(cwd=folder, run_dir="plain", fork=False)
    assert done.returncode == 0, done.stderr
    assert len(_losses(folder / "plain")) == 4
    return folder / "plain"


def test_deepspeed_launcher_two_ranks_equals_plain_python(plain, folder) -> None:
    done = run(
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "--module",
        "promoe_ds.cli.train",
        *train_arguments(run_dir="deepspeed"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert _losses(folder / "deepspeed") == pytest.approx(_losses(plain), rel=1e-5)


def test_torchrun_two_ranks_equals_plain_python(plain, folder) -> None:
    done = run(
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "promoe_ds.cli.train",
        *train_arguments(run_dir="torchrun"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert _losses(folder / "torchrun") == pytest.approx(_losses(plain), rel=1e-5)


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
    base = environment(**common, **{job: str(_free_job())})
    with Forks(
        main,
        [train_arguments(run_dir=job)],
        [{**base, **dict.fromkeys(of_rank, str(rank))} for rank in range(2)],
        cwd=folder,
    ) as ranks:
        assert ranks.wait(300) == [0, 0], ranks.texts()
    assert _losses(folder / job) == pytest.approx(_losses(plain), rel=1e-5)


def test_deepspeed_dispatch_one_rank_equals_local(plain, folder) -> None:
    done = train("parallel.dispatch=alltoall", cwd=folder, run_dir="dispatch")
    assert done.returncode == 0, done.stderr
    assert _losses(folder / "dispatch") == pytest.approx(_losses(plain), rel=1e-6)


def test_packaged_bf16_config_trains_near_fp32(plain, folder) -> None:
    done = train(
        cwd=folder, run_dir="bf16", config=str(REPOSITORY / "ds_configs" / "zero2_bf16.json")
    )
    assert done.returncode == 0, done.stderr
    assert "ZeRO 2, bf16" in done.stderr
    losses = _losses(folder / "bf16")
    # Eight bits of mantissa: near, and not the same.
    assert losses == pytest.approx(_losses(plain), rel=2e-2)
    assert losses != _losses(plain)


def test_convert_and_sample_without_deepspeed_installed(plain, folder) -> None:
    convert = str(REPOSITORY / "tools" / "convert_checkpoint.py")
    for weights in ("ema", "raw"):
        done = run(
            sys.executable,
            convert,
            str(plain),
            f"export_{weights}",
            "--to",
            "single",
            "--weights",
            weights,
            cwd=folder,
            fork=weights == "raw",
        )
        assert done.returncode == 0, done.stderr
    done = run(
        sys.executable,
        "-c",
        BLOCKER,
        "--model",
        "export_ema",
        "--out",
        "samples",
        "--num",
        "12",
        "--steps",
        "3",
        "--grid",
        "--classes",
        "3,5",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (folder / "samples").glob("img*.png"))
    assert names[:2] == ["img000000_class3.png", "img000001_class5.png"]
    assert len(names) == 12
    with np.load(folder / "samples" / "samples.npz") as data:
        assert data["arr_0"].shape == (12, 8, 8, 1)
        assert data["arr_0"].dtype == np.uint8
        assert np.array_equal(
            data["arr_0"][0, ..., 0], np.asarray(Image.open(folder / "samples" / names[0]))
        )
    assert Image.open(folder / "samples" / "grid.png").size[1] == 2 * 42 + 2


def test_sample_same_seed_any_batch_size_equal_images(plain, folder) -> None:
    run(
        sys.executable,
        str(REPOSITORY / "tools" / "convert_checkpoint.py"),
        str(plain),
        "export",
        "--to",
        "single",
        cwd=folder,
    )
    images = []
    for size in (2, 5):
        done = run(
            sys.executable,
            "-m",
            "promoe_ds.cli.sample",
            "--model",
            "export",
            "--out",
            f"by{size}",
            "--num",
            "6",
            "--steps",
            "2",
            "--batch-size",
            str(size),
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
        images.append(np.load(folder / f"by{size}" / "samples.npz")["arr_0"].astype(int))
    # A rounding of 1e-7 in float may move a pixel by one level of 255.
    assert np.abs(images[0] - images[1]).max() <= 1


def test_export_output_equals_live_model(plain, folder) -> None:
    """The raw export computes what the weights inside the checkpoint's module file compute."""
    import promoe_ds
    from promoe_ds.checkpoint.torch_file import load_torch

    run(
        sys.executable,
        str(REPOSITORY / "tools" / "convert_checkpoint.py"),
        str(plain),
        "export_live",
        "--to",
        "single",
        "--weights",
        "raw",
        cwd=folder,
    )
    model = promoe_ds.load_model(folder / "export_live")
    live = load_torch(plain / "checkpoints" / "step_0000004" / "mp_rank_00_model_states.pt")[
        "module"
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, live[f"denoiser.{name}"]), name
    output = model(torch.zeros(2, 1, 8, 8), torch.tensor([500.0, 1.0]), torch.tensor([0, 10]))
    assert output.shape == (2, 1, 8, 8)
    assert torch.isfinite(output).all()


def _free_job() -> int:
    """Return the number of a job whose port, 20000 and the number, is free."""
    while (port := free_port()) < 20000:
        pass
    return port - 20000
