"""The manifest is not believed: each lie in it is refused before a tensor is read."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from moe.checkpoint import CheckpointError, CheckpointReader, Shard, newest_checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    shards = [
        Shard(name="w", tensor=torch.arange(8.0).reshape(4, 2), logical_shape=(4, 2)),
        Shard(name="s", tensor=torch.tensor(1), logical_shape=()),
    ]
    return save_checkpoint(tmp_path / "checkpoints", step=1, shards=shards, state={"a": 1})


def seal(manifest: dict) -> bytes:
    """The manifest as one who wants to deceive writes it: with a correct checksum."""
    body = json.dumps(manifest, indent=1, sort_keys=True).encode()
    return json.dumps({**manifest, "sha256": hashlib.sha256(body).hexdigest()}, indent=1, sort_keys=True).encode()


def read(checkpoint: Path) -> dict:
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    del manifest["sha256"]
    return manifest


def test_the_checksum_is_as_documented(checkpoint):
    assert seal(read(checkpoint)) == (checkpoint / "manifest.json").read_bytes()


def rename_file(manifest, name):
    manifest["files"][name] = manifest["files"].pop("rank_00000.safetensors")
    for tensor in manifest["tensors"].values():
        for piece in tensor["pieces"]:
            piece["file"] = name


def set_at(*path_and_value):
    *path, last, value = path_and_value

    def change(manifest):
        for part in path:
            manifest = manifest[part]
        manifest[last] = value

    return change


def add_piece(**changes):
    def change(manifest):
        piece = manifest["tensors"]["w"]["pieces"][0]
        manifest["tensors"]["w"]["pieces"].append({**piece, **changes})

    return change


FILE = "rank_00000.safetensors"
PIECE = ("tensors", "w", "pieces", 0)
LIES = {
    "parent folder": (
        lambda m: rename_file(m, "../outside.safetensors"),
        "'../outside.safetensors' is not",
    ),
    "absolute path": (lambda m: rename_file(m, "/etc/hostname"), "is not the name of a file inside"),
    "sub-folder": (lambda m: rename_file(m, "a/b.safetensors"), "is not the name of a file inside"),
    "backslash": (lambda m: rename_file(m, "..\\b"), "is not the name of a file inside"),
    "dot": (lambda m: rename_file(m, ".."), "is not the name of a file inside"),
    "empty name": (lambda m: rename_file(m, ""), "is not the name of a file inside"),
    "zero byte": (lambda m: rename_file(m, "a\0b"), "is not the name of a file inside"),
    "new line": (lambda m: rename_file(m, "a\n"), "is not the name of a file inside"),
    "no state": (lambda m: m["files"].pop("state.json"), "does not list state.json"),
    "files is a list": (set_at("files", []), "malformed: files"),
    "size is text": (set_at("files", FILE, "bytes", "12"), "malformed: files"),
    "size is negative": (set_at("files", FILE, "bytes", -1), "malformed: files"),
    "size is true": (set_at("files", FILE, "bytes", True), "malformed: files"),
    "hash is a number": (set_at("files", FILE, "sha256", 5), "malformed: files"),
    "hash is empty": (set_at("files", FILE, "sha256", ""), "its sha256 does not match"),
    "step is a float": (set_at("step", 1.0), "malformed: step"),
    "other step": (set_at("step", 2), "holds step 2"),
    "unknown field": (set_at("extra", 1), "malformed: extra"),
    "missing field": (lambda m: m.pop("tensors"), "malformed: tensors"),
    "newer version": (set_at("version", 2), "version 2; this program reads"),
    "version is true": (set_at("version", True), "malformed: version"),
    "other format": (set_at("format", "zip"), "format 'zip'"),
    "unknown dtype": (set_at("tensors", "w", "dtype", "__class__"), "unknown dtype '__class__'"),
    "wrong dtype": (set_at("tensors", "w", "dtype", "I32"), "where the manifest says"),
    "wrong width": (set_at("tensors", "w", "shape", [4, 3]), "where the manifest says"),
    "more dimensions": (set_at("tensors", "w", "shape", [4, 2, 1]), "where the manifest says"),
    "no dimensions": (set_at("tensors", "w", "shape", []), "4 rows stored"),
    "too many rows": (set_at("tensors", "w", "shape", [5, 2]), "has 4 rows stored"),
    "too few rows": (set_at("tensors", "w", "shape", [3, 2]), "has 4 rows stored"),
    "negative shape": (set_at("tensors", "w", "shape", [-4, 2]), "malformed: tensors.w.shape"),
    "huge shape": (set_at("tensors", "w", "shape", [4, 2**70]), "malformed: tensors.w.shape"),
    "no pieces": (set_at("tensors", "w", "pieces", []), "is in 0 pieces"),
    "gap": (set_at(*PIECE, "offset", 1), "lacks rows 0..0"),
    "negative offset": (set_at(*PIECE, "offset", -1), "malformed"),
    "overlap": (add_piece(offset=3), "has row 3 twice"),
    "same rows again": (add_piece(), "has row 0 twice"),
    "fewer rows than stored": (set_at(*PIECE, "rows", 3), "has 3 rows stored"),
    "wrong key": (set_at(*PIECE, "key", "nothing"), "tensor 'w' cannot be read"),
    "key of another": (set_at(*PIECE, "key", "s"), "where the manifest says"),
    "file not listed": (set_at(*PIECE, "file", "other"), "'other', which is not listed"),
    "state as tensors": (set_at(*PIECE, "file", "state.json"), "cannot be read"),
    "scalar in two": (
        lambda m: m["tensors"]["s"]["pieces"].append(m["tensors"]["s"]["pieces"][0]),
        "is in 2 pieces",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_with_a_correct_checksum_is_refused(lie, checkpoint):
    change, words = LIES[lie]
    # what "parent folder" points to is there and has the right size and content
    os.link(checkpoint / FILE, checkpoint.parent / "outside.safetensors")
    manifest = read(checkpoint)
    change(manifest)
    (checkpoint / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader.open(checkpoint)
    assert words in str(caught.value)
    assert str(checkpoint) in str(caught.value)


NOT_MANIFESTS = {
    "empty": b"",
    "zeros": bytes(100),
    "not text": b"\xff\xfe{}",
    "a list": b"[]",
    "a number": b"3",
    "an empty object": b"{}",
    "deep nesting": b"[" * 100_000,
    "many digits": b"1" * 5000,
    "no checksum": b'{"format": "moe-checkpoint", "version": 1}',
}


@pytest.mark.parametrize("name", NOT_MANIFESTS)
def test_what_is_no_manifest_is_refused(name, checkpoint):
    (checkpoint / "manifest.json").write_bytes(NOT_MANIFESTS[name])
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        CheckpointReader.open(checkpoint)


def test_an_edited_manifest_is_refused(checkpoint):
    path = checkpoint / "manifest.json"
    text = path.read_text()
    edits = [text + "\n", text.replace('"step": 1', '"step": 01'), text.replace('"step": 1', '"step":  1')]
    edits += [
        text.replace('"step": 1', '"step": 1,\n "step": 1'),
        text.replace('"world_size": 1', '"world_size": 2'),
    ]
    for edited in edits:
        assert edited != text
        path.write_text(edited)
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            CheckpointReader.open(checkpoint)
    path.write_text(text)
    CheckpointReader.open(checkpoint)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_state_that_is_no_object_is_refused(content, checkpoint):
    (checkpoint / "state.json").write_bytes(content)
    manifest = read(checkpoint)
    manifest["files"]["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_bytes(seal(manifest))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        CheckpointReader.open(checkpoint)


def test_a_link_that_leads_out_of_the_checkpoint_is_refused(checkpoint, tmp_path):
    secret = tmp_path / "secret"
    (checkpoint / FILE).rename(secret)
    (checkpoint / FILE).symlink_to(secret)
    with pytest.raises(CheckpointError, match=f"{FILE} is not a regular file"):
        CheckpointReader.open(checkpoint)


def test_no_file_of_a_checkpoint_is_unpickled(checkpoint, tmp_path):
    canary = tmp_path / "canary"
    content = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    for name in ("manifest.json", "state.json", FILE):
        for sealed in (True, False):
            path = save_checkpoint(tmp_path / f"{name}{sealed}", step=1, shards=[], state={})
            (path / name).write_bytes(content)
            if sealed and name != "manifest.json":
                manifest = read(path)
                digest = hashlib.sha256(content).hexdigest()
                manifest["files"][name] = {"bytes": len(content), "sha256": digest}
                (path / "manifest.json").write_bytes(seal(manifest))
            newest_checkpoint(path.parent, report=lambda _: None)
    assert not canary.exists()
