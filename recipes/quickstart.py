"""The first run: a sparse MoE of about 7 million parameters on real text, in about five minutes on two CPU cores.

    python recipes/quickstart.py
    torchrun --nproc-per-node 2 recipes/quickstart.py --parallel.ep-size 2

Four domains (Python, English prose, maths, C++), so that experts have something to specialise in.
"""

from moe.balance.load import BalanceConfig
from moe.data.batching import BatchConfig
from moe.data.prepare import DataConfig
from moe.model import ModelConfig
from moe.recipe import Recipe, main
from moe.routers.topk import TopKConfig
from moe.train.optimizer import OptimizerConfig
from moe.train.schedule import ScheduleConfig, TrainerConfig


def quickstart() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="quickstart",
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=256,
            qk_norm="head",
            router=TopKConfig(norm_topk_prob=True),
        ),
        data=DataConfig(vocab_size=4096),
        batch=BatchConfig(global_sequences=16, micro_sequences=8, sequence_length=256),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        schedule=ScheduleConfig(warmup_steps=40),
        balance=BalanceConfig(z_coefficient=0.001),
        trainer=TrainerConfig(steps=400, log_every=10, eval_every=100, save_every=100),
    )


if __name__ == "__main__":
    main(quickstart())
