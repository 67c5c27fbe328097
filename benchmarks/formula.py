"""Attention by its formula, with all scores in memory: plain PyTorch in benchmarks, and in float64 the truth in checks.

Shapes: B batch, T queries, S keys, H query heads, H_kv key-value heads, D head size.
"""

from __future__ import annotations

import torch


def attention(q, k, v, *, causal, window=None, document_ids=None, kept=None, dropout_p=0.0):
    """softmax(q kᵀ / sqrt(D) + mask) v, all in the dtype of q (B, T, H, D) and k, v (B, S, H_kv, D).

    The arguments are those of `kernels.attention`; `kept` (B, H, T, S) says which weights dropout keeps.
    """
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                # (B, H or H_kv, T or S, D)
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5                                         # (B, H, T, S)
    if causal or window or document_ids is not None:
        scores = scores.masked_fill(hidden(T, S, causal, window, document_ids, q.device), -torch.inf)
    weights = scores.softmax(-1)
    if causal and T > S:
        weights = weights.nan_to_num()                                              # of queries that see no key
    if kept is not None:
        weights = weights * kept / (1 - dropout_p)
    return (weights @ v).transpose(1, 2)                                            # (B, T, H, D)


def hidden(T, S, causal, window, document_ids, device):
    """Which keys a query does not see: (T, S), with documents (B, 1, T, S)."""
    ahead = torch.arange(S, device=device) - torch.arange(S - T, S, device=device)[:, None]
    out = torch.zeros(T, S, dtype=torch.bool, device=device)
    if causal:
        out |= ahead > 0
    if window:
        out |= ahead <= -window
    if document_ids is not None:
        out = out | (document_ids[:, None, :, None] != document_ids[:, None, None, :])
    return out
