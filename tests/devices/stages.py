"""What the tests of devices do in a process that has two CUDA devices: functions of plain values, with plain results."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = "cuda:1"
"""Not the first one, where forgotten tensors would go."""


@contextlib.contextmanager
def counting() -> Iterator[set[str]]:
    """The devices on which products and trimtab's operators are computed meanwhile."""
    import cuda

    from trimtab.kernels import channel

    channel.on_gpu = lambda tensor: False  # its kernels are launched and no operators: only a real GPU runs them
    cuda.COUNTS.clear()
    found: set[str] = set()
    yield found
    found.update(device for _, device in cuda.COUNTS)


def ran(values: dict[str, Any], **options: Any) -> tuple[dict[str, Any], set[str]]:
    """A run's metrics, and where it was computed."""
    import trimtab as tt

    with counting() as where:
        metrics = tt.run(values, **options)
    return metrics, where


def reference(values: dict[str, Any]) -> set[str]:
    """Where a run's reference is, by name and of its own. (TRL's losses want kernels that only a real GPU has.)"""
    from trimtab.models.sources import open_source
    from trimtab.recipe.recipe import from_dict
    from trimtab.training.build import RunContext, build
    from trimtab.training.preference_trainers import reference_of

    recipe = from_dict(values)
    model = build(recipe, RunContext(open_source(recipe.model.path), None, None, None, None, None))
    of_its_own = recipe.model_copy(update={"train": recipe.train.model_copy(update={"reference": None})})
    found = [reference_of(recipe, model), reference_of(of_its_own, model)]
    return {str(p.device) for some in found for p in some.parameters()}


def syncs(values: dict[str, Any]) -> dict[str, int]:
    """What the host waited for in the micro-steps of a run, by the place that asked."""
    import cuda

    import trimtab as tt
    from trimtab.training.ours import Ours

    found: dict[str, int] = {}
    inside = Ours.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = dict(cuda.SYNCS)
        loss = inside(self, *args, **kwargs)
        for place, count in cuda.SYNCS.items():
            if count > before.get(place, 0):
                found[place] = found.get(place, 0) + count - before.get(place, 0)
        found["micro-steps"] = found.get("micro-steps", 0) + 1
        return loss

    Ours.training_step = step  # type: ignore[method-assign]
    try:
        tt.run(values)
    finally:
        Ours.training_step = inside  # type: ignore[method-assign]
    return found


@contextlib.contextmanager
def no_float64() -> Iterator[None]:
    """The devices have none, as Apple's."""
    import cuda
    import torch

    from trimtab import devices

    before = devices._NO_FLOAT64
    cuda.REFUSED.add(torch.float64)
    devices._NO_FLOAT64 = ("cuda",)  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda.REFUSED.clear()
        devices._NO_FLOAT64 = before


def without_float64(values: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """A run on devices that have no float64."""
    with no_float64():
        return ran(values)


def commands(folder: str, other: str, text: str, tasks: str) -> tuple[dict[str, Any], set[str]]:
    """What every command that runs a saved model finds."""
    import trimtab as tt

    about: dict[str, Any] = {"data": text, "device": OURS}
    with counting() as where:
        compared = tt.compare(folder, other, **about, tokens=128, block_tokens=32, out=f"{folder}-compared")
        found = {
            "evaluate": tt.evaluate(folder, **about, tokens=128, block_tokens=32).perplexity,
            "compare": compared.kl,
            "chat": tt.chat(folder, device=OURS).answer("2 plus 3?", 4),
            "harness": tt.harness(
                folder, tasks=["piqa"], data=tasks, device=OURS, out=f"{folder}-scores.json"
            ).scores[folder][0].value,
        }  # fmt: skip
    return found, where


def served(export: str, text: str) -> tuple[Any, set[str]]:
    """What transformers computes of an export beside the trained model."""
    import trimtab as tt

    with counting() as where:
        return tt.parity(export, "transformers", data=text, tokens=64, device=OURS), where


def exported(folder: str, names: list[str], out: str, device: str) -> dict[str, str]:
    """Hashes of what each format's files hold, the models' own."""
    import hashlib

    import trimtab as tt

    found = {}
    for name in names:
        target = Path(out) / name
        tt.export(folder, name, target, device=device)
        for file in sorted(target.iterdir()):
            if file.suffix in (".gguf", ".safetensors"):
                found[f"{name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def methods(model: str) -> dict[str, tuple[float, set[str]]]:
    """Of every method, loaded onto the device: the loss after a step of training and folding, and where it was computed."""
    import torch

    import trimtab as tt
    from trimtab import methods

    found = {}
    for kind in methods.ALL:
        torch.manual_seed(0)
        with counting() as where:
            method = kind() if not hasattr(kind(), "rank") else kind(rank=4)  # type: ignore[call-arg]
            rules = [{"match": "*", "grid": {"bits": 4, "group": 32}}] if method.grid is None else None
            loaded, _ = tt.load(model, method, None if rules is None and method.grid else rules, device=OURS)
            trained = [p for p in loaded.parameters() if p.requires_grad]
            ids = torch.arange(64, device=OURS).view(2, 32)
            if trained:
                optimizer = torch.optim.SGD(trained, lr=1e-3)
                loaded(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            tt.fold(loaded, merge=True)
            with torch.no_grad():
                loss = float(loaded(input_ids=ids, labels=ids).loss)
        found[kind.name] = loss, where
    return found


def loaded(model: str) -> list[str]:
    """Tensors that have numbers and are not on the device when a layer has just been put in place, and at the end."""
    import torch

    import trimtab as tt
    from trimtab.models import load
    from trimtab.models.layout import tensors_of

    here: list[str] = []
    inside = load.place

    def look(whole: Any) -> None:
        there = torch.device(OURS)
        here.extend(name for name, _, _, t in tensors_of(whole) if not t.is_meta and t.device != there)

    def place(whole: Any, *args: Any) -> None:
        inside(whole, *args)
        look(whole)

    load.place = place
    try:
        made, _ = tt.load(model, tt.methods.LrQat(rank=2), device=OURS)
    finally:
        load.place = inside
    look(made)
    return here


def pruned_and_searched(values: dict[str, Any], model: str, out: str) -> tuple[dict[str, Any], set[str]]:
    """A run with all stages, and pruning by itself, of whole layers and by magnitude; on devices without float64."""
    import trimtab as tt

    with no_float64(), counting() as where:
        metrics = tt.run(values)
        tt.prune(model, out, layers=1, data=values["data"]["path"], tokens=64, block_tokens=32, device=OURS)
        tt.prune(f"{out}", f"{out}-2", ratio=0.2, importance="magnitude", multiple_of=32, device=OURS,
                 data=values["data"]["path"], tokens=64, block_tokens=32)  # fmt: skip
    return metrics, where


def split_over_two(folder: str) -> tuple[set[str], float]:
    """A saved model over both devices, as accelerate shares it out: where it is, and its loss."""
    import torch
    import transformers

    import trimtab  # noqa: F401

    shared = {0: "40KB", 1: "1GB"}
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory=shared)
    ids = torch.arange(32, device="cuda:0")[None]
    with torch.no_grad():
        loss = found(input_ids=ids, labels=ids).loss
    return {str(p.device) for p in found.parameters()}, float(loss)


def planned(values: dict[str, Any]) -> dict[str, Any]:
    """A plan's view of the device."""
    import trimtab as tt
    from trimtab.report.planned import tables

    plan = tt.plan(values)
    lines = [line for line in tables(plan, 10**12, str) if isinstance(line, str)]
    return {"device": plan.device, "free": plan.free, "beside": plan.beside, "total": plan.total, "line": lines[0]}


def embedded(model: str, token: int) -> str:
    """What a quantized embedding on the device says of this id, which is not waited for."""
    import torch

    import trimtab as tt

    loaded, _ = tt.load(model, tt.methods.Rtn(), [{"match": "model.embed_tokens", "grid": {"bits": 8}}], device=OURS)
    try:
        loaded.get_input_embeddings()(torch.tensor([[1, token]], device=OURS))
    except RuntimeError as error:
        return str(error)
    return "found"


def searched(values: dict[str, Any]) -> tuple[list[str], str]:
    """Where each trial of a search was made; and what is said of a device that is not there."""
    import pytest

    import trimtab as tt
    from trimtab.errors import UserError

    refused = {**values, "search": {**values["search"], "devices": [1, 2]}}
    with pytest.raises(UserError) as caught:
        tt.search(refused)
    found = tt.search(values)
    return [t.where for t in found.ledger.trials() if t.state == "complete"], str(caught.value)
