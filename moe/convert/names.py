"""Names: which tensors of a checkpoint of transformers make up which of ours, as a bijection that can be audited.

Every tensor of ours is a list of parts, each one tensor of theirs in a region of it: a whole tensor, or for stacks of
experts the rows of one expert. Import reads parts into tensors, export tensors into parts, by the same list.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    Dots1Config,
    Glm4MoeConfig,
    GptOssConfig,
    LlamaConfig,
    LongcatFlashConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from moe.config import ModelConfig
from moe.convert import ConversionError, fields
from moe.convert.families import Family
from moe.model import Model
from moe.parallel.groups import ParallelGroups

_SIGMOID = (
    (".moe.router.selection_bias", ".mlp.gate.e_score_correction_bias"),
    (".moe.shared_expert.", ".mlp.shared_experts."),
)
_LATENT = ((".kv_a_proj.", ".kv_a_proj_with_mqa."), ("_a_norm.", "_a_layernorm."))
_COMMON = (
    (".moe.router.", ".mlp.gate."),
    (".moe.shared_expert.sigmoid_gate.", ".mlp.shared_expert_gate."),
    (".moe.", ".mlp."),
    (".feed_forward.", ".mlp."),
    (".attention_norm.", ".input_layernorm."),
    (".feed_forward_norm.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
)
# transformers' own names for the parts of a layer that differ from _COMMON
_LONGCAT = (
    (".moe.router.selection_bias", ".mlp.router.e_score_correction_bias"),
    (".moe.router.", ".mlp.router.classifier."),
    (".feed_forward.", ".mlps."),
)
_MIXTRAL = ((".moe.router.", ".block_sparse_moe.gate."),)
_GPT_OSS = ((".moe.router.", ".mlp.router."),)
_ALL = (
    Family(
        model_type="llama",
        architecture="LlamaForCausalLM",
        config=LlamaConfig,
        read=fields.read_llama,
        write=fields.write_dense,
        experts="",
    ),
    Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        config=MistralConfig,
        read=fields.read_llama,
        write=fields.write_mistral,
        experts="",
    ),
    Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        config=Qwen2Config,
        read=fields.read_qwen2,
        write=fields.write_dense,
        experts="",
    ),
    Family(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        config=Qwen3Config,
        read=fields.read_qwen3,
        write=fields.write_dense,
        experts="",
    ),
    Family(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        config=MixtralConfig,
        read=fields.read_mixtral,
        write=fields.write_mixtral,
        experts="block_sparse_moe.experts.{e}.{w1,w3,w2}",
        renames=_MIXTRAL,
    ),
    Family(
        model_type="olmoe",
        architecture="OlmoeForCausalLM",
        config=OlmoeConfig,
        read=fields.read_olmoe,
        write=fields.write_olmoe,
    ),
    Family(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        config=Qwen2MoeConfig,
        read=fields.read_qwen_moe,
        write=fields.write_qwen2_moe,
        shared_expert="always, with gate",
    ),
    Family(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        config=Qwen3MoeConfig,
        read=fields.read_qwen_moe,
        write=fields.write_qwen_moe,
    ),
    Family(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        config=DeepseekV3Config,
        read=fields.read_deepseek,
        write=fields.write_deepseek,
        renames=_SIGMOID + _LATENT,
        turns_pairs=True,
        shared_expert="always",
    ),
    Family(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        config=Glm4MoeConfig,
        read=fields.read_glm,
        write=fields.write_glm,
        renames=_SIGMOID,
        shared_expert="always",
    ),
    Family(
        model_type="dots1",
        architecture="Dots1ForCausalLM",
        config=Dots1Config,
        read=fields.read_dots,
        write=fields.write_dots,
        renames=_SIGMOID,
        shared_expert="always",
    ),
    Family(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        config=GptOssConfig,
        read=fields.read_gpt_oss,
        write=fields.write_gpt_oss,
        experts="mlp.experts",
        renames=_GPT_OSS,
        is_gpt_oss=True,
    ),
    Family(
        model_type="longcat_flash",
        architecture="LongcatFlashForCausalLM",
        config=LongcatFlashConfig,
        read=fields.read_longcat,
        write=fields.write_longcat,
        renames=_LONGCAT + _LATENT,
        turns_pairs=True,
        has_unused_experts=True,
    ),
)
FAMILIES = {family.model_type: family for family in _ALL}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A tensor of theirs as a region of one of ours: all of it, or one expert, or some of that expert's rows."""

    theirs: str
    expert: int | None = None
    rows: tuple[int, int | None] = (0, None)  # first, end
    form: str = "same"

    def region(self, ours: Tensor) -> Tensor:
        """Return the view of our tensor that this part fills."""
        return (ours if self.expert is None else ours[self.expert])[slice(*self.rows)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Names:
    """How a model and its counterpart in transformers correspond."""

    shapes: dict[str, torch.Size]  # our parameters and learned buffers, by their names in a checkpoint of ours
    parts: dict[str, list[Part]]
    unused: dict[str, tuple[int, ...]]  # tensors of theirs that a file holds and no computation reads

    @classmethod
    def of(cls, config: ModelConfig, family: Family, *, is_fused: bool = False) -> "Names":
        """Return the names of a model of the family.

        Args:
            is_fused: the experts of a layer are one stack in the file, as transformers holds them in memory.
        """
        with torch.device("meta"):
            model = Model(config, groups=ParallelGroups.single())
        shapes = {f"model/{name}": parameter.shape for name, parameter in model.named_parameters()}
        shapes |= {f"buffer/{name}": buffer.shape for name, buffer in model.named_buffers()}
        parts = {key: _parts(key, shape, config, family, is_fused) for key, shape in shapes.items()}
        unused = _unused_shared(config, family) | ({} if is_fused else _unused_experts(parts, shapes, config, family))
        return cls(shapes=shapes, parts=parts, unused=unused)

    def audit(self, found: set[str], ignored: dict[str, str]) -> None:
        """Raise ConversionError unless every tensor of theirs is used exactly once and none is missing.

        Args:
            found: names in the files.
            ignored: names that may be there and are not read, with the reason.
        """
        counts = Counter(part.theirs for parts in self.parts.values() for part in parts)
        twice = [name for name, count in counts.items() if count > 1]
        assert not twice, f"{twice} are used more than once: the table of names is wrong"
        missing = sorted(set(counts) - found)
        extra = sorted(found - set(counts) - set(ignored) - set(self.unused))
        if missing or extra:
            raise ConversionError(
                f"the tensors are not those of this model: {len(missing)} missing{_some(missing)}, {len(extra)} that "
                f"nothing reads{_some(extra)}"
            )


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def _parts(key: str, shape: torch.Size, config: ModelConfig, family: Family, is_fused: bool) -> list[Part]:
    name = key.partition("/")[2]
    if ".moe.experts." in name:
        return _expert_parts(name, shape, config, family, is_fused)
    form = "same"
    if family.turns_pairs and name.endswith(("q_proj.weight", "q_b_proj.weight")):
        form = "pairs of heads"
    elif family.turns_pairs and name.endswith("kv_a_proj.weight"):
        form = "pairs at the end"
    # fused stacks are what transformers holds in memory, where Mixtral has the names of all others
    renames = () if is_fused and family.renames == _MIXTRAL else family.renames
    return [Part(theirs=_renamed(name, renames), form=form)]


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for ours, theirs in (*renames, *_COMMON):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _unused_shared(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the matrices of shared experts of width 0, where they are in the files."""
    if family.shared_expert == "if any" or config.shared_expert_intermediate_size:
        return {}
    D = config.hidden_size
    shapes = {"gate_proj": (0, D), "up_proj": (0, D), "down_proj": (D, 0)}
    if family.shared_expert == "always, with gate":
        shapes["sigmoid_gate"] = (1, D)
    return {
        _renamed(f"layers.{index}.moe.shared_expert.{name}.weight", family.renames): shape
        for index in config.moe_layers
        for name, shape in shapes.items()
    }


def _unused_experts(
    parts: dict[str, list[Part]], shapes: dict[str, torch.Size], config: ModelConfig, family: Family
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the matrices of experts that compute nothing, one by one."""
    count, found = num_unused_experts(config, family), {}
    for name, list_ in parts.items() if count else ():
        for part in list_ if ".experts." in name else ():
            # gate and up only: the stack of down matrices ends with the last real expert
            if part.expert == 0 and part.rows != (0, None):
                shape = tuple(part.region(torch.empty(shapes[name], device="meta")).shape)
                for e in range(config.num_experts, config.num_experts + count):
                    found[part.theirs.replace(".experts.0.", f".experts.{e}.")] = shape
    return found


def num_unused_experts(config: ModelConfig, family: Family) -> int:
    """Return how many experts a fused stack of theirs holds that compute nothing."""
    return getattr(config.router, "num_identity_experts", 0) if family.has_unused_experts else 0


def _expert_parts(name: str, shape: torch.Size, config: ModelConfig, family: Family, is_fused: bool) -> list[Part]:
    layer, _, tensor = name.partition(".moe.experts.")
    prefix = f"model.{layer}."
    if family.is_gpt_oss:
        form = {"gate_up_proj": "turned, in turns", "down_proj": "turned", "gate_up_proj_bias": "in turns"}
        return [Part(theirs=f"{prefix}{family.experts}.{tensor}", form=form.get(tensor, "same"))]
    if is_fused:
        is_padded = tensor == "gate_up_proj" and num_unused_experts(config, family) > 0
        return [Part(theirs=f"{prefix}mlp.experts.{tensor}", form="unused experts" if is_padded else "same")]
    stem, _, triple = family.experts.partition(".{e}.")
    gate, up, down = triple.strip("{}").split(",")
    parts = []
    for e in range(config.num_experts):
        where = f"{prefix}{stem}.{e}."
        if tensor == "down_proj":
            parts.append(Part(theirs=f"{where}{down}.weight", expert=e))
        else:
            F = shape[1] // 2
            parts.append(Part(theirs=f"{where}{gate}.weight", expert=e, rows=(0, F)))
            parts.append(Part(theirs=f"{where}{up}.weight", expert=e, rows=(F, 2 * F)))
    return parts


def to_ours(part: Part, theirs: Tensor, config: ModelConfig) -> Tensor:
    """Return a tensor of theirs in the form of its region in ours."""
    match part.form:
        case "pairs of heads":
            return _per_head(theirs, config, _halves)
        case "pairs at the end":
            kept = config.kv_lora_rank
            return torch.cat((theirs[:kept], _halves(theirs[kept:])))
        case "turned":
            return theirs.transpose(1, 2)
        case "turned, in turns":
            return _halves(theirs.transpose(1, 2))
        case "in turns":
            return _halves(theirs.unsqueeze(-1)).squeeze(-1)
        case "unused experts":
            return theirs[: config.num_experts]
    return theirs


def to_theirs(part: Part, ours: Tensor, config: ModelConfig, family: Family) -> Tensor:
    """Return a region of ours in the form in which they keep it: the inverse of to_ours."""
    match part.form:
        case "pairs of heads":
            return _per_head(ours, config, _pairs)
        case "pairs at the end":
            kept = config.kv_lora_rank
            return torch.cat((ours[:kept], _pairs(ours[kept:])))
        case "turned":
            return ours.transpose(1, 2)
        case "turned, in turns":
            return _pairs(ours).transpose(1, 2)
        case "in turns":
            return _pairs(ours.unsqueeze(-1)).squeeze(-1)
        case "unused experts":
            return torch.cat((ours, ours.new_zeros(num_unused_experts(config, family), *ours.shape[1:])))
    return ours


def _halves(rows: Tensor) -> Tensor:
    """Return rows [..., 2c, D] that take turns as two halves: 0, 2, 4, ..., then 1, 3, 5, ..."""
    return rows.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


def _pairs(rows: Tensor) -> Tensor:
    """Return two halves of rows as rows that take turns: the inverse of _halves."""
    return rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)


def _per_head(rows: Tensor, config: ModelConfig, turn) -> Tensor:
    """Turn the rotary rows, the last ones of each head of a query."""
    heads = rows.unflatten(0, (config.num_attention_heads, -1))
    kept = config.qk_nope_head_dim
    return torch.cat((heads[:, :kept], turn(heads[:, kept:])), dim=1).flatten(0, 1)
