"""GPTQ against a dense float64 reference that solves every row exactly, and as the start of every method."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config

import reference
import tiny
import trimtab as tt
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.errors import UserError
from trimtab.layers import weights
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.memory.plan import plan
from trimtab.methods import Lora, LrQat, Method, Peqa, QaHira, Qat, QBara, Qlora, Rtn
from trimtab.methods.base import base_weight
from trimtab.models import gptq
from trimtab.models.gptq import Gptq
from trimtab.models.load import load
from trimtab.models.sources import open_source
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline.run import run
from trimtab.quant import codebook
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid
from trimtab.recipe import recipe

N, K = 8, 32
NO_TOKENS = torch.zeros(1, 1, dtype=torch.int64)
GRIDS: list[AnyGrid] = [
    *(Grid(b, g, z) for b in (2, 3, 4, 8) for z in ("symmetric", "integer", "real") for g in (8, None)),  # type: ignore[arg-type]
    *(CodebookGrid(c, 8) for c in ("nf4", "nf3", "nf2", "fp4")),  # type: ignore[arg-type]
    CodebookGrid("nf4", 8, double_quant=True),
    Grid(4, 8, "integer", "float32"),
]


def given(seed: int, rows: int = N, columns: int = K, tokens: int = 100) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which neighbours are correlated and some are large."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=make)
    x = (x + 0.7 * x.roll(1, 1)) * torch.linspace(0.3, 3, columns)[torch.randperm(columns, generator=make)]
    return torch.randn(rows, columns, generator=make) * 0.05, x


# ---- the reference: no Cholesky factor, every remaining column solved for again after each rounding ---------------------


class Exact(NamedTuple):
    """What the reference did."""

    values: Tensor
    codes: Tensor
    levels: Tensor
    """Before rounding, not clamped; codes of a table have none."""
    gap: float


def exact_gptq(w: Tensor, h: Tensor, grid: AnyGrid, act_order: bool, damping: float) -> Exact:
    """min (w_hat - w) H (w_hat - w)^T over the columns that are not rounded yet, one column after another."""
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    group = grid.group or w.shape[1]
    order = h.diagonal().argsort(descending=True).tolist() if act_order else list(range(w.shape[1]))
    now, fixed, gap = w.clone(), [], 1.0
    codes, levels = torch.zeros_like(w), torch.zeros_like(w)
    known: dict[int, Any] = {}
    if act_order:
        known = {g: ranges(w[:, g * group : (g + 1) * group], grid) for g in range(w.shape[1] // group)}
    for i, j in enumerate(order):
        if j // group not in known:
            known[j // group] = ranges(now[:, j : j + group], grid)
        now[:, j], codes[:, j], levels[:, j], near = nearest(now[:, j], known[j // group], grid)
        gap, fixed, free = min(gap, near), [*fixed, j], order[i + 1 :]
        move = torch.linalg.solve(h[free][:, free], h[free][:, fixed] @ (now - w)[:, fixed].T).T
        now[:, free] = w[:, free] - move
    return Exact(now, codes, levels, gap)


def ranges(w: Tensor, grid: AnyGrid) -> Any:
    """Scale and zero of one group, from the equations of docs/design.md, section 1."""
    low, high = w.amin(1), w.amax(1)
    if isinstance(grid, CodebookGrid):
        return torch.maximum(high, -low)
    if grid.zero == "symmetric":
        scale = torch.where(high > -low, high, low) / -(2.0 ** (grid.bits - 1))
        return reference.stored(scale, grid.scale_dtype), 2.0 ** (grid.bits - 1), None
    low, high, top = low.clamp(max=0), high.clamp(min=0), 2**grid.bits - 1
    if grid.zero == "integer":
        scale = reference.stored((high - low) / top, grid.scale_dtype)
        return scale, (-low / scale).round().clamp(0, top), None
    offset = reference.stored(low, grid.scale_dtype)
    return reference.stored((high - offset) / top, grid.scale_dtype), 0.0, offset


def nearest(w: Tensor, known: Any, grid: AnyGrid) -> tuple[Tensor, Tensor, Tensor, float]:
    if isinstance(grid, CodebookGrid):
        table = codebook.table(grid).double()
        distance = (w[:, None] / known[:, None] - table).abs()
        first, second = distance.topk(2, largest=False).values.T
        codes = distance.argmin(1)
        return known * table[codes], codes.double(), codes.double(), (second - first).min().item()
    scale, zero, offset = known
    u = w / scale + zero if offset is None else (w - offset) / scale
    codes = u.round().clamp(0, 2**grid.bits - 1)
    inside = u[(u > 0) & (u < 2**grid.bits - 1)]
    values = scale * (codes - zero) + (0 if offset is None else offset)
    return values, codes, u, reference.gap(inside) if len(inside) else 1.0


def agreeing(grid: AnyGrid, act_order: bool) -> tuple[Tensor, Tensor, Exact]:
    """A weight, H and the reference's answer, of a seed for which no level is on the edge between two codes."""
    for seed in range(60):
        w, x = given(seed)
        exact = exact_gptq(w.double(), x.double().T @ x.double(), grid, act_order, 0.01)
        if exact.gap > 5e-4:
            return w, x.T @ x, exact
    raise AssertionError("no seed keeps every level away from a boundary")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "grid", [g for g in GRIDS if not getattr(g, "double_quant", False)], ids=lambda g: g.describe()
)
def test_codes_and_levels_are_those_of_exact_least_squares(grid: AnyGrid, act_order: bool) -> None:
    w, h, exact = agreeing(grid, act_order)
    for block in (128, 8, 5):
        got = gptq.quantize(w, h, grid, Gptq(tokens=NO_TOKENS, act_order=act_order, block=block))
        assert torch.equal(got.integer_codes().double(), exact.codes)
        torch.testing.assert_close(got.dequantize(torch.float32).double(), exact.values, rtol=1e-5, atol=1e-6)
        if isinstance(got, AffineWeight) and isinstance(grid, Grid):
            clamped = exact.levels.clamp(0, grid.top)
            torch.testing.assert_close(got.levels().double(), clamped, rtol=0, atol=3e-4)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layers_output_is_nearer_than_rounded_to_nearest(bits: int, act_order: bool) -> None:
    w, x = given(0, 48, 128, 400)
    for grid in (Grid(bits, 32, "integer"), Grid(bits), CodebookGrid(f"nf{bits}", 32, double_quant=True)):  # type: ignore[arg-type]
        options = Gptq(tokens=NO_TOKENS, act_order=act_order)
        ours, rtn = gptq.quantize(w, x.T @ x, grid, options), weights.quantize(w, grid)
        error = [(x @ (q.dequantize(torch.float32) - w).T).norm() for q in (ours, rtn)]
        assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe())
def test_uncorrelated_inputs_leave_nothing_to_make_up_for(grid: AnyGrid) -> None:
    """H = 1: GPTQ is round-to-nearest."""
    w, _ = given(1)
    rtn = weights.quantize(w, grid)
    got = gptq.quantize(w, torch.eye(K), grid, Gptq(tokens=NO_TOKENS))
    if isinstance(grid, CodebookGrid) and grid.double_quant:  # codes are chosen for the absmax that is stored
        assert (got.integer_codes() != rtn.integer_codes()).float().mean() < 0.05
        return
    assert torch.equal(got.integer_codes(), rtn.integer_codes())
    assert torch.equal(got.dequantize(torch.float32), rtn.dequantize(torch.float32))


@pytest.mark.parametrize("grid", [Grid(3, 48, "integer"), Grid(4, 48, "real"), CodebookGrid("nf4", 48)], ids=str)
def test_groups_that_would_straddle_a_block_are_met_up_to_date(grid: AnyGrid) -> None:
    """192 columns in groups of 48 and blocks of 128: the third group's range needs the errors of the columns before it."""
    w, x = given(3, columns=192, tokens=400)
    whole, blocked = (
        gptq.quantize(w, x.T @ x, grid, Gptq(tokens=NO_TOKENS, block=block))
        for block in (192, Gptq(tokens=NO_TOKENS).block)
    )
    a, b = whole.dequantize(torch.float32), blocked.dequantize(torch.float32)
    # The errors are summed in another order: a level may fall on the other side of an edge, a range may not move.
    assert (a - b).norm() < 0.02 * (a - w).norm()


def test_a_range_search_is_taken_over() -> None:
    w, _ = given(2)
    for grid in (Grid(2, 8, "integer", range="lp2.4"), Grid(3, range="lp4")):
        got, rtn = gptq.quantize(w, torch.eye(K), grid, Gptq(tokens=NO_TOKENS)), weights.quantize(w, grid)
        assert torch.equal(got.dequantize(torch.float32), rtn.dequantize(torch.float32))
        full = weights.quantize(w, replace(grid, range="minmax"))
        assert not torch.equal(rtn.dequantize(torch.float32), full.dequantize(torch.float32))


def test_a_dead_input_is_rounded_to_nearest_and_a_dead_layer_refused() -> None:
    w, x = given(3)
    x[:, 5] = 0
    grid = Grid(3, 8, "integer", "float32")
    got = gptq.quantize(w, x.T @ x, grid, Gptq(tokens=NO_TOKENS, act_order=True))
    assert torch.equal(got.integer_codes()[:, 5], weights.quantize(w, grid).integer_codes()[:, 5])
    with pytest.raises(UserError, match="singular at damping 0"):
        gptq.quantize(w, x.T @ x, grid, Gptq(tokens=NO_TOKENS, damping=0.0))
    with pytest.raises(UserError, match="no calibration input"):
        gptq.quantize(w, torch.zeros(K, K), grid, Gptq(tokens=NO_TOKENS))


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"block": 0}, {"tokens": torch.zeros(3)}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="gptq " + next(iter(options))):
        Gptq(**{"tokens": NO_TOKENS, **options})


# ---- the start of a method -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_every_storage_and_the_master_start_at_its_codes(bits: int, zero: str) -> None:
    """Ties and the ends of the range included: a grid of whole steps on which half of the levels lie half way."""
    for seed, grid in ((4, Grid(bits, 8, zero)), (5, Grid(bits, None, zero))):  # type: ignore[arg-type]
        w, x = given(seed)
        halves = torch.randint(-(2**bits), 2**bits, (N, K), generator=torch.Generator().manual_seed(seed)) / 2
        halves[:, ::8], halves[:, 1::8] = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        for weight, h in ((w, x.T @ x), (halves, torch.eye(K))):
            source = gptq.quantize(weight, h, grid, Gptq(tokens=NO_TOKENS))
            assert isinstance(source, AffineWeight)
            codes = source.integer_codes()
            if weight is halves:
                assert torch.equal(codes, weights.quantize(weight, grid).integer_codes())
            for storage in ("int", "fixed8", "fp32"):
                kept = base_weight(source, grid, storage)  # type: ignore[arg-type]
                assert isinstance(kept, AffineWeight)
                assert torch.equal(kept.integer_codes(), codes)
                assert kept.storage == ("int" if (storage, bits) == ("fixed8", 8) else storage)
            base, adapter = Qat().build(source, grid)
            assert adapter is not None
            assert torch.equal(adapter.fold(base).weight.integer_codes(), codes)  # type: ignore[operator]
            if bits < 8 and weight is w:
                fine = base_weight(source, grid, "fixed8")
                assert isinstance(fine, AffineWeight)
                assert (fine.levels() - source.levels()).abs().max() <= 2.0 ** -(9 - bits) + 3e-4
                assert ((source.levels() - codes).abs() > 0.1).any()  # the fraction is there


METHODS: list[Method] = [Rtn(), Qlora(), QBara(), QaHira(), Peqa(), LrQat(rank=2), LrQat(rank=2, storage="int"), Qat()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {getattr(m, 'storage', '')}")
def test_any_method_starts_from_its_codes(method: Method) -> None:
    w, x = given(6)
    for grid in (Grid(3, 8, "integer"), CodebookGrid("nf4", 8)):
        if isinstance(grid, CodebookGrid) and method.name in ("peqa", "lr-qat", "qat"):
            continue
        source = gptq.quantize(w, x.T @ x, grid, Gptq(tokens=NO_TOKENS))
        layer = QuantLinear(*method.build(source, grid))
        plain = QuantLinear(*Rtn().build(source, grid))
        assert torch.equal(layer(x), plain(x))
        assert torch.equal(layer.dequantize(torch.float32), source.dequantize(torch.float32))
        if isinstance(source, AffineWeight):
            assert layer.base.storage == getattr(method, "storage", "int")  # type: ignore[union-attr]


# ---- a model, block by block ---------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}
TOKENS = torch.randint(0, 260, (6, 16), generator=torch.Generator().manual_seed(0))
RULES: list[dict[str, Any]] = [
    {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
    {"match": "*.k_proj", "grid": None},
    {"match": "*", "grid": {"bits": 2, "group": 32, "zero": "integer"}},
]


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()


def inputs_of(model: Any, layer: str) -> Tensor:
    """All that goes into a layer when the whole model is run."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    return torch.cat(seen)


def up_to(blocks: int, name: str, method: Method, only: dict[str, Any]) -> PreTrainedModel:
    """A model of which so many blocks are quantized."""
    rules = [{"match": f"*.layers.[{'012'[:blocks]}].*", **only}, {"match": "*", "grid": None}]
    return tt.prepare(model_of(name), method, rules, start=Gptq(tokens=TOKENS)) if blocks else model_of(name)


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_of_a_block_come_from_the_quantized_blocks_before_it(name: str) -> None:
    """A layer's codes are those for its inputs in a model quantized up to its block, run as a whole."""
    method, only = Lora(rank=2), {"grid": {"bits": 2, "group": 32}}
    full = up_to(3, name, method, only)
    for block in range(3):
        partly = up_to(block, name, method, only)
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            where = f"model.layers.{block}.{layer}"
            x, weight = inputs_of(partly, where), partly.get_submodule(where).weight.detach()
            expected = gptq.quantize(weight, x.T @ x, Grid(2, 32), Gptq(tokens=TOKENS))
            got = quant_layers(full)[where].base
            assert isinstance(got, AffineWeight)
            # One window at a time sums in another order, so a level on the edge may fall to the other side.
            assert (got.integer_codes() == expected.integer_codes()).float().mean() > 0.995
            assert (got.integer_codes() == weights.quantize(weight, Grid(2, 32)).integer_codes()).float().mean() < 0.98


@pytest.mark.parametrize("method", [LrQat(rank=2), QaHira()], ids=lambda m: m.name)
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_is_preparing_in_memory(name: str, method: Method, tmp_path: Path) -> None:
    model_of(name).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for options in ({}, {"act_order": True, "damping": 0.1}):
        how = Gptq(tokens=TOKENS, **options)  # type: ignore[arg-type]
        torch.manual_seed(1)
        loaded, _ = load(str(tmp_path), method, RULES, dtype=torch.float32, start=how)
        model = model_of(name)
        torch.manual_seed(1)
        prepared = tt.prepare(model, method, RULES, start=how)
        ours, wanted = loaded.state_dict(), prepared.state_dict()
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in wanted.items())
        asking = {n for n, p in prepared.named_parameters() if p.requires_grad}
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == asking
        assert not prepared.training


MEASURE = """
import sys, torch
import trimtab as tt
from trimtab.kernels import heap
from trimtab.memory import process
from trimtab.methods import Rtn
from trimtab.recipe.recipe import from_dict
small, large, rules = sys.argv[1], sys.argv[2], from_dict(eval(sys.argv[3])).rules
tokens = torch.arange(4096).view(16, 256) % 250
how = tt.Gptq(tokens=tokens) if sys.argv[4] == "gptq" else tt.Blockwise(tokens=tokens, steps=1)
tt.load(small, Rtn(), rules, start=how)
heap.return_freed()
heap.trim()
base = process.resident_bytes()
process.reset_peak()
files = process.peak_bytes() - base
tt.load(large, Rtn(), rules, start=how)
print(process.peak_bytes() - base - files)
"""


@pytest.mark.parametrize("name", ["gptq", "block"])
def test_the_memory_of_starts_is_planned(name: str, tmp_path: Path) -> None:
    """Measured in a process of its own; what it takes is far more than training does."""
    for size, mlp in (("small", 64), ("large", 1536)):
        config = {"vocab_size": 260, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config, intermediate_size=mlp), dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / size)
        tiny.tokenizer().save_pretrained(tmp_path / size)
    tiny.text(tmp_path / "t.jsonl")
    start = {"name": name, "tokens": 4096}
    grid = {"bits": 4, "group": 32, "zero": "integer"}
    values = tiny.recipe(
        tmp_path / "large",
        tmp_path / "t.jsonl",
        tmp_path / "out",
        start=start,
        rules=[{"match": "*", "grid": grid}],
        data={"block_tokens": 256},
        train={"batch_tokens": 512},
    )
    parsed = recipe.from_dict(values)
    planned = plan(parsed, open_source(parsed.model.path).layout())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large"), repr(values), name]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert planned.total == planned.before
    assert 0.8 < planned.before / int(done.stdout.split()[-1]) < 1.25, (planned.before, done.stdout)


def test_what_is_stored_on_the_grid_already_keeps_its_codes() -> None:
    grid = [{"match": "*", "grid": {"bits": 4, "group": 32}}]
    first = tt.prepare(model_of("llama"), Rtn(), grid)
    codes = {n: layer.base.codes.clone() for n, layer in quant_layers(first).items()}
    again = tt.prepare(first, Lora(rank=2), grid, start=Gptq(tokens=TOKENS))
    assert all(torch.equal(layer.base.codes, codes[n]) for n, layer in quant_layers(again).items())
    tt.fold(again, merge=True)
    nf4 = [{"match": "*", "grid": {"codebook": "nf4", "group": 32}}]
    other = tt.prepare(again, Rtn(), nf4, start=Gptq(tokens=TOKENS))
    assert all(isinstance(layer.base, CodebookWeight) for layer in quant_layers(other).values())


def test_nothing_to_round_is_an_error() -> None:
    with pytest.raises(UserError, match="no layer in the decoder blocks has a grid"):
        tt.prepare(model_of("llama"), Lora(), start=Gptq(tokens=TOKENS))


# ---- in a recipe ---------------------------------------------------------------------------------------------------


def test_a_recipe_starts_from_gptq_on_its_training_data(tmp_path: Path) -> None:
    tiny.model(tmp_path / "model")
    text = tiny.text(tmp_path / "data.jsonl")
    values = tiny.recipe(tmp_path / "model", text, tmp_path / "out", start={"name": "gptq", "tokens": 250})
    parsed = recipe.from_dict({**values, "train": {"steps": 0}})
    assert recipe.from_dict(yaml.safe_load(parsed.to_yaml())).start == parsed.start
    assert run(parsed)["max_logit_difference"] == 0
    saved, tokenizer = load(str(tmp_path / "out"))
    tokens = token_windows(load_rows(str(text)), tokenizer, block_tokens=32, limit_tokens=250)
    assert tokens.shape == (7, 32)
    ours, rtn = (
        quant_layers(load(str(tmp_path / "model"), Rtn(), tiny.RULES, start=how)[0])
        for how in (Gptq(tokens=tokens), None)
    )
    for name, layer in quant_layers(saved).items():
        codes, expected, nearest = (m.base.integer_codes() for m in (layer, ours[name], rtn[name]))  # type: ignore[operator]
        assert torch.equal(codes, expected)
        assert torch.equal(codes, nearest) == (".layers." not in name)


def test_a_recipe_without_data_says_what_to_name(tmp_path: Path) -> None:
    values = {"model": {"path": "x"}, "method": "rtn", "train": {"steps": 0}, "start": {"name": "gptq"}}
    with pytest.raises(UserError, match=r"start\.path"):
        recipe.from_dict(values)
    values["start"] = {"name": "mse"}
    with pytest.raises(UserError, match=r"start\.name"):
        recipe.from_dict(values)
