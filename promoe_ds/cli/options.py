"""What the commands' options share: how a parser looks, rules over several options, options of
several commands, and types that check their values.
"""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from promoe_ds.config.extensions import import_extension
from promoe_ds.config.model import read_size
from promoe_ds.config.section import name_and_message
from promoe_ds.errors import ConfigError
from promoe_ds.files import json_text
from promoe_ds.logs import get_logger

#: The page of the documentation that each command's help names.
PAGES = {
    "promoe-train": "docs/reference/recipes.md",
    "promoe-launch": "docs/guides/multinode.md",
    "promoe-sample": "docs/guides/evaluate.md",
    "promoe-evaluate": "docs/guides/evaluate.md",
    "promoe-evaluate-digits": "docs/guides/evaluate.md",
    "promoe-convert": "docs/guides/convert.md",
    "promoe-upcycle": "docs/guides/finetune.md",
    "promoe-encode": "docs/guides/imagenet.md",
    "promoe-encode-text": "docs/guides/text.md",
    "promoe-plan": "docs/guides/planning.md",
    "promoe-compare": "docs/guides/evaluate.md",
    "promoe-load": "docs/guides/profiling.md",
    "promoe-experts": "docs/guides/profiling.md",
}


class _Help(argparse.HelpFormatter):
    """Examples as they are written, options in few lines, and only what must be given in the
    usage.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        """Add the usage line."""
        needed = [each for each in actions if each.required and each.option_strings]
        words = [f"{each.option_strings[0]} {each.metavar or each.dest.upper()}" for each in needed]
        others = [str(each.metavar or each.dest) for each in actions if not each.option_strings]
        line = ["%(prog)s", *words, "[options]", *others]
        super().add_usage(" ".join(line), actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith(" ") else fill(part, width, break_on_hyphens=False)
            for part in text.strip().split("\n\n")
        )


class AtOnce(argparse.Action):
    """Does something with each value as soon as it is read, and keeps the values.

    A `type` that raises would be reported as a value of the wrong type.
    """

    def __init__(self, *, do: Callable[[str], object], **options: Any) -> None:
        super().__init__(default=[], **options)
        self._do = do

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        """Do it."""
        self._do(values)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


class Parser(argparse.ArgumentParser):
    """A parser whose help is a command's docstring, with its examples, and the page about it.

    prog: the command's name, of PAGES.
    """

    def __init__(self, description: str | None, prog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"More: {PAGES[prog]}",
            formatter_class=_Help,
        )

    def require(self, holds: object, problem: str) -> None:
        """End with a problem of the command line unless something holds."""
        if not holds:
            self.error(problem)

    def without_effect(self, options: argparse.Namespace, *names: str, reason: str) -> None:
        """End if one of these options is given, which have no effect for a reason."""
        for name in names:
            self.require(
                getattr(options, name) == self.get_default(name),
                f"--{name.replace('_', '-')} has no effect {reason}: leave it out",
            )

    def add_overrides(self, text: str = "override the recipe, e.g. train.max_steps=100") -> None:
        """Add --set, and --import for what it may name."""
        self.add_argument(
            "--set",
            dest="overrides",
            nargs="+",
            action="extend",
            default=[],
            metavar="FIELD=VALUE",
            help=text,
        )
        self.add_import()

    def add_import(self) -> None:
        """Add --import."""
        self.add_argument(
            "--import",
            dest="imports",
            action=AtOnce,
            do=import_extension,  # options behind it may name what the file registers
            metavar="FILE",
            help="Python file or module with a router or data set of your own; may be repeated",
        )

    def add_run(self, deepspeed_config: Path | None = None) -> None:
        """Add --recipe, --set and --deepspeed_config, which must be given if it has no default."""
        self.add_argument(
            "--recipe", required=True, help="name of a packaged recipe, or path of a .yaml file"
        )
        self.add_overrides()
        self.add_deepspeed_config(deepspeed_config)

    def add_deepspeed_config(self, default: str | Path | None) -> None:
        """Add --deepspeed_config, in both spellings."""
        self.add_argument(
            "--deepspeed_config",
            "--deepspeed-config",
            required=default is None,
            default=default and str(default),
            metavar="FILE",
            help="DeepSpeed JSON, e.g. ds_configs/zero2_bf16.json",
        )

    def add_process(self) -> None:
        """Add the device of this process, and what the deepspeed launcher passes to each."""
        self.add_argument("--device", help="this process's GPU where there is one, else cpu")
        self.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


def number(kind: type = int, **bounds: Any) -> Callable[[str], Any]:
    """Return a type of option: a number within bounds, which have pydantic's names."""
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[kind, Field(**bounds)])  # type: ignore[arg-type]

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            _, message = name_and_message(error.errors()[0])
            raise argparse.ArgumentTypeError(f"{text}: {message}") from None

    return read


def size(text: str) -> int | tuple[int, int]:
    """Read the side of a square, or HxW."""
    try:
        return read_size(given if len(given := text.split("x")) > 1 else text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text}: expected a side or HxW, e.g. 256 or 224x288"
        ) from None


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a type of option: comma-separated values of a kind."""
    return lambda text: tuple(map(kind, text.split(",")))


def check_target(path: Path, flag: str) -> None:
    """Check that a file can be written.

    Raises: ConfigError if not.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} {path}: there is no folder {path.parent}: make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: is not writable: choose another place")


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write what --out asks for as JSON, and say so.

    Raises: ConfigError if it cannot be written.
    """
    try:
        path.write_text(json_text(figures, indent=1), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: {error}") from None
    get_logger("cli").info("wrote %s", path)
