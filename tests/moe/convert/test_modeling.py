"""MoeForCausalLM: what only our model can express, through transformers' own doors."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from moe.balance.statistics import collect
from moe.blocks.chain import ChainConfig
from moe.convert.modeling import MoeConfig, MoeForCausalLM, to_transformers
from moe.routers.cross_layer import ReuseConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from tiny import tiny_config, tiny_model, tiny_tokens

FORMS = {
    "top-k": {},
    "dynamic confidence": {"router": DynamicConfidenceConfig(target_experts_per_tok=1.5)},
    "zero experts": {"router": ZeroExpertsConfig(num_identity_experts=2, num_constant_experts=1)},
    "selection bias": {"router": TopKConfig(use_selection_bias=True, scoring_func="sigmoid")},
    "chain": {"chain": ChainConfig(rounds=2)},
    "cross-layer": {"reuse": ReuseConfig(group_size=2), "tie_word_embeddings": True},
}

LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 6,
}
PADDED_FORMS = {
    **FORMS,
    "window and sinks": {"sliding_window": 4, "full_attention_interval": 2, "attention_sinks": True},
    "window": {"sliding_window": 3},
    "latent": LATENT,
}


def model_of(form: str) -> MoeForCausalLM:
    model = to_transformers(tiny_model(tiny_config(**PADDED_FORMS[form]), seed=3), eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.add_(0.01 if "bias" in name else 0.3)
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_wrapping_a_model_changes_no_weight_and_no_logit(form):
    plain, wrapped = tiny_model(tiny_config(**FORMS[form]), seed=3), tiny_model(tiny_config(**FORMS[form]), seed=3)
    with torch.no_grad():
        for model in (plain, wrapped):
            for buffer in model.buffers():
                buffer.zero_()
    model = to_transformers(wrapped).eval()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.model.parameters(), strict=True))
    assert model.model is wrapped
    tokens = tiny_tokens(2, 11)
    assert torch.equal(model(tokens).logits, plain.eval()(tokens)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_model_loads_through_the_auto_classes_to_the_bit(tmp_path, form):
    model = model_of(form)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoeConfig)
    assert config.model_config == model.model.config
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = tiny_tokens(2, 11)
    # the weights to the bit; the loaded model runs its experts by another backend than the one made for tests
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_fresh_process_loads_it_offline_without_remote_code(tmp_path):
    model_of("dynamic confidence").save_pretrained(tmp_path)
    code = (
        "import sys, moe.convert.modeling; from transformers import AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert answer.stdout.split()[-1] == "MoeForCausalLM"


@pytest.mark.parametrize("form", ["selection bias", "dynamic confidence"])
def test_bfloat16_leaves_what_routers_learn_in_float32(tmp_path, form):
    model = model_of(form)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    state = dict(model.named_buffers())
    assert state
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, state[name])


@pytest.mark.parametrize("form", FORMS)
def test_generation_with_a_cache_equals_generation_without(form):
    model = model_of(form)
    prompt = tiny_tokens(2, 5)
    answers = [
        model.generate(prompt, max_new_tokens=20, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert answers[0].shape == (2, 25)
    assert torch.equal(*answers)
    beams = model.generate(prompt, max_new_tokens=8, do_sample=False, num_beams=3)
    assert beams.shape == (2, 13)


def test_padding_to_the_right_changes_nothing_and_within_a_text_is_refused():
    model, tokens = model_of("top-k"), tiny_tokens(2, 9)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    padded = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(padded[0], model(tokens[:1]).logits[0])
    torch.testing.assert_close(padded[1, :5], model(tokens[1:, :5]).logits[0])
    with pytest.raises(ValueError, match="padding between tokens"):
        model(tokens, attention_mask=torch.tensor([[1] * 9, [1] * 5 + [0] * 3 + [1]]))
    with pytest.raises(ValueError, match="one flag per token"):
        model(tokens, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="input_ids only"):
        model(inputs_embeds=torch.zeros(1, 2, 20))


PROMPT_LENGTHS = (2, 9, 5, 1)


def padded_to_the_left() -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts of unequal length, the same as one batch, and its mask. Padding is a token that texts use too."""
    width = max(PROMPT_LENGTHS)
    texts = [tiny_tokens(1, length, seed=length) for length in PROMPT_LENGTHS]
    batch = torch.cat([torch.nn.functional.pad(text, (width - text.shape[1], 0), value=7) for text in texts])
    mask = torch.cat([torch.arange(width)[None] >= width - text.shape[1] for text in texts])
    return texts, batch, mask.long()


@pytest.mark.parametrize("form", PADDED_FORMS)
def test_a_batch_padded_to_the_left_generates_as_its_prompts_do_one_by_one(form):
    model = model_of(form)
    texts, batch, mask = padded_to_the_left()
    answers = model.generate(batch, attention_mask=mask, max_new_tokens=14, do_sample=False)
    for text, answer in zip(texts, answers, strict=True):
        alone = model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=14, do_sample=False)
        assert answer[-14:].tolist() == alone[0, -14:].tolist()
    # without positions and cache too
    logits = model(batch, attention_mask=mask, use_cache=False).logits
    for text, own in zip(texts, logits, strict=True):
        torch.testing.assert_close(own[-text.shape[1] :], model(text).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["top-k", "dynamic confidence", "zero experts", "chain", "cross-layer"])
def test_padding_to_the_left_is_neither_dispatched_nor_counted(form):
    model = model_of(form)
    texts, batch, mask = padded_to_the_left()
    seen = []
    model.model.register_forward_hook(lambda _module, _arguments, output: seen.append(output[1]))
    model(batch, attention_mask=mask)
    (padded,) = seen
    alone = [model.model(text)[1] for text in texts]
    for routing in padded:
        is_row = routing.assignment.expert_N < routing.assignment.num_experts
        assert mask.flatten()[routing.assignment.token_N[is_row]].all()
    counted = [collect(own).tokens_per_expert_LE for own in alone]
    assert collect(padded, num_sequences=len(texts)).tokens_per_expert_LE.equal(sum(counted))


def test_training_on_texts_padded_to_the_left_has_their_gradients_with_recomputation_too():
    texts, batch, mask = padded_to_the_left()
    # padding predicts nothing, and nothing predicts the first token of a text
    labels = batch.masked_fill(mask.cumsum(1) < 2, -100)
    gradients = []
    for is_recomputed in (False, True):
        model = model_of("window and sinks").train()
        if is_recomputed:
            model.gradient_checkpointing_enable()
        model(batch, attention_mask=mask, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    model = model_of("window and sinks").train()
    total = sum(PROMPT_LENGTHS) - len(PROMPT_LENGTHS)
    for text in texts:
        if text.shape[1] > 1:
            (model(text, labels=text).loss * (text.shape[1] - 1) / total).backward()
    for parameter, *found in zip(model.parameters(), *gradients, strict=True):
        for gradient in found:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_trainer_trains_it_with_recomputation_and_losses_on_routing(tmp_path):
    model = to_transformers(tiny_model(seed=3), router_aux_loss_coef=0.01, router_z_loss_coef=1e-3)
    data = [{"input_ids": row, "labels": row} for row in tiny_tokens(8, 12)]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    assert all(block.activation_checkpointing for block in model.model.layers)


def test_losses_on_routing_have_their_coefficients_and_recomputation_changes_no_gradient():
    tokens = tiny_tokens(2, 12)
    results = {}
    for name, coefficients in {
        "none": {},
        "balance": {"router_aux_loss_coef": 1.0},
        "z": {"router_z_loss_coef": 1.0},
    }.items():
        model = to_transformers(tiny_model(), **coefficients).train()
        results[name] = model(tokens, labels=tokens)
    num_moe_layers = 2
    assert results["none"].aux_loss == 0
    assert 0.5 * num_moe_layers < results["balance"].aux_loss < 3 * num_moe_layers
    assert results["z"].aux_loss > 0
    torch.testing.assert_close(results["balance"].loss, results["none"].loss + results["balance"].aux_loss)
    gradients = []
    for is_on in (False, True):
        model = to_transformers(tiny_model(), router_aux_loss_coef=0.1).train()
        if is_on:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("form", ["dynamic confidence", "chain", "cross-layer"])
def test_lora_on_experts_trains_and_merges(form):
    peft = pytest.importorskip("peft")
    model, tokens = model_of(form), tiny_tokens(2, 12)
    before = model(tokens).logits
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        if form != "cross-layer"
        else ["pools.0.gate_up_proj", "pools.0.down_proj"],
    )
    adapted = peft.get_peft_model(model, config)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora" in name for name in trainable)
    assert any("experts" in name or "pools" in name for name in trainable)
    torch.testing.assert_close(adapted(tokens).logits, before)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = adapted(tokens).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_an_architecture_that_cannot_be_built_is_refused_by_field(tmp_path):
    config = MoeConfig.of(tiny_config())
    with pytest.raises(ValueError, match="num_experts_per_tok = 99"):
        MoeForCausalLM(MoeConfig(architecture={**config.architecture, "num_experts_per_tok": 99}))
    with pytest.raises(ValueError, match="no_such_field"):
        MoeConfig(architecture={**config.architecture, "no_such_field": 1})
    with pytest.raises(ValueError, match="needs `architecture`"):
        MoeForCausalLM(MoeConfig())
    model_of("top-k").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"]["num_experts"] == written["num_experts"] == tiny_config().num_experts
    assert replace(tiny_config()) == AutoConfig.from_pretrained(tmp_path).model_config
