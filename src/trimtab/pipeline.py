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

from trimtab import data, export, loading, memory, peft_start, train
from trimtab.errors import UserError
from trimtab.evaluate import parity
from trimtab.evaluate.parity import Parity
from trimtab.evaluate.perplexity import perplexity
from trimtab.export import exporting, native
from trimtab.preparing import LayerFold, fold, targets
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
    train.check(recipe, tokenizer, rows)
    _check_exports(recipe, source)
    blocks = _blocks(recipe, held_out, tokenizer)
    metrics: dict[str, Any] = {"perplexity": {}, "answers": {}, "output": str(recipe.out), "method": recipe.method.name}
    if "float" in recipe.evaluate.baselines:
        watch.say("measuring the float model (untuned)")
        model = loading.load_float(recipe.model.path, dtype=recipe.dtype, source=source)
        assert blocks is not None, "the recipe was checked to have held-out data"
        metrics["perplexity"]["float"] = perplexity(model, blocks)
        del model
        gc.collect()
    memory.reset_peak()
    watch.say(f"loading {recipe.model.path} for {recipe.method.name}, quantizing while it reads")
    torch.manual_seed(recipe.train.seed)
    model, _ = loading.load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype, source=source)
    if recipe.model.adapter is not None:
        peft_start.start_from(model, recipe.model.adapter)
    metrics["load_peak_memory_bytes"] = memory.peak_bytes()
    if "rounded" in recipe.evaluate.baselines and blocks is not None:
        watch.say("measuring the rounded model, before tuning")
        metrics["perplexity"]["rounded"] = perplexity(model, blocks)
    if recipe.evaluate.prompt:
        metrics["answers"]["before"] = answer(model, tokenizer, recipe.evaluate.prompt, recipe.evaluate.answer_tokens)
    if overwrite and recipe.out.exists():
        shutil.rmtree(recipe.out)
    metrics |= _tune(recipe, model, tokenizer, rows, resume, watch)
    metrics["peak_memory_bytes"] = memory.peak_bytes()
    parities = _fold_and_save(recipe, model, tokenizer, blocks, metrics, watch)
    del model
    gc.collect()
    _measure_saved(recipe, tokenizer, blocks, metrics, watch)
    (recipe.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    watch.finish(metrics, parities)
    return metrics


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


def _check_exports(recipe: Recipe, source: loading.ModelSource | None) -> None:
    """Hold every layer's grid against every format of the recipe, on names and shapes."""
    _, laid_out = loading.skeleton(recipe.model.path, source)
    found = targets(laid_out, recipe.method, recipe.rules)
    exporting.check(recipe.export, found, recipe.method, recipe.merge, recipe.dtype)


def _check_inputs_apart(recipe: Recipe) -> None:
    """Refuse to write over, or to remove, what the run reads."""
    block, out = recipe.data, recipe.out.resolve()
    inputs = {"model.path": recipe.model.path}
    inputs |= {} if block is None else {"data.path": block.path, "data.eval_path": block.eval_path or ""}
    for key, path in inputs.items():
        found = Path(path).expanduser()
        if path and found.exists() and (found.resolve() == out or out in found.resolve().parents):
            raise UserError(f"{key}: {path} is in the output directory {recipe.out}; set `output` to another one")


def _rows(recipe: Recipe) -> tuple[Any, Any]:
    """Training rows and held-out rows, read before any model is."""
    block = recipe.data
    if block is None:
        return None, None
    rows = data.load_rows(block.path, split=block.split, limit=block.limit) if recipe.train.steps else None
    held_out = None if block.eval_path is None else data.load_rows(block.eval_path, split=block.eval_split)
    return rows, held_out


def _tokenizer(recipe: Recipe, source: loading.ModelSource | None) -> Any:
    path = recipe.model.path
    tokenizer = loading.native_tokenizer(loading.resolve(path)) if source is None else source.tokenizer()
    if tokenizer is None and (recipe.data is not None or recipe.evaluate.prompt):
        raise UserError(f"model.path: {path}: was saved without a tokenizer; add its tokenizer files to that directory")
    return tokenizer


def _blocks(recipe: Recipe, held_out: Any, tokenizer: Any) -> Tensor | None:
    """Held-out tokens (W, L)."""
    if recipe.data is None or held_out is None:
        return None
    limit = recipe.data.eval_tokens
    return data.token_blocks(held_out, tokenizer, block_tokens=recipe.data.block_tokens, limit_tokens=limit)


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
    formats = {name: export.get(name) for name in recipe.export if name != "native"}
    unfolded = [name for name, format_ in formats.items() if format_.adapters == "kept"]
    _export(recipe, model, tokenizer, unfolded, watch)
    watch.say("folding and saving")
    folded = fold(model, merge=recipe.merge)
    metrics["codes_changed_by_fold"] = sum(layer.changed for layer in folded if layer.kind == "bitwise")
    metrics["fold"] = _summary(folded)
    metrics["fold_error"] = max((layer.error for layer in folded if layer.action == "merged"), default=0.0)
    native.save(model, recipe.out, tokenizer, recipe=recipe.to_yaml())
    metrics["disk_bytes"] = native.disk_bytes(recipe.out)
    _export(recipe, model, tokenizer, [name for name in formats if name not in unfolded], watch)
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


def _export(recipe: Recipe, model: PreTrainedModel, tokenizer: Any, names: Sequence[str], watch: Observer) -> None:
    """Write these formats into folders of the output directory."""
    for name in names:
        watch.say(f"exporting to {name}")
        exporting.write(model, tokenizer, name, recipe.out / name, source=recipe.out, recipe_text=recipe.to_yaml())


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
    if blocks is None and not recipe.evaluate.prompt:
        return
    watch.say("measuring the saved model")
    model = AutoModelForCausalLM.from_pretrained(recipe.out, dtype=recipe.dtype)
    if blocks is not None:
        metrics["perplexity"]["tuned"] = perplexity(model, blocks)
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
