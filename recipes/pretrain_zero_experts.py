"""The quickstart with experts that compute nothing, so that tokens differ in what they cost (arXiv 2509.01322).

    python recipes/pretrain_zero_experts.py

Each token chooses three of 16 real and 8 identity experts; the bias holds the mean at two real ones, which is what
the quickstart computes. Watch moe/experts_per_token.
"""

from dataclasses import replace

from moe.recipe import Recipe, main
from moe.routers.zero_experts import ZeroExpertsConfig
from quickstart import quickstart


def pretrain_zero_experts() -> Recipe:
    """Return the recipe."""
    base = quickstart()
    router = ZeroExpertsConfig(num_identity_experts=8, target_experts_per_tok=2.0)
    return replace(base, name="zero-experts", model=replace(base.model, num_experts_per_tok=3, router=router))


if __name__ == "__main__":
    main(pretrain_zero_experts())
