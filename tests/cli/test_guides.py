"""The commands of the README and of the site's guides, read out of the pages and run in their
order.

Before training a tiny network takes the place of the recipe's sizes; a launcher's ranks become one.
A comment before a block says what else is replaced, or why it is not run:

    <!-- run: promoe_xl -> digits_promoe; --num 50000 -> --num 4 -->
    <!-- not run: needs hosts -->
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from ..processes import REPOSITORY
from ..unit.data.made import save_images, save_vae
from ..unit.evaluation.made import TinyNetwork
from .commands import TINY, run, succeed, train
from .test_imagenet_pipeline import RECIPE

PAGES = [
    "README.md",
    "docs/start.md",
    *(
        path.relative_to(REPOSITORY).as_posix()
        for path in sorted((REPOSITORY / "docs/guides").glob("*.md"))
    ),
]
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>(?:not )?run): (?P<words>[^\n]*) -->\n)?"
    r"^```(?P<kind>bash|python)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
#: What a launcher's command line has before the module or script that it starts.
_LAUNCHER = re.compile(r"^(?:deepspeed|torchrun)\s.*?(?:--module |-m |(?=tools/))")
_SIZES = {"promoe": "digits_promoe", "dit": "digits_dit"}


class Block(NamedTuple):
    """A fenced block: its commands, and what its comment says."""

    mark: str | None
    words: str
    kind: str
    code: str


def blocks_of(page: str) -> list[Block]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [Block(*match.group("mark", "words", "kind", "code")) for match in _BLOCK.finditer(text)]


def commands_of(block: Block) -> list[list[str]]:
    """Return the block's commands as a small machine can run them."""
    code = block.code.replace("\\\n", " ")
    if block.mark == "run":
        for change in block.words.split(";"):
            old, new = (part.strip() for part in change.split("->"))
            assert old in code, f"the comment replaces {old!r}, which is not there"
            code = code.replace(old, new)
    if block.kind == "python":
        return [[sys.executable, "-c", code]]
    return [_command(line) for line in code.splitlines() if line.split("#")[0].strip()]


def _command(line: str) -> list[str]:
    launched = _LAUNCHER.match(line)
    if launched is not None:
        rest = line[launched.end() :]
        line = f"python {rest}" if rest.startswith("tools/") else f"python -m {rest}"
    if not line.startswith("python "):
        return ["bash", "-c", line]
    words = [sys.executable, *shlex.split(line, comments=True)[1:]]
    if "promoe_ds.cli.train" in words and "--dry-run" not in words:
        words = [_SIZES.get(re.sub(r"_(s|b|l|xl)$", "", word), word) for word in words]
        words = [word.replace("zero2_bf16", "zero2_fp32") for word in words]
        words += ["--set", *TINY, "parallel.ep_size=1"]
    elif "--recipe" in words and words[1].endswith(("convert_checkpoint.py", "upcycle.py")):
        words += ["--set", *(setting for setting in TINY if setting.startswith("model."))]
    return words


@pytest.fixture
def checkout(trained: Path, tmp_path: Path) -> Path:
    """Return a folder like the repository's, with a run and its export, images and an
    autoencoder.
    """
    for name in ("tools", "ds_configs", "launch_scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for source, copy in (("run", "runs/a"), ("other", "runs/b"), ("export", "exports/a")):
        shutil.copytree(trained / source, tmp_path / copy)
    save_images(tmp_path / "imagenet/train", per_class=8)
    save_images(tmp_path / "imagenet/val", per_class=4)
    save_vae(tmp_path / "vae")
    torch.jit.script(TinyNetwork()).save(str(tmp_path / "net.pt"))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page: str, checkout: Path) -> None:
    if "runs/dit" in (REPOSITORY / page).read_text(encoding="utf-8"):
        succeed(train(cwd=checkout, run_dir="runs/dit", recipe="digits_dit"))
    for block in blocks_of(page):
        if block.mark == "not run":
            assert block.words
            continue
        for command in commands_of(block):
            succeed(run(*command, cwd=checkout))
