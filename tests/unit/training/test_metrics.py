"""What a resume leaves of the logs: read from their end, whatever an interruption left there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import promoe_ds.training.metrics as metrics
from promoe_ds.errors import CheckpointError
from promoe_ds.files import write_json
from promoe_ds.logs import configure_logging, get_logger
from promoe_ds.training.metrics import append_lines, drop_lines_after


def line(step: int, size: int = 0) -> bytes:
    return json.dumps({"step": step, "padding": "é" * size}, ensure_ascii=False).encode() + b"\n"


WHOLE = b"".join(line(step) for step in (1, 1, 2, 2, 3, 3))


@pytest.mark.parametrize(
    ("content", "step", "expected"),
    [
        (WHOLE, 2, line(1) * 2 + line(2) * 2),
        (WHOLE, 3, WHOLE),
        (WHOLE, 9, WHOLE),
        (WHOLE, 0, b""),
        (b"", 5, b""),
        (WHOLE + b'{"step": 4, "los', 3, WHOLE),
        (WHOLE[:-1], 3, WHOLE),  # whole but for its end
        (WHOLE + b"\xff\x00\n" + line(4), 3, WHOLE),
        (WHOLE + line(4) + b"\x00" * 5000, 4, WHOLE + line(4)),
        (WHOLE + b'{"step": Infinity}\n{"step": NaN}\n', 9, WHOLE),
        (WHOLE + b'{"step": 4, "loss": NaN}\n', 4, WHOLE + b'{"step": 4, "loss": NaN}\n'),
        (WHOLE + b'[4]\n{"loss": 1}\n{"step": null}\n\n' + line(5), 3, WHOLE),
        (
            b"\xff\n" + WHOLE,
            2,
            b"\xff\n" + line(1) * 2 + line(2) * 2,
        ),  # what a run has left behind long ago is not looked at
        (line(1, 100) + line(2, 999) + line(3, 40), 2, line(1, 100) + line(2, 999)),
    ],
    ids=[
        "later",
        "newest",
        "none",
        "all",
        "empty",
        "cut",
        "endless",
        "bytes",
        "zeros",
        "infinite",
        "nan",
        "objects",
        "old",
        "long",
    ],
)
def test_drop_lines_leaves_those_up_to_the_step(content, step, expected, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    drop_lines_after(path, step)
    assert path.read_bytes() == expected
    append_lines(path, [{"step": 10}])
    assert path.read_bytes() == expected + b'{"step": 10}\n'


def test_drop_lines_tells_of_broken_ones_and_reads_no_further_than_needed(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(WHOLE * 1000 + b"\xff\n" + line(4))
    seen = []
    monkeypatch.setattr(
        metrics.json, "loads", lambda text, loads=json.loads: seen.append(text) or loads(text)
    )
    with caplog.at_level(logging.WARNING):
        drop_lines_after(path, 3)
    assert len(seen) == 3
    assert f"log.jsonl: dropped a broken line at byte {len(WHOLE) * 1000}" in caplog.text


def test_drop_lines_without_a_file_makes_none(tmp_path: Path) -> None:
    drop_lines_after(tmp_path / "log.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_log_on_a_full_disk_is_an_honest_error() -> None:
    with pytest.raises(CheckpointError, match=r"/dev/full .*No space left on device") as refusal:
        append_lines(Path("/dev/full"), [{"step": 1}])
    assert refusal.value.exit_code == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_word_for_what_is_not_finite(tmp_path: Path, value: float) -> None:
    append_lines(tmp_path / "log", [{"step": 1, "a": (value, {"b": [value]})}])
    write_json(tmp_path / "file", {"a": value})
    assert (tmp_path / "log").read_text() == '{"step": 1, "a": [null, {"b": [null]}]}\n'
    assert (
        json.loads((tmp_path / "file").read_text()) == {"a": None}
        and len(list(tmp_path.iterdir())) == 2
    )


def test_train_log_on_a_full_disk_is_one_line(capfd) -> None:
    configure_logging(0, log_file=Path("/dev/full"))
    try:
        for _ in range(3):
            get_logger("train").info("training")
    finally:
        configure_logging(0)
    error = capfd.readouterr().err
    assert (error.count("/dev/full"), error.count("training"), "Traceback" in error) == (
        1,
        3,
        False,
    )
