"""Conversions that are wrong on purpose, each in one place, and what finds each: the audit of names, or --verify.

The audit holds names against files and reads no number; --verify compares logits with plain transformers. The model is
as wide as its experts, so that no shape gives a mistake away.
"""

import contextlib
import io
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import moe.convert.hf as hf
import moe.convert.verify as verify
from hf_draws import random_model
from hf_folders import FIELDS, SMALL, export, model_of, save
from moe.cli import computed
from moe.convert import ConversionError
from moe.convert.names import Names

WIDTH, EXPERTS, LAYERS = 12, 4, 3


def renumbered(part, what, to):
    """The part that reads or writes another layer or expert."""
    return replace(part, theirs=re.sub(rf"{what}\.(\d+)\.", lambda found: f"{what}.{to(int(found[1]))}.", part.theirs))


def drop_expert(parts):
    return [part for part in parts if part.expert != 1]


def swap_gate_and_up(parts):
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return [
        replace(part, theirs=re.sub("gate_proj|up_proj", lambda found: swapped[found[0]], part.theirs))
        for part in parts
    ]


def shift_layers(parts):
    return [renumbered(part, "layers", lambda i: i + 1) for part in parts]


def turn_layers(parts):
    return [renumbered(part, "layers", lambda i: (i + 1) % LAYERS) for part in parts]


def exchange_shards(parts):
    return [renumbered(part, "experts", lambda e: (e + EXPERTS // 2) % EXPERTS) for part in parts]


def transpose_down(part, tensor):
    return tensor.t() if part.theirs.endswith("down_proj.weight") else tensor


def permute_router(part, tensor):
    return tensor.roll(1, 0) if part.theirs.endswith("mlp.gate.weight") else tensor


# what goes wrong: in the table of names, or on the way of one tensor
NAMES = {
    "one expert dropped": drop_expert,
    "gate and up swapped": swap_gate_and_up,
    "layers shifted by one": shift_layers,
    "layers shifted in a ring": turn_layers,
    "experts exchanged between shards": exchange_shards,
}
TENSORS = {"down transposed": transpose_down, "router rows permuted": permute_router}
# and what finds it, in an import and in an export
FOUND_BY = {
    "one expert dropped": ("audit: nothing reads them", "verify: other tensors"),
    "gate and up swapped": ("verify: logits", "verify: logits"),
    "down transposed": ("verify: logits", "verify: logits"),
    "layers shifted by one": ("audit: missing", "verify: other tensors"),
    "layers shifted in a ring": ("verify: logits", "verify: logits"),
    "experts exchanged between shards": ("verify: logits", "verify: logits"),
    "router rows permuted": ("verify: logits", "verify: logits"),
}
MESSAGES = {
    "audit: nothing reads them": r"^the tensors are not those of this model: 0 missing, 9 that nothing reads",
    "audit: missing": r"^the tensors are not those of this model: \d+ missing",
    "verify: other tensors": "^verify: .*(other tensors than it expects|does not load in plain transformers)",
    "verify: logits": "^verify: .*logits in transformers differ",
}


def break_conversion(monkeypatch, mutant):
    if mutant in NAMES:
        of = Names.of

        def wrong(config, family, **arguments):
            names = of(config, family, **arguments)
            return replace(names, parts={name: NAMES[mutant](parts) for name, parts in names.parts.items()})

        monkeypatch.setattr(hf.Names, "of", wrong)
    else:
        change, to_ours, to_theirs = TENSORS[mutant], hf.to_ours, hf.to_theirs
        monkeypatch.setattr(hf, "to_ours", lambda part, tensor, *rest: change(part, to_ours(part, tensor, *rest)))
        monkeypatch.setattr(hf, "to_theirs", lambda part, tensor, *rest: change(part, to_theirs(part, tensor, *rest)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of transformers in many shards, and the right import of it."""
    folder = tmp_path_factory.mktemp("mutants")
    fields = {**SMALL, **FIELDS["qwen3_moe"], "hidden_size": WIDTH, "moe_intermediate_size": WIDTH}
    model = random_model("qwen3_moe", {**fields, "num_experts": EXPERTS, "num_hidden_layers": LAYERS}, seed=0)
    save(model, folder / "hf", shard="4KB")
    hf.import_hf(folder / "hf", folder / "ours")
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Let verify_export run its program here: a fresh process takes seconds to import transformers."""

    def run(command, **_):
        output = io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(output):
            patch.setattr(sys, "argv", command[2:])
            try:
                # our package is there, so the part that hides it is left out
                exec("import json, sys, torch" + command[2].partition("import torch")[2], {})
            except (RuntimeError, ValueError) as error:
                return subprocess.CompletedProcess(command, 1, "", str(error))
        return subprocess.CompletedProcess(command, 0, output.getvalue(), "")

    monkeypatch.setattr(verify.subprocess, "run", run)


def test_right_conversions_pass(folders, tmp_path, in_this_process):
    given = computed(model_of(folders / "ours"))
    export(folders / "ours", tmp_path / "out", family_name="qwen3_moe")
    for folder in (folders / "hf", tmp_path / "out"):
        assert verify.verify_export(folder, **given).difference <= 1e-6


def convert_and_verify(direction, folders, out, right):
    """Convert one way, then hold transformers against ours."""
    if direction == "import":
        hf.import_hf(folders / "hf", out)
        folder, given = folders / "hf", computed(model_of(out))
    else:
        export(folders / "ours", out, family_name="qwen3_moe")
        folder, given = out, right
    try:
        verify.verify_export(folder, **given)
    except ConversionError as error:
        raise ConversionError(f"verify: {error}") from error


@pytest.mark.parametrize("mutant", FOUND_BY)
@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_wrong_conversion_is_found(folders, tmp_path, monkeypatch, in_this_process, direction, mutant):
    assert set(FOUND_BY) == {*NAMES, *TENSORS}
    right = computed(model_of(folders / "ours"))
    break_conversion(monkeypatch, mutant)
    with pytest.raises(ConversionError, match=MESSAGES[FOUND_BY[mutant][direction == "export"]]):
        convert_and_verify(direction, folders, tmp_path / "out", right)
