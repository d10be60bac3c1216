"""Import and export against transformers itself, and what a wrong file, field or name leads to."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_folders import FIELDS, export, load, make_model, model_of, reader_of, save
from moe.checkpoint import CheckpointError, read_model_config
from moe.cli import computed
from moe.convert import ConversionError
from moe.convert.hf import choose_family, import_hf, open_source
from moe.convert.names import FAMILIES
from moe.convert.verify import verify_export
from moe.presets import coe, mixtral_8x7b
from moe.sample import generate
from tiny import tiny_config, tiny_tokens

PLAIN = {"mlp_only_layers": (), "shared_expert_intermediate_size": 0}
STRETCHED = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 32},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
ROPES = {
    "llama yarn": STRETCHED,
    "llama llama3": LLAMA3,
    "deepseek_v3 yarn": {**STRETCHED, "mscale": 1.0, "mscale_all_dim": 1.0},
    "gpt_oss yarn": {**STRETCHED, "truncate": False},
}


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


@pytest.mark.parametrize("form", [*FIELDS, *ROPES])
def test_an_imported_model_is_the_same_and_its_export_too(made, tmp_path, form):
    family = form.split()[0]
    folder, theirs = made(family, **({"rope_parameters": ROPES[form]} if form in ROPES else {}))
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


@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("form", ["llama yarn", "llama llama3"])
def test_both_spellings_of_stretched_positions_mean_the_same(made, tmp_path, form, kind):
    """What Llama 3.1 has on disk (rope_scaling beside rope_theta), and what transformers 5 writes (rope_parameters)."""
    folder = made("llama", rope_parameters=ROPES[form])[0]
    old = changed(folder, tmp_path / "old", lambda _: None)
    config = json.loads((old / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["rope_scaling"] = {kind: scaling.pop("rope_type"), **scaling}
    (old / "config.json").write_text(json.dumps(config))
    assert import_hf(old, tmp_path / "ours") == open_source(folder).config
    # and an export has both, for transformers 4 and 5
    export(tmp_path / "ours", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert {**scaling, "rope_type": ROPES[form]["rope_type"]}.items() <= written["rope_scaling"].items()
    assert written["rope_parameters"] == {**written["rope_scaling"], "rope_theta": written["rope_theta"]}
    del written["rope_parameters"]
    (tmp_path / "out/config.json").write_text(json.dumps(written))
    assert open_source(tmp_path / "out").config == open_source(folder).config


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
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}, "'rope_type': 'dynamic'"),
        ("llama", "rope_scaling", {**LLAMA3, "mscale_all_dim": 1.0}, "'mscale_all_dim': 1.0"),
        ("llama", "hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("llama", "attention_bias", True, "attention_bias = True"),
        ("llama", "no_such_field", 1, "does not know: no_such_field"),
        ("olmoe", "clip_qkv", 8.0, "clip_qkv = 8.0"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window = True"),
        ("gpt_oss", "swiglu_limit", 5.0, "swiglu_limit = 5.0"),
        ("dots1", "layer_types", ["full_attention"] * 2 + ["sliding_attention"], "every layer must see everything"),
        ("mixtral", "num_experts_per_tok", 7, "mixtral: num_experts_per_tok = 7"),
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
