"""The Triton kernels of the LoRA linear; `lora.triton_lora` launches them and says what they add up to.

    hidden_kernel            h_i  = scale_i * (m_i * x) A_i^T                        x is read once for all adapters that share it
    output_kernel            y    = x W^T + b + h_i B_i^T in the columns of adapter i
    output_gradient_kernel   dh_i = scale_i * dy_i B_i   and parts of   dB_i = dy_i^T h_i      dy is read once
    input_gradient_kernel    dx   = dy W + sum_i m_i * (dh_i A_i)
    A_gradient_kernel        parts of   dA_i = dh_i^T (m_i * x)

The work is split at the rank-R product, as in LoRAFusion (arXiv 2510.00206): the long dimensions K and N are each crossed by a kernel that leaves
only (M, R) behind. The masks m_i are no tensors: `keep_mask` recomputes the bits of `lora.masks` wherever they are needed. Sums over M go to parts,
one per program, which the caller adds in order: no atomics, the same bits every time.

A kernel whose name has a base product (y, dx) does it itself where PRODUCT is set, and otherwise adds to what cuBLAS has left in y or dx.
Operands are cast to COMPUTE right after they are loaded, so that A and B may be fp32 beside a bf16 x; products accumulate in fp32, and fp32 operands
are multiplied as such, not as TF32. The rank is padded to BLOCK_R >= 16, the least that tl.dot takes, by masked loads.

Legend: M rows of x, K input features, N output features of all adapters together, R rank, n adapters (ADAPTERS). Tensors: x (M, K), W (N, K), b (N),
A (n R, K), B (N, R), h and dh (M, n R), y and dy (M, N), offsets (n + 1) the first column of each adapter, adapters (n) their ids, scales (n).
All are contiguous along their last dimension; M, K and N are runtime arguments, so that another batch is no other kernel.
"""

import triton
import triton.language as tl

from lora import masks

FIELDS = tl.constexpr(masks.FIELDS)
GOLDEN_RATIO = tl.constexpr(masks.GOLDEN_RATIO)
MULTIPLIER_1, MULTIPLIER_2 = (tl.constexpr(multiplier) for multiplier in masks.MULTIPLIERS)
SHIFT_1, SHIFT_2, SHIFT_3 = (tl.constexpr(shift) for shift in masks.SHIFTS)


@triton.jit
def mix(x):
    """The hash of every element of x (int64), as `lora.masks.mix`."""
    x = (x ^ (x >> SHIFT_1)) * MULTIPLIER_1
    x = (x ^ (x >> SHIFT_2)) * MULTIPLIER_2
    return x ^ (x >> SHIFT_3)


@triton.jit
def adapter_key(state, adapters, i):
    """The key of the i-th adapter's stream, as `lora.masks.adapter_key`."""
    return mix(tl.load(state) + (tl.load(adapters + i) + 1) * GOLDEN_RATIO)


@triton.jit
def keep_mask(key, rows, first_column, K, keep_levels, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bool (BLOCK_M, BLOCK_K): true where an element of x is kept, as `lora.masks.keep_fields`, at these rows (int64) and the columns from
    first_column, a multiple of 4, on. One draw serves four neighbours."""
    # The counter's product with GOLDEN_RATIO, split into a part by row and a part by column, is a multiplication less per draw.
    row_part = key + rows * tl.cdiv(K, 4) * GOLDEN_RATIO
    column_part = (first_column // 4 + tl.arange(0, BLOCK_K // 4)).to(tl.int64) * GOLDEN_RATIO
    draw = mix(row_part[:, None] + column_part[None, :]) & FIELDS
    fields = (draw[:, :, None] >> (tl.arange(0, 4) * 16)[None, None, :].to(tl.int64)).to(tl.int16)
    return tl.reshape(fields < keep_levels.to(tl.int16), (BLOCK_M, BLOCK_K))


@triton.jit
def column_range(offsets, adapter, ALIGNED: tl.constexpr):
    """First column of an adapter and the one behind its last; ALIGNED promises multiples of 16, so that loads and stores are 16 bytes wide."""
    first, end = tl.load(offsets + adapter), tl.load(offsets + adapter + 1)
    if ALIGNED:
        first, end = tl.multiple_of(first, 16), tl.multiple_of(end, 16)
    return first, end


@triton.jit
def grouped(pid, row_blocks, column_blocks, GROUP_M: tl.constexpr):
    """Program number → (row block, column block), GROUP_M row blocks at a time: programs that run together share operands in the L2 cache."""
    group = pid // (GROUP_M * column_blocks)
    first = group * GROUP_M
    height = min(row_blocks - first, GROUP_M)
    within = pid % (GROUP_M * column_blocks)
    return first + within % height, within // height


@triton.jit
def load_rows(base, rows, row_stride, columns, M, end, COMPUTE: tl.constexpr):
    """The tile (rows, columns) of a matrix (M, end), zero outside of it, as COMPUTE."""
    mask = (rows < M)[:, None] & (columns < end)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0).to(COMPUTE)


@triton.jit
def tile_product(
    a, a_row_stride, b, b_inner_stride, b_column_stride, rows, columns, M, end, inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_INNER: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The fp32 tile (rows, columns) of a (M, inner) times b (inner, end)."""
    depth = tl.arange(0, BLOCK_INNER)
    a_tile = a + rows[:, None] * a_row_stride + depth[None, :]
    b_tile = b + depth[:, None].to(tl.int64) * b_inner_stride + columns[None, :].to(tl.int64) * b_column_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        inside = depth < inner - start
        left = tl.load(a_tile, mask=(rows < M)[:, None] & inside[None, :], other=0).to(COMPUTE)
        right = tl.load(b_tile, mask=inside[:, None] & (columns < end)[None, :], other=0).to(COMPUTE)
        total = tl.dot(left, right, total, input_precision="ieee")
        a_tile += BLOCK_INNER
        b_tile += BLOCK_INNER * b_inner_stride
    return total


@triton.jit(do_not_specialize=["M", "keep_levels"])
def hidden_kernel(
    x, A, hidden, state, adapters, scales, M, K, x_row_stride, keep_levels, R: tl.constexpr, ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows and one adapter. The adapters of a block of rows follow each other: after the first, x comes from the L2 cache."""
    pid = tl.program_id(0)
    adapter = pid % ADAPTERS
    rows = (pid // ADAPTERS * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    A += adapter * R * K
    if DROPOUT:
        key = adapter_key(state, adapters, adapter)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = load_rows(x, rows, x_row_stride, columns, M, K, COMPUTE)
        if DROPOUT:
            x_tile = tl.where(keep_mask(key, rows, start, K, keep_levels, BLOCK_M, BLOCK_K), x_tile, 0).to(COMPUTE)
        A_tile = load_rows(A, ranks, K, columns, R, K, COMPUTE)
        total = tl.dot(x_tile, tl.trans(A_tile), total, input_precision="ieee")
    total *= tl.load(scales + adapter)
    mask = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(hidden + rows[:, None] * (ADAPTERS * R) + (adapter * R + ranks)[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["M"])
def output_kernel(
    y, x, W, bias, hidden, B, offsets, M, N, K, x_row_stride, W_row_stride, blocks_per_adapter, R: tl.constexpr, ADAPTERS: tl.constexpr,
    PRODUCT: tl.constexpr, BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y within one adapter's columns. Without PRODUCT, y holds x W^T + b already."""
    row_block, column_block = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), ADAPTERS * blocks_per_adapter, GROUP_M)
    adapter = column_block // blocks_per_adapter
    first, end = column_range(offsets, adapter, ALIGNED)
    first += column_block % blocks_per_adapter * BLOCK_N
    if first >= end:
        return
    rows = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = first + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    y_tile = y + rows[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < end)[None, :]
    if PRODUCT:
        total = tile_product(x, x_row_stride, W, 1, W_row_stride, rows, columns, M, end, K, BLOCK_M, BLOCK_N, BLOCK_K, COMPUTE)
        if BIAS:
            total += tl.load(bias + columns, mask=columns < end, other=0).to(tl.float32)[None, :]
    else:
        total = tl.load(y_tile, mask=mask, other=0).to(tl.float32)
    hidden_tile = load_rows(hidden + adapter * R, rows, ADAPTERS * R, ranks, M, R, COMPUTE)
    B_tile = load_rows(B, columns, R, ranks, end, R, COMPUTE)
    total = tl.dot(hidden_tile, tl.trans(B_tile), total, input_precision="ieee")
    tl.store(y_tile, total, mask=mask)


@triton.jit(do_not_specialize=["M"])
def output_gradient_kernel(
    dy, B, hidden, dhidden, dB_parts, offsets, scales, M, N, dy_row_stride, R: tl.constexpr, ADAPTERS: tl.constexpr,
    NEED_DHIDDEN: tl.constexpr, NEED_DB: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows and all columns of one adapter. Its dh is final; its dB is one of the parts (blocks of rows, N, R), fp32."""
    pid = tl.program_id(0)
    adapter, row_block = pid % ADAPTERS, pid // ADAPTERS
    first, end = column_range(offsets, adapter, ALIGNED)
    rows = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    if NEED_DB:
        dB_part = dB_parts + row_block.to(tl.int64) * N * R
        hidden_tile = load_rows(hidden + adapter * R, rows, ADAPTERS * R, ranks, M, R, COMPUTE)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        dy_tile = load_rows(dy, rows, dy_row_stride, columns, M, end, COMPUTE)
        if NEED_DHIDDEN:
            B_tile = load_rows(B, columns, R, ranks, end, R, COMPUTE)
            total = tl.dot(dy_tile, B_tile, total, input_precision="ieee")
        if NEED_DB:
            part = tl.dot(tl.trans(dy_tile), hidden_tile, input_precision="ieee")
            tl.store(dB_part + columns[:, None] * R + ranks[None, :], part, mask=(columns < end)[:, None] & (ranks < R)[None, :])
    if NEED_DHIDDEN:
        total *= tl.load(scales + adapter)
        tl.store(dhidden + rows[:, None] * (ADAPTERS * R) + (adapter * R + ranks)[None, :], total, mask=(rows < M)[:, None] & (ranks < R)[None, :])


@triton.jit(do_not_specialize=["M", "keep_levels"])
def input_gradient_kernel(
    dx, dy, W, dhidden, A, state, adapters, M, N, K, dy_row_stride, W_row_stride, keep_levels, R: tl.constexpr, ADAPTERS: tl.constexpr,
    DROPOUT: tl.constexpr, PRODUCT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of dx, all adapters. Without PRODUCT, dx holds dy W already."""
    row_block, column_block = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    rows = (row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    dx_tile = dx + rows[:, None] * K + columns[None, :]
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    if PRODUCT:
        total = tile_product(dy, dy_row_stride, W, W_row_stride, 1, rows, columns, M, K, N, BLOCK_M, BLOCK_K, BLOCK_N, COMPUTE)
    else:
        total = tl.load(dx_tile, mask=mask, other=0).to(tl.float32)
    for adapter in range(ADAPTERS):
        dhidden_tile = load_rows(dhidden + adapter * R, rows, ADAPTERS * R, ranks, M, R, COMPUTE)
        A_tile = load_rows(A + adapter * R * K, ranks, K, columns, R, K, COMPUTE)
        if DROPOUT:
            kept = keep_mask(adapter_key(state, adapters, adapter), rows, column_block * BLOCK_K, K, keep_levels, BLOCK_M, BLOCK_K)
            total += tl.where(kept, tl.dot(dhidden_tile, A_tile, input_precision="ieee"), 0)
        else:
            total = tl.dot(dhidden_tile, A_tile, total, input_precision="ieee")
    tl.store(dx_tile, total, mask=mask)


@triton.jit(do_not_specialize=["M", "keep_levels"])
def A_gradient_kernel(
    dhidden, x, dA_parts, state, adapters, M, K, x_row_stride, keep_levels, R: tl.constexpr, ADAPTERS: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of x, BLOCK_K of its columns and one adapter; its dA is one of the parts (blocks of ROWS rows, n R, K), fp32."""
    pid = tl.program_id(0)
    adapter = pid % ADAPTERS
    column_blocks = tl.cdiv(K, BLOCK_K)
    column_block, part = pid // ADAPTERS % column_blocks, pid // ADAPTERS // column_blocks
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R)
    if DROPOUT:
        key = adapter_key(state, adapters, adapter)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(part * ROWS, min(part * ROWS + ROWS, M), BLOCK_M):
        rows = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        x_tile = load_rows(x, rows, x_row_stride, columns, M, K, COMPUTE)
        if DROPOUT:
            x_tile = tl.where(keep_mask(key, rows, column_block * BLOCK_K, K, keep_levels, BLOCK_M, BLOCK_K), x_tile, 0).to(COMPUTE)
        dhidden_tile = load_rows(dhidden + adapter * R, rows, ADAPTERS * R, ranks, M, R, COMPUTE)
        total = tl.dot(tl.trans(dhidden_tile), x_tile, total, input_precision="ieee")
    dA_rows = part.to(tl.int64) * ADAPTERS * R + adapter * R + ranks
    tl.store(dA_parts + dA_rows[:, None] * K + columns[None, :], total, mask=(ranks < R)[:, None] & (columns < K)[None, :])


INTERPRETED = not isinstance(mix, triton.JITFunction)
