"""From a configuration file and overrides to a validated object, or to lines that say what to mend.

Every problem that can be found is reported at once, each as one line: the file and line (or the
override), the key, its value, what it must be. Independent of which settings there are: the
schema is whatever pydantic model is given.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config.strict_yaml import MAX_BYTES, Document, KeyPath, StrictYamlError, parse_yaml
from model.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(UserError):
    """A configuration cannot be used; each argument is one problem, and prints as one line."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


def load_validated(schema: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read a YAML file, apply `section.key=value` overrides in their order, and validate.

    Raises ConfigError with all problems of the file, the overrides and their values.
    """
    document = _read(path)
    fields = document.data
    where = {key: f"{path}:{line}: " for key, line in document.lines.items()}
    problems: list[str] = []
    for override in overrides:
        try:
            key, value = _parse_override(schema, override)
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        _set(fields, key, value)
        where = {k: v for k, v in where.items() if k[: len(key)] != key}
        where[key] = f"override {_shown(override)}: "
    try:
        validated = validate(schema, fields, origin=str(path), where=where)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    if problems:
        raise ConfigError(*problems)
    return validated


def validate(
    schema: type[Model],
    fields: Mapping[str, Any],
    *,
    origin: str,
    where: Mapping[KeyPath, str] | None = None,
) -> Model:
    """Check fields against a schema; `where` says for key paths in which line they were written.

    Raises ConfigError with one line for each thing that is wrong.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        places = {(): f"{origin}: ", **{k: v for k, v in (where or {}).items() if k}}
        raise ConfigError(*_render(schema, error, places)) from None


def _read(path: Path) -> Document:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes; a configuration has at most {MAX_BYTES}")
    try:
        document = parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None
    except StrictYamlError as error:
        raise ConfigError(*(f"{path}:{line}: {text}" for line, text in error.problems)) from None
    if not isinstance(document.data, dict):
        found = "nothing" if document.data is None else _shown(document.data)
        raise ConfigError(f"{path}: holds {found}; a configuration is a mapping of sections")
    return document


def _parse_override(schema: type[BaseModel], override: str) -> tuple[KeyPath, Any]:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(
            f"override {_shown(override)}: is not of the form section.key=value, "
            "for example training.batch_size=64"
        )
    key = tuple(dotted.split("."))
    for length in range(1, len(key) + 1):
        section = _section(schema, key[: length - 1])
        if section is None or key[length - 1] not in section.model_fields:
            unknown, hint = ".".join(key[:length]), _suggestion(schema, key[:length])
            raise ConfigError(f"override {_shown(override)}: unknown key {unknown}{hint}")
    try:
        return key, parse_yaml(text).data
    except StrictYamlError as error:
        problems = (f"override {_shown(override)}: {problem}" for _, problem in error.problems)
        raise ConfigError(*problems) from None


def _set(fields: dict[str, Any], key: KeyPath, value: object) -> None:
    for part in key[:-1]:
        inner = fields.get(str(part))
        if not isinstance(inner, dict):
            inner = fields[str(part)] = {}
        fields = inner
    fields[str(key[-1])] = value


def _section(schema: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """Find the model that describes the section at a key path; None where there is no section."""
    for part in path:
        field = schema.model_fields.get(str(part))
        if field is None:
            return None
        options = [field.annotation, *get_args(field.annotation)]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            return None
        schema = models[0]
    return schema


def _all_keys(schema: type[BaseModel], path: KeyPath = ()) -> Iterator[KeyPath]:
    section = _section(schema, path)
    if section is None:
        return
    for name in section.model_fields:
        yield (*path, name)
        yield from _all_keys(schema, (*path, name))


def _suggestion(schema: type[BaseModel], unknown: KeyPath) -> str:
    """Give the tail of a message on an unknown key: what may have been meant."""
    parent, name = unknown[:-1], str(unknown[-1])
    section = _section(schema, parent)
    if section is None:
        return f"; {'.'.join(map(str, parent))} has no keys under it"
    siblings = list(section.model_fields)
    elsewhere = {str(key[-1]): ".".join(map(str, key)) for key in _all_keys(schema)}
    dotted_parent = "".join(f"{part}." for part in parent)
    if name in elsewhere:
        return f"; did you mean {elsewhere[name]}?"
    if close := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean {dotted_parent}{close[0]}?"
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.8):
        return f"; did you mean {elsewhere[close[0]]}?"
    return f"; known keys here: {', '.join(siblings)}"


_EXPECTED = {
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "finite_number": "it must be a finite number",
    "bool_type": "it must be true or false",
    "string_type": "it must be text; put it in quotes",
    "string_too_short": "it must not be empty",
    "string_too_long": "it must have at most {max_length} characters",
    "tuple_type": "it must be a list",
    "path_type": "it must be a path; put it in quotes",
    "too_short": "it must have at least one entry",
    "greater_than": "it must be greater than {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be less than {lt}",
    "less_than_equal": "it must be at most {le}",
    "literal_error": "it must be one of {expected}",
    "model_type": "it must be a section of `key: value` lines",
    "string_pattern_mismatch": "it must match {pattern}",
}


def _render(
    schema: type[BaseModel], error: ValidationError, places: Mapping[KeyPath, str]
) -> Iterator[str]:
    for detail in error.errors():
        path = detail["loc"]
        place = next(places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places)
        for text in _problem(schema, detail):
            yield place + text


def _problem(schema: type[BaseModel], detail: ErrorDetails) -> Iterator[str]:
    path, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    dotted = ".".join(map(str, path))
    if kind == "extra_forbidden":
        yield f"unknown key {dotted}{_suggestion(schema, path)}"
    elif kind == "missing":
        yield f"{dotted} is missing; add it ({_description(schema, path)})"
    elif kind == "value_error":
        yield from (f"{dotted} {text}".lstrip() for text in context["error"].args)
    else:
        expected = _EXPECTED.get(kind, detail["msg"]).format_map(context)
        if description := _description(schema, path):
            expected = f"{expected} ({description})"
        yield f"{dotted} is {_shown(detail['input'])}; {expected}"


def _description(schema: type[BaseModel], path: KeyPath) -> str:
    section = _section(schema, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section and path else None
    return (field.description or "") if field else ""


def _shown(value: object) -> str:
    """Word a value of the file shortly, in YAML's terms."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
