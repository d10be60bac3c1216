"""Import and export: folders of transformers to model folders of ours and back, tensor by tensor.

Names and configurations are held against each other before the first byte is read, and the folder appears under its
name only when it is complete. Memory is bounded by a few tensors: a model is never held whole.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from moe.checkpoint import CheckpointReader, write_json_atomic
from moe.checkpoint.manifest import DTYPES
from moe.checkpoint.model_folder import write_model
from moe.checkpoint.stream import Entry
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.families import Family
from moe.convert.folder import appearing, copy_tokenizer, special_ids, write_shards
from moe.convert.names import FAMILIES, Names, Part, to_ours, to_theirs
from moe.convert.portable import ARCHITECTURE, MODEL_TYPE, export_portable

# keys of a config.json that change no number in a forward pass of ours
_HARMLESS = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "attention_dropout",
    "router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "ep_size",
    "max_window_layers", "num_nextn_predict_layers", "rope_theta", "rope_scaling", "pretraining_tp", "_name_or_path",
    "num_local_experts", "num_experts", "topk_method", "scoring_func", "moe_layer_freq", "head_dim", "num_layers",
    "partial_rotary_factor",
}  # fmt: skip


class HuggingFaceFolder:
    """A checkpoint of transformers on disk: its configuration and its safetensors files, read by name.

    Raises ConversionError for a folder that holds no such thing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "config.json").is_file():
            raise ConversionError(f"{path} is no folder of a transformers model: it holds no config.json")
        self.raw: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model_type = self.raw.get("model_type")
        if model_type not in FAMILIES:
            raise ConversionError(f"{path}: model_type = {model_type!r} is not one of {', '.join(FAMILIES)}")
        self.family = FAMILIES[model_type]
        self.theirs = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        self._check_fields()
        self.files = self._open()

    @property
    def names(self) -> set[str]:
        """Tensors in the files."""
        return set(self.files)

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.files[name].get_tensor(name)

    def slice(self, name: str) -> Any:
        """Return shape and dtype of a tensor without reading it."""
        return self.files[name].get_slice(name)

    def _check_fields(self) -> None:
        known = set(self.family.config().to_dict()) | _HARMLESS
        strange = sorted(name for name in self.raw if name not in known)
        if strange:
            raise ConversionError(
                f"{self.path / 'config.json'} has fields that {self.family.model_type} does not know: "
                f"{', '.join(strange)}; what they change would be lost"
            )

    def _open(self) -> dict[str, Any]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (self.path / "model.safetensors").is_file():
            shards = ["model.safetensors"]
        else:
            raise ConversionError(f"{self.path} holds no model.safetensors; convert pickled weights with transformers")
        files: dict[str, Any] = {}
        for shard in shards:
            if Path(shard).name != shard:
                raise ConversionError(f"{index} names {shard!r}, which is outside of its folder")
            try:
                file = safe_open(self.path / shard, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{self.path / shard} cannot be read: {error}") from error
            files |= dict.fromkeys(file.keys(), file)
        return files


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of transformers with the names by which ours is made of it; made by `open_source`, audited."""

    folder: HuggingFaceFolder
    config: ModelConfig
    names: Names

    @property
    def entries(self) -> list[Entry]:
        """The tensors of ours, in the order in which `tensors` brings them; each in the dtype of its source."""
        return [
            Entry(name=name, dtype=self._dtype(name), shape=tuple(shape)) for name, shape in self.names.shapes.items()
        ]

    def tensors(self) -> Iterator[Tensor]:
        """Yield our tensors one by one."""
        for name in self.names.shapes:
            yield self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Return one of our tensors. Raises ConversionError for a part of another shape."""
        ours = torch.empty(self.names.shapes[name], dtype=self._dtype(name))
        for part in self.names.parts[name]:
            value = to_ours(part, self.folder.read(part.theirs), self.config)
            region = part.region(ours)
            if value.shape != region.shape:
                raise ConversionError(
                    f"{part.theirs} is {tuple(value.shape)} where the configuration says {tuple(region.shape)}"
                )
            region.copy_(value)
        return ours

    def _dtype(self, name: str) -> torch.dtype:
        # what routers learn in thousandths stays float32
        if name.startswith("buffer/"):
            return torch.float32
        return DTYPES[self.folder.slice(self.names.parts[name][0].theirs).get_dtype()]


def open_source(path: Path) -> Source:
    """Return a folder of transformers, with every tensor accounted for. Reads headers only.

    Raises ConversionError for what our model does not have, and for tensors that are missing or that nothing reads.
    """
    folder = HuggingFaceFolder(path)
    config = folder.family.to_ours(folder.theirs)
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in folder.names)
    names = Names.of(config, folder.family, is_fused=is_fused)
    ignored = {"lm_head.weight": "tied to the embedding"} if config.tie_word_embeddings else {}
    names.audit(folder.names, ignored)
    return Source(folder=folder, config=config, names=names)


def import_hf(path: Path, out: Path) -> ModelConfig:
    """Write a folder of transformers as a model of ours; return its configuration.

    Raises ConversionError before anything is written, for what cannot be converted, and for an `out` that exists.
    """
    source = open_source(path)
    with appearing(out) as folder:
        write_model(folder, source.config, source.entries, source.tensors(), origin=source.folder.family.model_type)
        copy_tokenizer(path, folder / "tokenizer")
    return source.config


def choose_family(config: ModelConfig, name: str = "auto") -> tuple[Family, PreTrainedConfig]:
    """Return the first family that expresses a model exactly, or the one named.

    Raises ConversionError saying, for each family tried, what it cannot express.
    """
    if name != "auto" and name not in FAMILIES:
        raise ConversionError(f"--family {name!r} is unknown; known are auto, {', '.join((*FAMILIES, MODEL_TYPE))}")
    candidates = [family for family in FAMILIES.values() if family.is_moe == (config.num_experts > 0)]
    refusals = []
    for family in candidates if name == "auto" else [FAMILIES[name]]:
        try:
            return family, family.to_theirs(config)
        except ConversionError as error:
            refusals.append(f"{family.model_type}: {error}")
    raise ConversionError(
        f"no architecture of transformers expresses this model; --family {MODEL_TYPE} writes it with our own code.\n  "
        + "\n  ".join(refusals)
    )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export has become."""

    model_type: str
    architecture: str  # class that loads it
    has_own_code: bool = False  # our files beside the weights, which need trust_remote_code


def export_hf(
    config: ModelConfig,
    reader: CheckpointReader,
    out: Path,
    *,
    tokenizer_dir: Path,
    family_name: str = "auto",
    shard_bytes: int = 2 << 30,
) -> Exported:
    """Write a checkpoint of ours as a folder that plain transformers loads; return what it has become.

    Per-expert names, which every server understands; configuration with both spellings of the keys that changed. What
    no architecture expresses goes out with our own code, in our names.

    Args:
        family_name: of an architecture, "moe_train" for our own code, or "auto" for the first that does.

    Raises ConversionError before anything is written, for a model that the family named cannot express.
    """
    try:
        chosen = None if family_name == MODEL_TYPE else choose_family(config, family_name)
    except ConversionError:
        if family_name != "auto":
            raise
        chosen = None
    if chosen is None:
        export_portable(config, reader, out, tokenizer_dir=tokenizer_dir, shard_bytes=shard_bytes)
        return Exported(model_type=MODEL_TYPE, architecture=ARCHITECTURE, has_own_code=True)
    family, theirs = chosen
    names = Names.of(config, family)
    missing = sorted(set(names.shapes) - reader.names)
    if missing:
        raise ConversionError(f"{reader.path} does not hold {missing[0]} and {len(missing) - 1} more: another model")
    with appearing(out) as folder:
        if tokenizer_dir.is_dir():
            copy_tokenizer(tokenizer_dir, folder)
        _write_config(folder, family, theirs, config, reader)
        _write_weights(folder, names, config, family, reader, shard_bytes)
        (folder / "README.md").write_text(_card(family, config, reader), encoding="utf-8")
    return Exported(model_type=family.model_type, architecture=family.architecture)


def _write_weights(
    folder: Path, names: Names, config: ModelConfig, family: Family, reader: CheckpointReader, shard_bytes: int
) -> None:
    # the shape of a part is found on the meta device, by turning an empty region
    parts = [(name, part) for name, list_ in names.parts.items() for part in list_]
    entries = []
    for name, part in parts:
        empty = part.region(torch.empty(names.shapes[name], device="meta"))
        shape = tuple(to_theirs(part, empty, config, family).shape)
        entries.append(Entry(name=part.theirs, dtype=reader.dtype(name), shape=shape))
    dtype = reader.dtype("model/embed_tokens.weight")
    entries += [Entry(name=name, dtype=dtype, shape=shape) for name, shape in names.unused.items()]

    def tensor(name: str, part: Part) -> Tensor:
        if part.expert is None:
            ours = part.region(reader.read(name))
        else:
            ours = reader.read(name, offset=part.expert, length=1)[0][slice(*part.rows)]
        return to_theirs(part, ours, config, family).contiguous()

    def tensors() -> Iterator[Tensor]:
        for name, part in parts:
            yield tensor(name, part)
        for shape in names.unused.values():
            yield torch.zeros(shape, dtype=dtype)

    write_shards(folder, entries, tensors(), shard_bytes)


def _write_config(
    folder: Path, family: Family, theirs: PreTrainedConfig, config: ModelConfig, reader: CheckpointReader
) -> None:
    dtype = str(reader.dtype("model/embed_tokens.weight")).removeprefix("torch.")
    special = special_ids(folder)
    # through JSON, where the keys of its tables are text
    fields = {
        **json.loads(theirs.to_json_string(use_diff=False)),
        **special,
        "model_type": family.model_type,
        "rope_theta": config.rope_theta,
    }
    fields |= {"dtype": dtype, "torch_dtype": dtype}
    rope = fields["rope_parameters"]
    if rope["rope_type"] != "default":
        # or transformers 4 would leave positions as they are, and say nothing
        fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    for one, other in (("num_experts", "num_local_experts"),):
        for name, twin in ((one, other), (other, one)):
            if name in fields and twin not in fields:
                fields[twin] = fields[name]
    write_json_atomic(folder / "config.json", fields)
    write_json_atomic(folder / "generation_config.json", {"_from_model_config": True, **special})


def _card(family: Family, config: ModelConfig, reader: CheckpointReader) -> str:
    experts = f"{config.num_experts} experts, {config.num_experts_per_tok} per token" if config.num_experts else "dense"
    return (
        f"# {family.architecture}\n\nExported by moe-train from step {reader.step} of a run: "
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {experts}. Loads with\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)\n```\n"
    )
