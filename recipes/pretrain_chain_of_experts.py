"""The quickstart with a chain of experts: each block runs its experts twice, one expert a round (arXiv 2506.18945).

    python recipes/pretrain_chain_of_experts.py
    python recipes/pretrain_chain_of_experts.py --model.num-experts-per-tok 2      two rounds of two

A token runs as many experts as in the quickstart, the second one on what the first one made of it.
"""

from dataclasses import replace

from moe.blocks.chain import ChainConfig
from moe.recipe import Recipe, main
from moe.routers.topk import TopKConfig
from quickstart import quickstart


def pretrain_chain_of_experts() -> Recipe:
    """Return the recipe. Weights are not normalised: that of a single expert would always be one."""
    base = quickstart()
    model = replace(
        base.model, num_experts_per_tok=1, router=TopKConfig(norm_topk_prob=False), chain=ChainConfig(rounds=2)
    )
    return replace(base, name="chain-of-experts", model=model)


if __name__ == "__main__":
    main(pretrain_chain_of_experts())
