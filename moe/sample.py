"""Text from a model: one token after the other, each through the model once thanks to the key-value cache."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe.blocks.cache import KeyValueCache
from moe.model import Model
from moe.routing import RouterContext


@torch.no_grad()
def generate(
    model: Model,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
    context: RouterContext | None = None,
) -> list[int]:
    """Return the ids that follow the prompt: at most `max_new_tokens`, fewer if `eos_token_id` comes (not
    returned).

    A function of its arguments: the same seed gives the same ids. The model runs in evaluation mode and is
    put back as it was. With experts spread over ranks, every rank of the expert group makes the same call.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest only; 0 means all.
        top_p: draw among the likeliest that together have this probability (arXiv 1904.09751); 1 means all.
        context: how far the training has come, for routers that change with it; None means that it is over.

    Raises:
        ValueError: an argument out of its range, or more tokens than the model has positions.
    """
    _check(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, seed)
    device = model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(num_layers=model.config.num_attention_layers, max_length=len(prompt_ids) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        new_ids: list[int] = []
        input_ids = list(prompt_ids)
        while len(new_ids) < max_new_tokens:
            logits_1SV, _ = model(torch.tensor([input_ids], device=device), cache=cache, context=context)
            # float64 on the CPU: the draw is the same on every device
            next_id = _draw(logits_1SV[0, -1].double().cpu(), temperature, top_k, top_p, generator)
            if next_id == eos_token_id:
                break
            new_ids.append(next_id)
            input_ids = [next_id]
        return new_ids
    finally:
        model.train(was_training)


def _draw(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, id_V = torch.softmax(logits_V / temperature, dim=-1).sort(descending=True, stable=True)
    if top_k:
        probs_V = probs_V[:top_k]
    probs_V = probs_V / probs_V.sum()
    # a token stays while those before it have not reached top_p: the first always stays
    probs_V = probs_V * (probs_V.cumsum(0) - probs_V < top_p)
    return int(id_V[torch.multinomial(probs_V, 1, generator=generator)])


def _check(
    model: Model,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    config = model.config
    if not prompt_ids:
        raise ValueError("the prompt holds no token; give at least one, the end-of-text token if there is no text")
    if min(prompt_ids) < 0 or max(prompt_ids) >= config.vocab_size:
        raise ValueError(
            f"prompt ids {min(prompt_ids)}..{max(prompt_ids)} do not fit vocab_size = {config.vocab_size}; "
            "use the tokenizer the model was trained with"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed} must lie in 0..2**63 - 1")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens} must not be negative")
    if len(prompt_ids) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens + max_new_tokens = {max_new_tokens} exceed the model's "
            f"{config.max_position_embeddings} positions; ask for fewer or shorten the prompt"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature} must be 0 (likeliest token) or a positive number")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k} must be 0 (all tokens) or positive")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must lie in (0, 1]")


def complete(
    model: Model,
    tokenizer_dir: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    context: RouterContext | None = None,
) -> str:
    """Return the text that follows `prompt`, cut to what the model's positions hold. Arguments as for `generate`."""
    # seconds to import; only text needs it
    from moe.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    eos_token_id = tokenizer.eos_token_id
    assert isinstance(eos_token_id, int)
    # a document begins after the end of another
    prompt_ids = [eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    room = model.config.max_position_embeddings - len(prompt_ids)
    new_ids = generate(
        model,
        prompt_ids,
        max_new_tokens=min(max_new_tokens, max(room, 0)),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=eos_token_id,
        context=context,
    )
    return str(tokenizer.decode(new_ids))
