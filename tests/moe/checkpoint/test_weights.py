"""Weights of a checkpoint into a model: every rank gets its own experts, and another model's checkpoint is refused."""

from dataclasses import replace

import pytest
import torch

from moe.checkpoint import CheckpointError, CheckpointReader, Shard, load_weights, save_checkpoint
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from tiny import tiny_config, tiny_model

CONFIG = tiny_config(router=TopKConfig(use_selection_bias=True, scoring_func="sigmoid"))


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(CONFIG)
    for layer in (0, 2):
        model.layers[layer].moe.router.selection_bias.uniform_(-1, 1)
    parameters = {name for name, _ in model.named_parameters()}
    shards = [
        Shard(
            name=f"{'model' if name in parameters else 'buffer'}/{name}",
            tensor=tensor,
            logical_shape=tuple(tensor.shape),
        )
        for name, tensor in model.state_dict().items()
    ]
    path = save_checkpoint(tmp_path, step=1, shards=shards, state={})
    return model.state_dict(), CheckpointReader.open(path)


@pytest.mark.parametrize("ep_rank", [0, 1])
def test_each_rank_gets_its_own_experts_and_all_else_whole(saved, ep_rank):
    state, reader = saved
    groups = replace(ParallelGroups.single(), world_size=2, rank=ep_rank, ep_size=2, ep_rank=ep_rank)
    model = Model(CONFIG, groups=groups, backend="naive")
    load_weights(model, reader)
    for name, tensor in model.state_dict().items():
        expected = state[name]
        if ".experts." in name:
            expected = expected[3 * ep_rank : 3 * ep_rank + 3]
        assert torch.equal(tensor, expected), name


def test_another_models_checkpoint_is_refused_by_tensor(saved):
    _, reader = saved
    wider = Model(replace(CONFIG, moe_intermediate_size=15), groups=ParallelGroups.single())
    with pytest.raises(CheckpointError, match=r"gate_up_proj is \(6, 28, 20\), the model wants \(6, 30, 20\)"):
        load_weights(wider, reader)
    deeper = Model(replace(CONFIG, num_hidden_layers=4), groups=ParallelGroups.single())
    with pytest.raises(CheckpointError, match=r"holds no model/layers.3\."):
        load_weights(deeper, reader)
