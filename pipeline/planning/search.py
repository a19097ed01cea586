"""The search: in which sequence layouts, cuts and policies are tried in the simulator.

How much is tried is bounded by a number of simulated operations and not by a clock, so the same
question always gets the same answer. Where that bound does not cut the search short, everything in
the grid was tried but for what cannot be the fastest in any order.
"""

from collections.abc import Iterable, Sequence
from itertools import product

from pipeline.planning.bounds import parameters_exceed
from pipeline.planning.candidate import Candidate
from pipeline.planning.cuts import Cut
from pipeline.planning.layouts import ONE_DEVICE, Layout, data_parallel, on_fewer, pipelines
from pipeline.planning.trials import Outcome, Trial, Trials

_COARSE_POLICY = "deferred_weights"
_NUM_FITTING_TRIES = 12
_SMALL_PART = 20
"""A trial is small if this many of its size could be made in all."""
_WORTHWHILE = 0.002
"""The gain from which on a search in one direction goes on."""


class Search:
    """Decides what is tried next."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials
        self._policies = trials.settings.policies
        usual = _COARSE_POLICY in self._policies
        self._first_policy = _COARSE_POLICY if usual else self._policies[0]

    def run(self, num_devices: int) -> None:
        """Try every layout at a few cuts, then better cuts and policies, then all that is left.

        What is left is tried as long as there are operations to spend, the most promising first.
        """
        num_sentences, use_all = self._trials.costs.batch.num_sentences, self._use_all
        replicas = data_parallel(num_devices, num_sentences, use_all=use_all)
        found = pipelines(num_devices, num_sentences)
        if num_devices == 1 or not use_all:
            self._trials.run(Trial(ONE_DEVICE, "fill_drain", (1, 1)), must=True)
        for layout, policy in product(replicas, ("fill_drain", *self._policies)):
            self._trials.run(Trial(layout, policy, (1, 1)), must=True)
        for layout in sorted(found, key=lambda each: (each.num_replicas > 1, self._least_s(each))):
            self._try_first(layout, must=layout.num_replicas == 1)
        for layout in () if use_all else on_fewer(num_devices):
            self._try_first(layout, must=False)
        for layout in sorted(self._known(found), key=self._least_s):
            if self._may_win(layout) or layout.num_replicas == 1:
                self._try_second(layout, must_be_small=not self._may_win(layout))
        for layout in self._by_urgency(found):
            if self._may_win(layout):
                self._climb(layout)
        for layout in self._by_urgency(found):
            self._try_second(layout)
            self._climb(layout)
            self._try_policies(layout)
        self._try_rest([*found, *replicas[:1]])

    def layouts(self, num_fastest: int) -> list[Layout]:
        """Return the fastest layouts, and those that everybody wants to compare with.

        On fewer devices than there are, a placement counts only if it is faster there. Under a
        memory bound all are returned, since the fastest may not fit.
        """
        found = sorted(self._faster_than_on_more(), key=self._trials.fastest_s)
        if self._trials.settings.memory_bytes is not None:
            return found
        most = max((layout.num_devices for layout in found), default=0)
        return [
            layout
            for place, layout in enumerate(found)
            if place < num_fastest
            or layout.num_devices == 1
            or (layout.num_devices == most and 1 in layout[1:])
        ]

    def _faster_than_on_more(self) -> list[Layout]:
        """Leave out placements that are no faster on fewer devices."""
        known = self._trials.outcomes
        most: dict[str, int] = {}
        for layout in known:
            most[layout.name] = max(most.get(layout.name, 0), layout.num_devices)
        full_s: dict[str, float] = {}
        for layout in known:
            if layout.num_devices == most[layout.name]:
                step_s = self._trials.fastest_s(layout)
                full_s[layout.name] = min(full_s.get(layout.name, step_s), step_s)
        return [
            layout
            for layout in known
            if layout.num_devices in (1, most[layout.name])
            or self._trials.fastest_s(layout) < full_s[layout.name]
        ]

    def best(self, layout: Layout) -> Candidate:
        """Return the fastest outcome of a layout that fits, or the fastest if none does."""
        outcomes, trials = self._trials.ranked(layout), self._trials
        found = trials.candidate(outcomes[0])
        bound = trials.settings.memory_bytes
        if found.fits or parameters_exceed(outcomes[0].placement, trials.costs, bound):
            return found
        for outcome in _fewest_kept_too(outcomes):
            candidate = trials.candidate(outcome)
            if candidate.fits:
                return candidate
        return found

    @property
    def _use_all(self) -> bool:
        return self._trials.settings.use_all

    def _try_first(self, layout: Layout, *, must: bool) -> None:
        self._trials.run(Trial(layout, self._first_policy, self._first_cut(layout)), must=must)

    def _try_second(self, layout: Layout, *, must_be_small: bool = False) -> None:
        """Try more microbatches, which is what helps most where it helps."""
        trial = Trial(layout, self._first_policy, max(self._trials.cuts_of(layout).coarse))
        size, most = trial.num_operations(self._trials.model), self._trials.settings.max_operations
        if not must_be_small or _SMALL_PART * size <= most:
            self._trials.run(trial)

    def _climb(self, layout: Layout) -> None:
        """Go from the best known cut to a better one beside it, as long as that is worth it."""
        gain = 1.0
        while gain > _WORTHWHILE:
            best = self._trials.fastest(layout)
            for cut in self._trials.cuts_of(layout).beside(best.trial.cut):
                self._trials.run(best.trial._replace(cut=cut))
            gain = 1.0 - self._trials.fastest_s(layout) / best.step_s if best.step_s else 0.0

    def _try_policies(self, layout: Layout) -> None:
        """Try all policies at the best cut, and improve the cut again for the best of them."""
        best = self._trials.fastest(layout).trial
        for policy in self._policies:
            self._trials.run(best._replace(policy=policy))
        if self._trials.fastest(layout).trial != best:
            self._climb(layout)

    def _try_rest(self, layouts: Sequence[Layout]) -> None:
        rest = [
            Trial(layout, policy, cut)
            for layout in layouts
            for policy, cut in product(self._policies, self._trials.cuts_of(layout).all)
        ]
        for trial in sorted(rest, key=self._promise):
            if self._trials.affordable(trial) and not self._trials.hopeless(trial):
                self._trials.run(trial)

    def _known(self, layouts: Iterable[Layout]) -> list[Layout]:
        return [layout for layout in layouts if layout in self._trials.outcomes]

    def _first_cut(self, layout: Layout) -> Cut:
        return self._trials.cuts_of(layout).coarse[-1]

    def _least_s(self, layout: Layout) -> float:
        return self._trials.least_s(layout, self._first_cut(layout))

    def _may_win(self, layout: Layout) -> bool:
        return not self._trials.hopeless(self._trials.fastest(layout).trial)

    def _by_urgency(self, layouts: Iterable[Layout]) -> list[Layout]:
        """Sort by time; what cannot win any more, whatever the order, comes last.

        Of that, pipelines without replicas come first, since people want to compare with them.
        """

        def urgency(layout: Layout) -> tuple[bool, bool, float]:
            no_winner = not self._may_win(layout)
            return no_winner, no_winner and layout.num_replicas > 1, self._trials.fastest_s(layout)

        return sorted(self._known(layouts), key=urgency)

    def _promise(self, trial: Trial) -> tuple[float, int]:
        """Sort by what is known of the layout at this point of the grid, or of it elsewhere."""
        known = self._trials.outcomes.get(trial.layout, {}).values()
        here = [outcome.step_s for outcome in known if outcome.trial.cut == trial.cut]
        anywhere = [outcome.step_s for outcome in known]
        step_s = min(here or anywhere) if known else self._least_s(trial.layout)
        return step_s, trial.num_operations(self._trials.model)


def _fewest_kept_too(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the fastest outcomes, and then those of the policy that keeps least."""
    fastest = list(outcomes[1 : 1 + _NUM_FITTING_TRIES])
    frugal = [outcome for outcome in outcomes if outcome.trial.policy == "1f1b"]
    return fastest + frugal[:_NUM_FITTING_TRIES]
