"""Advice on placement: against every possible one, and what it is measured by."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from promoe_ds.config import load_config
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.reports.load.charts import placements
from promoe_ds.reports.load.placement import (
    advise,
    balance,
    exchange,
    unevenness,
    write_placement,
)
from promoe_ds.reports.load.run import RunView
from promoe_ds.reports.log import load_log

from .routing_logs import interval, line, write


def fullest(load_E: np.ndarray, order: list[int], ep_size: int) -> float:
    return load_E[order].reshape(ep_size, -1).sum(axis=1).max()


def best_of_all(load_E: np.ndarray, ep_size: int) -> float:
    """Try every way to share the experts out."""
    size = len(load_E) // ep_size

    def _least(left: frozenset[int]) -> float:
        if not left:
            return 0.0
        first, others = min(left), sorted(left - {min(left)})
        return min(
            max(load_E[[first, *rest]].sum(), _least(left - {first, *rest}))
            for rest in itertools.combinations(others, size - 1)
        )

    return _least(frozenset(range(len(load_E))))


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["even", "one_heavy", "steps", "random", "dead"])
def test_balance_is_near_the_best_of_all(kind: str, ep_size: int) -> None:
    random = np.random.default_rng(ep_size)
    for _ in range(5):
        load_E = {
            "even": np.full(8, 5.0),
            "one_heavy": np.array([90.0, *[2.0] * 7]),
            "steps": np.arange(1.0, 9),
            "random": random.pareto(1.5, 8),
            "dead": np.array([0.0, 0, 0, 5, 6, 7, 8, 30]),
        }[kind]
        order = exchange(load_E[None], balance(load_E, ep_size), ep_size)
        assert sorted(order) == list(range(8))
        assert fullest(load_E, order, ep_size) <= 1.03 * best_of_all(load_E, ep_size)


@pytest.mark.parametrize(
    ("order", "ep_size", "expected"),
    [
        ([0, 1, 2, 3], 2, 16 / 10),  # 8 of a mean of 5, twice
        ([0, 3, 1, 2], 2, 14 / 10),
        ([0, 1, 2, 3], 1, 1.0),
    ],
)
def test_unevenness_by_hand(order, ep_size, expected) -> None:
    tokens_TLE = np.array([[[6, 2, 1, 1], [0] * 4], [[1, 1, 2, 6], [0] * 4]])
    found = unevenness(tokens_TLE, np.array([order] * 2), ep_size)
    np.testing.assert_allclose(found, [expected, np.nan])


def test_advice_never_makes_it_worse_and_names_every_layer(tmp_path) -> None:
    log = load_log(
        write(
            tmp_path / "run",
            [*interval(5, tokens=[9, 8, 1, 2]), *interval(10, tokens=[9, 8, 1, 2])],
        )
    )
    order = advise(log, log.window(), 2)
    assert order.tolist() == [[0, 2, 1, 3]] * 2
    path = tmp_path / "placement.json"
    write_placement(path, log, order, 2)
    config = load_config("digits_promoe", [f"parallel.expert_placement={path}", "model.depth=4"])
    assert config.parallel.expert_order == ((0, 2, 1, 3),) * 2
    present, *others = RunView.open(tmp_path / "run").candidates
    assert present.uneven_L.tolist() == pytest.approx([1.7] * 2)
    advised = {each.ep_size: each.uneven_L.max() for each in others if each.name == "advised"}
    assert advised == {2: pytest.approx(1.0)}
    assert {each.ep_size for each in others} == {1, 2, 4}


@pytest.mark.parametrize(
    ("tokens", "others"),
    [
        ([9], []),
        ([9, 9], [(1, "plain order")]),
        ([9, 8, 2, 1], [(1, "plain order"), (2, "advised"), (4, "plain order")]),
    ],
)
def test_the_present_placement_is_listed_once(tmp_path, tokens, others) -> None:
    view = RunView.open(write(tmp_path, [*interval(5, tokens=tokens), *interval(9, tokens=tokens)]))
    assert [(each.ep_size, each.name) for each in view.candidates[1:]] == others
    assert (placements(view) is None) == (not others)


def test_advice_is_judged_by_what_it_is_measured_by(tmp_path) -> None:
    """Sums over the window can hide that two experts take turns: heavy together in each half, even
    on the whole.
    """
    halves = ((range(5, 55, 5), [200, 0, 101, 102]), (range(55, 105, 5), [0, 197, 101, 102]))
    lines = [
        each for steps, tokens in halves for each in interval(*steps, layers=(1,), tokens=tokens)
    ]
    log = load_log(write(tmp_path, lines))
    total_E = log.tokens_TLE.sum(axis=0)[0]
    assert fullest(total_E, [0, 2, 1, 3], 2) < fullest(total_E, [0, 1, 2, 3], 2)
    assert advise(log, slice(0, None), 2).tolist() == [[0, 1, 2, 3]]


def test_advice_is_never_worse_and_moves_nothing_for_next_to_nothing(tmp_path) -> None:
    random = np.random.default_rng(0)
    for trial in range(8):
        lines = []
        for step in range(5, 105, 5):
            tokens = (
                random.pareto(1.2, 12) * 100 + 1 if trial % 2 else 1000 + random.integers(-3, 4, 12)
            )
            lines += [line(step, 1, bin_, [int(n) for n in tokens]) for bin_ in (0, 1)]
        log = load_log(write(tmp_path / str(trial), lines))
        for ep_size in (2, 3, 4, 6):
            order = advise(log, slice(0, None), ep_size)
            before, after = (
                unevenness(log.tokens_TLE, each, ep_size)[0] for each in (log.order_LE, order)
            )
            moved = (order != log.order_LE).any()
            assert after < 0.996 * before if moved else after == before
            assert moved == bool(trial % 2)  # loads that hardly differ are left alone


def test_placement_that_cannot_be_written_says_so(tmp_path) -> None:
    log = load_log(write(tmp_path, interval(5)))
    with pytest.raises(DataError, match="cannot be written"):
        write_placement(tmp_path / "nowhere" / "x.json", log, log.order_LE, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no placement"),
        ("[]", "is no placement"),
        ('{"format": 1}', "is no placement"),
        ('{"format": 7, "layers": {}}', "format=7"),
        ('{"format": 1, "layers": {"1": [0, 1, 2, 3]}}', "layer 3 is not in it"),
        (
            '{"format": 1, "layers": {"1": [0, 1, 2, 3], "3": [0, 1, 2, 3], "9": [0]}}',
            "layer 9 has no experts in this run",
        ),
        (
            '{"format": 1, "layers": {"1": [0, 1, 2, 3], "3": [0, 1, 1, 3]}}',
            "expected each of the experts 0 ... 3 once",
        ),
        (
            '{"format": 1, "layers": {"1": [0, 1, 2, 3], "3": ["0", "1", "2", "3"]}}',
            r"layers\.3",
        ),
        (
            '{"format": 1, "layers": {"1": [0, 1, 2, 3], "3": {"0": 1}}}',
            r"layers\.3",
        ),
    ],
)
def test_placement_file_that_does_not_fit_is_refused(tmp_path, text, message) -> None:
    path = tmp_path / "placement.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config("digits_promoe", [f"parallel.expert_placement={path}", "model.depth=4"])
