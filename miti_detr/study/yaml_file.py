"""YAML files that are read as data."""

from pathlib import Path
from typing import Any

import yaml


def load_yaml(path: Path) -> Any:
    """Read a YAML file as data: no tag in it builds a Python object, and no key comes twice.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not YAML, or not plain data.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable YAML file: {reason}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping after a look at its keys."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.YAMLError(f"the key {key.value!r} is given twice{key.start_mark}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)
