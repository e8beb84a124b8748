"""Which windows of a text calibrate: EvoP's cluster-based sampling (arXiv 2502.14910).

A pool of windows is embedded by the model itself, grouped by k-means, and equally many windows are
drawn from every group, so that a small sample still covers what the text holds. The paper names
neither encoder nor number of groups: here the mean-pooled last hidden state, and half as many
groups as windows are drawn.

What this module does not know: what the sample is used for; any method takes its `TokenSet`.

Notation: n windows in the pool, m drawn, h hidden size, k groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicuco.calibration.windows import TokenSet
from unicuco.errors import TextError

_RESTARTS: Final = 4  # of k-means, the best is kept


class Sampling(StrEnum):
    """How calibration windows are chosen: spread evenly over the text, or by groups."""

    EVEN = "even"
    CLUSTERED = "clustered"


@torch.no_grad()
def embed_windows(model: PreTrainedModel, pool: TokenSet) -> Tensor:
    """Return ``n x h`` float32: the last hidden state of every window, averaged over its tokens.

    One forward pass over the pool.
    """
    parts = []
    for batch in pool.batches():
        output = model(input_ids=batch.to(model.device), use_cache=False, output_hidden_states=True)
        parts.append(output.hidden_states[-1].float().mean(1).cpu())  # (b, t, h) -> (b, h)
    return torch.cat(parts)


def sample_clustered(
    model: PreTrainedModel,
    pool: TokenSet,
    num_windows: int,
    *,
    num_clusters: int | None = None,
    seed: int,
) -> TokenSet:
    """Draw windows evenly from the groups of a pool; one forward pass over it.

    Args:
        model: embeds the windows.
        pool: at least ``num_windows`` windows.
        num_windows: m.
        num_clusters: k, at most m; none: half of m.
        seed: of k-means and of the draws.

    Raises:
        TextError: the pool has fewer windows than asked.
    """
    if len(pool.ids) < num_windows:
        raise TextError(
            f"the text has {len(pool.ids):,} windows of {pool.context:,} tokens and "
            f"{num_windows:,} are to be drawn; give a longer text or ask for fewer tokens"
        )
    labels = cluster(embed_windows(model, pool), num_clusters or -(-num_windows // 2), seed=seed)
    return TokenSet.from_ids(pool.ids[draw_evenly(labels, num_windows, seed=seed)])


def sample_random(pool: TokenSet, num_windows: int, *, seed: int) -> TokenSet:
    """Draw windows without regard to groups: what clustered samples are compared with."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pool.ids), generator=generator)[:num_windows]
    return TokenSet.from_ids(pool.ids[chosen.sort().values])


def cluster(embeddings: Tensor, num_clusters: int, *, seed: int) -> list[int]:
    """Return the group, 0 .. k-1, of each of ``n x h`` embeddings by k-means."""
    from sklearn.cluster import KMeans  # takes a second to import

    k = min(num_clusters, len(torch.unique(embeddings, dim=0)))
    groups = KMeans(n_clusters=k, n_init=_RESTARTS, random_state=seed).fit(embeddings.numpy())
    return cast(list[int], groups.labels_.tolist())


def draw_evenly(labels: Sequence[int], count: int, *, seed: int) -> list[int]:
    """Draw ``count`` positions, the same number from every group as far as groups reach.

    Groups take turns, larger ones first, each giving one of its members that is left; a group that
    is used up is passed over.

    Returns:
        Positions in ascending order, none twice.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator).tolist()
    members: dict[int, list[int]] = {}
    for position in order:
        members.setdefault(labels[position], []).append(position)
    queues = [members[label] for label in sorted(members, key=lambda g: (-len(members[g]), g))]
    chosen: list[int] = []
    while len(chosen) < min(count, len(labels)):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop())
    return sorted(chosen)


def coverage_distance(embeddings: Tensor, chosen: Sequence[int]) -> float:
    """Return the mean distance from all ``n x h`` embeddings to the nearest chosen one.

    The smaller, the better the sample covers the pool.
    """
    return float(torch.cdist(embeddings, embeddings[list(chosen)]).min(1).values.mean())
