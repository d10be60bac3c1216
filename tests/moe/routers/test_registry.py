"""Router configurations go through the registry to JSON and back, and wrong ones are refused by name."""

from dataclasses import dataclass, field

import pytest
from pydantic import TypeAdapter, ValidationError

from moe.routers import ROUTERS, AnyRouter, RouterConfig
from moe.routers.topk import TopKConfig


@dataclass(frozen=True, kw_only=True)
class Holder:
    __pydantic_config__ = {"extra": "forbid"}
    router: AnyRouter = field(default_factory=TopKConfig)


ADAPTER = TypeAdapter(Holder)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_every_router_survives_json(kind):
    holder = Holder(router=ROUTERS[kind]())
    text = ADAPTER.dump_json(holder)
    assert ADAPTER.validate_json(text) == holder
    assert f'"kind":"{kind}"' in text.decode()


def test_fields_of_the_subclass_are_kept():
    holder = Holder(router=TopKConfig(norm_topk_prob=True, routed_scaling_factor=2.5))
    assert ADAPTER.validate_python(ADAPTER.dump_python(holder, mode="json")) == holder


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "topp"}, "router kind 'topp' is unknown; known are .*topk"),
        ({"norm_topk_prob": True}, "'kind' among"),
        ({"kind": "topk", "norm_topk": True}, "norm_topk"),
        ({"kind": "topk", "n_group": "many"}, "n_group"),
    ],
)
def test_wrong_routers_are_refused_by_name(value, message):
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python({"router": value})


def test_kind_is_told_to_the_class():
    assert issubclass(ROUTERS["topk"], RouterConfig)
    assert TopKConfig.kind == "topk"
