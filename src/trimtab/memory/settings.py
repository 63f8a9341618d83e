"""Which settings fit into a memory: for each method and width, the most of what a recipe asks for.

    bits      those of the recipe and fewer        rows with more come first: rounding costs least there
    length    that of the recipe, halved           then those with longer sequences
    rank      that of the recipe, halved           of one row the largest that fits, before
    batch     sequences in a forward pass          the largest that fits: it changes the speed alone

The recipe's own method stands before others of the same width and length, methods that fold into low-bit codes before those
that stay adapters. Nothing above what the recipe asks for is proposed.

A plan of each combination would take minutes. Where all decoder blocks are alike, two of them are laid out and stand for
all (`peak_of(more=)`), and what autograd keeps grows evenly with tokens, positions and blocks; so the numbers are those of
`plan`, with the model's own attention; of several processes they are those of one of them. Of a model with sliding windows
it does not (their masks are squares), and each combination is laid out by itself.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab import methods
from trimtab.errors import UserError
from trimtab.formats.export_size import export_sizes
from trimtab.memory.parted import count_of, parted
from trimtab.memory.peak import Plan, kept_for_backward, lay_out_for_training, peak_of
from trimtab.memory.plan import teaching
from trimtab.methods import Method
from trimtab.models import decoder
from trimtab.models.architecture import architecture_of
from trimtab.models.asked import windowed
from trimtab.models.opening import open_layers
from trimtab.models.targets import Target, placed_targets
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, of_width
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Placement, Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("lr-qat", "qa-hira", "peqa", "qat", "q-bara", "qlora")
"""Proposed beside the recipe's own, in this order."""
BITS = (4, 3, 2)
"""Widths that are tried below the recipe's."""
_SHORTEST, _LEAST_RANK, _TOKENS = 256, 4, 64


@dataclass(frozen=True)
class Setting:
    """One that fits."""

    method: str
    grid: str
    """Of its linear layers: `int4 g64 symmetric`."""
    bits: int
    rank: int | None
    """None for a method that has none."""
    block_tokens: int
    micro_batch: int
    total: int
    """Predicted peak of training, in bytes."""
    file_bytes: int
    """Of the tuned model in the native format."""


@dataclass(frozen=True)
class Settings:
    """What fits."""

    rows: tuple[Setting, ...]
    """The best first."""
    least: int
    """The smallest peak of all that was tried, in bytes."""
    left_out: tuple[str, ...]
    """Methods that the model's shapes or the recipe's grids do not admit, and why."""


def settings(recipe: Recipe, model: "PreTrainedModel", memory: int) -> Settings:
    """The settings that fit.

    Args:
        recipe: what is asked for.
        model: laid out on the meta device (`ModelSource.layout`); two of its blocks are left where they are alike.
        memory: bytes for training, above the interpreter and its libraries.
    """
    _check_batch(recipe)
    skeleton = _Skeleton(recipe, model)
    rows, left_out, least = list[Setting](), list[str](), list[int]()
    for name in dict.fromkeys((recipe.method.name, *METHODS)):
        for bits in dict.fromkeys((skeleton.bits, *(b for b in BITS if b < skeleton.bits))):
            try:
                candidate = _Candidate(skeleton, name, bits)
                row = candidate.best(memory)
            except UserError as error:
                left_out.append(f"{name} at {bits} bits: {error}")
                continue
            rows += [] if row is None else [row]
            least.append(candidate.least)
    own = [recipe.method.name, *METHODS]
    rows.sort(key=lambda row: (-row.bits, -row.block_tokens, own.index(row.method), -(row.rank or 0)))
    return Settings(tuple(rows), min(least, default=0), tuple(left_out))


def _check_batch(recipe: Recipe) -> None:
    """Raise a `UserError` where no length that is tried gives each of several processes a whole number of sequences."""
    batch, count = recipe.train.batch_tokens, count_of(recipe)
    lengths = list(_halves(_asked_tokens(recipe), _SHORTEST))
    if any(max(batch // length, 1) % count == 0 for length in lengths):
        return
    fits = -(-batch // (count * lengths[0])) * count * lengths[0]
    raise UserError(
        f"train.batch_tokens: {batch} is the batch of all {count} processes, and gives them no whole number of sequences "
        f"of {lengths[0]} tokens or fewer each; set train.batch_tokens={fits}"
    )


def _asked_tokens(recipe: Recipe) -> int:
    return 1024 if recipe.data is None else recipe.data.block_tokens


class _Kept(NamedTuple):
    """Bytes that autograd keeps between forward and backward."""

    token: float
    """Of each token."""
    position: float
    """Of each position, whatever the batch: rotary embeddings."""
    always: float
    """Whatever is read: factors in another dtype."""

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "_Kept":
        """From three passes: of some tokens, of twice as many in one sequence, and in two."""
        some, long, two = (kept_for_backward(model, b, n) for b, n in ((1, _TOKENS), (1, 2 * _TOKENS), (2, _TOKENS)))
        return cls((two - some) / _TOKENS, (long - two) / _TOKENS, 2 * some - long)

    def bytes(self, tokens: int, positions: int) -> int:
        """Of a batch."""
        return round(self.token * tokens + self.position * positions + self.always)


class _Skeleton:
    """A model of two decoder blocks, of which the second stands for all others, where they are alike; else all of it."""

    def __init__(self, recipe: Recipe, model: "PreTrainedModel") -> None:
        self.recipe, self.model, self.teaching, self.count = recipe, model, teaching(recipe), count_of(recipe)
        open_layers(model)
        self.asked = placed_targets(model, recipe.method, recipe.rules)
        blocks = list(decoder.blocks(model)) if architecture_of(model).blocks else []
        self.even = not _has_masks(model.config.get_text_config())
        """Whether what autograd keeps grows evenly."""
        self.more = len(blocks) - 2 if self.even and len(blocks) > 2 and _alike(model, self.asked) else 0
        if self.more:
            decoder.set_blocks(model, blocks[:2])
            there = {name for name, _ in model.named_modules()}
            self.asked = [target for target in self.asked if target.name in there]
        self.kept: dict[Any, _Kept] = {}
        """What autograd keeps (see `_Laid`), by what decides it: the width of codes does not."""

    @property
    def bits(self) -> int:
        """The width of most weights of linear layers; 4 where they are in float."""
        counts: dict[int, int] = {}
        for target in self.asked:
            if target.kind == "linear" and target.grid is not None:
                counts[target.grid.bits] = counts.get(target.grid.bits, 0) + target.shape[0] * target.shape[1]
        return max(counts, key=lambda bits: counts[bits], default=4)

    def summed(self, count: "Callable[[PreTrainedModel], float]") -> float:
        """Of the whole model, what is counted in the same way of each block; the model is one of `fresh`'s."""
        model = self.fresh()
        found = count(model)
        if self.more:
            decoder.set_blocks(model, list(decoder.blocks(model))[:1])
            found += self.more * (found - count(model))
        return found

    def fresh(self) -> "PreTrainedModel":
        """A copy to lay out for training."""
        return copy.deepcopy(self.model)


class _Candidate:
    """A method at one width."""

    def __init__(self, skeleton: _Skeleton, name: str, bits: int) -> None:
        recipe = skeleton.recipe
        own = name == recipe.method.name
        self._skeleton, self._recipe, self._bits = skeleton, recipe, bits
        self._method: Method = recipe.method if own else methods.make(name)
        self._rank: int | None = getattr(self._method, "rank", None)
        if self._rank is not None:
            self._rank = getattr(recipe.method, "rank", self._rank)
        self._rules = _rules(skeleton.asked, own, self._method, bits)
        self._laid: dict[int | None, _Laid] = {}
        self.least = 0
        """The smallest peak that was tried, in bytes."""

    def best(self, memory: int) -> Setting | None:
        """The longest sequences that fit, then the largest rank, then the largest batch; None if none do."""
        for length in _halves(_asked_tokens(self._recipe), _SHORTEST):
            for rank in [None] if self._rank is None else _halves(self._rank, _LEAST_RANK):
                sizes = {batch: self._total(rank, length, batch) for batch in self._batches(length)}
                fits = [batch for batch, total in sizes.items() if total <= memory]
                if fits:
                    return self._setting(rank, length, max(fits), sizes[max(fits)])
        return None

    def _batches(self, length: int) -> list[int]:
        """Sequences of a forward pass, of which a whole number makes an optimizer step."""
        whole = max(self._recipe.train.batch_tokens // length, 1)
        return [b for b in (1, 2, 4, 8, 16, 32, 64) if whole % (b * self._skeleton.count) == 0]

    def _total(self, rank: int | None, length: int, batch: int) -> int:
        if rank not in self._laid:
            method = self._method if rank is None else replace(self._method, rank=rank)  # type: ignore[call-arg]
            self._laid[rank] = _Laid(self._skeleton, method, self._rules)
        total = self._laid[rank].plan(length, batch).total
        self.least = min(self.least or total, total)
        return total

    def _setting(self, rank: int | None, length: int, batch: int, total: int) -> Setting:
        laid, recipe = self._laid[rank], self._recipe
        grid = next((t.grid for t in laid.targets if t.kind == "linear"), None)

        def stored(model: "PreTrainedModel") -> float:
            there = {name for name, _ in model.named_modules()}
            targets = [target for target in laid.targets if target.name in there]
            about: dict[str, Any] = {"merge": recipe.merge, "activations": recipe.activations, "only": ("native",)}
            size = export_sizes(model, targets, laid.method, dtype=recipe.dtype, **about)["native"]
            assert isinstance(size, int), "native holds everything"
            return size

        described = "float" if grid is None else grid.describe()
        file_bytes = round(self._skeleton.summed(stored))
        return Setting(self._method.name, described, self._bits, rank, length, batch, total, file_bytes)


def _halves(most: int, least: int) -> Iterator[int]:
    """A number, its half, and so on, down to `least`; the number itself at any rate."""
    yield most
    while (most := most // 2) >= least:
        yield most


def _rules(asked: Sequence[Target], own: bool, method: Method, bits: int) -> list[Rule]:
    """A rule for each layer: as the recipe's, its linear layers no wider than `bits`, on grids that the method takes."""
    group = next((t.grid.group for t in asked if t.kind == "linear" and isinstance(t.grid, Grid)), None)
    found = []
    for target in asked:
        grid: Placement = target.grid if target.grid is not None else "float"
        if target.kind == "tied":
            continue
        if target.kind == "linear":
            grid = _narrowed(grid if own else _default(method, grid, group), bits)
        found.append(Rule(target.name, grid, target.rank if hasattr(method, "rank") else None))
    return found


def _default(method: Method, asked: Placement, group: int | None) -> Placement:
    """The grid of another method than the recipe's: its own, in the recipe's groups where both are affine."""
    grid = method.grid
    return replace(grid, group=group) if isinstance(grid, Grid) and isinstance(asked, Grid) else grid


def _narrowed(grid: Placement, bits: int) -> Placement:
    if isinstance(grid, CodebookGrid):
        of_width(grid, bits)  # of a width that no table has it says so
    return of_width(grid, min(grid.bits, bits)) if isinstance(grid, Grid | CodebookGrid) else grid


class _Laid:
    """A method, its grids and its rank on a model, laid out once: the peak of training for any length and batch."""

    def __init__(self, skeleton: _Skeleton, method: Method, rules: Sequence[Rule]) -> None:
        self._skeleton, self.method, recipe = skeleton, method, skeleton.recipe
        self._model = skeleton.fresh()
        self.targets = placed_targets(self._model, method, rules)
        options: dict[str, Any] = {"dtype": recipe.dtype, "activations": recipe.activations, "kv": recipe.kv}
        lay_out_for_training(self._model, method, rules, **options)
        self._decides = method, tuple((t.name, _without_bits(t.grid)) for t in self.targets)

    def _kept(self, block_tokens: int, micro_batch: int) -> int:
        """Bytes that autograd keeps of a batch."""
        known, even = self._skeleton.kept, self._skeleton.even
        key = (self._decides, None if even else (block_tokens, micro_batch))
        if key not in known:
            exact = None if even else kept_for_backward(self._model, micro_batch, block_tokens)
            known[key] = self._measured() if exact is None else _Kept(0, 0, exact)
        return known[key].bytes(micro_batch * block_tokens, block_tokens)

    def _measured(self) -> "_Kept":
        """What autograd keeps of the whole model: of one block and of two, and from these of all."""
        found, more = _Kept.of(self._model), self._skeleton.more
        if more:
            blocks = list(decoder.blocks(self._model))
            decoder.set_blocks(self._model, blocks[:1])
            first = _Kept.of(self._model)
            decoder.set_blocks(self._model, blocks)
            found = _Kept(*(two + more * (two - one) for one, two in zip(first, found, strict=True)))
        return found

    def plan(self, block_tokens: int, micro_batch: int) -> Plan:
        """The plan for this length and batch."""
        recipe, tokens, count = self._skeleton.recipe, micro_batch * block_tokens, self._skeleton.count
        planned = peak_of(
            self._model,
            self._kept(block_tokens, micro_batch),
            tokens=tokens,
            dtype=recipe.dtype,
            checkpointing=recipe.train.activation_checkpointing,
            micro_batches=max(recipe.train.batch_tokens // (tokens * count), 1),
            moment_bytes=recipe.train.moment_bytes,
            teaching=self._skeleton.teaching(tokens),
            more=self._skeleton.more,
        )
        return parted(planned, self._model, count) if count > 1 and recipe.train.shard == "fsdp" else planned


def _has_masks(config: Any) -> bool:
    """Whether some layers see less than all that came before a token."""
    kinds = getattr(config, "layer_types", None) or []
    return any(windowed(config)) or any(kind != "full_attention" for kind in kinds)


def _without_bits(grid: AnyGrid | None) -> Any:
    if isinstance(grid, Grid):
        return grid.group, grid.zero, grid.scale_dtype
    return None if grid is None else (grid.group, grid.double_quant)


def _alike(model: "PreTrainedModel", targets: Sequence[Target]) -> bool:
    """Whether all decoder blocks have the same tensors, and the same layers on the same grids."""
    placed = {t.name: (t.shape, t.grid, t.rank) for t in targets}
    seen = set()
    for block in decoder.block_names(model):
        module = model.get_submodule(block)
        shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
        layers = tuple((name, placed.get(f"{block}.{name}")) for name, _ in module.named_modules())
        seen.add((shapes, layers))
    return len(seen) == 1
