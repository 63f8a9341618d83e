"""What a recipe reads: where it lies, what it held, and that nothing which is removed holds any of it.

A run writes its recipe with absolute paths (a hub id with its commit) and, under `inputs`, the SHA-256 and size of every
file that it read. So a reader of that recipe, from whatever directory, reads the same files or is told which changed.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from trimtab.data.hashes import digest
from trimtab.data.located import files_of
from trimtab.data.templates import NAMED
from trimtab.errors import UserError
from trimtab.outputs import resolved
from trimtab.recipe.fields import DataBlock, FileMark, SourceBlock
from trimtab.recipe.recipe import Recipe, read

Marks = dict[str, dict[str, FileMark]]
"""Of each key of a recipe that names files: what they held, by name in the folder that it names."""


def paths(recipe: Recipe) -> dict[str, Path]:
    """Everything on this machine that a recipe reads (a file, a directory), resolved, by key."""
    data, distill, search = recipe.data, recipe.distill, recipe.search
    named = {
        "model.path": recipe.model.path,
        "model.adapter": recipe.model.adapter,
        "start.path": recipe.start.path,
        "distill.cache": distill and recipe.teacher_cache and str(recipe.teacher_cache),
        "train.reference": recipe.train.reference,
        "evaluate.tasks_data": recipe.evaluate.tasks_data,
        "search.storage": search and _file_of_storage(search.storage),
        "the recipe": recipe.file,
    } | texts_of(data)
    local = {key: Path(path).expanduser() for key, path in named.items() if path}
    return {key: path.resolve() for key, path in local.items() if path.exists()}


def texts_of(data: DataBlock | None) -> dict[str, str]:
    """Everything that a data block reads, by key: its sources (`data.path`, or `data.path.0` and so on), held-out data, and
    the file of a chat template.
    """
    if data is None:
        return {}
    one = isinstance(data.path, str)
    found = {"data.path" if one else f"data.path.{i}": source.path for i, source in enumerate(data.sources)}
    found |= {} if data.eval_path is None else {"data.eval_path": data.eval_path}
    return found | ({} if template_file(data) is None else {"data.template": str(template_file(data))})


def template_file(data: DataBlock) -> Path | None:
    """The file of a chat template, if one is named."""
    return None if data.template is None or data.template in NAMED else Path(data.template).expanduser()


def _file_of_storage(url: str | None) -> str | None:
    """The file behind a storage, if it is one."""
    if url is None or "://" not in url:
        return url
    return url.partition(":///")[2] or None


def check_apart(
    recipe: Recipe, folders: Iterable[Path], but: Sequence[str] = (), remedy: str = "set `output` to another one"
) -> None:
    """Refuse to remove, or to write over, what a recipe reads.

    Args:
        recipe: whose inputs they are.
        folders: that are replaced or removed.
        but: keys that may lie there.
        remedy: the end of the message.

    Raises:
        UserError: naming the key.
    """
    for folder in folders:
        out = folder.resolve()
        for key, path in paths(recipe).items():
            if key not in but and out in (path, *path.parents):
                raise UserError(f"{key}: {path} is in the output directory {folder}; {remedy}")


def mark(files: Iterable[Path], path: str | os.PathLike[str]) -> dict[str, FileMark]:
    """Bytes and SHA-256 of files, by their names in the folder `path` (or of the file itself)."""
    root = Path(path).expanduser()
    return {
        file.relative_to(root).as_posix() if file != root and file.is_relative_to(root) else file.name: FileMark(
            bytes=file.stat().st_size, sha256=digest(file, keep=True)
        )
        for file in files
    }


def changes(before: Mapping[str, FileMark], now: Mapping[str, FileMark]) -> str:
    """What differs, for a message; "" for nothing."""
    for name in (*before, *(name for name in now if name not in before)):
        if name not in now:
            return f"{name} is gone"
        if name not in before:
            return f"{name} was added"
        if before[name] != now[name]:
            return f"{name} has changed"
    return ""


def check_same(before: Marks, now: Marks, begin: str) -> None:
    """Raise a `UserError` for the first key whose files are not what they were."""
    for key in sorted(before.keys() & now.keys()):
        what = changes(before[key], now[key])
        if what:
            raise UserError(f"{begin}: {key}: {what} since the run began; put it back, or start over")


def check_same_data(before: Recipe, now: Recipe, begin: str) -> None:
    """Raise a `UserError` for a data set of the hub that is at another commit than it was; both are recipes as saved."""
    earlier, later = texts_of(before.data), texts_of(now.data)
    for key in sorted(earlier.keys() & later.keys()):
        name, _, commit = later[key].partition("@")
        was, _, pinned = earlier[key].partition("@")
        if commit and pinned and name == was and not (commit.startswith(pinned) or pinned.startswith(commit)):
            raise UserError(
                f"{begin}: {key}: {name} is at {commit}, and was at {pinned} when the run began; set data.revision to that"
            )


def held_out(folder: Path) -> DataBlock | None:
    """The data block of the recipe in a saved model's folder, which names held-out text as it was; None if none does.

    Raises:
        UserError: if that text is gone or has changed.
    """
    saved = folder / "recipe.yaml"
    recipe = read(saved) if saved.is_file() else None
    if recipe is None or recipe.data is None or not (recipe.data.eval_path or recipe.data.holdout):
        return None
    for key, path in texts_of(recipe.data).items():
        before = (recipe.inputs or {}).get(key)
        if not before or (key == "data.eval_path") != (recipe.data.eval_path is not None):
            continue
        try:
            what = changes(before, mark(files_of(path), path))
        except UserError:
            what = "is gone"
        if what:
            raise UserError(f"{saved}: {key}: {path}: {what} since the model was made; pass --data")
    return recipe.data


def saved(
    recipe: Recipe, marks: Marks, model: str, pinned: Callable[[str], str], reference: str | None = None
) -> Recipe:
    """A recipe as it is written beside its model: the same from any directory.

    Args:
        recipe: of the run.
        marks: of what it read.
        model: its `model.path`, absolute or with the hub's commit.
        pinned: makes the same of a data set's path.
        reference: its `train.reference`, as `model`.
    """

    def whole(path: str | None) -> str | None:
        return path and str(Path(path).expanduser().resolve())

    data, cache, start = recipe.data, recipe.teacher_cache, recipe.start.path
    if start is not None:
        start = pinned(start if data is None else data.beside(start, recipe.start.split, None).path)
    blocks = {
        "model": recipe.model.model_copy(update={"path": model, "adapter": whole(recipe.model.adapter)}),
        "start": recipe.start.model_copy(update={"path": start}),
        "train": recipe.train.model_copy(update={"reference": reference}),
        "data": data and _whole(data, pinned),
        "evaluate": recipe.evaluate.model_copy(update={"tasks_data": whole(recipe.evaluate.tasks_data)}),
        "distill": recipe.distill and recipe.distill.model_copy(update={"cache": cache and whole(str(cache))}),
    }
    return recipe.model_copy(update=blocks | {"output": str(resolved(recipe.out)), "inputs": marks})


def _whole(data: DataBlock, pinned: Callable[[str], str]) -> DataBlock:
    """A data block that reads the same from any directory, its revisions in its paths."""
    paths = [pinned(source.path) for source in data.sources]
    listed = () if isinstance(data.path, str) else data.path
    several = tuple(
        block.model_copy(update={"path": p, "revision": None}) for block, p in zip(listed, paths, strict=False)
    )
    template = template_file(data)
    changed: dict[str, str | tuple[SourceBlock, ...] | None] = {
        "path": several or paths[0],
        "revision": None,
        "eval_path": data.eval_path and pinned(data.measured.path),
        "template": data.template if template is None else str(template.resolve()),
    }
    return data.model_copy(update=changed)
