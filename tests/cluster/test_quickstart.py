"""The quickstart's own decisions; that it works is what `make quickstart` shows."""

from pathlib import Path

from cluster.config import Config
from cluster.quickstart import with_unused_folder

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_second_quickstart_leaves_the_first_ones_checkpoints_alone(tmp_path: Path) -> None:
    first = tmp_path / "runs" / "checkpoints"
    override = f"checkpoint.directory={first}"
    config = Config.load(CONFIGS / "quickstart.yaml", [override, "checkpoint.keep=1"])

    assert with_unused_folder(config).checkpoint.directory == first
    first.mkdir(parents=True)
    assert with_unused_folder(config).checkpoint.directory == first.with_name("checkpoints-2")
    first.with_name("checkpoints-2").mkdir()
    third = with_unused_folder(config)

    assert third.checkpoint.directory == first.with_name("checkpoints-3")
    assert (third.checkpoint.keep, third.training) == (1, config.training)
