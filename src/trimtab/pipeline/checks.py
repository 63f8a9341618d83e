"""What a run needs before any weight is read: rows, tokens, tokenizer, and every check that can be made by then."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trimtab.bit_search.pinned import pinned
from trimtab.data.objectives import answers
from trimtab.data.sequences import check_tokens
from trimtab.data.sources import Texts
from trimtab.data.templates import set_template
from trimtab.devices import resolve
from trimtab.errors import UserError
from trimtab.evaluation.harness import check_tasks
from trimtab.extras import require
from trimtab.formats import writer
from trimtab.formats.export import check_exports, same
from trimtab.models.attention import check_attention
from trimtab.models.positions import check_length
from trimtab.models.sources import ModelSource, open_source
from trimtab.models.targets import targets
from trimtab.pipeline.output import Work
from trimtab.pipeline.starting import hint
from trimtab.recipe import inputs, texts
from trimtab.recipe.recipe import Recipe
from trimtab.training.build import RunContext, calibration
from trimtab.training.checkpoints import check_reached
from trimtab.training.held_out import held_out as while_training
from trimtab.training.teacher import check_teacher


def gather(recipe: Recipe, overwrite: bool, resume: bool) -> RunContext:
    """Read and check everything but weights.

    Raises:
        UserError: for anything the user can fix.
    """
    if recipe.prune is not None or recipe.search is not None:
        raise UserError("prune, search: these are stages before a run; `trimtab.run` and `trimtab run` carry out all")
    work = Work.of(recipe)
    check_apart(recipe, overwrite, resume)
    work.check(overwrite, resume)
    last = work.last()
    if resume and last is not None:
        check_reached(last, recipe)
    if recipe.data is not None and recipe.data.streaming:
        from trimtab.training.streaming import streamed

        recipe = streamed(recipe)
    read, held_out = _rows(recipe)
    rows = None if read is None else read.rows
    source = open_source(recipe.model.path)
    tokenizer = _tokenizer(recipe, source)
    template = set_template(tokenizer, None if recipe.data is None else recipe.data.template)
    _check_padding(recipe, source)
    layout = source.layout()
    _check_stages(recipe, source, layout)
    vocabulary, notes = layout.config.get_text_config().vocab_size, (*hint(recipe), *_check_length(recipe, layout))
    labelled = seen = None
    if rows is not None and recipe.train.steps:
        from trimtab.training.labelled import Labelled
        from trimtab.training.overview import overview
        from trimtab.training.trainer import ready

        labelled = ready(recipe, tokenizer, rows, vocabulary)
        if isinstance(labelled, Labelled):
            assert read is not None
            seen = overview(recipe, read, labelled, tokenizer, () if template is None else (template,))
            notes += (*seen.notes, *seen.lines())
        else:
            rows, notes = labelled.rows, notes + labelled.notes
    elif rows is not None and recipe.train.objective != "sft":
        rows = answers(rows, recipe.train.objective)
    blocks = _blocks(recipe, held_out, tokenizer)
    start = calibration(recipe, rows, tokenizer)
    where = "" if recipe.data is None else texts.key_of(recipe.data)
    for tokens, key in ((blocks, where), (None if start is None else start.tokens, "start.path")):
        check_tokens(tokens, tokenizer, vocabulary, key)
    watched = None
    if recipe.train.steps and recipe.train.evaluate_steps is not None:
        watched = while_training(recipe, tokenizer, held_out, vocabulary, blocks)
    learned = recipe.data.loss if recipe.data is not None and recipe.train.steps else "full"
    prompted = learned != "full" and held_out is not None and "prompt" in held_out.column_names
    return RunContext(source, tokenizer, rows, labelled, blocks, start, notes, watched, read, seen, prompted)


def check_extras(recipe: Recipe) -> None:
    """Raise a `UserError` for libraries or a device that a recipe's stages need and that are not here; the first check."""
    resolve(recipe.model.device)
    if recipe.search is not None:
        pinned(recipe)
    wanted = ["train"] if recipe.data is not None or recipe.start.path is not None else []
    wanted += ["gguf"] if recipe.model.path.endswith(".gguf") else []
    wanted += ["search"] if recipe.search is not None else []
    wanted += ["ray"] if recipe.search is not None and recipe.search.engine == "ray" else []
    wanted += ["eval"] if recipe.evaluate.tasks else []
    require("this recipe", *wanted)
    for name in recipe.export:
        writer(name)


def with_its_formats(recipe: Recipe) -> Recipe:
    """The recipe with the format that its base came in for `same` among its exports."""
    if "same" not in recipe.export:
        return recipe
    found = same(open_source(recipe.model.path))
    return recipe.model_copy(update={"export": list(dict.fromkeys(found if n == "same" else n for n in recipe.export))})


def check_apart(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse to write over, or to remove, what a recipe reads: all that goes is its output and what a stopped run left.

    Args:
        recipe: the recipe.
        overwrite: whether an earlier run goes.
        resume: whether one continues, by a recipe that may be the one that it saved.
    """
    work = Work.of(recipe)
    storage = inputs.paths(recipe).get("search.storage")
    own = ["search.storage"] if storage is not None and work.out / "search" in storage.parents else []
    own += ["the recipe"] if resume or not overwrite else []
    inputs.check_apart(recipe, (work.out, work.folder), but=own)


def _check_stages(recipe: Recipe, source: ModelSource, layout: PreTrainedModel) -> None:
    """Raise a `UserError` for what training, its teacher and the tasks would only complain of later."""
    from trimtab.training.options import check_training

    check_training(recipe)
    check_attention(layout, recipe.train.attention, recipe.dtype, recipe.device, recipe.kv is not None)
    check_exports(recipe, targets(layout, recipe.method, recipe.rules), layout.config)  # on names and shapes
    check_teacher(recipe, source)
    _check_reference(recipe, layout)
    if recipe.evaluate.tasks:
        check_tasks(recipe.evaluate.tasks, recipe.evaluate.tasks_data)


def _check_reference(recipe: Recipe, layout: PreTrainedModel) -> None:
    """Refuse a reference that is not a float model of the same tokens."""
    path = recipe.train.reference
    if path is None or not recipe.train.steps:
        return
    found = open_source(path)
    if found.prepared:
        raise UserError(f"train.reference: {path} was saved by trimtab; name a float model, or leave it out for step 0")
    theirs, ours = (c.get_text_config().vocab_size for c in (found.config(), layout.config))
    if theirs != ours:
        raise UserError(
            f"train.reference: {path} has {theirs} tokens, and the model that is trained {ours}; name its own"
        )


def _check_padding(recipe: Recipe, source: ModelSource) -> None:
    """Refuse a padding token that the embedding has no row for: the model could not be made."""
    config = source.config().get_text_config()
    pad, vocabulary = (getattr(config, key, None) for key in ("pad_token_id", "vocab_size"))
    if isinstance(pad, int) and isinstance(vocabulary, int) and pad >= vocabulary:
        raise UserError(
            f"model.path: {recipe.model.path}: pad_token_id is {pad}, but the model has {vocabulary} tokens; correct its "
            "config.json"
        )


def _check_length(recipe: Recipe, layout: PreTrainedModel) -> tuple[str, ...]:
    """Refuse sequences longer than the model has positions; a line where they are only longer than it was trained on."""
    line = None if recipe.data is None else check_length(layout, recipe.data.block_tokens, "data.block_tokens")
    return () if line is None else (line,)


def _rows(recipe: Recipe) -> tuple[Texts | None, Any]:
    """What is trained on and the held-out rows, read before any model is."""
    block = recipe.data
    if block is None:
        return None, None
    wanted = recipe.train.steps or (recipe.activations is not None and recipe.activations.mode == "static")
    read = texts.training_of(recipe) if wanted else None
    return read, texts.held_out(block, read) if read is not None or block.eval_path or block.holdout else None


def _tokenizer(recipe: Recipe, source: ModelSource) -> Any:
    path = recipe.model.path
    tokenizer = source.tokenizer()
    needs = recipe.data or recipe.evaluate.prompt or recipe.evaluate.tasks or recipe.start.name != "rtn"
    if tokenizer is None and needs:
        raise UserError(f"model.path: {path}: was saved without a tokenizer; add its tokenizer files to that directory")
    return tokenizer


def _blocks(recipe: Recipe, held_out: Any, tokenizer: Any) -> Tensor | None:
    """Held-out tokens (W, L)."""
    if recipe.data is None or held_out is None:
        return None
    return texts.windows_of(recipe.data, held_out, tokenizer)
