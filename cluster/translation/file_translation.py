"""A whole file translated into another: what is finished survives an interruption.

The parts of the input that are not finished are translated, here or by Ray workers, kept as they
come, and put together in the order of the input.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config.sections import ClusterConfig
from cluster.interruption import Interrupted
from cluster.resources import connect
from cluster.translation.finished_parts import FinishedParts
from cluster.translation.part_translator import PartTranslator, SearchSettings, TranslationJob
from cluster.translation.parts import PART_LINES, WINDOW_LINES, InputParts, Part
from model.checkpoint import Checkpoint
from model.checkpoint_manifest import MANIFEST_NAME
from model.durable_files import file_sha256
from model.processor import translation_precision

Translated = Iterator[tuple[int, dict[int, str]]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FileTranslation:
    """A finished translation: sentences in all, and those that an earlier run had translated."""

    num_sentences: int
    num_resumed: int


def translate_file(
    checkpoint: Path,
    input_file: Path,
    output_file: Path,
    settings: SearchSettings,
    *,
    device: str,
    num_workers: int,
    restart: bool,
    progress: Progress,
    message: Callable[[str], None],
) -> FileTranslation:
    """Translate a file with a checkpoint, or the newest of a folder, into another file.

    What an earlier run of the same input, checkpoint and settings finished is not translated again,
    unless `restart`. `progress` gets the numbers of finished and of all sentences, `message` a line
    now and then. Raises UserError; Interrupted after Ctrl-C.
    """
    parts = InputParts.of(input_file)
    opened = Checkpoint.open(checkpoint)
    # Decided here for all workers and for a later run, whatever their processors.
    precision = translation_precision(opened.info.precision, device)
    job = TranslationJob(opened.path.absolute(), input_file.absolute(), settings, device, precision)
    with FinishedParts.open(output_file, parts, _identity(job), restart=restart) as finished:
        missing = finished.missing()
        num_resumed = parts.num_lines - sum(part.num_lines for part in missing)
        if num_resumed:
            message(f"{num_resumed:,} of {parts.num_lines:,} sentences were translated before")
        counter = _Counter(num_resumed, parts.num_lines, progress)
        try:
            if num_workers > 1:
                found = _with_workers(job, missing, num_workers, message)
            else:
                found = _here(job, missing, counter)
            for number, lines in found:
                finished.add(number, lines)
                counter.add(len(lines))
        except KeyboardInterrupt:
            raise Interrupted(
                f"stopped after {counter.done:,} of {parts.num_lines:,} sentences; repeat the "
                "command and it goes on from there"
            ) from None
        finished.assemble()
    return FileTranslation(parts.num_lines, num_resumed)


def _identity(job: TranslationJob) -> dict[str, object]:
    """Return what decides the output, beside the input. Workers and threads are left free."""
    return {
        "checkpoint": file_sha256(job.checkpoint / MANIFEST_NAME),
        "precision": job.precision,
        **job.settings.as_dict(),
        "part_lines": PART_LINES,
        "window_lines": WINDOW_LINES,
    }


class _Counter:
    """Finished sentences, those of a part under way included in what is shown."""

    def __init__(self, done: int, total: int, progress: Progress) -> None:
        self.done, self._total, self._progress = done, total, progress
        progress(done, total)

    def add(self, num_sentences: int) -> None:
        self.done += num_sentences
        self.under_way(0)

    def under_way(self, num_sentences: int) -> None:
        self._progress(self.done + num_sentences, self._total)


def _here(job: TranslationJob, parts: list[Part], counter: _Counter) -> Translated:
    if not parts:
        return
    translator = PartTranslator(job)
    for part in parts:
        yield part.number, translator.translate(part, lambda done, _: counter.under_way(done))


def _with_workers(
    job: TranslationJob, parts: list[Part], num_workers: int, message: Callable[[str], None]
) -> Translated:
    if not parts:
        return
    with connect(ClusterConfig()):
        # Ray Data takes seconds to import, and reads settings that `connect` makes.
        from cluster.translation.workers import threads_per_worker, translated_parts

        num_threads = threads_per_worker(num_workers)
        message(f"{num_workers} workers of {num_threads} thread(s) each")
        yield from translated_parts(job, parts, num_workers=num_workers, num_threads=num_threads)
