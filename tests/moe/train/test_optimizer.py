"""What decays, and which settings are refused."""

import pytest

from moe.routers.topk import TopKConfig
from moe.train.optimizer import OptimizerConfig, parameter_groups
from tiny import tiny_config, tiny_model


def test_matrices_decay_and_every_parameter_is_in_exactly_one_group():
    model = tiny_model(tiny_config(expert_bias=True, router=TopKConfig(use_router_bias=True), attention_bias=True))
    groups = {group["name"]: group for group in parameter_groups(model, weight_decay=0.3)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {names[id(p)] for p in groups["decay"]["params"]}
    no_decay = {names[id(p)] for p in groups["no_decay"]["params"]}
    assert decay.isdisjoint(no_decay)
    assert decay | no_decay == set(names.values())
    assert groups["decay"]["weight_decay"] == 0.3
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert "embed_tokens.weight" in no_decay
    assert all("norm" in name or name.endswith("bias") or name == "embed_tokens.weight" for name in no_decay)
    assert "layers.0.moe.experts.gate_up_proj_bias" in no_decay
    assert "layers.0.moe.router.weight" in decay
    assert "layers.0.moe.experts.gate_up_proj" in decay


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -1.0),
        ("max_grad_norm", -1.0),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"optimizer.{field} = {value}"):
        OptimizerConfig(**{field: value}).validate()
