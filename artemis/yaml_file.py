"""YAML files in which no key is given twice: PyYAML takes the last, a whole section too."""

from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .errors import AdapterError

_MERGE = "tag:yaml.org,2002:merge"  # `<<`, which may be given several times


def read_yaml(path: str | PathLike) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        AdapterError: it is not UTF-8 text, not YAML, or gives a key of a mapping twice.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise AdapterError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


class _UniqueKeys(yaml.SafeLoader):
    """Looks at mappings as they are written, before `<<` adds to them what they may override."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise yaml.YAMLError(
                    f"line {line}: the key {key.value!r} is given a second time, after line"
                    f" {lines[name]}"
                )
            lines[name] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """PyYAML takes `2024-02-30` for a date, and is surprised that there is none."""
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: {node.value!r}: {error}") from None
