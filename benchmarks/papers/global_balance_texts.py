"""Balance over the global batch on two texts, the built-in corpus among them (arXiv 2501.11873).

    python benchmarks/papers/global_balance_texts.py                 # 3 variants x 2 texts x 3 seeds, one core
    python benchmarks/papers/global_balance_texts.py --steps 50 --seeds 0 --no-record

global_balance.py tests the claim on text made for it. Here every micro-batch of a step holds one kind of text (four
domains of the corpus; easy and hard chains), top-2 of 8 experts, 500 steps, coefficient 0.05. The paper: balance within
micro-batches keeps experts from specialising and costs loss, 8.167 against 8.038 perplexity. Equal tokens and compute.
"""

import dataclasses

import tyro
from pictures import differences, dots, draw_panels
from study import IMAGES, Options, run_study
from texts import KINDS
from toy import Variant

from moe.balance.load import BalanceConfig
from moe.routers.topk import TopKConfig

COEFFICIENT = 0.05


def variants(text: str) -> dict[str, Variant]:
    """Return the variants: as many micro-batches as the text has kinds."""
    kinds = len(KINDS[text])
    return {
        name: Variant(router=TopKConfig(), balance=balance, micro_batches=kinds)
        for name, balance in {
            "micro": BalanceConfig(scope="micro", coefficient=COEFFICIENT),
            "global": BalanceConfig(scope="global", coefficient=COEFFICIENT),
            "none": BalanceConfig(scope="micro", coefficient=0.0),
        }.items()
    }


def main(options: Options) -> None:
    """Run the study text by text, print and draw."""
    rows, points = [], []
    for text in options.texts:
        more, curve = run_study(
            "global_balance_texts", variants(text), dataclasses.replace(options, texts=(text,)), baseline="micro"
        )
        rows += more
        points += curve
    if options.record:
        panels = {
            "training loss minus that of micro": lambda axes, rows, points: differences(axes, points, "micro"),
            "held-out loss, nats": lambda axes, rows, points: dots(axes, rows, lambda row: row.loss),
            "load max/mean - 1 of a step": lambda axes, rows, points: dots(axes, rows, lambda row: row.load_violation),
        }
        draw_panels(IMAGES / "global_balance_texts.png", rows, points, panels, width=11)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
