"""Translation of whole files: parts, what survives an interruption, and workers that die."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.interruption import Interrupted
from cluster.resources import ClusterError
from cluster.translation import file_translation, workers
from cluster.translation import parts as parts_module
from cluster.translation.file_translation import FileTranslation, translate_file
from cluster.translation.finished_parts import FinishedParts, ResumeError
from cluster.translation.lines import InputError
from cluster.translation.part_translator import SearchSettings
from cluster.translation.parts import PART_LINES, InputParts, Part
from cluster.translation.workers import most_threads
from tests.cluster.noise import noise_checkpoint

SETTINGS = SearchSettings(beam_size=2, n_best=None, length_penalty=0.0, max_length=4)
NUM_LINES = 3 * PART_LINES + 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_checkpoint(tmp_path_factory.mktemp("checkpoints"), hidden_size=16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.txt"
    # Without a line feed at the end, with empty lines, and with lines of many lengths.
    path.write_text("\n".join(f"{n}" * (n * 7 % 11) for n in range(NUM_LINES)))
    return path


def run(
    checkpoint: Path,
    source: Path,
    target: Path,
    *,
    settings: SearchSettings = SETTINGS,
    num_workers: int = 1,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FileTranslation:
    return translate_file(
        checkpoint,
        source,
        target,
        settings,
        device="cpu",
        num_workers=num_workers,
        restart=restart,
        progress=progress,
        message=lambda text: None,
    )


def interrupt_at(num_sentences: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= num_sentences:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("window", [3, 8, 1000])
def test_the_parts_hold_every_line_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(parts_module, "WINDOW_LINES", window)
    monkeypatch.setattr(parts_module, "PART_LINES", 3)
    expected = source.read_text().split("\n")
    found = InputParts.of(source)
    assert found.num_lines == len(expected)
    lines = [line for part in found.parts for line in part.lines(source)]
    assert sorted(lines) == list(enumerate(expected))
    assert [part.num_lines for part in found.parts] == [len(p.lines(source)) for p in found.parts]
    for group in found.windows():
        # With its line feed, which the last line lacks.
        lengths = [
            len(text) + (number < NUM_LINES - 1)
            for part in group
            for number, text in part.lines(source)
        ]
        assert lengths == sorted(lengths, reverse=True)


def test_a_line_that_is_no_text_is_named_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"good\nb\xe9d\n")
    with pytest.raises(InputError, match="in.txt, line 2, byte 2: not UTF-8"):
        InputParts.of(path)


def test_an_interrupted_translation_goes_on_to_the_same_bytes(
    checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole.txt", tmp_path / "broken.txt"
    assert run(checkpoint, source, whole) == FileTranslation(NUM_LINES, 0)
    assert whole.read_bytes().count(b"\n") == NUM_LINES
    with pytest.raises(Interrupted, match=f"stopped after 512 of {NUM_LINES} sentences"):
        run(checkpoint, source, broken, progress=interrupt_at(2 * PART_LINES + 1))
    assert not broken.exists()
    assert run(checkpoint, source, broken) == FileTranslation(NUM_LINES, 2 * PART_LINES)
    assert broken.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.txt", "in.txt", "whole.txt"]


def test_what_belongs_to_another_translation_is_refused_until_restart(
    checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.txt"
    with pytest.raises(Interrupted):
        run(checkpoint, source, target, progress=interrupt_at(PART_LINES))
    other = SearchSettings(3, None, 0.0, 4)
    with pytest.raises(ResumeError, match=r"beam_size 2 -> 3.*--restart"):
        run(checkpoint, source, target, settings=other)
    assert run(checkpoint, source, target, settings=other, restart=True).num_resumed == 0
    with pytest.raises(Interrupted):
        run(checkpoint, source, target, progress=interrupt_at(PART_LINES))
    source.write_text(source.read_text() + "!")
    with pytest.raises(ResumeError, match="input_sha256"):
        run(checkpoint, source, target)


def test_parts_without_a_manifest_are_nobodys_and_other_files_stay(
    source: Path, tmp_path: Path
) -> None:
    """A restart that was killed on the way leaves no part that a later run would take for its."""
    parts, output = InputParts.of(source), tmp_path / "out.txt"
    with FinishedParts.open(output, parts, {"beam_size": 12}, restart=False) as finished:
        finished.add(0, {0: "of another search"})
    folder = tmp_path / "out.txt.parts"
    (folder / "manifest.json").unlink()
    with FinishedParts.open(output, parts, {"beam_size": 1}, restart=False) as finished:
        assert len(finished.missing()) == len(parts.parts)
        (folder / "notes.txt").write_text("somebody's")
        for part in parts.parts:
            finished.add(part.number, {number: f"{number}\n" for number, _ in part.lines(source)})
        finished.assemble()
    assert output.read_text().split() == [str(number) for number in range(NUM_LINES)]
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("restart", [False, True])
def test_another_programs_manifest_is_refused_and_kept(
    source: Path, tmp_path: Path, restart: bool
) -> None:
    folder, parts = tmp_path / "out.txt.parts", InputParts.of(source)
    folder.mkdir()
    (folder / "manifest.json").write_text('{"files": []}')
    (folder / "output.tmp").write_text("somebody's")
    opened = FinishedParts.open(tmp_path / "out.txt", parts, {}, restart=restart)
    with pytest.raises(ResumeError, match=r"manifest\.json"), opened:
        pass
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "output.tmp"}


@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_somebody_else_is_left_as_it_is(
    source: Path, tmp_path: Path, restart: bool
) -> None:
    folder = tmp_path / "out.txt.parts"
    folder.mkdir()
    (folder / "part-00000-of-4.txt").write_text("somebody's")
    parts, output = InputParts.of(source), tmp_path / "out.txt"
    with (
        pytest.raises(ResumeError, match="holds 'part-00000-of-4.txt', which no translation made"),
        FinishedParts.open(output, parts, {}, restart=restart),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == ["part-00000-of-4.txt"]


@pytest.mark.parametrize(
    ("cores", "num_workers", "expected"),
    [
        ([2], 2, 1),
        ([8, 8, 8, 8], 2, 8),
        ([8, 8, 8, 8], 5, 4),
        ([16, 2], 3, 5),
        ([1], 4, 1),
        ([], 1, 1),
    ],
)
def test_a_worker_gets_no_more_threads_than_its_node_has_room_for(
    cores: list[int], num_workers: int, expected: int
) -> None:
    assert most_threads(cores, num_workers) == expected


def test_a_run_of_another_precision_is_not_gone_on_with(
    checkpoint: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.txt"
    with pytest.raises(Interrupted):
        run(checkpoint, source, target, progress=interrupt_at(PART_LINES))
    monkeypatch.setattr(
        file_translation, "translation_precision", lambda trained, device: "bfloat16"
    )
    with pytest.raises(ResumeError, match=r"precision float\d\d -> bfloat16"):
        run(checkpoint, source, target)


def test_two_processes_do_not_write_one_output(source: Path, tmp_path: Path) -> None:
    parts = InputParts.of(source)
    with (
        FinishedParts.open(tmp_path / "out.txt", parts, {}, restart=False),
        pytest.raises(ResumeError, match="another process"),
        FinishedParts.open(tmp_path / "out.txt", parts, {}, restart=True),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_a_user_error(checkpoint: Path, source: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        run(checkpoint, source, source.parent / "missing" / "out.txt")


def test_an_empty_file_has_an_empty_translation(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").touch()
    assert run(checkpoint, tmp_path / "in.txt", tmp_path / "out.txt") == FileTranslation(0, 0)
    assert (tmp_path / "out.txt").read_bytes() == b""


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    direct = [int(child) for path in children for child in path.read_text().split()]
    return direct + [pid for child in direct for pid in descendants(child)]


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


@pytest.mark.usefixtures("ray_cluster")
def test_workers_give_the_bytes_of_one_process_although_one_is_killed(
    checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    settings = SearchSettings(3, 2, 0.6, 6)
    run(checkpoint, source, one, settings=settings)
    assert one.read_text().startswith("0 ||| ")
    killed: list[int] = []

    def kill_a_worker(done: int, total: int) -> None:
        if done and not killed:
            workers = [pid for pid in descendants(os.getpid()) if "_Worker" in title(pid)]
            killed.append(workers[-1])
            os.kill(workers[-1], signal.SIGKILL)

    done = run(checkpoint, source, two, settings=settings, num_workers=2, progress=kill_a_worker)
    assert len(killed) == 1
    assert done == FileTranslation(NUM_LINES, 0)
    assert two.read_bytes() == one.read_bytes()


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_find_no_room_are_told_and_not_waited_for(
    checkpoint: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "START_TIMEOUT_S", 3)
    monkeypatch.setattr(workers, "threads_per_worker", lambda num_workers: 1000)
    with pytest.raises(ClusterError, match="2 workers of 1000 .* did not all start in 3 s"):
        run(checkpoint, source, tmp_path / "out.txt", num_workers=2)


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_again_and_again_ends_the_command_and_not_what_others_finished(
    checkpoint: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.translation import workers

    class DyingWorker:
        def __init__(self, *arguments: Any) -> None:
            pass

        def __call__(self, batch: Any) -> Any:
            [part] = [Part.from_text(text) for text in batch["part"].to_pylist()]
            if part.number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return pa.table({"part": [part.number], "lines": ["[]"]})

    monkeypatch.setattr(workers, "_Worker", DyingWorker)
    with pytest.raises(ClusterError, match="a worker died 4 times"):
        run(checkpoint, source, tmp_path / "out.txt", num_workers=2)
    kept = {path.name for path in (tmp_path / "out.txt.parts").glob("part-*")}
    assert kept == {f"part-{number:06d}.json" for number in (1, 2, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_command_goes_on_where_it_stopped(
    checkpoint: Path, source: Path, tmp_path: Path, workers: str
) -> None:
    source.write_text("\n".join([f"a line of some length, number {n}" for n in range(2000)]))
    whole, broken = tmp_path / "whole.txt", tmp_path / "broken.txt"
    settings = ["--beam-size=12", "--max-length=40", "--json", f"--workers={workers}"]

    def command(target: Path) -> list[str]:
        program = [sys.executable, "-m", "cluster.cli", "translate", str(checkpoint)]
        return [*program, f"--input={source}", f"--output={target}", *settings]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(command(broken), env=environment, stderr=subprocess.DEVNULL)
    folder = tmp_path / "broken.txt.parts"
    while not list(folder.glob("part-*.json")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not broken.exists()
    results = [
        json.loads(subprocess.check_output(command(target), env=environment).splitlines()[-1])
        for target in (broken, whole)
    ]
    assert 0 < results[0]["num_resumed"] < 2000
    assert results[1]["num_resumed"] == 0
    assert broken.read_bytes() == whole.read_bytes()
