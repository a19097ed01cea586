"""The batches of a run, out of a prepared corpus: numbered steps over epochs, and held-out ones.

A thread reads ahead, over the ends of epochs as well, so that the ranks never wait while Ray Data
starts to read the next epoch.
"""

from collections.abc import Callable, Iterator

from cluster.config import Config
from cluster.corpus.prepared import PreparedCorpus
from cluster.ingest.prefetch import Prefetch
from cluster.ingest.stream import BatchStream
from model.batching import Batch
from model.data_order import Cursor

BATCHES_AHEAD = 16
"""Batches that wait in the driver; they are small beside the model."""
_CLOSE_TIMEOUT_S = 5.0


class CorpusBatches:
    """What the controller trains and validates on.

    Raises CorpusError when the corpus has no split `train`; without a split `valid` nothing is
    validated.
    """

    def __init__(self, corpus: PreparedCorpus, config: Config) -> None:
        self._train = _stream(corpus, config, "train")
        has_valid = "valid" in corpus.split_names
        self.num_valid_pairs = corpus.split("valid").num_pairs if has_valid else 0
        self._valid = _stream(corpus, config, "valid") if self.num_valid_pairs else None
        self._prefetch: Prefetch[Batch] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self._train.num_batches

    def cursor(self, step: int) -> Cursor:
        """Return where in the data order the batch after `step` steps is."""
        return Cursor(*divmod(step, self.steps_per_epoch))

    def training_batches(
        self, first_step: int, last_step: int, check: Callable[[], None] = lambda: None
    ) -> Iterator[Batch]:
        """Yield the batches of the steps after `first_step` up to `last_step`, over all epochs.

        `check` is called while waiting for data; what it raises ends the wait.
        """
        self.close()
        source = self._over_epochs(first_step, last_step)
        self._prefetch = Prefetch(source, BATCHES_AHEAD, check)
        return self._prefetch

    def training_batch(self, step: int) -> Batch:
        """Read the batch of one step, numbered from 1, alone and without Ray."""
        return self._train.read_batch(self.cursor(step - 1))

    def validation_batches(self) -> Iterator[Batch] | None:
        """Return the held-out batches in order; None if there are none."""
        if self._valid is None:
            return None
        return (ordered.batch for ordered in self._valid.in_order())

    def close(self) -> None:
        """Stop reading ahead, and wait a little for what is being read."""
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch.join(_CLOSE_TIMEOUT_S)

    def _over_epochs(self, first_step: int, last_step: int) -> Iterator[Batch]:
        step = first_step
        while step < last_step:
            start = self.cursor(step)
            for cursor, batch in self._train.epoch(start.epoch, start.batch):
                assert cursor == self.cursor(step), f"{cursor} came for step {step}"
                yield batch
                step += 1
                if step == last_step:
                    return


def _stream(corpus: PreparedCorpus, config: Config, split: str) -> BatchStream:
    return BatchStream(
        corpus,
        split,
        batch_size=config.training.batch_size,
        seed=config.seed,
        shuffle_window=config.corpus.shuffle_window,
        reverse_source=config.model.reverse_source,
    )
