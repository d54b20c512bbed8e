"""Runs that several files look at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .commands import succeed, tool, train

CUT = "checkpoints/step_0000004/zero_pp_rank_0_mp_rank_00_optim_states.pt"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a `run` of four steps and make its `export`; an `other` stops after two. Copies of them
    are `cut`, `garbage`, `empty` and `silent`.
    """
    folder = tmp_path_factory.mktemp("trained")
    succeed(train(cwd=folder))
    succeed(train("train.stop_after_steps=2", cwd=folder, run_dir="other"))
    succeed(tool("convert_checkpoint", "run", "export", "--to", "single", cwd=folder))
    for name, source in (
        ("cut", "run"),
        ("garbage", "export"),
        ("empty", "run"),
        ("silent", "run"),
    ):
        shutil.copytree(folder / source, folder / name)
    (folder / "cut" / CUT).write_bytes((folder / "cut" / CUT).read_bytes()[:1000])
    (folder / "garbage/model.safetensors").write_bytes(b"garbage")
    (folder / "empty/routing.jsonl").write_text("")
    nothing = {"tokens_per_expert": [0, 0, 0, 0], "conditional_tokens": 0}
    lines = (folder / "run/routing.jsonl").read_text().splitlines()
    silent = "".join(json.dumps({**json.loads(line), **nothing}) + "\n" for line in lines)
    (folder / "silent/routing.jsonl").write_text(silent)
    return folder
