"""Placements written by hand: the YAML file that `pipeline.placement` can name.

ranks: 3                  # may be left out: one more than the highest rank below
shards: 2                 # vocabulary shards of even size, or a list of their words
blocks:                   # a block's name, or a pattern of names, and its rank
  "encoder.*": 0
  "decoder.*": 1
  "*_embedding": 0
  "softmax.*": 2
  "loss": 2
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from cluster.config.file import load_validated
from cluster.config.sections import Section

Rank = Annotated[int, Field(ge=0, le=9999)]
NumWords = Annotated[int, Field(ge=1)]


class PlacementFile(Section):
    """A rank for every block, by name or pattern, and the cut of the vocabulary."""

    blocks: dict[str, Rank] = Field(description="A block's name or a pattern of names, and a rank")
    shards: NumWords | list[NumWords] = Field(
        default=1, description="Vocabulary shards of even size, or a list of the words of each"
    )
    ranks: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="Number of ranks; null: one more than the highest in `blocks`"
    )

    @field_validator("blocks")
    @classmethod
    def _has_blocks(cls, value: dict[str, int]) -> dict[str, int]:
        if not value:
            raise ValueError("is empty; give every block a rank, for example 'encoder.*': 0")
        return value

    @property
    def num_ranks(self) -> int:
        """The ranks of the pipeline."""
        return self.ranks or 1 + max(self.blocks.values())


def read_placement_file(path: Path) -> PlacementFile:
    """Read a placement; raises ConfigError, which lists every problem of the file."""
    return load_validated(PlacementFile, path)
