"""Ridge regression from router inputs to domains, in sums that grow as text comes (DUME, arXiv 2603.29765).

    X: router inputs of a layer with a 1 appended, [n, D + 1];  Y: one-hot domain of each, [n, C]
    A = X^T X,  b = X^T Y        W = (A + lambda I)^-1 b
    a router's row for domain c: W[:D, c] / |W[:D, c]|           its bias: W[D, c] / |W[:D, c]|

Everything is a sum over tokens: order, batches and processes do not matter, and a domain that comes later is one more
column of b and one more term of A. All in float64: the largest eigenvalue of A grows with the number of tokens while
lambda stays, so float32 would soon have no digit left.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.convert import ConversionError

FILE = "ridge.safetensors"  # beside the weights of a model whose router was fitted


@dataclass(frozen=True, kw_only=True)
class FittedRouter:
    """The router of one layer, float32: weight [C, D], bias [C]; and how well the equations could be solved."""

    weight_CD: Tensor
    bias_C: Tensor
    condition: float  # of A + lambda I
    residual: float  # |(A + lambda I) W - b| / |b|


class RidgeStatistics:
    """Sums of L layers of width D over C domains."""

    def __init__(self, *, num_layers: int, hidden_size: int, num_domains: int) -> None:
        size = hidden_size + 1
        self.A_LXX = torch.zeros(num_layers, size, size, dtype=torch.float64)
        self.b_LXC = torch.zeros(num_layers, size, num_domains, dtype=torch.float64)

    @property
    def tokens_C(self) -> Tensor:
        """Tokens seen of each domain, float64: the sum of the appended ones."""
        return self.b_LXC[0, -1]

    def update(self, layer: int, x_ND: Tensor, domain: int) -> None:
        """Add N router inputs of one layer, all of text of one domain."""
        X_NX = torch.cat((x_ND.double(), x_ND.new_ones(x_ND.shape[0], 1, dtype=torch.float64)), dim=1)
        self.A_LXX[layer] += X_NX.T @ X_NX
        self.b_LXC[layer, :, domain] += X_NX.sum(0)

    def add(self, other: "RidgeStatistics") -> None:
        """Add what another process has seen."""
        self.A_LXX += other.A_LXX
        self.b_LXC += other.b_LXC

    def widened(self) -> "RidgeStatistics":
        """Return a copy with room for one more domain."""
        L, X, C = self.b_LXC.shape
        wider = RidgeStatistics(num_layers=L, hidden_size=X - 1, num_domains=C + 1)
        wider.A_LXX += self.A_LXX
        wider.b_LXC[:, :, :C] += self.b_LXC
        return wider

    def solve(self, layer: int, *, penalty: float, has_bias: bool = True, normalises: bool = True) -> FittedRouter:
        """Return the router of a layer.

        Args:
            penalty: lambda, added to the diagonal of A.
            has_bias: without, as if nothing had been appended to the inputs.
            normalises: divide each row by its norm, so that domains with much text do not win by it.

        Raises:
            ConversionError: a domain without a token, whose row would be zero, or sums that are not finite.
        """
        empty = [str(c) for c, count in enumerate(self.tokens_C.tolist()) if not count]
        if empty:
            raise ConversionError(f"domain {', '.join(empty)} has no token, so nothing says what to route to it")
        size = self.A_LXX.shape[1] if has_bias else self.A_LXX.shape[1] - 1
        A_XX = self.A_LXX[layer, :size, :size] + penalty * torch.eye(size, dtype=torch.float64)
        b_XC = self.b_LXC[layer, :size]
        if not (A_XX.isfinite().all() and b_XC.isfinite().all()):
            raise ConversionError(
                f"router inputs of MoE layer {layer} are not finite: the models overflow on this text"
            )
        W_XC = torch.cholesky_solve(b_XC, torch.linalg.cholesky(A_XX))
        weight_DC = W_XC[: self.A_LXX.shape[1] - 1]
        bias_C = W_XC[-1] if has_bias else torch.zeros(b_XC.shape[1], dtype=torch.float64)
        norm_C = weight_DC.norm(dim=0).clamp_min(1e-6) if normalises else torch.ones_like(bias_C)
        eigenvalues = torch.linalg.eigvalsh(A_XX)
        return FittedRouter(
            weight_CD=(weight_DC / norm_C).T.contiguous().float(),
            bias_C=(bias_C / norm_C).float(),
            condition=(eigenvalues[-1] / eigenvalues[0]).item(),
            residual=((A_XX @ W_XC - b_XC).norm() / b_XC.norm()).item(),
        )

    def save(self, folder: Path, *, penalty: float, temperature: float) -> None:
        """Keep the sums in a model folder, with what the router was made of them with."""
        metadata = {"penalty": repr(penalty), "temperature": repr(temperature)}
        save_file({"A": self.A_LXX, "b": self.b_LXC.contiguous()}, folder / FILE, metadata=metadata)

    @classmethod
    def load(cls, folder: Path) -> tuple["RidgeStatistics", float, float]:
        """Return (sums, penalty, temperature) of a model folder. Raises ConversionError if there are none."""
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                A_LXX, b_LXC, metadata = file.get_tensor("A"), file.get_tensor("b"), file.metadata()
        except (OSError, SafetensorError) as error:
            raise ConversionError(
                f"{folder} keeps no sums of its router ({FILE}): {error}; only what `moe upcycle --method ridge` made "
                "can take another expert"
            ) from error
        loaded = cls(num_layers=b_LXC.shape[0], hidden_size=b_LXC.shape[1] - 1, num_domains=b_LXC.shape[2])
        loaded.A_LXX, loaded.b_LXC = A_LXX, b_LXC
        return loaded, float(metadata["penalty"]), float(metadata["temperature"])
