"""Routers: modules that choose experts for tokens. One file each, found through `ROUTERS`.

A router is two things: a frozen configuration (what a recipe holds and the command line edits) and the module it
builds. The configuration is what is registered; its `kind` is the name in recipe.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import TypeAdapter, WrapSerializer, WrapValidator
from torch import Tensor, nn

from moe.routing import RouterContext, Routing
from moe_kernels.registry import Registry


class Router(nn.Module):
    """Chooses experts for tokens. Moves nothing, sums nothing over ranks, stores nothing in forward."""

    num_candidates: int  # experts it may choose among (its layer's, or those of a group of layers)

    def forward(self, x_TD: Tensor, context: RouterContext) -> Routing:
        """Return the routing of T tokens. Everything up to the weights is computed in float32."""
        raise NotImplementedError

    def end_step(self, tokens_per_expert_E: Tensor, context: RouterContext, *, num_tokens: int) -> None:
        """Learn from the step's global counts, once per optimizer step: selection bias, thresholds, opening of a pool.

        Args:
            tokens_per_expert_E: int64, over the whole global batch.
            num_tokens: valid tokens of the global batch.
        """


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of all router configurations."""

    __pydantic_config__ = {"extra": "forbid"}
    kind: ClassVar[str]
    is_causal: ClassVar[bool] = True  # the choice for a token looks at no later one
    balances_itself: ClassVar[bool] = False  # loads are even by construction; a load-balancing loss would only disturb
    only_for_training: ClassVar[tuple[str, ...]] = ()  # fields that a trained model does not depend on
    may_drop: ClassVar[bool] = True  # a capacity makes sense: nothing in the router counts on every row being run

    def validate(self, *, num_experts: int, num_experts_per_tok: int) -> None:
        """Raise ValueError with the value, the limit and the remedy if the router cannot be built.

        Here: K must lie in 1..E. Kinds add what is theirs, and replace this where K means something else.
        """
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok = {num_experts_per_tok} must lie in 1..num_experts = {num_experts}")

    def check_learns(self, *, num_experts_per_tok: int) -> None:
        """Raise ValueError with the remedy if the language-model loss gives the router no gradient: do not train it so.

        A router that was fitted (moe.upcycle.ridge) may well be of that kind.
        """

    def mean_experts_per_tok(self, num_experts_per_tok: int) -> float:
        """Return how many experts the average token runs, as far as the configuration says: what plans count with."""
        return num_experts_per_tok

    def meaning(self) -> "RouterConfig":
        """Return the configuration with what only steers training at its defaults: equal ones route alike."""
        default = type(self)()
        return replace(self, **{name: getattr(default, name) for name in self.only_for_training})

    def check_can_close_experts(self) -> None:
        """Raise ValueError with the remedy unless the router obeys RouterContext.open_E (growing pools)."""
        raise ValueError(
            f"router kind {self.kind!r} cannot leave closed experts out, which model.reuse.schedule asks for; use kind "
            "'topk', or model.reuse.schedule = 'none'"
        )

    def build(self, *, hidden_size: int, num_experts: int, num_experts_per_tok: int, layer_index: int) -> Router:
        """Return the router of one layer, weights uninitialised."""
        raise NotImplementedError


NONCAUSAL = (
    "router kind {kind!r} is not causal: {why}. A language model trained with it sees the future, and cannot be "
    "sampled as it was trained; choose another router, or say router.allow_noncausal = True"
)

C = TypeVar("C", bound=RouterConfig)
ROUTERS: Registry[type[RouterConfig]] = Registry("router", package=__name__)


def register(kind: str) -> Callable[[type[C]], type[C]]:
    """Return a class decorator that files a RouterConfig under `kind` and tells the class its name."""

    def add(config: type[C]) -> type[C]:
        config.kind = kind
        ROUTERS.register(kind)(config)
        return config

    return add


# pydantic picks the wrong member of an undiscriminated union and drops fields of subclasses, so the field goes through
# the registry in both directions
def _read(value: Any, _handler: Any) -> RouterConfig:
    if isinstance(value, RouterConfig):
        return value
    if not isinstance(value, dict) or "kind" not in value:
        raise ValueError(f"a router is an object with a 'kind' among {', '.join(ROUTERS)}, not {value!r}")
    kind = value["kind"]
    if kind not in ROUTERS:
        raise ValueError(f"router kind {kind!r} is unknown; known are {', '.join(ROUTERS)}")
    return TypeAdapter(ROUTERS[kind]).validate_python({name: v for name, v in value.items() if name != "kind"})


def _write(value: RouterConfig, _handler: Any) -> dict[str, Any]:
    return {"kind": value.kind, **{field.name: getattr(value, field.name) for field in fields(value)}}


AnyRouter = Annotated[RouterConfig, WrapValidator(_read), WrapSerializer(_write)]
