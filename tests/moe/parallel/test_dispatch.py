"""Expert parallelism equals one process: outputs and every gradient of an MoE layer, in float64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.experts import Experts
from moe.layer import MoELayer
from moe.parallel.dispatch import AllToAllDispatcher, LocalDispatcher, make_dispatcher
from moe.parallel.groups import ParallelGroups
from moe.routers import Router
from moe.routing import Assignment, RouterContext, Routing

E, D, F, K = 4, 5, 7, 2

# tokens of rank 0, 1, 2, 3 and the experts each token goes to; E marks an unused row
CASES = {
    "balanced": [[(0, 1), (2, 3)], [(1, 2), (3, 0)], [(0, 2)], [(1, 3), (0, 1)]],
    "all to one expert": [[(2, 2)] * 3, [(2, 2)], [(2, 2)] * 2, [(2, 2)]],
    "a rank without tokens": [[], [(0, 3)], [(1, 2)], []],
    "no token anywhere": [[], [], [], []],
    "a rank that receives nothing": [[(0, 1)], [(1, 0)], [(0, 1)], [(1, 0)]],
    "padding": [[(0, 1), (E, E)], [(E, E)], [(3, E), (2, 1)], [(E, E), (0, 3)]],
    "same expert twice, both experts on one rank": [[(0, 0), (0, 1)], [(2, 3)], [(3, 3)], [(1, 1)]],
}


class FixedRouter(Router):
    """Sends tokens where the case says, with weights that depend on the input."""

    def __init__(self, expert_TK: Tensor) -> None:
        super().__init__()
        self.num_candidates = E
        self.expert_TK = expert_TK
        generator = torch.Generator().manual_seed(5)
        self.weight = torch.nn.Parameter(torch.randn(K, D, generator=generator, dtype=torch.float64))

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        weight_TK = torch.sigmoid(x_TD @ self.weight.t())
        assignment = Assignment(
            token_N=torch.arange(x_TD.shape[0]).repeat_interleave(K),
            expert_N=self.expert_TK.reshape(-1),
            weight_N=weight_TK.reshape(-1),
            num_experts=E,
            fan_out=K,
        )
        zeros_TE = torch.zeros(x_TD.shape[0], E)
        return Routing(assignment=assignment, logits_TE=zeros_TE, probs_TE=zeros_TE)


def run_layer(case: str, ranks: list[int], groups: ParallelGroups, checkpointing: bool) -> dict[str, Tensor]:
    """Output and gradients of the tokens of `ranks` on this process's share of the experts."""
    expert_TK = torch.tensor([pair for rank in ranks for pair in CASES[case][rank]], dtype=torch.int64).view(-1, K)
    x_all, up_all, starts = inputs(case)
    where = torch.cat([torch.arange(starts[rank], starts[rank + 1]) for rank in ranks])
    x_BSD = x_all[where].unsqueeze(0).requires_grad_()
    experts = Experts(num_experts=E, hidden_size=D, intermediate_size=F, groups=groups, backend="naive").double()
    first, count = experts.first_expert, experts.num_local_experts
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (experts.gate_up_proj, experts.down_proj):
            whole = torch.randn(E, *parameter.shape[1:], generator=generator, dtype=torch.float64)
            parameter.copy_(whole[first : first + count])
    layer = MoELayer(
        router=FixedRouter(expert_TK),
        dispatcher=make_dispatcher(groups, num_experts=E),
        experts=experts,
        activation_checkpointing=checkpointing,
    ).train()
    y_BSD, _ = layer(x_BSD, RouterContext())
    y_BSD.backward(up_all[where].unsqueeze(0))
    return {
        "y": y_BSD.detach()[0],
        "x": x_BSD.grad[0],
        "router": layer.router.weight.grad if layer.router.weight.grad is not None else torch.zeros(K, D),
        "gate_up": experts.gate_up_proj.grad,
        "down": experts.down_proj.grad,
    }


def inputs(case: str) -> tuple[Tensor, Tensor, list[int]]:
    counts = [len(tokens) for tokens in CASES[case]]
    generator = torch.Generator().manual_seed(3)
    x_all = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
    up_all = torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)
    return x_all, up_all, [sum(counts[:rank]) for rank in range(5)]


def on_rank(ep_size: int, checkpointing: bool) -> dict[str, dict[str, Tensor]]:
    groups = ParallelGroups.create(ep_size=ep_size, device=torch.device("cpu"))
    rank = dist.get_rank()
    tokens_per_rank = 4 // dist.get_world_size()
    mine = list(range(rank * tokens_per_rank, (rank + 1) * tokens_per_rank))
    return {case: run_layer(case, mine, groups, checkpointing) for case in CASES}


@pytest.mark.parametrize(
    ("world_size", "ep_size", "checkpointing"), [(2, 2, False), (4, 2, True), (4, 4, False), (4, 4, True)]
)
def test_layer_over_ranks_equals_one_process(pool, world_size, ep_size, checkpointing):
    parts = pool.run(on_rank, ep_size, checkpointing, world_size=world_size)
    for case in CASES:
        whole = run_layer(case, [0, 1, 2, 3], ParallelGroups.single(), False)
        ranks = [part[case] for part in parts]
        for name in ("y", "x"):
            torch.testing.assert_close(torch.cat([r[name] for r in ranks]), whole[name], msg=f"{case}: {name}")
        torch.testing.assert_close(sum(r["router"] for r in ranks), whole["router"], msg=f"{case}: router")
        for name in ("gate_up", "down"):
            # ranks of one expert group hold different experts; groups hold copies whose gradients add up
            copies = [torch.cat([r[name] for r in ranks[s : s + ep_size]]) for s in range(0, world_size, ep_size)]
            torch.testing.assert_close(sum(copies), whole[name], msg=f"{case}: {name}")


def count_rows(_: None) -> tuple[int, int]:
    """Rows sent by rank 0 for one token whose two experts live on one rank, and for one whose experts do not."""
    groups = ParallelGroups.create(ep_size=2, device=torch.device("cpu"))
    sizes = []
    for experts in ((2, 3), (0, 3)):
        assignment = Assignment(
            token_N=torch.tensor([0, 0]),
            expert_N=torch.tensor(experts),
            weight_N=torch.ones(2),
            num_experts=E,
            fan_out=2,
        )
        plan = make_dispatcher(groups, num_experts=E).plan(assignment, num_tokens=1)
        sizes.append(sum(plan.exchange.sent_rows))
    return tuple(sizes)


def test_a_token_travels_once_to_each_rank(pool):
    assert pool.run(count_rows, None, world_size=2) == [(1, 2), (1, 2)]


def test_one_rank_needs_no_all_to_all():
    assert isinstance(make_dispatcher(ParallelGroups.single(), num_experts=4), LocalDispatcher)


def test_experts_that_do_not_divide_are_refused():
    groups = ParallelGroups(rank=0, world_size=3, ep_size=3, ep_rank=0, edp_rank=0, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"ep_size = 3 does not divide the 4 experts .* use one of \[1, 2, 4\]"):
        make_dispatcher(groups, num_experts=4)
    assert isinstance(make_dispatcher(groups, num_experts=6), AllToAllDispatcher)
