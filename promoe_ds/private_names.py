"""How the files `*_private.py` reach the insides of a library, which can move with any release.

Each keeps a table `NAMES` of what it uses. A run under a library that has moved ends with the
library, its version and the name, and never computes in another way.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

from promoe_ds.errors import ConfigError


def moved(path: str, name: str) -> ConfigError:
    """Return the error that says what the library of a dotted path no longer has."""
    library = path.partition(".")[0].replace(
        "megatron", "megatron.core"
    )  # which alone has a version
    version = getattr(importlib.import_module(library), "__version__", "")
    return ConfigError(
        f"{library} {version} has no {name}, on which this package relies: install the versions of "
        "launch_scripts/constraints.txt"
    )


def read_private(owner: Any, name: str, *, library: str) -> Any:
    """Return an attribute of a library's object.

    Raises: ConfigError naming library, version and attribute.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise moved(library, f"{getattr(owner, '__name__', type(owner).__name__)}.{name}") from None


def find_private(module: str, name: str) -> Any:
    """Return what a module has under a name; a dot goes into a class.

    Raises: ConfigError naming library, version and module or attribute.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (
            error.name is None
            or not f"{module}.".startswith(f"{error.name}.")
            or "." not in error.name
        ):
            raise  # the library, or what it needs, is not installed
        raise moved(module, module) from None
    return reduce(
        lambda owner, part: read_private(owner, part, library=module), name.split("."), found
    )


def check_parameters(module: Any, names: Iterable[str], *, library: str) -> None:
    """Check that a library's module has parameters of these dotted names: `functional_call` would
    not miss one.

    Raises: ConfigError naming library, version and parameter.
    """
    own = {name for name, _ in module.named_parameters()}
    for name in names:
        if name not in own:
            raise moved(library, f"{type(module).__name__}.{name}")


def check_names(names: Mapping[str, tuple[str, ...]]) -> None:
    """Read every name of a table, module -> attributes.

    Raises: ConfigError naming library, version and attribute.
    """
    for module, attributes in names.items():
        for attribute in attributes:
            find_private(module, attribute)
