"""A recipe: everything about a run, validated before anything is loaded.

One YAML file, read into `Recipe` and the models of `fields`; `key=value` overrides with dotted keys (`train.steps=10`,
values in YAML). What only the model can tell (does a pattern match a layer, does a group divide it) is checked by
`models.targets`, on names and shapes, before a weight is read.
"""

import copy
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError, field_validator

from trimtab import devices, methods
from trimtab.errors import UserError, nearest
from trimtab.layers import rates
from trimtab.layers.rates import Parametrization, Rates
from trimtab.methods.base import Method
from trimtab.outputs import expanded
from trimtab.quant.activations import Activations, KvCache
from trimtab.reading import require_regular
from trimtab.recipe import agreement, yaml_text
from trimtab.recipe.changing import AFTER, HABIT, PLACE
from trimtab.recipe.fields import (
    Block,
    DataBlock,
    DistillBlock,
    EvaluateBlock,
    FileMark,
    FormatName,
    ModelBlock,
    PruneBlock,
    SearchBlock,
    StartBlock,
    TrainBlock,
)
from trimtab.recipe.rules import Rule, parse_rules
from trimtab.recipe.versions import VERSION, migrated


class Recipe(Block):
    """The whole configuration of a run.

    Examples:
        >>> recipe = tt.Recipe.model_validate({"model": {"path": "base"}, "method": {"name": "rtn"}, "train": {"steps": 0}})
        >>> metrics = tt.run(recipe)
    """

    version: Annotated[int, HABIT] = VERSION
    """Version of the recipe's form; a recipe of an earlier one is read as what it meant then."""
    name: Annotated[str, PLACE] = "run"
    """Name of the run; taken from the file where it is read from one."""
    model: ModelBlock
    method: Method
    """`name` and that method's options: `trimtab methods` lists them."""
    rules: list[Rule] | None = None
    """Grids by layer name, first match wins; null is the method's default on every linear layer but the head."""
    start: StartBlock = StartBlock()
    activations: Activations | None = None
    """Round the inputs of low-bit layers, {bits: 8}: W4A8 with 4-bit weights; null leaves them as they are."""
    kv: KvCache | None = None
    """Round keys and values, {bits: 8}: a simulated KV cache; null leaves them as they are."""
    data: DataBlock | None = None
    """Needed unless train.steps is 0."""
    train: TrainBlock = TrainBlock()
    distill: DistillBlock | None = None
    """null trains on the data alone; `{}` takes these defaults."""
    evaluate: EvaluateBlock = EvaluateBlock()
    prune: PruneBlock | None = None
    """Prune the float model first."""
    search: SearchBlock | None = None
    """Then search the widths of its layers; the rules that follow are the best found within the budget."""
    merge: Annotated[bool, AFTER] = False
    """Merge output adapters into a dense copy of their weights when folding."""
    export: Annotated[list[FormatName], AFTER] = Field(default=["native"], min_length=1)
    """Formats to write: native into `output` always, each other one into `<output>/<format>`; see `trimtab formats`.
    `same` is the format that the base came in."""
    output: Annotated[str | None, PLACE] = None
    """Where the model is written; null is `runs/<name>`."""
    inputs: dict[str, dict[str, FileMark]] | None = None
    """Written by a run, not by hand: bytes and SHA-256 of every file that it read, by the key that names them. `eval`,
    `export` and `--resume` say which of them changed."""
    _file: str | None = PrivateAttr(default=None)

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Method:
        if isinstance(value, Method):
            return value
        if not isinstance(value, str | Mapping):
            raise UserError(
                f"method: {value!r} is not a method; write {{name: lr-qat, rank: 32}}, see `trimtab methods`"
            )
        options = {"name": value} if isinstance(value, str) else dict(value)
        if not isinstance(options.get("name"), str):
            raise UserError("method.name: missing, or no name; see `trimtab methods`")
        name = options.pop("name")
        made = methods.make(name, **options)
        # The dataclass is the YAML block; pydantic checks the types that a dataclass does not.
        return TypeAdapter(type(made)).validate_python(options)

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | list) else value

    @field_validator("rules", mode="before")
    @classmethod
    def _rules(cls, value: Any) -> list[Rule] | None:
        return parse_rules(value)

    @property
    def file(self) -> str | None:
        """The file that it was read from, if it was."""
        return self._file

    @property
    def out(self) -> Path:
        """The output directory."""
        return expanded(self.output or f"runs/{self.name}")

    @property
    def teacher_cache(self) -> Path | None:
        """Where the teacher's predictions are kept on disk, if they are."""
        if self.distill is None or self.distill.teacher != "cached":
            return None
        return expanded(self.distill.cache or f"{self.out}-teacher", "distill.cache")

    def moved(self, output: Path) -> "Recipe":
        """The recipe with another output, and its teacher's cache where it was."""
        cache = self.teacher_cache
        distill = self.distill if cache is None else self.distill.model_copy(update={"cache": str(cache)})  # type: ignore[union-attr]
        return self.model_copy(update={"output": str(output), "distill": distill})

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        return dtype

    def on(self, device: str) -> "Recipe":
        """The recipe, computed on another device."""
        return self.model_copy(update={"model": self.model.model_copy(update={"device": device})})

    @property
    def device(self) -> torch.device:
        """Where it is computed here.

        Raises:
            UserError: if it names a device that is not here.
        """
        return devices.resolve(self.model.device)

    @property
    def parametrization(self) -> Parametrization:
        """What its rates mean: shares, or the rates that Adam is given."""
        if self.train.parametrization is not None:
            return self.train.parametrization
        return "relative" if self.train.lr is None and self.train.lr_scale is None else "paper"

    @property
    def rates(self) -> Rates:
        """Learning rates of deltas, and of scales and offsets."""
        if self.parametrization == "relative":
            default = rates.default(self.method.kind, self.train.steps, self._bits)
        else:
            default = Rates(self.method.lr, self.method.lr_scale)
        given = self.train
        return Rates(
            default.delta if given.lr is None else given.lr, default.scale if given.lr_scale is None else given.lr_scale
        )

    @property
    def _bits(self) -> int | None:
        """Of the grid that most layers have: of the rule for all of them, or the method's; None where neither says."""
        grid = self.method.grid if self.rules is None else next((r.grid for r in self.rules if r.match == "*"), None)
        return getattr(grid, "bits", None)

    def with_its_rates(self) -> "Recipe":
        """The recipe with the rates that its number of steps gives it, which no later default changes then."""
        given = {"lr": self.rates.delta, "lr_scale": self.rates.scale, "parametrization": self.parametrization}
        return self.model_copy(update={"train": self.train.model_copy(update=given)})

    def to_yaml(self) -> str:
        """The resolved recipe: every field with the value it has, runnable as it stands."""
        values = self.model_dump(mode="json", exclude={"method", "rules"})
        values["method"] = {"name": self.method.name, **asdict(self.method)}
        values["rules"] = None if self.rules is None else [_plain(rule) for rule in self.rules]
        values["output"] = str(self.out)
        if self.train.epochs is not None:  # what stands for a number of steps, until the rows are counted
            del values["train"]["steps"]
        if self.inputs is None:
            del values["inputs"]
        return yaml.safe_dump({key: values[key] for key in Recipe.model_fields if key in values}, sort_keys=False)


def _plain(rule: Rule) -> dict[str, Any]:
    grid = rule.grid if rule.grid in (None, "float", "same") else asdict(rule.grid)  # type: ignore[arg-type]
    return {"match": rule.match, "grid": grid} | ({} if rule.rank is None else {"rank": rule.rank})


def from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values.

    Raises:
        UserError: one line naming the key, with the nearest known one for a typo.
    """
    values = migrated(values, where)
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from None
    except TypeError as error:
        raise UserError(f"{where}: keys must be words ({error})") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    agreement.check(recipe, where)
    return recipe


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_beside(problem["loc"])
        hint = nearest(str(problem["loc"][-1]), known)
        return f"{key}: unknown key{hint or '; known are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    cause = problem.get("ctx", {}).get("error")
    given = reprlib.repr(problem["input"])  # it may be large
    return str(cause) if isinstance(cause, UserError) else f"{key}: {problem['msg']} (got {given})"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    block: Any = Recipe
    for part in location[:-1]:
        annotation = block.model_fields[part].annotation if hasattr(block, "model_fields") else None
        options = getattr(annotation, "__args__", (annotation,))
        block = next((o for o in options if hasattr(o, "model_fields") or is_dataclass(o)), None)
        if block is None:
            return []
    return [f.name for f in fields(block)] if is_dataclass(block) else list(block.model_fields)


def read(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and `key=value` overrides.

    Raises:
        UserError: naming the file, its line or the key.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such recipe file")
    require_regular(file, yaml_text.MOST_BYTES, "write it again")
    values = yaml_text.load(file.read_bytes(), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys (model, method, data, ...)")
    values.setdefault("name", file.stem)
    recipe = from_dict(_overridden(migrated(values, str(path)), overrides), str(path))
    recipe._file = str(file.absolute())
    return recipe


def from_text(text: str) -> Recipe:
    """A recipe from the text of its file, as `to_yaml` gives it."""
    return from_dict(yaml_text.load(text, "recipe"))


def as_recipe(recipe: "Recipe | Mapping[str, Any] | str | os.PathLike[str]", overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from whatever stands for one: its file, its values, or itself.

    Args:
        recipe: a YAML file, a mapping as YAML would give it, or a `Recipe`.
        overrides: `key=value` with dotted keys, for example `train.steps=10`.

    Raises:
        UserError: naming the file, its line or the key.
    """
    if isinstance(recipe, Recipe):
        return from_dict(_overridden(yaml.safe_load(recipe.to_yaml()), overrides)) if overrides else recipe
    if isinstance(recipe, Mapping):
        return from_dict(_overridden(migrated(copy.deepcopy(dict(recipe)), "recipe"), overrides))
    return read(recipe, overrides)


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        _override(values, override)
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: an override is written key=value, for example train.steps=10")
    *parents, last = key.split(".")
    block: Any = values
    for part in parents:
        if isinstance(block, list):
            block = block[_index(key, part, block)]
            continue
        if not isinstance(block, dict):
            raise UserError(f"{key}: {part!r} is not inside a block")
        if not isinstance(block.get(part), dict | list):
            block[part] = {"name": block[part]} if isinstance(block.get(part), str) and part == "method" else {}
        block = block[part]
    try:
        value = yaml_text.load(text, key)
    except UserError as error:
        raise UserError(f"{key}: {text!r} is not a YAML value ({error})") from None
    if isinstance(block, list):
        block[_index(key, last, block)] = value
    else:
        block[last] = value


def _index(key: str, part: str, block: list[Any]) -> int:
    if not part.isdigit() or int(part) >= len(block):
        raise UserError(f"{key}: {part!r} is not an entry of a list of {len(block)}; they count from 0")
    return int(part)


EXAMPLE = """\
# trimtab run this.yaml
model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}
method: {name: lr-qat, rank: 32, alpha: 1.0}
rules:                                   # first match wins; null keeps a layer in float
  - {match: "model.embed_tokens", grid: {bits: 8, group: 32}}
  - {match: "*", grid: {bits: 4, group: 64}}
data: {path: alpaca.jsonl, block_tokens: 1024}
train: {steps: 1000, batch_tokens: 8192}
"""
"""A recipe to start from."""
