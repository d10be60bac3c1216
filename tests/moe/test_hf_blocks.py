"""The MoE blocks of published models in transformers, with copied random weights: outputs and every gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    LongcatFlashConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moe.blocks.feed_forward import SharedExpert
from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import make_dispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers import RouterConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from moe.routing import RouterContext
from tiny import assert_near

D, F = 12, 10


def interleaved(gate_up_E2FD: Tensor) -> Tensor:
    """GPT-OSS stores [E, D, 2F] with gate and up in turns: ours, gate first, as [E, D, 2F] in turns."""
    gate, up = gate_up_E2FD.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One block of transformers, and the parts of ours that are to equal it. `copy` takes ours to theirs by name."""

    block: type[nn.Module]
    config: Callable[..., Any]
    router: RouterConfig
    E: int = 6
    K: int = 2
    fields: dict[str, Any] = field(default_factory=dict)
    shared: bool = False
    shared_gate: bool = False
    activation: str = "swiglu"
    bias: bool = False
    router_name: str = "gate"
    shared_name: str = "shared_expert"
    router_bias_name: str = ""


QWEN = {"moe_intermediate_size": F}
DEEPSEEK = {
    "moe_intermediate_size": F,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}


def deepseek_router(norm: bool = True) -> TopKConfig:
    return TopKConfig(
        scoring_func="sigmoid",
        norm_topk_prob=norm,
        use_selection_bias=True,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
    )


def family_table() -> dict[str, Family]:
    qwen3 = {**QWEN, "num_experts": 6, "num_experts_per_tok": 2}
    table = {
        "mixtral": Family(
            block=MixtralSparseMoeBlock,
            config=MixtralConfig,
            router=TopKConfig(norm_topk_prob=True),
            fields={"intermediate_size": F, "num_local_experts": 6, "num_experts_per_tok": 2},
        ),
        "olmoe": Family(
            block=OlmoeSparseMoeBlock,
            config=OlmoeConfig,
            router=TopKConfig(),
            fields={"intermediate_size": F, "num_experts": 6, "num_experts_per_tok": 2},
        ),
        "qwen2_moe": Family(
            block=Qwen2MoeSparseMoeBlock,
            config=Qwen2MoeConfig,
            router=TopKConfig(),
            fields={**qwen3, "shared_expert_intermediate_size": F},
            shared=True,
            shared_gate=True,
        ),
        "qwen3_moe": Family(
            block=Qwen3MoeSparseMoeBlock,
            config=Qwen3MoeConfig,
            router=TopKConfig(norm_topk_prob=True),
            fields={**qwen3, "norm_topk_prob": True},
        ),
        "longcat_flash": Family(
            block=LongcatFlashMoE,
            config=LongcatFlashConfig,
            router=ZeroExpertsConfig(num_identity_experts=3, routed_scaling_factor=6.0),
            K=4,
            fields={
                "n_routed_experts": 6,
                "zero_expert_num": 3,
                "moe_topk": 4,
                "expert_ffn_hidden_size": F,
                "routed_scaling_factor": 6.0,
            },
            router_name="router.classifier",
            router_bias_name="router.e_score_correction_bias",
        ),
    }
    for K in (2, 6):  # k = E as well
        table[f"gpt_oss-{K}"] = Family(
            block=GptOssMLP,
            config=GptOssConfig,
            router=TopKConfig(softmax_after_topk=True, use_router_bias=True),
            K=K,
            fields={"intermediate_size": F, "num_local_experts": 6, "num_experts_per_tok": K},
            activation="gpt_oss",
            bias=True,
            router_name="router",
        )
    for K, norm in ((2, True), (3, True), (2, False)):  # 3: all experts of the one group kept
        table[f"deepseek_v3-{K}-{norm}"] = Family(
            block=DeepseekV3MoE,
            config=DeepseekV3Config,
            router=deepseek_router(norm),
            K=K,
            fields={**DEEPSEEK, "n_routed_experts": 6, "num_experts_per_tok": K, "norm_topk_prob": norm},
            shared=True,
            shared_name="shared_experts",
            router_bias_name="gate.e_score_correction_bias",
        )
    return table


FAMILIES = family_table()


def ours_of(family: Family) -> MoELayer:
    groups = ParallelGroups.single()
    sizes = {"hidden_size": D, "num_experts": family.E, "num_experts_per_tok": family.K, "layer_index": 0}
    layer = MoELayer(
        router=family.router.build(**sizes),
        dispatcher=make_dispatcher(groups, num_experts=family.E),
        experts=Experts(
            num_experts=family.E,
            hidden_size=D,
            intermediate_size=F,
            groups=groups,
            backend="auto",
            activation=family.activation,  # type: ignore[arg-type]
            has_bias=family.bias,
        ),
        shared_expert=SharedExpert(hidden_size=D, intermediate_size=F, use_sigmoid_gate=family.shared_gate)
        if family.shared
        else None,
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
        if family.router_bias_name:
            # far below zero: a masked group that scored 0 would win
            layer.router.selection_bias.copy_(torch.randn(layer.router.selection_bias.shape, generator=draw) * 0.1 - 2)
    return layer


def pairs_of(family: Family, layer: MoELayer, block: nn.Module) -> list[tuple[Tensor, Tensor, Callable]]:
    """Return (our parameter, theirs, what turns ours into the form of theirs)."""

    def same(weight: Tensor) -> Tensor:
        return weight

    def turned(weight: Tensor) -> Tensor:
        return weight.transpose(1, 2)

    theirs = dict(block.named_parameters())
    is_gpt_oss = family.bias
    rows = [
        (layer.router.weight, theirs[f"{family.router_name}.weight"], same),
        (
            layer.experts.gate_up_proj,
            theirs["experts.gate_up_proj"],
            (lambda weight: turned(interleaved(weight))) if is_gpt_oss else same,
        ),
        (layer.experts.down_proj, theirs["experts.down_proj"], turned if is_gpt_oss else same),
    ]
    if is_gpt_oss:
        rows += [
            (layer.router.bias, theirs["router.bias"], same),
            (layer.experts.gate_up_proj_bias, theirs["experts.gate_up_proj_bias"], interleaved),
            (layer.experts.down_proj_bias, theirs["experts.down_proj_bias"], same),
        ]
    if layer.shared_expert is not None:
        for name in ("gate_proj", "up_proj", "down_proj"):
            ours = layer.shared_expert.get_parameter(f"{name}.weight")
            rows.append((ours, theirs[f"{family.shared_name}.{name}.weight"], same))
        if family.shared_gate:
            rows.append((layer.shared_expert.sigmoid_gate.weight, theirs["shared_expert_gate.weight"], same))
    return rows


@pytest.mark.parametrize("shape", [(2, 9), (1, 1)], ids=["tokens", "one token"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_equal_transformers(name, shape):
    family = FAMILIES[name]
    layer = ours_of(family).train()
    config = family.config(hidden_size=D, **family.fields)
    config._experts_implementation = "eager"
    block = family.block(config)
    rows = pairs_of(family, layer, block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))  # whatever is not copied shows
        for ours, theirs, form in rows:
            source = form(ours)
            # LongCat allocates experts that compute nothing
            theirs[: len(source)].copy_(source)
            theirs[len(source) :].zero_()
        if family.router_bias_name:
            owner, _, attribute = family.router_bias_name.rpartition(".")
            getattr(block.get_submodule(owner), attribute).copy_(layer.router.selection_bias)
    draw = torch.Generator().manual_seed(2)
    x_BSD = torch.randn(*shape, D, generator=draw)
    upstream = torch.randn(*shape, D, generator=draw)
    results = []
    for module in (layer, block):
        x = x_BSD.clone().requires_grad_()
        y = module(x, RouterContext()) if module is layer else module(x)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(upstream)
        results.append((y, x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, 1e-5)
    for ours, theirs, form in rows:
        expected = theirs.grad[: len(form(ours))]
        if expected.norm() < 1e-6:  # one token and all of its weight: nothing to learn
            assert ours.grad.norm() < 1e-6
        else:
            assert_near(form(ours.grad), expected, 1e-5)
