"""The tools that look at experts, as a user runs them, mistakes included."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
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
    output = tmp_path / "output"
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
    os.close(inside)
    threading.Thread(target=copy, args=(terminal, output), daemon=True).start()
    try:
        wait_for(output, "waiting for the first log step")
        log.write_text("".join(lines[:10]) + lines[10][:40])  # a line that is being written
        wait_for(output, "step 1: load")
        with log.open("a") as file:
            file.write(lines[10][40:] + "".join(lines[11:20]))
        wait_for(output, "step 2: load")
        log.write_text("".join(lines[:10]))  # a resume dropped what came after its checkpoint
        wait_for(output, "step 1: load", after=output.read_text().rfind("step 2: load"))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    wait_for(output, "stopped following")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.read_text()).replace("\r", "")
    assert "Traceback" not in text and max(map(len, text.splitlines())) <= 80
    assert re.search(
        r"layer experts max/mean dead .*so far *\n +1 [▁▂▃▄▅▆▇█×]{4} +\d\.\d\d +\d ", text
    )


def copy(terminal: int, output: Path) -> None:
    """Write what a terminal shows into a file, until its process ends."""
    with output.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(os.read(terminal, 1 << 16))
            except OSError:
                return


def wait_for(output: Path, words: str, *, after: int = 0, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not output.exists() or words not in output.read_text(errors="replace")[after:]:
        assert time.monotonic() < end, output.read_text(errors="replace")[-2000:]
        time.sleep(0.1)


def test_analyze_writes_a_page_and_files(trained) -> None:
    few = ("--images", "6", "--tokens", "30", "--rounds", "3", "--sigmas", "0.2", "0.8")
    how = ("--singular-vectors", "4", "--export", "analysis")
    done = tool("analyze_experts", "export", *few, *how, cwd=trained, fork=False)
    assert "report: export/experts.html" in succeed(done)
    assert "layer 1: the expert depends, beyond chance, on" in done.stdout
    assert len(list((trained / "analysis").glob("*.png"))) == 5 + 4
