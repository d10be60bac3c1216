"""OLMoE-1B-7B (arXiv 2409.02060) from scratch: the published architecture and batch, laid out for 8 GPUs.

    python recipes/pretrain_olmoe_1b_7b.py --dry-run --world-size 8        what it needs; starts nothing
    torchrun --nproc-per-node 8 recipes/pretrain_olmoe_1b_7b.py \
        --data.sources text /path/to/text --data.tokenizer /path/to/tokenizer

Text and tokenizer are yours: folders of text, JSONL, parquet, a Hugging Face dataset, or Megatron token files.
Not yet run on 8 GPUs; steps of its layers on one are in docs/performance.md.
"""

from moe.balance.load import BalanceConfig
from moe.data.batching import BatchConfig
from moe.data.prepare import DataConfig
from moe.parallel.groups import ParallelConfig
from moe.presets import olmoe_1b_7b
from moe.recipe import Recipe, main
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig, TrainerConfig


def pretrain_olmoe_1b_7b() -> Recipe:
    """Return the recipe: 1,024 sequences of 4,096 tokens a step, about 5 trillion tokens."""
    return Recipe(
        name="olmoe-1b-7b",
        model=olmoe_1b_7b(),
        data=DataConfig(sources={"text": "text"}, tokenizer="tokenizer"),
        batch=BatchConfig(global_sequences=1024, micro_sequences=4, sequence_length=4096),
        optimizer=OptimizerConfig(learning_rate=4e-4, weight_decay=0.1),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=2000, min_ratio=0.1),
        # the paper's 0.01 is a mean over 16 layers; ours sums over layers
        balance=BalanceConfig(coefficient=0.01 / 16, z_coefficient=0.001 / 16),
        parallel=ParallelConfig(ep_size=8, zero_stage=1, dtype="bf16", activation_checkpointing=True),
        trainer=TrainerConfig(steps=1_200_000, log_every=10, eval_every=1000, save_every=1000),
    )


if __name__ == "__main__":
    main(pretrain_olmoe_1b_7b())
