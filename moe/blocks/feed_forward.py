"""SwiGLU feed-forward (arXiv 2002.05202): the dense layer, and the shared expert of an MoE layer.

y = down(silu(gate(x)) * up(x))
"""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Dense feed-forward. Parameters `gate_proj`, `up_proj` [F, D], `down_proj` [D, F]."""

    def __init__(self, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, shape and dtype of x."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SharedExpert(nn.Module):
    """The expert that every token passes: y = feed_forward(x), times sigmoid(w . x) if gated (Qwen2-MoE).

    Several shared experts of width F (DeepSeek) are one of width n*F. Parameters `gate_proj`, `up_proj`,
    `down_proj` as in FeedForward, and `sigmoid_gate` [1, D].
    """

    def __init__(self, *, hidden_size: int, intermediate_size: int, use_sigmoid_gate: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.sigmoid_gate = nn.Linear(hidden_size, 1, bias=False) if use_sigmoid_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return y_TD, dtype of x."""
        y_TD = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        if self.sigmoid_gate is None:
            return y_TD
        return y_TD * self.sigmoid_gate(x_TD).sigmoid()
