"""The quickstart with experts that pairs of layers share, in pools that grow during the run (arXiv 2510.17483).

    python recipes/pretrain_cross_layer.py
    python recipes/pretrain_cross_layer.py --model.reuse.group-size 4
    python recipes/pretrain_cross_layer.py --model.reuse.schedule none        everything open from the first step

As many experts as in the quickstart, and twice as many for a token to choose from once the pools are open.
"""

from dataclasses import replace

from moe.recipe import Recipe, main
from moe.routers.cross_layer import ReuseConfig
from quickstart import quickstart


def pretrain_cross_layer() -> Recipe:
    """Return the recipe: pools of 2 x 16 experts, which open from 21 % to 63 % of the run as in the paper."""
    base = quickstart()
    reuse = ReuseConfig(group_size=2, schedule="linear")
    return replace(base, name="cross-layer", model=replace(base.model, reuse=reuse))


if __name__ == "__main__":
    main(pretrain_cross_layer())
