"""Layouts in plain words: which rank owns what, where a step's time is lost, and why that is so.

For readers who have never seen a pipeline schedule; the numbers come from the simulated step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.costs.operation_costs import Costs, Link
from pipeline.graph import build_graph
from pipeline.placements.placement import Placement
from pipeline.simulation.simulator import Simulation, start_times
from pipeline.simulation.timed_graph import time_graph

if TYPE_CHECKING:
    from pipeline.planning.planner import Candidate

IDEAS: Mapping[str, str] = {
    "single": "One device does everything",
    "paper": "Some devices hold the layers, the others share the words of the softmax",
    "uneven": "Devices that hold layers also take some words of the softmax, the others more",
    "separate": "Half of the devices read (encoder), the other half write (decoder), and all share "
    "the words of the softmax",
    "split": "Half of the devices run the recurrences step by step, the other half prepare their "
    "inputs in large matrix products, and all share the words of the softmax",
}
POLICY_IDEAS: Mapping[str, str] = {
    "fill_drain": "everything forward, then everything back",
    "wavefront": "layer after layer along the sentence, forward, then the same way back",
    "1f1b": "each microbatch goes back as soon as it can",
    "deferred_weights": "weight gradients wait until a device has nothing more urgent to do",
    "priority_list": "the fastest of several orders; weight gradients fill idle time",
}


@dataclass(frozen=True)
class Losses:
    """Shares of all devices' time without work, and the share of the step that messages cost.

    `before` is until a device's first operation, `after` from its last one to the end of the step,
    `between` all other waits. `messages` is how much shorter the step would be on a free link.
    """

    before: float
    between: float
    after: float
    messages: float


def losses(candidate: "Candidate", costs: Costs) -> Losses:
    """Return where a candidate's time goes that is not work."""
    simulation, step_s = candidate.simulation, candidate.simulation.step_seconds
    if not step_s:
        return Losses(0.0, 0.0, 0.0, 0.0)
    total = simulation.num_ranks * step_s
    busy = [[op for op in rank if op.end_s > op.start_s] for rank in simulation.timeline]
    before = sum(rank[0].start_s if rank else step_s for rank in busy) / total
    after = sum(step_s - rank[-1].end_s if rank else 0.0 for rank in busy) / total
    between = max(0.0, simulation.bubble_fraction - before - after)
    return Losses(before, between, after, 1.0 - _step_on_free_link_s(candidate, costs) / step_s)


def why(candidate: "Candidate", costs: Costs) -> str:
    """Return a sentence on what makes a candidate fast or slow."""
    if candidate.num_replicas > 1:
        return _why_replicas(candidate)
    if candidate.placement.num_ranks == 1:
        return "One device does everything: what the speedups are measured against."
    return f"{IDEAS.get(candidate.name, 'A placement by hand')}: {_reason(candidate, costs)}."


def describe_rank(placement: Placement, rank: int) -> str:
    """Say in a few words what a rank owns."""
    owned = [block for block, owner in placement.rank_of.items() if owner == rank]
    parts = [f"{block.removesuffix('_embedding')} embedding" for block in owned if "_" in block]
    parts += _layer_words([block for block in owned if block.count(".") == 2])
    num_words = sum(
        stop - start
        for shard, (start, stop) in enumerate(placement.shards)
        if placement.rank_of.get(f"softmax.{shard}") == rank
    )
    if num_words:
        parts.append(f"{num_words:,} words of the softmax")
    if "loss" in owned:
        parts.append("the loss")
    return ", ".join(parts)


def describe_losses(candidate: "Candidate", costs: Costs) -> str:
    """Say in words where the time goes in which devices do nothing."""
    lost, simulation = losses(candidate, costs), candidate.simulation
    if simulation.bubble_fraction < 0.005:
        return "Hardly any time is lost: no device ever waits for long."
    shares = {
        "before a device gets its first input": lost.before,
        "between operations, while inputs are still being made elsewhere": lost.between,
        "after a device is done and others are not": lost.after,
    }
    listed = [
        f"{share:.1%} {words}"
        for words, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= 0.001
    ]
    text = f"{simulation.bubble_fraction:.1%} of the devices' time is idle: {_joined(listed)}."
    if lost.messages >= 0.01:
        text += f" On a link without delays the step would be {lost.messages:.0%} shorter."
    return text


def _why_replicas(candidate: "Candidate") -> str:
    text = (
        f"Every device has the whole model and 1/{candidate.num_replicas} of the sentences; "
        f"each sends {candidate.exchange_bytes / 1e9:.2f} GB of gradients a step (of embeddings "
        "only the rows used)"
    )
    if candidate.exchange_s:
        text += (
            f", counted as not hidden behind work at all; {candidate.hidden_speedup:.2f}x if it "
            "were hidden completely"
        )
    else:
        text += ", which costs no time on this link"
    return f"{text}." if candidate.runs else f"{text}. It cannot be run yet."


def _reason(candidate: "Candidate", costs: Costs) -> str:
    lost, simulation = losses(candidate, costs), candidate.simulation
    busiest = max(range(simulation.num_ranks), key=lambda rank: simulation.busy_s[rank])
    share = simulation.busy_s[busiest] / simulation.step_seconds if simulation.step_seconds else 0.0
    busy = 1.0 - simulation.bubble_fraction
    if lost.messages > 0.1 and lost.messages > 0.5 * simulation.bubble_fraction:
        return f"messages make the step {lost.messages:.0%} longer than work alone would"
    if busy > 0.93:
        return f"the work is spread evenly, and devices are busy {busy:.0%} of the time"
    if share > 0.93:
        return (
            f"rank {busiest} has the most work and is busy {share:.0%} of the step, while the "
            f"average device is busy {busy:.0%}"
        )
    waits = {
        "before their first input": lost.before,
        "for each other in the middle of the step": lost.between,
        "at the end for the slowest": lost.after,
    }
    most = max(waits, key=lambda words: waits[words])
    return (
        f"devices are busy only {busy:.0%} of the time; most of the rest they wait {most} "
        f"({waits[most]:.0%})"
    )


def _step_on_free_link_s(candidate: "Candidate", costs: Costs) -> float:
    if costs.link.latency_s == 0.0 and costs.link.bytes_per_s == float("inf"):
        return candidate.simulation.step_seconds
    placement, free = candidate.placement, replace(costs, link=Link())
    blocks = placement.blocks(costs.model)
    graph = build_graph(blocks, candidate.num_microbatches, candidate.num_chunks, training=True)
    timed = time_graph(graph, placement, free)
    number = graph.numbered.number
    order = [[number[op] for op in rank] for rank in candidate.schedule.operations]
    return max(map(sum, zip(start_times(timed, order), timed.seconds, strict=True)))


def _layer_words(blocks: Sequence[str]) -> list[str]:
    """Name layers as shortly as what is owned of them allows."""
    halves: dict[tuple[str, str], set[str]] = {}
    for block in blocks:
        network, layer, half = block.split(".")
        halves.setdefault((layer, half), set()).add(network)
    whole: dict[tuple[str, str], list[str]] = {}
    for (layer, half), networks in halves.items():
        network = "encoder and decoder" if len(networks) == 2 else next(iter(networks))
        whole.setdefault((network, layer), []).append(half)
    grouped: dict[tuple[str, str], list[str]] = {}
    for (network, layer), kinds in whole.items():
        what = "" if len(kinds) == 2 else f"{kinds[0]} of "
        grouped.setdefault((what, network), []).append(layer)
    return [
        f"{what}{network} {'layer' if len(layers) == 1 else 'layers'} {_joined(layers)}"
        for (what, network), layers in grouped.items()
    ]


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def spread_of(simulation: Simulation) -> tuple[float, float]:
    """Return the smallest and the largest share of the step in which a rank works."""
    step_s = simulation.step_seconds or 1.0
    return min(simulation.busy_s) / step_s, max(simulation.busy_s) / step_s
