"""Answers of a model: greedy, through its chat template where it has one."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel


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
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = {
        k: v.to(next(model.parameters()).device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")
    }
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        out = cast(Any, model).generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
