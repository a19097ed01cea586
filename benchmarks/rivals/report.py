"""The contest as a page of Markdown: who trains how fast, the limit, and where our step goes."""

import statistics
from collections.abc import Iterator

from benchmarks.rivals.agreement import Agreement, agreements
from benchmarks.rivals.ceiling import LARGE, products
from benchmarks.rivals.contest import Contest, Entry
from benchmarks.rivals.contestants import NUM_CORES
from benchmarks.rivals.shares import Share
from model.batching import Batch
from model.network import ModelConfig
from pipeline.placements.description import counted

PAPER_WORDS_PER_S = 1700
"""The paper's words a second on one GPU (section 3.5)."""
TARGET_RATIO, TARGET_FLOAT32_RATIO, TARGET_SHARE = 2.0, 8.0, 0.5
"""What is aimed at: times the best rival, times the best float32 one, part of the large product."""


def report(contest: Contest, command: str, machine: str, note: str, picture: str) -> str:
    """Return the page; `note` goes below the machine, `picture` is the plot's file name."""
    parts = [
        ["# The same training by other means", "", f"`{command}`", ""],
        _conditions(contest, machine, note),
        ["", f"![words a second]({picture})", ""],
        [*_standings(contest), ""],
        ["## Do they train the same model?", "", *_agreement(agreements(contest)), ""],
        ["## The limit", "", *_limit(contest), ""],
        *([[*_paper(contest), ""]] if is_paper(contest.task.model) else []),
        *([["## Where a step of ours goes", "", *_shares(contest)]] if contest.shares else []),
        ["## How each is set up", "", *_setups(contest)],
    ]
    return "\n".join(line for part in parts for line in part) + "\n"


def is_paper(model: ModelConfig) -> bool:
    """Whether the network has the paper's 384M weights."""
    return model == ModelConfig(160_000, 80_000)


def _conditions(contest: Contest, machine: str, note: str) -> list[str]:
    model, task = contest.task.model, contest.task
    loads = ", ".join(f"{load:.1f}" for load in contest.loads)
    rounds = max((len(entry.turns) for entry in contest.entries), default=0)
    lines = [
        f"- Machine: {machine}. Load at the start of each round: {loads}.",
        f"- Model: {model.num_layers} layers of {model.hidden_size:,} cells on each side, "
        f"{model.source_vocabulary_size:,} and {model.target_vocabulary_size:,} words, "
        f"{model.num_parameters() / 1e6:,.0f}M weights; SGD at rate {task.learning_rate:g}, the "
        f"gradient divided by the sentences and clipped to norm {task.clip_norm:g}.",
        f"- Batches: {task.batch_size} pairs with lengths like WMT's; one to warm up, "
        f"{task.num_steps} timed ({'; '.join(_described(b) for b in contest.batches[1:])}). A step "
        f"needs {contest.num_operations / task.num_steps / 1e12:,.2f} TFLOP on average.",
        f"- Medians of {counted(rounds, 'round')}; in each, everybody starts, trains and "
        "ends, one after the other. Words count both sides with their ends, without padding.",
    ]
    return [*lines, *([f"- {note}"] if note else [])]


def _described(batch: Batch) -> str:
    padding = 1 - batch.num_words / batch.num_positions
    return f"{batch.source_positions} and {batch.target_positions} positions, {padding:.0%} padding"


def _standings(contest: Contest) -> Iterator[str]:
    best = contest.best(ours=False)
    columns = "words/s (least to most)", "to the best rival", "words/CPU s"
    more = "GFLOP/s", "of the ceiling", "MB"
    yield f"| | cores | {' | '.join((*columns, *more))} |"
    yield f"|{'---|' * 8}"
    for entry in contest.entries:
        if not entry.turns:
            why = "does not run here" if entry.problem else "not timed"
            yield f"| {entry.name} | {entry.contestant.cores} | {why} | | | | | |"
            continue
        speeds, rate = contest.speeds(entry), contest.rate(entry)
        ratio = "" if best is None else f"{contest.speed(entry) / contest.speed(best):.2f}"
        memory = statistics.median(turn.peak_bytes for turn in entry.turns)
        yield (
            f"| {_bold(entry, entry is best)} | {entry.contestant.cores} "
            f"| {contest.speed(entry):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {ratio} | {contest.words_per_cpu_s(entry):,.0f} | {rate / 1e9:,.0f} "
            f"| {rate / contest.ceiling(entry.task.precision):.0%} "
            f"| {memory / 1e6:,.0f} |"
        )
    yield ""
    yield (
        "GFLOP/s are those that the words need, without padding; the ceiling is the large matrix "
        "product of the same run and format. Words for a second of processor time change less with "
        "what else the machine does; threads that spin while they wait count. MB is the most of "
        "memory that was resident, added up over processes (pages that ranks share count in each)."
    )
    for entry in contest.entries:
        if entry.problem:
            yield f"\n{entry.name} failed: `{entry.problem}`"


def _bold(entry: Entry, bold: bool) -> str:
    return f"**{entry.name}**" if bold else entry.name


def _agreement(found: list[Agreement]) -> Iterator[str]:
    if len(found) < 2:
        yield "Fewer than two were timed, so there is nothing to compare."
        return
    if all(each.holds for each in found):
        yield "Yes, up to the rounding of each format:"
    else:
        wrong = ", ".join(each.entry.name for each in found if not each.holds)
        yield f"**No: {wrong} differ by more than rounding, so their times mean nothing.**"
    yield "the largest relative differences from the first line, over all rounds."
    yield ""
    columns = "loss of the first step", "its difference", "of the norm", "of losses after updates"
    yield f"| | {' | '.join(columns)} |"
    yield "|---|---|---|---|---|"
    for each in found:
        loss = each.entry.turns[0].losses[0]
        differences = " | ".join(f"{part:.1e}" for part in (each.first, each.norm, each.later))
        yield f"| {each.entry.name} | {loss:.6f} | {differences} |"


def _limit(contest: Contest) -> Iterator[str]:
    yield from _product_table(contest)
    yield ""
    per_word = contest.num_operations / contest.num_words
    ours, rival = contest.best(ours=True), contest.best(ours=False)
    if ours is None or rival is None:
        return
    ceiling = max(contest.ceiling(precision) for precision in contest.formats)
    most = ceiling / per_word
    yield (
        f"A word takes {per_word / 1e9:.3f} GFLOP. At the best large product of this run, "
        f"{ceiling / 1e9:,.0f} GFLOP/s, a step of nothing but such products would make "
        f"{most:,.0f} words/s. The best rival, {rival.name}, makes {contest.speed(rival):,.0f}, "
        f"which is {contest.speed(rival) / most:.0%} of that, so nobody could be more than "
        f"{most / contest.speed(rival):.2f} times as fast."
    )
    yield ""
    yield from _target(contest, ours, rival, TARGET_RATIO, "the best rival", most)
    float32 = contest.best(ours=False, precision="float32")
    if float32 is not None:
        which = "the best float32 rival"
        yield from _target(contest, ours, float32, TARGET_FLOAT32_RATIO, which, most)
    share = contest.rate(ours) / contest.ceiling(ours.task.precision)
    yield (
        f"- Aim: a step at {TARGET_SHARE:.0%} of the large product. {ours.name} is at {share:.0%}: "
        f"{'reached' if share >= TARGET_SHARE else 'missed'}."
    )


def _target(
    contest: Contest, ours: Entry, rival: Entry, aim: float, which: str, most: float
) -> Iterator[str]:
    ratio = contest.speed(ours) / contest.speed(rival)
    needed = aim * contest.speed(rival)
    verdict = "reached" if ratio >= aim else "missed"
    beyond = (
        f", and out of reach here: it would be {needed:,.0f} words/s, {needed / most:.1f} times "
        "what the large product allows"
        if needed > most
        else f"; it would be {needed:,.0f} words/s, {needed / most:.0%} of what the large product "
        "allows"
        if ratio < aim
        else ""
    )
    yield f"- Aim: {aim:g} times {which}. {ours.name} is at {ratio:.2f}: {verdict}{beyond}."


def _product_table(contest: Contest) -> Iterator[str]:
    shapes = products(contest.task)
    yield f"| product | shape | {' | '.join(_columns(contest))} |"
    yield f"|---|---|{'---|' * len(_columns(contest))}"
    for name, shape in shapes.items():
        rates = " | ".join(
            f"{contest.product_rate(precision, name, count) / 1e9:,.0f}"
            for precision in contest.formats
            for count in (1, NUM_CORES)
        )
        large = " (the large product)" if name == LARGE else ""
        yield f"| {' '.join(name)}{large} | {shape} | {rates} |"


def _columns(contest: Contest) -> list[str]:
    return [
        f"GFLOP/s, {precision}, {layout}"
        for precision in contest.formats
        for layout in (f"1 x {NUM_CORES} threads", f"{NUM_CORES} x 1 thread")
    ]


def _paper(contest: Contest) -> Iterator[str]:
    ours = contest.best(ours=True)
    yield "## The paper's model"
    yield ""
    if ours is not None:
        speed = contest.speed(ours)
        yield (
            f"{ours.name}: {speed:,.0f} words/s on {NUM_CORES} cores. The paper gives "
            f"{PAPER_WORDS_PER_S:,} for one GPU, {PAPER_WORDS_PER_S / speed:.1f} times as much."
        )


def _shares(contest: Contest) -> Iterator[str]:
    yield (
        "One rank with both cores, the batch uncut. Beside each operation's rate stands that of "
        "its product alone, measured in the same run; the two W of a layer have the same product, "
        "and the softmax makes its three operations together."
    )
    for precision, shares in contest.shares.items():
        total = sum(share.seconds for share in shares)
        yield ""
        yield f"| {precision} | share | seconds a step | GFLOP/s | its product | reached |"
        yield "|---|---|---|---|---|---|"
        for share in shares:
            yield _share_row(contest, precision, share, total)
    yield ""


def _share_row(contest: Contest, precision: str, share: Share, total: float) -> str:
    start = (
        f"| {share.kind} {share.operation}".rstrip()
        + f" | {share.seconds / total:.1%} | {share.seconds / contest.task.num_steps:.3f} "
    )
    if not share.operations:
        return start + "| | | |"
    rate = share.operations / share.seconds
    alone = statistics.harmonic_mean(
        contest.product_rate(precision, (share.kind, operation), 1) for operation in share.operation
    )
    return start + f"| {rate / 1e9:,.0f} | {alone / 1e9:,.0f} | {rate / alone:.0%} |"


def _setups(contest: Contest) -> Iterator[str]:
    contestants = list(dict.fromkeys(entry.contestant.name for entry in contest.entries))
    by_name = {entry.contestant.name: entry.contestant for entry in contest.entries}
    for name in contestants:
        yield f"- **{name}**: {by_name[name].setup}."
    yield ""
    yield (
        "All rivals: dense gradients of the embeddings, fused SGD, `clip_grad_norm_` (pipelining: "
        "the norm over both ranks), gradients set to None after the update, nn.LSTM's second bias "
        "frozen at zero (the model has one bias a layer), autocast around the forward pass for "
        "bfloat16. This project's processes keep the memory of freed tensors, as its ranks always "
        "do; rivals have the C library's defaults, unless the command gives them that too."
    )
