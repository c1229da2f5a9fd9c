"""Triton kernels over packed rows, whose bytes lie as ``docs/format.md`` says; `gpu` calls them.

Shapes: T tokens, H hidden, I neurons, E experts, R rows of a program. A virtual token is a token at
one of its K experts; V = T · K, and virtual token v is token v div K. In a dense model K and E are
1. Neuron i stands in segment i mod S, so that hot-first neurons are spread evenly. Lists of neurons
are int32 ``[V, S, SEGMENT]``, and ``[V, S]`` their lengths, so nothing waits for the host.

A token's sums never depend on what is computed beside it: programs for one token and for many run
the same code, and no two programs add to one place.
"""

from __future__ import annotations

import triton
import triton.language as tl

SEGMENT = 64  # neurons of a segment at most


@triton.jit
def _combined(gate, up, threshold, ACT: tl.constexpr):
    """`hf.ffn_activation.combined`; a NaN stays one."""
    if ACT == "drelu":
        value = tl.where(gate <= threshold, 0.0, gate) * tl.where(up <= 0, 0.0, up)
    elif ACT == "reglu":
        value = tl.where(gate <= threshold, 0.0, gate) * up
    elif ACT == "relu":
        value = tl.where(up <= 0, 0.0, up)
    elif ACT == "relu2":
        value = tl.where(up <= 0, 0.0, up * up)
    elif ACT == "geglu":
        value = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        tl.static_assert(ACT == "swiglu")
        value = gate / (1 + tl.exp(-gate)) * up
    return value


@triton.jit
def _halves(row, at, mask):
    """Halves number `at` ``[256]`` of the rows, float32 ``[R, 256]``; 0 outside the mask."""
    place = row.to(tl.pointer_type(tl.float16))[:, None] + at[None, :]
    return tl.load(place, mask, 0.0).to(tl.float32)


@triton.jit
def _code(nibble, codes, QUANT: tl.constexpr):
    code = nibble.to(tl.float32) - 8
    if QUANT == "q4":
        code = tl.load(codes + nibble)
    return code


@triton.jit
def _mask(live, at, BLOCKS: tl.constexpr, COLS: tl.constexpr):
    """Rows that live, and columns that are there: of a whole tile all, so that loads are wide."""
    mask = live[:, None]
    if BLOCKS < 16:
        mask = mask & (at < COLS)[None, :]
    return mask


@triton.jit
def _columns(tile, BLOCKS: tl.constexpr, QUANT: tl.constexpr, COLS: tl.constexpr):
    """Which columns the two halves ``[256]`` of a tile are; COLS where there is none.

    The last tile has BLOCKS blocks, the others 16.
    """
    lane = tl.arange(0, 256)
    first, apart = 512 * tile + lane, 256
    if QUANT == "q4" or QUANT == "q4_0":
        first = 512 * tile + lane // 4 % BLOCKS * 32 + lane // (4 * BLOCKS) * 4 + lane % 4
        first, apart = tl.where(lane < 16 * BLOCKS, first, COLS), 16
    return first, first + apart


@triton.jit
def _tile(
    row, live, codes, tile, BLOCKS: tl.constexpr, QUANT: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """The two halves of a tile: pointers `row` ``[R]`` → weights ``[R, 256]`` twice.

    What is in no column is zero, and so are rows that do not live.
    """
    first, second = _columns(tile, BLOCKS, QUANT, COLS)
    if QUANT == "q4" or QUANT == "q4_0":
        mask = _mask(live, first, BLOCKS, COLS)
        at = 256 * tile + tl.arange(0, 256)
        byte = tl.load(row[:, None] + at[None, :], mask, 0)
        scale = _halves(row, COLS // 4 + first // 32, mask)
        low = _code(byte & 15, codes, QUANT) * scale
        high = _code(byte >> 4, codes, QUANT) * scale
    else:
        low = _values(row, first, _mask(live, first, BLOCKS, COLS), QUANT, COLS)
        high = _values(row, second, _mask(live, second, BLOCKS, COLS), QUANT, COLS)
    return low, high


@triton.jit
def _values(row, at, mask, QUANT: tl.constexpr, COLS: tl.constexpr):
    """Weights of f32, f16 or q8 at columns `at` ``[256]``."""
    if QUANT == "q8":
        byte = tl.load(row[:, None] + at[None, :], mask, 0).to(tl.int8, bitcast=True)
        value = byte.to(tl.float32) * _halves(row, COLS // 2 + at // 32, mask)
    elif QUANT == "f16":
        value = _halves(row, at, mask)
    else:
        place = row.to(tl.pointer_type(tl.float32))[:, None] + at[None, :]
        value = tl.load(place, mask, 0.0)
    return value


@triton.jit
def _tile_dots(
    row, live, x, tokens, codes, tile,
    BLOCKS: tl.constexpr, QUANT: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    first, second = _columns(tile, BLOCKS, QUANT, COLS)
    low, high = _tile(row, live, codes, tile, BLOCKS, QUANT, COLS)
    which = tl.arange(0, TOKENS)[:, None]
    sums = tl.zeros((TOKENS, row.shape[0]), tl.float32)
    for token in range(tokens):
        a = tl.load(x + token * COLS + first, first < COLS, 0.0)
        b = tl.load(x + token * COLS + second, second < COLS, 0.0)
        one = tl.sum(low * a[None, :] + high * b[None, :], 1)
        sums += tl.where(which == token, one[None, :], 0.0)
    return sums


@triton.jit
def _dots(
    row, live, x, tokens, codes,
    QUANT: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows × vectors: pointers ``[R]`` and the first `tokens` of ``[TOKENS, COLS]`` → sums."""
    sums = tl.zeros((TOKENS, row.shape[0]), tl.float32)
    for tile in range(COLS // 512):
        sums += _tile_dots(row, live, x, tokens, codes, tile, 16, QUANT, COLS, TOKENS)
    if COLS % 512:
        rest: tl.constexpr = COLS % 512 // 32
        sums += _tile_dots(row, live, x, tokens, codes, COLS // 512, rest, QUANT, COLS, TOKENS)
    return sums


@triton.jit
def _expert(experts, token):
    """That of a virtual token; 0 in a dense model."""
    expert = 0
    if experts is not None:
        expert = tl.load(experts + token)
    return expert


@triton.jit(do_not_specialize=["tokens"])
def matvec(
    out, rows, x, bias, experts, codes, tokens, count, stride,
    K: tl.constexpr, RELU: tl.constexpr, QUANT: tl.constexpr, COLS: tl.constexpr,
    R: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A matrix ``[E, count, COLS]`` × vectors: x ``[T, COLS]`` → out ``[V, count]``.

    Grid: ``[count / R, V / TOKENS]``. Tokens with experts of their own come alone.
    """
    index = tl.program_id(0) * R + tl.arange(0, R)
    live, first = index < count, tl.program_id(1) * TOKENS
    row = rows + (_expert(experts, first) * count + index).to(tl.int64) * stride
    here = tl.minimum(tokens - first, TOKENS)
    sums = _dots(row, live, x + first // K * COLS, here, codes, QUANT, COLS, TOKENS)
    if bias is not None:
        sums += tl.load(bias + index, live, 0.0)[None, :]
    if RELU:
        sums = tl.where(sums <= 0, 0.0, sums)
    token = tl.arange(0, TOKENS)[:, None]
    place = out + (first + token) * count + index[None, :]
    tl.store(place, sums, live[None, :] & (token < here))


@triton.jit
def unpack(
    out, rows, indices, codes, count, stride,
    QUANT: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Rows as float32 ``[count, COLS]``: those of `indices`, or the first. Grid: rows, tiles."""
    index, tile = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    live = index < count
    source = index if indices is None else tl.load(indices + index, live, 0)
    row, full = rows + source.to(tl.int64) * stride, COLS // 512
    to = out + index[:, None].to(tl.int64) * COLS
    if tile < full:
        _copy(to, row, live, codes, tile, 16, QUANT, COLS)
    elif COLS % 512:
        rest: tl.constexpr = COLS % 512 // 32
        _copy(to, row, live, codes, tile, rest, QUANT, COLS)


@triton.jit
def _copy(
    to, row, live, codes, tile, BLOCKS: tl.constexpr, QUANT: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    first, second = _columns(tile, BLOCKS, QUANT, COLS)
    low, high = _tile(row, live, codes, tile, BLOCKS, QUANT, COLS)
    tl.store(to + first[None, :], low, live[:, None] & (first < COLS)[None, :])
    tl.store(to + second[None, :], high, live[:, None] & (second < COLS)[None, :])


@triton.jit
def select(
    kept, values, tallies, rows, x, experts, thresholds, codes, given, gates, lengths,
    neurons, stride,
    STAGE: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, QUANT: tl.constexpr,
    COLS: tl.constexpr, R: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of listed neurons with their token, and list the neurons that stay.

    Grid: ``[V, S]``.

    Args:
        kept, values: the neurons that stay, and of each what was computed.
        tallies: int32 ``[3, V, S]``: how many stay, are above the threshold, and are not zero.
        rows: ``[E, I]`` of them, `stride` bytes apart; x is ``[T, COLS]``.
        thresholds: of each expert.
        given, gates, lengths: neurons of the stage before, what it computed, and how many; or
            None, and all neurons are read.
        STAGE: ``candidates`` of a predictor, whose logits are not below the threshold; ``gates``
            above it; or an activation, which gives Combined of gates and these rows, or of these
            alone. A NaN stays.
        DENSE: all stay.
    """
    token, segment, segments = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    list_ = token * segments + segment
    expert = _expert(experts, token)
    threshold = tl.load(thresholds + expert)
    end = (neurons - segment + segments - 1) // segments
    if given is not None:
        end = tl.load(lengths + list_)
    stay, above, active = 0, 0, 0
    for first in range(0, end, R):
        at = first + tl.arange(0, R)
        live = at < end
        neuron = segment + segments * at
        if given is not None:
            neuron = tl.load(given + list_ * PLACES + at, live, 0)
        row = rows + (expert * neurons + neuron).to(tl.int64) * stride
        value = tl.sum(_dots(row, live, x + token // K * COLS, 1, codes, QUANT, COLS, 1), 0)
        above += tl.sum((live & (value > threshold)).to(tl.int32))
        if STAGE == "candidates":
            keep = live & ~(value < threshold)
        elif STAGE == "gates":
            keep = live & ~(value <= threshold)
        else:
            gate = value
            if gates is not None:
                gate = tl.load(gates + list_ * PLACES + at, live, 0.0)
            value = _combined(gate, value, threshold, STAGE)
            keep = live & ~(value == 0)
            active += tl.sum(keep.to(tl.int32))
        if DENSE:
            keep = live
        to = list_ * PLACES + stay + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept + to, neuron, keep)
        tl.store(values + to, value, keep)
        stay += tl.sum(keep.to(tl.int32))
    lists = tl.num_programs(0) * segments
    tl.store(tallies + list_, stay)
    tl.store(tallies + lists + list_, above)
    tl.store(tallies + 2 * lists + list_, active)


@triton.jit
def sign_words(out, x, COLS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Which of x ``[T, COLS]`` are negative, 32 to a word ``[T, WORDS]``. Grid: tokens, blocks."""
    token, word = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    column = word[:, None] * 32 + bit[None, :]
    value = tl.load(x + token * COLS + column, column < COLS, 0.0)
    words = tl.sum((value < 0).to(tl.int32) << bit[None, :], 1)
    tl.store(out + token * WORDS + word, words, word < WORDS)


@triton.jit
def _ones(word):
    """Bits set of 32."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
def select_signs(
    kept, tallies, rows, words, experts, limits, neurons,
    PARTS: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, R: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """List the neurons of whose PARTS rows of signs none differs from x in too many columns.

    Grid: ``[V, S]``. `rows` are ``[E, I, PARTS, WORDS]`` and `words` ``[T, WORDS]``, int32;
    `limits` ``[E]`` the columns that may differ. What fails at its first row has no second read.
    """
    token, segment, segments = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    list_ = token * segments + segment
    expert = _expert(experts, token)
    limit = tl.load(limits + expert)
    end, stay = (neurons - segment + segments - 1) // segments, 0
    for first in range(0, end, R):
        neuron = segment + segments * (first + tl.arange(0, R))
        keep = neuron < neurons
        for part in tl.static_range(PARTS):
            place = ((expert * neurons + neuron).to(tl.int64) * PARTS + part) * WORDS
            differ = tl.zeros((R,), tl.int32)
            for start in range(0, WORDS, 16):
                at = start + tl.arange(0, 16)
                own = tl.load(words + token // K * WORDS + at)
                row = tl.load(rows + place[:, None] + at[None, :], keep[:, None], 0)
                differ += tl.sum(_ones(row ^ own[None, :]), 1)
            keep = keep & (differ <= limit)
        to = list_ * PLACES + stay + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(kept + to, neuron, keep)
        stay += tl.sum(keep.to(tl.int32))
    tl.store(tallies + list_, stay)


@triton.jit
def downs(
    parts, rows, kept, values, lengths, experts, weights, codes, neurons, segments, stride,
    QUANT: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Sums of down rows, each times its value and its expert's weight: parts ``[V, splits, H]``.

    Grid: ``[V, H / 512, splits]``. A split takes every so manyth segment.
    """
    token, tile, full = tl.program_id(0), tl.program_id(1), COLS // 512
    expert = _expert(experts, token)
    rows += expert.to(tl.int64) * neurons * stride if experts is not None else 0
    lists = token * segments
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + token)
    to = parts + (token * tl.num_programs(2) + tl.program_id(2)) * COLS
    if tile < full:
        _add_up(to, rows, kept, values, lengths, weight, codes, lists, segments, stride, tile,
                16, QUANT, COLS, R, PLACES)  # fmt: skip
    elif COLS % 512:
        rest: tl.constexpr = COLS % 512 // 32
        _add_up(to, rows, kept, values, lengths, weight, codes, lists, segments, stride, tile,
                rest, QUANT, COLS, R, PLACES)  # fmt: skip


@triton.jit
def _add_up(
    to, rows, kept, values, lengths, weight, codes, lists, segments, stride, tile,
    BLOCKS: tl.constexpr, QUANT: tl.constexpr, COLS: tl.constexpr, R: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    lows, highs = tl.zeros((R, 256), tl.float32), tl.zeros((R, 256), tl.float32)
    for segment in range(tl.program_id(2), segments, tl.num_programs(2)):
        end = tl.load(lengths + lists + segment)
        for start in range(0, end, R):
            at = start + tl.arange(0, R)
            live, place = at < end, (lists + segment) * PLACES + at
            neuron = tl.load(kept + place, live, 0)
            value = tl.load(values + place, live, 0.0)
            row = rows + neuron.to(tl.int64) * stride
            low, high = _tile(row, live, codes, tile, BLOCKS, QUANT, COLS)
            lows += low * value[:, None]
            highs += high * value[:, None]
    first, second = _columns(tile, BLOCKS, QUANT, COLS)
    tl.store(to + first, tl.sum(lows, 0) * weight, first < COLS)
    tl.store(to + second, tl.sum(highs, 0) * weight, second < COLS)


@triton.jit
def join(
    out, counts, parts, offered, tallies, positive, neurons, segments,
    K: tl.constexpr, SPLITS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
    PLACES: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a token, ``[V, SPLITS, COLS]`` → ``[T, COLS]``, and its counts.

    Grid: ``[T, COLS / BLOCK]``. Counts are ``[T, 3]``, as `reference.sparse_ffn` has them: of the
    lists `offered`, or all neurons; of those `positive`; and of the last stage's tallies.
    """
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(token * K * SPLITS, (token + 1) * K * SPLITS):
        total += tl.load(parts + part * COLS + column, column < COLS, 0.0)
    tl.store(out + token * COLS + column, total, column < COLS)
    if tl.program_id(1) == 0:
        lists, first = tl.num_programs(0) * K * segments, token * K * segments
        all_ = K * neurons
        if offered is not None:
            all_ = _total(offered + first, K * segments, PLACES)
        tl.store(counts + 3 * token, all_)
        tl.store(counts + 3 * token + 1, _total(positive + lists + first, K * segments, PLACES))
        tl.store(counts + 3 * token + 2, _total(tallies + 2 * lists + first, K * segments, PLACES))


@triton.jit
def _total(numbers, count, PLACES: tl.constexpr):
    total = 0
    for first in range(0, count, PLACES):
        at = first + tl.arange(0, PLACES)
        total += tl.sum(tl.load(numbers + at, at < count, 0))
    return total
