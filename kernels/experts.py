"""Grouped kernels: the experts of a mixture-of-experts layer, of both schemes.

    out[t] = sum_c routing[t, c] * down[e](act(gate[e](x[t])) * up[e](x[t])),   e = ids[t, c]

Weights are those of the linears (halves.py, w3a16.py, w4a8.py) with the expert as their first
dimension, and so is what unpacks and multiplies them: a program here takes a block of slots of one
expert (expert_blocks.py) and an output tile, looks up which rows of x its slots have, and calls
the dense kernels' loop. No weight is written in 16 bits anywhere. Launches, of one layer:

    activations         x [M, K] once: an expert's tile gathers its tokens' rows
    sort                slots into blocks
    gate_up             a row [2 I] per slot
    act * up            with the quantization for down, of the rows of slots
    down                a row [N] per slot, multiplied by the slot's routing weight
    sum                 over the top_k slots of a token, in fp32

K is not divided: one token's experts have 8 * 24 output tiles (Qwen3-VL-30B-A3B's gate_up, 64 rows
each), more than a GPU has multiprocessors. Programs of blocks that no router made leave at once.

Which tile: by the mean of slots per expert, as the model of time (expert_times.py) has it for
Qwen3-VL-30B-A3B on an H200; unmeasured. It puts w3a16 behind 16-bit weights from 128 slots per
expert on, where the linears would dequantize first.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from qig_serve.kernels import (
    activation_rows,
    expert_blocks,
    halves,
    launch,
    layout,
    library,
    quantize_activation,
    sharing,
    w3a16,
    w4a8,
)
from qig_serve.kernels.expert_blocks import Blocks
from qig_serve.kernels.launch import Kernel
from qig_serve.kernels.library import ExpertsJob, Prepared
from qig_serve.kernels.ops import KERNELS, on_device
from qig_serve.kernels.tiles import Tile
from qig_serve.kernels.warm_up import COMPILATION

ACTIVATIONS = activation_rows.ACTIVATIONS
TILES: dict[str, list[tuple[float, Tile]]] = {
    "w3a16": [
        (2, Tile("halves", 4, 64, 2, 3, programs_per_sm=4)),
        (6, Tile("halves", 8, 128, 4, 3, programs_per_sm=3)),
        (18, Tile("halves", 16, 128, 4, 3, programs_per_sm=2)),
        (28, Tile("prefill", 32, 64, 4, 3)),
        (256, Tile("prefill", 64, 128, 4, 3)),
        (float("inf"), Tile("prefill", 128, 128, 4, 2)),
    ],
    "w4a8": [
        (6, Tile("prefill", 8, 64, 2, 4)),
        (28, Tile("prefill", 32, 128, 4, 4)),
        (96, Tile("prefill", 64, 128, 4, 4)),
        (float("inf"), Tile("prefill", 128, 128, 4, 4)),
    ],
}
"""Scheme -> [(most slots per expert, on average), tile, ...]."""
_MOST_TRIED = 1 << 14  # tokens, before anything is served


@triton.jit
def _store(
    out_ptr, out, routing_ptr, rows, slots, SLOTS, N, WEIGHTED: tl.constexpr
):  # fmt: skip
    """out fp32 [rows, slots], times the slots' routing weights -> [SLOTS, N]."""
    if WEIGHTED:
        out *= tl.load(routing_ptr + slots, mask=slots < SLOTS, other=0.0)[None, :]
    sharing.store_out(out_ptr, out, out_ptr, rows, slots, SLOTS, N, False)


@triton.jit(do_not_specialize=["M", "SLOTS", "TILES"])
def halves_experts_kernel(
    halves_ptr, x_scale_sum_ptr, weight_ptr, scale_ptr, routing_ptr, slots_ptr, table_ptr, out_ptr,
    M, SLOTS, N, K, TILES,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, X_ORDER: tl.constexpr, WEIGHTED: tl.constexpr, USE_PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * output tiles,); weights as halves_kernel's, of each expert."""
    sharing.start_early(weight_ptr, PDL, False)
    tiles_n = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // tiles_n
    expert = tl.load(table_ptr + block * 3).to(tl.int64)
    if expert < 0:
        return
    pairs = tl.cdiv(K, 256)
    rows = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, 2 * BLOCK_M)
    _, x_rows = expert_blocks.block_of(table_ptr, slots_ptr, block, column // 2, M, SLOTS, TOP_K)
    slots, tokens = expert_blocks.block_of(
        table_ptr, slots_ptr, block, tl.arange(0, BLOCK_M), M, SLOTS, TOP_K
    )
    acc = halves.sum_of_pairs(
        halves_ptr, x_scale_sum_ptr, weight_ptr + expert * pairs * TILES * 12288,
        scale_ptr + expert * pairs * TILES * 128, rows, tokens, 2 * x_rows + column % 2, 0, pairs,
        M, K, TILES, 3, BLOCK_M, BLOCK_N, STAGES, EVEN, X_ORDER, USE_PTX,
    )  # fmt: skip
    _store(out_ptr, acc, routing_ptr, rows, slots, SLOTS, N, WEIGHTED)


@triton.jit(do_not_specialize=["M", "SLOTS", "TILES"])
def w3a16_experts_kernel(
    x_ptr, weight_ptr, scale_ptr, routing_ptr, slots_ptr, table_ptr, out_ptr,
    M, SLOTS, N, K, TILES,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ORDER: tl.constexpr, RAGGED: tl.constexpr, WEIGHTED: tl.constexpr, USE_PTX: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * output tiles,); weights as w3a16_prefill_kernel's, of each expert."""
    sharing.start_early(weight_ptr, PDL, False)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles_n = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // tiles_n
    expert = tl.load(table_ptr + block * 3).to(tl.int64)
    if expert < 0:
        return
    pairs = tl.cdiv(K, 256)
    slots, tokens = expert_blocks.block_of(
        table_ptr, slots_ptr, block, tl.arange(0, BLOCK_M), M, SLOTS, TOP_K
    )
    rows, x_ptrs, weight_ptrs, scale_ptrs = w3a16.pointers(
        x_ptr, weight_ptr + expert * pairs * TILES * 6144, scale_ptr + expert * pairs * TILES * 256,
        tl.program_id(0) % tiles_n, tokens, M, K, TILES, BLOCK_N, True,
    )  # fmt: skip
    acc = w3a16.product_of_groups(
        x_ptrs, (tokens < M)[None, :], weight_ptrs, scale_ptrs, 0, w3a16.groups_of(K, RAGGED), K,
        TILES, BLOCK_M, BLOCK_N, STAGES, ORDER, DTYPE, RAGGED, USE_PTX,
    )  # fmt: skip
    _store(out_ptr, acc, routing_ptr, rows, slots, SLOTS, N, WEIGHTED)


@triton.jit(do_not_specialize=["M", "SLOTS"])
def w4a8_experts_kernel(
    codes_ptr, token_scale_ptr, nibbles_ptr, channel_scale_ptr, routing_ptr, slots_ptr, table_ptr,
    out_ptr, M, SLOTS, N, K, N_PAD,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    WEIGHTED: tl.constexpr, USE_PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks * output tiles,); weights as w4a8_prefill_kernel's, of each expert."""
    sharing.start_early(nibbles_ptr, PDL, False)
    tiles_n = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // tiles_n
    expert = tl.load(table_ptr + block * 3).to(tl.int64)
    if expert < 0:
        return
    rows = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slots, tokens = expert_blocks.block_of(
        table_ptr, slots_ptr, block, tl.arange(0, BLOCK_M), M, SLOTS, TOP_K
    )
    blocks = K // 128
    acc = w4a8.sum_of_products(
        codes_ptr, nibbles_ptr + expert * blocks * N_PAD * 64, rows, tokens, 0, blocks, M, K,
        N_PAD, BLOCK_M, BLOCK_N, STAGES, USE_PTX,
    )  # fmt: skip
    out = w4a8.scaled(acc, token_scale_ptr, channel_scale_ptr + expert * N_PAD, rows, tokens, M, N)
    _store(out_ptr, out, routing_ptr, rows, slots, SLOTS, N, WEIGHTED)


Activations = tuple[torch.Tensor, ...]
"""x as a tile's kernel takes it: in halves, in codes, or [M, K] alone."""


def product(
    scheme: str,
    given: Activations,
    prepared: Prepared,
    n: int,
    k: int,
    blocks: Blocks,
    top_k: int,
    routing: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    use_ptx: bool = True,
) -> torch.Tensor:
    """A row of x times its expert's weight [N, K] transposed, for every slot: [S, N] of `dtype`.

    given: M rows, slot s has row s // top_k; prepared: as the linears' `prepare`, with experts in
    front; routing fp32 [S] multiplies the rows. Rows of slots that have no expert here are left as
    they were allocated.
    """
    weight, scale = prepared.values()
    x, slots = given[0], blocks.slots.numel()
    device = x.device
    out = torch.empty(slots, n, dtype=dtype, device=device)
    size = weight.shape[2]  # of a weight's layout: tiles of rows, or rows
    constants: dict[str, Any] = dict(
        TOP_K=top_k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.num_stages,
        WEIGHTED=routing is not None, USE_PTX=use_ptx, **_options(tile, device),
    )  # fmt: skip
    grid = (blocks.table.shape[0] * triton.cdiv(n, tile.block_n),)
    function = _function(scheme, tile)
    if function is w3a16_experts_kernel:
        weight = weight.view(torch.int16)
        constants |= dict(ORDER=launch.orders(device).weights, RAGGED=k % layout.GROUP != 0)
    else:
        k = x.shape[-1]  # in whole groups
    if function is halves_experts_kernel:
        given, scale = (x, given[1].view(torch.int64)), scale.view(torch.int64)
        order = launch.orders(device).of_halves(tile)
        constants |= dict(EVEN=k % layout.PAIR == 0, X_ORDER=order)
    function[grid](
        *given, weight, scale, routing, blocks.slots, blocks.table, out, x.shape[0], slots, n, k,
        size, **constants,
    )  # fmt: skip
    return out


def _function(scheme: str, tile: Tile) -> Any:
    if scheme == "w4a8":
        return w4a8_experts_kernel
    return halves_experts_kernel if tile.regime == "halves" else w3a16_experts_kernel


def _options(tile: Tile, device: torch.device) -> dict[str, Any]:
    return {**launch.compiler_options(tile), "PDL": False, **launch.early(device)}


def activations(scheme: str, x: torch.Tensor, tile: Tile) -> Activations:
    """x [M, K] as the tile's kernel takes it."""
    if scheme == "w4a8":
        return quantize_activation.quantize(x)
    return quantize_activation.split_halves(x, tile) if tile.regime == "halves" else (x,)


def gated(scheme: str, gate_up: torch.Tensor, tile: Tile, activation: str) -> Activations:
    """act(gate) * up of [M, 2 K] as the tile's kernel takes it."""
    if scheme == "w4a8":
        return quantize_activation.silu_mul_quantize(gate_up, activation)
    if tile.regime == "halves":
        return quantize_activation.silu_mul_halves(gate_up, tile, activation)
    return (quantize_activation.silu_mul(gate_up, activation),)


def select(scheme: str, slots: int, experts: int) -> Tile:
    """The tile for so many slots of so many experts."""
    return next(tile for most, tile in TILES[scheme] if slots <= most * experts)


def run(
    scheme: str,
    x: torch.Tensor,
    routing: torch.Tensor,
    ids: torch.Tensor,
    gate_up: Prepared,
    down: Prepared,
    inter: int,
    activation: str,
    tile: Tile,
    use_ptx: bool = True,
) -> torch.Tensor:
    """The layer for x [M, K] contiguous, M > 0: [M, K] of x's dtype.

    routing fp32 and ids int32 [M, top_k] contiguous, -1 for an expert that is elsewhere; gate_up
    [E, 2 * inter, K] and down [E, K, inter], prepared; activation: one of ACTIVATIONS.
    """
    (_, k), top_k = x.shape, ids.shape[1]
    experts = next(iter(down.values())).shape[0]
    blocks = expert_blocks.sort_slots(ids, experts, tile.block_m)
    given = activations(scheme, x, tile)
    hidden = product(
        scheme, given, gate_up, 2 * inter, k, blocks, top_k, None, x.dtype, tile, use_ptx
    )
    given = gated(scheme, hidden, tile, activation)
    parts = product(scheme, given, down, k, inter, blocks, 1, routing, x.dtype, tile, use_ptx)
    return expert_blocks.sum_slots(parts, ids)


def _experts(
    x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor, gate_up: list[torch.Tensor],
    down: list[torch.Tensor], inter: int, scheme: str, activation: str,
) -> torch.Tensor:  # fmt: skip
    if not ids.numel():
        return torch.zeros_like(x)
    tile = select(scheme, ids.numel(), down[0].shape[0])
    both = [dict(zip(("weight", "scale"), tensors, strict=True)) for tensors in (gate_up, down)]
    routing, ids = routing.float().contiguous(), ids.to(torch.int32).contiguous()
    return run(
        scheme, library.aligned(x), routing, ids, both[0], both[1], inter, activation, tile,
        library.use_ptx(x),
    )  # fmt: skip


library.define(
    "experts(Tensor x, Tensor routing, Tensor ids, Tensor[] gate_up, Tensor[] down, int inter, "
    "str scheme, str activation) -> Tensor",
    _experts,
    lambda x, *_: torch.empty_like(x),
)


def apply(
    scheme: str, x: torch.Tensor, routing: torch.Tensor, ids: torch.Tensor, gate_up: Prepared,
    down: Prepared, inter: int, activation: str,
) -> torch.Tensor:  # fmt: skip
    """`run` through the op, with the tile of TILES; M may be 0."""
    both = list(gate_up.values()), list(down.values())
    return torch.ops.qig.experts(x, routing, ids, *both, inter, scheme, activation)


def token_counts(job: ExpertsJob) -> list[int]:
    """A number of tokens for each tile that a layer may run with."""
    bounds = [0.0, *(most for most, _ in TILES[job.scheme][:-1])]
    counts = {min(int(most * job.experts) // job.top_k + 1, _MOST_TRIED) for most in bounds}
    return sorted(counts)


def compile_ahead(job: ExpertsJob) -> None:
    """Begin to compile, in the background, what a layer launches for any number of tokens."""
    if job.device.type != "cuda":
        return
    job = job._replace(device=(device := launch.indexed(job.device)))
    for _, tile in TILES[job.scheme]:
        COMPILATION.begin((job, tile), functools.partial(on_device, device, _launch, job, tile))


def warm_up(job: ExpertsJob) -> None:
    """Wait until every kernel that was begun, and this layer's, is compiled."""
    compile_ahead(job)
    COMPILATION.finish()


def _launch(job: ExpertsJob, tile: Tile) -> None:
    """Launches for few tokens and for many on zeros, of which only expert 0 is there."""
    scheme, k, inter, experts, top_k, activation, dtype, device = job
    both = [KERNELS[scheme].zeros(n, m, device) for n, m in ((2 * inter, k), (k, inter))]
    gate_up, down = (
        {name: tensor.expand(experts, *tensor.shape) for name, tensor in prepared.items()}
        for prepared in both
    )
    for m in (1, quantize_activation.MANY_TOKENS):
        x = torch.zeros(m, k, dtype=dtype, device=device)
        ids = torch.zeros(m, top_k, dtype=torch.int32, device=device)
        run(scheme, x, ids.float(), ids, gate_up, down, inter, activation, tile, library.use_ptx(x))


def kernel(
    scheme: str, tile: Tile, dtype: str, orders: launch.Orders, weighted: bool = False
) -> Kernel:
    """What a launch with the tile compiles: of down, where weighted, or of gate_up."""
    arguments = dict(
        routing_ptr="*fp32", slots_ptr="*i32", table_ptr="*i32", out_ptr=f"*{dtype}",
        M="i32", SLOTS="i32", N="i32", K="i32",
    )  # fmt: skip
    constants: dict[str, Any] = dict(
        TOP_K=1 if weighted else 8, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        STAGES=tile.num_stages, WEIGHTED=weighted, USE_PTX=True,
    )  # fmt: skip
    function, inputs = _function(scheme, tile), layout.GROUP
    if function is w4a8_experts_kernel:
        arguments |= dict(
            codes_ptr="*i8", token_scale_ptr="*fp32", nibbles_ptr="*i8", channel_scale_ptr="*fp32",
            N_PAD="i32",
        )  # fmt: skip
    elif function is w3a16_experts_kernel:
        arguments |= dict(x_ptr=f"*{dtype}", weight_ptr="*i16", scale_ptr="*i32", TILES="i32")
        constants |= dict(ORDER=orders.weights, RAGGED=False)
    else:
        inputs = layout.PAIR
        arguments |= dict(
            halves_ptr="*i8", x_scale_sum_ptr="*i64", weight_ptr="*i8", scale_ptr="*i64",
            TILES="i32",
        )  # fmt: skip
        constants |= dict(EVEN=True, X_ORDER=orders.of_halves(tile))
    return launch.of_tile(function, arguments, constants, tile, inputs)


def kernels(scheme: str, dtype: str, orders: launch.Orders) -> list[Kernel]:
    """What a layer's launches of TILES compile: of each tile gate_up, then down."""
    return [
        kernel(scheme, tile, dtype, orders, weighted)
        for _, tile in TILES[scheme]
        for weighted in (False, True)
    ]
