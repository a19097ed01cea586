"""The command doctor: what this machine is, and which path training takes on it."""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import AsJson, Overrides, load_config
from cluster.commands.output import print_result, reserved_stdout

if TYPE_CHECKING:
    from cluster.doctor import Finding

_WIDTH = 79


def doctor(
    config_file: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            show_default=False,
            help="Configuration to compare with the machine: ranks, threads, memory.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine is, which path training takes on it, and what is amiss.

    Each line is a fact; a remedy stands below where one is needed. The exit code is 1 only if
    something makes training impossible.

    Example:  baton doctor configs/paper.yaml
    """
    config = None if config_file is None else load_config(config_file, overrides)
    from cluster.doctor import examine_machine
    from cluster.doctor_fit import examine_fit

    with reserved_stdout() as stdout:
        machine = examine_machine()
        fit = [] if config is None else examine_fit(config)
    findings = [*machine, *fit]
    failures = [finding for finding in findings if finding.is_failure]
    ending = "training is possible here"
    if failures:
        names = ", ".join(finding.name for finding in failures)
        ending = f"training is not possible here until this is mended: {names}"
    print_result(
        stdout,
        as_json=as_json,
        result=_result(machine, fit),
        lines=[*finding_lines(machine), *([""] if fit else []), *finding_lines(fit), "", ending],
    )
    if failures:
        raise typer.Exit(1)


def finding_lines(findings: Sequence["Finding"]) -> Iterator[str]:
    """Lay out findings: name and fact in two columns, a remedy below its fact."""
    indent = 2 + max((len(finding.name) for finding in findings), default=0)
    for finding in findings:
        yield from textwrap.wrap(
            f"{finding.name:<{indent}}{finding.fact}",
            _WIDTH,
            subsequent_indent=" " * indent,
            break_long_words=False,
        )
        if finding.remedy:
            yield from textwrap.wrap(
                f"{'!! ' if finding.is_failure else '-> '}{finding.remedy}",
                _WIDTH,
                initial_indent=" " * indent,
                subsequent_indent=" " * (indent + 3),
            )


def _result(machine: Sequence["Finding"], fit: Sequence["Finding"]) -> dict[str, Any]:
    both = (*machine, *fit)
    return {
        "is_possible": not any(finding.is_failure for finding in both),
        "machine": _values(machine),
        "configuration": _values(fit) if fit else None,
        "remedies": {finding.name: finding.remedy for finding in both if finding.remedy},
    }


def _values(findings: Sequence["Finding"]) -> dict[str, Any]:
    return {key: value for finding in findings for key, value in finding.values.items()}
