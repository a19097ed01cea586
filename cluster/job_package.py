"""What a Ray job takes along: the code, the configuration, and a corpus that is small enough.

Ray packs a folder and unpacks it on every node that works for the job. Ray would leave out what
.gitignore names, which includes prepared corpora; so the files are chosen here and copied into a
staging folder, which also lets the size be checked before anything is sent. Larger corpora and
everything that a job writes are named by absolute path and must lie where all nodes see them.
"""

import fnmatch
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from model.errors import UserError

MAX_PACKAGE_BYTES = 512 * 2**20
"""What Ray keeps of a working directory at most."""
MAX_CORPUS_BYTES = 64 * 2**20
"""The largest prepared corpus that travels; a larger one is read where it lies."""

PACKAGES = ("model", "pipeline", "cluster")
EXCLUDED = (
    *(".git", ".venv", "venv", "data", "runs", "mlruns", "mlartifacts", "build", "mlflow.db*"),
    *("__pycache__", ".*_cache", ".hypothesis", "*.egg-info", ".gitignore"),
)
LAUNCHER = "baton_job.sh"

# Ray runs a job's command in a shell with the PATH of its own processes, which need not name the
# Python that Ray runs with. `find_spec` keeps the test cheap.
_LAUNCHER_TEXT = """\
export MLFLOW_DISABLE_TELEMETRY=true
for python in {python} python3 python; do
  if "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("ray") is None)' \\
    2>/dev/null; then
    exec "$python" -m cluster.cli "$@"
  fi
done
echo "error: no Python on the PATH of the cluster's head node has Ray; start Ray from the" \\
  "environment that baton is installed in" >&2
exit 127
"""


class PackageError(UserError):
    """The working directory cannot be sent as it is."""


@dataclass(frozen=True)
class JobPackage:
    """A staged folder: `config` is the configuration's path within it, `num_bytes` its size."""

    folder: Path
    config: PurePosixPath
    num_bytes: int


def corpus_travels(working_dir: Path, directory: Path) -> bool:
    """Whether a prepared corpus is sent along: named relatively, there, and not large."""
    folder = working_dir / directory
    if directory.is_absolute() or ".." in directory.parts or not folder.is_dir():
        return False
    return sum(path.stat().st_size for path in _files_below(folder)) <= MAX_CORPUS_BYTES


def stage_package(
    staging: Path, working_dir: Path, config_path: Path, corpus: Path | None, *, python: str
) -> JobPackage:
    """Copy what a job needs into the empty folder `staging`.

    `corpus` is a folder relative to `working_dir` that travels although it is excluded elsewhere;
    `python` is the interpreter tried first on the cluster. Raises PackageError if the result is
    more than Ray takes.
    """
    files = {path: working_dir / path for path in _chosen_files(working_dir)}
    if corpus is not None:
        files |= {
            path.relative_to(working_dir): path for path in _files_below(working_dir / corpus)
        }
    if Path("cluster/cli.py") not in files:
        # baton is installed elsewhere: the job must still run the code that submits it.
        files |= _installed_packages()
    config = _place_of(config_path, working_dir)
    files[config] = config_path
    num_bytes = _check_size(working_dir, files)
    for path, origin in files.items():
        (staging / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, staging / path)
    launcher = _LAUNCHER_TEXT.format(python=shlex.quote(python))
    (staging / LAUNCHER).write_text(launcher, encoding="utf-8")
    return JobPackage(staging, PurePosixPath(config), num_bytes)


def _place_of(config_path: Path, working_dir: Path) -> Path:
    path = config_path.resolve()
    if path.is_relative_to(working_dir):
        return path.relative_to(working_dir)
    return Path("submitted") / path.name


def _chosen_files(working_dir: Path) -> Iterator[Path]:
    patterns = [*EXCLUDED, *_rayignore(working_dir)]
    for path in _listed_files(working_dir):
        if not _is_excluded(path, patterns) and (working_dir / path).is_file():
            yield path


def _listed_files(working_dir: Path) -> Iterable[Path]:
    """List what git tracks or would track; without git, every file that is not excluded."""
    git = shutil.which("git")
    command = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if git is not None:
        listed = subprocess.run([git, *command], cwd=working_dir, capture_output=True, check=False)
        if listed.returncode == 0:
            return [Path(name) for name in listed.stdout.decode().split("\0") if name]
    return (path.relative_to(working_dir) for path in _files_below(working_dir, EXCLUDED))


def _files_below(folder: Path, excluded: Iterable[str] = ()) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in excluded):
            continue
        if path.is_dir():
            yield from _files_below(path, excluded)
        elif path.is_file():
            yield path


def _rayignore(working_dir: Path) -> list[str]:
    path = working_dir / ".rayignore"
    if not path.is_file():
        return []
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line.strip("/") for line in lines if line and not line.startswith(("#", "!"))]


def _is_excluded(path: Path, patterns: Iterable[str]) -> bool:
    """Match a pattern against every name in the path and against every leading part of it."""
    candidates = [*path.parts, *(str(parent) for parent in path.parents), str(path)]
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in candidates)


def _installed_packages() -> dict[Path, Path]:
    root = Path(__file__).resolve().parent.parent
    return {
        path.relative_to(root): path
        for package in PACKAGES
        for path in _files_below(root / package, EXCLUDED)
    }


def _check_size(working_dir: Path, files: dict[Path, Path]) -> int:
    sizes: Counter[str] = Counter()
    for path, origin in files.items():
        sizes["/".join(path.parts[:2])] += origin.stat().st_size
    total = sum(sizes.values())
    if total > MAX_PACKAGE_BYTES:
        largest = ", ".join(f"{name} ({_mib(size)})" for name, size in sizes.most_common(3))
        raise PackageError(
            f"{working_dir} has {_mib(total)} to send, Ray takes {_mib(MAX_PACKAGE_BYTES)}; most "
            f"are in {largest}: name what the job does not need in .gitignore or .rayignore"
        )
    return total


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
