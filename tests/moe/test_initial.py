"""Initial weights: a function of seed, name and expert, never of the layout."""

from dataclasses import replace

import pytest
import torch

from moe.initial import initialise
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.routers.topk import TopKConfig
from tiny import tiny_config

CONFIG = tiny_config(
    qk_norm="head",
    attention_bias=True,
    use_shared_expert_gate=True,
    router=TopKConfig(scoring_func="sigmoid", use_selection_bias=True),
)


def initial_model(*, seed=7, ep_size=1, ep_rank=0, dtype=torch.float32, config=CONFIG):
    groups = replace(ParallelGroups.single(), rank=ep_rank, world_size=ep_size, ep_size=ep_size, ep_rank=ep_rank)
    model = Model(config, groups=groups).to(dtype)
    initialise(model, seed=seed)
    return model


@pytest.mark.parametrize("ep_size", [2, 3, 6])
def test_each_rank_holds_its_slice_of_the_one_process_model(ep_size):
    whole = initial_model().state_dict()
    share = CONFIG.num_experts // ep_size
    for rank in range(ep_size):
        part = initial_model(ep_size=ep_size, ep_rank=rank).state_dict()
        assert set(part) == set(whole)
        for name, tensor in part.items():
            wanted = whole[name]
            if ".experts." in name:
                wanted = wanted[rank * share : (rank + 1) * share]
            assert torch.equal(tensor, wanted), name


def test_seed_is_all_that_matters_and_global_random_state_is_left_alone():
    torch.manual_seed(0)
    first = initial_model().state_dict()
    torch.manual_seed(99)
    model = Model(CONFIG, groups=ParallelGroups.single())
    state = torch.get_rng_state()
    initialise(model, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    other = initial_model(seed=8).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name
        if not name.endswith(("norm.weight", "bias")):
            assert not torch.equal(tensor, other[name]), name


def test_no_two_tensors_and_no_two_experts_are_alike():
    rows = [
        row
        for name, tensor in initial_model().state_dict().items()
        if not name.endswith(("norm.weight", "bias"))
        for row in (tensor.flatten(1) if ".experts." in name else tensor.flatten()[None])
    ]
    starts = {tuple((row[:10] / row[0]).tolist()) for row in rows}
    assert len(starts) == len(rows)


def test_a_model_built_on_the_meta_device_is_filled_with_the_same_values():
    with torch.device("meta"):
        model = Model(CONFIG, groups=ParallelGroups.single())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))
    initialise(model, seed=7)
    expected = initial_model().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_dtype_holds_the_same_model_up_to_rounding(dtype):
    expected = initial_model().state_dict()
    for name, tensor in initial_model(dtype=dtype).state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def test_scales_are_as_documented():
    config = tiny_config(
        hidden_size=96,
        moe_intermediate_size=64,
        intermediate_size=80,
        shared_expert_intermediate_size=72,
        head_dim=24,
        num_hidden_layers=2,
        vocab_size=500,
        initializer_range=0.05,
        attention_bias=True,
        router=TopKConfig(use_selection_bias=True),
    )
    model = initial_model(config=config)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert (tensor == 0).all(), name
        else:
            std = 0.05 / 2 if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")) else 0.05
            # standard error of a standard deviation from n draws is std / sqrt(2n)
            assert abs(tensor.std() - std) < 5 * std / (2 * tensor.numel()) ** 0.5, name
            assert abs(tensor.mean()) < 5 * std / tensor.numel() ** 0.5, name


def test_the_numbers_of_a_seed_never_change():
    model = initial_model()
    # a change here makes every recorded run start from another model
    expected = {
        "embed_tokens.weight": [-0.02282095, 0.028237002, -0.021865439],
        "layers.2.moe.experts.gate_up_proj": [-0.01568675, -0.0079717562, 0.0020040956],
    }
    for name in expected:
        actual = model.state_dict()[name].flatten()[:3]
        torch.testing.assert_close(actual, torch.tensor(expected[name]), rtol=1e-6, atol=0)
