"""Models of transformers with their experts on these kernels: the same loss and gradients as with their own."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_kernels.hf import experts_forward, spec_of
from moe_kernels.spec import ExpertSpec
from moe_kernels.testing import rms_ratio

README = Path(__file__).parents[2] / "kernels" / "README.md"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
MODELS = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(num_experts=5, **SIZES)),
    "olmoe_gelu": lambda: OlmoeForCausalLM(OlmoeConfig(num_experts=5, hidden_act="gelu", **SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=5, moe_intermediate_size=24, head_dim=8, norm_topk_prob=True, **SIZES)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(num_local_experts=5, head_dim=8, **SIZES)),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def run_readme_example(model: PreTrainedModel) -> None:
    """Run the block of the README that puts a model's experts on these kernels."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "experts_forward" in block]
    exec(compile(block, str(README), "exec"), {"model": model})


def loss_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 61, (3, 17), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_model_has_the_loss_and_gradients_of_eager(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if "experts" in parameter_name:  # large enough to reach the limits of GPT-OSS, and biases that are not zero
            nn.init.normal_(parameter, std=0.5)
    model.set_experts_implementation("eager")
    expected = loss_and_gradients(model)
    run_readme_example(model)
    assert model.config._experts_implementation == "moe_kernels"
    actual = loss_and_gradients(model)
    assert actual.keys() == expected.keys()
    assert any("experts" in key for key in expected) and any("gate" in key or "router" in key for key in expected)
    ratios = {key: rms_ratio(actual[key], expected[key]) for key in expected}
    assert max(ratios.values()) <= TOLERANCE[dtype], max(ratios, key=lambda key: ratios[key])


def qwen3_experts(**options) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=6, **{**SIZES, **options})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = Qwen3MoeExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def test_dropped_rows_add_nothing_and_read_nothing() -> None:
    experts = qwen3_experts()
    x_TD, weights_TK = torch.randn(7, 32), torch.rand(7, 2)
    index_TK = torch.randint(0, 5, (7, 2))
    index_TK[0], index_TK[1] = 4, torch.tensor([4, 1])
    expected = experts(x_TD, index_TK, weights_TK)
    poisoned_TK = weights_TK.masked_fill(index_TK == 4, float("nan"))
    actual = experts_forward(experts, x_TD, index_TK, poisoned_TK)
    assert not actual[0].any()
    assert rms_ratio(actual, expected) <= 1e-6


def test_hidden_states_in_another_dtype_than_the_weights_keep_theirs() -> None:
    experts = qwen3_experts().to(torch.bfloat16)
    x_TD, weights_TK, index_TK = torch.randn(7, 32), torch.rand(7, 2), torch.randint(0, 4, (7, 2))
    actual = experts_forward(experts, x_TD, index_TK, weights_TK)
    expected = experts(x_TD.bfloat16(), index_TK, weights_TK)
    assert actual.dtype == torch.float32
    assert rms_ratio(actual, expected) <= 1e-2


def test_experts_without_a_gate_and_with_squared_relu_equal_their_own_forward() -> None:
    config = NemotronHConfig(hidden_size=32, moe_intermediate_size=24, n_routed_experts=4, mlp_hidden_act="relu2")
    config._experts_implementation = "eager"
    experts = NemotronHExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    x_TD, weights_TK, index_TK = torch.randn(7, 32).double(), torch.rand(7, 2).double(), torch.randint(0, 4, (7, 2))
    assert spec_of(experts) == ExpertSpec(activation="relu2")
    expected = experts(x_TD, index_TK, weights_TK)
    assert rms_ratio(experts_forward(experts, x_TD, index_TK, weights_TK), expected) <= 1e-12


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "gelu_10"])
def test_other_activation_is_refused(name: str) -> None:
    experts = qwen3_experts()
    experts.act_fn = ACT2FN[name]
    with pytest.raises(ValueError, match=r"has act_fn .*known are SiLU and the exact GELU; set another experts_imp"):
        experts_forward(experts, torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.long), torch.rand(3, 2))


def test_tanh_gelu_of_torch_is_refused() -> None:
    experts = qwen3_experts()
    experts.act_fn = nn.GELU(approximate="tanh")
    with pytest.raises(ValueError, match="exact GELU"):
        spec_of(experts)
    experts.act_fn = nn.GELU()
    assert spec_of(experts).activation == "geglu"


def test_gate_that_is_overridden_is_refused() -> None:
    class Clamped(Qwen3MoeExperts):
        def _apply_gate(self, gate_up):
            return super()._apply_gate(gate_up.clamp(max=7))

    experts = qwen3_experts()
    experts.__class__ = Clamped
    with pytest.raises(ValueError, match=r"Clamped has a gate of its own, .*Clamped\._apply_gate"):
        spec_of(experts)


@pytest.mark.parametrize(
    ("attribute", "value", "match"),
    [
        ("has_post_expert_norm", True, "has_post_expert_norm=True"),
        ("is_concatenated", False, "is_concatenated=False, but gate and up are split in halves"),
        ("has_gate", False, "no gate; known is relu2"),
    ],
)
def test_form_that_no_spec_says_is_refused(attribute: str, value: bool, match: str) -> None:
    experts = qwen3_experts()
    setattr(experts, attribute, value)
    with pytest.raises(ValueError, match=match):
        spec_of(experts)


@pytest.mark.parametrize(("attribute", "value"), [("alpha", 1.0), ("limit", 5.0)])
def test_gpt_oss_gate_with_other_constants_is_refused(attribute: str, value: float) -> None:
    experts = MODELS["gpt_oss"]().model.layers[0].mlp.experts
    assert spec_of(experts) == ExpertSpec(activation="gpt_oss", gate_up="interleaved", weights="in_out")
    setattr(experts, attribute, value)
    with pytest.raises(ValueError, match=f"{attribute}={value}"):
        spec_of(experts)


def test_module_that_is_no_experts_of_transformers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear lacks the attributes of transformers"):
        spec_of(nn.Linear(2, 2))
