"""Do harder tokens take more experts? "Harder Tasks Need More Experts" (arXiv 2403.07652) in small.

    python benchmarks/papers/dynamic_confidence.py                 # 5 variants x 2 texts x 3 seeds, one core
    python benchmarks/papers/dynamic_confidence.py --steps 50 --seeds 0 --no-record

The paper: with threshold 0.4, 1.76 experts a token on average do better than 2 fixed ones (42.3 against 41.6 points),
harder tasks use more of them (1.87 against 1.72), and without the entropy loss the mean rises from 1.8 to 2.0. Here:
8 experts, 500 steps; fixed top-1 and top-2 beside threshold 0.4 without and with the entropy loss, and the variant that
holds the mean at 1.5. Equal tokens; compute is what experts_last and mflops say.
"""

import tyro
from pictures import count_panels, draw_panels
from study import IMAGES, Options, run_study
from toy import Variant

from moe.balance.load import BalanceConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig

VARIANTS = {
    "top-1": Variant(router=TopKConfig(), num_experts_per_tok=1),
    "top-2": Variant(router=TopKConfig()),
    "0.4": Variant(router=DynamicConfidenceConfig(threshold=0.4)),
    "0.4 entropy": Variant(
        router=DynamicConfidenceConfig(threshold=0.4), balance=BalanceConfig(coefficient=0.01, entropy_coefficient=1e-2)
    ),
    "held at 1.5": Variant(router=DynamicConfidenceConfig(threshold=0.4, target_experts_per_tok=1.5)),
}


def main(options: Options) -> None:
    """Run the study, print and draw."""
    rows, points = run_study("dynamic_confidence", VARIANTS, options)
    if options.record:
        panels = count_panels({"held at 1.5": 1.5})
        draw_panels(IMAGES / "dynamic_confidence.png", rows, points, panels, width=11)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
