"""Distillation against float64 autograd of its equation; the cache on disk; teachers in whole runs."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from trimtab import cli
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.errors import UserError
from trimtab.evaluation import parity
from trimtab.memory.peak import Plan, Teaching, peak_of_training, saved_storages
from trimtab.memory.plan import teaching
from trimtab.models.head import AfterHead, Head
from trimtab.models.load import load, load_float
from trimtab.models.sources import open_source
from trimtab.pipeline.run import run
from trimtab.recipe import recipe
from trimtab.recipe.recipe import Recipe
from trimtab.training import build, teacher, teacher_cache
from trimtab.training.divergence import (
    LOGITS_CHUNK_TOKENS,
    Distillation,
    FullTargets,
    Targets,
    TopTargets,
    top_of,
)
from trimtab.training.loss import IGNORED, chunked_cross_entropy, loss_of_logits
from trimtab.training.teacher import LiveTeacher
from trimtab.training.teacher_cache import NUMBER, Cache, Key
from trimtab.training.trainer import packed

C = LOGITS_CHUNK_TOKENS
HIDDEN, WIDER, VOCABULARY = 24, 32, 50


class Case:
    """A student and a teacher of another width, and what both say of the counted tokens."""

    def __init__(self, tokens: int, ignored: float = 0.3, softcap: float | None = None, bias: bool = False) -> None:
        random = torch.Generator().manual_seed(tokens)
        self.hidden = torch.randn(tokens, HIDDEN, generator=random).requires_grad_()
        self.weight = torch.randn(VOCABULARY, HIDDEN, generator=random)
        self.bias = torch.randn(VOCABULARY, generator=random) if bias else None
        self.softcap = softcap
        self.labels = torch.randint(VOCABULARY, (tokens,), generator=random)
        self.labels[torch.rand(tokens, generator=random) < ignored] = IGNORED
        states = torch.randn(int((self.labels != IGNORED).sum()), WIDER, generator=random)
        head = Head(torch.randn(VOCABULARY, WIDER, generator=random) / 2, after=AfterHead(softcap=softcap))
        self.full = FullTargets(states, lambda: head)
        self.teacher = self.capped(states.double() @ head.weight_VD.double().T)

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """The student's, of all tokens, in the dtype of `hidden`."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return self.capped(F.linear(hidden, self.weight.to(hidden.dtype), bias))

    def ours(self, weight: float, temperature: float, targets: Targets) -> Tensor:
        distillation = Distillation(weight, temperature, targets)
        head = Head(self.weight, self.bias, AfterHead(softcap=self.softcap))
        return chunked_cross_entropy(self.hidden, head, self.labels, distillation)

    def exact(self, weight: float, temperature: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(1 - w) CE + w T^2 KL and its gradient, in float64; with `kept` (T, V), of distributions with one bucket."""
        hidden = self.hidden.detach().double().requires_grad_()
        counted = self.labels != IGNORED
        student = self.logits(hidden)[counted]
        p, q = (self.teacher / temperature).softmax(1), (student / temperature).softmax(1)
        kl = (p * (p / q).log()).sum()
        if kept is not None:
            r, rest = ((t * ~kept).sum(1) for t in (p, q))
            kl = torch.where(kept, p * (p / q).log(), 0).sum() + (r * (r / rest).log()).sum()
        ce = -student.log_softmax(1)[torch.arange(len(student)), self.labels[counted]].sum()
        loss = (1 - weight) * ce + weight * temperature**2 * kl
        (gradient,) = torch.autograd.grad(loss, hidden)
        return loss.detach(), gradient

    def top(self, k: int, temperature: float) -> tuple[TopTargets, Tensor]:
        """What a cache would keep, but in full digits, and which tokens those are."""
        log_p = (self.teacher / temperature).log_softmax(1)
        ids = log_p.topk(k, 1).indices
        kept = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, ids, True)
        rest = (log_p.exp() * ~kept).sum(1, keepdim=True).log()
        return TopTargets(torch.cat([log_p.gather(1, ids), rest], 1).float(), ids.int()), kept


def agrees(case: Case, loss: Tensor, exact: tuple[Tensor, Tensor], tolerance: float = 3e-6) -> None:
    loss.backward()
    assert case.hidden.grad is not None
    value, gradient = exact
    assert abs(loss.item() - value.item()) <= tolerance * value.abs().item()
    assert (case.hidden.grad.double() - gradient).norm() <= tolerance * gradient.norm()


MIXES = [(0.5, 1.0), (0.3, 2.0), (1.0, 0.7), (1.0, 4.0)]
CASES: list[dict[str, Any]] = [{"tokens": 1, "ignored": 0}, {"tokens": 2 * C + 5}, {"tokens": C, "softcap": 4.0}]
CASES += [{"tokens": C + 1, "bias": True, "softcap": 6.0}]


@pytest.mark.parametrize(("weight", "temperature"), MIXES)
@pytest.mark.parametrize("options", CASES, ids=str)
def test_whole_distribution(options: dict[str, Any], weight: float, temperature: float) -> None:
    case = Case(**options)
    agrees(case, case.ours(weight, temperature, case.full), case.exact(weight, temperature))


@pytest.mark.parametrize(("weight", "temperature"), MIXES)
@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_kept_tokens_and_a_bucket(options: dict[str, Any], k: int, weight: float, temperature: float) -> None:
    case = Case(**options)
    targets, kept = case.top(k, temperature)
    agrees(case, case.ours(weight, temperature, targets), case.exact(weight, temperature, kept), 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_kept_is_the_whole_distribution(temperature: float) -> None:
    case = Case(C + 3)
    targets = TopTargets(*(torch.cat(parts) for parts in zip(*pieces(case, VOCABULARY, temperature), strict=True)))
    assert (targets.log_probs[:, -1] == -torch.inf).all()
    agrees(case, case.ours(0.6, temperature, targets), case.exact(0.6, temperature), 2e-3)


def pieces(case: Case, k: int, temperature: float) -> list[tuple[Tensor, Tensor]]:
    """Chunks of what `top_of` keeps."""
    found = [top_of(case.full.logits(slice(i, i + C)), k, temperature) for i in range(0, len(case.full), C)]
    return [(part.log_probs, part.ids) for part in found]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_a_cache_keeps(temperature: float) -> None:
    """float16 logarithms and the right tokens; the bucket holds what is left."""
    case = Case(C + 3)
    exact, _ = case.top(5, temperature)
    log_probs, ids = (torch.cat(parts) for parts in zip(*pieces(case, 5, temperature), strict=True))
    assert (log_probs.dtype, ids.dtype) == (torch.float16, torch.int32)
    assert torch.equal(ids, exact.ids)
    torch.testing.assert_close(log_probs.float(), exact.log_probs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_probs.float().exp().sum(1), torch.ones(len(ids)), rtol=0, atol=2e-3)


def test_a_student_that_is_the_teacher() -> None:
    """The divergence and its gradient are exactly zero; from a cache, as small as its digits."""
    case = Case(C + 9, ignored=0)
    same = FullTargets(case.hidden.detach(), lambda: Head(case.weight))
    loss = case.ours(1.0, 2.0, same)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(case.hidden.grad) == 0
    parts = [top_of(same.logits(slice(i, i + C)), 4, 2.0) for i in range(0, len(same), C)]
    stored = TopTargets(torch.cat([p.log_probs for p in parts]), torch.cat([p.ids for p in parts]))
    case.hidden.grad = None
    loss = case.ours(1.0, 2.0, stored)
    loss.backward()
    assert 0 <= loss.item() / len(stored) < 1e-5
    assert case.hidden.grad.abs().max() < 1e-2


@pytest.mark.parametrize("kind", ["none", "full", "top"])
def test_from_logits_it_is_the_same(kind: str) -> None:
    """Where the head is trained: the chunked loss's value, and autograd's way on from the logits."""
    case = Case(C + 40)
    targets = {"none": None, "full": case.full, "top": case.top(6, 2.0)[0]}[kind]
    distillation = None if targets is None else Distillation(0.4, 2.0, targets)
    chunked = chunked_cross_entropy(case.hidden, Head(case.weight), case.labels, distillation)
    (gradient,) = torch.autograd.grad(chunked, case.hidden)
    plain = loss_of_logits(case.logits(case.hidden), case.labels, distillation)
    plain.backward()
    torch.testing.assert_close(plain, chunked, rtol=1e-6, atol=0)
    torch.testing.assert_close(case.hidden.grad, gradient, rtol=1e-5, atol=1e-5)


def test_students_far_from_their_teacher() -> None:
    """Logits so far apart that probabilities underflow give large but finite numbers."""
    hidden, weight = torch.tensor([[100.0]], requires_grad=True), torch.tensor([[3.0], [0.0], [-3.0]])
    targets = TopTargets(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[2]]))
    loss = chunked_cross_entropy(hidden, Head(weight), torch.tensor([2]), Distillation(1.0, 1.0, targets))
    loss.backward()
    entropy = 0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log()
    assert loss.item() == pytest.approx(entropy.item() + 0.9 * 600, rel=1e-6)
    assert hidden.grad.item() == pytest.approx(0.9 * 6, rel=1e-5)  # all that is pulled from token 0 to token 2


def test_it_keeps_no_logits() -> None:
    case = Case(4 * C, ignored=0)
    case.weight = torch.randn(4000, HIDDEN)
    head = Head(torch.randn(4000, WIDER))
    targets = FullTargets(torch.randn(4 * C, WIDER), lambda: head)
    with saved_storages() as seen:
        case.ours(0.5, 1.0, targets).backward()
    own = {t.untyped_storage()._cdata for t in (case.weight, case.hidden)}
    assert sum(size for key, (size, _) in seen.items() if key not in own) <= 3 * case.hidden.nbytes


# ---- the cache -------------------------------------------------------------------------------------------------------

CHAT = [{"prompt": f"What is {i}?", "completion": f" It is {i} and {'very ' * (i % 5)}good."} for i in range(30)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, text, `data.jsonl`, and prompts with completions, `chat.jsonl`."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    tiny.jsonl(folder / "chat.jsonl", *CHAT)
    return folder


def parsed(given: Path, output: Path, file: str = "data.jsonl", **changes: Any) -> Recipe:
    changes = {"distill": {"teacher": "cached", "top_k": 8}, "evaluate": {"parity": False}, **changes}
    return recipe.from_dict(tiny.recipe(given / "model", given / file, output, **changes))


def rows_of(of: Recipe) -> Any:
    assert of.data is not None
    return load_rows(of.data.path)


def asked(of: Recipe) -> list[str]:
    """What is said while the teacher is asked."""
    said: list[str] = []
    teacher_cache.ask(of, tiny.tokenizer(), rows_of(of), packed, say=said.append)
    return said


PACKINGS = [("data.jsonl", "wrapped"), ("data.jsonl", "bfd"), ("chat.jsonl", "bfd"), ("chat.jsonl", "none")]


@pytest.mark.parametrize(("file", "packing"), PACKINGS)
def test_batches_find_their_rows(given: Path, tmp_path: Path, file: str, packing: str) -> None:
    """In any order, and in every packing, the cache says what the teacher in memory says of the same batch."""
    of = parsed(given, tmp_path / "run", file, data={"packing": packing, "block_tokens": 32})
    asked(of)
    live = LiveTeacher(teacher.load_teacher(of))
    sequences, collate = packed(live.model, tiny.tokenizer(), of, rows_of(of))
    cached = Cache(tmp_path / "run-teacher", Key.of(of, tiny.tokenizer(), rows_of(of))).teacher(sequences)
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(3)).tolist()
    for some in (order[:3], order[3:5], order[:1]):
        examples = [{**sequences[i], NUMBER: i} for i in some]
        batch = teacher_cache.Numbered(collate)(examples)
        assert batch[NUMBER] == some
        found, targets = cached.targets(batch), live.targets(collate(examples))
        assert len(found) == len(targets) > 0
        log_q = targets.logits(slice(None)).log_softmax(1)
        kept = log_q.gather(1, found.ids.long())
        torch.testing.assert_close(found.log_probs[:, :-1].float(), kept, rtol=0, atol=0.03)  # bfloat16, other batches
        assert (kept[:, 0] >= log_q.max(1).values - 0.03).all()


def test_a_cache_is_used_again_and_remade_when_stale(given: Path, tmp_path: Path) -> None:
    (first,) = asked(parsed(given, tmp_path / "run"))
    assert first.startswith("asking the float model")
    made = (tmp_path / "run-teacher" / "ids.npy").stat().st_mtime_ns
    (again,) = asked(parsed(given, tmp_path / "run", method={"name": "qa-hira"}, train={"lr": 1e-3}))
    assert again.startswith("learning from the float model's predictions")
    assert (tmp_path / "run-teacher" / "ids.npy").stat().st_mtime_ns == made
    stale, _ = asked(parsed(given, tmp_path / "run", train={"seed": 1}))
    assert stale.endswith("run-teacher: was made with another seed; made again")
    (again,) = asked(parsed(given, tmp_path / "run", train={"seed": 1}))
    assert again.startswith("learning from the float model's predictions")


def test_what_makes_a_cache_stale(given: Path, tmp_path: Path) -> None:
    other, untied = tmp_path / "other.jsonl", tiny.model(tmp_path / "untied", tied=False)
    other.write_text((given / "data.jsonl").read_text().replace("plus", "and"))
    changes: dict[str, dict[str, Any]] = {
        "top_k": {"distill": {"teacher": "cached", "top_k": 9}},
        "temperature": {"distill": {"teacher": "cached", "top_k": 8, "temperature": 2.0}},
        "seed": {"train": {"seed": 1}},
        "block_tokens": {"data": {"block_tokens": 64}},
        "packing": {"data": {"packing": "bfd"}},
        "dtype": {"model": {"path": str(given / "model"), "dtype": "float32"}},
        "model": {"model": {"path": str(untied)}},
        "rows": {"data": {"path": str(other)}},
    }
    of = parsed(given, tmp_path / "run")
    asked(of)
    for named, change in changes.items():
        changed = parsed(given, tmp_path / "run", **change)
        cache = Cache(tmp_path / "run-teacher", Key.of(changed, tiny.tokenizer(), rows_of(changed)))
        assert (cache.differs, cache.done, cache.complete) == ([named], 0, False)
    cache = Cache(tmp_path / "run-teacher", Key.of(of, tiny.tokenizer("{{ messages }}"), rows_of(of)))
    assert cache.differs == ["tokenizer"]


def test_an_interrupted_cache_goes_on(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of, whole = parsed(given, tmp_path / "run"), parsed(given, tmp_path / "whole")
    asked(whole)
    calls, real = [], Cache._ask

    def breaks(self: Cache, *arguments: Any) -> TopTargets:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Cache, "_ask", breaks)
    with pytest.raises(KeyboardInterrupt):
        asked(of)
    begun = json.loads((tmp_path / "run-teacher.unfinished" / "teacher.json").read_text())
    assert begun["done"] == 3 * of.train.micro_batch
    assert not (tmp_path / "run-teacher").exists()
    with pytest.raises(UserError, match="not complete"):
        Cache(tmp_path / "run-teacher", Key.of(of, tiny.tokenizer(), rows_of(of))).teacher([])
    asked(of)
    state = json.loads((tmp_path / "run-teacher" / "teacher.json").read_text())
    assert state["done"] == state["count"]
    assert len(calls) == 1 + -(-state["count"] // of.train.micro_batch)  # nothing was asked twice but what broke
    for name in ("first.npy", "ids.npy", "log_probs.npy"):
        assert (tmp_path / "run-teacher" / name).read_bytes() == (tmp_path / "whole-teacher" / name).read_bytes()


def test_what_a_cache_refuses(given: Path, tmp_path: Path) -> None:
    of = parsed(given, tmp_path / "run")
    (tmp_path / "run-teacher").mkdir()
    (tmp_path / "run-teacher" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.txt, which no cache has"):
        asked(of)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        asked(parsed(given, tmp_path / "run", distill={"cache": str(tmp_path / "file")}))
    with pytest.raises(UserError, match="in the output directory"):
        parsed(given, tmp_path / "run", distill={"cache": str(tmp_path / "run" / "teacher")})
    fine = parsed(given, tmp_path / "fine")
    asked(fine)
    cache = Cache(tmp_path / "fine-teacher", Key.of(fine, tiny.tokenizer(), rows_of(fine)))
    with pytest.raises(UserError, match="other training sequences"):
        cache.teacher([{"input_ids": [1, 2], "labels": [1, 2]}])


def test_the_teacher_is_gone_before_the_student_comes(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    load, load_float = build.load, teacher.load_float

    def watched_float(*arguments: Any, **options: Any) -> Any:
        model = load_float(*arguments, **options)
        alive.append(weakref.ref(model))
        return model

    def watched(*arguments: Any, **options: Any) -> Any:
        assert len(alive) == 1
        assert alive[0]() is None
        return load(*arguments, **options)

    monkeypatch.setattr(teacher, "load_float", watched_float)
    monkeypatch.setattr(build, "load", watched)
    run(parsed(given, tmp_path / "run"))


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharp(given: Path) -> Path:
    """The model with weights so large that rounding them to 3 bits changes what it says."""
    tiny.model(given / "sharp")
    model = load_float(str(given / "sharp"))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0 if p.dim() == 2 else 1.0)
    model.save_pretrained(given / "sharp")
    return given / "sharp"


@pytest.mark.parametrize("kind", ["cached", "bfloat16", "int8"])
def test_a_run_comes_nearer_to_the_float_model(given: Path, sharp: Path, tmp_path: Path, kind: str) -> None:
    train_block = {"steps": 25, "lr": 1e-2, "lr_scale": 1e-3}
    changes: Any = {"train": train_block, "distill": {"teacher": kind, "weight": 1.0, "top_k": 200}}
    changes["evaluate"] = {"parity": kind == "cached"}
    of = recipe.from_dict(tiny.recipe(sharp, given / "data.jsonl", tmp_path / "run", **changes))
    metrics = run(of)
    blocks = token_windows(rows_of(of), tiny.tokenizer(), block_tokens=32, limit_tokens=256)
    exact = parity.logits_of(load_float(str(sharp)), blocks)
    rounded, _ = load(str(sharp), of.method, of.rules)
    tuned, _ = load(str(of.out))
    before, after = (parity.compare("", exact, parity.logits_of(m, blocks), blocks).kl for m in (rounded, tuned))
    assert after < 0.6 * before
    assert metrics["losses"][-1] < 0.8 * metrics["losses"][0]
    assert kind != "cached" or metrics["max_logit_difference"] == 0
    # The first loss is the divergence of the rounded model, about: other tokens, and tokens only part of which are kept.
    assert metrics["losses"][0] == pytest.approx(before, rel=0.5)


def test_teachers_agree_on_the_loss(given: Path, sharp: Path, tmp_path: Path) -> None:
    """One step's loss is the same from memory and from a cache of all tokens; and with a head that is trained."""
    losses = {}
    rules = [{"match": "*", "grid": {"bits": 3, "group": 32}}]
    untied = tiny.model(tmp_path / "untied", tied=False)
    for kind in ("bfloat16", "cached"):
        for head, path in (("frozen", sharp), ("trained", untied)):
            distill = {"teacher": kind, "weight": 0.7, "temperature": 2.0, "top_k": 260}
            options: Any = {
                "train": {"steps": 1},
                "evaluate": {"parity": False},
                "distill": distill,
                "rules": rules if head == "trained" else tiny.RULES,
            }
            out = tmp_path / f"{kind}-{head}"
            losses[kind, head] = run(recipe.from_dict(tiny.recipe(path, given / "data.jsonl", out, **options)))[
                "losses"
            ][0]
    for head in ("frozen", "trained"):
        assert losses["cached", head] == pytest.approx(losses["bfloat16", head], rel=2e-3)


def test_no_float_model_no_teacher(given: Path, tmp_path: Path) -> None:
    saved = run(parsed(given, tmp_path / "run", distill=None, train={"steps": 0}))["output"]
    of = recipe.from_dict(tiny.recipe(Path(saved), given / "data.jsonl", tmp_path / "next", distill={}, rules=None))
    with pytest.raises(UserError, match="no float model to learn from"):
        run(of)


@pytest.mark.parametrize("kind", ["cached", "bfloat16", "int8"])
def test_the_plan_knows_the_teacher(given: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    of = parsed(given, tmp_path / "run", distill={"teacher": kind})
    needs = teaching(of)(64)
    real = sum(p.nbytes for p in teacher.load_teacher(of).parameters())
    gc.collect()

    def plan(added: Teaching) -> Plan:
        options: Any = {"micro_batch": 2, "block_tokens": 32, "dtype": of.dtype, "checkpointing": True}
        return peak_of_training(open_source(of.model.path).layout(), of.method, of.rules, **options, teaching=added)

    without, with_teacher = plan(Teaching()), plan(needs)
    assert needs.resident == (0 if kind == "cached" else real)
    assert with_teacher.teacher == needs.resident
    assert with_teacher.temporary > without.temporary
    if kind == "cached":
        assert real < needs.before == with_teacher.before
        huge = Teaching(before=10 * without.total)
        assert plan(huge).total == 10 * without.total
    else:
        assert with_teacher.total >= without.total + real
    assert teaching(parsed(given, tmp_path / "run", distill=None))(64) == Teaching()
    file = tiny.write(tmp_path / "recipe.yaml", tiny.recipe(given / "model", given / "data.jsonl", tmp_path / "run"))
    cli.plan(str(file), [f"distill.teacher={kind}"])
    assert ("before it: asking the teacher" if kind == "cached" else "the teacher") in capsys.readouterr().out
