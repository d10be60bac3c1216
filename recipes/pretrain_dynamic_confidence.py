"""The quickstart with a router that takes as many experts as a token needs (arXiv 2403.07652).

    python recipes/pretrain_dynamic_confidence.py
    python recipes/pretrain_dynamic_confidence.py --model.router.threshold 0.5
    python recipes/pretrain_dynamic_confidence.py --model.router.target-experts-per-tok 2     hold the mean at two

Watch moe/experts_per_token: it starts at max_k, as every token is in doubt, and falls as the router learns.
"""

from dataclasses import replace

from moe.recipe import Recipe, main
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from quickstart import quickstart


def pretrain_dynamic_confidence() -> Recipe:
    """Return the recipe: threshold 0.4 and entropy coefficient 1e-4 as in the paper, at most 4 experts a token."""
    base = quickstart()
    return replace(
        base,
        name="dynamic-confidence",
        model=replace(base.model, router=DynamicConfidenceConfig(threshold=0.4, max_k=4)),
        balance=replace(base.balance, entropy_coefficient=1e-4),
    )


if __name__ == "__main__":
    main(pretrain_dynamic_confidence())
