"""Why a layout is fast or slow, in plain words: where a step's time goes that is not work.

For readers who have never seen a pipeline schedule; the numbers come from the simulated step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.costs.operation_costs import Costs
from pipeline.placements.description import joined
from pipeline.planning.candidate import Candidate
from pipeline.simulation.gradient_exchange import gradient_exchange_s, replica_costs

IDEAS: Mapping[str, str] = {
    "single": "one device does everything",
    "paper": "some devices hold the layers, the others share the words of the softmax",
    "uneven": "devices that hold layers also take some words of the softmax, the others more",
    "separate": "half of the devices read (encoder), the other half write (decoder), and all share "
    "the words of the softmax",
    "split": "half of the devices run the recurrences step by step, the other half prepare their "
    "inputs in large matrix products, and all share the words of the softmax",
}
POLICY_IDEAS: Mapping[str, str] = {
    "fill_drain": "everything forward, then everything back",
    "wavefront": "layer after layer along the sentence, forward, then the same way back",
    "1f1b": "each microbatch goes back as soon as it can",
    "deferred_weights": "weight gradients wait until a device has nothing more urgent to do",
    "priority_list": "the fastest of several orders; weight gradients fill idle time",
}
_SMALL = 0.01


@dataclass(frozen=True)
class Losses:
    """Shares of all devices' time without work, and of the step that messages cost.

    `before` is until a device's first operation, `after` from its last one to the last of all,
    `exchange` from there to the end of the sums over replicas, `shares` where a replica has fewer
    sentences than the largest share, `between` all other waits.
    `messages` is how much shorter the operations of a step would end on a free link.
    """

    before: float
    between: float
    after: float
    exchange: float
    shares: float
    messages: float


def losses(candidate: Candidate) -> Losses:
    """Return where a candidate's time goes that is not work."""
    simulation, step_s = candidate.simulation, candidate.step_s
    if not step_s:
        return Losses(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    total, end_s = simulation.num_ranks * step_s, simulation.compute_s
    busy = [[op for op in rank if op.end_s > op.start_s] for rank in simulation.timeline]
    before = sum(rank[0].start_s if rank else end_s for rank in busy) / total
    after = sum(end_s - rank[-1].end_s if rank else 0.0 for rank in busy) / total
    exchange = simulation.exchange_s / step_s
    shares = (1.0 - simulation.mean_share) * sum(simulation.busy_s) / total
    between = max(0.0, simulation.bubble_fraction - before - after - exchange - shares)
    messages = 1.0 - candidate.end_on_free_link_s / end_s
    return Losses(before, between, after, exchange, shares, messages)


def why(candidate: Candidate, costs: Costs) -> str:
    """Return a few sentences on what makes a candidate fast or slow; `costs` as of the search."""
    if candidate.num_devices == 1:
        return "One device does everything: what the speedups are measured against."
    count, ranks = candidate.num_replicas, candidate.placement.num_ranks
    extra = _extra_work(candidate)
    if ranks == 1:
        text = f"Every device has the whole model and 1/{count} of the sentences"
        return f"{text}{extra}. {_about_shares(candidate, costs)}{_about_sums(candidate, costs)}"
    idea = IDEAS.get(candidate.placement.name, "a placement by hand")
    text = f"{idea}: {_reason(candidate)}{extra}."
    if count == 1:
        return text[0].upper() + text[1:]
    return (
        f"{count} replicas of the whole model, each over {ranks} devices and with 1/{count} of the "
        f"sentences. {_about_shares(candidate, costs)}In a replica, {text} "
        f"{_about_sums(candidate, costs)}"
    )


def describe_losses(candidate: Candidate) -> str:
    """Say in words where the time goes in which devices do nothing."""
    lost, idle = losses(candidate), candidate.simulation.bubble_fraction
    if idle < _SMALL / 2:
        return "Hardly any time is lost: no device ever waits for long."
    shares = {
        "before a device gets its first input": lost.before,
        "between operations, while inputs are still being made elsewhere": lost.between,
        "after a device is done and others are not": lost.after,
        "at the end, until the gradients of all replicas are summed": lost.exchange,
        "in replicas with fewer sentences than others": lost.shares,
    }
    listed = [
        f"{share:.1%} {words}"
        for words, share in sorted(shares.items(), key=lambda item: -item[1])
        if share >= _SMALL / 10
    ]
    text = f"{idle:.1%} of the devices' time is idle: {joined(listed)}."
    if lost.messages >= _SMALL:
        text += f" With messages that take no time, the work would be done {lost.messages:.0%} "
        text += "sooner."
    return text


def _about_shares(candidate: Candidate, costs: Costs) -> str:
    """Say so if the sentences cannot be shared out evenly."""
    count, sentences = candidate.num_replicas, costs.batch.num_sentences
    if candidate.simulation.mean_share == 1.0:
        return ""
    return (
        f"The shares are unequal, {sentences // count} or {-(-sentences // count)} of "
        f"{sentences} sentences, and the largest decides. "
    )


def _about_sums(candidate: Candidate, costs: Costs) -> str:
    """Say what summing the gradients over replicas costs, and how much of it is hidden."""
    simulation, count = candidate.simulation, candidate.num_replicas
    share = replica_costs(costs, count)
    total_s, num_bytes = gradient_exchange_s(candidate.placement, share, count)
    text = (
        f"Their gradients are summed in every step ({num_bytes / 1e9:.2g} GB from the device that "
        "sends most; of embeddings only the rows used)"
    )
    if not total_s:
        return f"{text}, which costs no time on this link."
    hidden = 1.0 - simulation.exchange_s / total_s
    if simulation.exchange_s < _SMALL * simulation.step_seconds:
        return f"{text}, nearly all of it hidden behind work that is still going on."
    longer = simulation.exchange_s / simulation.compute_s
    return (
        f"{text}. Only {hidden:.0%} of that is hidden behind work that is still going on; the rest "
        f"makes the step {_times_longer(longer)}."
    )


def _times_longer(share: float) -> str:
    return f"{1.0 + share:.1f} times as long" if share >= 1.0 else f"{share:.0%} longer"


def _extra_work(candidate: Candidate) -> str:
    """Say so if pieces of the work are so small that they take longer than the whole did."""
    simulation = candidate.simulation
    all_s = sum(simulation.busy_s) * simulation.num_replicas * simulation.mean_share
    extra = all_s / simulation.one_device_s - 1.0 if simulation.one_device_s else 0.0
    if extra < 3 * _SMALL:
        return ""
    return f"; in such small pieces the work itself takes {_times_longer(extra)}"


def _reason(candidate: Candidate) -> str:
    """Say what holds the work of one replica up, its sums of gradients aside."""
    lost, simulation = losses(candidate), candidate.simulation
    end_s = simulation.compute_s or 1.0
    busiest = max(range(simulation.num_ranks), key=lambda rank: simulation.busy_s[rank])
    share = simulation.busy_s[busiest] / end_s
    busy = sum(simulation.busy_s) / (simulation.num_ranks * end_s)
    if lost.messages > 0.1 and lost.messages > 0.5 * (1.0 - busy):
        return f"without messages the work would be done {lost.messages:.0%} sooner"
    if busy > 0.93:
        return f"the work is spread evenly, and devices are busy {busy:.0%} of its time"
    if share > 0.93:
        return (
            f"device {busiest} has the most work and is busy {share:.0%} of the time, the average "
            f"device {busy:.0%}"
        )
    waits = {
        "before their first input": lost.before,
        "for each other in the middle of the step": lost.between,
        "at the end for the slowest": lost.after,
    }
    most = max(waits, key=lambda words: waits[words])
    return (
        f"devices are busy only {busy:.0%} of the time; most of the rest they wait {most} "
        f"({waits[most] * candidate.step_s / end_s:.0%})"
    )
