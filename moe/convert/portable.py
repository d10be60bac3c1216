"""Export of what no architecture of transformers expresses: our own code beside the weights, for machines without us.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Code in a model folder runs with the rights of whoever loads it, so transformers runs it only if told to. Tensors keep
our names and stacks, behind "model.".
"""

import json
from pathlib import Path

import torch

from moe.checkpoint import CheckpointReader, write_json_atomic
from moe.checkpoint.stream import Entry
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.folder import appearing, copy_tokenizer, special_ids, write_shards
from moe.convert.modeling import MoeConfig, MoeForCausalLM, MoeModel
from moe.convert.sources import ENTRY_FILE, LIBRARIES, flat_sources
from moe.model import Model
from moe.parallel.groups import ParallelGroups

MODEL_TYPE = MoeConfig.model_type
ARCHITECTURE = MoeForCausalLM.__name__
AUTO_MAP = {
    "AutoConfig": f"{ENTRY_FILE}.{MoeConfig.__name__}",
    "AutoModel": f"{ENTRY_FILE}.{MoeModel.__name__}",
    "AutoModelForCausalLM": f"{ENTRY_FILE}.{ARCHITECTURE}",
}


def export_portable(
    config: ModelConfig, reader: CheckpointReader, out: Path, *, tokenizer_dir: Path, shard_bytes: int
) -> None:
    """Write a checkpoint of ours, whatever its model, as a folder that transformers loads with trust_remote_code.

    Raises ConversionError before anything is written, for a checkpoint of another model.
    """
    with torch.device("meta"):
        model = Model(config, groups=ParallelGroups.single())
    parameters = dict(model.named_parameters())
    kept = {name: f"{'model' if name in parameters else 'buffer'}/{name}" for name in model.state_dict()}
    missing = sorted(set(kept.values()) - reader.names)
    if missing:
        raise ConversionError(f"{reader.path} does not hold {missing[0]} and {len(missing) - 1} more: another model")
    entries = [
        Entry(name=f"model.{name}", dtype=reader.dtype(kept[name]), shape=tuple(value.shape))
        for name, value in model.state_dict().items()
    ]
    with appearing(out) as folder:
        if tokenizer_dir.is_dir():
            copy_tokenizer(tokenizer_dir, folder)
        _write_config(folder, config, reader)
        write_shards(folder, entries, (reader.read(name) for name in kept.values()), shard_bytes)
        for name, text in flat_sources().items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(_card(config, reader), encoding="utf-8")


def _write_config(folder: Path, config: ModelConfig, reader: CheckpointReader) -> None:
    special = special_ids(folder)
    dtype = str(reader.dtype("model/embed_tokens.weight")).removeprefix("torch.")
    fields = json.loads(MoeConfig.of(config, **special).to_json_string())
    fields |= {**special, "architectures": [ARCHITECTURE], "auto_map": AUTO_MAP, "dtype": dtype, "torch_dtype": dtype}
    write_json_atomic(folder / "config.json", fields)
    write_json_atomic(folder / "generation_config.json", {"_from_model_config": True, **special})


def _card(config: ModelConfig, reader: CheckpointReader) -> str:
    return (
        f"# {ARCHITECTURE}\n\nExported by moe-train from step {reader.step} of a run: {config.num_hidden_layers} "
        f"layers of width {config.hidden_size}, {config.num_experts} experts. Its code is in the Python files beside "
        "this one, which transformers runs on loading if told to trust them:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```\n\n"
        f"It needs {', '.join(LIBRARIES)}; moe-train need not be installed. Experts run in plain torch, on CPUs and "
        "NVIDIA GPUs; with moe-train installed, `import moe.convert.modeling` in place of trust_remote_code runs them "
        "in its Triton kernels.\n"
    )
