"""The settings of the corpus: where the text lies, what of it is kept, how it is cut into tokens.

`baton prepare` reads these; training reads what that wrote.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cluster.config.sections import FolderPath, Section, Text

BYTE_VOCABULARY_SIZE = 258  # 256 byte values and the two special symbols


def _one_or_many(value: object) -> object:
    """Accept a single string where a list of strings is meant, and a YAML list as a tuple."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


TextList = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), Field(min_length=1)]


class CorpusFiles(Section):
    """Where the sentence pairs of one split lie; exactly one of the four forms is given."""

    source: TextList | None = Field(
        default=None,
        description="Text files with one source sentence a line, plain or gzip; globs are allowed",
    )
    target: TextList | None = Field(
        default=None, description="Text files with the target sentences, aligned line by line"
    )
    tsv: TextList | None = Field(
        default=None, description="Files with source, tab, target on each line, plain or gzip"
    )
    parquet: TextList | None = Field(
        default=None,
        description="Parquet files with the columns corpus.source_column and target_column",
    )
    folder: Text | None = Field(
        default=None,
        description="A folder of TSV or Parquet shards, or of text files in pairs (a.en, a.fr), "
        "read in the order of names",
    )

    @model_validator(mode="after")
    def _exactly_one_form(self) -> Self:
        given = [key for key in ("tsv", "parquet", "folder") if getattr(self, key) is not None]
        if self.source is not None or self.target is not None:
            given.insert(0, "source and target")
        if len(given) != 1:
            raise ValueError(
                f"names {' and '.join(given) or 'no files'}; give exactly one of: source with "
                "target, tsv, parquet, folder"
            )
        if given == ["source and target"] and (self.source is None or self.target is None):
            missing = "source" if self.source is None else "target"
            raise ValueError(f"names one side only; add the files of {missing}")
        if self.source is not None and self.target is not None:
            self._check_as_many_files(len(self.source), len(self.target))
        return self

    def _check_as_many_files(self, num_source: int, num_target: int) -> None:
        if num_source != num_target:
            raise ValueError(
                f"names {num_source} source and {num_target} target files; "
                "list the two sides in the same order, one target file for each source file"
            )

    @model_serializer(mode="wrap")
    def _only_the_given_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if value is not None}


class VocabularyConfig(Section):
    """How the text of one side is cut into tokens, and how many different ones there are."""

    kind: Literal["word", "bpe", "unigram", "bytes"] = Field(
        default="word",
        description="word: the most frequent words, as in the paper; bpe, unigram: SentencePiece "
        "pieces; bytes: UTF-8 bytes, so that any serialised sequence can be a side",
    )
    size: int = Field(
        ge=3,
        le=10_000_000,
        description="Tokens, the two special symbols <unk> and </s> included; 258 for bytes",
    )
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] | None = Field(
        default=None,
        description="Code of the language whose Moses tokenisation rules cut words (kind word "
        "only); null: the text is tokenised already and is split at white space",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_size_of_bytes(cls, fields: object) -> object:
        if isinstance(fields, Mapping) and fields.get("kind") == "bytes" and "size" not in fields:
            return {**fields, "size": BYTE_VOCABULARY_SIZE}
        return fields

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        if self.kind == "bytes" and self.size != BYTE_VOCABULARY_SIZE:
            raise ValueError(
                f"has size {self.size}, but kind bytes always has {BYTE_VOCABULARY_SIZE} tokens; "
                "leave size out"
            )
        if self.kind != "word" and self.language is not None:
            raise ValueError(
                f"has language {self.language!r}, which only kind word uses; "
                f"remove it or change kind {self.kind} to word"
            )
        return self


class CorpusConfig(Section):
    """The text, what of it is kept, and its vocabularies; read by `baton prepare`."""

    directory: FolderPath = Field(
        description="Folder that `baton prepare` writes and `baton train` reads"
    )
    train: CorpusFiles = Field(description="Pairs to learn from; the vocabularies come from these")
    valid: CorpusFiles | None = Field(
        default=None, description="Pairs to watch during training; null: no validation"
    )
    test: CorpusFiles | None = Field(
        default=None, description="Pairs for the final evaluation; null: none"
    )
    source_column: Text = Field(
        default="source", description="Parquet column of the source sentences"
    )
    target_column: Text = Field(
        default="target", description="Parquet column of the target sentences"
    )
    max_length: int = Field(
        default=50,
        ge=1,
        le=100_000,
        description="Tokens a side, </s> not counted; longer pairs are dropped and counted",
    )
    max_length_ratio: float = Field(
        default=3.0,
        ge=1,
        description="Pairs whose longer side has more than this many times the tokens of the "
        "shorter are dropped and counted",
    )
    row_group_size: int = Field(
        default=1024,
        ge=1,
        le=1_000_000,
        description="Pairs of about the same length in one Parquet row group",
    )
    source_vocabulary: VocabularyConfig = Field(description="Tokens of the source side")
    target_vocabulary: VocabularyConfig = Field(description="Tokens of the target side")
    shuffle_window: int = Field(
        default=16, ge=1, le=10_000, description="Row groups whose batches are mixed"
    )

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        if self.source_column == self.target_column:
            raise ValueError(
                f"names {self.source_column!r} as both source_column and target_column; "
                "they must differ"
            )
        return self
