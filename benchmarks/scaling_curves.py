"""How far layouts scale, in the simulator: `python benchmarks/scaling_curves.py`.

Draws simulated speedups for 1 to 512 devices to `benchmarks/scaling.svg`, and prints them as the
tables of `benchmarks/scaling.md`. Nothing is trained, and no device is needed; it takes some
minutes on one core.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from model.network import ModelConfig
from pipeline.costs.arithmetic import arithmetic_costs
from pipeline.costs.operation_costs import BatchShape, Costs, Link
from pipeline.planning.candidate import DATA_PARALLEL, Candidate
from pipeline.planning.layouts import Layout
from pipeline.planning.planner import plan
from pipeline.planning.trials import SearchSettings, Trial, Trials

PAPER = ModelConfig(source_vocabulary_size=160_000, target_vocabulary_size=80_000)
DEEP = replace(PAPER, num_layers=16)
LENGTH, BATCH_SIZE = 29, 128
PIPELINE, REPLICATED, PLAIN, IDEAL = (
    "pipeline, one replica",
    "pipelines x replicas",
    "data parallelism",
    "ideal",
)
# Okabe and Ito's palette, which most colour-blind readers can tell apart; marks differ as well.
STYLES = {
    REPLICATED: ("#0072B2", "o", "-"),
    PIPELINE: ("#E69F00", "s", "-"),
    PLAIN: ("#CC79A7", "^", "-"),
}
FINE, COARSE = (8, 15), (4, 8)


@dataclass(frozen=True)
class Point:
    """A number of devices with its speedup over one, and the layout in words."""

    num_devices: int
    speedup: float
    layout: str


Curves = dict[str, list[Point]]


@dataclass(frozen=True)
class Panel:
    """The curves of one question."""

    title: str
    note: str
    curves: Curves


def main() -> None:
    """Parse, simulate, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-devices", type=int, default=512)
    parser.add_argument("--device-tflops", type=float, default=10.0)
    parser.add_argument("--link-gb-per-s", type=float, default=10.0)
    parser.add_argument("--link-latency-us", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("scaling.svg"))
    args = parser.parse_args()
    link = Link(args.link_latency_us * 1e-6, args.link_gb_per_s * 1e9)
    counts = [1]
    while 2 * counts[-1] <= args.most_devices:
        counts.append(2 * counts[-1])
    costs = {
        model: arithmetic_costs(
            model, BATCH_SIZE, LENGTH, LENGTH, flop_per_s=args.device_tflops * 1e12, link=link
        )
        for model in (PAPER, DEEP)
    }
    panels = []
    for title, note, model, simulated in (
        ("The paper's model", "4 layers, 128 sentences", PAPER, fixed_batch),
        ("A deeper model", "16 layers, 128 sentences", DEEP, fixed_batch),
        ("Growing batch", "4 layers, 128 sentences a replica", PAPER, growing_batch),
    ):
        panels.append(Panel(title, note, simulated(costs[model], counts)))
        print("\n".join(table(panels[-1])), end="\n\n", flush=True)
    draw(panels, counts, args.output)
    print(f"drawn to {args.output}")


def fixed_batch(costs: Costs, counts: Sequence[int]) -> Curves:
    """Return curves for the same batch on more and more devices."""
    curves: Curves = {REPLICATED: [], PIPELINE: [], PLAIN: []}
    for count in counts:
        found = plan(costs.model, count, costs, num_candidates=1)
        on_all = [candidate for candidate in found if candidate.num_devices == count]
        without = next(candidate for candidate in on_all if candidate.num_replicas == 1)
        if count > 1:
            names = {without.placement.name, "separate"}
            finely_cut = [finer(costs, Layout(name, count, 1)) for name in sorted(names)]
            without = min(finely_cut, key=Candidate.place)
            on_all.append(without)
        if count >= 64:
            on_all += [finer(costs, Layout("separate", n, count // n)) for n in (16, 32, 64)]
        best = min(on_all, key=Candidate.place)
        curves[REPLICATED].append(point(count, best))
        curves[PIPELINE].append(point(count, without))
        for candidate in on_all:
            if candidate.name == DATA_PARALLEL or count == 1:
                curves[PLAIN].append(point(count, candidate))
                break
    return curves


def finer(costs: Costs, layout: Layout) -> Candidate:
    """Return a layout cut finer than a planner that must answer in seconds tries on many ranks."""
    trials = Trials(costs.model, costs, SearchSettings())
    for cut in (COARSE, FINE) if layout.num_ranks <= 64 else (FINE,):
        trials.run(Trial(layout, "deferred_weights", cut), must=True)
    return trials.candidate(trials.fastest(layout))


def growing_batch(costs: Costs, counts: Sequence[int]) -> Curves:
    """Return curves for 128 sentences a replica; speedup is in sentences a second."""
    curves: Curves = {REPLICATED: [], PLAIN: []}
    for count in counts:
        curves[PLAIN].append(replicated(costs, "single", 1, count))
        ranks = min(count, 8)
        name = "single" if ranks == 1 else "separate"
        curves[REPLICATED].append(replicated(costs, name, ranks, count // ranks))
    return curves


def replicated(costs: Costs, name: str, num_ranks: int, num_replicas: int) -> Point:
    """Simulate replicas with 128 sentences each."""
    batch = BatchShape(BATCH_SIZE * num_replicas, LENGTH, LENGTH)
    trials = Trials(costs.model, replace(costs, batch=batch), SearchSettings())
    layout = Layout(name, num_ranks, num_replicas)
    cuts_of_policy = (
        {"fill_drain": (1, 1)}
        if name == "single"
        else dict.fromkeys(("deferred_weights", "1f1b"), FINE)
    )
    for policy, cut in cuts_of_policy.items():
        trials.run(Trial(layout, policy, cut), must=True)
    return point(layout.num_devices, trials.candidate(trials.fastest(layout)))


def point(num_devices: int, candidate: Candidate) -> Point:
    """Put a candidate's layout in words: ranks of a replica x replicas."""
    name = candidate.placement.name
    words = f"{name} {candidate.placement.num_ranks} x {candidate.num_replicas}"
    if candidate.placement.num_ranks > 1:
        words += f", M={candidate.num_microbatches}, K={candidate.num_chunks}"
    return Point(num_devices, candidate.speedup, words)


def table(panel: Panel) -> Iterator[str]:
    """Yield the curves as a table in Markdown."""
    names = list(panel.curves)
    yield f"### {panel.title} ({panel.note})"
    yield ""
    yield f"| devices | {' | '.join(names)} | best layout (ranks x replicas) |"
    yield "|---|" + "---|" * (len(names) + 1)
    points = {name: {p.num_devices: p for p in curve} for name, curve in panel.curves.items()}
    for count, best in points[REPLICATED].items():
        cells = [
            f"{points[name][count].speedup:.1f}" if count in points[name] else "-" for name in names
        ]
        yield f"| {count} | {' | '.join(cells)} | {best.layout} |"


def draw(panels: Sequence[Panel], counts: Sequence[int], path: Path) -> None:
    """Draw the panels side by side, with the same logarithmic axes."""
    plt.rcParams.update({"svg.hashsalt": "baton", "font.family": "DejaVu Sans", "font.size": 10})
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.9), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        draw_panel(axis, panel, counts)
    axes[0].set_ylabel("speedup over one device (simulated)")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=2.0)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_panel(axis: Axes, panel: Panel, counts: Sequence[int]) -> None:
    """Draw the curves over the ideal line, and write the last value of each at its end."""
    axis.plot(counts, counts, color="#999999", linewidth=1, linestyle=(0, (4, 3)), label=IDEAL)
    for name, (colour, mark, line) in STYLES.items():
        curve = panel.curves.get(name)
        if not curve:
            continue
        x, y = [p.num_devices for p in curve], [p.speedup for p in curve]
        axis.plot(x, y, line, color=colour, marker=mark, markersize=5, linewidth=2, label=name)
        axis.annotate(
            f"{y[-1]:.0f}" if y[-1] >= 10 else f"{y[-1]:.1f}",
            (x[-1], y[-1]),
            xytext=(7, -3),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_yticks(counts, [str(count) for count in counts])
    axis.set_xlim(0.85, counts[-1] * 2.1)
    axis.set_ylim(0.85, counts[-1] * 1.25)
    axis.minorticks_off()
    axis.set_xlabel("devices")
    axis.set_title(f"{panel.title}\n", fontsize=12, fontweight="bold", loc="left")
    axis.text(0, 1.02, panel.note, transform=axis.transAxes, color="#555555")
    axis.grid(color="#E6E6E6", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
