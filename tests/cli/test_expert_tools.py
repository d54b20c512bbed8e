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

from promoe_ds.cli.analyze_experts import main
from promoe_ds.errors import PromoeError

from ..processes import environment
from .commands import REPOSITORY, run, train

TOOLS = ("expert_load", "analyze_experts", "convert_checkpoint")
LOAD, ANALYZE, CONVERT = (str(REPOSITORY / "tools" / f"{name}.py") for name in TOOLS)


def expert_load(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, LOAD, *arguments, cwd=cwd, env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train four steps, stop after two in a second run."""
    folder = tmp_path_factory.mktemp("experts")
    for name, overrides in (("run", ()), ("other", ("train.stop_after_steps=2",))):
        done = train(*overrides, cwd=folder, run_dir=name)
        assert done.returncode == 0, done.stderr
    return folder


def test_load_prints_a_summary_and_writes_a_page_and_files(folder) -> None:
    done = expert_load("run", "--export", "figures", cwd=folder)
    assert done.returncode == 0, done.stderr
    for words in (
        "Expert load, all steps (share of routed tokens",
        "max/mean",
        "Placements",
        "report: run/expert_load.html",
        "exported 18 figures",
    ):
        assert words in done.stdout
    assert (folder / "run" / "expert_load.html").read_text().startswith("<!doctype html>")
    assert len(list((folder / "figures").glob("*.png"))) == 18
    both = expert_load("run", "--compare", "other", "--out", "both.html", cwd=folder)
    assert "report: both.html" in both.stdout
    assert "<h1>run and other</h1>" in (folder / "both.html").read_text()


def test_load_placement_is_written_and_applied_at_the_next_resume(folder) -> None:
    done = expert_load(
        "other", "--no-html", "--placement", "placement.json", "--ep-size", "2", cwd=folder
    )
    assert (
        "Apply it at the next resume: --set parallel.expert_placement=placement.json" in done.stdout
    )
    assert not (folder / "other" / "expert_load.html").exists()
    values = json.loads((folder / "placement.json").read_text())
    assert (values["ep_size"], values["from_step"], sorted(values["layers"]["1"])) == (
        2,
        2,
        [0, 1, 2, 3],
    )
    values["layers"]["1"] = [3, 1, 0, 2]
    (folder / "placement.json").write_text(json.dumps(values))
    resumed = train("parallel.expert_placement=placement.json", cwd=folder, run_dir="other")
    assert resumed.returncode == 0, resumed.stderr
    losses = [
        [
            json.loads(line)["loss"]
            for line in (folder / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("run", "other")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    last = json.loads((folder / "other" / "routing.jsonl").read_text().splitlines()[-10])
    assert last["layer_detail"]["experts"] == [3, 1, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nowhere",), 3, "nowhere: no routing statistics there (there is no such folder)"),
        (
            ("run", "--compare", "."),
            3,
            ".: no routing statistics there (the folder has no routing.jsonl)",
        ),
        (
            ("run", "--out", "no/such/page.html"),
            3,
            "no/such/page.html cannot be written: No such file or directory",
        ),
        (
            ("run", "--placement", "p.json", "--ep-size", "3"),
            2,
            "--ep-size 3 does not divide the 4 experts",
        ),
        (("run", "--last-steps", "0"), 2, "--last-steps 0: must be above 0"),
        (
            ("empty",),
            3,
            "routing.jsonl is empty: the run has no MoE layer or did not reach its first log step",
        ),
        (("nowhere", "--follow"), 3, "nowhere: no routing statistics there"),
        (("run", "--follow", "--every", "nan"), 2, "--every nan: must be above 0, and finite"),
        (
            ("run", "--follow", "--export", "x"),
            2,
            "--export is of the report and has no effect with --follow",
        ),
        (("run", "--follow", "--last-steps", "5"), 2, "--last-steps is of the report"),
        (
            ("run", "--ep-size", "2"),
            2,
            "--ep-size has no effect without --placement: add that, or leave it out",
        ),
        (("run", "--every", "2"), 2, "--every has no effect without --follow"),
        (("run", "--no-html", "--out", "x.html"), 2, "--out has no effect with --no-html"),
        (
            ("null", "--placement", "p.json"),
            3,
            "--placement p.json: no token was routed in the last 1 steps",
        ),
    ],
)
def test_load_mistake_is_one_message(folder, arguments, code, message) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "empty" / "routing.jsonl").touch()
    (folder / "null").mkdir(exist_ok=True)
    lines = [
        json.loads(line) for line in (folder / "run" / "routing.jsonl").read_text().splitlines()
    ]
    (folder / "null" / "routing.jsonl").write_text(
        "".join(
            json.dumps({**line, "tokens_per_expert": [0, 0, 0, 0], "conditional_tokens": 0}) + "\n"
            for line in lines
        )
    )
    done = expert_load(*arguments, cwd=folder)
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "p.json").exists() and not (folder / "x").exists()


def test_load_follow_shows_new_steps_until_interrupted(folder, tmp_path) -> None:
    """In a terminal of 80 columns and 24 rows."""
    lines = (folder / "run" / "routing.jsonl").read_text().splitlines(keepends=True)
    log = tmp_path / "routing.jsonl"
    output = tmp_path / "output"
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, LOAD, str(tmp_path), "--follow", "--every", "0.2"],
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


def test_analyze_writes_a_page_and_refuses_what_cannot_be(folder) -> None:
    assert (
        run(sys.executable, CONVERT, "run", "export", "--to", "single", cwd=folder).returncode == 0
    )
    few = (
        "--images",
        "6",
        "--tokens",
        "30",
        "--rounds",
        "3",
        "--sigmas",
        "0.2",
        "0.8",
        "--singular-vectors",
        "4",
    )
    done = run(
        sys.executable, ANALYZE, "export", *few, "--export", "analysis", cwd=folder, fork=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        "report: export/experts.html" in done.stdout
        and "layer 1: the expert depends, beyond chance, on" in done.stdout
    )
    assert len(list((folder / "analysis").glob("*.png"))) == 5 + 4
    refused = run(sys.executable, ANALYZE, "export", *few, "--singular-vectors", "99", cwd=folder)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "--singular-vectors 99: an expert's matrix has 1 to 32" in refused.stderr
    export = str(folder / "export")
    for more, message in (
        (("--sigmas", "1.5"), r"--sigmas 1.5: must be from 0 \(data\) to 1 \(noise\)"),
        (("--images", "1"), "--images 1: must be at least 2"),
        (("--tokens", "19"), "--tokens 19: must be at least 20"),
        (("--seed", "-1"), "--seed -1: must be from 0 to 4294967295"),
        (("--device", "gpu"), "--device gpu: .*device"),
        (
            ("--out", f"{export}/y.json"),
            "y.json: the numbers get this name, the page needs another",
        ),
        (("--out", f"{export}/no/y.html"), "y.html cannot be written: No such file or directory"),
        (("--export", f"{export}/config.json"), "config.json cannot be written: File exists"),
        (
            ("--data-path", "latents"),
            "--data-path latents: the model's data, digits, is in no folder",
        ),
    ):
        with pytest.raises(PromoeError, match=message):
            main([export, *few, *more])
