"""Chat templates that no chat should run: programs that do not end, that fill the memory, that fail, that look around."""

import random

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
BOMBS = {
    "loops without output": LOOP.replace("BODY", ""),
    "loops with output": LOOP.replace("BODY", "x"),
    "loops that set": LOOP.replace("BODY", "{% set c = a * b %}"),
    "a string times a number": "{{ 'x' * 10**10 }}",
    "a list times a number": "{{ ([0] * 10**10)|length }}",
    "doubled in a namespace": (
        "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
    ),
    "doubled by ~": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "doubled in a block": (
        "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set t %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = t %}{% endfor %}"
    ),
    "doubled in a list": "{% set n = namespace(s=[0]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "doubled by join": (
        "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = [n.s, n.s]|join %}{% endfor %}"
    ),
    "doubled by replace": (
        "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s.replace('x', 'xx') %}{% endfor %}"
    ),
    "a power": "{{ 10**(10**10) }}",
    "powers of powers": "{% set n = namespace(s=10) %}{% for a in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide str.format": "{{ '{:>9999999999}'.format(1) }}",
    "a wide filter format": "{{ '%9999999999d'|format(1) }}",
    "centred": "{{ 'x'|center(10**10) }}",
    "justified": "{{ 'x'.ljust(10**10) }}",
    "indented": "{{ ('x\n' * 100000)|indent(10**6) }}",
    "wide JSON": "{{ [[[[1]]]]|tojson(indent=10**9) }}",
    "joined by a long text": "{{ range(99999)|join('x' * 100000) }}",
    "a macro that calls itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "two macros each twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop that recurses": "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "sums": "{{ range(99999)|sum }}{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "sorted again and again": "{% for a in range(99999) %}{% set b = range(99999)|sort %}{% endfor %}",
    "mapped again and again": "{% for a in range(9999) %}{% set b = range(99999)|map('string')|list %}{% endfor %}",
    "sliced": "{% for a in range(99999) %}{% set b = range(99999)|list %}{% set c = b[::-1] %}{% endfor %}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep ifs": "{% if 1 %}" * 300 + "x" + "{% endif %}" * 300,
    "deep loops": "{% for a in [1] %}" * 60 + "x" + "{% endfor %}" * 60,
    "a long sum": "{{ " + "+".join(["1"] * 20000) + " }}",
    "a long number": "{{ " + "1" * 5000 + " }}",
    "a long printed number": "{{ 10**4999 }}",
    "looks at classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "looks at globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "looks by a filter": "{{ ''|attr('__class__') }}",
    "looks by a format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import 'os' as os %}",
    "extends": "{% extends messages[0].content %}",
    "an error": "{{ 1 / 0 }}",
    "an index that is not there": "{{ messages[99].role }}",
    "an exception": "{{ raise_exception('a\nb') }}",
    "lorem": "{{ lipsum(n=10**6) }}",
    "a cycler": "{% set c = cycler(*range(99999)) %}{% for a in range(99999) %}{{ c.next() }}{% endfor %}",
    "time": "{{ strftime_now('%9999999d' * 10000) }}",
    "batches": "{{ [1]|batch(10**10, 0)|list }}",
    "slices": "{{ [1]|slice(10**10, 0)|list }}",
    "wrapped": "{{ ('x ' * 1000000)|wordwrap(1) }}",
    "truncated": "{{ 'x'|truncate(10**10) }}",
    "expanded": "{{ ('\t' * 100000).expandtabs(10**6) }}",
    "filled with zeros": "{{ '1'.zfill(10**10) }}",
    "rounded": "{{ 1.5|round(10**10) }}",
    "encoded": "{{ 'x'.encode('utf-8' * 1000) }}",
    "translated": "{{ ('a' * 99999).translate({97: 'x' * 99999}) }}",
    "nothing": "",
    "half of a surrogate pair": "{{ '\\ud800' }}",
    "a tag of nobody": "{% nothing %}",
    "not closed": "{% for a in messages %}",
}


def hostile_template(rng: random.Random, text: str) -> tuple[str, str]:
    """A template with a bomb before it, behind it, or in its place."""
    name = rng.choice(list(BOMBS))
    bomb = BOMBS[name]
    return rng.choice((bomb, bomb + text, text + bomb)), name
