"""Budgets of a search, over random models, methods, spaces, priors and budgets: nothing proposed is ever above them."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

import tiny
import trimtab as tt
from trimtab.bit_search import results
from trimtab.bit_search.ledger import Trial, Wish
from trimtab.bit_search.searching import Search
from trimtab.formats.native.write import save
from trimtab.memory.peak import peak_of_training
from trimtab.models.simulate import rounding
from trimtab.models.sources import open_source
from trimtab.recipe import recipe

CONFIGS: tuple[type[PreTrainedConfig], ...] = (LlamaConfig, Qwen2Config)
METHODS: list[dict[str, Any]] = [
    {"name": "lr-qat", "rank": 2},
    {"name": "lr-qat", "rank": 2, "storage": "int"},
    {"name": "qa-hira"},
    {"name": "qlora", "rank": 2},
]
GRID = {"bits": 4, "group": 32, "zero": "integer"}
share = st.floats(0, 1)


@st.composite
def models(draw: st.DrawFn) -> PreTrainedConfig:
    """Of any width, depth and sharing of heads that the grids' groups of 32 fit."""
    return draw(st.sampled_from(CONFIGS))(
        vocab_size=draw(st.integers(64, 90)),
        hidden_size=draw(st.sampled_from([32, 64, 96])),
        intermediate_size=draw(st.sampled_from([32, 96, 160])),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=4,
        num_key_value_heads=draw(st.sampled_from([1, 2, 4])),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def searches(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(METHODS))
    ranks = draw(st.sampled_from([None, [2, 4]])) if method["name"] == "qlora" else None
    return {
        "model": draw(models()),
        "method": method,
        "search": {
            "units": draw(st.sampled_from(["layer", "fusion"])),
            "bits": draw(st.sampled_from([[2, 3, 4, 8], [3, 4], [2, 8, 16]])),
            "ranks": ranks,
            "objective": "tuned",
            "steps": 1,
            "promote": 2,
            "trials": 5,
            "uniform": draw(st.booleans()),
        },
        "micro_batches": draw(st.sampled_from([1, 2])),
        "checkpointing": draw(st.booleans()),
        "distill": draw(st.sampled_from([None, {"teacher": "bfloat16"}])),
        "activations": draw(st.sampled_from([None, {"bits": 8, "mode": "static"}])),
        "bytes": draw(share),
        "training": draw(st.none() | share),
        "seed": draw(st.integers(0, 99)),
    }


def write(config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "m")
    tiny.tokenizer().save_pretrained(folder / "m")
    tiny.text(folder / "t.jsonl")


def made(drawn: dict[str, Any], folder: Path, **budgets: int) -> Search:
    values = tiny.recipe(
        folder / "m",
        folder / "t.jsonl",
        folder / "out",
        method=drawn["method"],
        rules=[{"match": "lm_head", "grid": None}, {"match": "*", "grid": GRID}],
        train={"batch_tokens": 64 * drawn["micro_batches"], "activation_checkpointing": drawn["checkpointing"]},
        distill=drawn["distill"],
        activations=drawn["activations"],
        search=drawn["search"] | budgets,
        name=f"{len(budgets)}",
    )
    return Search(recipe.from_dict(values))


def between(low: int, high: int, part: float) -> int:
    return low + int(part * (high - low))


def peak(search: Search, wish: Wish) -> int:
    """What `trimtab plan` would say of the recipe of this point, from its fields one by one."""
    used = results.point_recipe(search, Trial(0, wish, "complete"), 1)
    skeleton = open_source(search.recipe.model.path).layout()
    teacher = sum(p.numel() * 2 for p in skeleton.parameters()) if used.distill else 0
    planned = peak_of_training(
        skeleton,
        used.method,
        used.rules,
        micro_batch=2,
        block_tokens=32,
        dtype=torch.bfloat16,
        checkpointing=used.train.activation_checkpointing,
        micro_batches=used.train.batch_tokens // 64,
        activations=used.activations,
    )
    return replace(planned, teacher=teacher).total


def on_disk(search: Search, wish: Wish, out: Path) -> int:
    """Bytes of the weights that a run of this point writes."""
    model = AutoModelForCausalLM.from_pretrained(search.recipe.model.path, dtype=torch.bfloat16)
    tt.prepare(model, search.recipe.method, search.space.rules(wish.configuration))
    if search.recipe.activations is not None and rounding(model):
        ids = torch.arange(64).view(2, 32)
        tt.simulate(model, activations=search.recipe.activations, calibration=ids)
    tt.fold(model)
    save(model, out)
    return sum(f.stat().st_size for f in out.glob("*.safetensors"))


# Nothing is shrunk: an example takes seconds, and is small as it is.
@settings(
    max_examples=10,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(drawn=searches())
def test_nothing_proposed_is_above_a_budget(drawn: dict[str, Any]) -> None:
    draw = np.random.default_rng(drawn["seed"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(drawn["model"], folder)
        free = made(drawn, folder)
        units, choices = free.space.bytes_UC.shape
        smallest, largest = ((c,) * units for c in (0, choices - 1))
        budget = between(free.space.bytes(smallest), free.space.bytes(largest), drawn["bytes"])
        limits = {"budget": budget}
        if drawn["training"] is not None:
            # Where 16 bits everywhere leave nothing to train, that is never proposed and has no peak.
            ends = sorted(free._peak(c) for c in (smallest, largest) if free.admits(c))
            limits["budget_training"] = between(ends[0], ends[-1], drawn["training"])
        search = made(drawn, folder, **limits)
        cost = -np.sort(-draw.exponential(size=(units, choices)), axis=1)
        search.ledger.note("prior", cost.tolist())
        trials: list[Trial] = []
        while (wish := search.wish(trials)) is not None:
            assert len(trials) < 5 + choices
            assert on_disk(search, wish, folder / f"{len(trials)}") <= budget
            if "budget_training" in limits:
                assert peak(search, wish) <= limits["budget_training"]
            size, quality = search.space.bytes(wish.configuration), float(draw.exponential())
            trials.append(Trial(len(trials), wish, "complete", size, quality, 1.0))
        assert trials or "budget_training" in limits
        if trials:  # what is best of the short trials is among the longer ones, of which the result is chosen
            best = min((t for t in trials if t.wish.steps == 1), key=lambda t: t.quality or 0.0)
            assert Wish(best.wish.configuration, 2, "promoted") in [t.wish for t in trials]
