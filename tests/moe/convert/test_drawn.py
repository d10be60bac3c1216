"""Import and export of drawn configurations of every family, against transformers itself.

MOE_EXAMPLES=40 draws that many a family, other ones in each run, in place of the few that are the same every time.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_draws import FORMS, drawn_fields, random_model
from hf_folders import export, load, model_of, reader_of, save
from moe.checkpoint import read_model_config
from moe.convert.hf import import_hf
from moe.convert.names import FAMILIES
from tiny import tiny_tokens

# without shrinking: a second for each example would make minutes
PHASES = (Phase.explicit, Phase.generate)
MANY = int(os.environ.get("MOE_EXAMPLES", "0"))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=MANY or 3, derandomize=not MANY, phases=PHASES, deadline=None, database=None)
@given(data=st.data())
def test_every_configuration_comes_in_equal_and_goes_out_whole(family, data):
    fields, form = data.draw(drawn_fields(family)), data.draw(FORMS)
    if family == "longcat_flash":
        del fields["num_hidden_layers"], fields["intermediate_size"]
        fields["head_dim"] = fields["qk_rope_head_dim"]
    token = tiny_tokens(2, 11, vocab_size=fields["vocab_size"])
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        model = random_model(family, fields, seed=data.draw(st.integers(0, 99)))
        save(model, folder / "hf", **form)
        expected = load(folder / "hf")[0](input_ids=token).logits
        import_hf(folder / "hf", folder / "ours")
        logits = model_of(folder / "ours")(token)[0]
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

        export(folder / "ours", folder / "out", family_name=family, shard_bytes=6_000)
        again, info = load(folder / "out")
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        # not equal to the bit: odd widths lie otherwise in another file, and are added up in another order
        assert (again(input_ids=token).logits - expected).abs().max() <= 1e-6 * expected.abs().max()

        import_hf(folder / "out", folder / "twice")
        first, second = reader_of(folder / "ours"), reader_of(folder / "twice")
        assert first.names == second.names
        # import of the export: every bit
        assert all(torch.equal(first.read(name), second.read(name)) for name in first.names)
        assert all(first.dtype(name) == second.dtype(name) for name in first.names)
        wanted, found = (read_model_config(folder / name).meaning() for name in ("ours", "twice"))
        assert wanted == found

        config = json.loads((folder / "out/config.json").read_text())
        assert config["dtype"] == config["torch_dtype"] == str(form["dtype"]).removeprefix("torch.")
        assert config.get("num_experts") == config.get("num_local_experts")
        assert not ("num_experts" in fields or "num_local_experts" in fields) or config["num_experts"]
