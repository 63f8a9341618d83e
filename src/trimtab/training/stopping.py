"""Where a tuned model stops: at the token that ended its training answers, too.

A chat template may end turns with a token of its own (`<|im_end|>`) while generation stops at another (`</s>`), as where a
base model was given a template. Such a model learns to end its answers, and is then read on. So the trained end is kept in
the model's generation config, which every format saves or takes its own key from.
"""

from typing import Any

from transformers import PreTrainedModel


def stop_at(model: PreTrainedModel, tokenizer: Any, end: int | None) -> str | None:
    """Have the model stop at `end`, besides where it does; a line to say if it did not.

    Args:
        model: whose generation config is changed.
        tokenizer: the model's.
        end: the token that ends a trained answer, if there is one.
    """
    config: Any = model.generation_config
    found = config.eos_token_id
    stops = [] if found is None else [found] if isinstance(found, int) else list(found)
    if end is None or end in stops:
        return None
    config.eos_token_id = [*stops, end] if stops else end
    name, names = tokenizer.convert_ids_to_tokens(end), tokenizer.convert_ids_to_tokens(stops)
    where = f"stops at {', '.join(map(str, names))} alone" if stops else "stops nowhere"
    return f"trained answers end with {name}; the model's generation config {where}, and that of the tuned model there, too"
