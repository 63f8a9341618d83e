"""The chunked cross-entropy against torch's own on float64 logits: value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.memory.peak import saved_storages
from trimtab.models.head import AfterHead, Head
from trimtab.training.divergence import LOGITS_CHUNK_TOKENS
from trimtab.training.loss import IGNORED, chunked_cross_entropy

C = LOGITS_CHUNK_TOKENS
HIDDEN, VOCABULARY = 24, 50
# tokens, and which of them do not count
SIZES = [
    (1, 0.0),
    (C - 1, 0.0),
    (C, 0.0),
    (C + 1, 0.3),
    (2 * C, 0.5),
    (3 * C + 17, 0.3),
    (2 * C + 5, 0.97),
]
OPTIONS = ["plain", "bias", "softcap", "bias and softcap", "factor", "factor, bias and softcap"]
# The largest error of value and gradient, relative: bfloat16 rounds logits, errors and products to 8 bits.
TOLERANCE = {torch.float64: (1e-6, 1e-6), torch.float32: (1e-6, 2e-6), torch.bfloat16: (5e-3, 1e-2)}


class Case:
    def __init__(self, tokens: int, ignored: float, options: str, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(tokens)
        self.hidden = (torch.randn(tokens, HIDDEN, generator=random) * 1.5).to(dtype).requires_grad_()
        self.weight = torch.randn(VOCABULARY, HIDDEN, generator=random).to(dtype)
        self.bias = torch.randn(VOCABULARY, generator=random).to(dtype) if "bias" in options else None
        self.softcap = 6.0 if "softcap" in options else None
        self.factor = 0.3 if "factor" in options else 1.0
        self.labels = torch.randint(VOCABULARY, (tokens,), generator=random)
        self.labels[torch.rand(tokens, generator=random) < ignored] = IGNORED

    def ours(self) -> Tensor:
        return chunked_cross_entropy(self.hidden, self.head(), self.labels)

    def head(self) -> Head:
        return Head(self.weight, self.bias, AfterHead(self.factor, self.softcap))

    def exact(self) -> tuple[Tensor, Tensor]:
        """Value and gradient by autograd in float64, from the same inputs."""
        hidden = self.hidden.detach().double().requires_grad_()
        logits = F.linear(hidden, self.weight.double(), None if self.bias is None else self.bias.double())
        logits = self.factor * logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        loss = F.cross_entropy(logits, self.labels, ignore_index=-100, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, hidden)
        return loss.detach(), gradient


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tokens", "ignored"), SIZES)
def test_value_and_gradient(tokens: int, ignored: float, options: str, dtype: torch.dtype) -> None:
    case = Case(tokens, ignored, options, dtype)
    loss, (value, gradient) = case.ours(), case.exact()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    loss.backward()
    assert case.hidden.grad is not None
    assert case.hidden.grad.dtype == dtype
    of_value, of_gradient = TOLERANCE[dtype]
    assert abs(loss.item() - value.item()) <= of_value * value.item()
    error = (case.hidden.grad.double() - gradient).norm() / gradient.norm()
    assert error <= of_gradient
    not_counted = case.labels == IGNORED
    assert torch.count_nonzero(case.hidden.grad[not_counted]) == 0
    assert case.hidden.grad[~not_counted].ne(0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 2 * C + 3])
def test_nothing_counts(tokens: int, dtype: torch.dtype) -> None:
    case = Case(tokens, 1.1, "plain", dtype)
    assert (case.labels == IGNORED).all()
    loss = case.ours()
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(case.hidden.grad, torch.zeros(tokens, HIDDEN, dtype=dtype))


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    """Averaged over tokens, accumulated over micro-batches, and added to another use of the hidden states."""
    case, (_, gradient) = Case(C + 9, 0.2, "bias", torch.float32), Case(C + 9, 0.2, "bias", torch.float32).exact()
    (case.ours() / 7 + case.hidden.sum()).backward()
    (2 * case.ours()).backward()
    torch.testing.assert_close(case.hidden.grad.double(), gradient * (1 / 7 + 2) + 1, rtol=1e-5, atol=1e-5)


def test_how_tokens_are_chunked_changes_nothing() -> None:
    """A token's gradient does not depend on what stands before it."""
    case = Case(C + 40, 0.0, "softcap", torch.float32)
    case.ours().backward()
    later = Case(C + 40, 0.0, "softcap", torch.float32)
    part = chunked_cross_entropy(later.hidden[40:], later.head(), later.labels[40:])
    part.backward()
    torch.testing.assert_close(later.hidden.grad[40:], case.hidden.grad[40:], rtol=1e-6, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = chunked_cross_entropy(hidden, Head(weight), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2000
    assert torch.equal(hidden.grad, torch.tensor([[0.0, 0.0], [-2.0, 0.0]]))


def test_without_gradients() -> None:
    case = Case(C + 1, 0.3, "plain", torch.float32)
    with torch.no_grad():
        loss = case.ours()
    assert not loss.requires_grad
    assert abs(loss.item() - case.exact()[0].item()) <= 1e-5 * loss.item()


def test_it_keeps_no_more_than_the_hidden_states() -> None:
    """No logits outlive their chunk: what backward needs has the size of the hidden states, not of the vocabulary."""
    tokens, vocabulary = 4 * C, 4000
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(vocabulary, HIDDEN)
    with saved_storages() as seen:
        chunked_cross_entropy(hidden, Head(weight), torch.zeros(tokens, dtype=torch.int64)).backward()
    own = {weight.untyped_storage()._cdata, hidden.untyped_storage()._cdata}
    kept = sum(size for key, (size, _) in seen.items() if key not in own)
    assert kept <= 3 * hidden.nbytes
    assert kept < C * vocabulary
