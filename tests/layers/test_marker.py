"""What stands for `.weight` in a layer that has none: in its state, when it is read, and when somebody asks."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import cases
from cases import CASES, K, N
from trimtab.layers.linear import QuantEmbedding, QuantLinear, from_spec


def layer(name: str = "rtn-int4-g32-integer") -> QuantLinear:
    made = cases.build(CASES[name])
    made.name = "model.layers.0.self_attn.q_proj"
    return made


def test_a_state_holds_a_marker_that_no_float_layer_can_read() -> None:
    for made in (layer(), QuantEmbedding(layer().base, torch.float32)):
        state = made.state_dict(prefix="p.")
        marker = state["p.weight"]
        assert (marker.dtype, marker.tolist()) == (torch.uint8, [0])
        assert {"p.base.codes", "p.base.scale", "p.base.zero"} < set(state)
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            torch.nn.Linear(K, N).load_state_dict({"weight": marker}, strict=False)


def test_states_are_read_with_and_without_a_marker_and_refused_with_a_weight() -> None:
    first, state = layer(), layer().state_dict()
    assert not any(first.load_state_dict(state))
    codes = state["base.codes"].clone()
    state["base.codes"] = codes ^ 255
    first.load_state_dict({n: t for n, t in state.items() if n != "weight"})
    assert torch.equal(first.base.codes, codes ^ 255)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="weight: is a float weight, and the layer here is stored as AffineWeight"):
        first.load_state_dict({**state, "weight": torch.zeros(N, K)})
    with pytest.raises(RuntimeError, match="weight: is a float weight"):
        first.load_state_dict({**state, "weight": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        first.load_state_dict({**state, "other": torch.zeros(2)})
    with pytest.raises(RuntimeError, match=r"Missing key.*base.scale"):
        first.load_state_dict({n: t for n, t in state.items() if n != "base.scale"})


def test_distributed_checkpoints_know_the_marker() -> None:
    first = layer()
    state = get_model_state_dict(first)
    assert state["weight"].tolist() == [0]
    set_model_state_dict(first, state)


def test_while_a_file_is_read_the_weight_counts_as_read() -> None:
    first = layer()
    first.reading = True
    assert "weight" not in first.state_dict()
    assert first.weight.is_meta
    assert first.weight.shape == (N, K)
    assert first.weight._is_hf_initialized is True
    assert QuantLinear.reading is False


def test_asking_for_the_weight_says_what_to_ask_for() -> None:
    first = layer()
    with pytest.raises(AttributeError, match=r"model.layers.0.self_attn.q_proj has no `.weight`.*as AffineWeight") as e:
        _ = first.weight
    assert "{match: '*.q_proj', grid: null}" in str(e.value)
    assert not hasattr(first, "weight")
    assert not hasattr(first, "weights")
    first.name = ""
    with pytest.raises(AttributeError, match=r"^QuantLinear has no"):
        _ = first.weight


def test_a_head_has_a_weight_with_its_adapter() -> None:
    head = layer()
    head.head_dtype = torch.float32
    assert torch.equal(head.weight, head.base.dequantize(torch.float32))
    assert torch.equal(head.to(torch.bfloat16).weight, head.base.dequantize(torch.bfloat16))
    assert head.to("cpu").head_dtype == torch.bfloat16
    assert not hasattr(head, "weights")
    tuned = layer("lora-int4-g32-integer")
    tuned.head_dtype = torch.float32
    with torch.no_grad():
        tuned.adapter.delta.B.normal_()  # type: ignore[union-attr, operator]
    assert torch.equal(tuned.weight, tuned.adapter.merged(tuned.base, torch.float32))  # type: ignore[union-attr, operator]
    assert layer().to(torch.bfloat16).head_dtype is None


def test_a_tied_head_borrows_and_keeps_nothing() -> None:
    embedding = QuantEmbedding(layer().base, torch.float32, padding_idx=3, scale=2.0)
    head = QuantLinear(embedding.base, tied=True)
    assert head.base is embedding.base
    assert head.tied
    assert not embedding.base.training or not [*head.children()]
    assert head.state_dict() == {}
    assert [*head.parameters()] == []
    both = copy.deepcopy(torch.nn.ModuleList([embedding, head]))
    assert both[1].base is both[0].base is not embedding.base
    assert head.spec() == {"weight": None, "adapter": None, "bias": None}
    assert not layer().tied
    laid_out = from_spec(embedding.spec(), torch.bfloat16)
    assert isinstance(laid_out, QuantEmbedding)
    assert (laid_out.dtype, laid_out.padding_idx, laid_out.scale) == (torch.bfloat16, 3, 2.0)
    assert (laid_out.num_embeddings, laid_out.embedding_dim) == (N, K)
    again = from_spec(head.spec(), torch.bfloat16, laid_out)
    assert isinstance(again, QuantLinear)
    assert again.tied
    assert again.base is laid_out.base
