"""The studies of single papers: their texts are what they say, and the mask that no configuration expresses masks."""

import importlib
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe.balance.statistics import collect
from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a script as if its folder were the current one."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks/papers")
    return importlib.import_module


def test_easy_chains_are_certain_and_hard_ones_have_four_equally_likely_successors(load) -> None:
    text = load("texts").chains(3, 600, 8)
    easy, hard = text.training
    successors = {pair for row in easy.tolist() for pair in itertools.pairwise(row)}
    assert len(successors) == len({first for first, _ in successors})

    triples = torch.stack([hard[:, :-2], hard[:, 1:-1], hard[:, 2:]], dim=-1).reshape(-1, 3)
    joint, counts = triples.unique(dim=0, return_counts=True)
    contexts, of_joint = joint[:, :2].unique(dim=0, return_inverse=True)
    assert torch.bincount(of_joint).max() == 4
    of_context = torch.zeros(len(contexts)).index_add_(0, of_joint, counts.float())
    entropy = -(counts / counts.sum() * (counts / of_context[of_joint]).log()).sum().item()
    # what is counted on a sample lies a little below
    assert math.log(4) - 0.02 < entropy <= math.log(4)


def test_the_order_of_the_corpus_depends_on_the_seed_alone(load) -> None:
    texts = load("texts")
    first, again, other = (texts.corpus(seed, 50, 20) for seed in (0, 0, 1))
    assert first.training.shape == (len(texts.KINDS["corpus"]), 50, texts.SEQUENCE + 1)
    assert first.training.equal(again.training)
    assert not first.training.equal(other.training)
    assert first.validation.equal(other.validation)


def test_a_corpus_too_short_for_the_run_is_refused(load) -> None:
    with pytest.raises(ValueError, match="lower the steps"):
        load("texts").corpus(0, 1_000_000, 1)


def test_the_mask_without_reuse_opens_a_quarter_first_and_everything_at_the_end(load) -> None:
    study: ModuleType = load("cross_layer")
    variant = study.VARIANTS["r = 1 masked"]
    model = Model(load("toy").make_config(variant, 64), groups=ParallelGroups.single())
    initialise(model, seed=0)
    token_BS = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))
    for progress, num_open in ((0.1, 2), (0.42, 5), (0.9, 8)):
        context = RouterContext(seed=0, step=round(1000 * progress), progress=progress)
        counts_LE = collect(model(token_BS, context=context)[1]).tokens_per_expert_LE
        assert ((counts_LE > 0).sum(-1) <= num_open).all()
        assert num_open > 2 or len({tuple(row) for row in (counts_LE > 0).tolist()}) > 1, "layers draw for themselves"
    assert (collect(model(token_BS)[1]).tokens_per_expert_LE > 0).sum(-1).min() > 2
