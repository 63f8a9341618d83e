"""Rules, and a model prepared by them: which layers, what is frozen, and errors that name the layer and the remedy."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import trimtab as tt
from trimtab.errors import UserError
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.methods import ALL, Lora, LrQat, Method, Peqa, QaBlora, QaHira, QaLora, Qat, QBara, Qlora, Rtn
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe.rules import Kind, parse_rules, resolve

IDS = torch.arange(10).view(1, 10)
LAYERS: dict[str, Kind] = {
    "model.embed_tokens": "embedding",
    "model.layers.0.self_attn.q_proj": "linear",
    "model.layers.0.mlp.down_proj": "linear",
    "model.layers.1.self_attn.q_proj": "linear",
    "model.layers.1.mlp.down_proj": "linear",
    "lm_head": "head",
}
TIED: dict[str, Kind] = {**LAYERS, "lm_head": "tied"}
INT8 = {"bits": 8, "group": 16}


def llama(*, tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    """hidden 48, kv width 24, mlp 80."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_bias=bias,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def linears(model: nn.Module, *, head: bool = False) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and (head or n != "lm_head")]


def placed(rules: list[dict[str, Any]], layers: dict[str, Kind] = LAYERS, default: Any = None) -> dict[str, Any]:
    return resolve(layers, parse_rules(rules), default)


# ---- rules ---------------------------------------------------------------------------------------------------------


def test_the_first_match_wins() -> None:
    got = placed(
        [
            {"match": "*.down_proj", "grid": None},
            {"match": "model.layers.[1].*", "grid": INT8},
            {"match": "*.layers.*", "grid": {"bits": 4, "group": 32, "zero": "real"}},
            {"match": "*", "grid": "float"},
        ]
    )
    assert got == {
        "model.embed_tokens": None,
        "model.layers.0.self_attn.q_proj": Grid(4, 32, "real"),
        "model.layers.0.mlp.down_proj": None,
        "model.layers.1.self_attn.q_proj": Grid(8, 16),
        "model.layers.1.mlp.down_proj": None,
        "lm_head": None,
    }


def test_without_rules_every_linear_layer_but_the_head_gets_the_default() -> None:
    got = resolve(LAYERS, None, Grid(4, 64))
    assert [n for n, g in got.items() if g == Grid(4, 64)] == [n for n, kind in LAYERS.items() if kind == "linear"]
    assert got["lm_head"] is got["model.embed_tokens"] is None


@pytest.mark.parametrize("layers", [LAYERS, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("pattern", ["*", "model.*", "*.*", "**"])
def test_a_catch_all_does_not_touch_an_embedding_or_a_head(pattern: str, layers: dict[str, Kind]) -> None:
    got = placed([{"match": pattern, "grid": INT8}], layers)
    assert got["model.embed_tokens"] is None
    assert got["lm_head"] is None
    assert got["model.layers.0.mlp.down_proj"] == Grid(8, 16)


@pytest.mark.parametrize("pattern", ["lm_head", "*head", "lm_*"])
def test_a_pattern_that_names_the_head_reaches_it(pattern: str) -> None:
    got = placed([{"match": pattern, "grid": INT8}, {"match": "*", "grid": {"bits": 4}}])
    assert got["lm_head"] == Grid(8, 16)
    assert got["model.embed_tokens"] is None


@pytest.mark.parametrize("pattern", ["model.embed_tokens", "*embed*", "*.embed_*", "model.embed_token[s]"])
def test_a_pattern_that_names_an_embedding_reaches_it(pattern: str) -> None:
    got = placed([{"match": pattern, "grid": INT8}, {"match": "*", "grid": {"bits": 4}}])
    assert got["model.embed_tokens"] == Grid(8, 16)
    assert got["model.layers.0.mlp.down_proj"] == Grid(4)
    assert got["lm_head"] is None


def test_a_tied_head_takes_no_grid_of_its_own() -> None:
    with pytest.raises(UserError, match=r"rules\[0\].*lm_head is tied"):
        placed([{"match": "lm_head", "grid": INT8}], TIED)
    assert placed([{"match": "lm_head", "grid": None}, {"match": "*", "grid": INT8}], TIED)["lm_head"] is None


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"rules\[1\]\.match: 'model\.layers\.0\.mlp\.donw_proj' matches no layer") as e:
        placed([{"match": "*q_proj", "grid": INT8}, {"match": "model.layers.0.mlp.donw_proj", "grid": INT8}])
    assert "did you mean 'model.layers.0.mlp.down_proj'" in str(e.value)
    with pytest.raises(UserError, match="did you mean 'lm_head'"):
        placed([{"match": "lm_haed", "grid": None}])
    with pytest.raises(UserError, match="did you mean 'down_proj'"):
        placed([{"match": "*.donw_proj", "grid": None}])
    # A rule whose layers an earlier one took is no mistake.
    placed([{"match": "*", "grid": INT8}, {"match": "*.down_proj", "grid": None}])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"match": "*", "grid": {"bit": 4}}, r"rules\[0\]\.grid\.bit: unknown key.*'bits'"),
        ({"match": "*", "grid": {"codebook": "nf4", "bits": 4}}, r"rules\[0\]\.grid\.bits: unknown key"),
        ({"match": "*", "grid": {"codebook": "nf5"}}, r"rules\[0\]\.grid: .*nf5"),
        ({"match": "*", "grid": {"bits": "4"}}, r"rules\[0\]\.grid\.bits: '4'"),
        ({"match": "*", "grid": {"bits": True}}, r"rules\[0\]\.grid\.bits: True"),
        ({"match": "*", "grid": {"bits": 16}}, r"rules\[0\]\.grid: .*16"),
        ({"match": "*", "grid": 4}, r"rules\[0\]\.grid: 4 is not a grid"),
        ({"match": "*"}, r"rules\[0\]: .*match and grid"),
        ({"match": "*", "grid": None, "bits": 4}, r"rules\[0\]: .*match and grid"),
        ({"match": 3, "grid": None}, r"rules\[0\]\.match: 3"),
        ("*", r"rules\[0\]: "),
    ],
)
def test_a_rule_is_checked_when_it_is_read(rule: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_rules([rule])


def test_channel_is_a_word_for_no_groups() -> None:
    rules = parse_rules([{"match": "*", "grid": {"bits": 4, "group": "channel"}}])
    assert rules is not None
    assert rules[0].grid == Grid(4, None)


# ---- a prepared model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in ALL if m is not Rtn], ids=lambda m: m.name)
def test_only_adapters_are_trained(method: type[Method]) -> None:
    model = llama(bias=True)
    names = linears(model)
    grid = {"bits": 4, "group": 8, "zero": "real"}
    tt.prepare(model, method(), [{"match": "lm_head", "grid": None}, {"match": "*", "grid": grid}])
    assert list(quant_layers(model)) == names
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert trained == {n for n, _ in model.named_parameters() if ".adapter." in n}
    assert {n.partition(".adapter.")[0] for n in trained} == set(names)
    model(IDS).logits.float().pow(2).mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


@pytest.mark.parametrize(("method", "default"), [(Rtn(), Grid(4, 64)), (Qlora(), CodebookGrid("nf4", 64, True))])
def test_without_rules_the_method_s_own_grid_is_used(method: Method, default: Any) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    names = linears(model)
    tt.prepare(model, method)
    assert {n: layer.base.grid for n, layer in quant_layers(model).items()} == dict.fromkeys(names, default)
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.model.embed_tokens, nn.Embedding)


def test_lora_without_rules_keeps_the_very_float_weights() -> None:
    model = llama()
    weights = {n: model.get_submodule(n).weight.data_ptr() for n in linears(model)}
    expected = model(IDS).logits
    tt.prepare(model, Lora())
    assert {n: layer.base.weight.data_ptr() for n, layer in quant_layers(model).items()} == weights
    assert torch.equal(model(IDS).logits, expected)


def test_null_keeps_a_layer_and_float_gives_it_an_adapter() -> None:
    model = llama()
    rules = [
        {"match": "*.down_proj", "grid": None},
        {"match": "*.up_proj", "grid": "float"},
        {"match": "lm_head", "grid": INT8},
        {"match": "*", "grid": INT8},
    ]
    tt.prepare(model, Lora(rank=2), rules)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.base.grid is None
    assert model.model.layers[0].mlp.up_proj.adapter is not None
    assert model.lm_head.base.grid == Grid(8, 16)


def test_a_tied_head_follows_its_embedding() -> None:
    model = llama(tied=True)
    table = model.model.embed_tokens.weight.detach().clone()
    tt.prepare(model, LrQat(rank=2), [{"match": "model.embed_tokens", "grid": INT8}, {"match": "*", "grid": INT8}])
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, QuantLinear)
    assert isinstance(embedding, QuantEmbedding)
    assert head.tied
    assert head.adapter is None
    assert head.base is embedding.base
    rtn, _ = Rtn().build(table, Grid(8, 16))
    values = rtn.dequantize(torch.float32)
    assert torch.equal(embedding(IDS), values[IDS])
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head(x), nn.functional.linear(x, values))
    assert not [n for n, _ in model.named_parameters() if n.startswith("lm_head")]


def test_a_tied_head_without_a_rule_for_its_embedding_is_left_alone() -> None:
    model = llama(tied=True)
    tt.prepare(model, Rtn(), [{"match": "*", "grid": INT8}])
    assert isinstance(model.lm_head, nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_follows_an_embedding_that_is_quantized_again() -> None:
    model = llama(tied=True)
    tt.prepare(model, Rtn(), [{"match": "model.embed_tokens", "grid": INT8}, {"match": "*", "grid": INT8}])
    coarse = {"bits": 3, "group": 16}
    tt.prepare(model, Rtn(), [{"match": "model.embed_tokens", "grid": coarse}, {"match": "*", "grid": INT8}])
    assert model.model.embed_tokens.base.grid == Grid(3, 16)
    assert model.lm_head.base is model.model.embed_tokens.base


def test_an_embedding_that_is_quantized_again_keeps_its_scale() -> None:
    """Gemma 2 multiplies the rows of its embedding by sqrt(K), whatever they are stored in."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=24)).eval()
    multiplied = model.model.embed_tokens(IDS) / nn.Embedding.forward(model.model.embed_tokens, IDS)
    for bits in (8, 4):
        tt.prepare(model, Rtn(), [{"match": "model.embed_tokens", "grid": {"bits": bits, "group": 16}}])
        embedding = model.model.embed_tokens
        assert embedding.base.grid == Grid(bits, 16)
        rows = embedding.base.dequantize(torch.float32)[IDS]
        torch.testing.assert_close(embedding(IDS), rows * multiplied.nanmedian())  # the padding's row is zero


def test_folding_tells_transformers_what_the_model_is_now() -> None:
    """The config that transformers saves, shows and hands on names the adapters that are there, and no others."""
    model = tt.prepare(llama(), LrQat(rank=2), [{"match": "*", "grid": INT8}])
    before = model.config.quantization_config
    assert any(spec["adapter"] is not None for spec in before.specs)
    tt.fold(model)
    after = model.config.quantization_config
    assert all(spec["adapter"] is None for spec in after.specs)
    assert model.hf_quantizer.quantization_config is after


def test_bias_dtype_and_mode_are_kept() -> None:
    model = llama(bias=True).to(torch.bfloat16)
    model.model.layers[0].self_attn.q_proj.bias.data.fill_(0.5)
    tt.prepare(model, Rtn(), [{"match": "*", "grid": INT8}])
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.bias.dtype == torch.bfloat16
    assert (layer.bias == 0.5).all()
    assert not layer.training
    assert model(IDS).logits.dtype == torch.bfloat16


def test_asking_for_a_weight_raises_with_advice() -> None:
    model = llama(tied=True)
    tt.prepare(model, Lora(rank=2), [{"match": "model.embed_tokens", "grid": INT8}, {"match": "*", "grid": INT8}])
    for name in ("model.layers.0.mlp.up_proj", "model.embed_tokens"):
        module = model.get_submodule(name)
        assert not hasattr(module, "weight")
        with pytest.raises(AttributeError, match=rf"^{name} has.*AffineWeight.*dequantize.*fold\(model\).*grid: null"):
            _ = module.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(value: float) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight: holds NaN"):
        tt.prepare(model, Lora())


# ---- errors that name the layer ------------------------------------------------------------------------------------

Q_PROJ, K_PROJ = (rf"^model\.layers\.0\.self_attn\.{p}_proj: " for p in "qk")
REAL = {"bits": 4, "group": 16, "zero": "real"}


@pytest.mark.parametrize(
    ("method", "grid", "said"),
    [
        (
            Rtn(),
            {"bits": 4, "group": 32},
            Q_PROJ + r"group 32 does not divide the 48 input features; use one of \[16\]",
        ),
        (Lora(), {"bits": 4, "group": 32}, Q_PROJ + "group 32"),
        (Qlora(), {"codebook": "nf4", "group": 32}, Q_PROJ + "group 32"),
        (LrQat(), {"bits": 4, "group": 32}, Q_PROJ + "group 32"),
        (Peqa(), {"bits": 4, "group": 32}, Q_PROJ + "group 32"),
        (Qat(), {"bits": 4, "group": 32}, Q_PROJ + "group 32"),
        (QaHira(), {"bits": 4, "group": 32, "zero": "real"}, Q_PROJ + "group 32"),
        (QBara(k=5), INT8, Q_PROJ + r"q-bara: k 5 does not divide the 48 input features; use one of"),
        (QBara(k=16), INT8, K_PROJ + r"q-bara: k 16 does not divide the 24 output features; use one of"),
        (LrQat(k=5), INT8, Q_PROJ + "lr-qat: k 5"),
        (QaLora(pool=8), REAL, Q_PROJ + "qa-lora: pool 8 is not a multiple of the group 16"),
        (QaBlora(pool=24), REAL, Q_PROJ + "qa-blora: pool 24 is not a multiple of the group 16"),
        (QaHira(pool=32), REAL, Q_PROJ + "pool 32 does not divide the 48"),
        (QaHira(repeat=16), REAL, K_PROJ + "repeat 16 does not divide the 24 output features"),
        (QaBlora(repeat=5), REAL, Q_PROJ + "repeat 5"),
        (QaHira(), INT8, Q_PROJ + r"qa-hira .*int8 g16 symmetric has none: use `zero: real` or `integer`"),
        (QaLora(), INT8, Q_PROJ + "qa-lora .*zero: real"),
        (QaBlora(), INT8, Q_PROJ + "qa-blora .*zero: real"),
        (QaHira(), "float", Q_PROJ + "qa-hira .*in float"),
        (LrQat(), {"codebook": "nf4", "group": 16}, Q_PROJ + "lr-qat needs an affine grid .*not nf4 g16"),
        (Peqa(), {"codebook": "nf4", "group": 16}, Q_PROJ + "peqa needs an affine grid"),
        (Qat(), {"codebook": "nf4", "group": 16}, Q_PROJ + "qat needs an affine grid"),
        (LrQat(), "float", Q_PROJ + "lr-qat needs an affine grid .*not float"),
        (Lora(rank=0), INT8, Q_PROJ + "lora: rank 0"),
        (LrQat(rank=-1), INT8, Q_PROJ + "lr-qat: rank -1"),
    ],
    ids=lambda v: v.name if isinstance(v, Method) else "",
)
def test_errors_name_the_layer_and_the_remedy(method: Method, grid: Any, said: str) -> None:
    model = llama()
    with pytest.raises(UserError, match=said):
        tt.prepare(model, method, [{"match": "*", "grid": grid}])
    assert not quant_layers(model)  # all is checked before anything is touched


@pytest.mark.parametrize("grid", [{"bits": 8, "group": 32}, {"codebook": "nf4", "group": 32}])
def test_an_embedding_whose_group_does_not_divide_is_named(grid: dict[str, Any]) -> None:
    model = llama()
    with pytest.raises(UserError, match=r"^model\.embed_tokens: group 32 does not divide the 48"):
        tt.prepare(model, Rtn(), [{"match": "model.embed_tokens", "grid": grid}, {"match": "*", "grid": INT8}])
    assert not quant_layers(model)


def test_an_embedding_is_not_kept_in_float() -> None:
    with pytest.raises(UserError, match=r"^model\.embed_tokens: .*null"):
        tt.prepare(llama(), Lora(), [{"match": "model.embed_tokens", "grid": "float"}])


def test_nothing_left_to_do_is_an_error() -> None:
    with pytest.raises(UserError, match="no layer"):
        tt.prepare(llama(), Lora(), [{"match": "*", "grid": None}])


def test_a_layer_that_has_an_adapter_is_not_prepared_again() -> None:
    model = tt.prepare(llama(), Lora(rank=2), [{"match": "*", "grid": REAL}])
    for rules in (None, [{"match": "*", "grid": REAL}]):
        with pytest.raises(UserError, match=Q_PROJ + r"already has an adapter \(output.*fold\(model, merge=True\)"):
            tt.prepare(model, QaHira(), rules)
    tt.fold(model)  # output adapters are kept, so it still has one
    with pytest.raises(UserError, match="already has an adapter"):
        tt.prepare(model, QaHira())
    tt.fold(model, merge=True)
    tt.prepare(model, QaHira(), [{"match": "*", "grid": REAL}])


def test_targets_need_no_weights() -> None:
    """Names and shapes decide: the same plan on the meta device, and its numbers are those of the prepared model."""
    rules = parse_rules([{"match": "model.embed_tokens", "grid": INT8}, {"match": "*", "grid": REAL}])
    with torch.device("meta"):
        planned = targets(llama(), QaBlora(rank=2), rules)
    model = llama()
    assert targets(model, QaBlora(rank=2), rules) == planned
    assert planned[0].kind == "embedding"
    tt.prepare(model, QaBlora(rank=2), rules)
    assert {t.name for t in planned} == set(quant_layers(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.trainable(QaBlora(rank=2)) for t in planned) == trained
