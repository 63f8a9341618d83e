"""Where a search stands, counted by hand."""

import pytest

from trimtab.bit_search import standing
from trimtab.bit_search.ledger import Trial, Wish


def trial(number: int, kind: str, steps: int = 4, seconds: float | None = 10.0, quality: float = 3.0) -> Trial:
    state = "running" if seconds is None else "complete"
    return Trial(
        number, Wish((number,), steps, kind), state, 100 - number, None if seconds is None else quality, seconds
    )


def left(trials: list[Trial], longer: int | None = None) -> float | None:
    return standing.seconds_left(trials, 4, longer, uniform=6, wanted=10)


def test_time_left_counts_uniform_widths_too() -> None:
    assert left([]) is None
    assert left([trial(0, "uniform", seconds=None)]) is None
    assert left([trial(n, "uniform") for n in range(3)]) == 10.0 * (3 + 10)
    assert left([*(trial(n, "uniform") for n in range(6)), trial(6, "search", seconds=None)]) == 10.0 * 10
    assert left([*(trial(n, "uniform") for n in range(6)), *(trial(n, "search") for n in range(6, 16))]) == 0.0


def test_time_left_counts_longer_trials_by_their_own_time() -> None:
    """Of sixteen trials three are promotions: 12 steps of 4 take three times as long until one of them is finished."""
    begun = [trial(n, "uniform") for n in range(6)]
    assert left(begun, 12) == 10.0 * 7 + 30.0 * 3
    assert left([*begun, trial(6, "promoted", 12, 50.0)], 12) == 10.0 * 7 + 50.0 * 2
    # The last is one, whatever the count.
    made = [
        *begun,
        *(trial(n, "search") for n in range(6, 12)),
        *(trial(n, "promoted", 12, 50.0) for n in range(12, 15)),
    ]
    assert left(made, 12) == 50.0


@pytest.mark.parametrize("best", [True, False])
def test_the_best_is_promoted_first(best: bool) -> None:
    trials = [trial(n, "search", quality=q) for n, q in enumerate((5.0, 4.9, 4.0, 3.0))]
    assert standing.promotion(trials[:3], 4, 12, last=False, best=best) is None
    assert standing.promotion(trials[:3], 4, 12, last=True, best=best) == (2,)
    assert standing.promotion(trials, 4, 12, last=False, best=best) == (3,)
    assert standing.promotion(trials, 4, None, last=True, best=best) is None


def test_the_next_promotion_is_what_the_front_would_miss_most_or_the_next_best() -> None:
    """Bytes fall by one with the number, so what a point adds to the area is log of its neighbour's quality over its own:
    most for 6, whose neighbour is the largest, 9 / 6.
    """
    qualities = (3.0, 3.01, 4.0, 4.01, 5.0, 5.5, 6.0, 9.0)
    trials = [trial(n, "search", quality=q) for n, q in enumerate(qualities)]
    done = [*trials, Trial(8, Wish((0,), 12, "promoted"), "complete", 100, 2.5, 30.0)]
    assert standing.promotion(done, 4, 12, last=False, best=True) == (1,)
    assert standing.promotion(done, 4, 12, last=False, best=False) == (6,)


def test_the_front_is_of_the_longest_trials() -> None:
    short = [trial(n, "search", quality=q) for n, q in enumerate((1.0, 2.0))]
    long = [trial(n, "promoted", 12, quality=q) for n, q in enumerate((3.0, 3.5, 3.4))]
    assert [t.wish.configuration for t in standing.front([*short, *long])] == [(2,), (0,)]
    assert standing.front([trial(0, "search", seconds=None)]) == []
