"""Model configurations of published architectures, from the config.json of their checkpoints.

Context length, balance coefficients and the like belong to a recipe; the router's score and weights belong
here.
"""

from dataclasses import replace

from moe.blocks.chain import ChainConfig
from moe.blocks.rope import RopeScaling
from moe.model import ModelConfig
from moe.routers.cross_layer import ReuseConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.relu import ReLUConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig


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


def deepseek_v3() -> ModelConfig:
    """Return DeepSeek-V3 (arXiv 2412.19437) without its multi-token prediction: 671B parameters, 37B active."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        shared_expert_intermediate_size=2048,
        intermediate_size=18432,
        first_k_dense_replace=3,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        router=TopKConfig(
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            n_group=8,
            topk_group=4,
            use_selection_bias=True,
        ),
    )


def gpt_oss_20b() -> ModelConfig:
    """Return gpt-oss-20b (arXiv 2508.10925): 20.9B parameters, 3.6B active, which counts the table of tokens once."""
    return ModelConfig(
        vocab_size=201088,
        hidden_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_scaling=RopeScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False),
        tie_word_embeddings=False,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=2880,
        expert_activation="gpt_oss",
        expert_bias=True,
        attention_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        sliding_window=128,
        full_attention_interval=2,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        router=TopKConfig(softmax_after_topk=True, use_router_bias=True),
    )


def gpt_oss_120b() -> ModelConfig:
    """Return gpt-oss-120b (arXiv 2508.10925): 116.8B parameters, 5.1B active."""
    return replace(gpt_oss_20b(), num_hidden_layers=36, num_experts=128)


def longcat_flash() -> ModelConfig:
    """Return LongCat-Flash (arXiv 2509.01322): 28 shortcut-connected layers, 560B parameters, 27B active on average.

    12 choices among 512 experts and 256 that give the token back, 8 real ones on average. Without its multi-token
    prediction.
    """
    return ModelConfig(
        vocab_size=131072,
        hidden_size=6144,
        num_hidden_layers=28,
        num_attention_heads=64,
        num_key_value_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        scale_latents=True,
        is_shortcut_connected=True,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        num_experts=512,
        num_experts_per_tok=12,
        moe_intermediate_size=2048,
        intermediate_size=12288,
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        router=ZeroExpertsConfig(
            num_identity_experts=256, target_experts_per_tok=8.0, bias_update_rate=0.2, routed_scaling_factor=6.0
        ),
    )


def dynamic_moe() -> ModelConfig:
    """Return the model of "Harder Tasks Need More Experts" (arXiv 2403.07652): 3.5B parameters, 1.76 of 16 experts.

    The paper's loss goes with it: balance.frequency = "per_token", scope "micro", coefficient 1e-2, and
    entropy_coefficient 1e-4.
    """
    return ModelConfig(
        vocab_size=32000,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=2816,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        router=DynamicConfidenceConfig(threshold=0.4),
    )


def demons() -> ModelConfig:
    """Return a model like the 3.4B-A0.6B of "Demons in the Detail" (arXiv 2501.11873).

    Published are 64 experts of which 4 run, a shared one 4 times as wide, and the two sizes; widths and layers are
    ours, chosen to give both with Qwen's vocabulary. The paper's loss: balance.scope = "global", coefficient 0.008.
    """
    return ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        num_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=640,
        shared_expert_intermediate_size=4 * 640,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        router=TopKConfig(norm_topk_prob=False),
    )


def remoe() -> ModelConfig:
    """Return the 182M model of ReMoE (arXiv 2412.14711): 8 experts, one active on average, 777M parameters in all."""
    return ModelConfig(
        vocab_size=51200,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        num_experts=8,
        num_experts_per_tok=1,
        moe_intermediate_size=3072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        initializer_range=0.01,
        router=ReLUConfig(initial_coefficient=1e-8, update_factor=1.2),
    )


def coe() -> ModelConfig:
    """Return CoE-2(4/64) (arXiv 2506.18945): 4 layers, two rounds of 4 of 63 experts, one shared expert more.

    571,214,848 parameters without the embeddings, as published, with the residual of the released code, which a model
    of your own should not take over (chain.residual). Vocabulary as in DeepSeek-V2-Lite.
    """
    return ModelConfig(
        vocab_size=102400,
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
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
