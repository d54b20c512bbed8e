"""The tools that look at experts, as a user runs them, mistakes included."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from ..processes import environment
from .commands import REPOSITORY, losses, succeed, tool, train


def expert_load(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return tool("expert_load", *arguments, cwd=cwd, COLUMNS="100")


def test_load_prints_a_summary_and_writes_a_page_and_files(trained) -> None:
    printed = succeed(expert_load("run", "--export", "figures", cwd=trained))
    for words in (
        "Expert load, all steps (share of routed tokens",
        "max/mean",
        "Placements",
        "report: run/expert_load.html",
        "exported 18 figures",
    ):
        assert words in printed
    assert (trained / "run" / "expert_load.html").read_text().startswith("<!doctype html>")
    assert len(list((trained / "figures").glob("*.png"))) == 18
    both = expert_load("run", "--compare", "other", "--out", "both.html", cwd=trained)
    assert "report: both.html" in both.stdout
    assert "<h1>run and other</h1>" in (trained / "both.html").read_text()


def test_load_placement_is_written_and_applied_at_the_next_resume(trained) -> None:
    place = ("--no-html", "--placement", "placement.json", "--ep-size", "2")
    printed = succeed(expert_load("other", *place, cwd=trained))
    assert "--set parallel.expert_placement=placement.json" in printed
    assert not (trained / "other" / "expert_load.html").exists()
    values = json.loads((trained / "placement.json").read_text())
    assert (values["ep_size"], values["from_step"]) == (2, 2)
    assert sorted(values["layers"]["1"]) == [0, 1, 2, 3]
    values["layers"]["1"] = [3, 1, 0, 2]
    (trained / "placement.json").write_text(json.dumps(values))
    succeed(train("parallel.expert_placement=placement.json", cwd=trained, run_dir="other"))
    assert losses(trained / "other") == pytest.approx(losses(trained / "run"), rel=1e-5)
    last = json.loads((trained / "other" / "routing.jsonl").read_text().splitlines()[-10])
    assert last["layer_detail"]["experts"] == [3, 1, 0, 2]


def test_load_follow_shows_new_steps_until_interrupted(trained, tmp_path) -> None:
    """In a terminal of 80 columns and 24 rows."""
    lines = (trained / "run" / "routing.jsonl").read_text().splitlines(keepends=True)
    log = tmp_path / "routing.jsonl"
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "tools/expert_load.py", str(tmp_path), "--follow", "--every", "0.2"],
        cwd=REPOSITORY,
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=environment(TERM="xterm-256color"),
    )
    try:
        shown = read_until(terminal, "waiting for the first log step")
        log.write_text("".join(lines[:10]) + lines[10][:40])  # a line that is being written
        shown += read_until(terminal, "step 1: load")
        with log.open("a") as file:
            file.write(lines[10][40:] + "".join(lines[11:20]))
        shown += read_until(terminal, "step 2: load")
        log.write_text("".join(lines[:10]))  # a resume dropped what came after its checkpoint
        shown += read_until(terminal, "step 1: load")
        process.send_signal(signal.SIGINT)
        shown += read_until(terminal, "stopped following")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "")
    assert "Traceback" not in text and max(map(len, text.splitlines())) <= 80
    assert re.search(
        r"layer experts max/mean dead .*so far *\n +1 [▁▂▃▄▅▆▇█×]{4} +\d\.\d\d +\d ", text
    )


def read_until(terminal: int, words: str) -> str:
    """Return what a terminal shows until it shows these words."""
    shown = b""
    while words.encode() not in shown:
        assert select.select([terminal], [], [], 90)[0], shown[-2000:]
        shown += os.read(terminal, 1 << 16)
    return shown.decode(errors="replace")


def test_analyze_writes_a_page_and_files(trained) -> None:
    few = ("--images", "6", "--tokens", "30", "--rounds", "3", "--sigmas", "0.2", "0.8")
    how = ("--singular-vectors", "4", "--export", "analysis")
    done = tool("analyze_experts", "export", *few, *how, cwd=trained, fork=False)
    assert "report: export/experts.html" in succeed(done)
    assert "layer 1: the expert depends, beyond chance, on" in done.stdout
    assert len(list((trained / "analysis").glob("*.png"))) == 5 + 4
