"""The data configuration, and the cache: text is tokenised once, and the same inputs find it again."""

import fcntl
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.data.sources import Source, check_source, is_tokenised, open_source
from moe.data.store import FORMAT, DamagedDataError, Packing, PreparedData, open_prepared

SMALLEST_VOCABULARY = 258  # 256 bytes, the end of text and the padding
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on. The order of domains does not matter."""

    __pydantic_config__ = {"extra": "forbid"}

    # A MutableMapping and no dict: tyro lets the command line replace the entries of the former, but only
    # change the values of the latter.
    sources: MutableMapping[str, str] = field(
        default_factory=lambda: {name: f"builtin:{name}" for name in ("python", "prose", "maths", "cpp")}
    )
    """Domain -> path of a file or folder, or builtin:python, builtin:prose, builtin:maths, builtin:cpp."""
    weights: MutableMapping[str, float] = field(default_factory=dict)
    """Domain -> relative share of the training sequences; 1 where missing."""
    cache_dir: str = "data"
    """Folder for tokenised text."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer; empty trains a byte-level BPE on the training text."""
    vocab_size: int = 4096
    """Tokens of the trained tokenizer; not used with a tokenizer of your own."""
    text_field: str = "text"
    """Name of the text in JSON lines, parquet and datasets."""
    validation_fraction: float = 0.05
    """Share of each domain that is held out, by whole documents."""
    builtin_bytes: int = 2_500_000
    """Text of each built-in domain."""
    packing: Packing = "concatenate"
    """concatenate: sequences are cut from the stream of documents; pad: each document begins a sequence."""


def validate_data(config: DataConfig) -> None:
    """Raise ValueError, with the value and the remedy, for a configuration that cannot work. Reads no text."""
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one domain, such as python builtin:python")
    for name, spec in config.sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"data.sources has a domain {name!r}; a name is made of letters, digits, _ and -")
        try:
            check_source(spec)
        except ValueError as error:
            raise ValueError(f"data.sources, domain {name!r}: {error}") from error
        if is_tokenised(spec) and not config.tokenizer:
            raise ValueError(f"domain {name!r} holds token ids; say whose with data.tokenizer FOLDER")
    for name, weight in config.weights.items():
        if name not in config.sources:
            raise ValueError(f"data.weights names {name!r}; the domains are {', '.join(config.sources)}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"data.weights of {name!r} is {weight}, and must be above 0; drop a source instead")
    if config.tokenizer:
        folder = Path(config.tokenizer)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(
                f"data.tokenizer = {config.tokenizer!r} is no folder of a Hugging Face tokenizer: it holds none of "
                f"{', '.join(TOKENIZER_FILES)}"
            )
    elif config.vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"data.vocab_size = {config.vocab_size} must be at least {SMALLEST_VOCABULARY}: the 256 bytes, the end "
            "of text and the padding"
        )
    if not config.text_field:
        raise ValueError("data.text_field is empty; the usual name is text")
    if not 0 < config.validation_fraction <= 0.5:
        raise ValueError(f"data.validation_fraction = {config.validation_fraction} must be above 0 and at most 0.5")
    if config.builtin_bytes < 10_000:
        raise ValueError(f"data.builtin_bytes = {config.builtin_bytes} is below 10000, too little for a split")
    if Path(config.cache_dir).exists() and not Path(config.cache_dir).is_dir():
        raise ValueError(f"data.cache_dir = {config.cache_dir!r} is a file; name a folder")


def prepare(config: DataConfig, *, report: Report = print) -> PreparedData:
    """Return the tokenised text of a configuration, building what the cache does not hold.

    The folder appears in the cache only when it is complete. Its name is a hash of all inputs (of a user's
    files: path, size and time of change). Processes that ask for the same data at the same time build it
    once. A damaged folder is reported and built again.

    Raises ValueError for what `validate_data` refuses and for text that cannot be read.
    """
    validate_data(config)
    sources = {
        name: open_source(config.sources[name], text_field=config.text_field, builtin_bytes=config.builtin_bytes)
        for name in sorted(config.sources)
    }
    folder = Path(config.cache_dir) / f"prepared-{_cache_key(config, sources)}"
    data = _open_cached(folder, config, report=None)
    if data is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{folder.name}.lock", report):
            data = _open_cached(folder, config, report)
            if data is None:
                _build_atomically(folder, config, sources, report)
                data = open_prepared(folder, weights=config.weights, packing=config.packing)
    return data


def _cache_key(config: DataConfig, sources: Mapping[str, Source]) -> str:
    """Return a hash of everything that the tokens depend on."""
    if config.tokenizer:
        files = sorted(file for file in Path(config.tokenizer).iterdir() if file.is_file())
        tokenizer: Any = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        tokenizer = config.vocab_size
    inputs = {name: source.inputs for name, source in sources.items()}
    facts = [FORMAT, tokenizer, config.validation_fraction, inputs]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _open_cached(folder: Path, config: DataConfig, report: Report | None) -> PreparedData | None:
    """Return the data of a folder, or None if it is missing or damaged; with `report`, say so and delete it."""
    if not folder.exists():
        return None
    try:
        return open_prepared(folder, weights=config.weights, packing=config.packing)
    except (DamagedDataError, FileNotFoundError) as error:  # the latter: another process is replacing the folder
        if report is not None:
            report(f"data: {error}; building {folder} again")
            shutil.rmtree(folder)
        return None


@contextmanager
def _lock(path: Path, report: Report) -> Iterator[None]:
    """Hold a lock among the processes that share a cache. The system releases it when its holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"data: another process is building {path.parent}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_atomically(folder: Path, config: DataConfig, sources: Mapping[str, Source], report: Report) -> None:
    """Build beside `folder` and rename. The caller holds the lock: what lies there is left of a killed build."""
    from moe.data.build import build  # brings transformers in, which takes seconds: not where the cache will do

    unfinished = folder.parent / f".building-{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        build(
            unfinished,
            sources,
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size,
            validation_fraction=config.validation_fraction,
            report=report,
        )
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def declared_vocab_size(folder: Path) -> int:
    """Return one more than the largest id in a folder's tokenizer.json, read as plain JSON; 0 without that file.

    Takes milliseconds, where loading a tokenizer takes seconds. Raises ValueError for a file that is no tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return 0
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        # a unigram model lists [piece, score] pairs, the others map piece to id
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        added = [token["id"] for token in content.get("added_tokens", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    return max([*ids, *added, -1]) + 1
