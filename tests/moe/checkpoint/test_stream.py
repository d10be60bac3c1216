"""Writing tensors one by one: what is written has left memory before the next tensor is made."""

import weakref

import torch
from safetensors.torch import load_file

from moe.checkpoint.stream import Entry, write_file


def test_one_tensor_is_held_at_a_time(tmp_path):
    held = []

    def tensors():
        for value in range(3):
            assert [reference() for reference in held] == [None] * value
            tensor = torch.full((2, 3), float(value))
            held.append(weakref.ref(tensor))
            yield tensor
            del tensor

    entries = [Entry(name=f"t{value}", dtype=torch.float32, shape=(2, 3)) for value in range(3)]
    write_file(tmp_path / "file.safetensors", entries, tensors(), metadata={})
    written = load_file(tmp_path / "file.safetensors")
    assert all(torch.equal(written[f"t{value}"], torch.full((2, 3), float(value))) for value in range(3))
