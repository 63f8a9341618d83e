"""Chat templates: rendered as transformers renders them, and with a bound on time and size."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from fuzz.templates import BOMBS
from trimtab.data import bounded as bounding
from trimtab.data.bounded import Unrendered, bounded

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2\n"},
]
FREE = {"nothing", "batches", "slices", "a cycler", "encoded", "deep loops", "deep ifs", "sums", "looks by a filter",
        "looks at globals", "time", "wrapped", "truncated", "a long sum", "half of a surrogate pair"}  # fmt: skip
"""Those that may end well: they are small, or not all that they seem."""


def rendered(text: str, **more: Any) -> str:
    tokenizer = tiny.tokenizer(text)
    with bounded():
        return str(tokenizer.apply_chat_template(TALK, tokenize=False, **more))


TEMPLATES = {
    "operators": (
        "{{ 1 + 2 * 3 }} {{ 'a' ~ 1 ~ none }} {{ 'x' * 3 }} {{ [1] + [2] }} {{ 7 % 4 }}"
        " {{ '%s-%03d' % ('a', 7) }} {{ 2 ** 10 }}"
    ),
    "loops": (
        "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ m.role }}"
        "{% if loop.first %}!{% endif %}{% endfor %}"
    ),
    "nothing to loop": "{% for m in nothing %}x{% else %}none{% endfor %}",
    "a filter of a loop": "{% for m in messages if m.role != 'system' %}{{ m.content | trim }}{% endfor %}",
    "loop controls": (
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}"
        "{% endfor %}"
    ),
    "pairs": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "recursive": (
        "{% for a in [[1, [2]], 3] recursive %}{% if a is sequence %}{{ loop(a) }}{% else %}{{ a }}"
        "{% endif %}{% endfor %}"
    ),
    "macros": "{% macro f(x, y='b') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}{{ f('a', y='c') }}",
    "namespaces": (
        "{% set n = namespace(s='', k=0) %}{% for m in messages %}{% set n.s = n.s + m.content %}"
        "{% set n.k = n.k + 1 %}{% endfor %}{{ n.s }}{{ n.k }}"
    ),
    "blocks": "{% set t %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ t | upper }}",
    "filters": (
        "{{ messages | map(attribute='role') | join(', ') }}"
        " {{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        " {{ messages[1] | tojson(indent=2) }} {{ '' | default('d', true) }} {{ 'a\nb' | indent(2) }}"
        " {{ 'abc' | replace('b', 'xy') }} {{ {'b': 1, 'a': 2} | dictsort }}"
    ),
    "methods": (
        "{{ 'a,b'.split(',') }} {{ ' x '.strip() }} {{ 'x'.startswith('x') }} {{ '{:>4}'.format(7) }}"
        " {{ 'a'.join(['1', '2']) }} {{ 'x'.replace('x', 'y') }} {{ messages[0].get('role') }}"
    ),
    "slices": "{{ messages[1:] | length }} {{ messages[-1].content[::-1] }} {{ (1, 2)[0] }} {{ {'a': [1]}['a'] }}",
    "functions": (
        "{{ range(5) | list }} {{ dict(a=1) }} {{ namespace(a=2).a }} {{ bos_token is defined }}"
        " {{ eos_token }}"
    ),
    "tests": (
        "{{ 'a' in 'abc' }} {{ 3 is odd }} {{ x is defined }} {{ 1 if messages else 2 }} {{ none }}"
        " {{ true and not false }}"
    ),
    "marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "floats": "{{ 1.5 * 2 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ 1.25 | round(1) }} {{ -3 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_as_transformers_does(name: str) -> None:
    text = TEMPLATES[name]
    plain = tiny.tokenizer(text).apply_chat_template(TALK, tokenize=False)
    assert rendered(text) == plain


def test_transformers_is_as_it_was_behind_it() -> None:
    from transformers.utils import chat_template_utils

    before = chat_template_utils._compile_jinja_template
    with pytest.raises(Unrendered):
        rendered("{{ raise_exception('x') }}")
    assert chat_template_utils._compile_jinja_template is before
    assert "lipsum" in before("x").environment.globals


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_bomb_does_not_go_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: within a second of the bound, and without a gigabyte."""
    monkeypatch.setattr(bounding, "SECONDS", 0.5)
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text = rendered(BOMBS[name])
    except Unrendered as error:
        lines = str(error).splitlines()
    else:
        assert name in FREE, text[:100]
        lines = ["it went well"]
    assert len(lines) == 1, lines
    assert time.process_time() - begun < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000


def test_the_bound_holds_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounding, "SECONDS", 0.2)
    said: list[str] = []

    def work() -> None:
        try:
            rendered(BOMBS["loops without output"])
        except Unrendered as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert said == ["it takes longer than 0.2 seconds"]


def test_a_long_talk_is_no_bomb() -> None:
    """Two thousand messages of a thousand characters, gathered in one text message by message."""
    talk = [{"role": "user", "content": "x" * 1000}] * 300
    tokenizer = tiny.tokenizer(
        "{% set n = namespace(s='') %}{% for m in messages %}{% set n.s = n.s + m.content %}{% endfor %}{{ n.s }}"
    )
    with bounded():
        assert tokenizer.apply_chat_template(talk, tokenize=False) == "x" * 300_000


def test_a_bomb_in_training_data_is_said_of_its_row(given: Path, tmp_path: Path) -> None:
    import trimtab as tt
    from trimtab.errors import UserError

    (tmp_path / "bomb.jinja").write_text(BOMBS["a string times a number"])
    data = tiny.jsonl(tmp_path / "talk.jsonl", {"messages": [*TALK]})
    recipe = tiny.recipe(
        given / "model", data, tmp_path / "out", data={"eval_path": None, "template": str(tmp_path / "bomb.jinja")}
    )
    with pytest.raises(
        UserError, match=r"talk\.jsonl, line 1\): the tokenizer's chat template refuses it \(it makes texts"
    ):
        tt.overview(recipe)
