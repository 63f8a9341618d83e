"""The blocks of a recipe: pydantic models of frozen values, whose field docstrings are the help that users read."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.data.learned import Loss
from trimtab.data.rows import on_hub
from trimtab.data.sources import Source
from trimtab.errors import UserError
from trimtab.recipe.changing import AFTER, CONTENT, HABIT, LENGTH, MEASURED, PLACE, RATE, SPLIT

FormatName = Literal["native", "compressed-tensors", "gptq", "awq", "gguf", "mlx", "dense", "peft", "same"]
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
    """rtn (round to nearest), gptq (calibrated), or block (each decoder block is trained through its rounding to reproduce
    the float block's output; for 2 and 3 bits). The ranges of rtn are the grid's own, such as `range: lp2`."""
    path: Annotated[str | None, CONTENT] = None
    """Calibration data, in the forms of data.path; null is the training data."""
    split: str = "train"
    """Split of a hub data set or of `pydoc-topics`."""
    subset: str | None = None
    """Configuration of a hub data set; null is that of data.path, if it names the same data set."""
    tokens: int = Field(default=16384, ge=2)
    """Calibrate on at most this many tokens."""
    damping: float = Field(default=0.01, ge=0)
    """Share of the Hessian's mean diagonal that is added to its diagonal."""
    act_order: bool = False
    """Round columns in the order of the Hessian's diagonal; the ranges of groups are then set beforehand."""
    trains: Literal["all", "scales", "shift"] = "all"
    """What block trains: all (weights, scales and zeros), scales (and zeros), or shift (AutoRound's rounding: weights move
    by the signs of gradients, within half a step of the grid, and scales only shrink)."""
    steps: int = Field(default=128, ge=0)
    """Updates of each block; 0 rounds to nearest."""
    windows: int = Field(default=2, ge=1)
    """Calibration sequences in an update."""
    lr: float | None = Field(default=None, gt=0)
    """Rate at which block trains weights and zeros, in steps of the grid; null: 0.01 (scales: 0.02; shift: 1 / steps)."""
    lr_scale: float | None = Field(default=None, gt=0)
    """Rate at which block trains scales, as a share of their size; null is that of lr."""
    on_disk: bool = False
    """Keep the hidden states of all calibration sequences in temporary files, not in memory."""


class SourceBlock(Block):
    """One of several sources; a key that is null has the value of the data block."""

    path: Annotated[str, CONTENT]
    """File, directory, hub id, or `pydoc-topics`."""
    weight: float = Field(default=1.0, gt=0)
    """How often each row counts: 2 is twice in every epoch, 0.5 takes half of the rows, chosen by their content."""
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
    """Names of a form and the rows' keys for them, as in data.columns."""


class DataBlock(Block):
    """What to train on, and what to measure perplexity on."""

    path: Annotated[str | tuple[SourceBlock, ...], CONTENT]
    """A JSONL, JSON, CSV, Parquet or text file, a directory of such files, a hub id, or `pydoc-topics`; or a list of these,
    each a path or {path, weight, split, subset, revision, limit, ignore, columns}."""
    split: str = "train"
    """Split of a hub data set or of `pydoc-topics`."""
    subset: str | None = None
    """Configuration of a hub data set (`wikitext-2-raw-v1`)."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set; null is the newest commit, which the recipe beside the model then names."""
    limit: int | None = Field(default=None, ge=1)
    """Read only this many rows, of each source."""
    ignore: tuple[str, ...] = ()
    """Keys of rows that belong neither to prompt nor to answer; any other unknown key is refused, not dropped."""
    columns: dict[str, str] = Field(default={})
    """Names of a form and the rows' keys for them, {prompt: sentence, completion: label}; or texts composed of the keys,
    {prompt: "Review: {sentence}"}."""
    template: Annotated[str | None, CONTENT] = None
    """Chat template, saved with the model: alpaca, chatml or a .jinja file; null is the tokenizer's own."""
    loss: Loss = "all"
    """What is learned of a row: all answers of a conversation (the completion of a pair), the last one, or the full row."""
    block_tokens: int = Field(default=1024, ge=2)
    """Length of a training sequence, in tokens."""
    packing: Literal["auto", "wrapped", "bfd", "none"] = "auto"
    """How rows fill sequences: wrapped (cut to blocks), bfd (whole rows, best fit) or none; auto: wrapped for text."""
    holdout: float | None = Field(default=None, ge=0, lt=1)
    """Share of the rows that is held out of training and measured on, chosen by their content. Null is 0.02 of 500 rows or
    more, if eval_path names no other rows; 0 holds out none."""
    streaming: bool = False
    """Take the first rows until there are the tokens that train.steps need, without reading, or fetching, the rest."""
    num_proc: Annotated[int, SPLIT] = Field(default=1, ge=1)
    """Number of processes that tokenize; more than one pays off from some ten megabytes on."""
    eval_path: Annotated[str | None, CONTENT] = None
    """Held-out data for perplexity, in the same forms; null for what holdout splits off."""
    eval_split: str = "train"
    """Split of the held-out data."""
    eval_subset: str | None = None
    """Configuration of held-out data of the hub; null is that of data.path, if it names the same data set."""
    eval_tokens: Annotated[int | None, MEASURED] = Field(default=None, ge=2)
    """Measure on at most this many tokens."""

    @field_validator("path", mode="before")
    @classmethod
    def _path(cls, value: Any) -> str | tuple[SourceBlock, ...]:
        if isinstance(value, str):
            return value
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"data.path: {value!r} is not a path; give a file, a hub id, or a list of them")
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
        raise UserError(f"data.path.{number}: {entry!r} is not a path; give a file, a hub id, or {{path: .., ...}}")
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
    """Number of passes over the rows, instead of steps; the run prints how many steps that makes."""
    batch_tokens: int = Field(default=8192, ge=2)
    """Tokens in one optimizer step, over all sequences, accumulation and processes."""
    micro_batch: Annotated[int, SPLIT] = Field(default=4, ge=1)
    """Sequences in one forward pass; batch_tokens is reached by accumulating gradients."""
    lr: Annotated[float | None, RATE] = Field(default=None, gt=0)
    """Learning rate of deltas (and of QAT's master weight); null is the default for this many steps."""
    lr_scale: Annotated[float | None, RATE] = Field(default=None, ge=0)
    """Learning rate of scales and offsets; null is the default for this many steps."""
    parametrization: Literal["relative", "paper"] | None = None
    """Meaning of rates. relative: the share of a step of the grid that a weight may move in an optimizer step, so that one
    rate serves every width, rank and layer; paper: Adam's own rates, as peft's and the papers'. null: paper where lr or
    lr_scale is given, else relative."""
    lr_scale_bits: int | None = Field(default=None, ge=1, le=8)
    """For mixed widths: the width that lr_scale is meant for. A scale of 8 bits is a seventeenth of one of 4, and so is its
    rate then; a search sets it to the width of its rules. Null: every width gets lr_scale."""
    schedule: Annotated[Literal["linear", "cosine", "constant"], RATE] = "linear"
    """Shape of the learning rate's schedule after warm-up."""
    warmup: Annotated[float, RATE] = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    betas: Annotated[tuple[_Decay, _Decay], RATE] = (0.9, 0.95)
    """Adam's decay rates."""
    weight_decay: Annotated[float, RATE] = Field(default=0.0, ge=0)
    """Weight decay of deltas and master weights; scales have none."""
    clip: Annotated[float, RATE] = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    """8bit: moments in 8 bits; paged: in the computer's memory when a GPU's is full. Both need bitsandbytes."""
    seed: int = 0
    """Seed of the adapters' start and of the order of the data."""
    activation_checkpointing: Annotated[bool, SPLIT] = True
    """Recompute each block in the backward pass: a step is a third slower and keeps a fraction of the activations."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention while training: auto (the model's own), sdpa, eager, or flash_attention_2 (another library's, on CUDA)."""
    offload_activations: Annotated[bool, SPLIT] = False
    """Keep the activations for the backward pass in the computer's memory instead of the GPU's."""
    compile: Annotated[Literal["auto"] | bool, SPLIT] = "auto"
    """Put decoder layers through torch.compile while they train: steps get shorter, after a first one that takes a minute.
    auto compiles where the steps save more time than compiling costs."""
    processes: Annotated[int | None, SPLIT] = Field(default=None, ge=1)
    """Processes that train together on this machine, a GPU each: `trimtab run` starts them. Null is one, or as many as
    torchrun or accelerate has started."""
    shard: Annotated[Literal["none", "ddp", "fsdp"], SPLIT] = "ddp"
    """How several processes share the model: ddp (each has all of it, gradients are averaged) or fsdp (each keeps a part of
    every layer); none refuses more than one process."""
    save_steps: Annotated[int, HABIT] = Field(default=100, ge=1)
    """Steps between checkpoints (of trainable tensors and optimizer state only)."""
    keep_checkpoints: Annotated[int, HABIT] = Field(default=2, ge=2)
    """Checkpoints kept; at least two, since the newest may prove bad in the next step."""
    evaluate_steps: int | None = Field(default=None, ge=1)
    """Steps between measurements of the loss on held-out text, before the first and after the last step, too; the model of
    the lowest loss is the one that is folded and saved. Null measures nothing."""
    early_stop: Annotated[int | None, LENGTH] = Field(default=None, ge=1)
    """End training when this many measurements in a row have found no lower held-out loss; null trains to the last step."""
    log_steps: Annotated[int, HABIT] = Field(default=1, ge=1)
    """Steps between log lines."""
    beta: float | None = Field(default=None, ge=0)
    """For dpo, kto and grpo: how closely the model keeps to the reference; null is TRL's default, 0.1 (grpo: 0)."""
    reference: Annotated[str | None, CONTENT] = None
    """For dpo, kto and grpo: a float model as the reference, as in model.path; null is the model at step 0."""
    reward: str | None = None
    """For grpo: `module:function` that returns a number for each of `completions`; it gets the data's columns by name."""
    generations: int = Field(default=8, ge=2)
    """For grpo: number of answers to each prompt."""
    completion_tokens: int = Field(default=128, ge=1)
    """For grpo: largest length of an answer, in tokens."""
    report_to: Annotated[str, HABIT] = "none"
    """Logger: none, tensorboard, wandb, trackio, or another one that transformers supports."""

    @property
    def moment_bytes(self) -> int:
        """Bytes of each of Adam's two moments of a trainable parameter."""
        return 1 if "8bit" in self.optimizer else 4


class DistillBlock(Block):
    """Learn from the float model as well: (1 - weight) cross-entropy + weight temperature^2 KL(float || tuned)."""

    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the divergence in the loss; cross-entropy has the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Divisor of both models' logits in the divergence; above 1, unlikely tokens count for more."""
    teacher: Literal["bfloat16", "int8", "cached"] = "cached"
    """bfloat16 or int8 keep the float model in memory; cached writes its likeliest tokens to disk before training."""
    top_k: int = Field(default=64, ge=1)
    """Tokens whose probabilities a cache keeps at every position; the mass of all others is kept as one number."""
    cache: Annotated[str | None, PLACE] = None
    """Directory of the cache, for every run on the same sequences; null is `<output>-teacher`."""


class EvaluateBlock(Block):
    """What to measure after the run, besides the tuned model."""

    baselines: Annotated[tuple[Literal["float", "rounded"], ...], AFTER] = ()
    """Perplexity of the untuned float model and of the rounded one before tuning."""
    parity: Annotated[bool, AFTER] = True
    """Compare the logits of the trained, the folded and the reloaded model; on random tokens without held-out data."""
    parity_tokens: Annotated[int, AFTER] = Field(default=512, ge=8)
    """Number of tokens that parity is measured on."""
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
    """Prune the float model first; see `trimtab prune --help`. Later stages, a teacher included, see the pruned model."""

    ratio: float | None = None
    """Share of the parameters to remove, at least."""
    bytes: str | int | None = None
    """Or the largest size of the pruned model: 200MiB."""
    layers: int | None = None
    """Or a number of whole layers to drop."""
    what: Literal["widths", "layers"] = "widths"
    """What is removed for a ratio or size: widths (heads and channels) or whole layers."""
    importance: Literal["taylor", "magnitude", "random"] = "taylor"
    """How the importance of heads and channels is measured."""
    keep: tuple[int, ...] = ()
    """Layers that are not dropped, and that alone decide the widths."""
    count_embeddings: bool = False
    """Whether the ratio counts the embeddings as well."""
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
    budget_of: Literal["native", "compressed-tensors", "gptq", "awq", "gguf", "mlx", "dense", "peft"] = "native"
    """The format in which sizes are counted. For other formats than native that is the size of the tensors, without the
    header (in GGUF with the vocabulary). GGUF stores 2 and 3 bits in 4, unless rules ask for k-quants."""
    budget_training: str | int | None = None
    """Largest predicted peak of training, such as 6GiB: never exceeded. On a GPU it is the peak of the GPU's memory, with
    context and libraries."""
    objective: Literal["rounded", "tuned"] = "rounded"
    """rounded: KL to the float model, no training; tuned: held-out loss after `steps` steps of training, of the answers
    alone where rows have prompts."""
    steps: int = Field(default=50, ge=1)
    """Training steps of a tuned trial."""
    promote: int | None = Field(default=None, ge=2)
    """Training steps of longer trials, to which the best quarter of the trials is promoted; null promotes none."""
    sensitivity: Literal["exact", "fisher"] = "fisher"
    """The additive prior: fisher (one backward pass a window) or exact (a forward pass for each unit and width)."""
    tokens: int = Field(default=2048, ge=2)
    """Number of held-out tokens that every trial is measured on (for `rounded`, training text if none is held out)."""
    sensitivity_tokens: int = Field(default=1024, ge=2)
    """Number of training tokens that sensitivities are measured on."""
    uniform: bool = True
    """Whether every uniform width within the budget is tried as well."""
    storage: str | None = None
    """Journal file, or the URL of a database (postgresql://..); null is search/journal.log in the output."""
    workers: int | None = Field(default=None, ge=1)
    """Number of processes on this machine, or of trials that Ray runs at a time; other machines join with the same command
    and storage. null is one for each of `devices`, with Ray as many as its cluster has room for, else 1."""
    devices: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """GPU numbers, one for each worker: [0, 1]; null computes everything on model.device."""
    engine: Literal["processes", "ray"] = "processes"
    """What runs the trials: processes of this command, or tasks of a Ray cluster."""
    resources: dict[str, Annotated[float, Field(gt=0)]] | None = Field(default=None, min_length=1)
    """Ray resources of each trial, such as {gpu: 1, cpu: 4}, or names that the cluster defines; null is {cpu: 1}."""
    seed: int = 0
    """Seed of the search."""
