"""Scores that are neither the paper's nor the default, and how to register one of your own.

A score says how well each sentence matches one token's queries, see `sentencekv.SCORES`. To try
yours, write it here, add it to SCORES below, and name it: `--methods sentencekv:score=mine`.
"""

import math

import torch

from sentencekv import SCORES


def votes(q, vectors, variances, lengths) -> torch.Tensor:
    """Each query head has one vote, and shares it among the sentences as a softmax does.

    The Gaussian score without the variance, and not per token: n keys that are all equal to their
    mean µ receive n · exp(q · µ / √D). An empty sentence has ln 0 = -inf, and gets nothing.

    q (H_kv, G, D), vectors µ (H_kv, S, D), variances (unused) and lengths n (H_kv, S) -> (H_kv, S)
    """
    logits = (q @ vectors.mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, S)
    return (logits + lengths.log().unsqueeze(1)).softmax(dim=-1).sum(dim=1)


SCORES |= {"votes": votes}
