"""Where a search stands, by its trials alone: which to make longer, which front there is, how long it will take.

Pure functions of trials that are within the budgets already; `searching` decides which those are.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from trimtab.bit_search.additive import Configuration
from trimtab.bit_search.hypervolume import hypervolume, pareto
from trimtab.bit_search.ledger import DIED, Trial

_SHORT_FOR_EACH_LONG = 4


def arrays(trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and log quality of finished trials, (n,) each."""
    size = np.array([t.bytes for t in trials], float)
    return size, np.log(np.maximum(np.array([t.quality for t in trials], float), 1e-12))


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front of the longest finished trials, by ascending bytes: the last is the best."""
    done = [t for t in trials if t.state == "complete"]
    longest = max((t.wish.steps for t in done), default=0)
    done = [t for t in done if t.wish.steps == longest]
    return [done[i] for i in pareto(*arrays(done))]


def promotion(
    trials: Sequence[Trial], steps: int, longer: int | None, *, last: bool, best: bool
) -> Configuration | None:
    """A short trial to make longer, if it is time for one: the best, else what the short front would lose most without.

    What is chosen in the end is chosen of the longer trials, so the last trial of all is no other short one, which could
    not be chosen, but that of the best short one not promoted yet.

    Args:
        trials: of any state.
        steps: of a short trial.
        longer: steps of a promoted one; None for none.
        last: whether it is the last trial.
        best: whether the next best is wanted, as under a budget, rather than a front.
    """
    short = [t for t in trials if t.wish.steps == steps and t.quality is not None]
    if longer is None or not short:
        return None
    promoted = {t.wish.configuration for t in trials if t.wish.steps == longer}
    if not last and (len(promoted) + 1) * _SHORT_FOR_EACH_LONG > len(short):
        return None
    size, cost = arrays(short)
    order = [int(i) for i in np.argsort(cost, kind="stable")]
    if not last and not best:
        ends = pareto(size, cost)
        reference = float(size.max()) + 1, float(cost.max())
        kept = [hypervolume(np.delete(size[ends], i), np.delete(cost[ends], i), reference) for i in range(len(ends))]
        order = [order[0], *(int(ends[i]) for i in np.argsort(kept, kind="stable"))]
    return next((c for c in (short[i].wish.configuration for i in order) if c not in promoted), None)


def hopeless(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that killed their worker for the second time (the system does that to a process that takes too much)."""
    found, died = [], set[tuple[Configuration, int]]()
    for t in trials:
        if t.state == "dead" and t.reason == DIED:
            key = (t.wish.configuration, t.wish.steps)
            found += [t] if key in died else []
            died.add(key)
    return found


def seconds_left(trials: Sequence[Trial], steps: int, longer: int | None, *, uniform: int, wanted: int) -> float | None:
    """Of one worker, until there are enough trials; None before the first is finished.

    Args:
        trials: that count, of any state.
        steps: of a short trial.
        longer: steps of a promoted one, which takes the longer in proportion until one is finished; None for none.
        uniform: trials of uniform widths that there will be.
        wanted: other trials that there will be.
    """
    took = {n: [t.seconds for t in trials if t.seconds is not None and t.wish.steps == n] for n in (steps, longer)}
    if not took[steps]:
        return None
    ended = [t for t in trials if t.state != "running"]
    even = sum(t.wish.kind == "uniform" for t in ended)
    long = sum(t.wish.kind == "promoted" for t in ended)
    left = max(wanted - (len(ended) - even), 0)
    each = statistics.median(took[steps])
    plain, promotions = max(uniform - even, 0) + left, 0
    if longer is not None and left:
        promotions = min(max((uniform + wanted) // (_SHORT_FOR_EACH_LONG + 1) - long, 1), left)
        plain -= promotions
    longer_each = statistics.median(took[longer] or [each * (longer or 0) / max(steps, 1)])
    return plain * each + promotions * longer_each
