"""What single fields of a recipe cannot say: keys that need, or exclude, one another."""

from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.data.columns import check_columns
from trimtab.data.rows import on_hub
from trimtab.data.templates import check_template
from trimtab.errors import UserError
from trimtab.outputs import resolved
from trimtab.recipe.fields import DataBlock, SearchBlock
from trimtab.recipe.objectives import check_objective, check_stages

if TYPE_CHECKING:
    from trimtab.recipe.recipe import Recipe


def check(recipe: "Recipe", where: str) -> None:
    """Raise a `UserError` naming the first key that does not go with the others."""
    if recipe.train.steps and recipe.data is None:
        raise UserError(f"{where}: data: missing; training needs it (or set train.steps to 0)")
    _check_start(recipe, where)
    if not recipe.method.trains and recipe.train.steps:
        raise UserError(f"{where}: train.steps: {recipe.method.name} trains nothing; set it to 0")
    if recipe.activations is not None and recipe.activations.mode == "static" and recipe.data is None:
        raise UserError(f"{where}: data: missing; static activations are measured on it (or set mode: dynamic)")
    if recipe.activations is not None and recipe.merge:
        raise UserError(
            f"{where}: merge: an adapter beside rounded inputs fits into no weight; set merge: false, or leave "
            "activations out"
        )
    if recipe.evaluate.baselines and not _holds_out(recipe):
        raise UserError(
            f"{where}: evaluate.baselines: are compared on held-out data; set data.eval_path or data.holdout"
        )
    if recipe.train.evaluate_steps is not None and not _holds_out(recipe):
        raise UserError(f"{where}: train.evaluate_steps: measures on held-out data; set data.eval_path or data.holdout")
    if recipe.train.early_stop is not None and recipe.train.evaluate_steps is None:
        raise UserError(
            f"{where}: train.early_stop: counts measurements of the held-out loss; set train.evaluate_steps"
        )
    _check_data(recipe, where)
    if recipe.data is not None and recipe.data.streaming:
        _check_streaming(recipe, recipe.data, where)
    cache = None if recipe.teacher_cache is None else resolved(recipe.teacher_cache, "distill.cache")
    if cache is not None and resolved(recipe.out) in (cache, *cache.parents):
        raise UserError(f"{where}: distill.cache: {cache} is in the output directory; give it one of its own")
    _check_search(recipe, where)
    if recipe.data is not None:
        check_stages(recipe, where)
    if recipe.data is None or not recipe.train.steps:
        return
    check_objective(recipe, where)
    sequences, rest = divmod(recipe.train.batch_tokens, recipe.data.block_tokens)
    if rest or sequences % recipe.train.micro_batch or not sequences:
        whole = recipe.train.micro_batch * recipe.data.block_tokens
        raise UserError(
            f"{where}: train.batch_tokens: {recipe.train.batch_tokens} is not a multiple of "
            f"micro_batch x block_tokens = {whole}; use {max(round(recipe.train.batch_tokens / whole), 1) * whole}"
        )


_OPTIONS = {
    "gptq": ("damping", "act_order"),
    "block": ("trains", "steps", "windows", "lr", "lr_scale", "on_disk"),
}
"""What only one start reads."""


def _check_start(recipe: "Recipe", where: str) -> None:
    start = recipe.start
    for name, options in _OPTIONS.items():
        for key in options:
            if name != start.name and getattr(start, key) != type(start).model_fields[key].default:
                raise UserError(f"{where}: start.{key}: is an option of {name}, and start.name is {start.name}")
    if start.name != "rtn" and start.path is None and recipe.data is None:
        raise UserError(f"{where}: start.path: {start.name} is calibrated on text; name some, or set data.path")


def _holds_out(recipe: "Recipe") -> bool:
    """Whether some data is held out for certain."""
    return recipe.data is not None and bool(recipe.data.eval_path or recipe.data.holdout)


def _check_streaming(recipe: "Recipe", block: DataBlock, where: str) -> None:
    """Rows are taken until there are enough for a number of steps."""
    said = f"{where}: data.streaming: takes rows until there are the tokens that train.steps need"
    if recipe.train.epochs is not None:
        raise UserError(f"{said}, and an epoch has all rows; give train.steps instead of train.epochs")
    if not recipe.train.steps:
        raise UserError(f"{said}, and there are no steps; set it to false, and data.limit if there are many rows")
    if recipe.train.objective != "sft":
        raise UserError(f"{said} with objective: sft; set it to false, and data.limit if there are many rows")
    if not isinstance(block.path, str):
        raise UserError(f"{said}, of one source; name one in data.path, or set it to false and a limit for each")
    for name in ("search", "prune"):
        if getattr(recipe, name) is not None:
            raise UserError(f"{said}; {name} reads rows of its own: set it to false, and data.limit")


def _check_data(recipe: "Recipe", where: str) -> None:
    """What a data block and the length of training say twice, or not at all."""
    block, train = recipe.data, recipe.train
    if train.epochs is not None and "steps" in train.model_fields_set:
        raise UserError(
            f"{where}: train.epochs: stands beside train.steps = {train.steps}; give one of them (null the other)"
        )
    if block is None:
        return
    keys = _keys_of_sources(block)
    try:
        check_columns(block.columns)
        for key, source in zip(keys, block.sources, strict=True):
            if source.columns != block.columns:
                check_columns(source.columns or {}, f"{key}.columns")
        if block.template is not None:
            check_template(block.template)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if block.eval_path is not None and block.holdout:
        raise UserError(
            f"{where}: data.holdout: stands beside data.eval_path, which is held out already; give one of them"
        )
    of_hub = [source for source in block.sources if on_hub(source.path)]
    for key in ("revision", "subset"):
        if getattr(block, key) is not None and not of_hub:
            raise UserError(f"{where}: data.{key}: {block.named} is not a data set of the hub; remove it")
    for key, source in zip(keys, block.sources, strict=True):
        named, _, revision = source.path.rpartition("@")
        if named and revision and not _here(source.path) and _here(named):
            raise UserError(f"{where}: {key}.revision: {source.path} is not a data set of the hub; remove it")
        if source.path.count("@") > 1:
            raise UserError(f"{where}: {key}: {source.path} names two revisions; give one of them")


def _here(path: str) -> bool:
    return Path(path).expanduser().exists()


def _keys_of_sources(block: DataBlock) -> list[str]:
    return ["data.path"] if isinstance(block.path, str) else [f"data.path.{i}" for i in range(len(block.path))]


def _check_search(recipe: "Recipe", where: str) -> None:
    block = recipe.search
    if block is None:
        return
    if recipe.data is None:
        raise UserError(f"{where}: data: missing; a search measures on text")
    if block.objective == "tuned" and not _holds_out(recipe):
        raise UserError(
            f"{where}: search.objective: tuned trials are measured on held-out data; set data.eval_path or data.holdout"
        )
    if block.objective == "tuned" and not recipe.method.trains:
        raise UserError(
            f"{where}: search.objective: {recipe.method.name} trains nothing; use rounded, or another method"
        )
    if block.promote is not None and (block.objective != "tuned" or block.promote <= block.steps):
        raise UserError(f"{where}: search.promote: is a number of steps above search.steps, for tuned trials")
    if not all(1 <= b <= 8 or b == 16 for b in block.bits):
        raise UserError(f"{where}: search.bits: {list(block.bits)} are not widths; 1 to 8, or 16 for float")
    _check_workers(recipe, block, where)
    if recipe.method.grid is None and recipe.rules is None:
        raise UserError(f"{where}: search: {recipe.method.name} quantizes nothing by itself; give a grid in the rules")


def _check_workers(recipe: "Recipe", block: SearchBlock, where: str) -> None:
    """What each worker of a search has: a device of its own, or what Ray gives it."""
    device = recipe.model.device
    if block.engine == "ray":
        if block.devices is not None:
            raise UserError(
                f"{where}: search.devices: Ray gives its tasks GPUs itself; set search.resources={{gpu: 1}}"
            )
        if ":" in device:
            raise UserError(
                f"{where}: model.device: {device} is a GPU of one machine, and Ray gives each trial one of its own; set "
                f"{device.partition(':')[0]}"
            )
        return
    if block.resources is not None:
        raise UserError(f"{where}: search.resources: are what Ray gives a trial; set search.engine=ray, or remove them")
    if block.devices is None:
        return
    numbers = list(block.devices)
    if block.workers not in (None, len(numbers)):
        raise UserError(
            f"{where}: search.devices: {numbers} are devices of {len(numbers)} workers, and search.workers is "
            f"{block.workers}; name one for each worker (a GPU twice for two workers on it), or leave workers out"
        )
    if device not in ("auto", "cuda", "xpu"):
        raise UserError(
            f"{where}: search.devices: {numbers} are numbers of GPUs, and model.device is {device}; set it to auto, cuda "
            "or xpu, or leave search.devices out"
        )
