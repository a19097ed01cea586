"""Small corpora for the tests of text and data: files of sentences and their configuration."""

import random
from pathlib import Path
from typing import Any

from cluster.config.corpus import CorpusConfig

WORDS = ("red", "dog", "sees", "house", "été", "old", "king", "a", "the", "small", "bird", "sings")


def sentences(num_pairs: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return pairs of 1 to 12 words, all different, whose target is the source in capitals."""
    draw = random.Random(seed)
    sources = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(num_pairs)]
    return [(f"{source} {at}", f"{source} {at}".upper()) for at, source in enumerate(sources)]


def write_text(folder: Path, name: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Write two aligned files and return the section of the configuration that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {side: folder / f"{name}.{side}" for side in ("source", "target")}
    for number, path in enumerate(paths.values()):
        path.write_bytes("".join(pair[number] + "\n" for pair in pairs).encode())
    return {side: str(path) for side, path in paths.items()}


def corpus_config(directory: Path, **fields: Any) -> CorpusConfig:
    """Return a configuration of word vocabularies; `fields` give the splits and the rest."""
    defaults: dict[str, Any] = {
        "directory": directory,
        "row_group_size": 64,
        "source_vocabulary": {"kind": "word", "size": 60},
        "target_vocabulary": {"kind": "word", "size": 60},
    }
    return CorpusConfig.model_validate({**defaults, **fields})
