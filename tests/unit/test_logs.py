"""Lines about long work."""

from __future__ import annotations

import logging

import pytest

from promoe_ds import logs


@pytest.mark.parametrize(
    ("total", "steps", "expected"),
    [
        (
            500,
            [(4, 40), (10, 60), (12, 100), (21, 5000)],
            [
                "100/500 images  10 images/s  0:00:40 left",
                "500/500 images  23.8 images/s  0:00:00 left",
            ],
        ),
        (7200.0, [(10, 1)], ["1.0/7200.0 images  0.1 images/s  19:59:50 left"]),
    ],
)
def test_progress_says_amount_speed_and_time_left_now_and_then(
    total, steps, expected, monkeypatch
) -> None:
    now, lines = [100.0], []
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    logger = logging.Logger("long", logging.INFO)
    logger.addFilter(lambda record: lines.append(record.getMessage()))
    progress = logs.Progress(logger, total, "images")
    for seconds, amount in steps:
        now[0] = 100.0 + seconds
        progress.add(amount)
    assert lines == expected
