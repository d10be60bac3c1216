"""Exports that carry our code: loaded as on a machine without this package, by the code in the folder."""

import ast
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe.blocks.chain import ChainConfig
from moe.checkpoint import open_model_folder
from moe.checkpoint.model_folder import write_model
from moe.checkpoint.stream import Entry
from moe.cli import main
from moe.convert import ConversionError
from moe.convert.hf import export_hf
from moe.convert.sources import ENTRY_FILE, LIBRARIES, flat_sources
from moe.model import Model
from moe.routers.cross_layer import ReuseConfig
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.routers.topk import TopKConfig
from moe.routers.zero_experts import ZeroExpertsConfig
from tiny import tiny_config, tiny_model, tiny_tokens

FORMS = {
    "dynamic confidence": {"router": DynamicConfidenceConfig(target_experts_per_tok=1.5)},
    "zero experts and a shared pool": {
        "router": ZeroExpertsConfig(num_identity_experts=2, num_constant_experts=1),
        "mlp_only_layers": (),
        "num_hidden_layers": 4,
        "reuse": ReuseConfig(group_size=2),
        "tie_word_embeddings": True,
    },
    "chain with a selection bias": {
        "router": TopKConfig(use_selection_bias=True, scoring_func="sigmoid"),
        "chain": ChainConfig(rounds=2),
    },
}


def model_of(form: str) -> Model:
    model = tiny_model(tiny_config(**FORMS[form]), seed=3)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.fill_(0.4).add_(torch.linspace(-0.1, 0.1, max(buffer.numel(), 1)).view_as(buffer) * ("bias" in name))
    return model.eval()


def save(model, folder):
    """A model folder of ours, as import and upcycling make one."""
    parameters, state = dict(model.named_parameters()), model.state_dict()
    entries = [
        Entry(name=f"{'model' if name in parameters else 'buffer'}/{name}", dtype=value.dtype, shape=tuple(value.shape))
        for name, value in state.items()
    ]
    write_model(folder, model.config, entries, iter(state.values()), origin="test")
    return folder


def export(model, tmp_path, **arguments):
    config, reader = open_model_folder(save(model, tmp_path / "ours"))
    return export_hf(config, reader, tmp_path / "out", tokenizer_dir=tmp_path / "none", **arguments)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where transformers puts the code it loads, for this test alone, in which no class of ours is registered."""
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.mark.parametrize("form", FORMS)
def test_the_auto_classes_load_the_folder_by_the_code_in_it(tmp_path, modules_cache, form):
    model = model_of(form)
    assert export(model, tmp_path).has_own_code
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, output_loading_info=True
    )
    assert type(theirs).__module__.startswith("transformers_modules.out.")
    assert type(theirs.model).__module__.startswith("transformers_modules.out.")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = theirs.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    tokens = tiny_tokens(2, 11)
    with torch.no_grad():
        logits = model(tokens)[0]
        torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-4, atol=1e-5)
        body = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
        hidden = body(tokens).last_hidden_state
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        torch.testing.assert_close(hidden @ head.weight.T, logits, rtol=1e-4, atol=1e-5)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.num_experts == config.model_config.num_experts == 6
    # what was loaded can be saved again, code and all
    theirs.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules.again.")
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())


def test_on_a_gpu_the_code_in_the_folder_knows_a_backend_without_triton(tmp_path, modules_cache):
    export(model_of("dynamic confidence"), tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    backends = sys.modules[type(loaded).__module__.replace(ENTRY_FILE, "moe_kernels_backends")]
    assert sorted(backends.BACKENDS) == ["naive", "segments", "torch_grouped"]
    name, _ = backends.resolve_backend("auto", torch.device("cuda"), torch.float64)
    assert name in ("torch_grouped", "naive")
    with pytest.raises(ValueError, match="backend 'triton' is unknown"):
        backends.resolve_backend("triton", torch.device("cuda"), torch.bfloat16)


def test_code_in_the_folder_runs_only_if_trusted_and_not_where_this_package_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    export(model_of("dynamic confidence"), tmp_path)
    for is_trusted in (False, True):
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=is_trusted)
        assert type(ours).__module__ == "moe.convert.modeling"
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert not (tmp_path / "modules").exists()


def test_the_command_falls_to_our_code_and_verifies_it_where_this_package_cannot_be_imported(tmp_path, capsys):
    model = model_of("dynamic confidence")
    main(["export-hf", str(save(model, tmp_path / "ours")), str(tmp_path / "out"), "--verify"])
    text = capsys.readouterr().out
    assert "MoeForCausalLM, from step 0" in text
    assert "no architecture of transformers expresses this model" in text
    assert "trust_remote_code=True" in text
    assert "verified: logits within" in text and "32 greedy tokens equal" in text


def test_a_bfloat16_run_goes_out_in_parts_with_what_routers_learn_in_float32(tmp_path, modules_cache):
    model = model_of("chain with a selection bias").to(torch.bfloat16)
    export(model, tmp_path, family_name="moe_train", shard_bytes=6_000)
    parts = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(parts) > 2
    stored = {name: value for part in parts for name, value in load_file(part).items()}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for name, value in model.state_dict().items():
        expected = torch.float32 if "selection_bias" in name else torch.bfloat16
        assert value.dtype == stored[f"model.{name}"].dtype == loaded.state_dict()[f"model.{name}"].dtype == expected
        assert torch.equal(loaded.state_dict()[f"model.{name}"], value)


def test_a_family_is_asked_first_and_our_code_only_in_its_place(tmp_path):
    plain = tiny_model(tiny_config(shared_expert_intermediate_size=0, qk_norm="head", intermediate_size=14))
    exported = export(plain, tmp_path)
    assert exported.model_type == "qwen3_moe" and not exported.has_own_code
    assert not list((tmp_path / "out").glob("*.py"))
    chosen = export_hf(
        *open_model_folder(tmp_path / "ours"), tmp_path / "own", tokenizer_dir=tmp_path, family_name="moe_train"
    )
    assert chosen.has_own_code and json.loads((tmp_path / "own/config.json").read_text())["model_type"] == "moe_train"
    with pytest.raises(ConversionError, match="mixtral cannot express"):
        export_hf(
            *open_model_folder(save(model_of("dynamic confidence"), tmp_path / "other")),
            tmp_path / "no",
            tokenizer_dir=tmp_path,
            family_name="mixtral",
        )


def test_the_files_need_each_other_and_the_libraries_they_name_and_nothing_of_this_package():
    files = flat_sources()
    assert {"moe_routers_dynamic_confidence.py", "moe_kernels_backends_segments.py"} < set(files)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [alias.name for alias in node.names] if node.module is None else [node.module]
                assert all(f"{other}.py" in files for other in names), name
                # a name that is imported is one: a file of a package that is flat no more
                if node.module is not None:
                    assert not any(f"{node.module}_{alias.name}.py" in files for alias in node.names), name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                libraries = {str(module).split(".")[0] for module in modules}
                assert libraries <= {*LIBRARIES, *sys.stdlib_module_names}, name
    # what transformers copies: the entry and what it names
    named = re.findall(r"^from \.(\S+) import", files[f"{ENTRY_FILE}.py"], flags=re.MULTILINE)
    assert {f"{other}.py" for other in named} | {f"{ENTRY_FILE}.py"} == set(files)
