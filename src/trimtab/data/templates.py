"""Chat templates for models that have none: `alpaca`, `chatml`, or a file.

A base model's tokenizer has no chat template, so that conversations say nothing to it. A named one is set on the
tokenizer, and so is saved with the tuned model: its server renders conversations as training did. Turns end
with the tokenizer's own end-of-sequence token (in ChatML with `<|im_end|>` where that is one of its tokens), since a token
that was never trained cannot be learned by a few percent of the weights; and a conversation begins with the
beginning-of-sequence token, if the tokenizer begins texts with one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.data.tokens import head_of
from trimtab.errors import UserError, nearest
from trimtab.reading import MOST_OF_A_TEMPLATE, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_ALPACA = """\
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set turns = messages[1:] %}\
{% else %}{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' }}\
{% set turns = messages %}{% endif %}\
{% for message in turns %}\
{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}\
{% elif message['role'] == 'assistant' %}{{ '\\n\\n### Response:\\n' + message['content'] + END }}\
{% else %}{{ raise_exception('the template has system, user and assistant, but no role ' + message['role']) }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""
NAMED = {"alpaca": _ALPACA, "chatml": _CHATML}
"""Templates by name; END stands for the token that ends a turn."""


def check_template(name: str) -> None:
    """Raise a `UserError` for what names neither a template nor a file."""
    if name in NAMED or Path(name).expanduser().is_file():
        return
    if name.endswith((".jinja", ".jinja2", ".txt")) or "/" in name:
        raise UserError(f"data.template: {name}: no such file")
    raise UserError(
        f"data.template: {name!r} is not a template{nearest(name, list(NAMED))}; "
        f"give {' or '.join(NAMED)}, or a .jinja file"
    )


def set_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str | None:
    """Give a tokenizer a chat template; a line to say if it had another.

    Args:
        tokenizer: the model's; changed in place.
        name: of a template, or of a file that holds one; None leaves the tokenizer as it is.

    Raises:
        UserError: for what names neither, or a tokenizer that cannot end a turn.
    """
    if name is None:
        return None
    check_template(name)
    if name in NAMED:
        text = _fitted(NAMED[name], name, tokenizer)
    else:
        text = read_text(Path(name).expanduser(), "save the template as UTF-8", MOST_OF_A_TEMPLATE)
    before, tokenizer.chat_template = tokenizer.chat_template, text
    return (
        f"data.template: {name} takes the place of the tokenizer's own chat template"
        if before not in (None, text)
        else None
    )


def _fitted(text: str, name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A template with the tokens of a tokenizer."""
    own = "<|im_end|>" if name == "chatml" and "<|im_end|>" in tokenizer.get_vocab() else None
    if own is None and tokenizer.eos_token is None:
        raise UserError(
            f"data.template: {name} ends turns with the end-of-sequence token, and the tokenizer has none; name one of its "
            "tokens as `eos_token` in its tokenizer_config.json"
        )
    begin = "{{ bos_token }}" if head_of(tokenizer) and tokenizer.bos_token is not None else ""
    return begin + text.replace("END", f"'{own}'" if own else "eos_token")
