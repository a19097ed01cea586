"""YAML without its traps: what is read is what was written, or an error with its line.

PyYAML follows YAML 1.1, where `no` is false, `010` is eight, `1:30` is ninety, `1e-3` is text, the
last of two equal keys wins, and a few hundred bytes of aliases expand to gigabytes. Here plain
scalars follow the JSON schema of YAML 1.2 and everything ambiguous stays text, so that the type
check of the configuration refuses it; anchors, aliases, tags and duplicate keys are refused.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_DEPTH = 16
MAX_BYTES = 256_000

KeyPath = tuple[str | int, ...]


class StrictYamlError(ValueError):
    """The text is not acceptable YAML; `problems` holds (line from 1, what is wrong) pairs."""

    def __init__(self, problems: list[tuple[int, str]]) -> None:
        super().__init__(problems)
        self.problems = problems


@dataclass(frozen=True)
class Document:
    """The data of one YAML document, and the line (from 1) on which each key stands."""

    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)


_RESOLVERS = (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Composes one document and collects what the strict rules refuse."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.problems: list[tuple[int, str]] = []
        self.lines: dict[KeyPath, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if refusal := self._refusal(event):
            raise StrictYamlError([(event.start_mark.line + 1, refusal)])
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refusal(self, event: yaml.Event) -> str | None:
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            return f"alias *{anchor}: write the value out, or quote a text that has a *"
        if anchor is not None:
            return f"anchor &{anchor}: remove it, or quote a text that has an &"
        if tag is not None:
            return f"tag {tag}: remove it, or quote a text that has a !"
        if self.depth >= MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH} levels"
        return None

    def plain(self, node: yaml.Node, path: KeyPath) -> object:
        """Turn a composed node into Python's types, keeping the lines of its keys."""
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        first_lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
                text = key if isinstance(key, str) else "that is a list or a mapping"
                self.problems.append((line, f"key {text}: keys are names; quote it if it is one"))
                continue
            dotted = ".".join(map(str, (*path, key)))
            if key in first_lines:
                self.problems.append(
                    (line, f"{dotted} stands here and on line {first_lines[key]}; keep one of them")
                )
                continue
            first_lines[key] = line
            self.lines[(*path, key)] = line
            fields[key] = self.plain(value_node, (*path, key))
        return fields

    def _scalar(self, node: yaml.Node) -> object:
        try:
            return self.construct_object(node)
        except ValueError:  # Python refuses to read an integer of thousands of digits
            line = node.start_mark.line + 1
            self.problems.append((line, f"{node.value[:20]}... is too long for a number"))
            return None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_Loader` would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape what PyYAML would fold at, such as U+0085 and U+2028."""
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def parse_yaml(text: str) -> Document:
    """Read one document; an empty text gives None.

    Raises StrictYamlError on bad syntax and on the refused constructs.
    """
    if len(text) > MAX_BYTES:
        raise StrictYamlError([(1, f"{len(text)} characters; at most {MAX_BYTES} are read")])
    try:
        return _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, (error.context, error.problem)))
        line, remedy = (mark.line + 1 if mark else 1), "quote text that has special characters"
        raise StrictYamlError([(line, f"not YAML: {reason}; {remedy}")]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"character U+{error.character:04X} is not allowed in YAML; remove it"
        raise StrictYamlError([(line, reason)]) from None
    except StrictYamlError:
        raise
    except (ValueError, OverflowError):  # of chr(), from an escape beyond Unicode
        raise StrictYamlError([(1, "an escape \\U names no character; remove it")]) from None


def _parse(text: str) -> Document:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        data = None if node is None else loader.plain(node, ())
    finally:
        loader.dispose()
    if loader.problems:
        raise StrictYamlError(loader.problems)
    return Document(data, loader.lines)


def dump_yaml(data: object) -> str:
    """Write data so that `parse_yaml` gives it back, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
