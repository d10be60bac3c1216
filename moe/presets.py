"""Model configurations of published architectures, from the config.json of their checkpoints.

Context length, balance coefficients and the like belong to a recipe; the router's score and weights belong
here.
"""

from moe.blocks.chain import ChainConfig
from moe.model import ModelConfig
from moe.routers.cross_layer import ReuseConfig
from moe.routers.topk import TopKConfig


def mixtral_8x7b() -> ModelConfig:
    """Return Mixtral-8x7B (arXiv 2401.04088): 46.7B parameters, 12.9B active."""
    return ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=14336,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        router=TopKConfig(norm_topk_prob=True),
    )


def olmoe_1b_7b() -> ModelConfig:
    """Return OLMoE-1B-7B (arXiv 2409.02060): 6.9B parameters, 1.3B active."""
    return ModelConfig(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=1024,
        qk_norm="full",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        router=TopKConfig(norm_topk_prob=False),
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Return Qwen3-30B-A3B (arXiv 2505.09388): 30.5B parameters, 3.3B active."""
    return ModelConfig(
        vocab_size=151936,
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        intermediate_size=6144,
        qk_norm="head",
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        router=TopKConfig(norm_topk_prob=True),
    )


def coe() -> ModelConfig:
    """Return CoE-2(4/64) (arXiv 2506.18945): 4 layers, two rounds of 4 of 63 experts, one shared expert more.

    Experts, routers and norms are the published ones, with the residual of the released code, which a model of your
    own should not take over (chain.residual). The paper's attention is DeepSeek-V2's latent attention, which this
    framework does not have; here it is ordinary attention with as many heads. Vocabulary as in DeepSeek-V2-Lite.
    """
    return ModelConfig(
        vocab_size=102400,
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        num_experts=63,
        num_experts_per_tok=4,
        moe_intermediate_size=704,
        shared_expert_intermediate_size=704,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        router=TopKConfig(norm_topk_prob=False),
        chain=ChainConfig(rounds=2, residual="release"),
    )


def rexmoe() -> ModelConfig:
    """Return ReXMoE 2.3B-A0.3B with R4 (arXiv 2510.17483): 32 layers of 64 experts, 256 to choose from in each.

    Pools grow as in the paper: any experts, drawn at every step, and their scores set to zero. Vocabulary of LLaMA-2.
    """
    return ModelConfig(
        vocab_size=32000,
        hidden_size=512,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=744,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        router=TopKConfig(norm_topk_prob=False),
        reuse=ReuseConfig(group_size=4, schedule="linear", keep="random", mask="zero_score"),
    )
