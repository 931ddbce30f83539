"""Attention for images and text in one sequence, and what it takes to run it fast.

    python kernels.py --check      # every backend against float64: values, gradients, leaks
    python kernels.py --bench      # attention against PyTorch's own, as ratios

Row i attends to the columns [0, sees[i]): a staircase, as `sees` never falls from row to row.
SGT_KERNELS=NAME picks a backend, SGT_BF16=0 or 1 the precision; SGT_GRAPHS=0: no CUDA graphs.
Letters: B batch, H heads, S query rows, L key columns, D head dimension.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._pytree import tree_flatten, tree_unflatten
try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it
    triton = None

# ==== 1. Settings
def refuse(mistake):
    """A mistake of the user: one line, exit code 2."""
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)

def setting(name, choices):
    """An environment variable, "" where it is not set."""
    value = os.environ.get(name, "")
    if value not in ["", *choices]:
        refuse(f"{name}={value} is unknown; choose {', '.join(choices)}")
    return value

CHOSEN = setting("SGT_KERNELS", ["reference", "bmm", "sdpa", "triton"])
BF16 = {"0": False, "1": True, "": None}[setting("SGT_BF16", ["0", "1"])]
GRAPHS = setting("SGT_GRAPHS", ["0", "1"]) != "0"

def compute_dtype(device):
    """bf16 where matrix products are faster in it: recent GPUs, CPUs with AVX-512-BF16 or AMX."""
    fast = (torch.cuda.get_device_capability(device)[0] >= 8 if device.type == "cuda"
            else device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if (fast if BF16 is None else BF16) else torch.float32

def compiled(function, dynamic=True):
    """torch.compile for all sizes or, where that fails, the function itself and one line why."""
    torch.fx.experimental._config.use_duck_shape = False  # sizes equal by chance may differ later
    chosen = torch.compile(function, dynamic=dynamic)
    def run(*args):
        nonlocal chosen
        try:
            return chosen(*args)
        except Exception as e:  # torch raises many kinds
            if chosen is function or isinstance(e, torch.OutOfMemoryError):
                raise
            print(f"not compiled ({' '.join(repr(e).split()):.120})", file=sys.stderr)
            chosen = function
        return function(*args)
    return run

# ==== 2. Mask
def staircase(U, T, N):
    """`sees` (U + T + N,) of U patches to look at, which see all patches, T words, which see
    themselves and all before, and N codes to draw, which see everything."""
    return torch.tensor([U] * U + list(range(U + 1, U + T + 1)) + [U + T + N] * N)

def may_attend(sees, columns):
    """sees (S,) -> (1, 1, S, columns) or (B, S) -> (B, 1, S, columns): may row i see column j?"""
    j = torch.arange(columns, device=sees.device)
    return (j < sees[..., None]).view(-1, 1, sees.shape[-1], columns)  # cuDNN needs 4 axes

def draw(sees):
    """The mask of `sees` (S,) as text: '#' may attend, '.' may not."""
    mask = may_attend(sees, int(sees.max()))[0, 0].tolist()
    return "\n".join("".join(".#"[cell] for cell in row) for row in mask)

# ==== 3. Attention on any device
def attention_reference(q, k, v, sees):
    """The definition: softmax(q kᵀ / √D) v over the columns that a row sees, zeros if none.
    q (B, H, S, D); k, v (B, H, L, D) -> output (B, H, S, D), weights (B, H, S, L)."""
    may = may_attend(sees, k.shape[2])
    # At least fp32: with scores rounded to bf16 a model does not learn to look things up.
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).mT * q.shape[-1] ** -0.5  # (B, H, S, L)
    weights = (torch.softmax(scores.masked_fill(~may, -1e9), -1) * may).to(q.dtype)
    return weights @ v, weights

class BmmAttention(torch.autograd.Function):
    """For CPUs: keeps the weights for the backward pass. Computing them again takes far longer."""
    @staticmethod
    def forward(ctx, q, k, v, sees):
        out, weights = attention_reference(q, k, v, sees)
        ctx.save_for_backward(q, k, v, weights)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, weights = ctx.saved_tensors
        # The row sum nearly cancels against its terms: it needs fp32.
        g = (grad_out @ v.mT).to(torch.promote_types(q.dtype, torch.float32))  # (B, H, S, L)
        grad_scores = weights * (g - (g * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        grad_scores = grad_scores.to(q.dtype)
        return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad_out, None

def attention_sdpa(q, k, v, sees):
    """PyTorch's fused attention with a dense mask. A row that sees nothing might be NaN, and then
    all gradients: it looks at column 0 here, and its output is multiplied by zero."""
    mask = may_attend(sees.clamp(min=1), k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask) * may_attend(sees, 1)

# ==== 4. Attention in Triton
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Python, on a CPU
jit = triton.jit if triton else lambda kernel: kernel

@jit
def place(head, rows, end, H, D: tl.constexpr):
    """Where rows of a head lie in a tensor (B, end, H, D), as projections leave it."""
    return ((head // H * end + rows[:, None]) * H + head % H) * D + tl.arange(0, D)[None, :]

@jit
def load(base, head, rows, end, H, D: tl.constexpr):
    return tl.load(base + place(head, rows, end, H, D), mask=(rows < end)[:, None], other=0.0)

@jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # fp32 stays exact: no TF32

@jit
def forward_kernel(Q, K, V, O, LSE, SEES, sees_stride, S, L, H, log2_scale,
                   D: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr):
    """BX rows of a head: a running softmax over tiles of BY columns (FlashAttention-2)."""
    head = tl.program_id(0).to(tl.int64)  # for tensors of more than 2**31 numbers
    r = tl.program_id(1) * BX + tl.arange(0, BX)
    sees = tl.minimum(tl.load(SEES + head // H * sees_stride + r, mask=r < S, other=0), L)
    q = load(Q, head, r, S, H, D)
    acc, total = tl.zeros([BX, D], tl.float32), tl.zeros([BX], tl.float32)
    top = tl.full([BX], -1e29, tl.float32)  # above a masked score
    for n in tl.range(0, tl.max(sees), BY):
        c = n + tl.arange(0, BY)
        k, v = load(K, head, c, L, H, D), load(V, head, c, L, H, D)
        score = dot(q, tl.trans(k)) * log2_scale  # (BX, BY)
        score = tl.where(c[None, :] < sees[:, None], score, -1e30)
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v)
        top = higher
    total = tl.maximum(total, 1.0)  # 0 where a row sees nothing
    tl.store(O + place(head, r, S, H, D), acc / total[:, None], mask=(r < S)[:, None])
    tl.store(LSE + head * S + r, top + tl.log2(total), mask=r < S)

@jit
def backward_kernel(X1, X2, Y1, Y2, GX1, GX2, LSE, DELTA, SEES, sees_stride, S, L, H, log2_scale,
                    D: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr,
                    ROWS: tl.constexpr, MANY: tl.constexpr):
    """With ROWS: X = q and g, the gradient of the output; Y = k and v; GX1 = dq; GX2 is read.
    Else: X = k and v; Y = q and g; GX1 = dk, GX2 = dv. Both compute p: one kernel would have to
    add up dq by atomics, in no fixed order."""
    head = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    x_end, y_end = (S, L) if ROWS else (L, S)
    SEES, at = SEES + head // H * sees_stride, head * S
    x1, x2 = load(X1, head, x, x_end, H, D), load(X2, head, x, x_end, H, D)
    d1, d2 = tl.zeros([BX, D], tl.float32), tl.zeros([BX, D], tl.float32)
    if ROWS:
        bound = tl.load(SEES + x, mask=x < S, other=0)[:, None]
        begin, end = 0, tl.minimum(tl.max(bound), L)
        lse = tl.load(LSE + at + x, mask=x < S, other=0.0)[:, None]
        # fp32: it nearly cancels
        delta = tl.sum(load(GX2, head, x, S, H, D) * x2.to(tl.float32), 1, keep_dims=True)
        tl.store(DELTA + at + x[:, None], delta, mask=x[:, None] < S)
    else:  # `sees` does not fall: all rows from some row on see a column
        row = tl.arange(0, MANY)
        before = tl.load(SEES + row, mask=row < S, other=L) <= tl.min(x)
        begin, end = tl.sum(before.to(tl.int32)), S
    for n in tl.range(begin, end, BY):
        y = n + tl.arange(0, BY)
        y1, y2 = load(Y1, head, y, y_end, H, D), load(Y2, head, y, y_end, H, D)
        if not ROWS:
            bound = tl.load(SEES + y, mask=y < S, other=0)[None, :]
            lse = tl.load(LSE + at + y, mask=y < S, other=0.0)[None, :]
            delta = tl.load(DELTA + at + y, mask=y < S, other=0.0)[None, :]
        p = tl.exp2(dot(x1, tl.trans(y1)) * log2_scale - lse)  # (BX, BY)
        p = tl.where((y[None, :] if ROWS else x[:, None]) < bound, p, 0.0)
        ds = p * (dot(x2, tl.trans(y2)) - delta)
        d1 += dot(ds.to(y1.dtype), y1)
        if not ROWS:
            d2 += dot(p.to(y2.dtype), y2)
    to, there = place(head, x, x_end, H, D), (x < x_end)[:, None]
    tl.store(GX1 + to, d1 * D ** -0.5, mask=there)
    if not ROWS:
        tl.store(GX2 + to, d2, mask=there)

def launch(kernel, tensors, sees, q, k, BX, num_warps, **flags):
    """Run a kernel on tiles of BX rows, or columns, of every head."""
    (B, S, H, D), L, BY, sees = q.shape, k.shape[1], 64, sees.int().contiguous().expand(len(q), -1)
    if q.dtype == torch.float32:
        BX = BY = 32  # larger tiles do not fit
    # Heads come first: the second axis of a grid ends at 65,535.
    kernel[B * H, triton.cdiv(S if flags.get("ROWS", True) else L, BX)](
        *tensors, sees, sees.stride(0), S, L, H, D ** -0.5 * 1.4426950408889634,  # log2(e)
        D=D, BX=BX, BY=BY, num_warps=num_warps, **flags)

# Operators of their own: torch.compile does not look inside. Tiles: the fastest of 17 on an H100.
@torch.library.custom_op("sgt::attention_forward", mutates_args=())
def triton_forward(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> list[Tensor]:
    """The output, and the base-2 log-sum-exp of every row: it lies as (B, H, S)."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch(forward_kernel, (q, k, v, out, lse), sees, q, k, 128, 4)
    return [out, lse]

@torch.library.custom_op("sgt::attention_backward", mutates_args=())
def triton_backward(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, out: Tensor, lse: Tensor,
                    g: Tensor) -> list[Tensor]:
    dq, dk, dv, delta = map(torch.empty_like, (q, k, v, lse))
    rows, columns = (q, g, k, v, dq, out, lse, delta), (k, v, q, g, dk, dv, lse, delta)
    many = triton.next_power_of_2(q.shape[1])
    launch(backward_kernel, rows, sees, q, k, 128, 8, ROWS=True, MANY=many)
    launch(backward_kernel, columns, sees, q, k, 64, 4, ROWS=False, MANY=many)
    return [dq, dk, dv]

triton_forward.register_fake(
    lambda q, *_: [torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)])
triton_backward.register_fake(lambda *args: [torch.empty_like(x) for x in args[:3]])
triton_forward.register_autograd(
    lambda ctx, grads: (*triton_backward(*ctx.saved_tensors, grads[0].contiguous()), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))

def attention_triton(q, k, v, sees):
    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # (B, S, H, D)
    return triton_forward(*rows, sees)[0].transpose(1, 2)

# ==== 5. Choice of a backend
BACKENDS = {"reference": lambda *args: attention_reference(*args)[0],
            "bmm": BmmAttention.apply, "sdpa": attention_sdpa}
if triton and (torch.cuda.is_available() or INTERPRETED):
    BACKENDS["triton"] = attention_triton
if CHOSEN and CHOSEN not in BACKENDS:
    refuse(f"no Triton or no GPU here; got SGT_KERNELS={CHOSEN}; choose {', '.join(BACKENDS)}")

def errors(name, sees, D, device, dtype):
    """‖x - exact‖ / ‖exact‖ of output, dq, dk, dv, (4,), where exact is the definition in float64;
    infinite if a row changes, even by a bit, with a column that it does not see."""
    sees, S, L = sees.to(device), sees.shape[-1], int(sees.max()) + 3
    generator = torch.Generator().manual_seed(L)
    numbers = torch.randn(4, 2, 2, max(S, L), D, generator=generator).to(device, dtype)
    (q, grad), (k, v) = numbers[:2, ..., :S, :], numbers[2:, ..., :L, :]
    def run(name, *qkv):
        inputs = [x.detach().requires_grad_() for x in qkv]
        out = BACKENDS[name](*inputs, sees)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]
    mode, column = torch.get_deterministic_debug_mode(), torch.tensor([2 * L // 3], device=device)
    torch.set_deterministic_debug_mode("warn")  # fills empty tensors with NaN
    found = run(name, q, k, v)
    loud = run(name, q, k.index_fill(2, column, 30.0), v.index_fill(2, column, -1000.0))
    exact = run("reference", q.double(), k.double(), v.double())
    torch.set_deterministic_debug_mode(mode)
    blind = ~may_attend(sees, L)[..., column]  # (1 or B, 1, S, 1)
    if not all(torch.equal(x * blind, y * blind) for x, y in zip(found[:2], loud[:2])):
        return torch.full([4], torch.inf)
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, exact)]).cpu()

@torch.compiler.assume_constant_result  # torch.compile calls it without looking inside
def triton_is_right(*case, known={}):
    """Is Triton right on this GPU, for a D, device and dtype? It may never have been tested."""
    if case in known:
        return known[case]
    try:
        with torch.enable_grad():
            worst = errors("triton", F.pad(staircase(60, 40, 47), (3, 0)), *case).max()
        why = "" if worst <= 0.01 else f"relative error {worst:.1e}"
    except Exception as e:  # where it does not compile, Triton raises many kinds
        torch.set_deterministic_debug_mode(0)
        why = " ".join(repr(e).split())
    if why:
        print(f"Triton is off here ({why:.120})", file=sys.stderr)
    return known.setdefault(case, not why)

def attention(q, k, v, sees):
    """Row i attends to the columns [0, sees[i]): q (B, H, S, D); k, v (B, H, L, D) -> (B, H, S, D).
    `sees` is (S,) or (B, S) and never falls."""
    fastest = "bmm" if q.device.type == "cpu" else "sdpa"
    # Few rows, as in decoding, leave tiles empty; exact fp32 is slow; heads of 128 do not fit
    # every GPU. The loop makes D the constant that torch.compile asks for.
    if not CHOSEN and q.is_cuda and triton and q.shape[2] >= 16 and q.dtype.itemsize == 2:
        for D in (16, 32, 64):
            if q.shape[3] == D and triton_is_right(D, q.device, q.dtype):
                fastest = "triton"
    return BACKENDS[CHOSEN or fastest](q, k, v, sees)

# ==== 6. KV cache and CUDA graphs
class KVCache(NamedTuple):
    """Keys and values of a layer in buffers (B, H, length, D): zeroed, as 0 times NaN is NaN."""
    k: Tensor
    v: Tensor

    def put(self, k, v, at):
        """Write k, v (B, H, S, D) at columns [at, at + S); return everything up to at + S. If `at`
        is (B,) and S is 1, each sample has its own column, and the whole buffers are returned."""
        if isinstance(at, Tensor):
            where = at[:, None, None, None].expand_as(k)
            return self.k.scatter_(2, where, k), self.v.scatter_(2, where, v)
        end = at + k.shape[2]
        self.k[:, :, at:end], self.v[:, :, at:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]

class GraphedStep:
    """A function of (nested) tensors, recorded as a CUDA graph and replayed: one launch in place of
    thousands. Elsewhere a plain call; so are the first three of given shapes, because compiling
    cannot be recorded. Whatever varies, the learning rate too, must be a tensor that is passed;
    nothing inside may ask the GPU for a value. Each call overwrites the last one's results."""
    def __init__(self, function):
        self.function, self.calls, self.graphs = function, {}, {}

    def __call__(self, *inputs):
        leaves, spec = tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if not (GRAPHS and tensors[0].is_cuda):
            return self.function(*inputs)
        key = spec, *((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= 3:
            return self.function(*inputs)
        if key not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            places = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            try:  # thread_local: others may prepare the next batch
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    out = self.function(*tree_unflatten(places, spec))
            except RuntimeError as e:  # something cannot be recorded: only plain calls from now on
                print(f"no CUDA graph ({' '.join(str(e).split()):.120})", file=sys.stderr)
                self.calls[key] = float("-inf")
                return self(*inputs)
            self.graphs[key] = graph, [x for x in places if isinstance(x, Tensor)], out
        graph, places, out = self.graphs[key]
        torch._foreach_copy_(places, tensors)
        graph.replay()
        return out

# ==== 7. Optimizer
def orthogonalize(x):
    """Push all singular values of (N, rows, columns) towards 1 (Muon, Jordan et al. 2024)."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT  # products of the short side
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(compute_dtype(x.device))
    for _ in range(5):
        s = x @ x.mT
        s = torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315)  # b s + c s²
        x = torch.baddbmm(x, s, x, beta=3.4445)  # a x + (b s + c s²) x
    return x.float()

class Optimizer(torch.optim.Optimizer):
    """Muon for the matrices, parameters (..., out, in) with the attribute `is_matrix`, which
    copy.deepcopy loses; Adam for all else."""
    def __init__(self, module, lr, adam_lr):
        matrices = [p for p in module.parameters() if hasattr(p, "is_matrix")]
        rest = [p for p in module.parameters() if not hasattr(p, "is_matrix")]
        super().__init__([{"params": matrices, "lr": lr}, {"params": rest, "lr": adam_lr}], {})
        for p in matrices + rest:
            self.state[p]["mean"] = torch.zeros_like(p)
        for p in rest:
            self.state[p].update(square=torch.zeros_like(p), step=torch.zeros((), device=p.device))

    @torch.no_grad()
    def step(self, scale=1.0):
        """One update with both learning rates times `scale`, a () tensor where a graph replays."""
        muon, adam = self.param_groups
        matrices = [p for p in muon["params"] if p.grad is not None]
        for shape in dict.fromkeys(p.shape for p in matrices):  # equal shapes as one batch
            ps = [p for p in matrices if p.shape == shape]
            grads = [p.grad for p in ps]
            momentum = [self.state[p]["mean"] for p in ps]
            torch._foreach_lerp_(momentum, grads, 0.05)
            nesterov = torch.stack(torch._foreach_lerp(grads, momentum, 0.95))
            update = orthogonalize(nesterov.flatten(0, -3)).reshape(nesterov.shape)
            rate = muon["lr"] * max(1.0, shape[-2] / shape[-1]) ** 0.5 * scale
            torch._foreach_sub_(ps, list(update * rate))
        ps = [p for p in adam["params"] if p.grad is not None]
        mean, square, step = ([self.state[p][s] for p in ps] for s in ("mean", "square", "step"))
        adamw(ps, [p.grad for p in ps], mean, square, [], step, fused=True, lr=adam["lr"] * scale,
              beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False)

# ==== 8. Commands
def check(device):
    """Print the worst errors of every backend; 1 if one is bad."""
    warnings.simplefilter("ignore")  # PyTorch's about its own kernels
    cases = [(staircase(5, 3, 9), 16), (staircase(40, 70, 33), 64),
             (staircase(40, 70, 33)[60:].int(), 32),  # few rows, as with a KV cache
             (F.pad(staircase(60, 30, 130), (4, 0)), 32),  # 4 rows see nothing
             (torch.stack([staircase(90, 20, 10), staircase(9, 101, 10)]), 32)]
    print(f"{'relative errors':26}{'output':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    limits, bad = ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)), False
    for name, (dtype, limit) in itertools.product(BACKENDS, limits):
        if name == "triton" and INTERPRETED and dtype == torch.bfloat16:
            continue  # the interpreter multiplies bf16 wrongly
        worst = torch.stack([errors(name, *case, device, dtype) for case in cases]).amax(0)
        bad |= not worst.max() <= limit  # NaN is bad
        print(f"{name:10}{str(dtype):16}" + "".join(f"{x:10.1e}" for x in worst.tolist()))
    print("some are wrong" if bad else "all agree; no row sees what it may not")
    return int(bad)

def compare(title, runs, turns=10):
    """Print how long functions run, beside the first: in turns, as a busy machine slows all."""
    from torch.utils.benchmark import Timer  # half a second, and noise
    timer = lambda f: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
    times = [[timer(f).blocked_autorange().median for f in runs.values()] for _ in range(turns)]
    middle = torch.tensor(times).quantile(0.5, 0).tolist()
    for name, t in zip(runs, middle):
        print(f"{title:20}{name:16}{t / middle[0]:6.2f} x{1000 * t:10.3f} ms")

def bench(device):
    """One layer's attention against what people would pick instead."""
    from torch.nn.attention import SDPBackend, flex_attention as flex, sdpa_kernel
    gpu = device.type == "cuda"
    B, H, D, blocks = (512, 8, 64, (256, 64, 256)) if gpu else (32, 4, 32, (16, 24, 64))
    sees, S = staircase(*blocks).to(device), sum(blocks)
    numbers = torch.randn(4, B, S, H, D, device=device, dtype=compute_dtype(device))
    *inputs, grad = numbers.transpose(2, 3).requires_grad_().unbind()
    sdpa = lambda *qkv, m=may_attend(sees, S): F.scaled_dot_product_attention(*qkv, m)
    attend = {"ours": compiled(lambda *qkv: attention(*qkv, sees), dynamic=False), "SDPA": sdpa}
    if gpu:  # FlexAttention has no backward on a CPU
        mask = flex.create_block_mask(lambda b, h, i, j: j < sees[i], None, None, S, S, device)
        attend |= {"Flex": functools.partial(torch.compile(flex.flex_attention), block_mask=mask),
                   "cuDNN": sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(sdpa)}
    print(f"{device.type}, {grad.dtype}, B {B}, H {H}, S {S}, D {D}")
    both = lambda f: torch.autograd.grad(f(*inputs), inputs, grad)
    for title, run in [("forward", lambda f: f(*inputs)), ("forward + backward", both)]:
        compare(title, {name: functools.partial(run, f) for name, f in attend.items()})

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    verb = parser.add_mutually_exclusive_group(required=True)
    verb.add_argument("--check", action="store_true", help="compare every backend with float64")
    verb.add_argument("--bench", action="store_true", help="measure attention against PyTorch's")
    parser.error = lambda message: refuse(f"{message}; see python kernels.py --help")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return (check if parser.parse_args().check else bench)(device)

if __name__ == "__main__":
    sys.exit(main())
