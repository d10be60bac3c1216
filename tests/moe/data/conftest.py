"""Small prepared data: one built from the four built-in domains, and a maker of data with ids chosen by a test."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from moe.data.prepare import DataConfig, prepare
from moe.data.store import PARTS, Packing, PreparedData, TokenWriter, open_prepared, write_manifest

EOS = 0
VOCABULARY = 100_000


@pytest.fixture(scope="session")
def builtin_data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """The four built-in domains, 60 kB each."""
    cache = tmp_path_factory.mktemp("cache")
    config = DataConfig(cache_dir=str(cache), builtin_bytes=60_000, vocab_size=600)
    return prepare(config, report=lambda _: None)


@pytest.fixture
def make_data(tmp_path: Path) -> Callable[..., PreparedData]:
    """Return a function from {domain: lengths of its training documents} to prepared data.

    The ids of a domain count up from 1, so that every token tells where it stands; each document ends with EOS. The
    held-out text has documents of the same lengths unless `validation` gives others.
    """

    def make(
        lengths: Mapping[str, Sequence[int]],
        *,
        weights: Mapping[str, float] | None = None,
        packing: Packing = "concatenate",
        validation: Mapping[str, Sequence[int]] | None = None,
    ) -> PreparedData:
        folder = tmp_path / "made"
        folder.mkdir()
        domains = {}
        for name in lengths:
            domains[name] = {"source": "made", "licence": "none"}
            for part, of in zip(PARTS, (lengths, validation or lengths), strict=True):
                with TokenWriter(folder, f"{name}.{part}", vocab_size=VOCABULARY) as writer:
                    first = 1
                    for length in of[name]:
                        ids = np.append(np.arange(first, first + length - 1), EOS)
                        writer.add(ids, num_bytes=10 * length)
                        first += length - 1
                    domains[name][part] = writer.finish()
        write_manifest(folder, {"vocab_size": VOCABULARY, "eos_token_id": EOS, "domains": domains})
        return open_prepared(folder, weights=weights or {}, packing=packing)

    return make
