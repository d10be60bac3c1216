"""A small dense model on the built-in text: something to upcycle where nothing can be downloaded.

    python recipes/dense_small.py
    moe export-hf runs/dense-small runs/dense-small/hf --verify        # a Qwen3 folder of transformers
    python recipes/upcycle_dense.py runs/dense-small/hf

Attention, widths and text of the quickstart, with one feed-forward in the place of two active experts.
"""

from dataclasses import replace

from moe.recipe import Recipe, main
from quickstart import quickstart


def dense_small() -> Recipe:
    """Return the recipe."""
    base = quickstart()
    model = replace(base.model, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0, intermediate_size=512)
    return replace(base, name="dense-small", model=model)


if __name__ == "__main__":
    main(dense_small())
