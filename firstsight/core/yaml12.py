"""YAML 1.2 by PyYAML, whose own loaders and dumpers follow YAML 1.1.

DVC reads params.yaml by YAML 1.2, in which `1e-4` is a number, `yes` is text and `010` is ten. What a value means here
is what it means to DVC's reader (ruamel.yaml), underscores between digits, timestamps and merge keys included.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from firstsight.core.errors import UserError

# Tag, pattern and first characters of each kind of plain scalar that is not text, in the order in which they are tried.
_PLAIN_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (
        "float",
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9_]+(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("int", r"[-+]?0b[01_]+|[-+]?0o[0-7_]+|[-+]?[0-9_]+|[-+]?0x[0-9a-fA-F_]+", "-+0123456789"),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    (
        "timestamp",
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
        r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]*)?"
        r"(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?",
        "0123456789",
    ),
    ("value", r"=", "="),  # which no constructor takes
)


class _Loader(yaml.SafeLoader):
    """Read YAML 1.2 into plain Python values, and refuse a mapping that has a key twice."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012, PyYAML's way to begin without those of YAML 1.1

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        mapping = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(
                        "while reading a mapping",
                        mapping.start_mark,
                        f"found the key {key.value} twice",
                        key.start_mark,
                    )
                seen.add((key.tag, key.value))
        return mapping

    def _integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        bases = {"0b": 2, "0o": 8, "0x": 16}
        return int(text, bases.get(text.lstrip("-+")[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Write values so that a reader of YAML 1.2 reads them back: text that looks like a number there is quoted."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012


for _tag, _pattern, _first in _PLAIN_SCALARS:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader._integer)


def load(path: Path) -> Any:
    """Return the values in the YAML file `path`; None for an empty one.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it cannot be read, is not one document of YAML 1.2, or has a key twice in a mapping.
    """
    try:
        with path.open("rb") as file:
            return yaml.load(file, _Loader)
    except FileNotFoundError:
        raise
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML, found {' '.join(str(error).split())[:200]}; correct it") from None


def dump(values: Any) -> str:
    """Return `values` as YAML 1.2 in block style, mappings in their own order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
