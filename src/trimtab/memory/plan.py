"""The memory that a recipe's training takes, before anything is loaded: `memory.plan` with all that a recipe asks for.

GPTQ has a phase of its own, before training. Beside what is stored it holds one block in float with the X^T X of its
layers' inputs, the hidden states of all windows before and after the block, and for the layer at hand three K x K in
float64 while H^-1 is factored, or some copies of its weight while columns are rounded.

So has a block-wise start: one block in float, and of its layers levels, their best, gradient and moments in float32, the
weights that they round to with their gradients, and one layer's rounding; hidden states of all windows twice (unless they
are on disk), and what one window keeps for backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from trimtab.memory.parted import count_of, parted, whole_while_loading
from trimtab.memory.peak import Plan, Teaching, peak_of_training
from trimtab.methods.rtn import Rtn
from trimtab.models import calibrate
from trimtab.models.architecture import architecture_of
from trimtab.models.prepare import prepare_meta
from trimtab.models.sources import open_layout
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import cast_floats
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule
from trimtab.training.divergence import LOGITS_CHUNK_TOKENS
from trimtab.training.teacher import int8_rules, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(recipe: Recipe, model: "PreTrainedModel", rules: Sequence[Rule] | None = None) -> Plan:
    """Predict the peak of a recipe's training: its teacher, rounded activations and cache, and accumulation included.

    Of several processes it is the peak of one.

    Args:
        recipe: whose method, data, training, distillation and simulations count.
        model: laid out on the meta device (`ModelSource.layout`); it is prepared in place.
        rules: in place of the recipe's.
    """
    train, block_tokens = recipe.train, recipe.data.block_tokens if recipe.data else 1024
    count = count_of(recipe)
    rules = recipe.rules if rules is None else rules
    if train.attention == "eager":  # it keeps what each token attends to
        model.set_attn_implementation("eager")
    working = _starting(recipe, model, rules)
    planned = peak_of_training(
        model,
        recipe.method,
        rules,
        micro_batch=train.micro_batch,
        block_tokens=block_tokens,
        dtype=recipe.dtype,
        checkpointing=train.activation_checkpointing,
        micro_batches=max(train.batch_tokens // (train.micro_batch * block_tokens * count), 1),
        moment_bytes=train.moment_bytes,
        teaching=teaching(recipe)(train.micro_batch * block_tokens),
        activations=recipe.activations,
        kv=recipe.kv,
    )
    if train.shard == "fsdp" and count > 1:
        planned = parted(planned, model, count)
        working += whole_while_loading(model) if working else 0
    before = planned.codes + planned.float_parameters + planned.adapters + working if working else 0
    return replace(planned, before=max(planned.before, before))


def _starting(recipe: Recipe, model: "PreTrainedModel", rules: Sequence[Rule] | None) -> int:
    """Bytes that a start works in, beside the model as far as it is stored."""
    if recipe.start.name == "rtn":
        return 0
    text, tokens = model.config.get_text_config(), recipe.start.tokens
    hidden = 2 * tokens * text.hidden_size * recipe.dtype.itemsize
    if recipe.start.name == "gptq":
        return _rounding_by_gptq(recipe, model, rules) + hidden
    shapes = {t.name: t.shape for t in targets(model, recipe.method, rules) if t.grid is not None}
    window = min(tokens, recipe.data.block_tokens if recipe.data else 1024)
    return (0 if recipe.start.on_disk else hidden) + max(
        _training_a_block(recipe, [shapes[name] for name in names], window)
        for names in calibrate.by_block(model, list(shapes)).values()
    )


def _training_a_block(recipe: Recipe, shapes: Sequence[tuple[int, int]], window: int) -> int:
    """Bytes of one block of a block-wise start, and of what its layers keep of a window for backward."""
    itemsize, shift, scales = recipe.dtype.itemsize, recipe.start.trains == "shift", recipe.start.trains == "scales"
    weights = sum(n * k for n, k in shapes)
    # In float and as float32: as it was read; levels; for shift the first of them, else two moments; gradient; best.
    copies = itemsize + (4 if scales else 16 if shift else 20)
    # What they round to, its gradient, and a second window's.
    copies += 3 * itemsize
    layer = max((n * k for n, k in shapes), default=0)
    activations = window * sum(n + k for n, k in shapes) * itemsize
    return weights * copies + 24 * layer + activations


def _rounding_by_gptq(recipe: Recipe, model: "PreTrainedModel", rules: Sequence[Rule] | None) -> int:
    """Bytes that GPTQ works in: of the block and layer that take most."""
    shapes = {t.name: t.shape for t in targets(model, recipe.method, rules) if t.grid is not None}
    itemsize, most, family = recipe.dtype.itemsize, 0, architecture_of(model)
    for names in calibrate.by_block(model, list(shapes)).values():
        # Layers that are fused are given the same input.
        inputs = {(name.rpartition(".")[0], family.fusion(name)): shapes[name][1] for name in names}
        floats = sum(n * k * itemsize for n, k in (shapes[name] for name in names))
        layer = max(
            (max(24 * k * k + 4 * n * k, 4 * k * k + 20 * n * k) for n, k in (shapes[name] for name in names)),
            default=0,
        )
        most = max(most, floats + sum(4 * k * k for k in inputs.values()) + layer)
    return most


def teaching(recipe: Recipe) -> Callable[[int], Teaching]:
    """What the teacher adds to a run's memory plan, by the tokens of a forward pass; nothing without a `distill` block."""
    if recipe.distill is None or not recipe.train.steps:
        return lambda _: Teaching()
    top_k, kind, model = recipe.distill.top_k, kind_of(recipe), open_layout(recipe.model.path).layout()
    dtype = torch.bfloat16 if kind == "bfloat16" else recipe.dtype
    cast_floats(model, dtype)
    text = model.config.get_text_config()
    head = text.vocab_size * text.hidden_size * dtype.itemsize
    if kind == "int8":
        prepare_meta(model, Rtn(), int8_rules(model))
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def of(tokens: int) -> Teaching:
        chunk = min(tokens, LOGITS_CHUNK_TOKENS) * text.vocab_size * 4
        states = tokens * text.hidden_size * dtype.itemsize
        if kind != "cached":
            # Of a chunk log p and p are there beside the student's logits and log q.
            return Teaching(resident=size, at_loss=states + 2 * chunk + (head if kind == "int8" else 0))
        kept = tokens * (6 * top_k + 2)
        # While the cache is made: logits, log p and one more; or one layer's widest activations.
        layer = 4 * tokens * max(text.hidden_size, getattr(text, "intermediate_size", 0)) * dtype.itemsize
        return Teaching(at_loss=kept + chunk, before=size + 2 * states + max(3 * chunk, layer))

    return of
