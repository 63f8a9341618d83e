"""What fits into a memory: the plans of the rows, their order, and what is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig

import tiny
from trimtab import api
from trimtab.errors import UserError
from trimtab.formats.file_size import file_size
from trimtab.kernels import products
from trimtab.memory import process, settings, speed
from trimtab.memory.plan import plan, teaching
from trimtab.memory.settings import Setting
from trimtab.methods import make
from trimtab.models.sources import ConfigSource, open_layout, open_source
from trimtab.pipeline import planning
from trimtab.recipe.recipe import Recipe, as_recipe, from_dict
from trimtab.report import planned

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False, architectures=["LlamaForCausalLM"]),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True, architectures=["LlamaForCausalLM"]),
    "gemma": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", *["sliding_attention"] * 2],
        architectures=["Gemma3ForCausalLM"],
    ),
}


@pytest.fixture(autouse=True)
def fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are those of a processor that needs no blocks in float32."""
    monkeypatch.setattr(products, "slow", lambda: False)


def asked(folder: Path, config: str = "llama", **changes: Any) -> Recipe:
    CONFIGS[config].save_pretrained(folder)
    values = {
        "model": {"path": str(folder)},
        "method": {"name": "lr-qat", "rank": 8},
        "data": {"path": "pydoc-topics", "block_tokens": 512},
        "train": {"batch_tokens": 2048},
        "rules": [{"match": "*", "grid": {"bits": 4, "group": 32}}],
    }
    for key, value in changes.items():
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) and key != "method" else value
    return from_dict(values)


def found(recipe: Recipe, memory: int) -> settings.Settings:
    return settings.settings(recipe, open_layout(recipe.model.path).layout(), memory)


def as_asked(recipe: Recipe, row: Setting) -> Recipe:
    """The recipe of a row."""
    own = row.method == recipe.method.name
    method = recipe.method if own else make(row.method)
    options = {"name": row.method, **vars(method)} | ({} if row.rank is None else {"rank": row.rank})
    grid: dict[str, Any] = {"bits": row.bits, "group": 32}
    if row.grid.startswith("nf"):
        grid = {"codebook": f"nf{row.bits}", "group": 64, "double_quant": True}
    elif row.grid.endswith(("real", "integer")):
        grid["zero"] = row.grid.rpartition(" ")[2]
    values = recipe.model_dump(exclude={"method", "rules"})
    values["data"]["block_tokens"], values["train"]["micro_batch"] = row.block_tokens, row.micro_batch
    return from_dict({**values, "method": options, "rules": [{"match": "*", "grid": grid}]})


@pytest.mark.parametrize(
    ("config", "changes", "tried", "bits"),
    [
        ("llama", {}, ("qa-hira", "qlora"), (4, 2)),
        ("tied", {"train": {"activation_checkpointing": False}}, ("q-bara",), (4, 3)),
        ("gemma", {"train": {"optimizer": "adamw-8bit", "batch_tokens": 512, "micro_batch": 1}}, ("qat",), (4,)),
        ("llama", {"method": {"name": "peqa"}, "activations": {"bits": 8}}, (), (4, 3)),
        ("llama", {"train": {"processes": 2, "shard": "fsdp"}}, ("qlora",), (4,)),
        ("tied", {"train": {"processes": 4}}, (), (4,)),
    ],
    ids=["llama", "all activations", "gemma, one micro-batch", "rounded activations", "two in parts", "four"],
)
def test_rows_are_plans(
    tmp_path: Path,
    config: str,
    changes: dict[str, Any],
    tried: tuple[str, ...],
    bits: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two blocks stand for all: to the byte what is planned of the whole model by the recipe of the row."""
    monkeypatch.setattr(settings, "METHODS", tried)
    monkeypatch.setattr(settings, "BITS", bits)
    recipe = asked(tmp_path, config, **changes)
    rows = found(recipe, 10**9).rows
    assert {row.method for row in rows} == {recipe.method.name, *tried}
    assert {row.bits for row in rows} == set(bits)
    for row in rows:
        whole, model = as_asked(recipe, row), open_layout(recipe.model.path).layout()
        assert plan(whole, model).total == row.total, row
        model = open_layout(recipe.model.path).layout()
        about: dict[str, Any] = {"dtype": whole.dtype, "activations": whole.activations}
        size = file_size(model, whole.method, whole.rules, **about)
        assert size.tensor_bytes <= row.file_bytes <= size.bound * 1.02, row


def test_several_processes_share_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is one that they can run; what they keep in parts is what makes the difference."""
    monkeypatch.setattr(settings, "METHODS", ())
    monkeypatch.setattr(settings, "BITS", ())
    rows = {
        (count, shard): found(asked(tmp_path, train={"processes": count, "shard": shard}), 10**9).rows[0]
        for count, shard in ((1, "ddp"), (2, "ddp"), (4, "fsdp"), (8, "fsdp"))
    }
    assert {key: (row.block_tokens, row.micro_batch) for key, row in rows.items()} == {
        (1, "ddp"): (512, 4), (2, "ddp"): (512, 2), (4, "fsdp"): (512, 1), (8, "fsdp"): (256, 1),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"batch of all 16 processes, .*; set train.batch_tokens=8192"):
        found(asked(tmp_path, train={"processes": 16}), 10**9)


def test_blocks_that_differ_are_planned_whole(tmp_path: Path) -> None:
    rules = [
        {"match": "model.layers.3.*", "grid": {"bits": 8, "group": 32}},
        {"match": "*", "grid": {"bits": 4, "group": 32}},
    ]
    recipe = asked(tmp_path, rules=rules)
    rows = [row for row in found(recipe, 10**9).rows if row.method == "lr-qat" and row.bits == 4]
    capped = asked(tmp_path, rules=[{"match": "*", "grid": {"bits": 4, "group": 32}}], train={"micro_batch": 4})
    assert [row.total for row in rows] == [plan(capped, open_layout(recipe.model.path).layout()).total]


def test_the_order_and_what_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More bits, then length, then the recipe's method; in a row rank goes before length does; nothing above the recipe."""
    monkeypatch.setattr(settings, "METHODS", ("peqa",))
    recipe = asked(tmp_path)
    everything = found(recipe, 10**9)
    own = [row for row in everything.rows if row.method == "lr-qat"]
    assert [(row.bits, row.rank, row.block_tokens, row.micro_batch) for row in own] == [
        (4, 8, 512, 4), (3, 8, 512, 4), (2, 8, 512, 4),
    ]  # fmt: skip
    order = ["lr-qat", "peqa"]
    keys = [(-row.bits, -row.block_tokens, order.index(row.method)) for row in everything.rows]
    assert keys == sorted(keys)
    seen = set()
    monkeypatch.setattr(settings, "METHODS", ())
    monkeypatch.setattr(settings, "BITS", ())
    smallest = found(recipe, 0).least
    for memory in (smallest, smallest * 2, own[0].total - 1):
        rows = found(recipe, memory).rows
        assert all(row.total <= memory for row in rows)
        row = next((row for row in rows if row.method == "lr-qat" and row.bits == 4), None)
        if row is not None:
            seen.add((row.block_tokens, row.rank))
            larger = as_asked(recipe, Setting(**{**vars(row), "rank": (row.rank or 0) * 2, "micro_batch": 1}))
            if row.rank != 8:
                assert plan(larger, open_layout(recipe.model.path).layout()).total > memory
    assert {(512, 8), (256, 4)} <= seen
    assert found(recipe, smallest - 1).rows == ()


def test_what_a_method_does_not_admit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = asked(tmp_path, rules=[{"match": "*", "grid": {"bits": 8, "group": 32}}])
    monkeypatch.setattr(settings, "METHODS", ("qlora",))
    left_out = found(recipe, 10**9).left_out
    assert "qlora at 8 bits: there is no codebook of 8 bits; take 2, 3 or 4, or an affine grid" in left_out


# ---- a config without weights ---------------------------------------------------------------------------------------


def test_a_config_is_enough(tmp_path: Path) -> None:
    """A folder or the file; with weights beside it the plan is the same, and a run of it is refused by its name."""
    tiny.model(tmp_path / "model")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    of_model = api.plan(str(tmp_path / "model"), ["data.block_tokens=64"])
    for path in (bare, bare / "config.json"):
        assert api.plan(path, ["data.block_tokens=64"]) == of_model
        with pytest.raises(UserError, match="config"):
            open_source(str(path))
    assert isinstance(open_layout(str(bare)), ConfigSource)
    with pytest.raises(UserError, match="holds no weights, only a config; it can be planned, not run"):
        open_layout(str(bare)).read("x")
    values = tiny.recipe(bare, tmp_path / "no.jsonl", tmp_path / "out")
    assert api.plan(values).total == api.plan({**values, "model": {"path": str(tmp_path / "model")}}).total


def test_a_config_that_is_quantized_is_refused(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    for by, why in {"quanto": "already quantized by quanto", "awq": "by awq; its grids stand in its tensors"}.items():
        quantized = text | {"quantization_config": {"quant_method": by}}
        (tmp_path / "config.json").write_text(json.dumps(quantized))
        for path in (tmp_path, tmp_path / "config.json"):
            with pytest.raises(UserError, match=why):
                api.plan(path)


def test_of_the_hub_only_the_config_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Any] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: Any) -> str:
        wanted.append((name, revision, allow_patterns))
        CONFIGS["llama"].save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert api.plan("somebody/something@abc").total > 0
    assert {tuple(entry[2]) for entry in wanted} == {("config.json",)}
    assert wanted[0][:2] == ("somebody/something", "abc")


def test_what_is_a_recipe_and_what_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        api.plan(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="no such recipe file"):
        api.plan("none")
    assert planning.to_plan({"model": {"path": "x"}, "method": "rtn", "train": {"steps": 0}})[1] == ()


# ---- what is shown --------------------------------------------------------------------------------------------------


def test_tables_fit_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "METHODS", ("qa-hira",))
    asked(tmp_path)
    for memory in ("1GB", "100kB"):
        for shown in planned.tables(api.plan(tmp_path, memory=memory), 10**9, lambda n: f"{n / 1e6:.1f} MB"):
            if isinstance(shown, str):
                assert len(shown) <= 80, shown
                continue
            columns = zip(*([shown.header, *shown.rows]), strict=True)
            assert sum(max(map(len, column)) + 2 for column in columns) <= 80, shown.title
            assert len(shown.title) <= 80


def test_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "METHODS", ())
    asked(tmp_path)
    plan_ = api.plan(tmp_path, memory="1GB")
    lines = [s for s in planned.tables(plan_, 5, str) if isinstance(s, str)]
    assert lines[0] == f"memory given: {10**9}: fits, {10**9 - plan_.total} left"
    small = api.plan(tmp_path, memory=plan_.total - 1)
    lines = [s for s in planned.tables(small, 5, str) if isinstance(s, str)]
    assert lines[0] == f"memory given: {plan_.total - 1}: does not fit, 1 too much"
    here = api.plan(tmp_path)
    lines = [s for s in planned.tables(here, here.total, str) if isinstance(s, str)]
    assert lines[0] == f"memory free here: {here.total}: fits, 0 left"
    with pytest.raises(UserError, match="memory: 'much' is not a size"):
        api.plan(tmp_path, memory="much")


# ---- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "tokens"), [(10.0, 2048), (2.1, 2048), (1.1, 1024), (0.3, 256), (0.01, 128)])
def test_a_probe_takes_the_micro_batch_or_what_of_it_is_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, tokens: int
) -> None:
    """A millisecond a token: 4 sequences of 512 take two seconds."""
    monkeypatch.setattr(speed, "_seconds", lambda recipe, model, count, budget: count / 1000)
    recipe = asked(tmp_path, "tied", train={"micro_batch": 4}, data={"block_tokens": 512})
    assert speed._tokens(recipe, None, seconds) == tokens  # type: ignore[arg-type]


def test_a_probe_trains_what_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of a small model, one and three of a large one; as many tokens as the recipe's micro-batch."""
    CONFIGS["tied"].save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    recipe = asked(tmp_path, "tied", train={"micro_batch": 2, "steps": 7}, data={"block_tokens": 32})
    passes: list[tuple[int, tuple[int, ...]]] = []
    real = speed.summed_loss

    def summed_loss(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        passes.append((len(model.base_model.layers), tuple(ids.shape)))
        assert sum(p.requires_grad for p in model.parameters()) == 7 * len(model.base_model.layers) * 3
        return real(model, ids, **inputs)

    monkeypatch.setattr(speed, "summed_loss", summed_loss)
    source = open_layout(str(tmp_path))
    monkeypatch.setattr(type(source), "weights", True)
    monkeypatch.setattr(speed, "_tokens", lambda given, *_: 64)  # a busy machine would try fewer
    for whole, blocks in ((10**9, {5}), (0, {1, 3})):
        passes.clear()
        monkeypatch.setattr(speed, "_WHOLE", whole)
        done = speed.speed(recipe, source, seconds=1.0)
        assert {count for count, _ in passes} == blocks
        assert passes[-1][1] == (2, 32)
        assert done.seconds == pytest.approx(7 * 2048 / done.tokens_per_second)
    assert done.how == "64 tokens at once, from 1 and 3 of 5 blocks"
    epochs = asked(tmp_path, "tied", train={"micro_batch": 2, "epochs": 2.0}, data={"block_tokens": 32})
    assert speed.speed(epochs, source, seconds=0.1).seconds is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, "its weights are not here, so it will be trained elsewhere"),
        ({"train": {"steps": 0}}, "nothing is trained"),
    ],
)
def test_why_no_speed(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    assert planning.probed(asked(tmp_path, **change), 1) == why


def test_a_plan_with_a_probe_is_one_call(tmp_path: Path) -> None:
    asked(tmp_path)
    assert api.plan(tmp_path).speed is None
    done = api.plan(tmp_path, probe=True)
    assert isinstance(done.speed, str), "a config alone has no weights here"
    assert [*planned.tables(done, 10**9, str)][-1] == planned.speed(done.speed)


def test_a_teacher_is_laid_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid = []
    monkeypatch.setattr(settings, "METHODS", ("qa-hira",))
    monkeypatch.setattr(settings, "teaching", lambda recipe: laid.append(1) or teaching(recipe))
    recipe = asked(tmp_path, distill={"teacher": "int8"})
    assert len(found(recipe, 10**12).rows) > 2
    assert laid == [1]


def test_the_ranks_of_rules_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {"bits": 4, "group": 32}
    rules = [{"match": "*.down_proj", "grid": grid, "rank": 2}, {"match": "*", "grid": grid}]
    monkeypatch.setattr(settings, "METHODS", ())
    given = asked(tmp_path, rules=rules)
    row = found(given, 10**12).rows[0]
    assert (row.bits, row.rank, row.micro_batch) == (4, 8, 4)
    assert row.total == plan(given, open_layout(given.model.path).layout()).total


def test_no_speed_where_it_does_not_fit(tmp_path: Path) -> None:
    assert planning.probed(asked(tmp_path), process.available_bytes() * 2) == "it does not fit here"


def test_speed_in_words() -> None:
    assert planned.speed("no") == "speed not tried: no"
    for seconds, words in ((20, "20.0 s"), (600, "10 min 0 s"), (7800, "2 h 10 min")):
        line = planned.speed(speed.Speed(1234.4, seconds, "few tokens"))
        assert line == f"about 1234 tokens a second (few tokens): all steps take {words}"
    assert "trimtab data" in planned.speed(speed.Speed(1234.4, None, "few tokens"))


def test_config_of_a_file_is_that_of_its_folder(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    one, other = (open_layout(str(p)).config() for p in (tmp_path, tmp_path / "config.json"))
    assert isinstance(one, type(AutoConfig.from_pretrained(tmp_path)))
    where = {"_name_or_path": None}  # of a file, the file
    assert one.to_dict() | where == other.to_dict() | where
    assert as_recipe({"model": {"path": "x"}, "method": "rtn", "train": {"steps": 0}}).model.path == "x"
