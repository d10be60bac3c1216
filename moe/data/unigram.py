"""The unigram baseline: what a model loses that knows how frequent each token is, and nothing else.

A language model that has learned anything of its text stays below it.
"""

import numpy as np

from moe.data.store import PreparedData


def unigram_losses(data: PreparedData) -> dict[str, float]:
    """Return the loss in nats per token on the held-out text of each domain, by name.

    p(v) is proportional to 1 + N * sum over domains of share * count(v) / tokens: the frequency of token v
    in the training mixture of N tokens, with one added to every count so that unseen tokens stay possible.
    """
    num_tokens = sum(domain.train.num_tokens for domain in data.domains)
    mixture_V = sum(domain.share * domain.train.counts / domain.train.num_tokens for domain in data.domains)
    smoothed_V = 1 + num_tokens * np.asarray(mixture_V, dtype=np.float64)
    log_p_V = np.log(smoothed_V / smoothed_V.sum())
    return {
        domain.name: float(-(domain.validation.counts @ log_p_V) / domain.validation.num_tokens)
        for domain in data.domains
    }
