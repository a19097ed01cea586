"""The reference of all settings as Markdown, from the schema itself; `baton config reference`."""

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.config.root import Config

_NAMES = {
    int: "whole number",
    float: "number",
    bool: "`true`, `false`",
    str: "text",
    Path: "path",
}
_INTRODUCTION = """\
# Configuration

<!-- Written by `baton config reference > docs/configuration.md`; do not edit by hand. -->

One YAML file describes a run. Every key is listed here with its type, its default and its meaning;
a key without a default must be given. `baton config show FILE` checks a file and prints it with all
defaults filled in. `section.key=value` behind a command's file replaces a value. Unknown keys,
wrong types, numbers out of range and layouts that cannot work are refused, each with one line that
says where it stands and what to do. Paths are relative to the folder in which the command runs.

YAML is read strictly: `true` and `false` are the only booleans, `1e-3` is a number, duplicate keys,
anchors, aliases and tags are refused.
"""


def reference() -> str:
    """Return a Markdown page with a table of keys for every section."""
    return "\n".join([_INTRODUCTION, *_section(Config, "")]).rstrip() + "\n"


def _section(schema: type[BaseModel], prefix: str, alike: Sequence[str] = ()) -> Iterator[str]:
    title = f"`{prefix[:-1]}`" if prefix else "The root"
    yield f"## {title}\n"
    yield f"{_cell((schema.__doc__ or '').splitlines()[0])}\n"
    if alike:
        yield f"The same keys stand under {' and '.join(f'`{key}`' for key in alike)}.\n"
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    inner: dict[type[BaseModel], list[str]] = {}
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        section = _model_of(field)
        kind = "section" if section else _kind(field)
        meaning = _cell(field.description or "")
        yield f"| `{key}` | {kind} | {_default(field)} | {meaning} |"
        if section is not None:
            inner.setdefault(section, []).append(key)
    yield ""
    for section, (first, *others) in inner.items():
        yield from _section(section, f"{first}.", others)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    options = [field.annotation, *get_args(field.annotation)]
    models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return models[0] if models else None


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "its defaults"
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None:
        return "`null`"
    text = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
    return f"`{text}`"


def _kind(field: FieldInfo) -> str:
    bounds = _bounds(field.metadata)
    return _words(field.annotation, bounds)


def _words(annotation: Any, bounds: str) -> str:  # noqa: ANN401 - an annotation may be anything
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(arguments[0], bounds or _bounds(arguments[1:]))
    if origin in (Union, types.UnionType):
        words = [_words(option, bounds) for option in arguments if option is not types.NoneType]
        return " or ".join([*words, *(["`null`"] if types.NoneType in arguments else [])])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return "text or list of texts"
    return _NAMES[annotation] + bounds


def _bounds(metadata: Any) -> str:  # noqa: ANN401 - pydantic's metadata has no common type
    found: dict[str, Any] = {}
    for item in metadata:
        for part in (item, *getattr(item, "metadata", ())):
            for name in ("ge", "gt", "le", "lt"):
                value = getattr(part, name, None)
                if value is not None:
                    found.setdefault(name, value)
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    if "ge" in found and "le" in found:
        return f", {found['ge']:,} to {found['le']:,}"
    listed = [f"{words[name]} {_number(value)}" for name, value in found.items()]
    return ", " + ", ".join(listed) if listed else ""


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:,}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
