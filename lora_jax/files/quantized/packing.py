"""Codes in the words of a file, in NumPy: dense words of 32 bits, and halves of bytes."""

import numpy as np

WORD = 32


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of int32 words along the last axis, from the lowest bits to the highest.

    Codes of a number of bits that does not divide 32 cross from a word into the next.

    >>> unpack_words(np.array([[0x76543210]], np.int32), 4)
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    period = bits if WORD % bits else 1  # words after which codes begin with a word again
    padding = -words.shape[-1] % period
    words = np.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, padding)])
    per_period = period * WORD // bits
    codes = np.empty((*words.shape[:-1], words.shape[-1] // period * per_period), np.uint8)
    for i in range(per_period):
        word, shift = divmod(i * bits, WORD)
        found = words[..., word::period] >> np.uint32(shift)
        if shift + bits > WORD:
            found |= words[..., word + 1 :: period] << np.uint32(WORD - shift)
        codes[..., i::per_period] = (found & np.uint32(2**bits - 1)).astype(np.uint8)
    return codes


def unpack_nibbles(packed: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Return the codes of bytes along the last axis, two neighbours in each."""
    halves = [packed & np.uint8(15), packed >> np.uint8(4)]
    return np.stack(halves[::-1] if high_first else halves, -1).reshape(*packed.shape[:-1], -1)


def pack_blocks(codes: np.ndarray, block: int) -> np.ndarray:
    """Return 4-bit codes as a `QuantizedWeight` has them: halves of each block share bytes.

    >>> pack_blocks(np.array([[1, 2, 3, 4]], np.uint8), 4)
    array([[49, 66]], dtype=uint8)
    """
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // block, 2, block // 2)
    return (blocks[..., 0, :] | blocks[..., 1, :] << np.uint8(4)).reshape(*codes.shape[:-1], -1)
