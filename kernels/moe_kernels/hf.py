"""Run the experts of a transformers model on these kernels, through the interface that transformers has for it.

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    ALL_EXPERTS_FUNCTIONS.register("moe_kernels", experts_forward)
    model.set_experts_implementation("moe_kernels")

Nothing of transformers is imported here: an experts module says by its attributes what it is (transformers 5,
integrations/moe.py, use_experts_implementation). What it says is turned into an ExpertSpec, or refused.

Letters: T tokens, D width, E experts, K experts per token, N = T * K rows.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moe_kernels.backends import ExpertsBackend, resolve_backend
from moe_kernels.spec import GPT_OSS_LIMIT, GPT_OSS_SLOPE, Activation, ExpertSpec

OTHER = "set another experts_implementation for this model, as 'grouped_mm' or 'eager'"
# the classes of transformers' activations, by name, and those of torch
SILU, GELU, RELU2 = ("SiLUActivation", "SiLU"), ("GELUActivation", "GELU"), ("ReLUSquaredActivation",)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of the experts' outputs for every token, in the shape and dtype of hidden_states.

    Args:
        module: experts of transformers, an nn.Module: gate_up_proj (up_proj if they have no gate), down_proj, the
            biases of both if has_bias, act_fn, and the attributes that use_experts_implementation sets.
        hidden_states: [T, D]; cast to the dtype of the weights, as transformers' own implementations do.
        top_k_index: [T, K]; the number of experts of the module marks a row that is dropped.
        top_k_weights: [T, K].

    Raises:
        ValueError: the experts compute something that no ExpertSpec says.
    """
    spec = spec_of(module)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    gate_up_E2FD, down_EDF = getattr(module, first), module.down_proj
    x_TD = hidden_states.to(gate_up_E2FD.dtype)
    T, K = top_k_index.shape
    token_N = torch.arange(T, device=x_TD.device).repeat_interleave(K)
    weight_N = top_k_weights.reshape(-1).to(torch.promote_types(x_TD.dtype, torch.float32))
    widths = (x_TD.shape[1], down_EDF.shape[2 if spec.weights == "out_in" else 1])
    y_TD = _backend(x_TD.device, x_TD.dtype, widths, spec)(
        x_TD,
        token_N,
        top_k_index.reshape(-1).long(),
        weight_N,
        gate_up_E2FD,
        down_EDF,
        fan_out=K,
        spec=spec,
        gate_up_bias_E2F=getattr(module, f"{first}_bias") if module.has_bias else None,
        down_bias_ED=module.down_proj_bias if module.has_bias else None,
    )
    return y_TD.to(hidden_states.dtype)


def spec_of(module: Any) -> ExpertSpec:
    """Return what the experts of a transformers module compute and how their weights lie.

    Raises:
        ValueError: no ExpertSpec says it: the gate, the activation or a norm after the experts is unknown.
    """
    name = type(module).__name__
    if not hasattr(module, "has_gate"):
        raise ValueError(f"{name} lacks the attributes of transformers' use_experts_implementation; {OTHER}")
    if module.has_post_expert_norm:
        raise ValueError(f"{name} has has_post_expert_norm=True, and here nothing follows the experts; {OTHER}")
    activation = _gated(module) if module.has_gate else _ungated(module)
    is_interleaved = activation == "gpt_oss"
    if module.has_gate and module.is_concatenated == is_interleaved:
        order = "take turns" if is_interleaved else "are split in halves"
        raise ValueError(f"{name} has is_concatenated={module.is_concatenated}, but gate and up {order}; {OTHER}")
    return ExpertSpec(
        activation=activation,
        gate_up="interleaved" if is_interleaved else "concatenated",
        weights="in_out" if module.is_transposed else "out_in",
    )


def _gated(module: Any) -> Activation:
    """Return the activation of experts with a gate: of transformers' default gate, or of GPT-OSS."""
    gate = type(module)._apply_gate.__qualname__
    if gate == "_default_apply_gate":
        activation = _named(module.act_fn, {SILU: "swiglu", GELU: "geglu"})
        if activation is not None:
            return activation
        raise ValueError(
            f"{type(module).__name__} has act_fn {module.act_fn}; known are SiLU and the exact GELU; {OTHER}"
        )
    if gate != "GptOssExperts._apply_gate":
        raise ValueError(f"{type(module).__name__} has a gate of its own, {gate}; known is GptOssExperts'; {OTHER}")
    if (module.alpha, module.limit) != (GPT_OSS_SLOPE, GPT_OSS_LIMIT):
        raise ValueError(
            f"{type(module).__name__} has alpha={module.alpha} and limit={module.limit}; known are "
            f"{GPT_OSS_SLOPE} and {GPT_OSS_LIMIT}; {OTHER}"
        )
    return "gpt_oss"


def _ungated(module: Any) -> Activation:
    """Return the activation of experts without a gate."""
    activation = _named(module.act_fn, {RELU2: "relu2"})
    if activation is None:
        raise ValueError(f"{type(module).__name__} has act_fn {module.act_fn} and no gate; known is relu2; {OTHER}")
    return activation


def _named(act_fn: Any, known: dict[tuple[str, ...], Activation]) -> Activation | None:
    """Return the activation that a module of torch or transformers is, or None if it is not among the known."""
    if getattr(act_fn, "approximate", "none") != "none":  # torch's GELU with tanh
        return None
    return next((value for names, value in known.items() if type(act_fn).__name__ in names), None)


@functools.cache
def _backend(device: torch.device, dtype: torch.dtype, widths: tuple[int, int], spec: ExpertSpec) -> ExpertsBackend:
    """Return the backend that "auto" stands for: asked once for a layer's form, as the choice is logged."""
    return resolve_backend("auto", device, dtype, widths=widths, spec=spec)[1]
