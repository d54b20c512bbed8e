"""What a user reads of an error: its length, its words, and no advice of a library."""

from __future__ import annotations

import ast
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from promoe_ds import errors
from promoe_ds.checkpoint.torch_file import load_torch
from promoe_ds.config import config_from_dict
from promoe_ds.errors import CheckpointError, PromoeError, cause_of

from .builders import small_values
from .config.said import refuses

PACKAGE = Path(__file__).parents[2] / "promoe_ds"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
OURS = {
    name
    for name, each in vars(errors).items()
    if isinstance(each, type) and issubclass(each, PromoeError)
} | {"LockedError"}
#: The function -> the place of the message among its arguments.
SPEAKERS = {**dict.fromkeys(OURS, 0), "require": 1, "explaining": 0}
#: One line for each host, or each problem of a recipe, put together elsewhere.
LISTS = {"launch/preflight.py", "config/section.py"}
LONGEST = 400
#: Words of another age or of no meaning here, with what to say (lower case, as whole words).
AVOID = ("goes on", "lies", "stands", "mend", "younger", "older", "told", "tell", "hold against")
#: What libraries raise: only `cause_of` says it, one line of it, without their advice.
OF_LIBRARIES = {
    "Exception",
    "RuntimeError",
    "ImportError",
    "BROKEN_INSTALLATION",
    "SafetensorError",
}


def template(node: ast.AST) -> str:
    """Return a message as it is written, «…» for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def called(node: ast.Call) -> str:
    """Return the last part of a call's name."""
    return ast.unparse(node.func).rpartition(".")[2]


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the template of every message that ends a command."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and called(node) in SPEAKERS:
                place = SPEAKERS[called(node)]
                if len(node.args) > place:
                    yield f"{name}:{node.lineno}", template(node.args[place])


def test_messages_are_found() -> None:
    assert len(list(messages())) > 450


def test_messages_are_one_short_line_in_plain_words() -> None:
    wrong = {
        place: text
        for place, text in messages()
        if place.partition(":")[0] not in LISTS
        and (
            len(text) > LONGEST
            or "\n" in text
            or any(f" {word} " in f" {text.lower()} " for word in AVOID)
        )
    }
    assert wrong == {}


def test_what_a_library_raises_is_said_by_its_cause_alone() -> None:
    wrong = []
    for name, path in FILES.items():
        for handler in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(handler, ast.ExceptHandler) and handler.name and handler.type):
                continue
            kinds = {each.id for each in ast.walk(handler.type) if isinstance(each, ast.Name)}
            raised = [node for node in ast.walk(handler) if isinstance(node, ast.Raise)]
            values = [
                each.value
                for node in raised
                for each in ast.walk(node)
                if isinstance(each, ast.FormattedValue)
            ]
            if kinds & OF_LIBRARIES and any(
                ast.unparse(value) in (handler.name, f"str({handler.name})") for value in values
            ):
                wrong.append(f"{name}:{handler.lineno}")
    assert wrong == []


@pytest.mark.parametrize(
    "pickled",
    [b"\x80\x02}q\x00.garbage", b"\x80\x02\xffgarbage", b"", b"\x80\x02cos\nsystem\n(S'x'\ntR."],
    ids=["short", "unknown code", "empty", "call"],
)
def test_damaged_torch_file_is_named_without_torch_s_advice(tmp_path, pickled) -> None:
    whole, path = io.BytesIO(), tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(2)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.namelist():
            content = source.read(record)
            target.writestr(record, pickled if record.endswith("data.pkl") else content)
    try:
        load_torch(path)
    except CheckpointError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
        assert "weights_only" not in str(error) and "torch.load" not in str(error)
    else:
        assert pickled.startswith(b"\x80\x02}q\x00.")  # what follows the end is never read


def test_cause_of_a_library_is_one_line_of_bounded_length() -> None:
    advice = (
        "Weights only load failed: set `weights_only=False`\n\tWeightsUnpickler error: no\nmore"
    )
    assert cause_of(RuntimeError(advice)) == "RuntimeError: no"
    assert cause_of(KeyError("config")) == "KeyError: 'config'"
    assert cause_of(ValueError()) == "ValueError"
    assert len(cause_of(ValueError("x" * 1000))) < 250


def test_recipe_with_many_mistakes_has_three_lines() -> None:
    values = small_values(train={"max_steps": "x", "seed": -1, "log_every": 0, "a": 1, "b": 2})
    with refuses("train.max_steps=x", "train.seed=-1", "train.b"):
        config_from_dict(values, source="recipe")
    try:
        config_from_dict(values, source="recipe")
    except PromoeError as error:
        assert len(str(error).splitlines()) == 3
