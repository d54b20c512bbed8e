"""YAML whose plain values stay text: what `010`, `1e-4`, `on` or `2024-01-01` means is for the type
of its field to say.
"""

from __future__ import annotations

from typing import Any

import yaml

from promoe_ds.errors import ConfigError


class _TextLoader(yaml.SafeLoader):
    """Recognises null and merge keys alone, and refuses a key that is given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> Any:
    """Return what a YAML document holds: mappings, lists, None and text.

    Raises: ConfigError naming the source and the line.
    """
    try:
        return yaml.load(text, _TextLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
