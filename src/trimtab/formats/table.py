"""The capability table of `trimtab formats`, from the declarations."""

from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.formats.declaration import Engine, Format, Rounded

HEADER = ("format", "engine", "bits", "groups", "zeros", "scales", "adapters", "activations", "KV")


def table(formats: Sequence[Format]) -> list[tuple[str, ...]]:
    """The capability table: a row for what each format holds, and one for what each engine runs of it."""
    rows: list[tuple[str, ...]] = []
    for format_ in formats:
        rows.append((format_.name, "", *_held(format_), format_.adapters, "", ""))
        for engine in format_.engines:
            kv = _list(engine.kv)
            if format_.everything:
                rows.append(("", engine.name, "all", "all", "all", "", "", "all", kv))
                continue
            joins = "joined layers alike" if engine.fuses else ""
            cast = [*([joins] if joins else []), *(["in the model's dtype"] if engine.casts_scales else [])]
            rows.append(("", engine.name, *_run(engine), ", ".join(cast), "", "float", kv))
            for rounded in engine.rounded:
                kinds = ", ".join(kind.describe() for kind in rounded.inputs)
                rows.append(("", engine.name, *_run(rounded), joins, "", kinds, kv))
    return rows


def _run(what: Engine | Rounded) -> tuple[str, str, str]:
    if not what.bits:
        return "float", "", ""
    groups = "any" if what.groups is None else _list("channel" if g is None else g for g in what.groups)
    tables = what.tables if isinstance(what, Engine) else ()
    return _list((*what.bits, *tables)), groups, _list(what.zeros)


def _held(format_: Format) -> tuple[str, str, str, str]:
    if format_.everything:
        return "all", "all", "all", "all"
    if not format_.forms:
        return "float", "", "", ""
    affine = [form for form in format_.forms if form.table is None]
    bits: list[int | str] = [*sorted({b for f in affine for b in f.bits})]
    bits += [form.table for form in format_.forms if form.table is not None]
    groups = sorted({f"of {f.group_of}" if f.group_of > 1 else "any" for f in affine})
    zeros = dict.fromkeys(z for f in affine for z in f.zeros)
    return _list(bits), _list(groups), _list(zeros), _list(dict.fromkeys(f.scales for f in affine))


def _list(items: Iterable[Any]) -> str:
    return " ".join(str(item) for item in items)
