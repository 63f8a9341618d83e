"""Answers of a model: greedy, through its chat template where it has one."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from trimtab.data.tokens import tokens_of
from trimtab.errors import UserError


class Chat:
    """A loaded model to ask.

    Args:
        model: a causal language model.
        tokenizer: the model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def answer(self, prompt: str, tokens: int = 256) -> str:
        """The answer to one question, of at most so many tokens. Questions do not see one another."""
        return answer(self.model, self.tokenizer, prompt, tokens)


def answer(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int) -> str:
    """A greedy answer to one question, through the chat template where there is one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokens_of(prompt, tokenizer)
    rows = model.config.get_text_config().vocab_size
    if max(ids) >= rows:
        raise UserError(
            f"{tokenizer.convert_ids_to_tokens(max(ids))!r} in the prompt is token {max(ids)}, but the model's embedding "
            f"has {rows} rows; take the model's own tokenizer"
        )
    given = torch.tensor([ids], device=next(model.parameters()).device)
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = cast(Any, model).generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)).strip()
