"""RoundRouters: a router of its own for every round of a chain of experts (arXiv 2506.18945).

Each keeps its own state too: a selection bias per round, moved by the counts of that round.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from moe.routers import Router
from moe.routing import RouterContext, Routing


class RoundRouters(Router):
    """Asks router `rounds[t]` in round t. All choose among the same experts."""

    def __init__(self, routers: Sequence[Router]) -> None:
        super().__init__()
        assert len({router.num_candidates for router in routers}) == 1, "the rounds share one pool"
        self.num_candidates = routers[0].num_candidates
        self.rounds = nn.ModuleList(routers)

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        return self.rounds[context.round](x_TD, context)

    def end_step(self, tokens_per_expert_E: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        """Take the counts of one round, `context.round`."""
        router = self.rounds[context.round]
        assert isinstance(router, Router)
        router.end_step(tokens_per_expert_E, context, num_tokens=num_tokens)
