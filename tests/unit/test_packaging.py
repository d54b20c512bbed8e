"""What an installed package holds, and that each of its commands answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

#: Of a command's help: a screen.
_MOST_LINES = 55
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(("name", "target"), PROJECT["scripts"].items(), ids=PROJECT["scripts"])
def test_console_script_explains_itself_on_a_screen(name, target, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ending:
        EntryPoint(name, target, "console_scripts").load()()
    assert ending.value.code == 0
    *lines, page = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: promoe-") and len(lines) < _MOST_LINES
    examples = [line for line in lines if re.match(r"    (promoe-\w|deepspeed |torchrun )", line)]
    assert len(examples) >= 2
    assert (ROOT / page.removeprefix("More: ")).is_file()


def test_every_command_has_a_console_script() -> None:
    commands = {
        f"promoe_ds.cli.{file.stem}:run"
        for file in (ROOT / "promoe_ds" / "cli").glob("*.py")
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    }
    assert set(PROJECT["scripts"].values()) == commands


def test_wheel_and_sdist_hold_the_whole_package(tmp_path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "promoe_ds", tmp_path / "promoe_ds", ignore=shutil.ignore_patterns("__pycache__")
    )
    wanted = {
        file.relative_to(tmp_path).as_posix()
        for file in (tmp_path / "promoe_ds").rglob("*")
        if file.is_file()
    }
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert wanted <= {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        assert wanted == {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
        archive.extractall(tmp_path / "installed")
    load = (
        "from promoe_ds.config import load_config; import promoe_ds; load_config('digits_promoe');"
        " print(promoe_ds.__file__)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", load],
        cwd=tmp_path / "dist",
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert Path(answer.stdout.strip()).is_relative_to(tmp_path / "installed")
