"""Initial weights: a function of (seed, parameter name, global expert id), whatever the layout.

    weights                normal(0, initializer_range)
    o_proj and down_proj   normal(0, initializer_range / sqrt(2 * num_hidden_layers)), as in GPT-2: each of
                           the 2L branches that add to the residual stream brings its share of variance
    norms 1, biases 0, selection bias 0

Not truncated, as in the Hugging Face and Megatron models. Each tensor, and each expert of a stack, is drawn
in float32 on the CPU from a generator of its own, then cast: every dtype, device, rank and expert split holds
the same model.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from moe.blocks.norm import RMSNorm
from moe.experts import Experts
from moe.model import Model, ModelConfig

# the last projection of each residual branch: attention, dense feed-forward and shared expert, routed experts
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", ".down_proj")


@torch.no_grad()
def initialise(model: Model, *, seed: int) -> None:
    """Fill every parameter and buffer of `model` in place; the same values on every layout."""
    std = model.config.initializer_range
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            scale = residual_std(model.config) if name.endswith(_RESIDUAL_OUTPUTS) else std
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif isinstance(module, Experts):
                for local, weight in enumerate(parameter):
                    weight.copy_(scale * draw(weight.shape, f"{seed}/{name}/{module.first_expert + local}"))
            else:
                parameter.copy_(scale * draw(parameter.shape, f"{seed}/{name}"))
        for buffer in module.buffers(recurse=False):
            # buffers hold what controllers learn (selection bias); all of it starts at zero
            buffer.zero_()


def residual_std(config: ModelConfig) -> float:
    """Return the standard deviation of the last projection of a branch that adds to the residual stream."""
    num_branches = 2 * config.num_attention_layers + (len(config.moe_layers) if config.is_shortcut_connected else 0)
    return config.initializer_range / math.sqrt(num_branches)


def generator(key: str) -> np.random.Generator:
    """Return a random generator that is a pure function of `key`."""
    # torch's CPU generator reads 32 bits of its seed, so of ten thousand tensors two may well get the same
    # numbers; Python's hash() differs from process to process
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def draw(shape: torch.Size | tuple[int, ...], key: str) -> Tensor:
    """Return standard normal float32 on the CPU, a pure function of `key`."""
    return torch.from_numpy(generator(key).standard_normal(tuple(shape), dtype=np.float32))
