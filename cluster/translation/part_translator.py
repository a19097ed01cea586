"""What translates parts of a file: a model and the settings of the search, one a process."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.translation.lines import output_lines
from cluster.translation.parts import Part
from model.translator import Translator


@dataclass(frozen=True)
class SearchSettings:
    """How translations are searched for: see `Translator.translate`.

    With an `n_best`, so many translations of a sentence are written with their scores.
    """

    beam_size: int
    n_best: int | None
    length_penalty: float
    max_length: int

    def as_dict(self) -> dict[str, object]:
        """Return the settings by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class TranslationJob:
    """What is translated, and with what: all that a process must be told to translate parts."""

    checkpoint: Path
    input_file: Path
    settings: SearchSettings
    device: str
    precision: str


class PartTranslator:
    """Translates parts of an input file with one model."""

    def __init__(self, job: TranslationJob, num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._translator = Translator.from_checkpoint(job.checkpoint, job.device, job.precision)
        self._job = job

    def translate(
        self, part: Part, progress: Callable[[int, int], None] | None = None
    ) -> dict[int, str]:
        """Return what to write for each line of a part, by the line's number.

        `progress` gets the numbers of finished and of all sentences. Raises UserError.
        """
        settings = self._job.settings
        lines = part.lines(self._job.input_file)
        results = self._translator.translate(
            [text for _, text in lines],
            beam_size=settings.beam_size,
            length_penalty=settings.length_penalty,
            max_length=settings.max_length,
            n_best=settings.n_best or 1,
            progress=progress,
            numbers=[number + 1 for number, _ in lines],
        )
        with_scores = settings.n_best is not None
        return {
            number: output_lines(number, translations, with_scores=with_scores)
            for (number, _), translations in zip(lines, results, strict=True)
        }
