"""MoELayer: route, dispatch, run, combine; plus the shared expert.

x -> router -> (drop) -> plan            float32 and integers; never recomputed, so a recompute cannot route differently
       |
       +-> dispatch -> experts -> combine -> + shared expert -> y      recomputed under activation checkpointing
"""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.experts import Experts
from moe.parallel.dispatch import Dispatcher, Plan
from moe.routers import Router
from moe.routers.capacity import CapacityConfig, drop
from moe.routing import RouterContext, Routing


class MoELayer(nn.Module):
    """Sparse feed-forward layer: built parts in, statistics out, no globals.

    Args:
        router: chooses experts among those of `experts` (or of the pool passed to forward).
        dispatcher: moves rows between the ranks of the expert group.
        experts: the layer's own pool; None where layers share one, passed to forward.
        shared_expert: applied to every token and added.
        capacity: how many rows an expert takes; the default drops nothing.
        experts_per_tok: rows of the average token, which a capacity is reckoned from.
        activation_checkpointing: recompute everything after the router in backward.
    """

    def __init__(
        self,
        *,
        router: Router,
        dispatcher: Dispatcher,
        experts: Experts | None = None,
        shared_expert: nn.Module | None = None,
        capacity: CapacityConfig | None = None,
        experts_per_tok: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.capacity = capacity if capacity is not None else CapacityConfig()
        self.experts_per_tok = experts_per_tok
        self.activation_checkpointing = activation_checkpointing
        self._dispatcher = dispatcher

    def forward(
        self,
        x_BSD: Tensor,
        context: RouterContext,
        *,
        experts: Experts | None = None,
        use_shared_expert: bool = True,
    ) -> tuple[Tensor, list[Routing]]:
        """Return (y_BSD, the routings of this layer).

        Args:
            experts: the pool, for a layer that has none of its own.
            use_shared_expert: False leaves the shared expert out, for rounds of a chain after the first.
        """
        pool = experts if experts is not None else self.experts
        assert pool is not None, "a layer without experts of its own needs a pool"
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        routing = self.router(x_TD, context)
        routing = drop(routing, self.capacity, experts_per_tok=self.experts_per_tok, is_training=self.training)
        assignment = routing.assignment if routing.kept is None else routing.kept
        plan = self._dispatcher.plan(assignment, num_tokens=x_TD.shape[0])
        shared_expert = self.shared_expert if use_shared_expert else None
        if self.activation_checkpointing and self.training:
            y_TD = checkpoint(self._run, x_TD, plan, pool, shared_expert, use_reentrant=False, preserve_rng_state=False)
        else:
            y_TD = self._run(x_TD, plan, pool, shared_expert)
        if routing.identity_weight_T is not None:
            # experts that compute nothing give back their input; it never leaves its rank
            y_TD = y_TD + (routing.identity_weight_T.unsqueeze(1) * x_TD).to(y_TD.dtype)
        if routing.added_TD is not None:
            y_TD = y_TD + routing.added_TD.to(y_TD.dtype)
        return y_TD.reshape(x_BSD.shape), [routing]

    def _run(self, x_TD: Tensor, plan: Plan, pool: Experts, shared_expert: nn.Module | None) -> Tensor:
        x_RD, received = self._dispatcher.dispatch(x_TD, plan)
        y_TD = self._dispatcher.combine(pool(x_RD, received), plan)
        if shared_expert is not None:
            y_TD = y_TD + shared_expert(x_TD)
        return y_TD
