"""The blocks of a recipe: pydantic models of frozen values, whose field docstrings are the help that users read."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.data.learned import Loss
from trimtab.data.rows import on_hub
from trimtab.data.sources import Source
from trimtab.errors import UserError
from trimtab.recipe.changing import AFTER, CONTENT, HABIT, LENGTH, MEASURED, PLACE, RATE, SPLIT

FormatName = Literal["native", "compressed-tensors", "gptq", "gguf", "mlx", "dense", "peft", "same"]
"""Formats that a recipe can export to: those of `trimtab.formats`, and that of its base."""
_Decay = Annotated[float, Field(ge=0, lt=1)]


class Block(BaseModel):
    """Frozen, and without keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)


class FileMark(Block):
    """What a file held."""

    bytes: int
    """Its size."""
    sha256: str
    """Its SHA-256."""


class ModelBlock(Block):
    """Which model to start from."""

    path: Annotated[str, CONTENT]
    """Directory (safetensors, or saved by trimtab), .gguf file, hub id, or `smollm2-135m`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype to compute in, and of every weight that stays in float."""
    device: Annotated[str, SPLIT] = "auto"
    """Where everything is computed: auto (a GPU if there is one), cpu, cuda, cuda:N, mps or xpu."""
    adapter: Annotated[str | None, CONTENT] = None
    """Directory of a PEFT LoRA that a method with an output adapter (lora, qlora) continues from; null for none."""


class StartBlock(Block):
    """How layers find the codes that training starts from."""

    name: Literal["rtn", "gptq", "block"] = "rtn"
    """rtn (to nearest; the ranges that cost least are the grid's own `range: lp2` .. `lp4`), or calibrated: gptq, or block
    (each decoder block trained through its rounding to give what the float block gives; for 2 and 3 bits)."""
    path: Annotated[str | None, CONTENT] = None
    """Calibration data, in the forms of data.path; null is the training data."""
    split: str = "train"
    """Split of a hub data set or of `pydoc-topics`."""
    subset: str | None = None
    """Configuration of a hub data set; null is the one that data.path reads, if it is the same set."""
    tokens: int = Field(default=16384, ge=2)
    """Calibrate on at most this many tokens."""
    damping: float = Field(default=0.01, ge=0)
    """What is added to the Hessian's diagonal, as a share of its mean."""
    act_order: bool = False
    """Round columns in the order of the Hessian's diagonal; the ranges of groups are then set beforehand."""
    trains: Literal["all", "scales", "shift"] = "all"
    """What block trains: all (weights, scales, zeros), scales (and zeros) alone, or shift: by signs of gradients, weights
    within half a step of the grid, and scales that only shrink (AutoRound's rounding)."""
    steps: int = Field(default=128, ge=0)
    """Updates of each block; 0 rounds to nearest."""
    windows: int = Field(default=2, ge=1)
    """Calibration sequences in an update."""
    lr: float | None = Field(default=None, gt=0)
    """Block's rate of weights and zeros, in steps of the grid; null is 0.01, 0.02 for scales, and 1 / steps for shift."""
    lr_scale: float | None = Field(default=None, gt=0)
    """Block's rate of scales, as a share of their size; null is the same."""
    on_disk: bool = False
    """Keep the hidden states of all calibration sequences in files (of the system's folder for such), not in memory."""


class SourceBlock(Block):
    """One of several sources; what is null is as the whole block says."""

    path: Annotated[str, CONTENT]
    """File, directory, hub id, or `pydoc-topics`."""
    weight: float = Field(default=1.0, gt=0)
    """How often each row counts: 2 twice in every epoch, 0.5 every second row, chosen by what it holds."""
    split: str | None = None
    """Split of a hub data set or of `pydoc-topics`."""
    subset: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows."""
    ignore: tuple[str, ...] | None = None
    """Keys of rows that belong neither to prompt nor to answer."""
    columns: dict[str, str] | None = None
    """The rows' own keys by the names of a form."""


class DataBlock(Block):
    """What to train on, and what to measure perplexity on."""

    path: Annotated[str | tuple[SourceBlock, ...], CONTENT]
    """JSONL, JSON array, CSV, Parquet or text file, directory of such, hub id, or `pydoc-topics`; or a list of these, each
    a path or {path, weight, split, subset, revision, limit, ignore, columns}."""
    split: str = "train"
    """Split of a hub data set or of `pydoc-topics`."""
    subset: str | None = None
    """Configuration of a hub data set (`wikitext-2-raw-v1`)."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; null is the newest, and the recipe beside the model says which that was."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows, of each source."""
    ignore: tuple[str, ...] = ()
    """Keys of rows that belong neither to prompt nor to answer; a key that is not known to is refused, not dropped."""
    columns: dict[str, str] = Field(default={})
    """The rows' own keys by the names of a form, {prompt: sentence, completion: label}; or texts made of them,
    {prompt: "Review: {sentence}"}."""
    template: Annotated[str | None, CONTENT] = None
    """Chat template, saved with the model: alpaca, chatml or a .jinja file; null is the tokenizer's own."""
    loss: Loss = "all"
    """What is learned of a row: all answers of a conversation (the completion of a pair), the last one, or the full row."""
    block_tokens: int = Field(default=1024, ge=2)
    """Length of a training sequence, in tokens."""
    packing: Literal["auto", "wrapped", "bfd", "none"] = "auto"
    """How rows fill sequences: wrapped (cut to blocks), bfd (whole rows, best fit), none; auto: wrapped for text."""
    holdout: float | None = Field(default=None, ge=0, lt=1)
    """Share of the rows to hold out of training, chosen by what they hold, and to measure on: 0.02. Null is that share of
    500 rows or more, where eval_path names no others; 0 is none."""
    streaming: bool = False
    """Take rows as they come until there are the tokens that train.steps need, without reading, or fetching, all others."""
    num_proc: Annotated[int, SPLIT] = Field(default=1, ge=1)
    """Processes that tokenize, of each that trains; worth it from some ten megabytes on."""
    eval_path: Annotated[str | None, CONTENT] = None
    """Held-out data for perplexity, in the same forms; null for what holdout splits off."""
    eval_split: str = "train"
    """Split of the held-out data."""
    eval_subset: str | None = None
    """Configuration of held-out data of the hub; null is the one that data.path reads, if it is the same set."""
    eval_tokens: Annotated[int | None, MEASURED] = Field(default=None, ge=2)
    """Measure on at most this many tokens."""

    @field_validator("path", mode="before")
    @classmethod
    def _path(cls, value: Any) -> str | tuple[SourceBlock, ...]:
        if isinstance(value, str):
            return value
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"data.path: {value!r} is no path; give a file, a hub id, or a list of them")
        return tuple(_source(entry, i) for i, entry in enumerate(value))

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is read to train on, one after another."""
        listed = (SourceBlock(path=self.path),) if isinstance(self.path, str) else self.path
        return tuple(self._as_source(block) for block in listed)

    @property
    def measured(self) -> Source:
        """The held-out data of `eval_path`."""
        assert self.eval_path is not None
        return self.beside(self.eval_path, self.eval_split, self.eval_subset)

    def beside(self, path: str, split: str, subset: str | None) -> Source:
        """Other rows by the keys of these; of the same set of the hub also at its revision, and in its subset."""
        name = path.partition("@")[0]
        same = next((s for s in self.sources if s.path.partition("@")[0] == name and on_hub(path)), None)
        if same is not None:
            path, subset = path if "@" in path else same.path, subset or same.subset
        return Source(path, split, subset, ignore=self.ignore, columns=self.columns)

    def _as_source(self, block: SourceBlock) -> Source:
        # What the whole block says of the hub's sets does not touch the files beside them.
        hub = on_hub(block.path)
        revision, subset = block.revision or (self.revision if hub else None), self.subset if hub else None
        return Source(
            path=f"{block.path}@{revision}" if revision else block.path,
            split=self.split if block.split is None else block.split,
            subset=subset if block.subset is None else block.subset,
            limit=self.limit if block.limit is None else block.limit,
            ignore=self.ignore if block.ignore is None else block.ignore,
            columns=self.columns if block.columns is None else block.columns,
            weight=block.weight,
            stream=self.streaming,
        )

    @property
    def named(self) -> str:
        """The sources by their paths, for people."""
        return ", ".join(source.path for source in self.sources)


def _source(entry: Any, number: int) -> SourceBlock:
    if isinstance(entry, SourceBlock):
        return entry
    if not isinstance(entry, str | Mapping):
        raise UserError(f"data.path.{number}: {entry!r} is no path; give a file, a hub id, or {{path: .., weight: ..}}")
    try:
        return SourceBlock(**({"path": entry} if isinstance(entry, str) else entry))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, (number, *first["loc"])))
        known = f"; known are {', '.join(SourceBlock.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"data.path.{key}: {first['msg']}{known}") from None


class TrainBlock(Block):
    """How to train. `steps: 0` only quantizes."""

    objective: Literal["sft", "dpo", "kto", "grpo"] = "sft"
    """sft (the answers), dpo (chosen over rejected ones), kto (answers that are good or bad), grpo (a reward of yours)."""
    steps: Annotated[int, LENGTH] = Field(default=1000, ge=0)
    """Optimizer steps."""
    epochs: Annotated[float | None, LENGTH] = Field(default=None, gt=0)
    """In place of steps: how often every row is trained on; the run says how many steps that makes."""
    batch_tokens: int = Field(default=8192, ge=2)
    """Tokens in one optimizer step, over all sequences, accumulation and processes."""
    micro_batch: Annotated[int, SPLIT] = Field(default=4, ge=1)
    """Sequences in one forward pass; batch_tokens is reached by accumulating gradients."""
    lr: Annotated[float | None, RATE] = Field(default=None, gt=0)
    """Learning rate of deltas (and of QAT's master weight); null is the default for this many steps."""
    lr_scale: Annotated[float | None, RATE] = Field(default=None, ge=0)
    """Learning rate of scales and offsets; null is the default for this many steps."""
    parametrization: Literal["relative", "paper"] | None = None
    """What rates mean. relative: the share of a step of the grid that a weight may move in an optimizer step, so that one
    rate serves every width, rank and layer; paper: Adam's own rates, as peft's and the papers'. null: paper where lr or
    lr_scale is given, else relative."""
    lr_scale_bits: int | None = Field(default=None, ge=1, le=8)
    """For mixed widths: the width that lr_scale is meant for. A scale of 8 bits is a seventeenth of one of 4, and so is its
    rate then; a search sets it to the width of its rules. Null: every width gets lr_scale."""
    schedule: Annotated[Literal["linear", "cosine", "constant"], RATE] = "linear"
    """Course of the learning rate after warm-up."""
    warmup: Annotated[float, RATE] = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises (warm-up)."""
    betas: Annotated[tuple[_Decay, _Decay], RATE] = (0.9, 0.95)
    """Adam's decay rates."""
    weight_decay: Annotated[float, RATE] = Field(default=0.0, ge=0)
    """Weight decay of deltas and master weights; scales have none."""
    clip: Annotated[float, RATE] = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    """8bit keeps the two moments in 8 bits, paged in the computer's memory when a GPU's is full; both need bitsandbytes."""
    seed: int = 0
    """Seed of the adapters' start and of the order of the data."""
    activation_checkpointing: Annotated[bool, SPLIT] = True
    """Recompute each block in backward: a third slower, a fraction of the activations."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention while training: auto (the model's own), sdpa, eager, or flash_attention_2 (another library's, on CUDA)."""
    offload_activations: Annotated[bool, SPLIT] = False
    """Keep what backward needs in the computer's memory instead of the GPU's."""
    compile: Annotated[Literal["auto"] | bool, SPLIT] = "auto"
    """Decoder layers through torch.compile while they train: a shorter step, after a first one that takes a minute. auto:
    where the steps save more than compiling costs."""
    processes: Annotated[int | None, SPLIT] = Field(default=None, ge=1)
    """Processes that train together on this machine, a GPU each: `trimtab run` starts them. Null is one, or as many as
    torchrun or accelerate has started."""
    shard: Annotated[Literal["none", "ddp", "fsdp"], SPLIT] = "ddp"
    """Of several processes: ddp (each has the whole model, gradients are averaged) or fsdp (each keeps a part of every
    layer); none refuses more than one."""
    save_steps: Annotated[int, HABIT] = Field(default=100, ge=1)
    """Steps between checkpoints (of trainable tensors and optimizer state only)."""
    keep_checkpoints: Annotated[int, HABIT] = Field(default=2, ge=2)
    """Checkpoints kept; at least two, since the newest may prove bad in the next step."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Steps between measurements of the loss on held-out text, before the first and after the last step, too; the model of
    the lowest loss is the one that is folded and saved. Null measures nothing."""
    early_stop: Annotated[int | None, LENGTH] = Field(default=None, ge=1)
    """End training when so many measurements in a row have found no lower held-out loss; null trains to the last step."""
    log_steps: Annotated[int, HABIT] = Field(default=1, ge=1)
    """Steps between log lines."""
    beta: float | None = Field(default=None, ge=0)
    """Of dpo, kto and grpo: how closely to keep to the reference; null is TRL's own, 0.1 (grpo: 0, which needs none)."""
    reference: Annotated[str | None, CONTENT] = None
    """A float model that dpo, kto and grpo keep to, as model.path; null is the model at step 0, which takes no memory."""
    reward: str | None = None
    """Of grpo: `module:function` that gives each of `completions` a number; it gets the columns of the data by name."""
    generations: int = Field(default=8, ge=2)
    """Of grpo: number of answers to each prompt."""
    completion_tokens: int = Field(default=128, ge=1)
    """Of grpo: length of an answer, at most."""
    report_to: Annotated[str, HABIT] = "none"
    """Logger: none, tensorboard, wandb, trackio, or another that transformers knows and is installed."""

    @property
    def moment_bytes(self) -> int:
        """Bytes of each of Adam's two moments of a trainable parameter."""
        return 1 if "8bit" in self.optimizer else 4


class DistillBlock(Block):
    """Learn from the float model as well: (1 - weight) cross-entropy + weight temperature^2 KL(float || tuned)."""

    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the divergence in the loss; cross-entropy has the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits of both are divided by it in the divergence; above 1, unlikely tokens count for more."""
    teacher: Literal["bfloat16", "int8", "cached"] = "cached"
    """The float model in bfloat16 or rounded to 8 bits, in memory; cached: its likeliest tokens, written to disk first."""
    top_k: int = Field(default=64, ge=1)
    """Tokens whose probabilities a cache keeps at every position; the mass of all others is kept as one number."""
    cache: Annotated[str | None, PLACE] = None
    """Directory of the cache, for every run on the same sequences; null is `<output>-teacher`."""


class EvaluateBlock(Block):
    """What to measure after the run, besides the tuned model."""

    baselines: Annotated[tuple[Literal["float", "rounded"], ...], AFTER] = ()
    """Perplexity of the untuned float model and of the rounded one before tuning."""
    parity: Annotated[bool, AFTER] = True
    """Compare trained, folded and reloaded-in-a-fresh-process, logit by logit; on random tokens without held-out data."""
    parity_tokens: Annotated[int, AFTER] = Field(default=512, ge=8)
    """Tokens that parity is measured on."""
    tasks: Annotated[tuple[str, ...], AFTER] = ()
    """Tasks of lm-evaluation-harness for the saved model: piqa, arc_easy, ... (`trimtab harness` compares two models)."""
    tasks_data: Annotated[str | None, AFTER] = None
    """Directory that holds <task>/<split>.jsonl, in the data sets' original fields."""
    tasks_limit: Annotated[int | None, AFTER] = Field(default=200, ge=2)
    """Items of each task, spread evenly; null for all."""
    prompt: Annotated[str | None, AFTER] = None
    """A question answered before and after tuning."""
    answer_tokens: Annotated[int, AFTER] = Field(default=48, ge=1)
    """Length of that answer."""


class PruneBlock(Block):
    """Prune the float model first; see `trimtab prune --help`. All that follows, a teacher included, is of what is left."""

    ratio: float | None = None
    """Share of the parameters to remove, at least."""
    bytes: str | int | None = None
    """Or the largest size of what is left: 200MiB."""
    layers: int | None = None
    """Or a number of whole layers to drop."""
    what: Literal["widths", "layers"] = "widths"
    """What is removed for a ratio or size: widths (heads and channels) or whole layers."""
    importance: Literal["taylor", "magnitude", "random"] = "taylor"
    """How the importance of heads and channels is measured."""
    keep: tuple[int, ...] = ()
    """Layers that are not dropped, and that alone decide the widths."""
    count_embeddings: bool = False
    """Whether the ratio is one of all parameters, embeddings included."""
    multiple_of: int = Field(default=64, ge=1)
    """MLP widths, and those of heads where some are removed, become multiples of this and of the rules' groups."""
    tokens: int = Field(default=8192, ge=2)
    """Calibrate on at most this many tokens of data.path."""
    block_tokens: int = Field(default=256, ge=2)
    """Length of a calibration window, in tokens."""
    seed: int = 0
    """Seed of random importance."""


class SearchBlock(Block):
    """Search the widths of layers for a budget in bytes; see `trimtab search --help`."""

    units: Literal["fusion", "layer"] = "fusion"
    """What is given a width of its own: groups that engines fuse (q/k/v, gate/up), or whole decoder layers."""
    bits: tuple[int, ...] = (2, 3, 4, 8)
    """Widths to choose from; 16 keeps a unit in float. Group and zero are those of the recipe's rules."""
    ranks: tuple[int, ...] | None = None
    """Ranks of adapters to choose from as well; null keeps the method's."""
    trials: int = Field(default=40, ge=1)
    """Number of trials, besides the uniform widths."""
    budget: str | int | None = None
    """Largest size of the stored weights, such as 90MiB: never exceeded."""
    budget_of: Literal["native", "compressed-tensors", "gptq", "gguf", "mlx", "dense", "peft"] = "native"
    """The format whose size the budget is, and the search's; of another than native it is that of the tensors, without the
    header (in GGUF with the vocabulary). GGUF stores 2 and 3 bits in 4, unless rules ask for k-quants."""
    budget_training: str | int | None = None
    """Largest predicted peak of training, such as 6GiB: never exceeded. Of the device's memory, where that has its own:
    context and libraries are counted then."""
    objective: Literal["rounded", "tuned"] = "rounded"
    """rounded: KL to the float model, no training; tuned: held-out loss after `steps` steps of training, of the answers
    alone where rows have prompts."""
    steps: int = Field(default=50, ge=1)
    """Training steps of a tuned trial."""
    promote: int | None = Field(default=None, ge=2)
    """Steps of the longer trials to which the best quarter are promoted; null for none."""
    sensitivity: Literal["exact", "fisher"] = "fisher"
    """The additive prior: fisher (one backward pass a window) or exact (a forward pass for each unit and width)."""
    tokens: int = Field(default=2048, ge=2)
    """Held-out tokens that every trial is measured on (data.eval_path; for `rounded`, else training text)."""
    sensitivity_tokens: int = Field(default=1024, ge=2)
    """Training tokens that sensitivities are measured on."""
    uniform: bool = True
    """Whether every uniform width within the budget is tried as well."""
    storage: str | None = None
    """Journal file, or a storage of Optuna's by url (postgresql://..); null is search/journal.log in the output."""
    workers: int | None = Field(default=None, ge=1)
    """Processes on this machine, or trials that Ray makes at a time; other machines join by the same command and storage.
    null is one for each of `devices`, with Ray as many as its cluster has room for, else 1."""
    devices: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Numbers of the GPUs that workers compute on, one for each: [0, 1]; null computes all on model.device."""
    engine: Literal["processes", "ray"] = "processes"
    """Who makes trials: processes of this command, or tasks of a Ray cluster."""
    resources: dict[str, Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """What Ray is to give each trial, such as {gpu: 1, cpu: 4} or resources of the cluster's own; null is {cpu: 1}."""
    seed: int = 0
    """Seed of the search."""
