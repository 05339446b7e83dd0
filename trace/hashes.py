"""Hashes of keys and values: what tells whether an entry of the cache is still what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nanokv.cache import KVCache
from nanokv.trace.steps import Audit

Array = np.ndarray
Hash = Callable[[Array], Array]
BASIS, PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
FEW = 4096  # rows: fewer are hashed together, for a call costs the same for one


def hash_words(x: Array) -> Array:  # [..., hd] -> [...]
    """FNV-1a-64 of each row, over its 32-bit words: h = (h xor word) * prime, from the offset basis on."""
    words = x.view(np.uint32) if x.strides[-1] == x.itemsize else np.ascontiguousarray(x).view(np.uint32)
    words = words.transpose(-1, *range(x.ndim - 1))
    columns = words.astype(np.uint64, order="C").reshape(len(words), -1)  # the first word of all rows, the second, ...
    hashes, prime = np.full(columns.shape[1], BASIS), np.full(columns.shape[1], PRIME)
    for column in columns:  # arrays all along: a number beside an array costs as much as the product
        np.bitwise_xor(hashes, column, hashes)
        np.multiply(hashes, prime, hashes)  # modulo 2^64
    return hashes.reshape(x.shape[:-1])


def hashes_and_norms(x: Sequence[Array], hashed: Hash = hash_words) -> tuple[Array, Array]:
    """Of N arrays [T, G, hd]: hash and Euclidean length of each row, [N, T, G]."""
    whole = [np.concatenate(x)] if len(x) * x[0].shape[0] * x[0].shape[1] < FEW else x
    hashes, norms = [hashed(part) for part in whole], [np.sqrt(np.einsum("tgi,tgi->tg", part, part)) for part in whole]
    shape = (len(x), *x[0].shape[:2])
    return (hashes[0] if len(whole) == 1 else np.concatenate(hashes)).reshape(shape), np.concatenate(norms).reshape(shape)


def hash_entries(cache: KVCache, layer: int, n: int) -> tuple[Array, Array]:  # -> [n, G], [n, G]
    """The hashes of the keys and of the values of a layer's first n slots."""
    return hash_words(cache.keys(layer)[:n]), hash_words(cache.values(layer)[:n])


def audit(cache: KVCache, step: int, n: int, hashed: Callable[..., tuple[Array, Array]] = hash_entries) -> Audit:
    """The hashes of the cache's first n slots as they are now, after a step."""
    L, G = cache.config.n_layers, cache.config.n_kv_heads
    by_slot, by_head = np.zeros((2, n), np.uint64), np.zeros((2, L, G), np.uint64)
    for layer in range(L):
        for i, hashes in enumerate(hashed(cache, layer, n)):  # [n, G]
            by_slot[i] += hashes.sum(axis=1)
            by_head[i, layer] = hashes.sum(axis=0)
    return Audit(step, by_slot[0], by_slot[1], by_head[0], by_head[1])
