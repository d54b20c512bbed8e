"""What the commands' options share: how a parser looks, rules over several options, options of
several commands, and types that check their values.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from promoe_ds.config.model import read_size
from promoe_ds.config.section import name_and_message


class Parser(argparse.ArgumentParser):
    """A parser whose help is a command's docstring as it is written."""

    def __init__(self, description: str | None, prog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
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
        """Add --set."""
        self.add_argument(
            "--set",
            dest="overrides",
            nargs="+",
            action="extend",
            default=[],
            metavar="SECTION.FIELD=VALUE",
            help=text,
        )

    def add_run(self, deepspeed_config: Path | None = None) -> None:
        """Add --recipe, --set and --deepspeed_config, which must be given if it has no default."""
        self.add_argument(
            "--recipe", required=True, help="name of a packaged recipe, or path of a .yaml file"
        )
        self.add_overrides()
        self.add_deepspeed_config(deepspeed_config)

    def add_deepspeed_config(self, default: Path | None) -> None:
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


def sizes(text: str) -> tuple[int | tuple[int, int], ...]:
    """Read comma-separated sizes."""
    return tuple(map(size, text.split(",")))


def numbers(text: str) -> tuple[float, ...]:
    """Read comma-separated numbers."""
    return tuple(map(number(float), text.split(",")))


def integers(text: str) -> tuple[int, ...]:
    """Read comma-separated integers."""
    return tuple(map(number(), text.split(",")))
