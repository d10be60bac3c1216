"""Do identity experts pay? The budget of LongCat-Flash (arXiv 2509.01322) in small.

    python benchmarks/papers/zero_experts.py                  # 4 variants x 3 seeds, one core
    python benchmarks/papers/zero_experts.py --steps 20 --seeds 0

The report: the mean number of real experts settles at its target (8 of 12 choices) and stays within 1 %, while single
tokens differ by about 3; at equal compute the loss is below that of the same model without identity experts. Here: 8
real and 4 identity experts, 4 choices, target 2, beside fixed top-2 (equal compute) and top-4 (equal choices), and the
same without a target. Easy and hard sequences mixed (toy.py), 500 steps.
"""

from pathlib import Path

import tyro
from toy import Variant, study

from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig

RESULTS = Path(__file__).parents[1] / "results/zero_experts.csv"
VARIANTS = {
    "top-2": Variant(router=TopKConfig()),
    "top-4": Variant(router=TopKConfig(), num_experts_per_tok=4),
    "8+4 no target": Variant(router=ZeroExpertsConfig(), num_experts_per_tok=4),
    "8+4 target 2": Variant(router=ZeroExpertsConfig(target_experts_per_tok=2.0), num_experts_per_tok=4),
}


def main(seeds: tuple[int, ...] = (0, 1, 2), steps: int = 500, resume: bool = False) -> None:
    """Run the study and append rows to results/zero_experts.csv."""
    study(VARIANTS, RESULTS, seeds=seeds, steps=steps, resume=resume)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
