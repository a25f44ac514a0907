"""The Triton kernels: forward, and the deterministic two-kernel backward, with plain pointers.

FlashAttention-2's recurrences (Dao 2023) over the listed blocks. Tokens stay in raster order in memory: a block's
slots are turned into addresses on the fly, so there is no permutation and no padding, and partial blocks mask the
slots that hold no token. Statistics are fp32; the softmax scale is applied in fp32 after the dot product, never to a
rounded operand. Rows of ids ascend, so neighbouring programs meet the same keys at about the same time (L2).
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def block_tokens(block, slots, T, H, W, t: tl.constexpr, h: tl.constexpr, w: tl.constexpr):
    """Raster token ids (int64) of a block's slots, and which of the slots hold a token."""
    blocks_h = tl.cdiv(H, h)
    blocks_w = tl.cdiv(W, w)
    a = block // (blocks_h * blocks_w) * t + slots // (h * w)
    b = block // blocks_w % blocks_h * h + slots // w % h
    c = block % blocks_w * w + slots % w
    inside = (a < T) & (b < H) & (c < W) & (slots < t * h * w)
    return ((a * H + b) * W + c).to(tl.int64), inside


@triton.jit
def load_rows(base, tokens, inside, stride, channels, D: tl.constexpr):
    """[rows, BLOCK_D] of a [S, D] matrix; zeros where there is no token or channel."""
    return tl.load(
        base + tokens[:, None] * stride + channels[None, :],
        mask=inside[:, None] & (channels[None, :] < D),
        other=0.0,
    )


@triton.jit
def store_rows(base, tokens, inside, stride, channels, value, D: tl.constexpr):
    tl.store(
        base + tokens[:, None] * stride + channels[None, :],
        value.to(base.dtype.element_ty),
        mask=inside[:, None] & (channels[None, :] < D),
    )


@triton.jit
def forward_kernel(
    q, k, v, o, lse, indices, counts,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    heads, group, num_q, width, scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query slots of one query block of one head."""
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    rows, row_inside = block_tokens(block, tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq)
    q_tile = load_rows(q + batch * q_b + head * q_h, rows, row_inside, q_s, channels, D)
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    row = bh.to(tl.int64) * num_q + block
    count = tl.load(counts + row)
    indices += row * width

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(count):
        key_block = tl.load(indices + j)
        for n in tl.static_range(tiles_n):
            keys, key_inside = block_tokens(key_block, n * BLOCK_N + tl.arange(0, BLOCK_N), Tk, Hk, Wk, tk, hk, wk)
            k_tile = load_rows(k, keys, key_inside, k_s, channels, D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            if PARTIAL_K:
                s = tl.where(key_inside[None, :], s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            # A tile of a partial block may hold no key at all: then nothing has been seen and -inf - -inf is NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top) if PARTIAL_K else new_top
            p = tl.exp2(s - shift[:, None])
            keep = tl.exp2(top - shift)
            total = total * keep + tl.sum(p, 1)
            v_tile = load_rows(v, keys, key_inside, v_s, channels, D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * keep[:, None], input_precision=PRECISION)
            top = new_top
    store_rows(o + batch * o_b + head * o_h, rows, row_inside, o_s, channels, acc / total[:, None], D)
    lse += bh.to(tl.int64) * Tq * Hq * Wq
    tl.store(lse + rows, (top + tl.log2(total)) * LN2, mask=row_inside)


@triton.jit
def dq_kernel(
    q, k, v, do, dq, lse, delta, indices, counts,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    heads, group, num_q, width, scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query slots. lse, delta: fp32 [B, H, Sq]; delta = sum(o * do) - dlse."""
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m, tl.program_id(1)
    batch, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    rows, row_inside = block_tokens(block, tile * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq)
    q_tile = load_rows(q + batch * q_b + head * q_h, rows, row_inside, q_s, channels, D)
    do_tile = load_rows(do + batch * do_b + head * do_h, rows, row_inside, do_s, channels, D)
    statistics = bh.to(tl.int64) * Tq * Hq * Wq + rows
    row_lse = tl.load(lse + statistics, mask=row_inside, other=0.0) * LOG2E
    row_delta = tl.load(delta + statistics, mask=row_inside, other=0.0)
    k += batch * k_b + head // group * k_h
    v += batch * v_b + head // group * v_h
    row = bh.to(tl.int64) * num_q + block
    count = tl.load(counts + row)
    indices += row * width

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(count):
        key_block = tl.load(indices + j)
        for n in tl.static_range(tiles_n):
            keys, key_inside = block_tokens(key_block, n * BLOCK_N + tl.arange(0, BLOCK_N), Tk, Hk, Wk, tk, hk, wk)
            k_tile = load_rows(k, keys, key_inside, k_s, channels, D)
            v_tile = load_rows(v, keys, key_inside, v_s, channels, D)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(s - row_lse[:, None])
            if PARTIAL_K:
                p = tl.where(key_inside[None, :], p, 0.0)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_rows(dq + batch * dq_b + head * dq_h, rows, row_inside, dq_s, channels, acc * scale, D)


@triton.jit
def dkv_kernel(
    q, k, v, do, dk, dv, lse, delta, offsets, pairs,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    kv_heads, group, num_k, scale,
    Tq, Hq, Wq, Tk, Hk, Wk,
    tq: tl.constexpr, hq: tl.constexpr, wq: tl.constexpr, tk: tl.constexpr, hk: tl.constexpr, wk: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTIAL_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N key slots of one key block, summed over the query blocks that keep it and, with grouped
    heads, over the query heads of its group: always in the same order, so two runs agree to the bit.

    offsets [B, H, Nk + 1], pairs: the selection's CSR inverse.
    """
    tiles_m: tl.constexpr = (tq * hq * wq + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (tk * hk * wk + BLOCK_N - 1) // BLOCK_N
    block, tile, bh = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tl.program_id(1)
    batch, kv_head = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    keys, key_inside = block_tokens(block, tile * BLOCK_N + tl.arange(0, BLOCK_N), Tk, Hk, Wk, tk, hk, wk)
    k_tile = load_rows(k + batch * k_b + kv_head * k_h, keys, key_inside, k_s, channels, D)
    v_tile = load_rows(v + batch * v_b + kv_head * v_h, keys, key_inside, v_s, channels, D)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(group):
        head = kv_head * group + g
        q_base = q + batch * q_b + head * q_h
        do_base = do + batch * do_b + head * do_h
        bqh = batch * kv_heads * group + head
        statistics = bqh * Tq * Hq * Wq
        first = tl.load(offsets + bqh * (num_k + 1) + block)
        last = tl.load(offsets + bqh * (num_k + 1) + block + 1)
        for j in range(first, last):
            query_block = tl.load(pairs + j)
            for m in tl.static_range(tiles_m):
                rows, row_inside = block_tokens(
                    query_block, m * BLOCK_M + tl.arange(0, BLOCK_M), Tq, Hq, Wq, tq, hq, wq
                )
                q_tile = load_rows(q_base, rows, row_inside, q_s, channels, D)
                do_tile = load_rows(do_base, rows, row_inside, do_s, channels, D)
                row_lse = tl.load(lse + statistics + rows, mask=row_inside, other=0.0) * LOG2E
                row_delta = tl.load(delta + statistics + rows, mask=row_inside, other=0.0)
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * (scale * LOG2E)  # [N, M]
                p = tl.exp2(s - row_lse[None, :])
                if PARTIAL_Q:
                    p = tl.where(row_inside[None, :], p, 0.0)
                dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
                ds = p * (dp - row_delta[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_rows(dk + batch * dk_b + kv_head * dk_h, keys, key_inside, dk_s, channels, dk_acc * scale, D)
    store_rows(dv + batch * dv_b + kv_head * dv_h, keys, key_inside, dv_s, channels, dv_acc, D)
