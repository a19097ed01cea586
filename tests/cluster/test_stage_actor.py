"""What a rank's process holds, and how it words and classifies what goes wrong."""

import subprocess
import sys

from cluster.stage_actor import interface_of, one_line
from model.errors import UserError


def test_a_rank_imports_neither_mlflow_nor_ray_data() -> None:
    program = (
        "import sys, cluster.stage_actor; print([m for m in ('mlflow', 'ray.data', 'pyarrow') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    assert interface_of("203.0.113.77") is None


def test_a_users_error_is_its_message_and_a_bug_names_its_place() -> None:
    assert one_line(UserError("the fact;\nthe remedy")) == "the fact; the remedy"
    try:
        dict[str, int]()["missing"]
    except KeyError as error:
        assert one_line(error).startswith("KeyError: 'missing' (test_stage_actor.py:")
