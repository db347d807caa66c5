"""How the format of GPTQ, as AutoGPTQ defined it, lays a matrix out in words of 32 bits.

A linear layer `L` of `in` inputs and `out` outputs has, in place of `L.weight`,

    L.qweight  int32 [in · bits / 32, out]       codes; word r holds inputs r·n … r·n + n − 1, n = 32 / bits, the
                                                 first in its low bits
    L.qzeros   int32 [groups, out · bits / 32]   zero points, packed the same way along the outputs
    L.scales   float16 [groups, out]
    L.g_idx    int32 [in]                        the group of each input; absent where groups are neighbours

and W[o, i] = scales[g, o] · (code[i, o] − zero[g, o]) with g = g_idx[i]. Words are rounded up; what is beyond the
last code is zero. Version 1 (`checkpoint_format` "gptq") stores the zero points minus one: 0x11111111 or 0x01010101
is subtracted from the word as a whole. Version 2 ("gptq_v2") stores them as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VERSIONS = ("gptq", "gptq_v2")
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


def n_words(n_codes: int, bits: int) -> int:
    """Words that `n_codes` codes take."""
    return -(-n_codes * bits // 32)


def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Codes uint8 [n, m] as int32 [ceil(n · bits / 32), m]."""
    per_word, n_columns = 32 // bits, codes.shape[1]
    padded = np.zeros((n_words(codes.shape[0], bits) * per_word, n_columns), dtype=np.uint8)
    padded[: codes.shape[0]] = codes
    grouped = padded.reshape(-1, per_word, n_columns)
    words = np.zeros((grouped.shape[0], n_columns), dtype=np.uint32)
    for index in range(per_word):
        words |= grouped[:, index].astype(np.uint32) << np.uint32(bits * index)
    return words.view(np.int32)


def unpack_rows(words: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack_rows`, uint8 [n, m] where n fills the words."""
    per_word, mask = 32 // bits, np.uint32(2**bits - 1)
    unsigned = words.view(np.uint32)
    codes = np.empty((words.shape[0], per_word, words.shape[1]), dtype=np.uint8)
    for index in range(per_word):
        codes[:, index] = (unsigned >> np.uint32(bits * index)) & mask
    return codes.reshape(-1, words.shape[1])


def pack_zeros(zeros: NDArray[np.uint8], bits: int, version: str) -> NDArray[np.int32]:
    """Zero points uint8 [groups, out] as `qzeros`, int32 [groups, ceil(out · bits / 32)]."""
    words = np.ascontiguousarray(pack_rows(zeros.T, bits).T).view(np.uint32)
    return (words - _ONES[bits] if version == "gptq" else words).view(np.int32)


def unpack_zeros(qzeros: NDArray[np.int32], bits: int, version: str) -> NDArray[np.uint8]:
    """The inverse of `pack_zeros`, uint8 [groups, n] where n fills the words."""
    words = qzeros.view(np.uint32)
    words = words + _ONES[bits] if version == "gptq" else words
    return unpack_rows(np.ascontiguousarray(words.T).view(np.int32), bits).T
