"""The one path: recipe in, model out.

    load (quantizing while it reads) -> measure -> train -> fold -> save -> reload -> measure what will be served

Everything that can be wrong is checked before anything is written, and the model is written only when it is whole.
"""

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab import data, loading, memory, simulation, teacher, teacher_cache, train
from trimtab.errors import UserError
from trimtab.evaluate import harness, parity
from trimtab.evaluate.parity import Parity
from trimtab.evaluate.perplexity import perplexity
from trimtab.export import native
from trimtab.gptq import Gptq
from trimtab.preparing import LayerFold, fitted_starts, fold
from trimtab.recipe import Recipe


class Observer(Protocol):
    """Whoever watches a run."""

    def say(self, text: str) -> None:
        """A line about a stage."""

    def step(self, step: train.Step) -> None:
        """An optimizer step was taken."""

    def finish(self, metrics: Mapping[str, Any], parities: Sequence[Parity]) -> None:
        """The run is over."""


class Quiet:
    """Watches in silence."""

    def say(self, text: str) -> None:
        """Nothing."""

    def step(self, step: train.Step) -> None:
        """Nothing."""

    def finish(self, metrics: Mapping[str, Any], parities: Sequence[Parity]) -> None:
        """Nothing."""


def run(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, show: Observer | None = None
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: from `recipe.read` or `recipe.from_dict`.
        overwrite: replace what an earlier run left in the output directory.
        resume: go on from its last checkpoint.
        show: told what happens; None for silence.

    Returns:
        The metrics, as written to `<output>/metrics.json`.

    Raises:
        UserError: for anything the user can mend; nothing is then left half-written.
    """
    watch = show or Quiet()
    check_output(recipe.out, overwrite, resume)
    _check_inputs_apart(recipe)
    if resume:
        train.last_checkpoint(recipe)
    rows, held_out = _rows(recipe)
    source = loading.open_source(recipe.model.path)
    tokenizer = _tokenizer(recipe, source)
    _check(recipe, tokenizer, rows, source)
    blocks = _blocks(recipe, held_out, tokenizer)
    start = _start(recipe, rows, tokenizer)
    metrics: dict[str, Any] = {"perplexity": {}, "answers": {}, "output": str(recipe.out), "method": recipe.method.name}
    _measure_float(recipe, source, blocks, metrics, watch)
    asking_bytes = _ask_teacher(recipe, source, tokenizer, rows, watch)
    model = _load(recipe, source, start, metrics, watch)
    _simulate(recipe, model, tokenizer, rows, watch)
    if "rounded" in recipe.evaluate.baselines and blocks is not None:
        watch.say("measuring the rounded model, before tuning")
        metrics["perplexity"]["rounded"] = perplexity(model, blocks)
    if recipe.evaluate.prompt:
        metrics["answers"]["before"] = answer(model, tokenizer, recipe.evaluate.prompt, recipe.evaluate.answer_tokens)
    if overwrite and recipe.out.exists():
        shutil.rmtree(recipe.out)
    metrics |= _tune(recipe, model, tokenizer, rows, resume, watch)
    metrics["peak_memory_bytes"] = max(memory.peak_bytes(), asking_bytes)
    parities = _fold_and_save(recipe, model, tokenizer, blocks, metrics, watch)
    del model
    gc.collect()
    _measure_saved(recipe, tokenizer, blocks, metrics, watch)
    (recipe.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    watch.finish(metrics, parities)
    return metrics


def _measure_float(
    recipe: Recipe,
    source: loading.ModelSource | None,
    blocks: Tensor | None,
    metrics: dict[str, Any],
    watch: Observer,
) -> None:
    """Perplexity of the untuned float model where asked; it is gone before the next model comes."""
    if "float" not in recipe.evaluate.baselines:
        return
    watch.say("measuring the float model (untuned)")
    model = loading.load_float(recipe.model.path, dtype=recipe.dtype, source=source)
    assert blocks is not None, "the recipe was checked to have held-out data"
    metrics["perplexity"]["float"] = perplexity(model, blocks)
    del model
    gc.collect()


def _ask_teacher(recipe: Recipe, source: loading.ModelSource | None, tokenizer: Any, rows: Any, watch: Observer) -> int:
    """Fill the teacher's cache where the recipe has one; returns the peak memory that took."""
    memory.reset_peak()
    teacher_cache.ask(recipe, tokenizer, rows, train.packed, source=source, say=watch.say)
    gc.collect()
    return memory.peak_bytes()


def _load(
    recipe: Recipe,
    source: loading.ModelSource | None,
    start: Gptq | None,
    metrics: dict[str, Any],
    watch: Observer,
) -> PreTrainedModel:
    """The model, quantized and with adapters."""
    memory.reset_peak()
    how = "" if start is None else f" by GPTQ on {start.tokens.numel():,} tokens"
    watch.say(f"loading {recipe.model.path} for {recipe.method.name}, quantizing{how} while it reads")
    torch.manual_seed(recipe.train.seed)
    model, _ = loading.load(
        recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype, source=source, start=start
    )
    metrics["load_peak_memory_bytes"] = memory.peak_bytes()
    for line in fitted_starts(model):
        watch.say(line)
    return model


def check_output(out: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output directory that holds something, unless told what to do with it."""
    if overwrite and resume:
        raise UserError("--overwrite removes what --resume goes on from; pass one of them")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"output: {above} is a file, so {out} cannot be made in it; set `output`")
    if not out.exists():
        if resume:
            raise UserError(f"--resume: {out} does not exist; run without it")
        return
    if not out.is_dir():
        raise UserError(f"output: {out} is a file, not a directory")
    if resume or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"output: {out} is not empty; pass --overwrite to replace it, --resume to go on, or set `output`"
        )
    if not any((out / name).exists() for name in ("recipe.yaml", "metrics.json", "checkpoints", "quantization.json")):
        raise UserError(f"output: {out} holds something that trimtab did not write; remove it yourself or set `output`")


def _check_inputs_apart(recipe: Recipe) -> None:
    """Refuse to write over, or to remove, what the run reads."""
    block, out = recipe.data, recipe.out.resolve()
    inputs = {"model.path": recipe.model.path, "start.path": recipe.start.path or ""}
    inputs |= {} if block is None else {"data.path": block.path, "data.eval_path": block.eval_path or ""}
    for key, path in inputs.items():
        found = Path(path).expanduser()
        if path and found.exists() and (found.resolve() == out or out in found.resolve().parents):
            raise UserError(f"{key}: {path} is in the output directory {recipe.out}; set `output` to another one")


def _check(recipe: Recipe, tokenizer: Any, rows: Any, source: loading.ModelSource | None) -> None:
    """Raise a `UserError` for what training, its teacher and the tasks would only complain of later."""
    train.check(recipe, tokenizer, rows)
    teacher.check(recipe, source)
    if recipe.evaluate.tasks:
        harness.check(recipe.evaluate.tasks, recipe.evaluate.tasks_data)


def _rows(recipe: Recipe) -> tuple[Any, Any]:
    """Training rows and held-out rows, read before any model is."""
    block = recipe.data
    if block is None:
        return None, None
    wanted = recipe.train.steps or (recipe.activations is not None and recipe.activations.mode == "static")
    rows = data.load_rows(block.path, split=block.split, limit=block.limit) if wanted else None
    held_out = None if block.eval_path is None else data.load_rows(block.eval_path, split=block.eval_split)
    return rows, held_out


def _start(recipe: Recipe, rows: Any, tokenizer: Any) -> Gptq | None:
    """GPTQ with its calibration windows, from data of its own or from the training data."""
    block = recipe.start
    if block.name == "rtn":
        return None
    if block.path is not None:
        rows = data.load_rows(block.path, split=block.split)
    elif rows is None and recipe.data is not None:
        rows = data.load_rows(recipe.data.path, split=recipe.data.split, limit=recipe.data.limit)
    length = min(recipe.data.block_tokens if recipe.data is not None else 1024, block.tokens)
    windows = data.token_blocks(rows, tokenizer, block_tokens=length, limit_tokens=block.tokens)
    return Gptq(tokens=windows, damping=block.damping, act_order=block.act_order)


def _tokenizer(recipe: Recipe, source: loading.ModelSource | None) -> Any:
    path = recipe.model.path
    tokenizer = loading.native_tokenizer(loading.resolve(path)) if source is None else source.tokenizer()
    needs = recipe.data or recipe.evaluate.prompt or recipe.evaluate.tasks or recipe.start.name == "gptq"
    if tokenizer is None and needs:
        raise UserError(f"model.path: {path}: was saved without a tokenizer; add its tokenizer files to that directory")
    return tokenizer


def _blocks(recipe: Recipe, held_out: Any, tokenizer: Any) -> Tensor | None:
    """Held-out tokens (W, L)."""
    if recipe.data is None or held_out is None:
        return None
    limit = recipe.data.eval_tokens
    return data.token_blocks(held_out, tokenizer, block_tokens=recipe.data.block_tokens, limit_tokens=limit)


def _simulate(recipe: Recipe, model: PreTrainedModel, tokenizer: Any, rows: Any, watch: Observer) -> None:
    """Round activations and KV cache where asked; what a base from an earlier run rounds, it goes on rounding."""
    kind, kv = recipe.activations, recipe.kv
    if kind is None and kv is None:
        return
    asked = [] if kind is None else [f"{kind.bits}-bit {kind.mode} activations"]
    asked += [] if kv is None else [f"a {kv.bits}-bit KV cache (which saves no memory here)"]
    watch.say(f"simulating {' and '.join(asked)}")
    tokens = None
    if kind is not None and kind.mode == "static":
        assert recipe.data is not None, "the recipe was checked to have data"
        size, limit = recipe.data.block_tokens, simulation.CALIBRATION_TOKENS
        tokens = data.token_blocks(rows, tokenizer, block_tokens=size, limit_tokens=limit)
    simulation.simulate(model, activations=kind, kv=kv, calibration=tokens)


def _tune(
    recipe: Recipe, model: PreTrainedModel, tokenizer: Any, rows: Any, resume: bool, watch: Observer
) -> dict[str, Any]:
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not recipe.train.steps:
        recipe.out.mkdir(parents=True, exist_ok=True)
        return {"train_seconds": 0.0, "tokens": 0, "trainable": numbers, "losses": []}
    watch.say(f"training {numbers:,} numbers for {recipe.train.steps} steps on {data.describe(rows)}")
    done = train.fit(model, tokenizer, recipe, resume=resume, on_step=watch.step, rows=rows)
    return {"train_seconds": done.seconds, "tokens": done.tokens, "trainable": numbers, "losses": done.losses}


def _fold_and_save(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: Any,
    blocks: Tensor | None,
    metrics: dict[str, Any],
    watch: Observer,
) -> list[Parity]:
    """Fold, save, and compare the three stages where asked."""
    block_tokens = 0 if recipe.data is None else recipe.data.block_tokens
    wanted = recipe.evaluate.parity and blocks is not None
    some = blocks[: max(1, recipe.evaluate.parity_tokens // block_tokens)] if wanted and blocks is not None else None
    trained = None if some is None else parity.logits_of(model, some)
    watch.say("folding and saving")
    folded = fold(model, merge=recipe.merge)
    metrics["codes_changed_by_fold"] = sum(layer.changed for layer in folded if layer.kind == "bitwise")
    metrics["fold"] = _summary(folded)
    metrics["fold_error"] = max((layer.error for layer in folded if layer.action == "merged"), default=0.0)
    native.save(model, recipe.out, tokenizer, recipe=recipe.to_yaml())
    metrics["disk_bytes"] = native.disk_bytes(recipe.out)
    if some is None or trained is None:
        if recipe.evaluate.parity:
            watch.say("no held-out data (data.eval_path), so trained, folded and saved are not compared")
        return []
    watch.say("comparing trained, folded, and reloaded in a fresh process")
    parities = parity.report(trained, parity.logits_of(model, some), recipe.out, some, recipe.dtype)
    metrics["max_logit_difference"] = max(p.max_difference for p in parities)
    content = {"tokens": some.numel(), "fold": metrics["fold"], "stages": parity.to_json(parities)}
    (recipe.out / "parity.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return parities


def _summary(folded: list[LayerFold]) -> str:
    """For example `210 layers folded, bitwise`."""
    counts: dict[str, int] = {}
    for layer in folded:
        key = f"{layer.action}, {layer.kind}" if layer.action != "kept" else "kept as adapters"
        counts[key] = counts.get(key, 0) + 1
    return "; ".join(f"{count} layers {what}" for what, count in counts.items()) or "nothing to fold"


def _measure_saved(
    recipe: Recipe, tokenizer: Any, blocks: Tensor | None, metrics: dict[str, Any], watch: Observer
) -> None:
    """Perplexity and an answer of what was saved: what is evaluated is what is served."""
    if blocks is None and not recipe.evaluate.prompt and not recipe.evaluate.tasks:
        return
    watch.say("measuring the saved model")
    model = AutoModelForCausalLM.from_pretrained(recipe.out, dtype=recipe.dtype)
    if blocks is not None:
        metrics["perplexity"]["tuned"] = perplexity(model, blocks)
    if recipe.evaluate.tasks:
        block = recipe.evaluate
        scores = harness.run(model, tokenizer, block.tasks, block.tasks_data or "", limit=block.tasks_limit)
        harness.write(recipe.out / "harness.json", {str(recipe.out): scores})
        metrics["tasks"] = {f"{s.task} {s.metric}": [s.value, s.stderr, len(s.items)] for s in scores}
    if recipe.evaluate.prompt:
        metrics["answers"]["after"] = answer(model, tokenizer, recipe.evaluate.prompt, recipe.evaluate.answer_tokens)


def answer(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int) -> str:
    """A greedy answer to one question, through the chat template where there is one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {
        k: v.to(next(model.parameters()).device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")
    }
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = cast(Any, model).generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
