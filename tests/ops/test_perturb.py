"""perturb: which numbers, that they are the same everywhere, that they are normal and independent, and what they do."""

from __future__ import annotations

import math

import pytest
import torch
from ops.test_prune_smallest import ISAS, bits

from vlprune_ext import _native, ops, reference

# 16 counters make 64 numbers; vectors hold 8 or 16.
SIZES = (1, 7, 15, 16, 17, 63, 64, 65, 127, 1000, 4097)
STREAMS = [(0, 0), (1, 0), (0, 1), (20240403, 291), (2**32 + 5, 2**40 + 7), (2**63 - 1, 2**63 - 1)]
MANY = 1_000_000
LOW = 0xFFFFFFFF


def numbers(count, seed, tensor_id, device="cpu"):
    """[count] fp32: z, by an eps of 1 on zeros."""
    return ops.perturb(torch.zeros(count, device=device), seed, tensor_id, 1.0)[0]


# ---- the generator ---------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 on Python's integers: four words of a counter of four under a key of two."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & LOW, first >> 32 ^ counter[3] ^ key[1], first & LOW]
        key = [key[0] + 0x9E3779B9 & LOW, key[1] + 0xBB67AE85 & LOW]
    return counter


def number(element, seed, tensor_id):
    """z of one element, by the contract in csrc/ops.h, in Python's floats."""
    counter, which = element // 64 * 16 + element % 16, element % 64 // 16
    words = philox((counter & LOW, counter >> 32, tensor_id & LOW, tensor_id >> 32), (seed & LOW, seed >> 32))
    first, second = words[:2] if which < 2 else words[2:]
    radius = math.sqrt(-2 * math.log(((first >> 1) + 0.5) / 2**31))
    rest = second << 2 & LOW
    angle = ((second >> 30) + (rest - (rest >> 31 << 32)) / 2**32) * math.pi / 2
    return radius * (math.cos(angle) if which % 2 == 0 else math.sin(angle))


KNOWN = [  # Random123's kat_vectors
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([LOW] * 4, [LOW] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, words):
    assert philox(counter, key) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_reference_known_answers(counter, key, words):
    """The reference counts in int64: where a known counter's top bit is set, without it, against Python's integers."""
    counter = [counter[0], counter[1] & 0x7FFFFFFF, *counter[2:]]
    of_reference = reference._philox(
        torch.tensor([counter[0] + (counter[1] << 32)]), counter[2] + (counter[3] << 32), key[0] + (key[1] << 32)
    )
    assert [int(word) for word in of_reference] == philox(counter, key)
    if counter == [0] * 4:
        assert [int(word) for word in of_reference] == words


def test_reference_philox_of_many_counters():
    counters = torch.cat(
        [torch.arange(20), torch.randint(0, 2**62, (20,)), torch.tensor([2**32 - 1, 2**32, 2**63 - 1])]
    )
    for seed, tensor_id in STREAMS:
        words = torch.stack(reference._philox(counters, tensor_id, seed), dim=1)
        key = (seed & LOW, seed >> 32)
        for counter, row in zip(counters.tolist(), words.tolist(), strict=True):
            assert row == philox((counter & LOW, counter >> 32, tensor_id & LOW, tensor_id >> 32), key)


@pytest.mark.parametrize(("seed", "tensor_id"), STREAMS, ids=str)
def test_reference_numbers(seed, tensor_id):
    z = reference.normals(200, seed, tensor_id)
    exact = torch.tensor([number(e, seed, tensor_id) for e in range(200)], dtype=torch.float64)
    assert z.dtype == torch.float64
    assert (z - exact).abs().max() < 1e-13


@pytest.mark.parametrize(("seed", "tensor_id"), STREAMS, ids=str)
def test_numbers_equal_reference(seed, tensor_id, device):
    """1e-4 is what rounding costs where the radius is next to 0; most are exact to a few fp32 roundings."""
    error = (numbers(MANY // 4, seed, tensor_id, device).cpu() - reference.normals(MANY // 4, seed, tensor_id)).abs()
    assert error.max() < 1e-4
    assert error.square().mean().sqrt() < 2e-7


# ---- the same bits everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_on_every_instruction_set(isa, dtype):
    for size in SIZES:
        weight = torch.randn(size).to(dtype)
        for seed, tensor_id in STREAMS:
            with _native.force_isa("scalar"):
                expected = ops.perturb(weight, seed, tensor_id, 0.3)
            with _native.force_isa(isa):
                actual = ops.perturb(weight, seed, tensor_id, 0.3)
            assert torch.equal(bits(actual[0]), bits(expected[0])), size
            assert torch.equal(bits(actual[1]), bits(expected[1])), size


def test_same_million_on_every_instruction_set():
    with _native.force_isa("scalar"):
        expected = numbers(MANY, 3, 4)
    for isa in ISAS[1:]:
        with _native.force_isa(isa):
            assert torch.equal(bits(numbers(MANY, 3, 4)), bits(expected)), isa


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count(isa, threads, dtype):
    weight = torch.randn(41, 137).to(dtype)
    with _native.force_isa(isa):
        torch.set_num_threads(1)
        one = ops.perturb(weight, 5, 6, 0.1)
        torch.set_num_threads(threads)
        many = ops.perturb(weight, 5, 6, 0.1)
    assert torch.equal(bits(one[0]), bits(many[0]))
    assert torch.equal(bits(one[1]), bits(many[1]))


@pytest.mark.gpu
@pytest.mark.parametrize(("seed", "tensor_id"), STREAMS, ids=str)
def test_same_bits_on_every_device(seed, tensor_id, dtype):
    for size in (*SIZES, MANY + 1):
        weight = torch.randn(size).to(dtype)
        for on_cpu, on_gpu in zip(
            ops.perturb(weight, seed, tensor_id, 0.7), ops.perturb(weight.cuda(), seed, tensor_id, 0.7), strict=True
        ):
            assert torch.equal(bits(on_gpu).cpu(), bits(on_cpu)), size


def test_prefix(dtype, device):
    """The first numbers of a larger weight are those of a smaller one; the shape does not count."""
    weight = torch.randn(4200, device=device).to(dtype)
    plus, minus = ops.perturb(weight, 8, 9, 0.2)
    for size in SIZES:
        first = ops.perturb(weight[:size], 8, 9, 0.2)
        assert torch.equal(bits(first[0]), bits(plus[:size]))
        assert torch.equal(bits(first[1]), bits(minus[:size]))
    for shape in ((42, 100), (3, 7, 200), (4200, 1)):
        shaped = ops.perturb(weight.view(shape), 8, 9, 0.2)
        assert shaped[0].shape == shaped[1].shape == shape
        assert torch.equal(bits(shaped[0]).flatten(), bits(plus))


# ---- what they do to a weight ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-3, 0.37, 1.0, 50.0])
def test_rounds_product_sum_and_result(eps, dtype, device):
    """plus and minus are fp32 w +- eps z, rounded once more to the dtype."""
    for size in SIZES:
        weight = torch.randn(size, device=device).to(dtype)
        change = numbers(size, 11, 12, device) * eps
        plus, minus = ops.perturb(weight, 11, 12, eps)
        assert plus.dtype == minus.dtype == dtype
        assert plus.device == minus.device == weight.device
        assert torch.equal(bits(plus), bits((weight.float() + change).to(dtype)))
        assert torch.equal(bits(minus), bits((weight.float() - change).to(dtype)))


def test_equals_reference(dtype, device):
    """Against float64: z's error of 1e-4, and the roundings of the product, of the sum, of the dtype."""
    weight = torch.randn(50, 333).to(dtype)
    for actual, expected in zip(
        ops.perturb(weight.to(device), 1, 2, 0.25), reference.perturb(weight.double(), 1, 2, 0.25), strict=True
    ):
        rounding = torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
        assert bool(((actual.cpu().double() - expected).abs() <= 0.25e-4 + rounding * (expected.abs() + 1)).all())
    assert reference.perturb(weight, 1, 2, 0.25)[0].dtype == dtype


def test_both_ends_lie_around_the_weight(device):
    weight = torch.randn(1000, device=device)
    plus, minus = ops.perturb(weight, 1, 2, 0.5)
    torch.testing.assert_close((plus + minus) / 2, weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((plus - minus) / 1.0, numbers(1000, 1, 2, device), rtol=1e-5, atol=1e-5)


def test_weight_is_not_written(dtype, device):
    """Not even the bits of a NaN or the sign of a zero; what is not finite stays so."""
    weight = torch.randn(300, device=device).to(dtype)
    weight[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
    before = bits(weight).clone()
    plus, minus = ops.perturb(weight, 1, 2, 0.1)
    assert torch.equal(bits(weight), before)
    for end in (plus, minus):
        assert end.data_ptr() != weight.data_ptr()
        assert end.isnan().nonzero().tolist() == [[0]]
        assert end[1:3].tolist() == [float("inf"), -float("inf")]
        assert bool(end[3:].isfinite().all())


def test_strides(dtype, device):
    wide = torch.randn(20, 50, device=device).to(dtype)
    for weight in (
        wide.t(),
        wide[3:9, 5:28],
        wide[:, ::3],
        wide[:1].expand(7, 50),
        wide.view(4, 5, 50).transpose(0, 2),
    ):
        expected = ops.perturb(weight.clone(memory_format=torch.contiguous_format), 1, 2, 0.1)
        for actual, end in zip(ops.perturb(weight, 1, 2, 0.1), expected, strict=True):
            assert actual.is_contiguous()
            assert torch.equal(bits(actual), bits(end))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1)], ids=str)
def test_small_shapes(shape, dtype, device):
    plus, minus = ops.perturb(torch.ones(shape, dtype=dtype, device=device), 1, 2, 0.5)
    assert plus.shape == minus.shape == shape
    if plus.numel():
        assert float(plus) == pytest.approx(1 + 0.5 * number(0, 1, 2), rel=0.01)
        assert float(minus) == pytest.approx(1 - 0.5 * number(0, 1, 2), rel=0.01)


# ---- normal and independent: every threshold lies four standard deviations out ---------------------------------------


@pytest.mark.parametrize(("seed", "tensor_id"), STREAMS, ids=str)
def test_distribution(seed, tensor_id, device):
    z = numbers(MANY, seed, tensor_id, device).cpu().double()
    sigma = 1 / math.sqrt(MANY)
    assert abs(z.mean()) < 4 * sigma
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2) * sigma
    assert abs(z.pow(3).mean()) < 4 * math.sqrt(15) * sigma
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96) * sigma
    # Kolmogorov-Smirnov: exceeded with probability 2 exp(-2 * 2.2**2) = 1.3e-4.
    steps = torch.arange(MANY + 1, dtype=torch.float64) / MANY
    cdf = torch.special.ndtr(z.sort().values)
    assert torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max() < 2.2 * sigma
    # Each of the four numbers of a counter alone, for the mean and the variance.
    for quarter in z[: MANY // 64 * 64].view(-1, 4, 16).unbind(1):
        assert abs(quarter.mean()) < 4 * 2 * sigma
        assert abs(quarter.square().mean() - 1) < 4 * 2 * math.sqrt(2) * sigma
    assert 4 < z.abs().max() < 6.8


def correlation(a, b):
    return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())


def assert_independent(a, b, what):
    limit = 4.5 / math.sqrt(a.numel())
    assert abs(correlation(a, b)) < limit, what
    a, b = a.square() - 1, b.square() - 1  # both of a pair share a radius, and may not show it
    assert abs(correlation(a, b)) < limit, f"{what}, squares"


def test_streams_are_independent(device):
    here = numbers(MANY, 7, 5, device)
    neighbours = [(7, 6), (7, 4), (8, 5), (6, 5), (5, 7), (8, 4), (7, 5 + 2**32), (7 + 2**32, 5), (7, 5 + 2**62)]
    for seed, tensor_id in neighbours:
        assert_independent(here, numbers(MANY, seed, tensor_id, device), (seed, tensor_id))


@pytest.mark.parametrize("lag", [1, 2, 8, 15, 16, 17, 32, 48, 64, 128, 1024])
def test_neighbours_are_independent(lag, device):
    z = numbers(MANY, 7, 5, device)
    assert_independent(z[:-lag], z[lag:], lag)


# ---- torch.library ---------------------------------------------------------------------------------------------------


def test_opcheck(dtype, device):
    weight = torch.randn(9, 10, device=device).to(dtype)
    torch.library.opcheck(torch.ops.vlprune.perturb, (weight, 3, 4, 0.1))
    torch.library.opcheck(torch.ops.vlprune.perturb, (weight.t(), 3, 4, 0.1))


def test_compile_fullgraph(device):
    weight = torch.randn(9, 10, device=device)

    def difference(weight):
        plus, minus = ops.perturb(weight * 2, 3, 4, 0.1)
        return plus.square().sum() - minus.square().sum()

    compiled = torch.compile(difference, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), difference(weight))


@pytest.mark.gpu
def test_cuda_graph(dtype):
    weight = torch.randn(40, 50, device="cuda").to(dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plus, minus = ops.perturb(weight, 3, 4, 0.1)
    for _ in range(2):
        plus.zero_(), minus.zero_()
        graph.replay()
        expected = ops.perturb(weight, 3, 4, 0.1)
        assert torch.equal(plus, expected[0])
        assert torch.equal(minus, expected[1])
        weight.mul_(2)


@pytest.mark.large
@pytest.mark.gpu
def test_weight_past_2_31_elements():
    """2**31 + 100 elements in 16 bits, 13 GB with both results."""
    size = 2**31 + 100
    plus, minus = ops.perturb(torch.zeros(size, dtype=torch.float16, device="cuda"), 3, 4, 1.0)
    for start in (0, 2**30 - 5, 2**31 - 60, size - 70):
        z = torch.tensor([number(e, 3, 4) for e in range(start, start + 70)])
        torch.testing.assert_close(plus[start : start + 70].cpu().float(), z, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(minus[start : start + 70].cpu().float(), -z, rtol=1e-3, atol=1e-4)


def bad(**changes):
    """Arguments of a good call with some replaced."""
    return {"weight": torch.randn(3, 4), "seed": 1, "tensor_id": 2, "eps": 0.1, **changes}


BAD = [
    (bad(weight=[1.0]), TypeError, r"weight is a list; expected a tensor"),
    (bad(weight=torch.randn(3).double()), TypeError, r"weight has dtype torch.float64; expected float32, float16 or"),
    (bad(weight=torch.ones(3, dtype=torch.int64)), TypeError, r"weight has dtype torch.int64; expected float32"),
    (bad(seed=-1), ValueError, r"seed is -1; expected 0 <= seed < 2\*\*63"),
    (bad(seed=2**63), ValueError, r"seed is 9223372036854775808; expected 0 <= seed < 2\*\*63"),
    (bad(seed=0.5), TypeError, r"seed is 0.5; expected an int"),
    (bad(tensor_id=-7), ValueError, r"tensor_id is -7; expected 0 <= tensor_id < 2\*\*63"),
    (bad(tensor_id=2**64), ValueError, r"tensor_id is 18446744073709551616; expected 0 <= tensor_id < 2\*\*63"),
    (bad(tensor_id="a"), TypeError, r"tensor_id is 'a'; expected an int"),
    (bad(eps=0), ValueError, r"eps is 0.0; expected a number between 1e-30 and"),
    (bad(eps=-0.1), ValueError, r"eps is -0.1; expected a number between 1e-30 and"),
    (bad(eps=float("inf")), ValueError, r"eps is inf; expected a number between 1e-30 and"),
    (bad(eps=float("nan")), ValueError, r"eps is nan; expected a number between 1e-30 and"),
    (bad(eps=None), TypeError, r"eps is None; expected a number"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.perturb(**arguments)
