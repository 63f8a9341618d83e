"""What a run reads, as it writes it down: every file hashed once, before any weight is loaded."""

from pathlib import Path

from trimtab.data import located as data
from trimtab.evaluation.harness import file_of
from trimtab.models import located as models
from trimtab.recipe import inputs
from trimtab.recipe.recipe import Recipe


def marks_of(recipe: Recipe) -> inputs.Marks:
    """Bytes and SHA-256 of every file that a recipe reads, by the key that names it."""
    marks: inputs.Marks = {}
    model = models.resolve(recipe.model.path)
    marks["model.path"] = inputs.mark(models.files_of(recipe.model.path), model)
    if recipe.train.reference is not None:
        folder = models.resolve(recipe.train.reference)
        marks["train.reference"] = inputs.mark(models.files_of(recipe.train.reference), folder)
    if recipe.model.adapter is not None:
        folder = Path(recipe.model.adapter).expanduser()
        names = ("adapter_config.json", "adapter_model.safetensors")
        marks["model.adapter"] = inputs.mark([folder / n for n in names if (folder / n).is_file()], folder)
    texts = inputs.texts_of(recipe.data) | ({"start.path": recipe.start.path} if recipe.start.path else {})
    marks |= {key: inputs.mark(data.files_of(path), path) for key, path in texts.items()}
    if recipe.evaluate.tasks and recipe.evaluate.tasks_data is not None:
        folder = Path(recipe.evaluate.tasks_data).expanduser()
        marks["evaluate.tasks_data"] = inputs.mark([file_of(t, folder) for t in recipe.evaluate.tasks], folder)
    return {key: found for key, found in marks.items() if found}


def written_down(recipe: Recipe) -> Recipe:
    """The recipe as it is saved: from any directory it reads the same files, or says which changed."""
    reference = recipe.train.reference and models.pinned(recipe.train.reference)
    return inputs.saved(recipe, marks_of(recipe), models.pinned(recipe.model.path), models.pinned_data, reference)
