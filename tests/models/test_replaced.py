"""What `prepare` replaces and what it leaves: other libraries' layers, routers, towers; and all of it or nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    CLIPVisionConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    JetMoeConfig,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MixtralConfig,
    NanoChatConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    RoCBertConfig,
    RwkvConfig,
)

import trimtab as tt
from trimtab.errors import UserError
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.methods import LrQat, Rtn
from trimtab.models import prepare as preparing
from trimtab.models.prepared import quant_layers
from trimtab.models.replaceable import READ, ROUTER, layers_of

IDS = torch.arange(24).view(2, 12) * 7 % 70 + 3
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FOUR: dict[str, Any] = {"match": "*", "grid": {"bits": 4, "group": 32}}
# One for each way in which a family differs.
FAMILIES: dict[str, Any] = {
    "mixtral, fused experts": MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen2 moe, a shared expert's gate": Qwen2MoeConfig(**EXPERTS, num_experts=4, shared_expert_intermediate_size=32),
    "jetmoe, a router with a linear layer": JetMoeConfig(
        **{k: v for k, v in SIZES.items() if k not in ("num_attention_heads",)}, num_key_value_heads=2,
        kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
    ),
    "mamba, weights that its mixer reads": MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2),
    "rwkv, weights that the model rescales": RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2),
    "falcon, a subclass of its own": FalconConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}),
    "biogpt, a tied head and a scaled embedding": BioGptConfig(**SIZES),
    "rocbert, which changes outputs in place": RoCBertConfig(**SIZES, is_decoder=True),
    "nanochat, which initialises layers by name": NanoChatConfig(**SIZES, num_key_value_heads=2),
    "lfm2": Lfm2Config(**SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
}  # fmt: skip


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def llama(**options: Any) -> PreTrainedModel:
    return made(LlamaConfig(**{**SIZES, **options}))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_prepared_trained_folded_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    """Routers were replaced in some families, and layers whose owner reads their weight crashed when it did."""
    model = made(FAMILIES[name])
    left = layers_of(model).left
    tt.prepare(model, LrQat(rank=2), [FOUR])
    assert not left.keys() & quant_layers(model).keys()
    model.train()
    model(input_ids=IDS).logits.float().pow(2).mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    model.eval()
    with torch.no_grad():
        for p in trained:
            p.add_(0.05 * torch.randn_like(p) * p.abs().mean())
    expected = logits(model)
    assert torch.isfinite(expected).all()
    tt.fold(model)
    assert torch.equal(logits(model), expected)
    tt.save(model, tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert type(again).__name__ == type(model).__name__
    assert torch.equal(logits(again), expected)


def test_what_stays_in_float_has_a_reason() -> None:
    reasons = {name: layers_of(made(config)).left for name, config in FAMILIES.items()}
    gates = reasons["qwen2 moe, a shared expert's gate"]
    assert gates == {f"model.layers.{i}.mlp.shared_expert_gate": ROUTER for i in range(2)}
    assert set(reasons["jetmoe, a router with a linear layer"].values()) == {ROUTER}
    mixers = reasons["mamba, weights that its mixer reads"]
    assert mixers == {f"backbone.layers.{i}.mixer.{p}_proj": READ for i in range(2) for p in ("x", "dt", "out")}
    read = reasons["rwkv, weights that the model rescales"]
    by_name = ("attention.output", "attention.value", "feed_forward.value")  # the model reads some `value`
    assert read == {f"rwkv.blocks.{i}.{p}": READ for i in range(2) for p in by_name}
    assert not reasons["falcon, a subclass of its own"]


def test_twice_the_layers_take_twice_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at every module for each of them made a plan of 256 layers one of minutes."""
    asked = [0]
    plain = nn.Module.__getattr__

    def counting(self: nn.Module, name: str) -> Any:
        asked[0] += 1
        return plain(self, name)

    counts = []
    for layers in (4, 8):
        model = llama(num_hidden_layers=layers)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__getattr__", counting)
            asked[0] = 0
            layers_of(model)
        counts.append(asked[0])
    assert counts[1] < 2.2 * counts[0]


class Moe(nn.Module):
    """A block of some other library's, with a router that says so only by its place."""

    def __init__(self) -> None:
        super().__init__()
        self.pick = nn.Linear(32, 4)
        self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])


def test_a_router_is_known_by_its_place() -> None:
    model = llama(num_experts=4)
    model.model.layers[0].mlp = Moe()  # type: ignore[assignment]
    tt.prepare(model, Rtn(), [FOUR])
    assert type(model.get_submodule("model.layers.0.mlp.pick")) is nn.Linear
    assert isinstance(model.get_submodule("model.layers.0.mlp.experts.0"), QuantLinear)


def test_a_rule_for_nothing_but_layers_that_stay_is_refused() -> None:
    model = made(FAMILIES["qwen2 moe, a shared expert's gate"])
    said = (
        r"rules\[0\]\.match: '\*gate' matches only layers that stay in float: .*\.0\.mlp\.shared_expert_gate \(a router"
    )
    with pytest.raises(UserError, match=said):
        tt.prepare(model, Rtn(), [{"match": "*gate", "grid": {"bits": 4}}, FOUR])
    tt.prepare(model, Rtn(), [{"match": "*gate", "grid": None}, FOUR])


# ---- models that see ------------------------------------------------------------------------------------------------

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        text_config=TEXT, vision_config={**TOWER, "num_hidden_layers": 1}, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**TOWER, num_hidden_layers=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=90)
    )


@pytest.mark.parametrize("make", [gemma3, llava])
def test_a_model_that_sees_keeps_its_tower(make: Any, tmp_path: Path) -> None:
    """Vision towers were rounded, and Gemma 3 could not be reloaded after training."""
    torch.manual_seed(0)
    model = make().eval()
    kind = type(model)
    tower = {n: p.clone() for n, p in model.named_parameters() if "vision" in n or "projector" in n}
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    tt.prepare(model, LrQat(rank=2), [{"match": embedding, "grid": {"bits": 8, "group": 32}}, FOUR])
    ours = quant_layers(model)
    assert len(ours) == 14 + 1 + any(n.endswith("lm_head") for n in ours)
    assert all("language_model" in n or n == "lm_head" for n in ours)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    model(input_ids=IDS, labels=IDS).loss.backward()
    tt.fold(model)
    tt.save(model, tmp_path / "m")
    again = kind.from_pretrained(tmp_path / "m").eval()
    assert type(again).__name__ == kind.__name__
    assert torch.equal(logits(again), logits(model))
    for name, p in tower.items():
        assert torch.equal(again.get_parameter(name), p)
    with pytest.raises(
        UserError, match=r"matches only layers that stay in float: .*vision.* \(not a part of the language"
    ):
        tt.prepare(make(), Rtn(), [{"match": "*vision*", "grid": {"bits": 4}}, FOUR])


# ---- what others have put in ----------------------------------------------------------------------------------------


class Fp8(nn.Linear):
    """As transformers' FP8Linear."""


def put(model: PreTrainedModel, make: Any) -> PreTrainedModel:
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    mlp.up_proj = make(mlp.up_proj)
    return model


def cast(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda *_: None)
    return layer


class Sharded(torch.Tensor):
    """As torchao's and FSDP2's."""


def subclassed(layer: nn.Linear) -> nn.Linear:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Sharded), requires_grad=False)
    return layer


def hqq(_: nn.Linear) -> nn.Module:
    made = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})()
    made.in_features, made.out_features = 32, 64
    return made


UP = r"model\.layers\.1\.mlp\.up_proj: "
OTHERS: dict[str, tuple[Any, str]] = {
    "bitsandbytes 8": (lambda x: Linear8bitLt(32, 64, bias=False, has_fp16_weights=False), UP + "is a bitsandbytes L"),
    "bitsandbytes 4": (lambda x: Linear4bit(32, 64, bias=False), UP + "is a bitsandbytes Linear4bit"),
    "a subclass": (lambda x: Fp8(32, 64, bias=False), UP + "is a .*Fp8, not a plain nn.Linear"),
    "float8": (lambda x: cast(x, torch.float8_e4m3fn), UP + "its weight is float8_e4m3fn"),
    "int8": (lambda x: cast(x, torch.int8), UP + "its weight is int8"),
    "meta": (lambda x: x.to("meta"), UP + "its weight is on the meta device"),
    "a tensor subclass": (subclassed, UP + "its weight is a Sharded"),
    "hooks": (hooked, UP + "has a hook, which would be lost"),
    "a look-alike": (hqq, UP + "is a hqq HQQLinear"),
    "parametrized": (lambda x: nn.utils.parametrizations.weight_norm(x), UP + "is a torch Parametrized"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_other_libraries_layers_are_refused_by_name(other: str) -> None:
    """int8 of bitsandbytes was accepted and off by 1.4 of the logits' norm; the others gave obscure errors."""
    make, said = OTHERS[other]
    model = put(llama(), make)
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    with pytest.raises(UserError, match=f"^{said}"):
        tt.prepare(model, Rtn(), [FOUR])
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before
    if other != "a look-alike":  # kept by a rule, it is nobody's business
        tt.prepare(model, Rtn(), [{"match": "*.1.mlp.up_proj", "grid": None}, FOUR])


def test_a_model_that_peft_wrapped_is_refused() -> None:
    """It gave `group 64 does not divide 4`, the rank of PEFT's factors."""
    base = llama()
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    for model in (wrapped, base):
        with pytest.raises(UserError, match=r"wrapped by peft.*merge_and_unload"):
            tt.prepare(model, Rtn(), [FOUR])
    tt.prepare(wrapped.merge_and_unload(), Rtn(), [FOUR])


def test_a_model_that_another_quantizer_loaded_is_refused() -> None:
    model = llama()
    model.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "fp8"})()})()  # type: ignore[assignment]
    with pytest.raises(UserError, match="already quantized by fp8; load the float model"):
        tt.prepare(model, Rtn(), [FOUR])


def test_layers_that_share_a_weight_stay_as_they_are() -> None:
    """Replaced one by one, they would no longer be one."""
    model = llama()
    blocks: Any = model.get_submodule("model.layers")
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    blocks[1].mlp.down_proj = blocks[0].mlp.down_proj
    expected = blocks[0].mlp.up_proj.weight
    tt.prepare(model, Rtn(), [FOUR])
    assert blocks[1].mlp.up_proj.weight is blocks[0].mlp.up_proj.weight is expected
    assert blocks[1].mlp.down_proj is blocks[0].mlp.down_proj
    assert type(blocks[0].mlp.down_proj) is nn.Linear
    assert isinstance(blocks[0].mlp.gate_proj, QuantLinear)


# ---- all or nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, UserError])
@pytest.mark.parametrize("at", ["a layer", "the end"])
@pytest.mark.parametrize("again", [False, True], ids=["float", "prepared before"])
def test_a_failure_leaves_the_model_as_it_was(
    again: bool, at: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama(tie_word_embeddings=True)
    rules = [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, FOUR]
    if again:
        tt.prepare(model, Rtn(), rules)
    expected, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}

    def about(module: nn.Module) -> list[Any]:
        kept = [id(module), type(module), module.training, sorted(vars(module))]
        return [
            *kept,
            *({k: id(v) for k, v in vars(module)[t].items()} for t in ("_modules", "_parameters", "_buffers")),
        ]

    before = [(n, about(m)) for n, m in model.named_modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    config, ties = dict(vars(model.config)), dict(model.all_tied_weights_keys)
    place, count = preparing.place, 0

    def failing(*args: Any) -> None:
        nonlocal count
        count += 1
        if at == "a layer" and count == 8:
            raise error("in the middle")
        place(*args)

    def ending(_: Any) -> None:
        raise error("at the end")

    monkeypatch.setattr(preparing, "place", failing)
    if at == "the end":
        monkeypatch.setattr(preparing, "attach", ending)
    with pytest.raises(error):
        tt.prepare(model, LrQat(rank=2), rules)
    assert [(n, about(m)) for n, m in model.named_modules()] == before
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert dict(vars(model.config)) == config
    assert model.all_tied_weights_keys == ties
    assert torch.equal(logits(model), expected)
    assert state.keys() == model.state_dict().keys()
    monkeypatch.undo()
    tt.prepare(model, LrQat(rank=2), rules)  # and it can be tried again


def test_a_weight_that_is_not_finite_leaves_no_layer_replaced() -> None:
    model = llama()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 4] = torch.inf  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match=f"^{UP[:-2]}.weight: holds NaN"):
        tt.prepare(model, Rtn(), [FOUR])
    assert not quant_layers(model)
