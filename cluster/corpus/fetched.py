"""A folder of plain aligned text that `baton fetch` writes: `train.en`, `train.fr`, and so on.

A record beside the text says what it was made from and the checksum of each file, so that a second
call finds it there and leaves it, and a half-written or changed folder is made again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.durable_files import file_sha256

LANGUAGES = ("en", "fr")

_RECORD = "fetched.json"

Pair = tuple[str, str]


def write_splits(
    directory: Path, origin: Mapping[str, Any], splits: Mapping[str, Sequence[Pair]]
) -> dict[str, int]:
    """Write the pairs of each split and, last, the record; return the pairs of each split."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _RECORD).unlink(missing_ok=True)
    checksums = {}
    for split, pairs in splits.items():
        for side, language in enumerate(LANGUAGES):
            data = "".join(pair[side] + "\n" for pair in pairs).encode("utf-8")
            name = f"{split}.{language}"
            (directory / name).write_bytes(data)
            checksums[name] = hashlib.sha256(data).hexdigest()
    counts = {split: len(pairs) for split, pairs in splits.items()}
    record = {"origin": dict(origin), "num_pairs": counts, "sha256": checksums}
    (directory / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return counts


def intact_splits(directory: Path, origin: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the pairs of each split if just this text lies there unchanged, else None."""
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        if record["origin"] != dict(origin):
            return None
        for name, sha256 in record["sha256"].items():
            if file_sha256(directory / name) != sha256:
                return None
        return {str(split): int(count) for split, count in record["num_pairs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # no record, or one that cannot be trusted: the text is made again
