"""The task with exactly known answers: numbers in English words to numbers in French words.

Cardinals by `num2words`, hyphens and commas taken out so that the words are few. A model that has
learnt the rule translates numbers it never saw, and whether it has is not a matter of taste.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

from cluster.corpus.fetched import Pair, intact_splits, write_splits
from model.errors import UserError

MAX_NUMBERS = 200_000  # up to here, the words of both languages have been checked and are unique

_HELD_OUT_PER_THOUSAND = 25  # of the numbers, for valid, and as many for test
_REPORT_EVERY = 1000


class NumbersError(UserError):
    """The number corpus cannot be made."""


def fetch_numbers(
    directory: Path,
    *,
    limit: int = 20_000,
    progress: Callable[[str, int, int | None], None] = lambda phase, done, total: None,
) -> dict[str, int]:
    """Write the numbers below `limit` as train, valid and test; return the pairs of each.

    Which split a number is in follows from a hash of it alone. A folder that holds them already is
    left as it is. Raises NumbersError for a bad limit or when `num2words` is not installed.
    """
    if not 1000 <= limit <= MAX_NUMBERS:
        raise NumbersError(f"limit is {limit}; it must be from 1000 to {MAX_NUMBERS} numbers")
    origin = {"corpus": "numbers", "limit": limit}
    present = intact_splits(directory, origin)
    if present is not None:
        return present
    splits: dict[str, list[Pair]] = {"train": [], "valid": [], "test": []}
    for number in range(limit):
        splits[split_of(number)].append(spell(number))
        if (number + 1) % _REPORT_EVERY == 0:
            progress("spelling numbers", number + 1, limit)
    return write_splits(directory, origin, splits)


def spell(number: int) -> Pair:
    """Return a number in English and in French words, separated by single spaces."""
    try:
        from num2words import num2words
    except ImportError:
        raise NumbersError(
            "the package num2words is not installed; run `pip install num2words`"
        ) from None
    english, french = (
        " ".join(num2words(number, lang=language).replace("-", " ").replace(",", "").split())
        for language in ("en", "fr")
    )
    return english, french


def split_of(number: int) -> str:
    """Return the split that a number belongs to, the same on every machine."""
    place = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:8]) % 1000
    if place < _HELD_OUT_PER_THOUSAND:
        return "test"
    return "valid" if place < 2 * _HELD_OUT_PER_THOUSAND else "train"
