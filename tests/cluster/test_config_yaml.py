"""YAML's traps: nothing is read as something else than was written."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.strict_yaml import MAX_DEPTH, StrictYamlError, dump_yaml, parse_yaml

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ufeff"), max_size=30)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
DATA = st.recursive(
    SCALARS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("7", 7),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("Off", "Off"),
        ("y", "y"),
        ("010", "010"),
        ("0o10", "0o10"),
        ("0x10", "0x10"),
        ("0b1", "0b1"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2001-01-01", "2001-01-01"),
        ("=", "="),
        ("<<", "<<"),
        ("'7'", "7"),
        ("1.2.3", "1.2.3"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_scalar_is_what_was_written(text: str, value: object) -> None:
    found = parse_yaml(text).data
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a stands here and on line 1; keep one of them"),
        ("s:\n  a: 1\n  a: 1\n", 3, "s.a stands here and on line 2"),
        ("a: &x 1\nb: *x\n", 1, "anchor &x"),
        ("b: *x\n", 1, "alias *x"),
        ("a: !!python/object:os.system 1\n", 1, "tag"),
        ("a: !!binary aGk=\n", 1, "tag"),
        ("a: 1\n1: 2\n", 2, "key 1: keys are names"),
        ("true: 2\n", 1, "key true: keys are names"),
        ("? [a, b]\n: 1\n", 1, "keys are names"),
        ("[" * 100_000, 1, f"nested deeper than {MAX_DEPTH} levels"),
        ("- " * 50_000, 1, f"nested deeper than {MAX_DEPTH} levels"),
        ("a: " + "9" * 5000, 1, "is too long for a number"),
        ('a: "\\UFFFFFFFF"', 1, "escape"),
        ("a: b: c", 1, "not YAML"),
        ("a: @b", 1, "not YAML"),
    ],
)
def test_trap_is_refused_with_its_line(text: str, line: int, expected: str) -> None:
    with pytest.raises(StrictYamlError) as caught:
        parse_yaml(text)
    ((found_line, problem),) = caught.value.problems
    assert found_line == line
    assert expected in problem
    assert "\n" not in problem


def test_alias_bomb_does_not_go_off() -> None:
    rows = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    rows += [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(StrictYamlError, match="anchor &a"):
        parse_yaml("\n".join(rows))


def test_all_duplicates_are_told() -> None:
    with pytest.raises(StrictYamlError) as caught:
        parse_yaml("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert [line for line, _ in caught.value.problems] == [2, 3]


def test_lines_of_keys_are_kept() -> None:
    lines = parse_yaml("a: 1\nb:\n  c: 2\n  d: [x,\n    y]\n").lines
    assert (lines["a",], lines["b", "c"], lines["b", "d"], lines["b", "d", 1]) == (1, 3, 4, 5)


@given(DATA)
def test_what_is_dumped_is_read_back(data: Any) -> None:
    assert parse_yaml(dump_yaml(data)).data == data
