"""What a run reads, as it writes it down: every file hashed once, before any weight is loaded."""

from pathlib import Path

from trimtab.evaluation.harness import file_of
from trimtab.models import contents
from trimtab.models import located as models
from trimtab.recipe import inputs
from trimtab.recipe.recipe import Recipe


def marks_of(recipe: Recipe) -> inputs.Marks:
    """Bytes and SHA-256 of every file that a recipe reads, by the key that names it."""
    marks: inputs.Marks = {}
    marks["model.path"] = contents.marks_of_model(recipe.model.path)
    if recipe.train.reference is not None:
        marks["train.reference"] = contents.marks_of_model(recipe.train.reference)
    if recipe.model.adapter is not None:
        marks["model.adapter"] = contents.marks_of_adapter(recipe.model.adapter)
    texts = inputs.texts_of(recipe.data) | ({"start.path": recipe.start.path} if recipe.start.path else {})
    marks |= {key: contents.marks_of_text(path) for key, path in texts.items()}
    if recipe.evaluate.tasks and recipe.evaluate.tasks_data is not None:
        folder = Path(recipe.evaluate.tasks_data).expanduser()
        marks["evaluate.tasks_data"] = inputs.mark([file_of(t, folder) for t in recipe.evaluate.tasks], folder)
    return {key: found for key, found in marks.items() if found}


def written_down(recipe: Recipe) -> Recipe:
    """The recipe as it is saved: from any directory it reads the same files, or says which changed."""
    reference = recipe.train.reference and models.pinned(recipe.train.reference)
    return inputs.saved(recipe, marks_of(recipe), models.pinned(recipe.model.path), models.pinned_data, reference)
