"""Attention for unified multimodal sequences, and what it takes to run it fast.

Every sequence of this project is built of three kinds of blocks, and in each of them the columns a row may attend to
are one contiguous interval [lo, hi):

    image patches   see their whole block             lo = start of the document   hi = end of the block
    text            sees everything before it         lo = start of the document   hi = own position + 1
    image tokens    see the condition and the block   lo = start of the document   hi = end of the block
    padding         sees nothing                      lo = hi = 0

So the mask of a whole packed batch is two integer vectors instead of a (S, S) tensor: causal, bidirectional, prefix,
packed and padded attention, and the length of a key-value cache, are all the same code.

Letters: B batch, H heads, S query rows, L key columns, D head dimension.
"""
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- 1. Layout: who may attend to whom ---------------------------------------------------------------------

@dataclass
class Layout:
    """Row i of sample b attends to the columns [lo[b, i], hi[b, i]); an empty interval gives an output of zeros."""
    lo: Tensor                                                                                  # (B, S) int32
    hi: Tensor                                                                                  # (B, S) int32

    def may_attend(self, columns: int) -> Tensor:
        """The mask that the intervals stand for: True where row i may attend to column j; (B, 1, S, columns) bool."""
        j = torch.arange(columns, device=self.lo.device, dtype=self.lo.dtype)
        return ((j >= self.lo[..., None]) & (j < self.hi[..., None]))[:, None]

def draw(layout: Layout, columns: int, row: int = 0) -> str:
    """The mask of one sample as text, a line a query row: '#' may attend, '.' may not."""
    mask = layout.may_attend(columns)[row, 0].tolist()
    return "\n".join("".join("#" if cell else "." for cell in line) for line in mask)

# ---- 2. Attention ------------------------------------------------------------------------------------------

def attention_reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The definition: softmax(q kᵀ / √D) over the allowed columns, times v.

    q (B, H, S, D); k, v (B, H, L, D); any dtype, float64 included. Returns the output (B, H, S, D) and the attention
    weights (B, H, S, L). Rows that may attend to nothing get zeros, not NaN.
    """
    may = layout.may_attend(k.shape[2])
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5                                    # (B, H, S, L)
    weights = torch.softmax(scores.masked_fill(~may, -1e9 if q.dtype != torch.float16 else -6e4), -1) * may
    return weights @ v, weights                                                                 # (B, H, S, D)

class BmmAttention(torch.autograd.Function):
    """Attention as two matrix products forward and four backward, with the softmax weights kept in between.

    PyTorch's fused CPU attention recomputes the scores in blocks to save memory. At the lengths of this project
    (S ≤ a few hundred) the weights fit in the cache, and its backward costs several times what the plain products
    do. torch.compile fuses everything between two products into one pass.
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
        row = (grad_weights.to(exact) * weights.to(exact)).sum(-1, keepdim=True)
        grad_scores = (weights * (grad_weights - row) * q.shape[-1] ** -0.5).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v, None, None

def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """PyTorch's fused attention with a dense mask. An empty row would be NaN, and so would its gradients, even after
    nan_to_num: it attends to everything here, and its output is multiplied by zero.
    """
    may = layout.may_attend(k.shape[2])
    some = may.any(-1, keepdim=True)                                                         # (B, 1, S, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=may | ~some) * some

def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Interval attention, the fastest way on the device. q (B, H, S, D); k, v (B, H, L, D) → (B, H, S, D)."""
    if q.device.type == "cpu":
        return BmmAttention.apply(q, k, v, layout.lo, layout.hi)
    return attention_sdpa(q, k, v, layout)

# ---- 3. Key-value cache ------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of one layer in buffers of fixed shape (B, H, length, D), filled from the left."""
    def __init__(self, batch: int, heads: int, length: int, dim: int, like: Tensor):
        self.k, self.v = like.new_zeros(2, batch, heads, length, dim)

    def put(self, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, S, D) at columns [at, at + S); return everything up to the end of what was written."""
        end = at + k.shape[2]
        self.k[:, :, at:end], self.v[:, :, at:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]

# ---- 4. Optimizer ------------------------------------------------------------------------------------------

def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Push every singular value of g (…, rows, columns) towards 1 with a quintic Newton-Schulz iteration (Muon,
    Jordan et al. 2024); a batch of matrices costs no more launches than one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.transpose(-1, -2)                          # the products below are of the short side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(compute_dtype(g.device))
    for _ in range(steps):
        s = x @ x.transpose(-1, -2)
        x = a * x + (b * s + c * s @ s) @ x
    return (x if wide else x.transpose(-1, -2)).to(g.dtype)

class Optimizer:
    """Muon for the matrices of the blocks and stems, AdamW for embeddings, positions and heads."""
    def __init__(self, module: nn.Module, lr: float, adam_lr: float):
        is_matrix = lambda name: name.startswith(("blocks.", "encoder.", "decoder.", "see."))
        named = list(module.named_parameters())
        self.lr, self.adam_lr = lr, adam_lr
        self.matrices: dict[tuple, list[nn.Parameter]] = {}           # equal shapes are updated together
        for name, p in named:
            if is_matrix(name):
                self.matrices.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {shape: torch.zeros(len(ps), *shape, device=ps[0].device) for shape, ps in self.matrices.items()}
        others = [p for name, p in named if not is_matrix(name)]
        self.adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        for shape, ps in self.matrices.items():
            grad, momentum = torch.stack([p.grad for p in ps]), self.momentum[shape]
            momentum.lerp_(grad, 0.05)
            update = orthogonalize(grad.lerp(momentum, 0.95))         # Nesterov
            step = -scale * self.lr * max(1.0, shape[-2] / shape[-1]) ** 0.5
            torch._foreach_add_(ps, list(update.unbind()), alpha=step)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        out = {f"muon.{i}": m for i, m in enumerate(self.momentum.values())}
        for i, slot in self.adam.state_dict()["state"].items():
            out.update({f"adam.{i}.{k}": v for k, v in slot.items()})
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        for i, m in enumerate(self.momentum.values()):
            m.copy_(state[f"muon.{i}"])                               # to the device of the momentum
        slots: dict[int, dict] = {}
        for key, value in state.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                slots.setdefault(int(i), {})[name] = value
        self.adam.load_state_dict({"state": slots, "param_groups": self.adam.state_dict()["param_groups"]})

# ---- 5. Precision and compilation --------------------------------------------------------------------------

def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where matrix products are faster in it: recent GPUs and CPUs with AVX-512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    return torch.bfloat16 if device.type == "cpu" and CPU_BF16 else torch.float32

def cpu_has_bf16() -> bool:
    """SGT_BF16=0 or 1 overrides what the processor says."""
    if os.environ.get("SGT_BF16") in ("0", "1"):
        return os.environ["SGT_BF16"] == "1"
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())

CPU_BF16 = cpu_has_bf16()

def compiled(function):
    """torch.compile with dynamic batch sizes, or the plain function, with one line of explanation, where that fails."""
    chosen = None

    def run(*args):
        nonlocal chosen
        if chosen is not None:
            return chosen(*args)
        try:
            attempt = torch.compile(function, dynamic=True)
            out = attempt(*args)
            chosen = attempt
        except Exception as e:                 # no compiler, an unsupported platform: torch raises many kinds
            print(f"not compiled ({' '.join(repr(e).split()):.120}); running eagerly")
            out, chosen = function(*args), function
        return out
    return run
