"""The checkpoints of one run: which to resume from, whether it fits, and how the ranks keep theirs.

What a checkpoint is, and how its commit is made atomic, is in `model`. This adds what a run knows:
the settings that must not change in the middle, MLflow's run, and the number of this life.
"""

from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cluster.config import Config
from cluster.corpus.prepared import PreparedCorpus
from model.checkpoint import Checkpoint, committed, latest
from model.checkpoint_folder import checkpoint_name, read_manifest
from model.checkpoint_manifest import CheckpointError, CheckpointInfo
from model.checkpoint_writer import PartRecord, commit, prepare_staging, prune
from model.data_order import Cursor
from model.errors import UserError
from model.network import ModelConfig

AUTO = "auto"
MACHINE_FILE = "machine.json"
"""What the ranks computed with, see `cluster.rank_machine`."""


class ResumeError(UserError):
    """The checkpoint and the configuration to go on with do not belong together."""


class PartWriters(Protocol):
    """The ranks, as far as checkpoints are concerned."""

    def load(self, checkpoint: Path, step: int) -> None:
        """Load a verified checkpoint, taken after `step` steps, into all ranks."""

    def write_parts(self, staging: Path) -> list[PartRecord]:
        """Let every rank write its part, and return their records."""


class CheckpointStore:
    """The folder `checkpoint.directory` of one run, whose precision was chosen.

    Opening it finds and verifies the checkpoint to resume from. Raises CheckpointError when that is
    damaged or absent, ResumeError when it does not fit the configuration or when a new run would
    mix its checkpoints with those of another.
    """

    def __init__(
        self, config: Config, corpus: PreparedCorpus, model: ModelConfig, steps_per_epoch: int
    ) -> None:
        self.directory = config.checkpoint.directory.absolute()
        self._config = config
        self._model = model
        self._fingerprint = corpus.fingerprint
        self._steps_per_epoch = steps_per_epoch
        self._files = {
            "source_vocabulary.json": corpus.vocabulary_bytes("source"),
            "target_vocabulary.json": corpus.vocabulary_bytes("target"),
            "config.yaml": config.to_yaml().encode(),
        }
        self.resumed = self._find()
        continues = self.resumed is not None and self.resumed.path.parent == self.directory
        if not continues:
            self._refuse_foreign()
        if self.resumed is not None:
            self._check(self.resumed)
        self.run_id = self.resumed.info.run_id if self.resumed and continues else None
        """MLflow's run: the one to go on with, until `begin` says which it became."""
        self.attempt = self._next_attempt()

    def begin(self, run_id: str) -> None:
        """Take the id of the run that the checkpoints will belong to."""
        if run_id != self.run_id:
            self.attempt = 1
        self.run_id = run_id

    def keep_machine(self, description: bytes) -> None:
        """Take what the ranks compute with, for all checkpoints from now on."""
        self._files[MACHINE_FILE] = description

    @property
    def resumed_machine(self) -> bytes | None:
        """What computed the checkpoint that the run resumes from, if that is known."""
        if self.resumed is None:
            return None
        with suppress(CheckpointError):  # earlier versions did not write it
            return self.resumed.file(MACHINE_FILE)
        return None

    @property
    def position(self) -> tuple[int, int, int]:
        """Steps, pairs and words that the run has behind it as it resumes; zeros for a new one."""
        if self.resumed is None:
            return 0, 0, 0
        info = self.resumed.info
        return info.step, info.num_pairs, info.num_words

    def restore(self, workers: PartWriters) -> tuple[int, int, int]:
        """Load what the run resumes from, if anything, into the ranks; returns `position`."""
        if self.resumed is not None:
            workers.load(self.resumed.path.absolute(), self.resumed.info.step)
        return self.position

    def save(self, workers: PartWriters, step: int, num_pairs: int, num_words: int) -> Path | None:
        """Commit a checkpoint of the ranks' state, and delete those that are too old.

        Emulated devices have no state; None says that nothing was kept.
        """
        if self._config.cluster.device == "emulated":
            return None
        staging = prepare_staging(self.directory, step, self.attempt)
        parts = workers.write_parts(staging)
        info = CheckpointInfo(
            step=step,
            cursor=self._cursor(step),
            model=self._model,
            reverse_source=self._config.model.reverse_source,
            precision=self._config.training.precision,
            seed=self._config.seed,
            corpus_fingerprint=self._fingerprint,
            num_pairs=num_pairs,
            num_words=num_words,
            run_id=self.run_id,
            attempt=self.attempt,
        )
        final = self.directory / checkpoint_name(step)
        path = commit(staging, final, info, parts, self._files)
        prune(self.directory, self._config.checkpoint.keep)
        return path

    def _cursor(self, step: int) -> Cursor:
        return Cursor(*divmod(step, self._steps_per_epoch))

    def _find(self) -> Checkpoint | None:
        resume = self._config.checkpoint.resume
        if resume is None:
            return None
        newest = latest(self.directory)
        path = newest if resume == AUTO else Path(resume).absolute()
        if path is None:
            return None
        opened = Checkpoint.open(path)
        # Going back in one's own folder would mix two histories, and the old one would be kept.
        if newest is not None and opened.path.parent == newest.parent and opened.path != newest:
            raise ResumeError(
                f"{opened.path} is older than {newest.name} beside it; go on from the newest by "
                "checkpoint.resume=auto, or set checkpoint.directory to another folder"
            )
        return opened

    def _refuse_foreign(self) -> None:
        newest = latest(self.directory)
        if newest is not None:
            raise ResumeError(
                f"{newest} is there from an earlier run; go on with it by checkpoint.resume=auto, "
                "or set checkpoint.directory to another folder, or remove that one"
            )

    def _next_attempt(self) -> int:
        infos = (read_manifest(path).info for path in committed(self.directory))
        lives = [info.attempt for info in infos if info.run_id == self.run_id]
        return 1 + max(lives, default=0)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Refuse to go on with other settings than those that decide what the next batch is."""
        info = checkpoint.info
        stored = Config.load(checkpoint.path / "config.yaml")
        config = self._config
        facts = {
            "the network's sizes": (info.model, self._model),
            "model.reverse_source": (info.reverse_source, config.model.reverse_source),
            "the prepared corpus": (info.corpus_fingerprint, self._fingerprint),
            "seed": (info.seed, config.seed),
            "training.batch_size": (stored.training.batch_size, config.training.batch_size),
            "corpus.shuffle_window": (stored.corpus.shuffle_window, config.corpus.shuffle_window),
            "the position in the data": (info.cursor, self._cursor(info.step)),
        }
        for name, (then, now) in facts.items():
            if then != now:
                raise ResumeError(
                    f"{checkpoint.path} cannot be resumed: {name} was {_short(then)} and is now "
                    f"{_short(now)}; use the checkpoint's config.yaml, or start a new run"
                )


def _short(value: object) -> str:
    text = str(value)
    if isinstance(value, str) and len(text) == 64:
        return text[:12]  # a SHA-256
    return text
