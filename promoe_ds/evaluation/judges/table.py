"""The table of judges, by the data set that they judge."""

from __future__ import annotations

from promoe_ds.errors import ConfigError
from promoe_ds.evaluation.judges.digits import DigitsJudge
from promoe_ds.evaluation.judges.emoji import EmojiJudge
from promoe_ds.evaluation.judges.judge import Figure, Judge

#: By `data.dataset`; samples of other data sets need a reference (`promoe_ds.cli.evaluate`).
JUDGES: dict[str, Judge] = {"digits": DigitsJudge(), "emoji": EmojiJudge()}


def judge_of(dataset: str) -> Judge:
    """Return a data set's judge.

    Raises: ConfigError if it has none.
    """
    if dataset not in JUDGES:
        raise ConfigError(f"--dataset {dataset}: has no judge: choose from {', '.join(JUDGES)}")
    return JUDGES[dataset]


def figures_of(dataset: str) -> tuple[Figure, ...]:
    """Return the figures of a data set's judge; none where it has no judge."""
    return JUDGES[dataset].figures if dataset in JUDGES else ()
