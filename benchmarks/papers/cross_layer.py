"""Do layers gain from the experts of their neighbours? ReXMoE (arXiv 2510.17483) in small.

    python benchmarks/papers/cross_layer.py                        # 6 variants x 2 texts x 3 seeds, one core
    python benchmarks/papers/cross_layer.py --steps 50 --seeds 0 --no-record

Four MoE layers with 8 experts each, 2 per token. Groups of r layers choose among 8 r experts, with or without a pool
that grows (progressive scaling, linear, from 21 to 63 % of the run, as in the paper). The paper finds most of its gain
in growth and not in reuse, and lacks the plain model under the same mask, which is here:

    r = 1 masked     no reuse; of a layer's own 8 experts, 2, growing to 8, are open at a step, drawn at random: the
                     share that r = 4 with growth has open.

Equal tokens, equal experts per token; routers have r times as many rows, which mflops counts.
"""

import tyro
from pictures import differences, dots, draw_panels
from study import IMAGES, Options, run_study
from toy import Variant

from moe.routers.cross_layer import ReuseConfig
from moe.routers.topk import TopKConfig

GROWTH = {"schedule": "linear", "keep": "random"}


def variant(reuse: ReuseConfig, **changes: object) -> Variant:
    """Return four layers with top-2 routing."""
    return Variant(router=TopKConfig(), num_hidden_layers=4, reuse=reuse, **changes)


VARIANTS = {
    "r = 1": variant(ReuseConfig()),
    "r = 1 masked": variant(ReuseConfig(num_shares=4, **GROWTH)),
    "r = 2": variant(ReuseConfig(group_size=2)),
    "r = 2 growing": variant(ReuseConfig(group_size=2, **GROWTH)),
    "r = 4": variant(ReuseConfig(group_size=4)),
    "r = 4 growing": variant(ReuseConfig(group_size=4, **GROWTH)),
}


def main(options: Options) -> None:
    """Run the study, print and draw."""
    rows, points = run_study("cross_layer", VARIANTS, options, baseline="r = 1")
    if options.record:
        panels = {
            "training loss minus that of r = 1": lambda axes, rows, points: differences(axes, points, "r = 1"),
            "held-out loss, nats": lambda axes, rows, points: dots(axes, rows, lambda row: row.loss),
            "load max/mean - 1, 95th percentile": lambda axes, rows, points: dots(
                axes, rows, lambda row: row.load_tail
            ),
        }
        draw_panels(IMAGES / "cross_layer.png", rows, points, panels, width=11)


if __name__ == "__main__":
    main(tyro.cli(Options, default=Options(steps=400), description=__doc__))
