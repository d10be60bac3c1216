"""Do identity experts pay? The budget of LongCat-Flash (arXiv 2509.01322) in small.

    python benchmarks/papers/zero_experts.py                       # 4 variants x 2 texts x 3 seeds, one core
    python benchmarks/papers/zero_experts.py --steps 50 --seeds 0 --no-record

The report: the mean number of real experts settles at its target (8 of 12 choices) and stays within 1 %, while single
tokens differ by about 3; at equal compute the loss is below that of the same model without identity experts. Here: 8
real and 4 identity experts, 4 choices, target 2, beside fixed top-2 (equal compute) and top-4 (equal choices), and the
same without a target; 500 steps.
"""

import tyro
from pictures import count_panels, draw_panels
from study import IMAGES, Options, run_study
from toy import Variant

from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig

VARIANTS = {
    "top-2": Variant(router=TopKConfig()),
    "top-4": Variant(router=TopKConfig(), num_experts_per_tok=4),
    "8+4 no target": Variant(router=ZeroExpertsConfig(), num_experts_per_tok=4),
    "8+4 target 2": Variant(router=ZeroExpertsConfig(target_experts_per_tok=2.0), num_experts_per_tok=4),
}


def main(options: Options) -> None:
    """Run the study, print and draw."""
    rows, points = run_study("zero_experts", VARIANTS, options)
    if options.record:
        panels = count_panels({"8+4 target 2": 2.0})
        draw_panels(IMAGES / "zero_experts.png", rows, points, panels, width=11)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
