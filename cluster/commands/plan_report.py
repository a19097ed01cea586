"""What the command plan prints, for readers who have never seen a pipeline schedule."""

import io
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.costs.operation_costs import Costs
    from pipeline.planning.candidate import Candidate

_MOST_RANKS_LISTED = 16
_INCOMPLETE = (
    "These settings do not carry the link, the lengths or the rate that the plan counts with, "
    "which orders and shares of words may depend on: add --save-costs FILE to keep them."
)
_COLUMNS = {
    "placement": "which device holds which part of the model; data_parallel is a whole model each",
    "replicas": "complete models side by side: each takes its share of the sentences, and their "
    "gradients are summed in every step",
    "devices": "devices of all replicas together",
    "policy": "the order in which a device does its pieces of work",
    "M": "microbatches: groups of a replica's sentences",
    "K": "time chunks: groups of a sentence's words. A device can begin with one piece while "
    "another still works on the next",
    "speedup": "how many times faster a step is than on one device",
    "busy": "how much of the step the devices compute; the rest they wait",
    "memory": "of the fullest device, parameters and gradients included",
}


@dataclass(frozen=True)
class PlanReport:
    """The candidates that are shown, the best of them, and what they rest on."""

    shown: Sequence["Candidate"]
    best: "Candidate"
    costs: "Costs"
    memory_gb: float | None
    settings: Sequence[str]
    is_complete: bool = True
    """Whether the settings carry the costs that the plan counts with."""

    def lines(self) -> list[str]:
        """Return the recommendation, the table, what its columns mean, and the reasons."""
        parts = (
            self._recommendation(),
            self._table(),
            self._notes(),
            self._columns(),
            self._reasons(),
            self._owners(),
            ["Train with it by adding to the command, or to the configuration:"]
            + [f"  {setting}" for setting in self.settings]
            + ([] if self.is_complete else _wrapped(_INCOMPLETE)),
        )
        lines: list[str] = []
        for part in parts:
            lines += [*([""] if lines and part else []), *part]
        return lines

    def _recommendation(self) -> list[str]:
        from pipeline.planning.reasons import describe_losses

        best = self.best
        recommended = f"Recommended{' where messages are free' if self.costs.link.is_free else ''}"
        if best.num_devices == 1:
            text = (
                f"{recommended}: one device. Whatever can be cut off from it costs more in "
                "messages and waits than it saves."
            )
            return _wrapped(text)
        text = (
            f"{recommended}: {_layout_words(best)}. A step is {best.speedup:.2f} times as fast as "
            f"on one device ({best.num_devices} would be perfect). "
            f"{describe_losses(best)}"
        )
        return _wrapped(text)

    def _table(self) -> list[str]:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in self._shown_columns():
            is_text = name in ("placement", "policy")
            table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
        for number, candidate in enumerate(self.shown, start=1):
            row = _row(candidate)
            table.add_row(str(number), *(row[name] for name in self._shown_columns()))
        stream = io.StringIO()
        # A table that is squeezed loses the ends of its words; one that is too wide is only ugly.
        Console(file=stream, width=max(100, _width()), color_system=None).print(table)
        return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]

    def _shown_columns(self) -> list[str]:
        """Leave out the devices where all layouts of more than one device have as many."""
        counts = {candidate.num_devices for candidate in self.shown} - {1}
        return [name for name in _COLUMNS if name != "devices" or len(counts) > 1]

    def _notes(self) -> list[str]:
        lines = []
        if any(not candidate.fits for candidate in self.shown):
            lines.append(f"! more than the {self.memory_gb:g} GB that a device may hold")
        if self.costs.link.is_free:
            lines += _wrapped(
                "Messages and sums of gradients take no time here. That flatters layouts that send "
                "much, data_parallel and split above all, so the order above may not be that of "
                "your machines. Measure them with `baton profile`, or give --device-tflops, "
                "--link-gb-per-s and --link-latency-us."
            )
        if self.costs.origin.startswith("arithmetic"):
            lines += _wrapped(
                "Work is counted in multiply-adds, at one rate for large and small matrices. "
                "Measured costs (`baton profile`, then --costs FILE) also know what small pieces "
                "cost."
            )
        if len(self.shown) > 1:
            lines += _wrapped(
                "Layouts that cannot win are tried at few cuts; they may reach a little more."
            )
        return lines

    def _columns(self) -> list[str]:
        lines = ["What the columns say:"]
        for name in self._shown_columns():
            meaning = _COLUMNS[name]
            lines += _wrapped(f"  {name:<11}{meaning}", indent=" " * 13)
        return lines

    def _reasons(self) -> list[str]:
        """Give the reason of the fastest row of each placement; every row's is in the JSON."""
        from pipeline.planning.reasons import POLICY_IDEAS

        lines, told = ["Why:"], set[str]()
        for number, candidate in enumerate(self.shown, start=1):
            if candidate.name not in told:
                told.add(candidate.name)
                lines += _wrapped(f"{number:>3}. {candidate.name}: {candidate.why}", indent=" " * 5)
        policies = dict.fromkeys(
            candidate.policy for candidate in self.shown if candidate.placement.num_ranks > 1
        )
        for policy in policies:
            lines += _wrapped(f"  {policy}: {POLICY_IDEAS[policy]}", indent="    ")
        return lines

    def _owners(self) -> list[str]:
        """Say which device of a replica has what."""
        from pipeline.placements.description import describe_rank

        placement, count = self.best.placement, self.best.num_replicas
        if placement.num_ranks == 1:
            return []
        lines = [f"Who owns what{' in each replica' if count > 1 else ''} (recommended layout):"]
        for rank in range(min(placement.num_ranks, _MOST_RANKS_LISTED)):
            text = f"  device {rank:>2}: {describe_rank(placement, rank)}"
            lines += _wrapped(text, indent=" " * 13)
        if placement.num_ranks > _MOST_RANKS_LISTED:
            lines.append(f"  and so on, to device {placement.num_ranks - 1}")
        return lines


def _layout_words(candidate: "Candidate") -> str:
    count, ranks = candidate.num_replicas, candidate.placement.num_ranks
    if ranks == 1:
        return f"data parallelism, the whole model on each of {count} devices"
    if count == 1:
        return f"placement {candidate.name} over {ranks} devices"
    return f"placement {candidate.name} over {ranks} devices, in {count} replicas"


def _row(candidate: "Candidate") -> dict[str, str]:
    alone = candidate.placement.num_ranks == 1
    return {
        "placement": candidate.name,
        "replicas": str(candidate.num_replicas),
        "devices": str(candidate.num_devices),
        "policy": "-" if alone else candidate.policy,
        "M": str(candidate.num_microbatches),
        "K": str(candidate.num_chunks),
        "speedup": f"{candidate.speedup:.2f}x",
        "busy": f"{candidate.busy_fraction:.0%}",
        "memory": f"{candidate.peak_memory_bytes / 1e9:.2f} GB" + ("" if candidate.fits else " !"),
    }


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, _width(), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _width() -> int:
    return min(100, shutil.get_terminal_size((100, 24)).columns)
