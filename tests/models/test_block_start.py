"""A block-wise start: its gradient against a float64 reference written from the equations, and what is promised of it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config

import experts
import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.layers import weights
from trimtab.layers.weights import AffineWeight
from trimtab.methods import Lora, LrQat, Method, Peqa, QaHira, Qat, Rtn
from trimtab.models import block_start, block_walk
from trimtab.models.block_start import Blockwise, Errors, Rounding, Task
from trimtab.models.load import load
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline.run import run
from trimtab.quant.grid import Grid, k_quant
from trimtab.recipe import recipe

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}
TOKENS = torch.randint(0, 260, (6, 12), generator=torch.Generator().manual_seed(0))
W2 = {"bits": 2, "group": 32, "zero": "integer"}
RULES: list[dict[str, Any]] = [
    {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
    {"match": "*.k_proj", "grid": None},
    {"match": "*", "grid": W2},
]
ALL = [{"match": "*.layers.*", "grid": W2}, {"match": "*", "grid": None}]


def model_of(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()


def how(**options: Any) -> Blockwise:
    return Blockwise(tokens=TOKENS, **{"steps": 6, "lr": 0.05, "lr_scale": 0.02, **options})


def bases(model: Any) -> dict[str, AffineWeight]:
    return {name: layer.base for name, layer in quant_layers(model).items() if isinstance(layer.base, AffineWeight)}


def same(a: Any, b: Any) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], tensor) for key, tensor in other.items())


# ---- rounding one layer ----------------------------------------------------------------------------------------------

GRIDS = [
    *(Grid(b, g, z) for b in (2, 3, 4, 8) for z in ("symmetric", "integer", "real") for g in (16, None)),  # type: ignore[arg-type]
    Grid(3, 32, "integer", "float32", "lp2"),
    k_quant("q2_k"), k_quant("q4_k"), k_quant("q6_k"),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=Grid.describe)
def test_untrained_it_is_round_to_nearest_in_every_storage(grid: Grid) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[0] = 0.0
    found = Rounding(weight, grid, "all").stored()
    for storage in ("int", "fixed8"):
        nearest, kept = weights.quantize(weight, grid, storage), found.kept_as(storage)  # type: ignore[arg-type]
        assert isinstance(nearest, AffineWeight)
        assert torch.equal(kept.codes, nearest.codes)
        assert all(a is b or torch.equal(a, b) for a, b in zip(kept.range(), nearest.range(), strict=True))  # type: ignore[arg-type]


def ste(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def reference_weight(c: Tensor, log_scale: Tensor, moved: Tensor, start: Any, grid: Grid) -> Tensor:
    """W_hat from the equations alone, float64: u = c / rho + z, or (c - (o - o0) / s0) / rho; rounded straight through."""
    s0, z0, o0 = (None if t is None else t.double() for t in start)
    g = c.shape[1] // s0.shape[1]
    s = s0 * log_scale.exp()
    wide = lambda t: t.repeat_interleave(g, 1)  # noqa: E731
    if o0 is not None:
        o = o0 + s0 * moved
        u = (c - wide((o - o0) / s0)) / wide(s / s0)
    else:
        z = torch.full_like(s, 2 ** (grid.bits - 1)) if z0 is None else z0 + moved
        z = ste(z, z.round()).clamp(0, 2**grid.bits - 1)
        u = c / wide(s / s0) + wide(z)
    q = ste(u, u.round()).clamp(0, 2**grid.bits - 1)
    return wide(s) * q + wide(o) if o0 is not None else wide(s) * (q - wide(z))


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_a_block_is_that_of_a_float64_reference(name: str, zero: Any) -> None:
    grid, make = Grid(2, 16, zero, "float32"), torch.Generator().manual_seed(2)
    model = model_of(name)
    block: Any = model.model.layers[1]
    states, calls = block_walk.first_inputs(model, [f"model.layers.{i}" for i in range(3)], TOKENS)
    call = calls["model.layers.1"]
    inputs = torch.cat(states[:2]) + 0.1 * torch.randn(2, 12, 32, generator=make)
    wanted = torch.cat([block_walk.hidden_of(block(x, **call)) for x in torch.cat(states[:2]).split(1)]).detach()
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    roundings = {n: Rounding(block.get_submodule(n).weight.detach(), grid, "all") for n in names}
    for r in roundings.values():  # away from where it starts, where zeros have no half and nothing is clipped
        for p, far in ((r.c, 0.3), (r.log_scale, 0.2), (r.moved, 0.6)):
            p.detach().add_(far * torch.randn(p.shape, generator=make))
    block_start.gradients(block, roundings, list(zip(inputs.split(1), wanted.split(1), strict=True)), call)

    double, leaves = copy.deepcopy(block).double(), {}
    made = {}
    for n, r in roundings.items():
        own = {k: p.detach().double().requires_grad_() for k, p in
               (("c", r.c), ("log_scale", r.log_scale), ("moved", r.moved))}  # fmt: skip
        leaves[n] = own
        made[f"{n}.weight"] = reference_weight(own["c"], own["log_scale"], own["moved"], r.start, grid)
    in_double = {k: tuple(t.double() for t in v) if isinstance(v, tuple) else v for k, v in call.items()}
    loss: Any = 0.0
    for x, y in zip(inputs.double().split(1), wanted.double().split(1), strict=True):
        out = torch.func.functional_call(double, made, (x,), in_double)
        out = out if isinstance(out, Tensor) else out[0]
        loss = loss + ((out - y) ** 2).sum(-1).div((y**2).sum(-1)).mean() / 2
    loss.backward()
    for n, r in roundings.items():
        assert ("moved" in r.trained) == (zero != "symmetric")
        for k, p in r.trained.items():
            exact, found = leaves[n][k].grad, p.grad
            assert exact is not None
            assert found is not None
            assert exact.norm() > 0, f"{n}.{k}: nothing to compare"
            assert (found - exact).norm() / exact.norm() < 1e-4, f"{n}.{k}"


# ---- one block -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["all", "scales", "shift"])
def test_the_error_never_rises_and_what_is_trained_stays_where_it_may_go(
    trains: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Errors, float]] = []
    real = block_start.train

    def spy(task: Task, how: Blockwise) -> Errors:
        before = {n: r.c.detach().clone() for n, r in task.roundings.items()}
        found = real(task, how)
        pairs = zip(task.inputs.split(1), task.wanted.split(1), strict=True)
        seen.append((found, block_start._measured(task.block, task.roundings, pairs, task.call)))
        for n, r in task.roundings.items():
            moved = (r.c - before[n]).abs().max().item()
            assert (moved == 0) == (trains == "scales" or found.after == found.before)
            if trains == "shift":
                assert moved <= 0.5 + 1e-5
                assert r.log_scale.max() <= 0
                assert r.log_scale.min() >= math.log(0.5) - 1e-5
        return found

    monkeypatch.setattr(block_walk, "train", spy)
    tt.prepare(model_of(), Rtn(), ALL, start=how(trains=trains, lr=None, lr_scale=None, steps=12))
    assert len(seen) == 3
    assert all(measured == pytest.approx(errors.after, rel=1e-6) for errors, measured in seen)
    assert all(errors.after < 0.97 * errors.before for errors, _ in seen)
    if trains != "all":
        return
    seen.clear()
    wild = tt.prepare(model_of(), Rtn(), ALL, start=how(trains=trains, lr=40.0, lr_scale=3.0))
    assert all(errors.after <= errors.before for errors, _ in seen)
    assert same(wild, tt.prepare(model_of(), Rtn(), ALL)), "nothing was better than where it started"


def test_a_token_with_a_massive_activation_does_not_rule_the_error() -> None:
    wanted = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    wanted[0, 0, 0] = 1e4
    y = wanted.clone()
    y[0, 0, 0] *= 1.01
    one = block_start.error(y, wanted)
    y = wanted + 0.1 * wanted.roll(1, 2) * (torch.arange(8) > 0)[None, :, None]
    assert block_start.error(y, wanted) > 50 * one
    assert block_start.error(3 * y, 3 * wanted) == pytest.approx(block_start.error(y, wanted).item())


# ---- a model, block by block -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_inputs_are_those_of_the_rounded_blocks_and_targets_those_of_the_float_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def spy(task: Task, how: Blockwise) -> Errors:
        given.append((task.inputs.clone(), task.wanted.clone()))
        return block_start.train(task, how)

    monkeypatch.setattr(block_walk, "train", spy)
    ours = tt.prepare(model_of(name), Rtn(), ALL, start=how())
    with torch.no_grad():
        exact = model_of(name)(TOKENS, output_hidden_states=True).hidden_states
        rounded = ours(TOKENS, output_hidden_states=True).hidden_states
    for i, (inputs, wanted) in enumerate(given):
        torch.testing.assert_close(inputs, rounded[i], rtol=1e-4, atol=1e-4)
        if i < 2:  # of the last the model gives the normed state
            torch.testing.assert_close(wanted, exact[i + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [LrQat(rank=2), QaHira(), Qat(), Peqa()], ids=lambda m: m.name)
def test_without_steps_it_is_round_to_nearest_under_every_method(method: Method) -> None:
    torch.manual_seed(1)
    ours = tt.prepare(model_of("gemma3"), method, RULES, start=how(steps=0))
    torch.manual_seed(1)
    nearest = tt.prepare(model_of("gemma3"), method, RULES)
    for (name, a), b in zip(bases(ours).items(), bases(nearest).values(), strict=True):
        assert torch.equal(a.codes, b.codes), name
        assert torch.equal(a.scale, b.scale), name
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS).logits, nearest(TOKENS).logits, rtol=0, atol=0)


def test_loading_is_preparing_in_memory(tmp_path: Path) -> None:
    method = LrQat(rank=2)
    model_of("qwen2").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)

    def prepared_by(start: Blockwise) -> PreTrainedModel:
        model = model_of("qwen2")
        torch.manual_seed(1)
        return tt.prepare(model, method, RULES, start=start)

    torch.manual_seed(1)
    loaded, _ = load(str(tmp_path), method, RULES, dtype=torch.float32, start=how())
    prepared = prepared_by(how())
    assert same(loaded, prepared)
    asking = {n for n, p in prepared.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == asking
    assert all(p.grad is None for p in prepared.parameters())
    assert same(prepared, prepared_by(how(on_disk=True))), "wherever states lie"
    assert not same(prepared, prepared_by(how(seed=1)))
    # Read in bfloat16, codes are still those of the file's float32 weights.
    ours, nearest = (load(str(tmp_path), Rtn(), RULES, start=s)[0] for s in (how(steps=0), None))
    assert same(ours, nearest)


def test_what_was_stopped_goes_on_at_the_last_whole_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, trained = tt.prepare(model_of(), Rtn(), ALL, start=how()), list[int]()

    def counted(task: Task, how: Blockwise) -> Errors:
        trained.append(task.number)
        return block_start.train(task, how)

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("block 2 of 3"):
            raise KeyboardInterrupt

    lines: list[str] = []
    monkeypatch.setattr(block_walk, "train", counted)
    stopped = model_of()
    with pytest.raises(KeyboardInterrupt):
        tt.prepare(stopped, Rtn(), ALL, start=how(kept=tmp_path / "kept", say=stop))
    assert not quant_layers(stopped), "it is as it was"
    assert trained == [0, 1]
    assert "left" in lines[-1]
    again = tt.prepare(model_of(), Rtn(), ALL, start=how(kept=tmp_path / "kept"))
    assert trained == [0, 1, 2]
    assert same(again, whole)
    for file in (tmp_path / "kept").iterdir():  # one that is not whole is not taken
        file.write_bytes(file.read_bytes()[:-100])
    assert same(tt.prepare(model_of(), Rtn(), ALL, start=how(kept=tmp_path / "kept")), whole)
    assert trained == [0, 1, 2, 0, 1, 2]
    # Other options, or another width in a block, are other blocks; those before it are found.
    tt.prepare(model_of(), Rtn(), ALL, start=how(kept=tmp_path / "kept", steps=5))
    wider = [{"match": "*.layers.1.*", "grid": {**W2, "bits": 3}}, *ALL]
    tt.prepare(model_of(), Rtn(), wider, start=how(kept=tmp_path / "kept"))
    assert trained[6:] == [0, 1, 2, 1, 2]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_experts_are_trained_as_far_as_tokens_reach_them(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of few tokens some experts get none: those are rounded to nearest, which is said."""
    rules, few = [{"match": "*.experts.*", "grid": W2}], experts.IDS[:1, :2]
    ours = tt.prepare(experts.mixture(name), Rtn(), rules, start=Blockwise(tokens=few, steps=8, windows=1))
    nearest = bases(tt.prepare(experts.mixture(name), Rtn(), rules))
    moved = {n for n, base in bases(ours).items() if not torch.equal(base.codes, nearest[n].codes)}
    reached = {n.rsplit(".", 1)[0] for n in moved}
    assert 2 <= len(reached) < 8, "of two blocks with four experts"
    assert "no calibration token reached mlp.experts." in caplog.text


def test_what_it_cannot_train_is_refused_by_name() -> None:
    nf4 = [{"match": "*.layers.1.mlp.up_proj", "grid": {"codebook": "nf4", "group": 32}}, *ALL]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: block trains the scales of an affine grid, and nf4"):
        tt.prepare(model_of(), Rtn(), nf4, start=how())
    with pytest.raises(UserError, match="loftq finds its own codes, so block would be in vain"):
        tt.prepare(model_of(), tt.methods.Loftq(rank=2), ALL, start=how())
    with pytest.raises(UserError, match="block: no layer in the decoder blocks has a grid"):
        tt.prepare(model_of(), Lora(), start=how())
    folded = tt.prepare(model_of(), Rtn(), ALL)
    with pytest.raises(UserError, match=r"layers\.0\.\S+: block trains float layers, and this one is stored as codes"):
        tt.prepare(folded, Rtn(), [{"match": "*.layers.*", "grid": {**W2, "bits": 4}}], start=how())
    codes = {name: base.codes.clone() for name, base in bases(folded).items()}
    kept = tt.prepare(folded, Rtn(), ALL, start=how())  # what lies on its grid already stays
    assert all(torch.equal(base.codes, codes[name]) for name, base in bases(kept).items())
    broken = model_of()
    broken.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match=r"model\.layers\.1: gives values that are not finite"):
        tt.prepare(broken, Rtn(), ALL, start=how())


@pytest.mark.parametrize(
    "options",
    [{"tokens": TOKENS[0]}, {"trains": "zeros"}, {"steps": -1}, {"windows": 0}, {"lr": 0.0}, {"lr_scale": -1.0}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="block " + next(iter(options))):
        Blockwise(**{"tokens": TOKENS, **options})


# ---- in a recipe -----------------------------------------------------------------------------------------------------


def test_a_recipe_starts_so_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model(tmp_path / "model")
    text = tiny.text(tmp_path / "data.jsonl")

    def parsed(name: str) -> Any:
        start, rtn = {"name": "block", "tokens": 250, "steps": 4}, {"method": "rtn", "train": {"steps": 0}}
        values = tiny.recipe(tmp_path / "model", text, tmp_path / name, start=start, evaluate={"parity": False}, **rtn)
        return recipe.from_dict(values)

    run(parsed("whole"))
    assert not (tmp_path / "whole.unfinished").exists()

    class Stopping:
        said: list[str] = []  # noqa: RUF012

        def say(self, line: str) -> None:
            self.said.append(line)
            if line.startswith("block 1 of 2") and len(self.said) < 5:
                raise KeyboardInterrupt

        def step(self, step: Any) -> None: ...
        def finish(self, metrics: Any, parities: Any) -> None: ...

    stopping, trained = Stopping(), list[int]()
    with pytest.raises(KeyboardInterrupt):
        run(parsed("again"), show=stopping)
    real = block_start.train
    monkeypatch.setattr(block_walk, "train", lambda t, how: trained.append(t.number) or real(t, how))
    stopping.said += ["no more"] * 5
    run(parsed("again"), show=stopping)
    assert trained == [1]
    assert not (tmp_path / "again.unfinished").exists()
    assert same(*(load(str(tmp_path / name))[0] for name in ("whole", "again")))


def test_options_of_another_start_are_named() -> None:
    values: dict[str, Any] = {
        "model": {"path": "x"},
        "method": "rtn",
        "train": {"steps": 0},
        "start": {"name": "block"},
    }
    with pytest.raises(UserError, match=r"start\.path: block is calibrated on text"):
        recipe.from_dict(values)
    values["start"] = {"name": "gptq", "path": "x", "trains": "shift"}
    with pytest.raises(UserError, match=r"start\.trains: is an option of block, and start\.name is gptq"):
        recipe.from_dict(values)
