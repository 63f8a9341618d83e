"""A search from a recipe: lay out, measure sensitivities once, then trial after trial until there are enough.

    space, prior -> claim -> trial -> told -> claim ...        by one process or many, on one machine or more

Whatever runs this on the same storage works on the same study; what is finished stays finished whatever happens to a
process. The order of wishes is: uniform widths, for comparison; then one promotion for every four short trials, of the
best one and of those that the short front would lose most without (under a budget the next best); else what `proposal`
proposes. The last is the best short trial's promotion, if it had none: the result is chosen of promoted ones.
"""

import copy
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.bit_search import mark, standing
from trimtab.bit_search.additive import Configuration, front
from trimtab.bit_search.bench import Bench, Objective
from trimtab.bit_search.folder import own
from trimtab.bit_search.hypervolume import hypervolume
from trimtab.bit_search.ledger import DIED, Ledger, Trial, Wish
from trimtab.bit_search.objective import for_every_width
from trimtab.bit_search.proposal import Problem, Tried, propose
from trimtab.bit_search.space import Space, space, units
from trimtab.bit_search.storage import Away, shown
from trimtab.devices import beside_tensors
from trimtab.errors import Diverged, UserError
from trimtab.formats.export import check_exports
from trimtab.formats.file_size import float_bytes, parse_bytes
from trimtab.memory.plan import plan
from trimtab.memory.process import memory_errors
from trimtab.models.opening import open_layers
from trimtab.models.positions import require_length
from trimtab.models.sources import open_source
from trimtab.models.targets import placed_targets, targets
from trimtab.quant.grid import AnyGrid
from trimtab.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BEAT_SECONDS = 30.0
_LOOK_SECONDS = 1.0
_LIMITED = "budget_training "
"""Begins the key of every training budget that trials of a study were made under."""
_RANK_GAIN = 0.1
"""Share of a unit's cost that each doubling of its rank is taken to repair, before trials say better."""


class WorkerDied(Exception):
    """Who made a trial was killed, or its machine was lost: the trial is made again."""


class Search:
    """One search: what may be chosen, what was tried, what comes next.

    Args:
        recipe: with a `search` block; its model is in float.
        device: where this process measures; None is the recipe's.
    """

    def __init__(self, recipe: Recipe, device: str | None = None) -> None:
        assert recipe.search is not None
        assert recipe.data is not None
        self.block = recipe.search
        self.workers = self.block.workers or len(self.block.devices or (None,))
        source = open_source(recipe.model.path)
        if source.prepared:
            raise UserError(f"{recipe.model.path}: already quantized; a search starts from the float model")
        self._skeleton = source.layout()
        open_layers(self._skeleton)
        require_length(self._skeleton, recipe.data.block_tokens, "data.block_tokens")
        others, template = recipe.rules or [], _template(self._skeleton, recipe, self.block.units)
        self.recipe = for_every_width(recipe, template)
        # What others are told (points, marks) names no worker's device.
        self.bench = Bench(self.recipe.on(device) if device else self.recipe, source)
        self.space: Space = space(
            copy.deepcopy(self._skeleton),
            recipe.method,
            bits=self.block.bits,
            grid=template,
            ranks=self.block.ranks,
            by=self.block.units,
            others=others,
            dtype=recipe.dtype,
            merge=recipe.merge,
            activations=recipe.activations,
            size_of=self.block.budget_of,
        )
        self._check_exports()
        self.doubtful = 0
        """Trials of other hosts that may never end: whether they do is being waited for."""
        self._peaks: dict[Configuration, int] = {}
        self.budget = None if self.block.budget is None else parse_bytes(self.block.budget, "search.budget")
        if self.budget is not None:
            front(self.space.bytes_UC, np.zeros(self.space.bytes_UC.shape), fixed=self.space.fixed_bytes).within(
                self.budget
            )
        self._check_training_budget()
        self.float_bytes = float_bytes(self._skeleton)
        self.folder = recipe.out / "search"
        url = self.block.storage or str(self.folder / "journal.log")
        own(self.folder, url)
        names = [unit.name for unit in self.space.units]
        self.ledger = Ledger(url, recipe.name, names, len(self.space.bits))
        mark.check_study(self.ledger, self.recipe, self.space, shown(self.block.storage or str(self.folder)))
        self.ledger.note(f"{_LIMITED}{self.budget_training}", True)  # a key of its own: others may note theirs now

    def _check_training_budget(self) -> None:
        """Refuse a training budget that not even the smallest widths fit."""
        block = self.block
        self.budget_training = (
            None if block.budget_training is None else parse_bytes(block.budget_training, "search.budget_training")
        )
        if self.budget_training is None or None in self.space.placements:  # what is left untouched trains in less yet
            return
        smallest = tuple(int(c) for c in self.space.bytes_UC.argmin(1))
        if self._peak(smallest) > self.budget_training:
            raise UserError(
                f"search.budget_training: training takes {self._peak(smallest):,} bytes at the smallest widths, more than "
                f"{self.budget_training:,}; allow more, or lower train.micro_batch or data.block_tokens"
            )

    def _check_exports(self) -> None:
        """Refuse what a format of the recipe cannot hold: a width, or several widths in one model."""
        units, choices = range(len(self.space.units)), range(len(self.space.bits))
        uniform = [tuple(c for _ in units) for c in choices]
        mixed = tuple(u % len(choices) for u in units)
        for configuration in dict.fromkeys([*uniform, mixed]):
            rules = self.space.rules(configuration)
            placed = placed_targets(self._skeleton, self.recipe.method, rules)
            if placed:
                check_exports(self.recipe.model_copy(update={"rules": rules}), placed, self._skeleton.config)

    # ---- what trials are measured by ---------------------------------------------------------------------------------

    def prepare(self) -> None:
        """What is made once for a study: sensitivities, and a teacher's cache where trials learn from one."""
        _ = self.problem
        self.bench.teach()

    @cached_property
    def problem(self) -> Problem:
        """Space, prior and budget; sensitivities are measured once for a study."""
        if self.ledger.noted("prior") is None:
            for key, value in self.bench.prior(self.space).items():
                self.ledger.note(key, value)
        noted = self.ledger.noted("prior")
        gain = [
            1.0 if r is None else (1 - _RANK_GAIN) ** np.log2(r / min(self.block.ranks or (r,)))
            for r in self.space.ranks
        ]
        within = [] if self.budget is None else self._uniform_within()
        bound = max(within, key=self.space.bytes, default=None)
        cost = np.array(noted) * np.array(gain)
        adapter = self.recipe.method.adapter
        if self.block.objective == "tuned" and adapter is not None and adapter.acts_in_codes:
            # Training codes and scales repairs small roundings better than large ones: KL goes with the square of a step,
            # what is left of it falls faster; the third power fits best, by little (benchmarks/search/repair.py).
            cost = cost * 0.5 ** np.array(self.space.bits)
        return Problem(cost, self.space.bytes_UC, self.space.fixed_bytes, self.budget, bound)

    # ---- what comes next -------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Of a short trial."""
        return self.block.steps if self.block.objective == "tuned" else 0

    def admits(self, configuration: Configuration) -> bool:
        """Whether there is something to quantize or train in it, and its training fits the training budget."""
        if all(self.space.placements[choice] in (None, "float") for choice in configuration):
            placed = placed_targets(self._skeleton, self.recipe.method, self.space.rules(configuration))
            low = any(t.grid is not None and t.kind == "linear" for t in placed)
            if not placed or (self.recipe.activations is not None and not low):
                return False
        return self.budget_training is None or self._peak(configuration) <= self.budget_training

    def _peak(self, configuration: Configuration) -> int:
        if configuration not in self._peaks:
            rules = self.space.rules(configuration)
            planned = plan(self.recipe, copy.deepcopy(self._skeleton), rules).total
            self._peaks[configuration] = planned + beside_tensors(self.recipe.device.type)
        return self._peaks[configuration]

    def uniform(self) -> list[Configuration]:
        """The uniform choices within the budgets."""
        return [c for c in self._uniform_within() if self.admits(c)] if self.block.uniform else []

    def _uniform_within(self) -> list[Configuration]:
        every = [(c,) * len(self.space.units) for c in range(len(self.space.bits))]
        return [c for c in every if self.budget is None or self.space.bytes(c) <= self.budget]

    def wish(self, trials: list[Trial]) -> Wish | None:
        """The next trial, or None if there are enough."""
        counted = [t for t in trials if t.counts] + standing.hopeless(trials)
        inside = self._inside(counted)
        taken = {(t.wish.configuration, t.wish.steps) for t in counted}
        for configuration in self.uniform():
            if (configuration, self.steps) not in taken:
                return Wish(configuration, self.steps, "uniform")
        left = self.block.trials - sum(t.wish.kind != "uniform" for t in inside)
        if left <= 0:
            return None
        promoted = self._promotion(inside, last=left == 1)
        if promoted is not None:
            return promoted
        tried = [
            Tried(
                t.wish.configuration,
                t.quality,
                int(t.wish.steps != self.steps),
                failed=t.state in ("infeasible", "dead"),
                proposed=t.wish.kind == "search",
            )
            for t in counted
        ]
        found = propose(self.problem, tried, seed=self.block.seed, admits=self.admits)
        return self._promotion(inside, last=True) if found is None else Wish(found, self.steps)

    def _inside(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those within the budgets: a study may have trials from before they were lowered, which teach but do not count."""
        within = [t for t in trials if self.budget is None or self.space.bytes(t.wish.configuration) <= self.budget]
        if self.ledger.keys(_LIMITED) == [f"{_LIMITED}{self.budget_training}"]:
            return within  # a plan takes seconds, and none of them was made under another budget
        return [t for t in within if self.admits(t.wish.configuration)]

    def _promotion(self, inside: list[Trial], *, last: bool) -> Wish | None:
        longer = self.block.promote
        found = standing.promotion(inside, self.steps, longer, last=last, best=self.budget is not None)
        return None if found is None or longer is None else Wish(found, longer, "promoted")

    # ---- work ------------------------------------------------------------------------------------------------------

    def work(self, told: Callable[[], None] = lambda: None) -> None:
        """Make trials until there are enough; `told` is called before and after each."""
        self.prepare()
        self.ledger.where = f"{socket.gethostname()} {self.bench.recipe.device}"
        if not self.more(told):
            return
        # Before there is a claim: a failure to load is not one of a trial, and no lease waits for it.
        objective = self.bench.objective()
        while self.more(told):
            while (trial := self.claim()) is not None:
                told()
                with beating(self.ledger, trial):
                    self.settle(trial, partial(timed, objective, self.space.rules(trial.wish.configuration), trial))
                told()
        self.bench.free()

    def more(self, told: Callable[[], None] = lambda: None) -> bool:
        """Whether there is a trial to make.

        A trial that runs on another host is as good as made if that host is alive, and to be made again if it is not:
        nobody leaves before each has shown a new beat, or has shown none for the time of a lease.
        """
        doubtful: dict[int, float] | None = None
        while True:
            self.ledger.bury()
            if self.wish(self.ledger.trials()) is not None:
                self.doubtful = 0
                return True
            beats = self.ledger.beats()
            doubtful = beats if doubtful is None else {n: b for n, b in doubtful.items() if beats.get(n) == b}
            self.doubtful = len(doubtful)
            if not doubtful:
                return False
            told()
            time.sleep(_LOOK_SECONDS)

    def claim(self) -> Trial | None:
        """The next trial, taken; None if there are enough."""
        return self.ledger.claim(self.wish, self._limit())

    def _limit(self) -> int:
        """Trials, but for the uniform ones, that the study may have: those of an earlier, larger budget come on top."""
        tried = [t for t in self.ledger.trials() if t.counts and t.wish.kind != "uniform"]
        return self.block.trials + len(tried) - len(self._inside(tried))

    def settle(self, trial: Trial, measure: Callable[[], tuple[float, float]]) -> None:
        """Write down what becomes of a trial.

        Args:
            trial: that was claimed.
            measure: gives its quality, and the seconds that it took; raises `WorkerDied`, or what a trial may end with.

        Raises:
            Exception: what `measure` raised, if that ends more than this trial.
        """
        ended = False
        try:
            with memory_errors():
                quality, seconds = measure()
            self.ledger.finish(trial, self.space.bytes(trial.wish.configuration), quality, seconds)
            ended = True
        except (Diverged, MemoryError, torch.OutOfMemoryError) as error:
            what = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.ledger.fail(trial, "infeasible", what + " ".join(str(error).split()))
            ended = True
        except WorkerDied:
            self.ledger.fail(trial, "dead", DIED)
            ended = True
        finally:
            end = sys.exc_info()[1]
            if not ended and not isinstance(end, Away):  # a storage that is away cannot be told
                why = f"ended the search: {type(end).__name__}: {end}" if isinstance(end, Exception) else "interrupted"
                self.ledger.fail(trial, "dead", " ".join(why.split()))

    # ---- what was found --------------------------------------------------------------------------------------------

    def front(self, trials: Sequence[Trial]) -> list[Trial]:
        """The Pareto front of the longest trials within the budgets, by ascending bytes: the last is the best."""
        return standing.front(self._inside(trials))

    def hypervolume(self, trials: Sequence[Trial]) -> float:
        """Of log quality against bytes, in nats times bytes; within the largest bytes and the worst uniform trial."""
        done = [t for t in self._inside(trials) if t.state == "complete" and t.wish.steps == self.steps]
        if not done:
            return 0.0
        size, cost = standing.arrays(done)
        worst = standing.arrays([t for t in done if t.wish.kind == "uniform"] or done)[1].max()
        largest = self.space.fixed_bytes + int(self.space.bytes_UC.max(1).sum())
        return hypervolume(size, cost, (float(min(largest, self.budget or largest)) + 1, float(worst)))

    def seconds_left(self, trials: Sequence[Trial]) -> float | None:
        """Until there are enough trials; None before the first is finished."""
        counted = [t for t in self._inside(trials) if t.counts]
        numbers = {"uniform": len(self.uniform()), "wanted": self.block.trials}
        left = standing.seconds_left(counted, self.steps, self.block.promote, **numbers)
        return None if left is None else left / self.workers

    def unmade(self, trials: Sequence[Trial]) -> str:
        """Why there are fewer trials than were asked for; "" if there are not."""
        inside = [t for t in self._inside(trials) if t.counts and t.wish.kind != "uniform"]
        running = sum(t.state == "running" for t in inside)
        if running:
            return f"{running} trials still run elsewhere; the same command adds them to the results when they are finished"
        if len(inside) >= self.block.trials:
            return ""
        return (
            f"{len(inside)} of {self.block.trials} trials were made: no other configuration was found to fit and be new"
        )


def _template(skeleton: "PreTrainedModel", recipe: Recipe, by: Any) -> AnyGrid:
    """The grid that gives every width its group and zero: that of the first layer searched over."""
    first = units(skeleton, by, recipe.rules or ())[0].layers[0]
    found = {t.name: t.grid for t in targets(skeleton, recipe.method, recipe.rules)}.get(first) or recipe.method.grid
    if found is None:
        raise UserError(f"search: {first} has no grid to take group and zero from; give it one in the rules")
    return found


def timed(objective: Objective, rules: Sequence[Any], trial: Trial) -> tuple[float, float]:
    """A trial's quality, and the seconds that it took."""
    began = time.perf_counter()
    return objective(rules, trial.wish.steps), time.perf_counter() - began


@contextmanager
def beating(ledger: Ledger, trial: Trial) -> Iterator[None]:
    """Renew the lease of a trial while it runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT_SECONDS):
            ledger.beat(trial)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
