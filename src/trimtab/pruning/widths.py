"""How many KV groups and MLP channels every layer keeps.

Widths are uniform over layers, so that the result is an ordinary checkpoint of its own architecture, which every engine
loads. A ratio then leaves one choice: for every number of groups H there is a largest number of channels I(H) that removes
enough, rounded down to a multiple of the quantization group. Of these pairs the one is taken that loses the least

    lost(H, I) = the model's loss on the calibration text without what each layer gives up, its least important ones

measured, a forward pass for each pair, since first-order scores of groups and of channels do not compare: a group's is one
sum in which much cancels, that of many channels a sum of absolute values. On SmolLM2-135M they gave up two of three groups
in every layer. Without text, magnitudes summed over what is given up must do. Layers in `keep` cannot be spared, widths
being uniform; but where some are named, only what they give up counts in this choice. Random scores say nothing about it:
there the pair is taken that takes most nearly the same share from both.

What is cut stays in whole quantization groups: channels are a multiple of `multiple_of`, and so are the inputs of o where
heads go. Heads stay where an engine would not find `head_dim`: vLLM and mlx-lm compute Qwen2's as hidden size / heads.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trimtab.errors import UserError
from trimtab.models.architecture import architecture_of
from trimtab.pruning.importance import Importance, Scores
from trimtab.pruning.structures import Layout, Widths


def describe(config: Any, about: Layout, widths: Widths) -> Any:
    """A copy of a config with these widths, and `head_dim` written out."""
    values = {
        "num_attention_heads": widths.groups * about.heads_per_group,
        "num_key_value_heads": widths.groups,
        "head_dim": about.head_dim,
        "intermediate_size": widths.channels,
    }
    made = copy.deepcopy(config)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _loads(config: Any, about: Layout, widths: Widths) -> bool:
    """Whether engines take such a config: transformers wants heads of Llama and Gemma to divide the hidden size."""
    made = describe(config, about, widths)
    if architecture_of(made).implied_head_dim and made.num_attention_heads * made.head_dim != made.hidden_size:
        return False
    check = getattr(made, "validate_architecture", None)
    try:
        if check is not None:
            check()
    except ValueError:
        return False
    return True


def parameters(about: Layout, widths: Widths) -> int:
    """Parameters of the model with these widths."""
    groups, channels = about.widths.groups - widths.groups, about.widths.channels - widths.channels
    return about.parameters - about.layers * (groups * about.group_parameters + channels * about.channel_parameters)


def pairs(config: Any, about: Layout, remove: int, multiple_of: int) -> list[Widths]:
    """For each number of groups that the architecture can have, the most channels that remove `remove` parameters."""
    found, all_ = [], about.widths
    if remove <= 0:
        return [all_]
    for groups in range(all_.groups, 0, -1):
        widths = replace(all_, groups=groups)
        short = max(remove - (about.parameters - parameters(about, widths)), 0)
        gone = -(-short // (about.layers * about.channel_parameters))
        widths = replace(widths, channels=(all_.channels - gone) // multiple_of * multiple_of)
        whole = groups == all_.groups or groups * about.heads_per_group * about.head_dim % multiple_of == 0
        if widths.channels > 0 and whole and _loads(config, about, widths):
            found.append(widths)
    return found


def choose(
    config: Any,
    about: Layout,
    scores: Sequence[Scores],
    kind: Importance,
    *,
    remove: int,
    multiple_of: int,
    keep: Sequence[int],
    measure: Callable[[Widths], float] | None = None,
) -> Widths:
    """The widths that remove at least `remove` parameters and lose the least: by `measure` if given, else by scores.

    Raises:
        UserError: if no widths remove so many.
    """
    found = pairs(config, about, remove, multiple_of)
    if not found:
        raise UserError(
            f"prune: cannot remove {remove:,} of {about.parameters:,} parameters by widths in multiples of {multiple_of}, "
            f"from {about.widths.groups} KV groups and {about.widths.channels} channels a layer; remove less, use a "
            "smaller multiple_of, or drop layers"
        )
    if kind == "random":
        return min(found, key=lambda w: abs(w.groups / about.widths.groups - w.channels / about.widths.channels))
    if measure is not None:
        return found[0] if len(found) == 1 else min(found, key=measure)
    counted = [scores[i] for i in keep] or scores
    return min(found, key=lambda w: sum(_lost(s, w) for s in counted))


def _lost(scores: Scores, widths: Widths) -> float:
    lost = 0.0
    for values, kept in ((scores.groups, widths.groups), (scores.channels, widths.channels)):
        lost += values.sort().values[: len(values) - kept].sum().item()
    return lost
