"""Runs that learn from preferences and rewards: their tokens, their reference, their resume; folded to the bit."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.pipeline import run as pipeline
from trimtab.recipe import recipe, texts
from trimtab.training import trainer as train


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PAIRS = [{"prompt": f"{i} plus {i} is ", "chosen": f"{2 * i}.", "rejected": f"blue {i}."} for i in range(8)]
TALKS = [
    {
        "prompt": [turn("user", p["prompt"])],
        "chosen": [turn("assistant", p["chosen"])],
        "rejected": [turn("assistant", p["rejected"])],
    }
    for p in PAIRS
]


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = [(row, key) for row in rows for key in ("chosen", "rejected")]
    return [{"prompt": r["prompt"], "completion": r[key], "label": key == "chosen"} for r, key in answers]


DATA = {"dpo": PAIRS, "dpo talks": TALKS, "kto": judged(PAIRS), "kto talks": judged(TALKS)}
REWARD = """
def digits(completions, answer, **_):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(x.isdigit() for x in t) + i / 10 + len(a) for i, (t, a) in enumerate(zip(texts, answer))]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def values(model: Path, folder: Path, rows: list[dict[str, Any]], objective: str, **changes: Any) -> dict[str, Any]:
    data = tiny.jsonl(folder / "rows.jsonl", *rows)
    given = {"objective": objective, "steps": 4, "save_steps": 2, **changes.pop("train", {})}
    changes.setdefault("data", {})
    changes["data"] = {"eval_path": None, **changes["data"]}
    out = folder / changes.pop("output", "out")
    return tiny.recipe(model, data, out, **{"model": {"dtype": "float32"}, "train": given, **changes})


def run(*args: Any, resume: bool = False, **options: Any) -> dict[str, Any]:
    return pipeline.run(recipe.from_dict(values(*args, **options)), resume=resume)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(
    "method", [{"name": "lr-qat", "rank": 4, "alpha": 64.0}, {"name": "loftq", "rank": 4}], ids=str
)
def test_a_run_learns_preferences_from_the_model_at_step_0(
    name: str, method: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """At step 0 model and reference are one, so that DPO begins at log 2 and KTO at a half, whatever adapters start at."""
    objective = name.split()[0]
    compared = name == objective and method["name"] == "lr-qat"
    metrics = run(model, tmp_path, DATA[name], objective, method=method, evaluate={"parity": compared})
    assert metrics["losses"][0] == pytest.approx(math.log(2) if objective == "dpo" else 0.5, abs=1e-6)
    assert metrics["losses"][-1] < metrics["losses"][0]
    assert metrics["objective"] == objective
    assert metrics["measures"]["rewards/margins"] > 0
    assert metrics["tokens"] > 0
    if compared:
        assert metrics["max_logit_difference"] == 0


@pytest.mark.parametrize("name", DATA)
def test_tokens_are_those_of_trl(name: str, model: Path, tmp_path: Path) -> None:
    """Rows go to TRL with token ids: those that it makes itself."""
    objective = name.split()[0]
    rows, tokenizer = DATA[name], AutoTokenizer.from_pretrained(model)
    given = recipe.from_dict(
        values(model, tmp_path, rows, objective, data={"block_tokens": 64}, train={"batch_tokens": 128})
    )
    ours = train.ready(given, tokenizer, texts.training_of(given).rows, 260).sequences
    kinds: tuple[Any, Any] = (DPOTrainer, DPOConfig) if objective == "dpo" else (KTOTrainer, KTOConfig)
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2}
    float_model = AutoModelForCausalLM.from_pretrained(model)
    theirs = kinds[0](
        float_model, args=kinds[1](str(tmp_path), max_length=64, **options), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset  # fmt: skip
    columns = (
        ["prompt_ids", "chosen_ids", "rejected_ids"]
        if objective == "dpo"
        else ["prompt_ids", "completion_ids", "label"]
    )
    assert sorted(zip(*(ours[c] for c in columns), strict=True)) == sorted(
        zip(*(theirs[c] for c in columns), strict=True)
    )


def test_a_run_goes_on_from_its_checkpoint_to_the_same_reference(model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A resumed run measures against step 0, not against the checkpoint."""
    whole = run(model, tmp_path, PAIRS, "dpo", output="whole", evaluate={"parity": False})
    step = train.Ours.training_step

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train.Ours, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path, PAIRS, "dpo", output="parted", evaluate={"parity": False})
    parted = run(model, tmp_path, PAIRS, "dpo", output="parted", resume=True, evaluate={"parity": False})
    assert parted["losses"] == pytest.approx(whole["losses"], abs=1e-6)


def test_a_float_reference_where_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    metrics = run(model, tmp_path, PAIRS, "dpo", train={"reference": str(model)}, evaluate={"parity": False})
    assert metrics["losses"][0] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_a_reward_of_ones_own(beta: float | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"my_rewards_{str(beta).replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": p["prompt"], "answer": p["chosen"]} for p in PAIRS]
    given = {"reward": f"{name}:digits", "generations": 2, "completion_tokens": 6, "beta": beta, "steps": 2}
    metrics = run(model, tmp_path, rows, "grpo", train=given)
    assert metrics["objective"] == "grpo"
    assert metrics["measures"]["reward"] > 2  # the column reached it
    assert ("kl" in metrics["measures"]) == (beta is not None)
    assert metrics["max_logit_difference"] == 0
    assert metrics["moved_by_training"]["codes"] + metrics["moved_by_training"]["groups"] > 0


def test_a_reference_that_does_not_fit_is_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "ours"
    tt.save(tt.load(str(model), tt.methods.Rtn())[0], other)
    with pytest.raises(UserError, match=r"train\.reference: .* was saved by trimtab"):
        run(model, tmp_path, PAIRS, "dpo", train={"reference": str(other)})
    copied = AutoModelForCausalLM.from_pretrained(model)
    copied.resize_token_embeddings(300)
    copied.save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"train\.reference: .* has 300 tokens, and the model that is trained 260"):
        run(model, tmp_path, PAIRS, "dpo", train={"reference": str(tmp_path / "wide")})


FORMS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "prompt in both": (
        [{"chosen": [*t["prompt"], *t["chosen"]], "rejected": [*t["prompt"], *t["rejected"]]} for t in TALKS],
        TALKS[3],
    ),
    "prompt as a string beside both": (
        [
            {
                "prompt": p["prompt"], "prompt_id": "x", "score_chosen": 8.0, "score_rejected": 2.0,
                "messages": [*t["prompt"], *t["chosen"]],
                "chosen": [*t["prompt"], *t["chosen"]], "rejected": [*t["prompt"], *t["rejected"]],
            }
            for p, t in zip(PAIRS, TALKS, strict=True)
        ],
        TALKS[3],
    ),
    "prompt as a string before answers": (
        [{**p, "chosen": t["chosen"], "rejected": t["rejected"]} for p, t in zip(PAIRS, TALKS, strict=True)],
        TALKS[3],
    ),
    "prompt in both texts": (
        [{"chosen": p["prompt"] + p["chosen"], "rejected": p["prompt"] + p["rejected"]} for p in PAIRS],
        {"prompt": "3 plus 3 is ", "chosen": "6.", "rejected": "blue 3."},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_hub(form: str, model: Path, tmp_path: Path) -> None:
    rows, wanted = FORMS[form]
    found = texts.training_of(recipe.from_dict(values(model, tmp_path, rows, "dpo"))).rows
    assert {key: found[3][key] for key in wanted} == wanted


BAD: dict[str, tuple[str, Any, str]] = {
    "another form": (
        "dpo",
        {"prompt": "a", "completion": "b"},
        r"rows of {prompt, completion}; train.objective: dpo takes",
    ),
    "no label": ("kto", {"prompt": "a", "completion": "b"}, r"train.objective: kto takes .*label"),
    "a label": (
        "kto",
        {"prompt": "a", "completion": "b", "label": "good"},
        r"line 1: the key 'label' would be dropped",
    ),
    "the same": ("dpo", {"prompt": "a", "chosen": "b", "rejected": "b"}, r"are the same"),
    "two types": (
        "dpo",
        {"prompt": "a", "chosen": "b", "rejected": [turn("assistant", "b")]},
        r"'chosen' is str where a list of",
    ),
    "nothing shared": ("dpo", {"chosen": "ab", "rejected": "ba"}, r"no prompt in common"),
    "another prompt": (
        "dpo",
        {
            "prompt": "blue",
            "chosen": [*TALKS[0]["prompt"], *TALKS[0]["chosen"]],
            "rejected": [*TALKS[0]["prompt"], *TALKS[0]["rejected"]],
        },
        r"'prompt' is none of the messages",
    ),
    "a key": ("dpo", {**PAIRS[0], "hint": "blue"}, r"the key 'hint' would be dropped"),
    "long": ("dpo", {**PAIRS[0], "prompt": "word " * 60}, r"nothing to learn in 1 rows: every prompt alone fills"),
    "no answer": ("grpo", {"prompt": [turn("assistant", "b")]}, r"ends with an answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    objective, row, said = BAD[name]
    given = {"reward": "math:sin", "generations": 2} if objective == "grpo" else {}
    with pytest.raises(UserError, match=said):
        run(model, tmp_path, [row], objective, train=given)
    assert not (tmp_path / "out").exists()


def test_what_is_cut_and_one_sided_is_said(model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [*PAIRS, {**PAIRS[0], "chosen": "word " * 20}, {**PAIRS[1], "prompt": "word " * 20}]
    given = recipe.from_dict(values(model, tmp_path, rows, "dpo"))
    made = train.ready(given, tokenizer, texts.training_of(given).rows, 260)
    assert len(made.sequences) == 9
    assert re.search(
        r"of 10 rows, 1 lose a part of an answer and 1 are left out.*longest has 1\d\d\).*line 9", made.notes[0]
    )
    few = recipe.from_dict(values(model, tmp_path, judged(PAIRS)[:7], "kto"))
    assert "4 of 7 answers are good: each bad one counts 1.33 times" in "".join(
        train.ready(few, tokenizer, texts.training_of(few).rows, 260).notes
    )


FIELDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "of another": ("sft", {"train": {"beta": 0.1}}, r"train\.beta: sft does not read it, dpo and kto and grpo do"),
    "reward": ("grpo", {}, r"train\.reward: missing"),
    "odd": ("dpo", {"train": {"micro_batch": 1}}, r"train\.micro_batch: of dpo counts"),
    "packing": ("dpo", {"data": {"packing": "bfd"}}, r"data\.packing: dpo packs no rows"),
    "distill": ("kto", {"distill": {}}, r"distill: goes with objective: sft"),
    "generations": ("grpo", {"train": {"reward": "a:b", "generations": 3}}, r"train\.generations: 3 .* the 4 answers"),
    "module": ("grpo", {"train": {"reward": "no_such_module:f", "generations": 2}}, r"train\.reward: no_such_module:f"),
    "function": (
        "grpo",
        {"train": {"reward": "math:no", "generations": 2}},
        r"train\.reward: math has no function 'no'",
    ),
    "name": ("grpo", {"train": {"reward": "math", "generations": 2}}, r"'math' is not written module:function"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_do_not_go_together(name: str, model: Path, tmp_path: Path) -> None:
    objective, changes, said = FIELDS[name]
    rows = [{"prompt": "a"}] if objective == "grpo" else DATA.get(objective, [{"text": "a b c"}])
    with pytest.raises(UserError, match=said):
        run(model, tmp_path, rows, objective, **changes)
    assert not (tmp_path / "out").exists()
