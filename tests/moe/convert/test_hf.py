"""Import and export against transformers itself, and what a wrong file, field or name leads to."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_folders import FIELDS, make_model, save
from moe.checkpoint import CheckpointError, CheckpointReader, load_weights, read_model_config
from moe.cli import computed
from moe.convert import ConversionError
from moe.convert.hf import choose_family, export_hf, import_hf, open_source
from moe.convert.names import FAMILIES
from moe.convert.verify import verify_export
from moe.model import Model
from moe.parallel.groups import ParallelGroups
from moe.presets import coe, mixtral_8x7b
from moe.sample import generate
from tiny import assert_near, tiny_config, tiny_tokens

PLAIN = {"mlp_only_layers": (), "shared_expert_intermediate_size": 0}
STRETCHED = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {
    "llama": STRETCHED,
    "deepseek_v3": {**STRETCHED, "mscale": 1.0, "mscale_all_dim": 1.0},
    "gpt_oss": {**STRETCHED, "truncate": False},
}
CHECKPOINT = "checkpoints/step_00000000"


def reader_of(folder) -> CheckpointReader:
    return CheckpointReader.open(folder / CHECKPOINT)


def model_of(folder, dtype: torch.dtype = torch.float32) -> Model:
    model = Model(read_model_config(folder), groups=ParallelGroups.single()).to(dtype)
    load_weights(model, reader_of(folder))
    return model.eval()


def export(folder, out, **arguments):
    return export_hf(read_model_config(folder), reader_of(folder), out, tokenizer_dir=folder / "tokenizer", **arguments)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders by family and form, made when first asked for."""
    folders = {}

    def get(family: str, **changes):
        key = (family, str(changes))
        if key not in folders:
            folder = tmp_path_factory.mktemp(family)
            model = make_model(family, **changes)
            folders[key] = (save(model, folder / "hf"), model)
        return folders[key]

    return get


@pytest.mark.parametrize("family", [*FIELDS, *(f"{name} yarn" for name in YARN)])
def test_an_imported_model_is_the_same_and_its_export_too(made, tmp_path, family):
    family, _, form = family.partition(" ")
    folder, theirs = made(family, **({"rope_parameters": YARN[family]} if form else {}))
    import_hf(folder, tmp_path / "ours")
    ours, token = model_of(tmp_path / "ours"), tiny_tokens(2, 17, vocab_size=61)
    with torch.no_grad():
        expected = theirs(input_ids=token).logits
        logits = ours(token)[0]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        # what came in goes out, and plain transformers makes of it what it made before
        assert export(tmp_path / "ours", tmp_path / "out", family_name=family).model_type == family
        again, info = load(tmp_path / "out")
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(again(input_ids=token).logits, expected)
    import_hf(tmp_path / "out", tmp_path / "twice")
    first, second = reader_of(tmp_path / "ours"), reader_of(tmp_path / "twice")
    assert first.names == second.names
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.names)
    assert read_model_config(tmp_path / "ours") == read_model_config(tmp_path / "twice")
    prompt = token[0, :5].tolist()
    greedy = theirs.generate(token[:1, :5], max_new_tokens=32, do_sample=False)[0, 5:].tolist()
    assert generate(ours, prompt, max_new_tokens=32, temperature=0.0) == greedy


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("form", ["tied", "sharded", "bf16", "fused"])
def test_every_form_of_file_is_read(tmp_path, family, form):
    model = make_model(family, steps=3, tie_word_embeddings=form == "tied")
    dtype = torch.bfloat16 if form == "bf16" else torch.float32
    if form == "fused":
        model.save_pretrained(tmp_path / "hf", save_original_format=False)
    else:
        save(model, tmp_path / "hf", shard="20KB" if form == "sharded" else "5GB", dtype=dtype)
    if form == "sharded":
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    import_hf(tmp_path / "hf", tmp_path / "ours")
    reader, token = reader_of(tmp_path / "ours"), tiny_tokens(2, 9, vocab_size=61)
    assert reader.dtype("model/embed_tokens.weight") == dtype
    with torch.no_grad():
        expected = load(tmp_path / "hf")[0](input_ids=token).logits
        assert_near(model_of(tmp_path / "ours")(token)[0], expected, 1e-5)
        export(tmp_path / "ours", tmp_path / "out", shard_bytes=6_000)
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
        again, info = load(tmp_path / "out")
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_near(again(input_ids=token).logits, expected, 1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    if family in ("mixtral", "qwen2_moe"):
        assert config["num_experts"] == config["num_local_experts"] == 6


def changed(folder, out, change):
    """A copy of a folder whose tensors went through `change`."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    (out / "config.json").write_text((folder / "config.json").read_text())
    return out


EXPERT = "model.layers.1.mlp.experts.{}.{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT.format(3, "up_proj")), r"1 missing \(model.layers.1.mlp.experts.3.up_proj"),
        (lambda t: t.update({EXPERT.format(6, "up_proj"): torch.zeros(10, 24)}), "1 that nothing reads"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"nothing reads \(model.extra"),
        (lambda t: t.pop("lm_head.weight"), r"1 missing \(lm_head"),
        (
            lambda t: t.update({EXPERT.format(0, "down_proj"): t[EXPERT.format(0, "down_proj")].t()}),
            "down_proj.weight is .10, 24. where the configuration says .24, 10.",
        ),
    ],
)
def test_files_that_are_not_of_this_model_are_refused(made, tmp_path, change, message):
    folder = changed(made("qwen3_moe")[0], tmp_path / "hf", change)
    with pytest.raises(ConversionError, match=message):
        import_hf(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: swap(t, EXPERT.format(2, "gate_proj"), EXPERT.format(2, "up_proj")),
        lambda t: swap(t, EXPERT.format(0, "down_proj"), EXPERT.format(1, "down_proj")),
        lambda t: swap(t, "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        lambda t: swap(t, "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_a_conversion_that_mixed_up_tensors_would_show(made, tmp_path, change):
    """What the equality of logits would catch, were the table of names wrong: every exchange moves them."""
    folder, theirs = made("qwen3_moe")
    import_hf(changed(folder, tmp_path / "hf", change), tmp_path / "ours")
    token = tiny_tokens(2, 17, vocab_size=61)
    with torch.no_grad():
        expected = theirs(input_ids=token).logits
        assert (model_of(tmp_path / "ours")(token)[0] - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "field", "value", "message"),
    [
        (
            "llama",
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            "'rope_type': 'linear'",
        ),
        ("llama", "hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("llama", "attention_bias", True, "attention_bias = True"),
        ("llama", "no_such_field", 1, "does not know: no_such_field"),
        ("olmoe", "clip_qkv", 8.0, "clip_qkv = 8.0"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window = True"),
        ("llama", "model_type", "gpt2", "model_type = 'gpt2' is not one of"),
    ],
)
def test_fields_that_our_model_does_not_have_are_refused(made, tmp_path, family, field, value, message):
    folder = changed(made(family)[0], tmp_path / "hf", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ConversionError, match=message):
        open_source(folder)


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="holds no config.json"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConversionError, match="holds no model.safetensors"):
        open_source(tmp_path)
    with pytest.raises(CheckpointError, match="is no model configuration"):
        read_model_config(tmp_path)


def test_a_model_goes_to_the_first_family_that_expresses_it_and_says_why_to_no_other():
    assert choose_family(mixtral_8x7b())[0].model_type == "mixtral"
    assert choose_family(tiny_config(shared_expert_intermediate_size=0, qk_norm="head"))[0].model_type == "qwen3_moe"
    with pytest.raises(ConversionError, match=r"mixtral: .*cannot express.*chain"):
        choose_family(coe())
    with pytest.raises(ConversionError, match="mixtral cannot express model.qk_norm = 'head'"):
        FAMILIES["mixtral"].to_theirs(
            tiny_config(qk_norm="head", mlp_only_layers=(), shared_expert_intermediate_size=0)
        )
    with pytest.raises(ConversionError, match="'phi' is unknown"):
        choose_family(mixtral_8x7b(), "phi")


def slow_import(folder, out):
    import moe.convert.hf as hf

    original = hf.to_ours
    hf.to_ours = lambda *args: (time.sleep(0.05), original(*args))[1]
    import_hf(folder, out)


def test_a_killed_import_leaves_no_folder_and_can_be_repeated(made, tmp_path):
    folder, _ = made("qwen3_moe")
    process = multiprocessing.get_context("spawn").Process(target=slow_import, args=(folder, tmp_path / "ours"))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert not (tmp_path / "ours").exists()
    import_hf(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]
    with pytest.raises(ConversionError, match="exists; choose another folder"):
        import_hf(folder, tmp_path / "ours")


def test_verify_loads_an_export_in_a_process_of_its_own_and_sees_a_wrong_one(made, tmp_path):
    import_hf(made("qwen3_moe")[0], tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out")
    given = computed(model_of(tmp_path / "ours"))
    result = verify_export(tmp_path / "out", **given)
    assert result.difference <= 1e-5 and result.num_greedy == 32
    with pytest.raises(ConversionError, match="logits in transformers differ"):
        verify_export(tmp_path / "out", **{**given, "logits_BSV": given["logits_BSV"] * 1.01})
    with pytest.raises(ConversionError, match="transformers continues with"):
        verify_export(tmp_path / "out", **{**given, "greedy": [*given["greedy"][:-1], 60 - given["greedy"][-1]]})
