"""lm-evaluation-harness on our models, against sums of log-probabilities and texts made without it. No network."""

import json
import socket
import sys

import pytest
import torch

from moe.checkpoint.model_folder import write_model
from moe.checkpoint.stream import Entry
from moe.cli import main
from moe.data.tokenizer import END, load_tokenizer, train_tokenizer
from moe.routers.dynamic_confidence import DynamicConfidenceConfig
from moe.sample import generate
from tiny import tiny_config, tiny_model

WORDS = ["red", "green", "a blue sky", "one two three", "salt and pepper", "north"]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that no architecture of transformers expresses, with a tokenizer, as a model folder."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    router = DynamicConfidenceConfig(target_experts_per_tok=1.5)
    model = tiny_model(tiny_config(vocab_size=300, router=router), seed=5).eval()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.fill_(0.4)
    parameters, state = dict(model.named_parameters()), model.state_dict()
    entries = [
        Entry(name=f"{'model' if name in parameters else 'buffer'}/{name}", dtype=value.dtype, shape=tuple(value.shape))
        for name, value in state.items()
    ]
    write_model(folder, model.config, entries, iter(state.values()), origin="test")
    train_tokenizer(WORDS * 20, vocab_size=300, folder=folder / "tokenizer")
    return folder, model, load_tokenizer(folder / "tokenizer")


def task_file(folder, name, documents, **fields):
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    task = folder / f"{name}.yaml"  # JSON is YAML
    dataset = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    task.write_text(json.dumps({"task": name, **dataset, **fields}))
    return task


def log_probability(model, prompt, answer) -> float:
    """Of an answer after a prompt, token by token, each from a forward pass of its own."""
    total = 0.0
    for place in range(len(answer)):
        logits_1SV, _ = model(torch.tensor([[*prompt, *answer[:place]]]))
        total += torch.log_softmax(logits_1SV[0, -1], -1)[answer[place]].item()
    return total


@torch.no_grad()
def test_it_finds_what_our_model_prefers_and_what_it_generates_and_fetches_nothing(made, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder, model, tokenizer = made

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    choices = [" red", " north", " a blue sky"]
    scores = [[log_probability(model, encode(word), encode(choice)) for choice in choices] for word in WORDS]
    best = [max(range(3), key=row.__getitem__) for row in scores]
    # two of them get another answer than the one the model prefers
    gold = [(choice + 1) % 3 if place < 2 else choice for place, choice in enumerate(best)]
    chosen = task_file(
        tmp_path,
        "chosen",
        [{"word": word, "gold": answer} for word, answer in zip(WORDS, gold, strict=True)],
        output_type="multiple_choice",
        doc_to_text="{{word}}",
        doc_to_choice=choices,
        doc_to_target="gold",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    # prompts of unequal length in one batch, padded to the left
    texts = [
        str(tokenizer.decode(generate(model, encode(word), max_new_tokens=NEW_TOKENS, temperature=0.0)))
        for word in WORDS
    ]
    written = task_file(
        tmp_path,
        "written",
        [{"word": word, "text": text} for word, text in zip(WORDS, texts, strict=True)],
        output_type="generate_until",
        doc_to_text="{{word}}",
        doc_to_target="{{text}}",
        generation_kwargs={"until": [END], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )

    def refuse(*_arguments):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    main(["eval", str(folder), "--lm-eval", str(chosen), str(written)])
    file = folder / "lm_eval/step_00000000_chosen+written.json"
    text = capsys.readouterr().out
    assert "|chosen |" in text and "|exact_match|" in text and str(file) in text
    results = json.loads(file.read_text())["results"]
    assert results["chosen"]["acc,none"] == pytest.approx(4 / 6)
    assert results["written"]["exact_match,none"] == 1.0


def test_a_missing_harness_is_named_with_its_install_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        main(["eval", str(made[0]), "--lm-eval", str(tmp_path / "task.yaml")])
    assert 'pip install "moe-train[lm-eval]"' in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hellaswag", "no/such.yaml"])
def test_what_is_no_file_of_a_task_is_refused_in_one_line(made, capsys, name):
    pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit):
        main(["eval", str(made[0]), "--lm-eval", name])
    assert f"{name} does not exist" in capsys.readouterr().err
