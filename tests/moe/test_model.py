"""Model and ModelConfig: refusals, names, causality, padding, checkpointing, every size."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from moe.blocks.cache import KeyValueCache
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.presets import mixtral_8x7b
from moe.routers.topk import TopKConfig
from moe.routing import RouterContext
from tiny import assert_near, tiny_config, tiny_model, tiny_tokens

DENSE = {
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0,
    "mlp_only_layers": (),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size = 0 must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1 must be at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0 must be at least 1"),
        ({"num_experts": -8}, "num_experts = -8 must not be negative"),
        ({"head_dim": -6}, "head_dim = -6 must not be negative"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0 must lie between 0 and 1"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"initializer_range": -0.02}, "initializer_range = -0.02"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads = 3 does not divide .* 4; use one of \[1, 2, 4\]"),
        ({"head_dim": 0, "hidden_size": 22}, "hidden_size = 22 is no multiple of num_attention_heads = 4"),
        ({"head_dim": 5}, "a head is 5 wide"),
        ({"head_dim": 0, "hidden_size": 12}, "a head is 3 wide"),
        ({"qk_norm": "heads"}, "qk_norm = 'heads' must be one of"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size = 0 must be at least 1"),
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok = 7 must lie in 1..num_experts = 6"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok = 0 must lie in 1..num_experts = 6"),
        ({"router": TopKConfig(n_group=4)}, "n_group = 4 does not divide num_experts = 6"),
        ({"mlp_only_layers": (1, 3)}, r"names \[3\]; use layers in 0..2"),
        ({"mlp_only_layers": (-1,)}, r"names \[-1\]"),
        ({"first_k_dense_replace": 3}, "all 3 layers are dense: first_k_dense_replace = 3"),
        ({"decoder_sparse_step": 4}, "decoder_sparse_step = 4"),
        ({"intermediate_size": 0}, r"layers \[1\] are dense but model.intermediate_size = 0"),
        (
            {"shared_expert_intermediate_size": 0, "use_shared_expert_gate": True},
            "needs model.shared_expert_intermediate_size > 0",
        ),
        (
            {**DENSE, "num_experts_per_tok": 2},
            "num_experts_per_tok = 2 needs experts, but model.num_experts = 0",
        ),
        (
            {**DENSE, "shared_expert_intermediate_size": 8},
            "shared_expert_intermediate_size = 8 needs experts",
        ),
        ({**DENSE, "use_shared_expert_gate": True}, "use_shared_expert_gate"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused_with_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes).validate()
    with pytest.raises(ValueError, match=message):
        Model(tiny_config(**changes), groups=ParallelGroups.single())


def test_experts_that_do_not_divide_over_the_ranks_are_refused():
    groups = replace(ParallelGroups.single(), world_size=4, ep_size=4)
    with pytest.raises(ValueError, match="ep_size = 4 does not divide the 6 experts"):
        Model(tiny_config(), groups=groups)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mlp_only_layers": ()}, (0, 1, 2, 3, 4, 5)),
        ({"mlp_only_layers": (1, 4)}, (0, 2, 3, 5)),
        ({"mlp_only_layers": (), "first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ({"mlp_only_layers": (), "decoder_sparse_step": 2}, (1, 3, 5)),
        ({"mlp_only_layers": (3,), "decoder_sparse_step": 2, "first_k_dense_replace": 2}, (5,)),
        (DENSE, ()),
    ],
)
def test_dense_and_moe_layers_stand_where_the_configuration_puts_them(changes, expected):
    config = tiny_config(num_hidden_layers=6, **changes)
    assert config.moe_layers == expected
    model = tiny_model(config)
    assert tuple(i for i, block in enumerate(model.layers) if block.moe is not None) == expected
    assert len(model(tiny_tokens(1, 4))[1]) == len(expected)


def test_configuration_survives_json_and_refuses_unknown_fields():
    config = tiny_config(router=TopKConfig(use_selection_bias=True))
    adapter = TypeAdapter(ModelConfig)
    text = adapter.dump_json(config)
    assert adapter.validate_json(text) == config
    with pytest.raises(ValidationError, match="hiden_size"):
        adapter.validate_json(text.replace(b'"hidden_size"', b'"hiden_size"'))


def test_parameters_carry_the_names_that_checkpoints_use():
    config = tiny_config(qk_norm="head", attention_bias=True, attention_output_bias=True, use_shared_expert_gate=True)
    linear = [f"attention.{p}_proj.{part}" for p in "qkvo" for part in ("weight", "bias")]
    block = ["attention_norm.weight", "feed_forward_norm.weight", *linear]
    block += ["attention.q_norm.weight", "attention.k_norm.weight"]
    swiglu = [f"{p}_proj.weight" for p in ("gate", "up", "down")]
    sparse = ["moe.router.weight", "moe.experts.gate_up_proj", "moe.experts.down_proj"]
    sparse += [f"moe.shared_expert.{name}" for name in (*swiglu, "sigmoid_gate.weight")]
    expected = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    for index, kind in enumerate((sparse, [f"feed_forward.{name}" for name in swiglu], sparse)):
        expected |= {f"layers.{index}.{name}" for name in (*block, *kind)}
    assert set(tiny_model(config).state_dict()) == expected


def test_a_tied_head_is_the_embedding_table_and_is_stored_once():
    model = tiny_model(tiny_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in model.state_dict()
    untied = tiny_model()
    untied.load_state_dict({**model.state_dict(), "lm_head.weight": model.embed_tokens.weight})
    token = tiny_tokens(2, 5)
    logits, expected = model(token)[0], untied(token)[0]
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    assert_near(model.embed_tokens.weight.grad, untied.embed_tokens.weight.grad + untied.lm_head.weight.grad, 1e-6)


def test_a_token_never_sees_a_later_one():
    model = tiny_model(dtype=torch.float64)
    token = tiny_tokens(1, 9)
    changed = token.clone()
    changed[0, 5] = (token[0, 5] + 1) % 37
    logits, after = model(token)[0], model(changed)[0]
    assert_near(after[:, :5], logits[:, :5], 1e-13)
    assert (after[0, 5:] - logits[0, 5:]).norm(dim=-1).min() > 1e-3


def test_positions_shift_nothing_but_their_differences_count():
    model = tiny_model(dtype=torch.float64)
    token = tiny_tokens(2, 6)
    position = torch.arange(6).expand(2, 6)
    logits = model(token)[0]
    assert torch.equal(model(token, position_BS=position)[0], logits)
    assert_near(model(token, position_BS=position + 7)[0], logits, 1e-5)
    assert (model(token, position_BS=2 * position)[0] - logits).norm() > 1e-2 * logits.norm()


def padded(rows, length):
    token = torch.zeros(len(rows), length, dtype=torch.int64)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        token[index, : len(row)], valid[index, : len(row)] = row, True
    return token, valid


@pytest.mark.parametrize("backend", ["naive", "auto"])
def test_padding_on_the_right_changes_no_valid_logit_count_or_gradient(backend):
    config = tiny_config(use_shared_expert_gate=True)
    models = [Model(config, groups=ParallelGroups.single(), backend=backend).double() for _ in range(2)]
    for model in models:
        model.load_state_dict(tiny_model(config, dtype=torch.float64).state_dict())
    rows = [tiny_tokens(size, seed=size) for size in (3, 8, 1)]
    token, valid = padded(rows, 9)
    logits, routings = models[0](token, valid_BS=valid)
    logits[valid].square().sum().backward()
    counts = torch.zeros(len(config.moe_layers), 7, dtype=torch.int64)
    for index, row in enumerate(rows):
        expected, row_routings = models[1](row[None])
        assert_near(logits[index, : len(row)], expected[0], 1e-12)
        expected.square().sum().backward()
        for layer, routing in enumerate(row_routings):
            counts[layer] += torch.bincount(routing.assignment.expert_N, minlength=7)
    for layer, routing in enumerate(routings):
        assert torch.equal(routing.valid_T, valid.flatten())
        assert torch.equal(torch.bincount(routing.assignment.expert_N, minlength=7)[:6], counts[layer, :6])
    assert int(counts.sum()) == len(config.moe_layers) * config.num_experts_per_tok * 12
    for actual, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_near(actual.grad, wanted.grad, 1e-11)


def test_context_reaches_every_router_with_the_padding_filled_in():
    seen = []
    model = tiny_model()
    for index in model.config.moe_layers:
        model.layers[index].moe.router.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    valid = torch.tensor([[True, True, False]])
    model(tiny_tokens(1, 3), valid_BS=valid, context=RouterContext(step=5, position_T=torch.arange(3)))
    assert [(context.step, context.valid_T.tolist()) for context in seen] == [(5, valid[0].tolist())] * 2


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 1)])
def test_no_sequence_and_one_token_pass_and_every_parameter_gets_a_gradient(shape):
    model = tiny_model()
    logits, routings = model(tiny_tokens(*shape))
    assert logits.shape == (*shape, 37)
    assert routings[0].assignment.token_N.numel() == 2 * shape[0]
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("backend", ["naive", "auto"])
def test_activation_checkpointing_changes_no_bit_of_values_or_gradients(backend):
    config = tiny_config(use_shared_expert_gate=True, qk_norm="full")
    results = []
    for is_checkpointed in (False, True):
        model = Model(
            config,
            groups=ParallelGroups.single(),
            backend=backend,
            activation_checkpointing=is_checkpointed,
        )
        model.load_state_dict(tiny_model(config).state_dict())
        token, valid = padded([tiny_tokens(9), tiny_tokens(4)], 9)
        logits, routings = model(token, valid_BS=valid)
        loss = F.cross_entropy(logits[valid], token[valid])
        loss = loss + sum(routing.logits_TE.logsumexp(-1).square().mean() for routing in routings)
        loss.backward()
        results.append((logits, [parameter.grad for parameter in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(plain, recomputed)


def test_cache_gives_the_logits_of_one_pass():
    model = tiny_model(tiny_config(qk_norm="full", attention_bias=True), dtype=torch.float64).eval()
    token = tiny_tokens(2, 8)
    cache = KeyValueCache(num_layers=3, max_length=8)
    with torch.no_grad():
        expected = model(token)[0]
        parts = [model(token[:, start:end], cache=cache)[0] for start, end in ((0, 3), (3, 4), (4, 8))]
    assert_near(torch.cat(parts, dim=1), expected, 1e-12)


def test_bfloat16_follows_float32():
    model = tiny_model(tiny_config(qk_norm="head", num_experts_per_tok=6))  # k = E: rounding flips no choice
    token = tiny_tokens(2, 8)
    expected = model(token)[0]
    logits = model.bfloat16()(token)[0]
    assert logits.dtype == torch.bfloat16
    assert_near(logits, expected, 0.03)


def test_a_model_of_any_size_is_built_on_the_meta_device():
    with torch.device("meta"):
        model = Model(mixtral_8x7b(), groups=ParallelGroups.single())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
