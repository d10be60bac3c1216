"""MoeForCausalLM: a model of ours behind the interface of transformers, for what none of its architectures can express.

    config, model = to_transformers(model)         # shares the weights
    model.save_pretrained(folder)                  # config.json and safetensors, expert stacks as they are
    import moe.convert.modeling                    # tells the Auto classes; then, without trust_remote_code,
    AutoModelForCausalLM.from_pretrained(folder)

The network is moe.model.Model itself, so every router, chain and shared pool works, `generate` with transformers' own
caches included. What belongs to training with our engine is not here: balance over the global batch, and the end of a
step that moves selection biases. Under the Trainer the coefficients of the configuration apply to one micro-batch.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from moe.balance.losses import frequency, load_balancing_loss, z_loss
from moe.balance.statistics import RouterStatistics, collect
from moe.blocks.block import RoutedBlock
from moe.blocks.cache import KeyValueCache, LayerCache
from moe.blocks.norm import RMSNorm
from moe.experts import Experts
from moe.initial import residual_std
from moe.layer import MoELayer
from moe.model import Model, ModelConfig
from moe.parallel.groups import ParallelGroups
from moe.routing import Routing

_ARCHITECTURE = TypeAdapter(ModelConfig)
# what other tools look for in a config.json; the truth is `architecture`
_MIRRORED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "num_experts",
    "num_experts_per_tok",
)
# the output's name for the cache, which changed within transformers 5
_CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(MoeCausalLMOutputWithPast)} else "past_key_values"


class MoeConfig(PreTrainedConfig):
    """Configuration: `architecture` is a ModelConfig as JSON, the coefficients are those of losses on routing.

    Raises:
        ValueError: the architecture has fields that are unknown or cannot be built.
    """

    model_type = "moe_train"

    def __init__(
        self,
        *,
        architecture: dict[str, Any] | None = None,
        router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        # transformers builds an empty configuration to see what differs from the defaults
        self.architecture = architecture
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.use_cache = kwargs.pop("use_cache", True)
        if architecture is not None:
            model = self.model_config
            for name in _MIRRORED:
                kwargs.pop(name, None)
                setattr(self, name, getattr(model, name))
        # tied weights are one parameter in Model, so there is nothing for transformers to tie
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        """The architecture, checked."""
        if self.architecture is None:
            raise ValueError("a MoeConfig needs `architecture`, a ModelConfig as JSON; to_transformers() makes one")
        config = _ARCHITECTURE.validate_python(self.architecture)
        config.validate()
        return config

    @classmethod
    def of(cls, config: ModelConfig, **kwargs: Any) -> "MoeConfig":
        """Return the configuration of a model; keyword arguments are transformers' (bos_token_id and the like)."""
        return cls(architecture=_ARCHITECTURE.dump_python(config, mode="json"), **kwargs)


class MoePreTrainedModel(PreTrainedModel):
    """What both models are: a moe.model.Model as `model`, and the cares of transformers about it."""

    config_class = MoeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "ShortcutBlock"]
    _supports_sdpa = True
    # state that steps in thousandths; routers keep it float32 under any cast, from_pretrained has to as well
    _keep_in_fp32_modules_strict = ["selection_bias", "threshold", "error_sum", "coefficient", "errors"]

    def __init__(self, config: MoeConfig, model: Model | None = None) -> None:
        super().__init__(config)
        self.model = model if model is not None else Model(config.model_config, groups=ParallelGroups.single())
        if model is not None:
            # or post_init would draw the weights anew
            for module in self.model.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = cast(nn.Linear, new_embeddings)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill new weights, as transformers asks for those that no file holds. moe.initial is what training uses."""
        config = self.config.model_config
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                is_output = name == "down_proj" and isinstance(module, Experts)
                parameter.normal_(std=residual_std(config) if is_output else config.initializer_range)
        for buffer in module.buffers(recurse=False):
            buffer.zero_()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute attention and experts in backward; routers are not, so a recompute cannot route differently."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"every_n_layers = {every_n_layers} and offload = {offload}: all layers or none, no offload"
            )
        self._set_recomputation(True)

    def activation_checkpointing_disable(self) -> None:
        """Keep everything for backward."""
        self._set_recomputation(False)

    # what these two are called in older releases of transformers 5
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Do as activation_checkpointing_enable does."""
        self._set_recomputation(True)

    def gradient_checkpointing_disable(self) -> None:
        """Do as activation_checkpointing_disable does."""
        self._set_recomputation(False)

    def _set_recomputation(self, is_on: bool) -> None:
        for module in self.modules():
            if isinstance(module, RoutedBlock | MoELayer):
                module.activation_checkpointing = is_on

    def _run(
        self,
        run: Callable[..., tuple[Tensor, list[Routing]]],
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, list[Routing], Cache | None]:
        """Return what the network or its body gives, its routings, and the cache to hand back."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError(f"{type(self).__name__} takes input_ids only: routers may look at the ids of tokens")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and not self.training and cache is None:
            cache = DynamicCache()
        valid_BS, first_B = _padding(attention_mask, input_ids.shape[1], cache)
        y_BSX, routings = run(
            input_ids,
            valid_BS=valid_BS,
            first_B=first_B,
            position_BS=position_ids,
            cache=None
            if cache is None
            else _CacheOfTransformers(cache, num_layers=self.model.config.num_attention_layers),
        )
        return y_BSX, routings, cache if use_cache else None


class MoeModel(MoePreTrainedModel):
    """Token ids in, the hidden states that the head would read out. The head is among its weights, unused."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Return the hidden states [B, S, D] after the last norm; arguments and errors as for MoeForCausalLM."""
        cache = past_key_values if cache is None else cache
        x_BSD, routings, cache = self._run(
            self.model.hidden, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache
        )
        output = MoeModelOutputWithPast(
            last_hidden_state=cast(torch.FloatTensor, x_BSD),
            router_logits=cast(Any, tuple(routing.logits_TE for routing in routings)),
        )
        if cache is not None:
            output[_CACHE_FIELD] = cache
        return output


class MoeForCausalLM(MoePreTrainedModel, GenerationMixin):
    """Token ids in, next-token logits out."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Return logits [B, S, V] and, with labels, the loss; arguments as in transformers' models.

        `cache` was called `past_key_values` in older releases of transformers 5; both names are understood.

        Raises:
            ValueError: embeddings in place of ids, or padding between the tokens of a text.
        """
        cache = past_key_values if cache is None else cache
        logits_BSV, routings, cache = self._run(
            self.model, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = logits_BSV[:, kept]
        loss = auxiliary = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BSV, labels=labels, vocab_size=logits_BSV.shape[-1], **kwargs)
            if routings and self.training:
                auxiliary = self._routing_loss(collect(routings, num_sequences=logits_BSV.shape[0]))
                loss = loss + auxiliary
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,
            logits=logits_BSV,
            router_logits=cast(Any, tuple(routing.logits_TE for routing in routings)),
        )
        if cache is not None:
            output[_CACHE_FIELD] = cache
        return output

    def _routing_loss(self, statistics: RouterStatistics) -> Tensor:
        num_tokens = statistics.num_tokens.clamp_min(1)
        balance_L = load_balancing_loss(frequency(statistics.tokens_per_expert_LE), statistics.prob_sum_LE, num_tokens)
        own = statistics.router_loss_sum_L.sum() / num_tokens
        z = z_loss(statistics.z_sum_L, num_tokens).sum()
        return self.config.router_aux_loss_coef * balance_L.sum() + self.config.router_z_loss_coef * z + own


class _LayerOfCache(LayerCache):
    """One layer of a cache of transformers, which holds the tensors: beams, crops and offloading stay its business."""

    def __init__(self, cache: Cache, index: int) -> None:
        self._cache, self._index = cache, index
        self.length = cache.get_seq_length(index)

    def append(self, key_BGSd: Tensor, value_BGSd: Tensor) -> tuple[Tensor, Tensor]:
        return self._cache.update(key_BGSd, value_BGSd, self._index)


class _CacheOfTransformers(KeyValueCache):
    def __init__(self, cache: Cache, *, num_layers: int) -> None:
        self.layers: list[LayerCache] = [_LayerOfCache(cache, index) for index in range(num_layers)]


def _padding(attention_mask: Tensor | None, num_new: int, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
    """Return (which of the new tokens are no padding, where each text begins), None for all of them and for 0."""
    if attention_mask is None:
        return None, None
    mask_BP = attention_mask.bool()
    num_all = num_new + (cache.get_seq_length() if cache is not None else 0)
    if mask_BP.dim() != 2 or mask_BP.shape[1] != num_all:
        raise ValueError(
            f"attention_mask is {list(mask_BP.shape)}; give one flag per token, those of the cache first: "
            f"[batch, {num_all}]"
        )
    if mask_BP.all():
        return None, None
    first_B = mask_BP.int().argmax(1)  # the first of the largest
    place_P = torch.arange(num_all, device=mask_BP.device)
    if (mask_BP != (place_P < (first_B + mask_BP.sum(1)).unsqueeze(1)) & (place_P >= first_B.unsqueeze(1))).any():
        raise ValueError(
            "attention_mask has padding between tokens of a text; pad prompts to the left to generate from them "
            "(tokenizer.padding_side = 'left')"
        )
    return mask_BP[:, -num_new:], first_B if first_B.any() else None


def to_transformers(model: Model, **kwargs: Any) -> MoeForCausalLM:
    """Return the model as a transformers model that shares its weights; `kwargs` go to MoeConfig."""
    return MoeForCausalLM(MoeConfig.of(model.config, **kwargs), model)


# not for the copy beside an exported model, which transformers finds by itself
if __name__ == "moe.convert.modeling":
    AutoConfig.register(MoeConfig.model_type, MoeConfig, exist_ok=True)
    AutoModel.register(MoeConfig, MoeModel, exist_ok=True)
    AutoModelForCausalLM.register(MoeConfig, MoeForCausalLM, exist_ok=True)
