"""A few seconds of training on a tiny model: the run to try a change with, and the one the layout tests use.

    python recipes/debug.py
    torchrun --nproc-per-node 2 recipes/debug.py --parallel.ep-size 2

Small and gentle on purpose (learning rate 1e-3, 512 tokens a step, fixed seed): over the first steps, fp32 runs on any
layout agree to rounding.
"""

from moe.data.batching import BatchConfig
from moe.data.prepare import DataConfig
from moe.model import ModelConfig
from moe.recipe import Recipe, main
from moe.routers.topk import TopKConfig
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig, TrainerConfig


def debug() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="debug",
        model=ModelConfig(
            vocab_size=1024,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            router=TopKConfig(norm_topk_prob=True),
        ),
        data=DataConfig(vocab_size=1024, builtin_bytes=200_000),
        batch=BatchConfig(global_sequences=8, micro_sequences=2, sequence_length=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=2),
        trainer=TrainerConfig(steps=100, log_every=10, eval_sequences=16),
    )


if __name__ == "__main__":
    main(debug())
