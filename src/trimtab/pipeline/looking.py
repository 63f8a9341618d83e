"""A recipe's data as training would see it, without a weight: the tokenizer and the embedding's size are enough."""

from trimtab.data.templates import set_template
from trimtab.errors import UserError
from trimtab.models.sources import open_source
from trimtab.recipe import texts
from trimtab.recipe.recipe import Recipe
from trimtab.training.labelled import label
from trimtab.training.overview import Overview, overview
from trimtab.training.streaming import streamed


def look(recipe: Recipe) -> Overview:
    """What training would see.

    Raises:
        UserError: for a recipe without data, and whatever in it the user can fix.
    """
    if recipe.data is None:
        raise UserError(f"{recipe.name}: data: missing; there is nothing to look at")
    if recipe.train.objective == "grpo":
        raise UserError(
            "train.objective: grpo learns from answers that the model will give; there is nothing to look at"
        )
    recipe = streamed(recipe)
    assert recipe.data is not None
    read = texts.training_of(recipe)
    source = open_source(recipe.model.path)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"model.path: {recipe.model.path}: was saved without a tokenizer; add its tokenizer files to it"
        )
    template = set_template(tokenizer, recipe.data.template)
    vocabulary = source.layout().config.get_text_config().vocab_size
    given = label(recipe, tokenizer, read.rows, vocabulary, preferences=True)
    return overview(recipe, read, given, tokenizer, () if template is None else (template,))
