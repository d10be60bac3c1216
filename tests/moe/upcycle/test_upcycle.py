"""Every identity that a method promises, against transformers' dense model; what is changed on purpose, by how much."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hf_folders import make_model, save
from moe.checkpoint import load_weights, open_model_folder
from moe.cli import main
from moe.convert import ConversionError
from moe.convert.hf import export_hf
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.routing import RouterContext
from moe.sample import generate
from moe.upcycle import METHODS, UpcycleConfig
from moe.upcycle.run import plan, upcycle
from tiny import assert_near, tiny_tokens


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders and models of dense families, trained a little, by family."""
    made = {}
    for family in ("llama", "qwen2", "qwen3"):
        folder = tmp_path_factory.mktemp(family)
        model = make_model(family, steps=60, intermediate_size=24)
        made[family] = (save(model, folder / "hf"), model)
    return made


def made_of(path, out, config: UpcycleConfig) -> Model:
    upcycle(plan(path, config), out)
    model_config, reader = open_model_folder(out)
    model = Model(model_config, groups=ParallelGroups.single())
    load_weights(model, reader)
    return model.eval()


EXACT = {
    "copy": {"num_experts": 8, "top_k": 2},
    "copy, k = E": {"num_experts": 4, "top_k": 4},
    "copy, sigmoid": {"num_experts": 5, "top_k": 3, "scoring_func": "sigmoid"},
    "copy, every second layer": {"num_experts": 4, "every": 2},
    "copy, shared": {"num_experts": 4, "shared_expert": True},
    "copy, shared, factor in the routing": {
        "num_experts": 4,
        "shared_expert": True,
        "scale_on": "routed_scaling_factor",
    },
    "fine-grained": {"method": "fine_grained", "granularity": 2, "num_experts": 8, "top_k": 2},
    "fine-grained, two groups": {"method": "fine_grained", "granularity": 4, "num_experts": 16, "top_k": 8},
    "fine-grained, one group": {"method": "fine_grained", "granularity": 3, "num_experts": 3, "top_k": 3},
    "fine-grained, sigmoid": {
        "method": "fine_grained",
        "granularity": 4,
        "num_experts": 8,
        "top_k": 4,
        "scoring_func": "sigmoid",
        "scale_on": "routed_scaling_factor",
    },
    "fine-grained, shared": {
        "method": "fine_grained",
        "granularity": 2,
        "num_experts": 6,
        "top_k": 4,
        "shared_expert": True,
    },
    "drop of nothing": {"method": "drop", "drop_ratio": 0.0, "num_experts": 4},
}


@pytest.mark.parametrize("case", EXACT)
def test_what_is_called_exact_is(dense, tmp_path, case):
    config = UpcycleConfig(**EXACT[case])
    path, theirs = dense["qwen3" if len(case) % 2 else "llama"]
    assert plan(path, config).identity == "exact"
    model, token = made_of(path, tmp_path / "moe", config), tiny_tokens(4, 24, vocab_size=61)
    with torch.no_grad():
        expected = theirs(input_ids=token).logits
        logits, routings = model(token)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        losses = [
            F.cross_entropy(values[:, :-1].flatten(0, 1), token[:, 1:].flatten()) for values in (logits, expected)
        ]
        assert (losses[0] - losses[1]).abs() < 1e-5
    assert len(routings) == len(range(config.every - 1, 3, config.every))
    greedy = theirs.generate(token[:1, :5], max_new_tokens=32, do_sample=False)[0, 5:].tolist()
    assert generate(model, token[0, :5].tolist(), max_new_tokens=32, temperature=0.0) == greedy


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 4, "top_k": 1},
        {"num_experts": 4, "top_k": 2},
        {"method": "fine_grained", "granularity": 2, "num_experts": 8, "top_k": 4},
        {"num_experts": 4, "top_k": 2, "scoring_func": "sigmoid"},
    ],
)
def test_in_the_limit_means_that_a_smaller_router_is_nearer(dense, tmp_path, options):
    path, theirs = dense["llama"]
    token, errors = tiny_tokens(4, 24, vocab_size=61), []
    with torch.no_grad():
        expected = theirs(input_ids=token).logits
        for std in (1e-1, 1e-3, 1e-6):
            config = UpcycleConfig(**options, norm_topk_prob=False, router_std=std)
            assert plan(path, config).identity == "in the limit"
            logits = made_of(path, tmp_path / f"{std}", config)(token)[0]
            errors.append(((logits - expected).abs().max() / expected.abs().max()).item())
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 2e-5


def test_drop_redraws_the_same_neurons_in_all_three_matrices_and_as_many_as_it_says(dense, tmp_path):
    path, theirs = dense["llama"]
    model = made_of(path, tmp_path / "moe", UpcycleConfig(method="drop", drop_ratio=0.5, num_experts=4))
    mlp = theirs.model.layers[1].mlp
    stack = model.layers[1].moe.experts
    gates, downs = stack.gate_up_proj.detach(), stack.down_proj.detach()
    kept = []
    for e in range(4):
        gate, up = gates[e].chunk(2)
        same = [(gate == mlp.gate_proj.weight).all(1), (up == mlp.up_proj.weight).all(1)]
        same.append((downs[e] == mlp.down_proj.weight).all(0))
        assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
        assert int(same[0].sum()) == 12
        new = gate[~same[0]]
        assert new.std() == pytest.approx(mlp.gate_proj.weight[~same[0]].std().item(), rel=0.3)
        kept.append(same[0])
    assert not torch.equal(kept[0], kept[1]), "experts must differ in what they lost"
    token = tiny_tokens(4, 24, vocab_size=61)
    with torch.no_grad():
        assert not torch.allclose(model(token)[0], theirs(input_ids=token).logits, atol=1e-2)


def test_noise_touches_half_of_the_weights_and_tells_experts_apart(dense, tmp_path):
    path, theirs = dense["llama"]
    config = UpcycleConfig(noise_std=0.5, num_experts=3)
    assert plan(path, config).identity == "changed on purpose"
    stack = made_of(path, tmp_path / "moe", config).layers[0].moe.experts.gate_up_proj.detach()
    mlp = theirs.model.layers[0].mlp
    original = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    assert ((stack[0] != original).float().mean() - 0.5).abs() < 0.01
    assert not torch.equal(stack[0], stack[1])


def test_the_router_learns_and_copies_part(dense, tmp_path):
    model = made_of(dense["llama"][0], tmp_path / "moe", UpcycleConfig(num_experts=4)).train()
    optimizer, token = torch.optim.AdamW(model.parameters(), lr=1e-3), tiny_tokens(8, 24, vocab_size=61)
    for _ in range(5):
        logits, _ = model(token, context=RouterContext())
        F.cross_entropy(logits[:, :-1].flatten(0, 1), token[:, 1:].flatten()).backward()
        assert model.layers[0].moe.router.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
    stack = model.layers[0].moe.experts.gate_up_proj.detach()
    assert (stack[0] - stack[1]).norm() > 0


def test_seeds_and_bytes(dense, tmp_path):
    path = dense["llama"][0]
    configs = [UpcycleConfig(num_experts=4, seed=seed) for seed in (0, 0, 1)]
    models = [made_of(path, tmp_path / f"{i}", config) for i, config in enumerate(configs)]
    routers = [model.layers[0].moe.router.weight for model in models]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])


def test_an_upcycled_model_goes_out_to_plain_transformers(dense, tmp_path):
    from transformers import AutoModelForCausalLM

    path, theirs = dense["qwen3"]
    made_of(path, tmp_path / "moe", UpcycleConfig(num_experts=4))
    config, reader = open_model_folder(tmp_path / "moe")
    family = export_hf(config, reader, tmp_path / "out", tokenizer_dir=tmp_path / "moe/tokenizer")
    assert family.model_type == "qwen3_moe"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    token = tiny_tokens(2, 11, vocab_size=61)
    with torch.no_grad():
        assert_near(again(input_ids=token).logits, theirs(input_ids=token).logits, 1e-5)


def test_the_command_prints_its_plan_and_refuses_in_one_line(dense, tmp_path, capsys):
    path, out = str(dense["llama"][0]), str(tmp_path / "out")
    main(["upcycle", path, out, "--method", "copy", "--num-experts", "8", "--top-k", "2"])
    text = capsys.readouterr().out
    for word in ("active per token", "exact: logits equal", "8 in 3 of 3 layers, 2 per token", "init_from"):
        assert word in text
    with pytest.raises(SystemExit):
        main(["upcycle", path, out])
    assert "exists; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "magic"},
            "'magic' is unknown; known are branch_train_mix, copy, drop, fine_grained, innovator",
        ),
        ({"granularity": 2}, "--granularity 2 belongs to method fine_grained and innovator, not copy"),
        ({"method": "drop", "noise_std": 0.1}, "--noise-std 0.1 belongs to method copy, not drop"),
        ({"method": "fine_grained"}, "--granularity 1 must be at least 2"),
        (
            {"method": "fine_grained", "granularity": 5, "num_experts": 10, "top_k": 5},
            "does not divide intermediate_size",
        ),
        ({"method": "fine_grained", "granularity": 2, "num_experts": 8, "top_k": 3}, "does not divide --top-k = 3"),
        ({"method": "fine_grained", "granularity": 2, "num_experts": 7}, "does not divide --num-experts = 7"),
        ({"method": "drop", "drop_ratio": 1.5}, r"must lie in \[0, 1\]"),
        ({"top_k": 1}, "no gradient"),
        ({"top_k": 9}, "must lie in 1..num_experts = 8"),
        ({"num_experts": -1}, "--num-experts -1 must be at least 0"),
        ({"router_std": -1.0}, "must not be negative"),
        ({"every": 4}, "all 3 layers are dense"),
    ],
)
def test_wrong_combinations_are_refused_before_anything_is_read(dense, options, message):
    with pytest.raises(ConversionError, match=message):
        plan(dense["llama"][0], UpcycleConfig(**options))


def test_a_model_with_experts_is_refused(tmp_path):
    save(make_model("mixtral", steps=1), tmp_path / "hf")
    with pytest.raises(ConversionError, match="has experts already"):
        plan(tmp_path / "hf", UpcycleConfig())
    assert replace(UpcycleConfig(), method="drop").method in METHODS
