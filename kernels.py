"""Attention for unified multimodal sequences, and what it takes to run it fast.

    python kernels.py --check            # every backend against float64: values, gradients, leaks
    python kernels.py --bench [--json]   # how fast each is, as ratios, on this machine

Every sequence of this project is built of blocks, and in each of them the columns that a row may attend to are
one contiguous interval [lo, hi):

    image patches   see their whole block             lo = start of the document   hi = end of the block
    text            sees everything before it         lo = start of the document   hi = own position + 1
    image tokens    see the condition and the block   lo = start of the document   hi = end of the block
    padding         sees nothing                      lo = hi = 0

A row never skips a column in between, because whatever a document has written, everything after it may read. So
the mask of a whole packed batch is two integer vectors instead of a (S, S) tensor, and causal, bidirectional,
prefix, packed and padded attention, and the length of a key-value cache, are all the same code.

    1. Layout       who may attend to whom             4. Memory and graphs   key-value cache, recorded steps
    2. Attention    the definition, and the CPU        5. Optimizer           Muon and AdamW
    3. GPU          the same in Triton                 6. Precision           bf16 where it pays, compilation
                                                       7. Check and bench     the command line

Letters: B batch, H heads, S query rows, L key columns, D head dimension.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

def refuse(mistake: str):
    """A mistake of the user: one line, exit code 2."""
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)

# ---- 1. Layout: who may attend to whom ---------------------------------------------------------------------

class Layout(NamedTuple):
    """Row i of sample b attends to the columns [lo[b, i], hi[b, i]); an empty interval gives zeros.

    The transpose says the same of columns: column j is seen by exactly the rows [first[b, j], last[b, j]). The
    backward pass over columns needs it; without gradients it may be left out.
    """
    lo: Tensor                        # (B, S) int32
    hi: Tensor                        # (B, S)
    first: Tensor | None = None       # (B, L)
    last: Tensor | None = None        # (B, L)

    def to(self, device) -> "Layout":
        return Layout(*(None if x is None else x.to(device) for x in self))

    def may_attend(self, columns: int) -> Tensor:
        """The mask that the intervals stand for, (B, 1, S, columns) bool: may row i attend to column j?"""
        j = torch.arange(columns, device=self.lo.device, dtype=self.lo.dtype)
        return ((j >= self.lo[..., None]) & (j < self.hi[..., None]))[:, None]

def write_document(spans: np.ndarray, row: int, start: int, blocks: list[tuple[str, int]]) -> int:
    """Enter one document, blocks of ("image" or "text", length), at column `start` of a row of spans (4, B, S),
    the four vectors of a Layout; returns the column behind it.
    """
    end = start + sum(n for _, n in blocks)
    assert end <= spans.shape[2], f"a document of {end - start} tokens does not fit a row of {spans.shape[2]}"
    at = start
    for kind, n in blocks:
        own, behind = np.arange(at, at + n), at + n
        hi, first = (behind, at) if kind == "image" else (own + 1, own)
        for vector, value in zip(spans, (start, hi, first, end)):
            vector[row, at:behind] = value
        at = behind
    return end

def draw(layout: Layout, row: int = 0, columns: int | None = None) -> str:
    """The mask of one sample as text, a line a query row: '#' may attend, '.' may not."""
    mask = layout.may_attend(columns or layout.lo.shape[1])[row, 0].tolist()
    return "\n".join("".join("#" if cell else "." for cell in line) for line in mask)

# ---- 2. Attention: the definition, the CPU, and what others offer ------------------------------------------

def attention_reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The definition: softmax(q kᵀ / √D) over the allowed columns, times v.

    q (B, H, S, D); k, v (B, H, L, D); any dtype, float64 included. Returns the output (B, H, S, D) and the
    attention weights (B, H, S, L). Rows that may attend to nothing get zeros, not NaN.
    """
    may, exact = layout.may_attend(k.shape[2]), torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * q.shape[-1] ** -0.5                  # (B, H, S, L)
    weights = (torch.softmax(scores.masked_fill(~may, -1e9), -1) * may).to(q.dtype)
    return weights @ v, weights                                                                 # (B, H, S, D)

class BmmAttention(torch.autograd.Function):
    """Attention as two matrix products forward and four backward, with the softmax weights kept in between.

    PyTorch's fused CPU attention recomputes the scores in blocks to save memory. At the lengths of this project
    (S ≤ a few hundred) the weights fit in the cache, and its backward costs several times what the plain
    products do. torch.compile fuses everything between two products into one pass.
    """
    @staticmethod
    def forward(ctx, q, k, v, lo, hi):
        out, weights = attention_reference(q, k, v, Layout(lo, hi))
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, weights = ctx.saved_tensors
        grad_v = weights.transpose(-1, -2) @ grad_out                                           # (B, H, L, D)
        grad_weights = grad_out @ v.transpose(-1, -2)                                           # (B, H, S, L)
        exact = torch.promote_types(q.dtype, torch.float32)          # the row sum cancels against its terms
        w, g = weights.to(exact), grad_weights.to(exact)
        grad_scores = (w * (g - (g * w).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v, None, None

def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """PyTorch's fused attention with a dense mask. An empty row would be NaN, and so would its gradients, even
    after nan_to_num: it attends to everything here, and its output is multiplied by zero.
    """
    may = layout.may_attend(k.shape[2])
    some = may.any(-1, keepdim=True)                                                         # (B, 1, S, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may | ~some) * some

def attention_split(q: Tensor, k: Tensor, v: Tensor, blocks: list[tuple[str, int]]) -> Tensor:
    """Fused attention once for each block, causal or full, and then with cuDNN's kernel: the baseline to beat
    where every sample is the one document of these blocks (see write_document).
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right
    outs, at = [], 0
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        for kind, n in blocks:
            rows, seen = slice(at, at + n), slice(at + n)
            mask = causal_lower_right(n, at + n) if kind == "text" else None
            outs.append(F.scaled_dot_product_attention(q[:, :, rows], k[:, :, seen], v[:, :, seen], mask))
            at += n
    return torch.cat(outs, 2)

def attention_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """FlexAttention with the same intervals, a baseline. Without a backward on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    if getattr(attention_flex, "layout", None) is not layout:        # the block mask is not part of the work
        lo, hi = layout.lo, layout.hi
        attention_flex.layout, attention_flex.compiled = layout, torch.compile(flex_attention, dynamic=False)
        attention_flex.mask = create_block_mask(lambda b, h, i, j: (j >= lo[b, i]) & (j < hi[b, i]),
                                                len(lo), None, lo.shape[1], k.shape[2], device=q.device)
    return attention_flex.compiled(q, k, v, block_mask=attention_flex.mask)

# ---- 3. Attention on a GPU, in Triton ----------------------------------------------------------------------

try:
    import triton
    import triton.language as tl
except ImportError:                   # a CPU build of torch comes without it
    triton = None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"           # the kernels run as Python, on a CPU too

if triton is not None:
    # In memory tensors are (B, S, H, D): `base + (b·S·H + h)·D` is one head of one sample, its rows H·D apart.
    @triton.jit
    def load_rows(base, rows, end, H, D: tl.constexpr):
        """Some rows of one head as a (len(rows), D) tile; zeros from row `end` on."""
        at = rows[:, None] * H * D + tl.arange(0, D)[None, :]
        return tl.load(base + at, mask=(rows < end)[:, None], other=0.0)

    @triton.jit
    def store_rows(base, rows, end, H, D: tl.constexpr, x):
        at = rows[:, None] * H * D + tl.arange(0, D)[None, :]
        tl.store(base + at, x.to(base.dtype.element_ty), mask=(rows < end)[:, None])

    @triton.jit
    def bounds(FROM, TO, at, inside, end, STEP: tl.constexpr):
        """The intervals of a tile, and the corners of its loop over the other axis in steps of STEP: in
        [c0, c1) some are seen by some, in [c1, c2) all by all, which needs no mask, in [c2, c3) some by some.
        All but the end lie on one grid, or two phases would count the same columns.
        """
        lo, hi = tl.load(FROM + at, mask=inside, other=0), tl.load(TO + at, mask=inside, other=0)
        c0, c3 = tl.min(tl.where(hi > lo, lo, end)) // STEP * STEP, tl.max(hi)
        c1 = tl.minimum(tl.maximum((tl.max(lo) + STEP - 1) // STEP * STEP, c0), c3)
        c2 = tl.maximum(tl.min(tl.where(inside, hi, end)) // STEP * STEP, c1)
        return lo, hi, (c0, c1, c2, c3)

    @triton.jit
    def forward_kernel(Q, K, V, O, LSE, LO, HI, S, L, H, log2_scale,
                       D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """BM query rows of one head: a running softmax over tiles of columns (FlashAttention-2, 2307.08691)."""
        i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)       # B·S·H·D may pass 2³¹
        r, q_at, k_at = i * BM + tl.arange(0, BM), (b * S * H + h) * D, (b * L * H + h) * D
        lo, hi, corners = bounds(LO, HI, b * S + r, r < S, L, BN)
        q = load_rows(Q + q_at, r, S, H, D)
        acc = tl.zeros([BM, D], tl.float32)
        total, top = tl.zeros([BM], tl.float32), tl.full([BM], -1e29, tl.float32)    # above a masked score
        for phase in tl.static_range(3):
            for n in tl.range(corners[phase], corners[phase + 1], BN):
                c = n + tl.arange(0, BN)
                k, v = load_rows(K + k_at, c, L, H, D), load_rows(V + k_at, c, L, H, D)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale                  # (BM, BN)
                if phase != 1:
                    score = tl.where((c[None, :] >= lo[:, None]) & (c[None, :] < hi[:, None]), score, -1e30)
                higher = tl.maximum(top, tl.max(score, 1))
                p, shrink = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
                total, top = total * shrink + tl.sum(p, 1), higher
                acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = tl.where(total > 0, total, 1.0)
        store_rows(O + q_at, r, S, H, D, acc / total[:, None])
        tl.store(LSE + (b * H + h) * S + r, top + tl.log2(total), mask=r < S)

    @triton.jit
    def rows_kernel(Q, K, V, O, G, DQ, DELTA, LSE, LO, HI, S, L, H, log2_scale, scale,
                    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """The gradient of BM queries, and DELTA = Σ out · grad of their rows, for columns_kernel. Both compute
        p anew: one kernel for all would have to add up dq across programs, by atomics in no fixed order.
        """
        i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        r, q_at, k_at = i * BM + tl.arange(0, BM), (b * S * H + h) * D, (b * L * H + h) * D
        lo, hi, corners = bounds(LO, HI, b * S + r, r < S, L, BN)
        q, g = load_rows(Q + q_at, r, S, H, D), load_rows(G + q_at, r, S, H, D)
        delta = tl.sum(load_rows(O + q_at, r, S, H, D).to(tl.float32) * g.to(tl.float32), 1)
        tl.store(DELTA + (b * H + h) * S + r, delta, mask=r < S)
        lse = tl.load(LSE + (b * H + h) * S + r, mask=r < S, other=0.0)
        dq = tl.zeros([BM, D], tl.float32)
        for phase in tl.static_range(3):
            for n in tl.range(corners[phase], corners[phase + 1], BN):
                c = n + tl.arange(0, BN)
                k, v = load_rows(K + k_at, c, L, H, D), load_rows(V + k_at, c, L, H, D)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale                  # (BM, BN)
                p = tl.exp2(score - lse[:, None])              # infinite where a row sees nothing: masked below
                if phase != 1:
                    p = tl.where((c[None, :] >= lo[:, None]) & (c[None, :] < hi[:, None]), p, 0.0)
                ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        store_rows(DQ + q_at, r, S, H, D, dq * scale)

    @triton.jit
    def columns_kernel(Q, K, V, G, DK, DV, DELTA, LSE, LO, HI, FIRST, LAST, S, L, H, log2_scale, scale,
                       D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        """The gradients of BN keys and values: a loop over the rows that see them."""
        i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        c, q_at, k_at = i * BN + tl.arange(0, BN), (b * S * H + h) * D, (b * L * H + h) * D
        _, _, corners = bounds(FIRST, LAST, b * L + c, c < L, S, BM)
        k, v = load_rows(K + k_at, c, L, H, D), load_rows(V + k_at, c, L, H, D)
        dk, dv = tl.zeros([BN, D], tl.float32), tl.zeros([BN, D], tl.float32)
        for phase in tl.static_range(3):
            for m in tl.range(corners[phase], corners[phase + 1], BM):
                r = m + tl.arange(0, BM)
                q, g = load_rows(Q + q_at, r, S, H, D), load_rows(G + q_at, r, S, H, D)
                lse = tl.load(LSE + (b * H + h) * S + r, mask=r < S, other=0.0)
                delta = tl.load(DELTA + (b * H + h) * S + r, mask=r < S, other=0.0)
                score = tl.dot(k, tl.trans(q), input_precision="ieee") * log2_scale                  # (BN, BM)
                p = tl.exp2(score - lse[None, :])
                if phase != 1:
                    lo = tl.load(LO + b * S + r, mask=r < S, other=0)
                    hi = tl.load(HI + b * S + r, mask=r < S, other=0)
                    p = tl.where((c[:, None] >= lo[None, :]) & (c[:, None] < hi[None, :]), p, 0.0)
                dv = tl.dot(p.to(g.dtype), g, dv, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        store_rows(DK + k_at, c, L, H, D, dk * scale)
        store_rows(DV + k_at, c, L, H, D, dv)

def launch(kernel, BM: int, BN: int, warps: int, *args) -> None:
    """Run a kernel on every tile of every head; it sees tensors as (B, S, H, D), as they lie in memory."""
    args = [x.transpose(1, 2).contiguous() if isinstance(x, Tensor) and x.ndim == 4 else x for x in args]
    # (copies the incoming gradient at most: results must come from like(), or the kernel would fill a copy)
    (B, S, H, D), L, q = args[0].shape, args[1].shape[1], args[0]
    if q.dtype == torch.float32:
        BM = BN = 32                            # larger ones spill kilobytes of registers, or do not fit at all
    tiles = -(-L // BN) if kernel is columns_kernel else -(-S // BM)
    scales = [D ** -0.5 * 1.4426950408889634]                   # scores in powers of two: the hardware has exp2
    scales += [] if kernel is forward_kernel else [D ** -0.5]
    kernel[(tiles, H, B)](*args, S, L, H, *scales, D=D, BM=BM, BN=BN, num_warps=warps)

def like(x: Tensor) -> Tensor:
    """Room for a result of the shape of x (B, H, S, D), in memory as (B, S, H, D)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

# Operators of their own, so that torch.compile calls them without looking inside.
@torch.library.custom_op("sgt::interval_forward", mutates_args=())
def triton_forward(q: Tensor, k: Tensor, v: Tensor,
                   lo: Tensor, hi: Tensor, first: Tensor, last: Tensor) -> list[Tensor]:
    """Output (B, H, S, D) and the base-2 log-sum-exp of every row (B, H, S); the backward needs the rest."""
    out, lse = like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch(forward_kernel, 128, 64, 4, q, k, v, out, lse, lo, hi)
    return [out, lse]

@torch.library.custom_op("sgt::interval_backward", mutates_args=())
def triton_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
                    lo: Tensor, hi: Tensor, first: Tensor, last: Tensor) -> list[Tensor]:
    dq, dk, dv, delta = like(q), like(k), like(v), torch.empty_like(lse)
    launch(rows_kernel, 128, 64, 8, q, k, v, out, grad, dq, delta, lse, lo, hi)
    launch(columns_kernel, 64, 128, 8, q, k, v, grad, dk, dv, delta, lse, lo, hi, first, last)
    return [dq, dk, dv]

triton_forward.register_fake(lambda q, *_: [like(q), q.new_empty(q.shape[:3], dtype=torch.float32)])
triton_backward.register_fake(lambda q, k, v, *_: [like(q), like(k), like(v)])
triton_forward.register_autograd(
    lambda ctx, grads: (*triton_backward(*ctx.saved_tensors[:5], grads[0], *ctx.saved_tensors[5:]),
                        *[None] * 4),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3], *output, *inputs[3:]))

def attention_triton(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Both passes skip the tiles that nobody sees, and compare with the intervals only at their edges."""
    if q.shape[3] not in (16, 32, 64, 128) or not (q.is_cuda or INTERPRETED):
        refuse(f"Triton takes heads of 16, 32, 64 or 128 on a GPU, not of {q.shape[3]} on {q.device.type}; "
               "leave out SGT_KERNELS=triton")
    assert layout.first is not None or not k.requires_grad, "a backward pass needs first and last"
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))    # torch.compile fuses these
    return triton_forward(q, k, v, *(layout.lo if x is None else x.contiguous() for x in layout))[0]

# ---- the choice of a backend -------------------------------------------------------------------------------

BACKENDS = {"reference": lambda *args: attention_reference(*args)[0],
            "bmm": lambda q, k, v, layout: BmmAttention.apply(q, k, v, layout.lo, layout.hi),
            "sdpa": attention_sdpa, "flex": attention_flex, "triton": attention_triton}
# SGT_KERNELS: 0 = reference, 1 = the fastest, or a name. torch.compile guards on it; the benchmark swaps it.
CHOSEN = {"0": "reference", "1": ""}.get(os.environ.get("SGT_KERNELS", ""), os.environ.get("SGT_KERNELS", ""))

def backends_here(device: torch.device) -> list[str]:
    runs_triton = triton is not None and (device.type == "cuda" or INTERPRETED)
    return ["reference", "sdpa", "bmm"] + ["flex"] * (device.type == "cuda") + ["triton"] * runs_triton

if CHOSEN:
    here = backends_here(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if CHOSEN not in here:
        refuse(f"there is no attention SGT_KERNELS={CHOSEN} here; choose 0, 1 or one of {', '.join(here)}")

def fastest(q: Tensor, layout: Layout) -> str:
    """The backend for a device, dtype and shape. On a CPU only SDPA's backward is slow; on a GPU the few query
    rows of decoding would leave a tile empty, and heads of 128 do not fit the shared memory of every GPU.
    """
    if q.device.type == "cpu":
        return "bmm" if q.requires_grad else "sdpa"
    fits = triton is not None and q.is_cuda and q.shape[2] >= 16 and q.shape[3] in (16, 32, 64)
    fits = fits and q.dtype in (torch.bfloat16, torch.float16)    # exact products in Triton use no tensor cores
    return "triton" if fits and (layout.first is not None or not q.requires_grad) else "sdpa"

def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, backend: str = "") -> Tensor:
    """Interval attention: q (B, H, S, D); k, v (B, H, L, D) → (B, H, S, D). `backend` is a name in BACKENDS."""
    return BACKENDS[backend or CHOSEN or fastest(q, layout)](q, k, v, layout)

# ---- 4. Memory and graphs: the key-value cache, recorded steps ---------------------------------------------

class KVCache(NamedTuple):
    """Keys and values of one layer in buffers of fixed shape (B, H, length, D), filled from the left."""
    k: Tensor
    v: Tensor

    def put(self, k: Tensor, v: Tensor, at: int | Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, S, D) at columns [at, at + S); return everything up to the end of what was written.
        Where `at` is a () tensor, which a graph can count up, return all: the layout must hide the unwritten.
        """
        if isinstance(at, Tensor):
            columns = at + torch.arange(k.shape[2], device=at.device)
            return self.k.index_copy_(2, columns, k), self.v.index_copy_(2, columns, v)
        end = at + k.shape[2]
        self.k[:, :, at:end], self.v[:, :, at:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]

GRAPHS = os.environ.get("SGT_GRAPHS") != "0"      # SGT_GRAPHS=0 records nothing; the benchmark swaps it

def records(device: torch.device) -> bool:
    return GRAPHS and device.type == "cuda"

class GraphedStep:
    """A function of (nested) tensors, recorded once as a CUDA graph and then replayed: one launch in place of
    thousands, which is what a small model spends its time on. On other devices a plain call.

    The first three calls for given shapes are plain (and real: a training step trains), for compiling and
    loading kernels cannot be recorded, and on a stream of their own, as PyTorch asks for; the fourth records.
    What varies between calls must be in the tensors that are passed, the learning rate too, and nothing inside
    may ask the GPU for a value. The graph knows the weights of a module that is passed by their addresses, so
    it sees what is changed in place; anything else that is passed is a constant. Results live in the graph's
    memory: the next call overwrites them. An input that is changed in place and returned, such as a key-value
    cache, stays there.
    """
    def __init__(self, function):
        self.function, self.calls, self.graphs, self.side = function, {}, {}, None

    def __call__(self, *inputs):
        leaves, spec = tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not records(tensors[0].device):
            return self.function(*inputs)

        def known_by(x):
            if isinstance(x, nn.Module):
                return tuple(w.data_ptr() for w in (*x.parameters(), *x.buffers()))
            return (x.shape, x.dtype) if isinstance(x, Tensor) else x
        key = CHOSEN, BF16, spec, *map(known_by, leaves)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            self.side = self.side or torch.cuda.Stream()
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                out = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.side)
            return out
        if key not in self.graphs:
            graph, static = torch.cuda.CUDAGraph(), [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            try:           # thread_local: what NCCL's thread asks of the GPU meanwhile is no mistake in here
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    out = self.function(*tree_unflatten(static, spec))
                # without the modules: a model that holds its own graphs must not be held by them
                self.graphs[key] = graph, [x for x in static if isinstance(x, Tensor)], out
            except RuntimeError as e:          # something inside cannot be recorded: no worse than without
                print(f"no CUDA graph ({' '.join(str(e).split()):.120}); launching every kernel")
                self.graphs[key] = None
        if self.graphs[key] is None:
            return self.function(*inputs)
        graph, static, out = self.graphs[key]
        for place, value in zip(static, tensors):
            place.copy_(value)                                # nothing to do where they are the same tensor
        graph.replay()
        return out

# ---- 5. Optimizer ------------------------------------------------------------------------------------------

def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Push every singular value of g (…, rows, columns) towards 1 with a quintic Newton-Schulz iteration (Muon,
    Jordan et al. 2024); a batch of matrices costs no more launches than one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.transpose(-1, -2)                          # the products below are of the short side
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(compute_dtype(g.device)).reshape(-1, *x.shape[-2:])
    for _ in range(steps):
        s = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)          # a x + (b s + c s²) x
    return (x if wide else x.transpose(-1, -2)).to(g.dtype).view_as(g)

class Optimizer:
    """Muon for the matrices of the blocks and stems, AdamW for embeddings, positions and heads."""
    def __init__(self, module: nn.Module, lr: float, adam_lr: float):
        self.lr, self.adam_lr = lr, adam_lr
        self.matrices: dict[tuple, list[nn.Parameter]] = {}           # equal shapes are updated together
        others = []
        for name, p in module.named_parameters():
            is_matrix = name.startswith(("blocks.", "encoder.", "decoder.", "see."))
            (self.matrices.setdefault(tuple(p.shape), []) if is_matrix else others).append(p)
        self.momentum = {shape: torch.zeros_like(torch.stack(ps)) for shape, ps in self.matrices.items()}
        device = others[0].device
        self.adam = torch.optim.AdamW(others, lr=torch.tensor(adam_lr, device=device), betas=(0.9, 0.95),
                                      weight_decay=0.0, fused=True, capturable=device.type == "cuda")

    @torch.no_grad()
    def step(self, scale: Tensor | float) -> None:
        """One update with both learning rates times `scale`; a graph can replay it if that is a () tensor."""
        for shape, ps in self.matrices.items():
            grad, momentum = torch.stack([p.grad for p in ps]), self.momentum[shape]
            momentum.lerp_(grad, 0.05)
            update = orthogonalize(grad.lerp(momentum, 0.95))         # Nesterov
            update *= -self.lr * max(1.0, shape[-2] / shape[-1]) ** 0.5 * scale      # Muon's rule for tall ones
            torch._foreach_add_(ps, list(update.unbind()))
        for group in self.adam.param_groups:
            group["lr"].fill_(self.adam_lr * scale)
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        slots = self.adam.state_dict()["state"]
        return {**{f"muon.{i}": m for i, m in enumerate(self.momentum.values())},
                **{f"adam.{i}.{name}": x for i, slot in slots.items() for name, x in slot.items()}}

    def load(self, state: dict[str, Tensor]) -> None:
        for i, m in enumerate(self.momentum.values()):
            m.copy_(state[f"muon.{i}"])                               # to the device of the momentum
        slots: dict[int, dict] = {}
        for key, value in state.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                slots.setdefault(int(i), {})[name] = value
        self.adam.load_state_dict({"state": slots, "param_groups": self.adam.state_dict()["param_groups"]})

def average_gradients(module: nn.Module, world: int) -> None:
    """The mean of the gradients of `world` processes, by one all-reduce of all of them as one vector."""
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    for g, mean in zip(grads, (flat / world).split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))

# ---- 6. Precision and compilation --------------------------------------------------------------------------

# SGT_BF16=0 or 1 overrides what the hardware is good at; the benchmark swaps it.
BF16 = {"0": False, "1": True}.get(os.environ.get("SGT_BF16", ""))
CPU_HAS_BF16 = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())

def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix products are faster in it: recent GPUs and CPUs with AVX-512-BF16 or AMX."""
    fast = device.type == "cpu" and CPU_HAS_BF16
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if (fast if BF16 is None else BF16) else torch.float32

def compiled(function, dynamic: bool = True):
    """torch.compile for all batch sizes or, where that fails, the plain function, and one line why."""
    chosen = None

    def run(*args):
        nonlocal chosen
        if chosen is not None:
            return chosen(*args)
        try:
            attempt = torch.compile(function, dynamic=dynamic)
            out = attempt(*args)
            chosen = attempt
        except torch.OutOfMemoryError:
            raise
        except Exception as e:                 # no compiler, an unsupported platform: torch raises many kinds
            print(f"not compiled ({' '.join(repr(e).split()):.120}); running eagerly")
            out, chosen = function(*args), function
        return out
    return run

# ---- 7. Check and bench ------------------------------------------------------------------------------------

def random_layout(rng: np.random.Generator, B: int, S: int) -> Layout:
    """Rows packed with documents of random blocks, some rows with padding behind them."""
    spans = np.zeros((4, B, S), np.int32)
    block = lambda: (("image", "text")[rng.integers(2)], int(rng.integers(1, 40)))
    for row in range(B):
        at, blocks = 0, [block() for _ in range(rng.integers(1, 4))]
        while at + sum(n for _, n in blocks) <= S:
            at, blocks = write_document(spans, row, at, blocks), [block() for _ in range(rng.integers(1, 4))]
    return Layout(*map(torch.from_numpy, spans))

def errors(name: str, inputs: list[Tensor], grad: Tensor, layout: Layout, want: list[Tensor]) -> list[float]:
    """‖x − want‖ / ‖want‖ of the output and of the three gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attention(*inputs, layout, name)
    got = [out, *torch.autograd.grad(out, inputs, grad)]
    return [float((a.detach().double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(got, want)]

def leaks(name: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, rng: np.random.Generator) -> bool:
    """Whether a row changes by a bit when a column that it may not see is replaced by something large."""
    column = int(rng.integers(k.shape[2]))
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[:, :, column], loud_v[:, :, column] = 30.0, -1000.0
    unseen = ~layout.may_attend(k.shape[2])[:, 0, :, column]                                  # (B, S)
    quiet, loud = (attention(q, *kv, layout, name).transpose(1, 2)[unseen] for kv in ((k, v), (loud_k, loud_v)))
    return not torch.equal(quiet, loud)

def check(cases: int = 6) -> int:
    """Compare every backend here with float64 on random packings; print the worst errors; 1 if one is bad."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)       # fills what is allocated empty with NaN
    torch._dynamo.config.recompile_limit = 64      # beyond it FlexAttention silently runs as something else
    worst, bad = {}, []
    for case in range(cases):
        rng = np.random.default_rng(case)
        B, S, D = (1, 37, 16) if case == 0 else (3, int(rng.integers(60, 300)), (32, 64)[case % 2])
        layout = random_layout(rng, B, S).to(device)
        torch.manual_seed(case)
        exact = [torch.randn(B, 2, S, D, device=device) for _ in range(4)]
        for dtype in (torch.float32, torch.bfloat16):
            *inputs, grad = [x.to(dtype) for x in exact]
            doubles = [x.double().requires_grad_() for x in inputs]
            out = attention_reference(*doubles, layout)[0]
            want = [out.detach(), *torch.autograd.grad(out, doubles, grad.double())]
            for name in backends_here(device):
                if name == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
                    continue                              # Triton's interpreter multiplies bf16 wrongly
                found = errors(name, inputs, grad, layout, want)
                worst[name, dtype] = np.maximum(worst.get((name, dtype), 0.0), found)   # NaN stays NaN
                if leaks(name, *inputs, layout, rng):
                    bad.append(f"{name} in {dtype}: a row depends on a column it may not see (case {case})")
    torch.use_deterministic_algorithms(False)
    print(f"{cases} random packings on {device}, torch {torch.__version__}; "
          f"worst of ‖x − float64‖ / ‖float64‖:\n{'':22}{'output':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for (name, dtype), found in worst.items():
        limit = np.full(4, 1e-5) if dtype == torch.float32 else np.minimum(1e-2, 1.5 * worst["sdpa", dtype])
        rounds = (name, dtype) == ("reference", torch.bfloat16)               # the definition, but not in bf16
        ok = rounds or bool((found <= limit).all())
        numbers = "".join(f"{error:10.1e}" for error in found)
        print(f"{name:10}{str(dtype).removeprefix('torch.'):12}{numbers}{'' if ok else '   BAD'}")
        if not ok:
            bad.append(f"{name} in {dtype} is off by {found.max():.1e}, allowed {limit.min():.1e}")
    print("\n".join(bad) or "all agree; no row sees what it may not")
    return int(bool(bad))

def medians(variants: dict[str, object], seconds: float, device: torch.device) -> dict[str, float]:
    """Seconds a call of each function: the median of rounds in which all of them take turns, so that a busy
    machine slows all alike. The first calls of each (compilation, warm-up, recording) do not count.
    """
    wait = getattr(torch, device.type).synchronize
    for run in variants.values():
        for _ in range(5 if device.type == "cuda" else 2):
            run()
    taken, began = {name: [] for name in variants}, time.perf_counter()
    while time.perf_counter() - began < seconds or min(map(len, taken.values())) < 3:
        for name, run in variants.items():
            wait()
            start = time.perf_counter()
            run(), wait()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}

def bench_attention(cfg, layout: Layout, seconds: float) -> dict:
    """One layer of a Config alone, against what people would pick instead: with the layout of a training batch,
    then with equal documents, which can be split into dense parts.
    """
    device, (B, S), H, D = layout.lo.device, layout.lo.shape, cfg.width // cfg.head_dim, cfg.head_dim
    low, on_gpu = compute_dtype(device), device.type == "cuda"
    qkv = [torch.randn(B, S, H, D, device=device, dtype=low).transpose(1, 2).requires_grad_() for _ in range(3)]
    grad = torch.randn_like(qkv[0])

    def ours(layout: Layout):
        return compiled(functools.partial(BACKENDS[fastest(qkv[0], layout)], layout=layout), dynamic=False)

    def both_passes(attend, dtype: torch.dtype = low):
        inputs = [x.detach().to(dtype).requires_grad_() for x in qkv]
        return lambda: torch.autograd.grad(attend(*inputs), inputs, grad.to(dtype))
    attend = {"ours": ours(layout), **{name: functools.partial(BACKENDS[name], layout=layout)
                                       for name in ["sdpa"] + ["flex"] * on_gpu}}
    other = torch.float32 if low == torch.bfloat16 else torch.bfloat16
    forward = {name: functools.partial(f, *qkv) for name, f in attend.items()}
    backward = {name: both_passes(f) for name, f in attend.items()}
    backward[f"sdpa in {str(other).removeprefix('torch.')}"] = both_passes(attend["sdpa"], other)
    # every sample: an image looked at, a prompt, an image to draw
    blocks = [("image", cfg.patches), ("text", S - cfg.patches - cfg.tokens), ("image", cfg.tokens)]
    spans = np.zeros((4, B, S), np.int32)
    for row in range(B):
        write_document(spans, row, 0, blocks)
    equal = Layout(*map(torch.from_numpy, spans)).to(device)
    attend = {"ours": ours(equal), "sdpa": functools.partial(attention_sdpa, layout=equal),
              "split, cuDNN" if on_gpu else "split": functools.partial(attention_split, blocks=blocks)}
    return {"attention, forward": medians(forward, seconds, device),
            "attention, forward + backward": medians(backward, seconds, device),
            "the same, equal documents": medians({name: both_passes(f) for name, f in attend.items()},
                                                 seconds, device)}

def chosen(run, backend: str, bf16: bool | None):
    """`run` with another backend and precision, and without graphs."""
    def wrapped():
        global CHOSEN, BF16, GRAPHS
        before, (CHOSEN, BF16, GRAPHS) = (CHOSEN, BF16, GRAPHS), (backend, bf16, False)
        try:
            run()
        finally:
            CHOSEN, BF16, GRAPHS = before
    return wrapped

def bench(seconds: float, cfg=None, device: torch.device | None = None) -> dict:
    """Attention, train step, answers and pictures of a Config (by default of tiny on a CPU and base on a GPU)
    against what people would pick instead. Medians in seconds; each group takes turns for `seconds`, the step
    for four times as long.
    """
    import sgt
    from torch.utils.flop_counter import FlopCounterMode
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, low = device.type == "cuda", compute_dtype(device)
    cfg = cfg or sgt.Config(**sgt.PRESETS["base" if on_gpu else "tiny"])
    torch.manual_seed(0)
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=device, dtype=low) for _ in range(2))
    peak = 2 * n ** 3 / medians({"gemm": lambda: a @ b}, 2.0, device)["gemm"]
    batch = sgt.make_batch(cfg, "train", 0, cfg.vqa_batch, cfg.t2i_batch).to(device)
    threads = f"{device.type.upper()}, {torch.get_num_threads()} threads"
    found = {"device": torch.cuda.get_device_name() if on_gpu else threads, "torch": torch.__version__,
             "precision": str(low).removeprefix("torch."), "gemm_gflops": peak / 1e9,
             **bench_attention(cfg, batch.layout, seconds)}

    # the train step: compiled and recorded, compiled, and as written
    torch.manual_seed(0)
    tokenizer = sgt.VisionTokenizer(cfg).to(device).requires_grad_(False)
    model = sgt.UnifiedModel(cfg).to(device)
    optimizer, scale = Optimizer(model, 0.0, 0.0), torch.ones((), device=device)     # rate 0: the weights stay

    def step(batch, scale, block, loss):
        for p in model.parameters():
            p.grad = None
        sum(sgt.losses(model, tokenizer, batch, block, loss).values()).backward()
        optimizer.step(scale)
    compiled_step = lambda: functools.partial(step, block=compiled(sgt.Block.forward),
                                              loss=compiled(sgt.token_loss))
    ours = functools.partial(GraphedStep(compiled_step()), batch, scale)
    with_sdpa = functools.partial(compiled_step(), batch, scale)          # compiled for its own backend
    eager = functools.partial(step, batch, scale, sgt.Block.forward, sgt.token_loss)
    without_graph = lambda run: {"ours, no graph": chosen(run, CHOSEN, BF16)} if records(device) else {}
    began = time.perf_counter()
    ours()
    found["first step, seconds"] = time.perf_counter() - began
    found["train step"] = medians({"ours": ours, **without_graph(ours),
                                   "compiled, sdpa": chosen(with_sdpa, "sdpa", BF16),
                                   "eager, sdpa": chosen(eager, "sdpa", BF16),
                                   "eager fp32, sdpa": chosen(eager, "sdpa", False)}, 4 * seconds, device)
    with FlopCounterMode(display=False) as counter:
        chosen(eager, "sdpa" if on_gpu else "reference", BF16)()      # operators that it knows, attention as dense
    work = counter.get_total_flops() / peak                   # seconds, if everything ran at the matrix rate
    found["share of the matrix rate"] = work / found["train step"]["ours"]
    if device.type == "cpu":                    # what these shapes allow: the products alone, all else for free
        with torch.profiler.profile() as profile:
            ours()
        products = [e for e in profile.key_averages() if re.fullmatch(r"aten::(add|badd)?b?mm", e.key)]
        alone = sum(e.self_cpu_time_total / 1e6 for e in products)
        found["share of the matrix rate, products alone"] = work / alone

    # answers and pictures
    images = sgt.render(cfg, sgt.sample_scenes(cfg, "val", np.arange(64))).image.to(device)
    texts = [[sgt.TEXT.BOS] + sgt.TEXT.encode("two red circles")] * 64
    ask = lambda n, limit: lambda: sgt.answer(model, images[:n], ["what color is the circle?"] * n, limit)
    draw = lambda n: lambda: sgt.generate(model, tokenizer, texts[:n], guidance=2.0)
    for name, run in {"64 answers of 4 tokens": ask(64, 4), "64 pictures, guidance": draw(64),
                      "one picture, guidance": draw(1)}.items():
        found[name] = medians({"ours": run, **without_graph(run),
                               "eager fp32, sdpa": chosen(run, "sdpa", False)}, seconds, device)
    # one sequence: each token reads all weights once, if nothing else took time; the untrained head says no END
    block = torch.empty(2 ** (30 if on_gpu else 26), dtype=torch.uint8, device=device)
    times = medians({"short": ask(1, 9), "long": ask(1, 41), "copy": block.clone}, seconds, device)
    read = sum(w.numel() for w in (*model.blocks.parameters(), model.text_head)) * low.itemsize * (41 - 9)
    bandwidth = 2 * len(block) / times["copy"]
    found["share of the memory bandwidth"] = read / (times["long"] - times["short"]) / bandwidth
    if on_gpu:
        found["peak memory of all variants, MB"] = torch.cuda.max_memory_allocated() / 1e6
    elif sys.platform == "linux":
        import resource                                       # not on Windows; other units on a Mac
        found["peak memory of all variants, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found

def show(found: dict) -> str:
    """The table: milliseconds, and how many times faster ours is."""
    percent = lambda key: f"{100 * found[key]:.0f} %"
    lines = [f"{found['device']}, {found['precision']}, torch {found['torch']}; matrix products at "
             f"{found['gemm_gflops']:.0f} GFLOP/s"]
    for what, times in found.items():
        if isinstance(times, dict):
            lines += [f"\n{what:34}{'ms':>9}{'ours is':>12}"]
            lines += [f"  {name:32}{1000 * t:9.2f}{t / times['ours']:10.2f} ×" for name, t in times.items()]
    alone = "share of the matrix rate, products alone"
    lines += [f"\ntrain step at {percent('share of the matrix rate')} of the matrix rate"
              + (f" ({percent(alone)} if all but its matrix products took no time)" if alone in found else ""),
              f"first step, with compilation: {found['first step, seconds']:.0f} s",
              f"one sequence is decoded at {percent('share of the memory bandwidth')} of the memory bandwidth"]
    return "\n".join(lines)

def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="kernels.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("--check", action="store_true", help="compare every backend with float64")
    p.add_argument("--bench", action="store_true", help="measure every backend, the train step and sampling")
    p.add_argument("--json", action="store_true", help="print the benchmark for a program")
    p.add_argument("--seconds", type=float, default=5.0, help="how long to measure each group (default: 5)")
    p.error = lambda message: refuse(f"{message}; see python kernels.py --help")
    args = p.parse_args(argv)
    if not args.check and not args.bench:
        p.error("nothing to do; give --check or --bench")
    if args.json and not args.bench:
        p.error("--json is for --bench; leave it out")
    if not 0 < args.seconds <= 3600:
        p.error(f"--seconds {args.seconds:g}; give more than 0, up to 3600")
    print("this takes some minutes …", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):     # what is said on the way
        if args.check and check():
            return 1
        found = bench(args.seconds) if args.bench else {}
    if args.bench:
        print(json.dumps(found, indent=1) if args.json else show(found))
    return 0

if __name__ == "__main__":
    import kernels              # sgt.py imports this file as `kernels`: run that copy, so that there is one
    sys.exit(kernels.main())
