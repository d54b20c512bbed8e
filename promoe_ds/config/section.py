"""What all sections of a run share."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from promoe_ds.errors import ConfigError

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _read_switch(value: Any) -> Any:
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


#: On, off, or by what fits.
Switch = Annotated[Literal["auto", True, False], BeforeValidator(_read_switch)]


class Section(BaseModel):
    """Base of all sections: frozen, keyword-only, no unknown keys. Text is read by a field's type,
    as YAML writes it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        takes_true = annotation is bool or True in typing.get_args(annotation)
        if not takes_true and any(
            isinstance(each, bool) for each in (value if isinstance(value, list) else [value])
        ):
            raise ValueError("true and false have no meaning here")
        return value

    def refuse_set(self, *fields: str, use: str) -> None:
        """Raise ValueError for a field that is not at its default although nothing reads it; `use`
        says where.

        A saved config states every field and must be read again, so defaults pass.
        """
        for field in fields:
            if (value := getattr(self, field)) != type(self).model_fields[field].default:
                raise ValueError(f"{field}={value} has no use for {use}: leave it out")


def explain(
    error: ValidationError, source: str, describe: Callable[[Mapping[str, Any]], str]
) -> ConfigError:
    """Return what is wrong with a file's values as one error: one line for one problem, else a line
    for each.
    """
    lines = [describe(problem) for problem in error.errors()]
    if len(lines) == 1:
        return ConfigError(f"{source}: {lines[0]}")
    return ConfigError(
        "\n".join([f"{source} does not describe a run:", *(f"  {line}" for line in lines)])
    )


def name_and_message(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Return the dotted name of a problem's field and pydantic's message as the end of a
    sentence.
    """
    message = problem["msg"].removeprefix("Value error, ")
    return ".".join(str(part) for part in problem["loc"]), f"{message[0].lower()}{message[1:]}"
