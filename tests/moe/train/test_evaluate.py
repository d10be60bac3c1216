"""Evaluation against a plain float64 loop over the held-out tokens, on one rank and on two."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.data.prepare import prepare
from moe.data.store import Domain, PreparedData
from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.recipe import Recipe
from moe.train.evaluate import DomainEvaluation, evaluate
from runs import small_recipe

LENGTH, BATCH, SEQUENCES = 32, 3, 7  # 7 sequences in batches of 3: the last batch is padded


def make(recipe: Recipe, groups: ParallelGroups) -> tuple[Model, PreparedData]:
    model = Model(recipe.model, groups=groups, backend="naive")
    initialise(model, seed=1)
    return model, prepare(recipe.data, report=lambda _: None)


def measured(recipe: Recipe, ep_size: int) -> dict[str, DomainEvaluation]:
    groups = ParallelGroups.create(ep_size=ep_size, device=torch.device("cpu"))
    model, data = make(recipe, groups)
    model.train()
    result = evaluate(
        model, data, groups=groups, sequence_length=LENGTH, batch_sequences=BATCH, max_sequences=SEQUENCES
    )
    assert model.training, "the training flag must be restored"
    return result


def windows(domain: Domain, packing: str) -> list[list[int]]:
    """The held-out sequences, cut by hand: LENGTH + 1 tokens each, or fewer at an end."""
    tokens = domain.validation.tokens.astype("int64").tolist()
    if packing == "concatenate":
        cut = [tokens[start : start + LENGTH + 1] for start in range(0, len(tokens) - 1, LENGTH)]
    else:
        cut, starts = [], domain.validation.starts.tolist()
        for first, last in itertools.pairwise(starts):
            document = [domain.eos_token_id, *tokens[first:last]]
            cut += [document[start : start + LENGTH + 1] for start in range(0, len(document) - 1, LENGTH)]
    chosen = min(SEQUENCES, len(cut))
    return [cut[index * len(cut) // chosen] for index in range(chosen)]


@torch.no_grad()
def by_hand(model: Model, domain: Domain, packing: str) -> tuple[float, int, Tensor]:
    loss, count, experts_LE = 0.0, 0, torch.zeros(2, 8, dtype=torch.int64)
    for window in windows(domain, packing):
        token = torch.tensor([window])
        logits, routings = model(token[:, :-1])
        loss += F.cross_entropy(logits[0].double(), token[0, 1:], reduction="sum").item()
        count += token.shape[1] - 1
        for layer, routing in enumerate(routings):
            experts_LE[layer] += torch.bincount(routing.logits_TE.topk(2).indices.flatten(), minlength=8)
    return loss / count, count, experts_LE


@pytest.mark.parametrize("packing", ["concatenate", "pad"])
@pytest.mark.parametrize(("world_size", "ep_size"), [(1, 1), (2, 1), (2, 2)])
def test_evaluation_equals_a_plain_loop(pool, run_root, packing, world_size, ep_size):
    recipe = small_recipe(run_root, data={"packing": packing})
    results = pool.run(measured, recipe, ep_size, world_size=world_size)
    model, data = make(recipe, ParallelGroups.single())
    for domain in data.domains:
        loss, count, experts_LE = by_hand(model.eval(), domain, packing)
        bytes_per_token = domain.validation.num_bytes / domain.validation.num_tokens
        for result in results:
            ours = result[domain.name]
            assert ours.num_tokens == count
            assert ours.loss == pytest.approx(loss, rel=1e-6)
            assert ours.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
            assert ours.bits_per_byte == pytest.approx(loss / math.log(2) / bytes_per_token, rel=1e-6)
            assert torch.equal(ours.tokens_per_expert_LE, experts_LE)
