"""The tokenizer: a byte-level BPE trained on the spot, or a folder that the user brings.

Either is kept as a Hugging Face tokenizer, which AutoTokenizer loads without a network. Byte-level BPE:
Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. This file takes seconds to
import, so it is imported only where text is tokenised.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"  # ends every document, and so stands before the next: it is the token of the start, too
PADDING = "<|padding|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE and save it in `folder`. Any text comes back from its ids exactly.

    Digits stay single, as sums are learned better digit by digit. Little text gives fewer tokens than asked
    for.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder. Raises ValueError, with the folder, if it does not load from there."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"the tokenizer in {folder} does not load: {error}") from error


class TextEncoder:
    """Turns texts into ids of the tokenizer in a folder; a document ends with `eos_token_id`.

    Raises ValueError if the tokenizer has no end-of-text token.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        eos_token_id = self._tokenizer.eos_token_id
        if not isinstance(eos_token_id, int):
            raise ValueError(
                f"the tokenizer in {folder} has no eos_token, which must end every document; "
                "set one in its tokenizer_config.json"
            )
        self.eos_token_id = eos_token_id
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps: the length can be less

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, and the end. The name of a special token in a text is plain text."""
        if not texts:
            return []  # the library cannot encode an empty list
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [[*ids, self.eos_token_id] for ids in encoded["input_ids"]]

    def save(self, folder: Path) -> None:
        """Write the tokenizer into another folder."""
        self._tokenizer.save_pretrained(folder)
