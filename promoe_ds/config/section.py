"""What all sections of a run share: their base, how YAML is read for them, how mistakes are
reported.
"""

import difflib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from promoe_ds.errors import ConfigError, first_few

#: In place of pydantic's words, which are about Python.
_MESSAGES = {"missing": "must be set", "model_type": "must be a mapping of fields"}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _read_switch(value: Any) -> Any:
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


#: On, off, or by what fits.
Switch = Annotated[Literal["auto", True, False], BeforeValidator(_read_switch)]


@dataclass(frozen=True)
class NameIn:
    """Of a text field, by `Annotated`: it names an entry of a table, to which a file that --import
    names may have added.
    """

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Check the name when a value is read."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Return the names that there are."""
        return {"enum": list(self.table), "type": "string"}

    def _check(self, name: str) -> str:
        hint = suggest(name, self.table, "one of your own comes from a file, named by --import")
        require(name in self.table, f"is none of {', '.join(self.table)}; {hint}")
        return name


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

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Raise ValueError for fields that contradict each other."""

    def refuse_set(self, *fields: str, use: str, section: str = "") -> None:
        """Raise ValueError for a field that is not at its default although nothing reads it.

        A saved config states every field and must be read again, so defaults pass.
        Args:
            use: what has no use for it.
            section: of the fields, "data." for instance, where another section asks.
        """
        for field in fields:
            if (value := getattr(self, field)) != type(self).model_fields[field].default:
                raise ValueError(f"{section}{field}={value} has no use for {use}: leave it out")


def require(holds: bool, problem: str, error: type[Exception] = ValueError) -> None:
    """Raise an error that states a problem, unless what is required holds."""
    if not holds:
        raise error(problem)


def explain(
    error: ValidationError,
    source: str,
    unknown: Callable[[str], str],
    show: Callable[[Any], str] = str,
) -> ConfigError:
    """Return what is wrong with a file's values as one error.

    Args:
        unknown: what to say about a name that is no field.
        show: how values are written.
    """
    lines = []
    for problem in error.errors():
        name, message = name_and_message(problem)
        if problem["type"] == "extra_forbidden":
            lines.append(unknown(name))
        elif problem["type"] == "missing" or isinstance(problem["input"], Mapping):
            lines.append(f"{name}: {message}" if name else message)
        else:
            lines.append(f"{name}={show(problem['input'])}: {message}")
    if len(lines) == 1:
        return ConfigError(f"{source}: {lines[0]}")
    # Three lines at most, whatever is wrong.
    listed = [f"{source} does not describe a run:", lines[0], first_few(lines[1:])]
    return ConfigError("\n  ".join(listed))


def name_and_message(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Return the dotted name of a problem's field and pydantic's message as the end of a
    sentence.
    """
    message = _MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return ".".join(str(part) for part in problem["loc"]), f"{message[0].lower()}{message[1:]}"


def suggest(name: str, names: Iterable[str], otherwise: str) -> str:
    """Return which of some names a mistyped one is likely to mean, or something else to say."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


class _TextLoader(yaml.SafeLoader):
    """Leaves plain values as text, but for null and merge keys: what `010`, `1e-4`, `on` or
    `2024-01-01` means is for the type of its field to say. Refuses a key that is given twice.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for place, (key, _) in enumerate(node.value):
            if any(key.value == earlier.value for earlier, _ in node.value[:place]):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes, source: str) -> Any:
    """Return what a YAML document holds: mappings, lists, None and text.

    Raises: ConfigError naming the source and the line.
    """
    try:
        return yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
