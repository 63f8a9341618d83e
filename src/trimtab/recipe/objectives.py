"""What a recipe may say beside an objective: which fields belong to which, and what each needs."""

from typing import TYPE_CHECKING

from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.recipe.recipe import Recipe

_OF = {
    "beta": ("dpo", "kto", "grpo"),
    "reference": ("dpo", "kto", "grpo"),
    "reward": ("grpo",),
    "generations": ("grpo",),
    "completion_tokens": ("grpo",),
}
"""Objectives that read a field of the `train` block."""


def check_objective(recipe: "Recipe", where: str) -> None:
    """Raise a `UserError` for a field that the objective does not read, or one that it lacks."""
    block, objective = recipe.train, recipe.train.objective
    defaults = type(block).model_fields
    for name, readers in _OF.items():
        if objective not in readers and getattr(block, name) != defaults[name].default:
            raise UserError(
                f"{where}: train.{name}: {objective} does not read it, {' and '.join(readers)} do; remove it"
            )
    if objective == "sft":
        return
    assert recipe.data is not None
    if recipe.data.packing not in ("auto", "none"):
        raise UserError(f"{where}: data.packing: {objective} packs no rows; leave it at auto")
    if block.epochs is not None:
        raise UserError(f"{where}: train.epochs: goes with objective: sft; give {objective} train.steps")
    if objective == "dpo" and block.micro_batch % 2:
        raise UserError(f"{where}: train.micro_batch: of dpo counts chosen and rejected answers; make it even")
    if objective == "kto" and block.micro_batch < 2:
        raise UserError(f"{where}: train.micro_batch: kto compares the answers of a micro-batch; use at least 2")
    if objective != "grpo":
        return
    if block.offload_activations:
        raise UserError(f"{where}: train.offload_activations: TRL's grpo has none; remove it")
    if block.reward is None:
        raise UserError(f"{where}: train.reward: missing; grpo needs one, such as rewards:correct (`module:function`)")
    if block.reference is not None and not block.beta:
        raise UserError(f"{where}: train.reference: grpo keeps to none at beta 0; set train.beta, for example 0.04")
    answers = block.batch_tokens // recipe.data.block_tokens
    if answers % block.generations:
        raise UserError(
            f"{where}: train.generations: {block.generations} answers to each prompt do not fill the {answers} answers of "
            "a step (batch_tokens / block_tokens); use a divisor"
        )


def check_stages(recipe: "Recipe", where: str) -> None:
    """Raise a `UserError` for what reads texts where the rows are those of another objective, trained or not."""
    objective = recipe.train.objective
    if objective == "sft":
        return
    for stage in ("distill", "search", "prune"):
        if getattr(recipe, stage) is not None:
            remedy = (
                "leave it out" if stage == "distill" else f"run it first, in a recipe of its own (`trimtab {stage}`)"
            )
            raise UserError(f"{where}: {stage}: goes with objective: sft, not with {objective}; {remedy}")
    assert recipe.data is not None
    if recipe.data.holdout:
        raise UserError(f"{where}: data.holdout: splits texts, not rows of {objective}; name data.eval_path")
