"""A recipe: everything about a run, validated before anything is loaded.

One YAML file, read into the models below; `key=value` overrides with dotted keys (`train.steps=10`, values in YAML). Each
field's docstring is its help: `trimtab recipe --explain` prints them. What only the model can tell (does a pattern match a
layer, does a group divide it) is checked by `preparing.targets`, on names and shapes, before a weight is read.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from trimtab import methods
from trimtab.errors import UserError, nearest
from trimtab.grid import CodebookGrid, Grid
from trimtab.methods.base import Method
from trimtab.rules import Rule, parse_rules

_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)


class ModelBlock(_Block):
    """Which model to start from."""

    path: str
    """Directory (safetensors, or saved by trimtab), .gguf file, hub id, or `smollm2-135m`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype to compute in, and of every weight that stays float."""


class DataBlock(_Block):
    """What to train on, and what to measure perplexity on."""

    path: str
    """JSONL, Parquet or text file, directory of such, hub id, or `pydoc-topics`."""
    split: str = "train"
    """Split of a hub data set or of `pydoc-topics`."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows."""
    block_tokens: int = Field(default=1024, ge=2)
    """Length of a training sequence, in tokens."""
    packing: Literal["auto", "wrapped", "bfd", "none"] = "auto"
    """How rows fill sequences: wrapped (cut to blocks), bfd (whole rows, best fit), none; auto: wrapped for text."""
    eval_path: str | None = None
    """Held-out data for perplexity, in the same forms; null for none."""
    eval_split: str = "train"
    """Split of the held-out data."""
    eval_tokens: int | None = Field(default=None, ge=2)
    """Measure on at most this many tokens."""


class TrainBlock(_Block):
    """How to train. `steps: 0` only quantizes."""

    steps: int = Field(default=1000, ge=0)
    """Optimizer steps."""
    batch_tokens: int = Field(default=8192, ge=2)
    """Tokens in one optimizer step, over all sequences and accumulation."""
    micro_batch: int = Field(default=4, ge=1)
    """Sequences in one forward pass; batch_tokens is reached by accumulating gradients."""
    lr: float | None = Field(default=None, gt=0)
    """Learning rate of deltas (and of QAT's master weight); null is the method's own."""
    lr_scale: float | None = Field(default=None, ge=0)
    """Learning rate of scales and offsets; null is the method's own."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    """Adam's decay rates."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of deltas and master weights; scales have none."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    """8bit keeps the two moments in 8 bits, paged in the computer's memory when a GPU's is full; both need bitsandbytes."""
    seed: int = 0
    """Seed of the adapters' start and of the order of the data."""
    activation_checkpointing: bool = True
    """Recompute each block in backward: a third slower, a fraction of the activations."""
    offload_activations: bool = False
    """Keep what backward needs in the computer's memory instead of the GPU's."""
    save_steps: int = Field(default=100, ge=1)
    """Steps between checkpoints (of trainable tensors and optimizer state only)."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Checkpoints kept; at least two, since the newest may prove bad in the next step."""
    log_steps: int = Field(default=1, ge=1)
    """Steps between log lines."""
    report_to: str = "none"
    """Logger that transformers knows: none, tensorboard, wandb, trackio."""

    @property
    def moment_bytes(self) -> int:
        """Bytes of each of Adam's two numbers for a trainable one."""
        return 1 if "8bit" in self.optimizer else 4


class EvaluateBlock(_Block):
    """What to measure after the run, besides the tuned model."""

    baselines: tuple[Literal["float", "rounded"], ...] = ()
    """Perplexity of the untuned float model and of the rounded one before tuning."""
    parity: bool = True
    """Compare trained, folded and reloaded-in-a-fresh-process, logit by logit."""
    parity_tokens: int = Field(default=512, ge=8)
    """Tokens that parity is measured on."""
    prompt: str | None = None
    """A question answered before and after tuning."""
    answer_tokens: int = Field(default=48, ge=1)
    """Length of that answer."""


class Recipe(_Block):
    """The whole configuration of a run."""

    name: str = "run"
    """Name of the run; taken from the file where it is read from one."""
    model: ModelBlock
    method: Method
    """`name` and that method's options: `trimtab methods` lists them."""
    rules: list[Rule] | None = None
    """Grids by layer name, first match wins; null is the method's default on every linear layer but the head."""
    data: DataBlock | None = None
    """Needed unless train.steps is 0."""
    train: TrainBlock = TrainBlock()
    evaluate: EvaluateBlock = EvaluateBlock()
    merge: bool = False
    """Merge output adapters into a dense copy of their weights when folding."""
    export: list[Literal["native"]] = Field(default=["native"], min_length=1)
    """Formats to write."""
    output: str | None = None
    """Where the model is written; null is `runs/<name>`."""

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Method:
        if isinstance(value, Method):
            return value
        if not isinstance(value, str | Mapping):
            raise UserError(f"method: {value!r} is no method; write {{name: lr-qat, rank: 32}}, see `trimtab methods`")
        options = {"name": value} if isinstance(value, str) else dict(value)
        if not isinstance(options.get("name"), str):
            raise UserError("method.name: missing, or no name; see `trimtab methods`")
        name = options.pop("name")
        made = methods.make(name, **options)
        # The dataclass is the YAML block; pydantic checks the types that a dataclass does not.
        return TypeAdapter(type(made)).validate_python(options)

    @field_validator("rules", mode="before")
    @classmethod
    def _rules(cls, value: Any) -> list[Rule] | None:
        return parse_rules(value)

    @property
    def out(self) -> Path:
        """The output directory."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        dtype: torch.dtype = getattr(torch, self.model.dtype)
        return dtype

    @property
    def lr(self) -> float:
        """Learning rate of deltas."""
        return self.train.lr if self.train.lr is not None else self.method.lr

    @property
    def lr_scale(self) -> float:
        """Learning rate of scales and offsets."""
        return self.train.lr_scale if self.train.lr_scale is not None else self.method.lr_scale

    def to_yaml(self) -> str:
        """The resolved recipe: every field with the value it has, runnable as it stands."""
        values = self.model_dump(mode="json", exclude={"method", "rules"})
        values["method"] = {"name": self.method.name, **asdict(self.method)}
        values["rules"] = None if self.rules is None else [_plain(rule) for rule in self.rules]
        values["output"] = str(self.out)
        values["train"]["lr"], values["train"]["lr_scale"] = self.lr, self.lr_scale
        return yaml.safe_dump({key: values[key] for key in Recipe.model_fields}, sort_keys=False)


def _plain(rule: Rule) -> dict[str, Any]:
    return {"match": rule.match, "grid": rule.grid if rule.grid in (None, "float") else asdict(rule.grid)}  # type: ignore[arg-type]


def from_dict(values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain values.

    Raises:
        UserError: one line naming the key, with the nearest known one for a typo.
    """
    try:
        recipe = Recipe(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first(error)}") from None
    except TypeError as error:
        raise UserError(f"{where}: keys must be words ({error})") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    _check(recipe, where)
    return recipe


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(problem["loc"])
        hint = nearest(str(problem["loc"][-1]), known)
        return f"{key}: unknown key{hint or '; known are ' + ', '.join(known)}"
    if problem["type"] == "missing":
        return f"{key}: missing, and it has no default"
    cause = problem.get("ctx", {}).get("error")
    return str(cause) if isinstance(cause, UserError) else f"{key}: {problem['msg']} (got {problem['input']!r})"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    block: Any = Recipe
    for part in location[:-1]:
        annotation = block.model_fields[part].annotation if hasattr(block, "model_fields") else None
        options = getattr(annotation, "__args__", (annotation,))
        block = next((o for o in options if hasattr(o, "model_fields")), None)
        if block is None:
            return []
    return list(block.model_fields)


def _check(recipe: Recipe, where: str) -> None:
    """What single fields cannot say."""
    if recipe.train.steps and recipe.data is None:
        raise UserError(f"{where}: data: missing; training needs it (or set train.steps to 0)")
    trains = recipe.method.name != "rtn"
    if not trains and recipe.train.steps:
        raise UserError(f"{where}: train.steps: {recipe.method.name} trains nothing; set it to 0")
    if recipe.evaluate.baselines and (recipe.data is None or recipe.data.eval_path is None):
        raise UserError(f"{where}: evaluate.baselines: are compared on held-out data; set data.eval_path")
    if recipe.data is None or not recipe.train.steps:
        return
    sequences, rest = divmod(recipe.train.batch_tokens, recipe.data.block_tokens)
    if rest or sequences % recipe.train.micro_batch or not sequences:
        whole = recipe.train.micro_batch * recipe.data.block_tokens
        raise UserError(
            f"{where}: train.batch_tokens: {recipe.train.batch_tokens} is no multiple of "
            f"micro_batch x block_tokens = {whole}; use {max(round(recipe.train.batch_tokens / whole), 1) * whole}"
        )


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file and `key=value` overrides.

    Raises:
        UserError: naming the file, its line or the key.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such recipe file")
    try:
        values = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys (model, method, data, ...)")
    for override in overrides:
        _override(values, override)
    values.setdefault("name", file.stem)
    return from_dict(values, str(path))


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
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{key}: {text!r} is not a YAML value") from None
    if isinstance(block, list):
        block[_index(key, last, block)] = value
    else:
        block[last] = value


def _index(key: str, part: str, block: list[Any]) -> int:
    if not part.isdigit() or int(part) >= len(block):
        raise UserError(f"{key}: {part!r} is no entry of a list of {len(block)}; they count from 0")
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


def explanation() -> str:
    """Every field of a recipe, grid and method: its type, default and meaning, as commented YAML keys."""
    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        block = field.annotation if isinstance(field.annotation, type) else None
        inner = block if block is not None and issubclass(block, _Block) else None
        inner = DataBlock if name == "data" else inner
        lines.append(f"{name}:" + ("" if inner else f" {_default(field)}"))
        if field.description or (inner and inner.__doc__):
            lines.append(f"    # {field.description or inner.__doc__}")
        for key, value in ({} if inner is None else inner.model_fields).items():
            lines += [f"  {key}: {_default(value)}", f"      # {value.description}"]
    lines += ["", "# a grid, in rules", *_documented(Grid), "", "# or a codebook grid", *_documented(CodebookGrid)]
    lines += ["", "# options of every method", *_documented(Method)]
    for method in methods.ALL:
        lines += ["", f"# and of {method.name}: {method.summary}", *_documented(method)]
    return "\n".join(lines) + "\n"


def _default(field: Any) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, _Block):
        return "{}"
    return yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True).split("\n")[0]


def _documented(cls: type) -> list[str]:
    """Fields of a dataclass with the strings that stand below them in its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    lines = []
    for item, below in pairwise(tree.body):
        if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation).startswith("ClassVar"):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            default = "" if item.value is None else f" {ast.unparse(item.value)}"
            lines += [f"  {ast.unparse(item.target)}:{default}", f"      # {below.value.value!s}"]
    return lines
