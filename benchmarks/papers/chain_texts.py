"""Chain of experts (arXiv 2506.18945) on text: two rounds of 2 of 8 experts beside one round of 4.

    python benchmarks/papers/chain_texts.py                        # 3 variants x 2 texts x 3 seeds, one core
    python benchmarks/papers/chain_texts.py --steps 50 --seeds 0 --no-record

chain.py asks the same of a task made for it. The paper: 1.20 to 1.12 nats on MetaMathQA after 1000 steps. Equal tokens,
equal expert operations (moe.counts.match_compute: +0.0 %); the second router is what mflops adds.
"""

import tyro
from pictures import differences, dots, draw_panels
from study import IMAGES, Options, run_study
from toy import Variant

from moe.blocks.chain import ChainConfig
from moe.routers.topk import TopKConfig

VARIANTS = {
    "MoE 4/8": Variant(router=TopKConfig(), num_experts_per_tok=4),
    "CoE-2 2/8": Variant(router=TopKConfig(), chain=ChainConfig(rounds=2)),
    "shared router": Variant(router=TopKConfig(), chain=ChainConfig(rounds=2, has_shared_router=True)),
}


def main(options: Options) -> None:
    """Run the study, print and draw."""
    rows, points = run_study("chain_texts", VARIANTS, options, baseline="MoE 4/8")
    if options.record:
        panels = {
            "training loss minus that of MoE 4/8": lambda axes, rows, points: differences(axes, points, "MoE 4/8"),
            "held-out loss, nats": lambda axes, rows, points: dots(axes, rows, lambda row: row.loss),
        }
        draw_panels(IMAGES / "chain_texts.png", rows, points, panels, width=8)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
