"""Micro-batches within the budgets: what a forward pass costs, and where a batch is cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import ForwardConfig
from .attention import CAPPED_BYTES
from .decoder import DecoderConfig, media_weights_per_layer, weights_per_layer
from .kernels import repeats_keys
from .layers import row_bytes
from .packing import SortedBatch
from .towers import TowerConfig


@dataclass(frozen=True)
class Cost:
    """Cost of a forward pass.

    Attributes:
        per_token: FLOPs of the language model's matrices, for one token that others see.
        per_score: the rest of the last layer, for one token that is scored.
        per_pair: FLOPs of its attention, for one query and one key.
        per_patch: FLOPs of the vision tower's matrices, for one patch.
        token_bytes: intermediate results at their peak, for one token.
        key_bytes: the same for one gathered key with its value.
        patch_bytes: the same for one patch.
        pass_bytes: the same for any pass, however small.
        per_media_token: FLOPs of the updates that the matrices have for a token of media.
        media_token_bytes: intermediate results of these.
    """

    per_token: int
    per_score: int
    per_pair: int
    per_patch: int
    token_bytes: int
    key_bytes: int
    patch_bytes: int
    pass_bytes: int = 0
    per_media_token: int = 0
    media_token_bytes: int = 0


def plan(ordered: SortedBatch, cost: Cost, config: ForwardConfig) -> list[list[int]]:
    """Cut a batch into micro-batches within the budgets of tokens, patches, FLOPs and bytes.

    A branch costs what it does not share with the one before it, and the prefix cache does not
    have. One that exceeds a budget by itself runs alone. An image that is shown in several
    micro-batches counts in each.

    Returns:
        Indices of branches, in order.
    """
    micro_batches: list[list[int]] = []
    budget = (
        config.max_batch_tokens,
        config.max_batch_patches,
        config.max_batch_tflop * 1e12,
        config.max_batch_bytes,
    )
    start = np.array([0, 0, 0, cost.pass_bytes], np.float64)
    used = start.copy()
    shown: frozenset[int] = frozenset()
    for index, branch in enumerate(ordered.branches):
        extra = price(ordered, index, int(ordered.shared[index]), shown, cost)
        if micro_batches and (used + extra <= budget).all():
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
            used, shown = start.copy(), frozenset()
            extra = price(ordered, index, 0, shown, cost)
        used += extra
        shown |= branch.media
    return micro_batches


def price(
    ordered: SortedBatch,
    index: int,
    shared: int,
    shown: frozenset[int],
    cost: Cost,
) -> NDArray[np.float64]:
    """Tokens, patches, FLOPs and bytes of one more branch.

    Args:
        ordered: the batch's conversations.
        index: which branch.
        shared: its first tokens that are computed already, beside those that are cached.
        shown: media that are encoded already.
        cost: the model's.
    """
    branch = ordered.branches[index]
    length, shared = len(branch.keys), max(shared, int(ordered.cached[index]))
    # Its own node's keys, and at most those of one node that ends where it leaves its neighbour.
    keys = length + (branch.prompt_length if ordered.deterministic else shared)
    patches = sum(ordered.media[i].patches for i in branch.media - shown)
    tokens = np.count_nonzero(branch.keys[shared:] < 0)  # of media
    pairs = (length * (length + 1) - shared * (shared + 1)) // 2
    flops = cost.per_token * (length - shared) + cost.per_pair * pairs
    flops += cost.per_patch * patches + cost.per_score + cost.per_media_token * tokens
    size = cost.token_bytes * (length - shared) + cost.key_bytes * keys + cost.patch_bytes * patches
    size += cost.media_token_bytes * tokens
    return np.array([length - shared, patches, flops, size], np.float64)


def costs(decoder: DecoderConfig, vision: TowerConfig | None, itemsize: int) -> Cost:
    """FLOPs and bytes of a forward pass.

    In FLOPs multiply-adds count twice; norms, rotations and activations are left out. Bytes are an
    upper bound, as if nothing were freed early; float32 on CUDA is left out, where torch may keep
    attention's weights too.

    Args:
        decoder: the language model's.
        vision: the tower's; None: there is none.
        itemsize: bytes of one activation.
    """
    layer, seen = weights_per_layer(decoder)  # the last one computes `seen` for what is not scored
    media_layer, media_seen = media_weights_per_layer(decoder)
    width = decoder.heads * decoder.head_dim
    keys = 2 * decoder.kv_heads * decoder.head_dim
    # Gathered, and where the kernel wants it, repeated for every query head. Pages are used where
    # they are fewer rows.
    gathered = keys + (2 * width if repeats_keys() else 0)
    per_patch, patch_bytes = (0, 0) if vision is None else vision.patch_costs(itemsize)
    return Cost(
        per_token=2 * (layer * (decoder.layers - 1) + seen),
        per_score=2 * (layer - seen),
        per_pair=4 * width * (decoder.layers - 1),
        per_patch=per_patch,
        token_bytes=row_bytes(decoder.hidden, 2 * width + keys, decoder.inner, itemsize),
        key_bytes=gathered * itemsize,
        patch_bytes=patch_bytes,
        pass_bytes=0 if decoder.softcap is None else CAPPED_BYTES,
        per_media_token=2 * (media_layer * (decoder.layers - 1) + media_seen),
        media_token_bytes=_update_bytes(decoder) * itemsize,
    )


def _update_bytes(decoder: DecoderConfig) -> int:
    """Count the values of the largest update, between A and B; it is added in place."""
    return 2 * decoder.media_rank
