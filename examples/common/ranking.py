"""How well embeddings find images of the same class, person or face: the protocols of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

JUNK = -1  # the identity of images that Market-1501 does not count
CHUNK = 256  # queries that are ranked together
Sightings = tuple[Tensor, Tensor, Tensor]  # embeddings n x d, identities n, cameras n


def retrieval(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """Return rank-1, rank-5 and mean average precision, in percent. Every image is a query for its class among all
    others, by cosine.

    Rank-k is the share of queries with an image of their class among the k nearest. An image that is the only one of
    its class is no query.
    """
    unit = F.normalize(embeddings)
    cosines = (unit @ unit.T).fill_diagonal_(-torch.inf)
    order = cosines.argsort(dim=1, descending=True, stable=True)[:, :-1]
    hits = labels[order] == labels[:, None]
    hits = hits[hits.any(1)].double()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    average = (precision * hits).sum(1) / hits.sum(1)
    return {
        "rank_1": 100 * hits[:, 0].mean().item(),
        "rank_5": 100 * hits[:, :5].amax(1).mean().item(),
        "map": 100 * average.mean().item(),
    }


def re_identification(queries: Sightings, gallery: Sightings) -> dict[str, float]:
    """Return rank-1, rank-5 and mean average precision in percent, by the protocol of Market-1501.

    For a query, two kinds of images leave the gallery: junk, and images of the same person from the same camera.
    Distractors have an identity that no query has. Rank-k is the share of queries with an image of their person among
    the k nearest by cosine. The average precision is the area under the precision, which is 1 at recall 0 and linear
    between two ranks, as in the benchmark's program. A query without an image of its person is left out.
    """
    unit, identities, cameras = F.normalize(gallery[0]), *gallery[1:]
    firsts, areas = [], []
    for own, who, camera in zip(
        F.normalize(queries[0]).split(CHUNK), *(q.split(CHUNK) for q in queries[1:]), strict=True
    ):
        order = (own @ unit.T).argsort(dim=1, descending=True, stable=True)
        same = identities[order] == who[:, None]
        kept = (identities[order] != JUNK) & ~(same & (cameras[order] == camera[:, None]))
        hits = same & kept
        place, found = kept.cumsum(1).double(), hits.cumsum(1).double()
        precision = found / place.clamp(min=1)
        before = torch.where(place > 1, (found - 1) / (place - 1).clamp(min=1), 1.0)  # at the rank before a hit
        area = ((precision + before) / 2 * hits).sum(1) / hits.sum(1)
        first = place.masked_fill(~hits, torch.inf).amin(1)
        asked = hits.any(1)
        firsts.append(first[asked])
        areas.append(area[asked])
    first, area = torch.cat(firsts), torch.cat(areas)
    if not len(first):
        raise ValueError("no query has an image of its person from another camera in the gallery")
    return {
        "rank_1": 100 * (first <= 1).double().mean().item(),
        "rank_5": 100 * (first <= 5).double().mean().item(),
        "map": 100 * area.mean().item(),
    }


def identification(
    probes: Tensor, identities: Tensor, distractors: Tensor, counts: Sequence[int], chunk: int = 10_000
) -> dict[str, float]:
    """Return the rank-1 identification rate in percent for each number of distractors, by the protocol of MegaFace.

    A probe is searched for in a gallery of one other image of its identity and the first ``count`` distractors, once
    for each such image. It is identified if this image is nearer than all distractors, by cosine.

    Args:
        probes: n x d embeddings.
        identities: n, of the probes.
        distractors: m x d embeddings of other people.
        counts: rising numbers, at most m.
    """
    probes, distractors = F.normalize(probes), F.normalize(distractors)
    pairs = (identities[:, None] == identities).fill_diagonal_(False)
    if not pairs.any():
        raise ValueError("no identity has two probes")
    cosines = probes @ probes.T
    nearest = torch.full((len(probes), 1), -torch.inf, dtype=probes.dtype, device=probes.device)
    rates, seen = {}, 0
    for count in counts:
        for part in distractors[seen:count].split(chunk):
            nearest = torch.maximum(nearest, (probes @ part.T).amax(1, keepdim=True))
        seen = count
        rates[f"rank_1_of_{count}"] = 100 * (cosines > nearest)[pairs].double().mean().item()
    return rates


def powers_of_ten(most: int) -> list[int]:
    """Return 10, 100, ... up to ``most``, at most a million; ``most`` itself if it is less than 10."""
    return [10**power for power in range(1, 7) if 10**power <= most] or [most]
