"""Index codecs are lossless, within their size bound, and reject invalid streams."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fggm_peft.core.index_codec import decode_indices, encode_indices, entropy_bytes, index_dtype


def support(k: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:k].sort().values


def nbytes(indices: torch.Tensor, n: int) -> int:
    return encode_indices(indices, n, compress=True).nbytes


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_encoding_is_lossless_and_never_larger_than_plain_indices(data):
    n = data.draw(st.integers(1, 3000))
    indices = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64)
    for compress in (False, True):
        encoded = encode_indices(indices, n, compress)
        assert encoded.nbytes <= 4 * len(indices)
        decoded = decode_indices(encoded, len(indices), n)
        assert decoded.dtype == torch.int32 and torch.equal(decoded.long(), indices)


def bits(stream: torch.Tensor) -> list[int]:
    return [(byte >> bit) & 1 for byte in stream.tolist() for bit in range(8)]


@pytest.mark.parametrize(("k", "n"), [(5, 100), (64, 1000), (7, 4096), (300, 301), (20, 10**6)])
def test_codes_have_the_documented_layout(k, n):
    indices = support(k, n).tolist()
    code = encode_indices(torch.tensor(indices), n, compress=True)
    assert code.dtype == torch.uint8
    low_bits, width = int(code[0]), -(-k // 8)
    low, high = code[1 : 1 + low_bits * width].view(low_bits, width), code[1 + low_bits * width :]
    gaps = [x - before - 1 for before, x in zip([-1, *indices], indices)]  # noqa: B905
    unary = [bit for gap in gaps for bit in [0] * (gap >> low_bits) + [1]]
    assert bits(high) == unary + [0] * (-len(unary) % 8)
    assert [bits(plane)[:k] for plane in low] == [[(gap >> p) & 1 for gap in gaps] for p in range(low_bits)]


def test_a_code_without_low_bits_is_a_bitmask():
    code = encode_indices(torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 15]), 17, compress=True)
    assert code.tolist() == [0, 0b11101111, 0b10000011]


def elias_fano_bytes(k: int, n: int) -> int:
    return min(-(-(k + ((n - 1) >> low)) // 8) + low * -(-k // 8) for low in range(40))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.15, 0.22, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n", [2048 * 2048, 576 * 1536])
def test_the_size_is_near_the_entropy_and_never_above_elias_fano_or_a_bitmask(density, n):
    indices = support(round(n * density), n)
    k = len(indices)
    size = nbytes(indices, n)
    assert size <= 1 + min(elias_fano_bytes(k, n), -(-n // 8))
    if density <= 0.5:  # the entropy of a nearly full support goes to zero
        assert size <= 1.03 * entropy_bytes(k, n)
    assert size + 2 * k <= 1.065 * (entropy_bytes(k, n) + 2 * k)


def clustered(n: int) -> torch.Tensor:
    """Indices in rows of very unequal density."""
    generator = torch.Generator().manual_seed(0)
    rate = torch.randn(n, 1, generator=generator).exp() * 0.05
    return (torch.rand(n, n, generator=generator) < rate).view(-1).nonzero().view(-1)


@pytest.mark.parametrize("indices", [clustered(512), torch.arange(4096, 14336), torch.arange(0, 512 * 512, 37)])
def test_clustered_indices_take_no_more_than_random_indices(indices):
    n = 512 * 512
    code = encode_indices(indices, n, compress=True)
    assert code.nbytes <= 1 + min(elias_fano_bytes(len(indices), n), n // 8)
    assert code.nbytes <= 1 + 1.09 * entropy_bytes(len(indices), n)
    assert torch.equal(decode_indices(code, len(indices), n).long(), indices)


def test_entropy_is_the_logarithm_of_the_number_of_supports():
    assert entropy_bytes(3, 10) == pytest.approx(math.log2(math.comb(10, 3)) / 8)


def test_a_weight_with_over_two_to_the_31_entries_has_int64_indices():
    n = 2**40
    indices = torch.tensor([0, 5, 2**31 + 7, 2**39, n - 1])
    assert index_dtype(n) == torch.int64 and index_dtype(2**31 - 1) == torch.int32
    decoded = decode_indices(encode_indices(indices, n, compress=True), 5, n)
    assert decoded.dtype == torch.int64 and torch.equal(decoded, indices)


@pytest.mark.parametrize("compress", [False, True])
def test_no_code_causes_a_crash_or_an_invalid_support(compress):
    n, k = 1000, 60
    indices = support(k, n)
    good = encode_indices(indices, n, compress)
    generator = torch.Generator().manual_seed(1)
    refused = 0
    for _ in range(400):
        damaged = good.clone()
        flat = damaged.view(torch.uint8)
        place = int(torch.randint(len(flat), (), generator=generator))
        flat[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        try:
            decoded = decode_indices(damaged, k, n)
        except ValueError:
            refused += 1
            continue
        assert len(decoded) == k and decoded.min() >= 0 and decoded.max() < n
        assert (decoded[1:] > decoded[:-1]).all() and not torch.equal(decoded.long(), indices)
    assert refused > 50


WRONG = {
    "too few bytes": lambda t: t[..., :-1],
    "too many bytes": lambda t: torch.cat([t, t[..., :1]], -1),
    "another dtype": lambda t: t.float(),
    "another rank": lambda t: t[None],
    "empty": lambda t: t[..., :0],
    "a scalar": lambda t: t.reshape(-1)[0],
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("compress", [False, True])
def test_a_tensor_of_another_shape_or_dtype_is_rejected(compress, change):
    good = encode_indices(support(60, 1000), 1000, compress)
    with pytest.raises(ValueError):
        decode_indices(WRONG[change](good), 60, 1000)


@pytest.mark.parametrize("k", [59, 61, 0, 10**15])
@pytest.mark.parametrize("compress", [False, True])
def test_a_code_of_another_number_of_indices_is_rejected(compress, k):
    with pytest.raises(ValueError):
        decode_indices(encode_indices(support(60, 1000), 1000, compress), k, 1000)


def test_a_code_of_no_indices_is_rejected():
    with pytest.raises(ValueError, match="cannot hold 0 indices"):
        decode_indices(torch.zeros(1, dtype=torch.uint8), 0, 63)
