"""Draw what each router does with the same tokens: docs/images/routers/<kind>.png, a panel per registered router.

    python benchmarks/draw_routers.py

16 tokens from left to right, ever more doubtful, and 8 experts from top to bottom, the first favoured: their logits
are random and the same for all. A square is a row that runs, the darker the larger its weight; bars above count the
experts of a token, bars on the right the tokens of an expert.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib
import torch

from moe.routers import ROUTERS
from moe.routing import RouterContext, Routing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parents[1] / "docs/images/routers"
T, E, K = 16, 8, 2
FORMS: dict[str, dict[str, Any]] = {"zero_experts": {"num_identity_experts": 4}}


def route(kind: str) -> Routing:
    """Return the routing of the 16 tokens; a router that learns a count or a bias is drawn as it starts."""
    allow = {field.name: True for field in fields(ROUTERS[kind]) if field.name == "allow_noncausal"}
    config = ROUTERS[kind](**allow, **FORMS.get(kind, {}))
    router = config.build(hidden_size=E + 4, num_experts=E, num_experts_per_tok=K, layer_index=0)
    draw = torch.Generator().manual_seed(4)
    logits_TS = torch.randn(T, E + 4, generator=draw) * torch.linspace(4.0, 0.4, T).unsqueeze(1)
    logits_TS[:, 0] += 1.0
    if kind == "relu":
        logits_TS -= 1.0  # as after some training: most logits are negative
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.eye(*parameter.shape))
        return router(logits_TS, RouterContext(position_T=torch.arange(T), token_T=torch.arange(T)))


def draw(kind: str) -> Path:
    """Draw one router and return the file."""
    rows = route(kind).assignment
    used_N = rows.expert_N < E
    weight_ET = torch.zeros(E, T)
    weight_ET[rows.expert_N[used_N], rows.token_N[used_N]] = rows.weight_N[used_N]
    is_run_ET = weight_ET > 0
    figure, axes = plt.subplots(
        2, 2, figsize=(4.2, 2.1), dpi=110, width_ratios=(6, 1), height_ratios=(1, 3.4), sharex="col", sharey="row"
    )
    (above, corner), (matrix, right) = axes
    corner.axis("off")
    shade_ET = torch.where(is_run_ET, 0.25 + 0.75 * (weight_ET / weight_ET.max()).sqrt(), torch.nan)
    matrix.pcolormesh(shade_ET.numpy(), cmap="Blues", vmin=0, vmax=1, edgecolors="#e4e4e4", linewidth=0.5)
    matrix.invert_yaxis()
    matrix.set(xticks=[], yticks=[], xlabel="tokens, confident to doubtful", ylabel="experts")
    above.bar(torch.arange(T) + 0.5, is_run_ET.sum(0), color="#6b8fb8", width=0.7)
    above.set(yticks=[0, int(is_run_ET.sum(0).max())], title=kind)
    right.barh(torch.arange(E) + 0.5, is_run_ET.sum(1), color="#6b8fb8", height=0.7)
    right.set(xticks=[0, int(is_run_ET.sum(1).max())])
    for axis in (above, matrix, right):
        axis.tick_params(labelsize=7, length=2)
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout(pad=0.4)
    path = FOLDER / f"{kind}.png"
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in ROUTERS:
        print(draw(name))
