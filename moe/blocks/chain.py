"""Chain of experts: one pool of experts, run several times within a block (arXiv 2506.18945).

    F_t(u) = sum_i w_ti(u) E_i(u) + shared(u)        t = 1..C, the router of round t on the same experts

h is the residual stream, n = norm(h), y_t the answer of round t to its input u_t, a_t = y_1 + ... + y_t, and u_1 = n:

              a round reads u_t =     the block returns
    delta     n + a_{t-1}             h + a_C
    preln     norm(h + a_{t-1})       h + a_C                one norm for all rounds
    release   n + a_{t-1}             n + a_C
    outer     y_{t-1}                 h + y_C
    init      n + y_{t-1}             n + y_C
    none      y_{t-1}                 y_C

With one round, delta, preln and outer are the usual block h + F(norm(h)). `release` is what the authors' code does by
default: the residual stream is replaced by its normalised version, so not even one round is a usual block. `delta` adds
the same rounds to the stream instead. `outer`, `init` and `none` are the paper's ablations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe.routing import Routing

RESIDUALS = ("delta", "preln", "release", "outer", "init", "none")

# (input, round) -> (what experts make of it, routing)
RunRound = Callable[[Tensor, int], tuple[Tensor, list[Routing]]]


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """How often a block runs its experts, and what the rounds pass on. One round is the usual MoE block."""

    __pydantic_config__ = {"extra": "forbid"}

    rounds: int = 1
    residual: Literal["delta", "preln", "release", "outer", "init", "none"] = "delta"
    has_shared_router: bool = False
    """One router for all rounds, which learns from their counts together; else each round has its own, with its own
    selection bias."""
    shared_expert: Literal["every_round", "once"] = "every_round"
    """once: in the first round only, so that C rounds of K experts cost what one of C*K does."""

    def validate(self) -> None:
        """Raise ValueError for a value out of range."""
        if self.rounds < 1:
            raise ValueError(f"model.chain.rounds = {self.rounds} must be at least 1; 1 is the usual MoE block")
        if self.residual not in RESIDUALS:
            raise ValueError(f"model.chain.residual = {self.residual!r} must be one of {', '.join(RESIDUALS)}")
        if self.shared_expert not in ("every_round", "once"):
            raise ValueError(f"model.chain.shared_expert = {self.shared_expert!r} must be 'every_round' or 'once'")

    @property
    def num_routers(self) -> int:
        """Routers of a layer."""
        return 1 if self.has_shared_router else self.rounds

    @property
    def num_shared_runs(self) -> int:
        """How often a token passes the shared expert of a layer."""
        return self.rounds if self.shared_expert == "every_round" else 1


def run_chain(
    h_BSD: Tensor, *, chain: ChainConfig, norm: Callable[[Tensor], Tensor], run_round: RunRound
) -> tuple[Tensor, list[Routing]]:
    """Return (what the block returns for the residual stream h_BSD, one routing per round)."""
    start_BSD = u_BSD = norm(h_BSD)
    y_BSD, routings = run_round(u_BSD, 0)
    added_BSD = y_BSD
    for t in range(1, chain.rounds):
        if chain.residual in ("delta", "release"):
            u_BSD = start_BSD + added_BSD
        elif chain.residual == "preln":
            u_BSD = norm(h_BSD + added_BSD)
        elif chain.residual == "init":
            u_BSD = start_BSD + y_BSD
        else:
            u_BSD = y_BSD
        y_BSD, round_routings = run_round(u_BSD, t)
        added_BSD = added_BSD + y_BSD
        routings = routings + round_routings
    match chain.residual:
        case "delta" | "preln":
            return h_BSD + added_BSD, routings
        case "release":
            return start_BSD + added_BSD, routings
        case "outer":
            return h_BSD + y_BSD, routings
        case "init":
            return start_BSD + y_BSD, routings
        case "none":
            return y_BSD, routings
