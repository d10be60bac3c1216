"""Do harder tokens take more experts? "Harder Tasks Need More Experts" (arXiv 2403.07652) in small.

    python benchmarks/papers/dynamic_confidence.py            # 5 variants x 3 seeds, one core
    python benchmarks/papers/dynamic_confidence.py --steps 20 --seeds 0

The paper: with threshold 0.4, 1.76 experts a token on average do better than 2 fixed ones (42.3 against 41.6 points),
harder tasks use more of them (1.87 against 1.72), and without the entropy loss the mean rises from 1.8 to 2.0. Here:
easy and hard sequences mixed (toy.py), 8 experts, 500 steps; fixed top-1 and top-2 beside threshold 0.4 without and
with the entropy loss, and the variant that holds the mean at 1.5. Equal tokens; compute is what experts_last says.
"""

from pathlib import Path

import tyro
from toy import Variant, study

from moe.balance.load import BalanceConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig

RESULTS = Path(__file__).parents[1] / "results/dynamic_confidence.csv"
VARIANTS = {
    "top-1": Variant(router=TopKConfig(), num_experts_per_tok=1),
    "top-2": Variant(router=TopKConfig()),
    "0.4": Variant(router=DynamicConfidenceConfig(threshold=0.4)),
    "0.4 entropy": Variant(
        router=DynamicConfidenceConfig(threshold=0.4), balance=BalanceConfig(coefficient=0.01, entropy_coefficient=1e-2)
    ),
    "held at 1.5": Variant(router=DynamicConfidenceConfig(threshold=0.4, target_experts_per_tok=1.5)),
}


def main(seeds: tuple[int, ...] = (0, 1, 2), steps: int = 500, resume: bool = False) -> None:
    """Run the study and append rows to results/dynamic_confidence.csv."""
    study(VARIANTS, RESULTS, seeds=seeds, steps=steps, resume=resume)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
