"""Add an expert to a model whose router was fitted: one more branch, its text, and nothing of the others again.

Attention, norms and embeddings stay as they are, so the sums that the router was made of stay true, and the result is
what upcycling all branches at once onto the same rest would have given. (A rest that is the mean of all branches would
change with each, and with it every router input; to have that, upcycle all branches anew.)
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint import CheckpointReader, open_model_folder
from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.model_folder import write_model
from moe.config import ModelConfig
from moe.convert import ConversionError
from moe.convert.folder import appearing, copy_tokenizer
from moe.routers.topk import TopKConfig
from moe.upcycle import AddExpertConfig
from moe.upcycle.dense import DenseModel, entries_of, open_dense
from moe.upcycle.fit import Texts, collect, dense_model
from moe.upcycle.run import solve
from moe.upcycle.statistics import FittedRouter, RidgeStatistics


def add_expert(path: Path, branch: Path, out: Path, config: AddExpertConfig) -> ModelConfig:
    """Write the model in `path` with one more expert; return its configuration. It appears complete or not at all.

    Raises ConversionError for a model whose router was not fitted, a branch that is not like it, and for text that
    cannot be read.
    """
    try:
        model, reader = open_model_folder(path)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    known, penalty, temperature = RidgeStatistics.load(path)
    dense = open_dense(branch)
    _check_alike(model, dense)
    new = model.num_experts
    target = replace(model, num_experts=new + 1)
    texts = Texts.of(
        (config.text,),
        tokenizer_dir=path / "tokenizer",
        cache_dir=config.cache_dir,
        sequence_length=min(config.text_length, model.max_position_embeddings),
        tokens=config.text_tokens,
    )
    # the new branch, but for what the model has of its own: all that is no expert
    own = dense_model(dense.config, lambda name: reader.read(name) if name in reader.names else dense.tensor(name))
    statistics = known.widened()
    collect(statistics, own, domain=new, layers=model.moe_layers, texts=texts, text=0)
    has_bias = isinstance(model.router, TopKConfig) and model.router.use_router_bias
    routers = solve(statistics, model.moe_layers, penalty=penalty, has_bias=has_bias)
    with appearing(out) as folder:
        like = replace(dense, dtypes={name: reader.dtype(name) for name in reader.names})
        entries = entries_of(target, like)
        tensors = _tensors(target, [entry.name for entry in entries], reader, dense, routers, temperature)
        write_model(folder, target, entries, tensors, origin="expert added")
        copy_tokenizer(path / "tokenizer", folder / "tokenizer")
        statistics.save(folder, penalty=penalty, temperature=temperature)
    return target


def _tensors(
    target: ModelConfig,
    names: list[str],
    reader: CheckpointReader,
    dense: DenseModel,
    routers: dict[int, FittedRouter],
    temperature: float,
) -> Iterator[Tensor]:
    for name in names:
        layer, found, part = name.removeprefix("model/layers.").partition(".moe.")
        if not found:
            yield reader.read(name)
        elif part.startswith("router."):
            fitted = routers[int(layer)]
            value = {"router.weight": fitted.weight_CD, "router.bias": fitted.bias_C}[part]
            yield (value / temperature).to(reader.dtype(name))
        else:
            made = dense.feed_forward(int(layer))
            expert = made.down_DF if part == "experts.down_proj" else torch.cat((made.gate_FD, made.up_FD))
            yield torch.cat((reader.read(name), expert.to(reader.dtype(name)).unsqueeze(0)))


def _check_alike(model: ModelConfig, dense: DenseModel) -> None:
    """Refuse a branch of other widths, and a model that is more than whole feed-forwards of branches."""
    if model.shared_expert_intermediate_size or model.moe_intermediate_size != dense.config.intermediate_size:
        raise ConversionError(
            f"experts of width {model.moe_intermediate_size} beside a shared expert of width "
            f"{model.shared_expert_intermediate_size} do not take a feed-forward of width "
            f"{dense.config.intermediate_size}; only experts that are whole feed-forwards can be added to"
        )
    # what the model would be without experts
    rest = replace(
        model,
        num_experts=0,
        num_experts_per_tok=0,
        moe_intermediate_size=0,
        intermediate_size=dense.config.intermediate_size,
        router=dense.config.router,
        first_k_dense_replace=dense.config.first_k_dense_replace,
        decoder_sparse_step=dense.config.decoder_sparse_step,
        mlp_only_layers=dense.config.mlp_only_layers,
    )
    differences = dense.config.differences(rest)
    if differences:
        raise ConversionError(f"{dense.path} is another architecture than the model: {'; '.join(differences)}")
