"""Semantic Generative Tuning in one file: a unified multimodal model, from scratch, from nothing to an answer.

    python sgt.py --train                      # render data, train, post-train, compare: the whole experiment
    python sgt.py --generate "two red circles"             # use the newest run
    python sgt.py --ask picture.png "what color is the circle?"
    python sgt.py --segment picture.png
    python sgt.py --push user/repo                         # publish it; then --run user/repo uses it anywhere

One transformer reads image patches and text, and writes text and image tokens. After it has learned to
understand and to generate, copies of it are post-trained: one with replay only (the SFT control), others also
draw a *proxy target* of the image they look at, such as its instance segmentation. The image enters only as
understanding patches, so the dense loss of the drawing flows into the features that answer questions
(arXiv 2605.18714).

    1. Config        one flat dataclass is the command line       7. Model      one transformer, two heads
    2. Scenes        the data set: endless, rendered, exact       8. Batches    documents placed in rows
    3. Photographs   COCO, VOC, SA-1B, the Hub, a cache           9. Sampling   answers and pictures
    4. Language      words, captions, questions                  10. Training   one loop, the run folder
    5. Proxies       one table: name → target image              11. Commands   train, generate, ask, push, …
    6. Tokenizer     image ↔ ids, finite scalar quantization

To add a proxy, add a line to PROXIES (5), with prompts of six words of the LEXICON (4). To add a question kind,
add a function to QUESTIONS (4). For a data set in another format add a reader beside `read_coco` (3). To try
another head, change `image_head` and `image_logits` (7), its loss in `losses` (8), and the guidance in `refine`
(9), which needs a linear one.

Letters in shape comments: B batch, S sequence, T text, N image tokens (a grid of G × G), D width, H heads,
K codebook, C channels, M objects, P pixels a side, U understanding patches.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import time
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as mask_tools
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from tqdm import tqdm

from kernels import (GraphedStep, KVCache, Layout, Optimizer, attention, average_gradients, compiled,
                     compute_dtype, records, write_document)

class UserError(Exception):
    """A mistake of the person at the keyboard: printed as one line, exit code 2."""

# ==== 1. Config =============================================================================================

@dataclass(frozen=True)
class Config:
    """Every setting of a run. The comment behind a field is its --help text; presets are dicts over it."""
    seed: int = 0                     # everything random derives from (seed, step)
    # the data
    data: str = "scenes"              # scenes, or photos: coco:DIR, voc:DIR, sam:DIR_OR_TAR, hf:USER/DATASET
    tolerate: float = 1.0             # photographs: percent of bad records to skip; more stop the run
    categories: str = ""              # photographs: names of what is annotated; found in the data
    words: str = ""                   # photographs: words beside the built-in ones; found in the data
    image_size: int = 32              # pixels a side
    shapes: int = 6                   # how many of the 8 shapes appear
    colors: int = 6                   # how many of the 8 colors appear
    max_objects: int = 4              # most objects in a scene; so many of a photograph's largest are painted
    lattice: int = 8                  # object centres lie on multiples of this many pixels; 0 = anywhere
    texture: float = 0.05             # share of scenes with a textured background and of objects with stripes
    # the vision tokenizer
    patch: int = 4                    # pixels a side of one image token
    fsq_levels: str = "8,8,8,5"       # levels of each quantized channel; their product is the codebook size
    tok_width: int = 128              # width of the tokenizer's transformer blocks
    tok_depth: int = 2                # transformer blocks in the decoder
    tok_reach: int = 1                # side of what the encoder sees around a patch, in patches
    tok_steps: int = 800              # training steps
    tok_batch: int = 64               # images a step
    tok_adam_lr: float = 0.002        # AdamW learning rate of the tokenizer's codes, places and output
    # the unified model
    width: int = 128                  # D, a multiple of head_dim
    depth: int = 4                    # transformer blocks
    head_dim: int = 32                # width of one attention head
    see_patch: int = 8                # pixels a side of one patch of an image that is looked at
    row_len: int = 88                 # S: a row holds one dialogue, captioned image or proxy sample
    prompt_len: int = 16              # text tokens before a generated image
    # training
    question_scenes: int = 0          # dialogues are about so many scenes, of base and arms alike; 0 = new ones
    base_steps: int = 2400            # steps of the base model
    arm_steps: int = 500              # steps of every post-training arm
    vqa_batch: int = 32               # base: understanding dialogues a step
    t2i_batch: int = 24               # base: captioned images a step
    arm_vqa: int = 16                 # arms: understanding dialogues a step (replay, the same in every arm)
    arm_t2i: int = 16                 # arms: captioned images a step (replay, the same in every arm)
    ratio: float = 2.0                # arms: proxy samples for every understanding dialogue (the paper: 2)
    arm_scenes: int = 0               # arms: how many different scenes the proxy draws; 0 = always new ones
    proxies: str = "none,instance"    # post-training arms, or "all"; "none" is the SFT control
    schedule: str = "mixed"           # mixed: proxy and replay in every step; sequential: first proxy alone
    text_weight: float = 1.5          # weight of the text loss (the paper's)
    image_weight: float = 1.0         # weight of each image loss (the paper's)
    condition_drop: float = 0.1       # share of captions dropped, for guidance
    lr: float = 0.02                  # Muon learning rate of the matrices, base and tokenizer
    adam_lr: float = 0.012            # AdamW learning rate of the model's embeddings and heads
    arm_lr: float = 0.3               # arms: both learning rates times this
    head_steps: int = 0               # arms: so many first steps in which the proxy trains the image head alone
    # sampling
    sample_steps: int = 12            # parallel refinement steps of one image
    proxy_steps: int = 2              # the same of what a proxy asks for, which leaves little open
    guidance: float = 2.0             # guidance scale of generation; 1 = conditional only
    token_temperature: float = 0.8    # randomness of the tokens that are drawn
    temperature: float = 6.0          # randomness in the order of unmasking, annealed; 0 = none anywhere
    # evaluation and bookkeeping
    eval_questions: int = 3000        # questions asked after training, spread evenly over the kinds
    eval_prompts: int = 240           # pictures drawn after training, spread evenly over the kinds
    eval_masks: int = 100             # scenes segmented after training
    sample_every: int = 500           # steps between sample grids
    save_every: int = 300             # steps between checkpoints
    compile: bool = True              # compile the transformer block; without it a run starts sooner, is slower
    device: str = "auto"              # auto, cpu, cuda or mps
    threads: int = 0                  # CPU threads; 0 = all

    grid = property(lambda self: self.image_size // self.patch)                                   # G
    tokens = property(lambda self: self.grid ** 2)                                                # N
    levels = property(lambda self: [int(level) for level in self.fsq_levels.split(",")])
    codebook = property(lambda self: math.prod(self.levels))                                      # K
    arms = property(lambda self: proxies_of(self) if self.proxies == "all" else self.proxies.split(","))
    # samples of a proxy in a step of an arm
    draws = property(lambda self: max(2, round(self.ratio * self.arm_vqa)) if self.ratio else 0)
    photos = property(lambda self: self.data != "scenes")
    @property
    def shape_names(self) -> list[str]:
        return self.categories.split(",") if self.photos else SHAPE_NAMES[:self.shapes]
    color_names = property(lambda self: [""] if self.photos else COLOR_NAMES[:self.colors])
    text = property(lambda self: text_of(self.words))                                     # the vocabulary
    see_grid = property(lambda self: self.image_size // self.see_patch)
    patches = property(lambda self: self.see_grid ** 2)                                           # U
    # learned positions: none, patches, image tokens, text
    image_slot = property(lambda self: 1 + self.patches)
    text_slot = property(lambda self: 1 + self.patches + self.tokens)

    def validate(self) -> None:
        """Refuse what cannot work, before anything is written; a config.json may come from anywhere."""
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), LIMITS.get(field.name, (0, 10 ** 9))
            kinds = (int, float) if field.type == "float" else (type(field.default),)
            if type(value) not in kinds:
                raise UserError(f"{field.name}={value!r:.60} is no {field.type}; give one")
            if type(value) in (int, float) and not low <= value <= high:                              # NaN too
                raise UserError(f"{field.name}={value!r:.60} is out of range; give {low:g} to {high:g}")
        size, patch = self.image_size, self.patch
        if (not re.fullmatch(r"\d{1,5}(,\d{1,5})*", self.fsq_levels) or min(self.levels) < 2
                or self.codebook > 65536):
            raise UserError(f"fsq_levels={self.fsq_levels!r:.60} is no list of levels above 1 with a product "
                            "up to 65536; try 8,5,5,5")
        prompt = 10 if self.photos else 6        # tokens of a proxy's prompt, with the name of a thing
        longest = max(self.patches + 64, self.prompt_len + self.tokens, self.patches + prompt + self.tokens)
        weights = self.width * (12 * self.width * self.depth + 24 * self.see_patch ** 2)
        weights += self.width * (self.row_len + self.tokens) + self.tok_width * self.tokens
        weights += self.tok_width * (12 * self.tok_width * self.tok_depth + 12 * (self.tok_reach * patch) ** 2)
        for ok, what, fix in [
            (size % patch == 0 == size % 4, f"image_size={size} is not divisible by 4 and by patch={patch}",
             f"try --image-size {max(16, 4 * round(size / 4))} --patch 4"),
            (size % self.see_patch == 0 == self.see_patch % patch,
             f"see_patch={self.see_patch} is no multiple of patch={patch} that divides image_size={size}",
             f"try --see-patch {patch}"),
            (self.width % self.head_dim == 0 == self.head_dim % 8,
             f"width={self.width}, head_dim={self.head_dim}: rotary positions in two dimensions need a width "
             "that is a multiple of head_dim, and head_dim of 8", "try --width 128 --head-dim 32"),
            (self.tok_width % 32 == 0, f"tok_width={self.tok_width}", "give a multiple of 32"),
            (weights < 2e9, f"width, depth and patches give {weights:.1g} weights", "give at most 2e9"),
            (self.row_len >= longest,
             f"row_len={self.row_len} is too short for a dialogue, captioned image or proxy sample",
             f"give at least {longest}"),
            (re.fullmatch(r"scenes|(coco|voc|sam|hf):.+", self.data), f"data={self.data!r:.200}",
             "choose scenes, coco:DIR, voc:DIR, sam:DIR_OR_TAR or hf:USER/DATASET"),
            (self.photos or self.max_objects <= 4, f"max_objects={self.max_objects}",
             "scenes have room for 2 to 4"),
            (self.lattice <= size // 4, f"lattice={self.lattice}",
             f"choose 0 to {size // 4} at this image size"),
            (len(self.categories.split(",")) <= 200 and len(self.words) < 10 ** 5,
             "too many categories or words", "give at most 200 categories, and 100000 letters"),
            (self.vqa_batch + self.t2i_batch <= 4096
             and max(self.arm_vqa + self.arm_t2i, self.ratio * self.arm_vqa) <= 2048,
             "a batch would show scenes of the next step",
             "give at most 4096 rows to a step of the base, 2048 to replay and to the proxy"),
            (self.head_steps < self.arm_steps,
             f"head_steps={self.head_steps} leaves none of arm_steps={self.arm_steps} to train what sees",
             f"give at most {self.arm_steps - 1}"),
            (not self.arm_scenes or self.arm_scenes > 1 != self.draws % self.arm_scenes,
             f"arm_scenes={self.arm_scenes}, {self.draws} samples a step: the first is also the last",
             f"give {max(2, self.arm_scenes - 1)}: the shuffled control needs another picture"),
            (self.schedule in ("mixed", "sequential"), f"schedule={self.schedule!r:.60}",
             "choose mixed or sequential"),
            (set(self.arms) <= set(proxies_of(self)) and len(set(self.arms)) == len(self.arms),
             f"proxies={self.proxies!r:.200}", f"name each once, of {', '.join(proxies_of(self))}, or all"),
            (re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", self.device), f"device={self.device!r:.60}",
             "choose auto, cpu, cuda or mps"),
        ]:
            if not ok:
                raise UserError(f"{what}; {fix}")

# The smallest and largest sensible value of a setting; of those that are not named, 0 and a billion.
LIMITS = {
    "seed": (0, 2 ** 32 - 1), "threads": (0, 1024), "tolerate": (0, 100), "texture": (0, 1),
    "image_size": (16, 4096), "shapes": (3, 8), "colors": (3, 8), "max_objects": (2, 12),
    "patch": (2, 4096), "see_patch": (2, 4096), "row_len": (1, 8192), "prompt_len": (16, 8192),
    "tok_width": (32, 2 ** 15), "tok_depth": (1, 1000), "tok_reach": (1, 64), "tok_batch": (2, 4096),
    "width": (8, 2 ** 15), "depth": (1, 1000), "head_dim": (8, 2 ** 15),
    "vqa_batch": (2, 4096), "t2i_batch": (2, 4096), "arm_vqa": (2, 2048), "arm_t2i": (2, 2048),
    "ratio": (0, 100), "condition_drop": (0, 0.99), "sample_steps": (1, 4096), "proxy_steps": (1, 4096),
    "lr": (1e-9, 10), "adam_lr": (1e-9, 10), "tok_adam_lr": (1e-9, 10), "arm_lr": (1e-9, 100),
    **dict.fromkeys(["tok_steps", "base_steps", "arm_steps", "sample_every", "save_every"], (1, 10 ** 9)),
    **dict.fromkeys(["eval_questions", "eval_prompts", "eval_masks"], (1, 10 ** 6)),
}

def flag(name: str) -> str:
    return "--" + name.replace("_", "-")

PRESETS = {
    # every stage in under a minute on two cores; says nothing about quality
    "smoke": dict(tok_width=64, tok_depth=1, tok_steps=30, tok_batch=16, width=64, depth=2, row_len=96,
                  base_steps=20, arm_steps=6, vqa_batch=4, t2i_batch=4, arm_vqa=2, arm_t2i=2, sample_steps=4,
                  eval_questions=100, eval_prompts=12, eval_masks=8, sample_every=20, save_every=10,
                  compile=False),
    # the default on a CPU: on two cores ten minutes with AMX, forty without bf16
    "tiny": dict(),
    # one GPU, minutes: larger pictures, free placement, every shape and color
    "base": dict(image_size=64, patch=4, shapes=8, colors=8, lattice=0, fsq_levels="8,8,8,5,5", tok_width=256,
                 tok_depth=4, tok_steps=8000, tok_batch=256, width=512, depth=12, head_dim=64, row_len=328,
                 base_steps=20000, arm_steps=4000, vqa_batch=96, t2i_batch=128, arm_vqa=48, arm_t2i=64,
                 adam_lr=0.004, eval_questions=20000, eval_prompts=1200, eval_masks=1000, sample_every=2000,
                 save_every=1000),
    # photographs (--data) at 256 pixels, ~100M parameters: a GPU, hours
    "coco": dict(image_size=256, patch=16, see_patch=16, max_objects=12, fsq_levels="8,8,8,6,5", tok_width=512,
                 tok_reach=3, tok_depth=8, tok_steps=30000, tok_batch=128, width=768, depth=14, head_dim=64,
                 row_len=536, prompt_len=64, base_steps=60000, arm_steps=10000, vqa_batch=64, t2i_batch=64,
                 arm_vqa=32, arm_t2i=32, adam_lr=0.003, eval_questions=8000, eval_prompts=1200,
                 eval_masks=1000, sample_every=5000, save_every=1000),
    # photographs at 64 pixels on a CPU, half an hour: small data are learned by heart. 15,360 codes would cost
    # as much as the transformer
    "coco-tiny": dict(image_size=64, patch=8, see_patch=8, max_objects=6, tok_reach=2, tok_steps=2000,
                      base_steps=1000, arm_steps=1200, arm_lr=0.6, row_len=152, prompt_len=24,
                      eval_questions=1600),
}

# ==== 2. Scenes: the data set, rendered =====================================================================

def star(x: Tensor, y: Tensor, inner: float = 0.42) -> Tensor:
    """Fold the plane into half a spike; there the outline is one edge, from the tip to the inner corner."""
    angle = torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5
    length = torch.hypot(x, y)
    ex, ey = inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5) - 1.0
    return ((length * angle.cos() - 1.0) * ex - length * angle.sin().abs() * ey) / math.hypot(ex, ey)

# Signed distance to the outline of a shape of radius 1, negative inside; y points down.
SHAPES = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    "triangle": lambda x, y: torch.maximum(y - 0.75, 0.889 * x.abs() - 0.457 * y - 0.457),
    "cross": lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.32, y.abs() - 0.95),
                                        torch.maximum(x.abs() - 0.95, y.abs() - 0.32)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.68).abs() - 0.27,
    "bar": lambda x, y: torch.maximum(x.abs() - 0.98, y.abs() - 0.40),
    "diamond": lambda x, y: (x.abs() + y.abs() - 1.0) * 0.7071,
    "star": star,
}
COLORS = {"red": (0.90, 0.16, 0.18), "green": (0.15, 0.70, 0.25), "blue": (0.18, 0.35, 0.95),
          "yellow": (0.97, 0.87, 0.15), "purple": (0.65, 0.20, 0.85), "cyan": (0.20, 0.85, 0.90),
          "orange": (1.00, 0.55, 0.10), "white": (0.97, 0.97, 0.97)}
SHAPE_NAMES, COLOR_NAMES = list(SHAPES), list(COLORS)
BACKGROUNDS = [(0.08, 0.08, 0.10), (0.22, 0.24, 0.30), (0.38, 0.33, 0.30), (0.45, 0.48, 0.50)]
RADII = (0.11, 0.172)                 # small and large, as a share of the image size
SPLITS = {"train": 0, "val": 1, "arm": 2, "tokenizer": 3, "grid": 4}        # val and grid are held out

def uniforms(seed: int, split: str, index: np.ndarray, n: int) -> np.ndarray:
    """(B, n) numbers in [0, 1), a function of (seed, split, index) alone: the SplitMix64 counter hash."""
    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
    with np.errstate(over="ignore"):
        stream = mix(np.array([seed * 8 + SPLITS[split] + 1], np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        state = mix(stream + np.asarray(index, np.uint64))                                        # (B,)
        counter = (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return (mix(state[:, None] + counter) >> np.uint64(11)) * 2.0 ** -53                      # (B, n)

@dataclass
class Scenes:
    """A batch of scenes as arrays; objects are listed back to front, the first `count` of M are real."""
    count: np.ndarray                 # (B,)
    shape: np.ndarray                 # (B, M) index into SHAPES
    color: np.ndarray                 # (B, M) index into COLORS
    size: np.ndarray                  # (B, M) 0 small, 1 large
    x: np.ndarray                     # (B, M) pixels, centre
    y: np.ndarray                     # (B, M)
    radius: np.ndarray                # (B, M) pixels
    background: np.ndarray            # (B,) index into BACKGROUNDS
    texture: np.ndarray               # (B, 1 + M) amplitude of stripes: background, then objects
    seeds: np.ndarray                 # (B, 8) uniforms for everything later: referents, words, noise

    names, colors = SHAPE_NAMES, COLOR_NAMES
    painted = property(lambda self: np.arange(self.shape.shape[1]) < self.count[:, None])         # (B, M)
    asked = painted                   # (B, M) which may be talked about; painted: which are in the instance map

    def __len__(self) -> int:
        return len(self.count)

def sample_scenes(cfg: Config, split: str, index: np.ndarray, overlap: float = 0.5) -> Scenes:
    """Scenes number `index` of a split: 1 to max_objects objects that stay apart, but for one overlapping pair
    in a share `overlap` of the scenes in which the first two differ in color. The camera looks down on a table:
    objects lower in the picture are nearer.
    """
    B, M, P, tries = len(index), cfg.max_objects, cfg.image_size, 12
    draws = 5 + 2 * tries                        # of each object
    u = uniforms(cfg.seed, split, index, 16 + M * draws)
    scene_u, object_u = u[:, :16], u[:, 16:].reshape(B, M, draws)
    count = 1 + (scene_u[:, 0] ** 0.7 * M).astype(np.int64)
    shape = (object_u[..., 0] * cfg.shapes).astype(np.int64)
    color = (object_u[..., 1] * cfg.colors).astype(np.int64)
    # 35 % of the scenes repeat one shape, 30 % one color, so that there is something to count
    repeats_shape = scene_u[:, 1] < 0.35
    repeats_color = (scene_u[:, 1] < 0.2) | (scene_u[:, 1] > 0.9)
    shape = np.where(repeats_shape[:, None], shape[:, :1], shape)
    color = np.where(repeats_color[:, None], color[:, :1], color)
    # the overlapping pair is big, and of two colors: two touching objects of one color would be one blob
    overlaps = (scene_u[:, 2] < overlap) & (count > 1) & (color[:, 0] != color[:, 1])
    size = ((object_u[..., 2] < 0.5) | (overlaps[:, None] & (np.arange(M) < 2))).astype(np.int64)
    radius = np.array(RADII)[size] * P
    step = cfg.lattice or 1e-3
    low = np.ceil((radius + 0.5) / step) * step                                                   # (B, M)
    slots = np.floor((P - 2 * low) / step + 1e-6) + 1
    x, y, placed = np.zeros((B, M)), np.zeros((B, M)), np.zeros((B, M), bool)
    for i in range(M):
        for t in range(tries):
            cx = low[:, i] + np.floor(object_u[:, i, 5 + 2 * t] * slots[:, i]) * step
            cy = low[:, i] + np.floor(object_u[:, i, 6 + 2 * t] * slots[:, i]) * step
            if (placed[:, i] | (i >= count)).all():
                break
            # the overlapping pair lies side by side, off the lattice: height does not tell which is in front
            partner = overlaps & (i == 1)
            side = 2 * object_u[:, i, 5 + 2 * t] - 1                      # -1 … 1, left or right
            away = np.sign(side) * (0.45 + 0.25 * abs(side)) * (radius[:, 0] + radius[:, i])
            cx = np.where(partner, x[:, 0] + np.round(away), cx)
            cy = np.where(partner, y[:, 0], cy)
            inside = (np.minimum(cx, cy) >= low[:, i]) & (np.maximum(cx, cy) <= P - low[:, i])
            ok = ~placed[:, i] & (i < count) & inside
            for j in range(i):
                reach = radius[:, i] + radius[:, j]
                gap = np.maximum(abs(cx - x[:, j]), abs(cy - y[:, j]))
                beside = (gap >= 0.42 * reach) & (gap <= 0.75 * reach)
                ok &= np.where(partner, beside, gap >= reach + 1) | ~placed[:, j]
            x[:, i], y[:, i] = np.where(ok, cx, x[:, i]), np.where(ok, cy, y[:, i])
            placed[:, i] |= ok
    # back to front; equal heights (the overlapping pair) in random order; objects that found no place go last
    order = np.argsort(np.where(placed, y + 1e-3 * object_u[..., 3], 1e9), axis=1)
    take = lambda a: np.take_along_axis(a, order, 1)
    textured = np.concatenate([scene_u[:, 3:4], object_u[..., 4]], 1) < cfg.texture
    amplitude = np.where(textured, np.array([0.05] + [0.12] * M), 0.0)
    return Scenes(
        count=placed.sum(1), shape=take(shape), color=take(color), size=take(size),
        x=take(x), y=take(y), radius=take(radius),
        background=(scene_u[:, 4] * len(BACKGROUNDS)).astype(np.int64),
        texture=np.concatenate([amplitude[:, :1], take(amplitude[:, 1:])], 1), seeds=scene_u[:, 8:])

@dataclass
class Rendered:
    """What the renderer knows about a batch of scenes."""
    image: Tensor                     # (B, 3, P, P) in [0, 1]
    instance: Tensor                  # (B, P, P) integers: 0 background, 1 + index of the object in front
    category: Tensor                  # (B, P, P) integers: 0 background, 1 + index of a shape or category
    depth: Tensor                     # (B, P, P) in [0, 1], 1 = near
    stuff: Tensor                     # (B, P, P) integers: of photographs: 0 none, 1 + a class of background

def pick(batch, index: slice):
    """A part of a batch of scenes, photographs or renderings."""
    parts = [v[index] if isinstance(v, (np.ndarray, Tensor)) else v for v in vars(batch).values()]
    return type(batch)(*parts)

def per_object(values: np.ndarray) -> Tensor:
    """(B, M) numbers of objects → (B, 1 + M) for indexing with an instance map; the background gets 0."""
    return F.pad(torch.as_tensor(values), (1, 0))

def render(cfg: Config, scenes: Scenes | Photos, shift: float = 0.0) -> Rendered:
    """Paint scenes back to front, or look photographs up; `shift` moves the nearest objects so many pixels."""
    if not isinstance(scenes, Scenes):
        return show_photos(scenes)
    B, M, P = len(scenes), scenes.shape.shape[1], cfg.image_size
    put = lambda a: torch.as_tensor(a, dtype=torch.float32)
    pixel = torch.arange(P) + 0.5                                                                 # (P,)
    nearness = put(scenes.y) / P                                                                  # (B, M)
    cx, cy, radius = put(scenes.x) - shift * nearness, put(scenes.y), put(scenes.radius)
    dx = (pixel - cx[..., None]) / radius[..., None]                                              # (B, M, P)
    dy = (pixel - cy[..., None]) / radius[..., None]
    cover = torch.zeros(B, M, P, P)
    exists = torch.arange(M) < torch.as_tensor(scenes.count)[:, None]                             # (B, M)
    for s in range(cfg.shapes):
        b, m = torch.nonzero((torch.as_tensor(scenes.shape) == s) & exists, as_tuple=True)
        if len(b):
            distance = SHAPES[SHAPE_NAMES[s]](dx[b, m][:, None, :], dy[b, m][:, :, None])          # (n, P, P)
            cover[b, m] = (0.5 - distance * radius[b, m][:, None, None]).clamp(0, 1)
    amplitude = put(scenes.texture)
    diagonal = torch.sin((pixel[:, None] + pixel[None, :]) * (2 * math.pi / 4))                   # (P, P)
    backgrounds = put(BACKGROUNDS)[torch.as_tensor(scenes.background)]                            # (B, 3)
    image = backgrounds[:, :, None, None] + (amplitude[:, :1, None] * diagonal)[:, None]          # (B, 3, P, P)
    colors = put(list(COLORS.values()))[torch.as_tensor(scenes.color)]                            # (B, M, 3)
    instance = torch.zeros(B, P, P, dtype=torch.int64)
    depth = (0.3 * pixel / P)[None, :, None].expand(B, P, P).clone()
    for m in range(M):
        a = cover[:, m, None]                                                                     # (B, 1, P, P)
        paint = colors[:, m, :, None, None] * (1 + (amplitude[:, m + 1, None, None] * diagonal)[:, None])
        image = image * (1 - a) + paint * a
        front = cover[:, m] > 0.5                                                                 # (B, P, P)
        instance = torch.where(front, m + 1, instance)
        depth = torch.where(front, (0.3 + 0.6 * nearness[:, m] + 0.02 * m)[:, None, None], depth)
    category = per_object(scenes.shape + 1).gather(1, instance.flatten(1)).view_as(instance)
    return Rendered(image.clamp(0, 1), instance, category, depth, torch.zeros_like(instance))

# ==== 3. Photographs: annotated data behind `sample` and `render` ============================================

LARGEST = 100_000_000                 # bytes of a file, pixels of a picture; beyond is a mistake or an attack

class BadRecord(Exception):
    """Why something in a data set cannot be used."""

def check(ok, otherwise: str) -> None:
    if not ok:
        raise BadRecord(otherwise)

@contextlib.contextmanager
def naming(bad: list[str], what: str):
    """Skip a bad record: what goes wrong inside becomes a line of `bad`, and the run goes on without it."""
    try:
        yield
    except Exception as e:                         # Pillow alone raises a dozen kinds for damaged files
        bad.append(f"{what}: {e}" if isinstance(e, BadRecord) else f"{what}: {type(e).__name__}: {e}")

def upright(file, annotated: tuple[int, int] | None = None) -> Image.Image:
    """A picture in RGB, turned as its EXIF data say, unless it has the annotated size only as it lies."""
    with Image.open(file) as picture:
        check(math.prod(picture.size) <= LARGEST, f"{picture.size} are too many pixels")
        turned = ImageOps.exif_transpose(picture)
        picture = picture if annotated == picture.size != turned.size else turned
        if picture.mode[0] in "IF":                # 16 bits and more: scale the range that is used
            values = np.asarray(picture, np.float64)
            low, high = np.nanmin(values), np.nanmax(values)
            picture = Image.fromarray(np.uint8(np.nan_to_num((values - low) / max(high - low, 1e-9)) * 255))
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")

def squeeze(picture: Image.Image, P: int) -> np.ndarray:
    """(P, P, …) uint8, whatever the sides were; smaller pictures are enlarged smoothly."""
    smooth = Image.Resampling.BOX if min(picture.size) >= P else Image.Resampling.BICUBIC
    return np.asarray(picture.resize((P, P), smooth))

# --- annotations, checked before pycocotools sees them: on some it crashes or reads foreign memory

def number(x, low: float, high: float, whole: bool = False) -> bool:
    return type(x) in (int, float) and low <= x <= high and (not whole or x == int(x))      # not NaN, True

def size_of(about: dict) -> tuple[int, int]:
    h, w = about.get("height"), about.get("width")
    check(number(h, 1, 1e5, whole=True) and number(w, 1, 1e5, whole=True) and h * w <= LARGEST,
          f"absurd height {h!r:.40} or width {w!r:.40}")
    return int(h), int(w)

def run_lengths(counts: str) -> list[int]:
    """COCO's compressed run lengths as numbers: 5 bits a character, low ones first; "P" and above: more
    follow; the top bit of the last is the sign. From the fourth number on, differences to the last but one.
    """
    check(re.fullmatch("([P-o]{0,6}[0-O])*", counts), "garbled run lengths, which do not sum to anything")
    runs = []
    for digits in re.findall("[P-o]*[0-O]", counts):
        value = sum((ord(c) - 48 & 31) << 5 * i for i, c in enumerate(digits))
        value -= (digits[-1] >= "@") << 5 * len(digits)               # two's complement
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs

def decode_mask(segmentation: list | dict | np.ndarray, h: int, w: int) -> np.ndarray:
    """Polygons, run lengths or pixels of an annotation → mask (h, w) bool."""
    if isinstance(segmentation, np.ndarray):
        return segmentation
    if isinstance(segmentation, list):
        for p in segmentation:
            is_long = isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
            check(is_long, "a polygon with fewer than three points")
            check(all(number(x, -w - h, 2 * (w + h)) for x in p), "a polygon with absurd coordinates")
            steps = np.abs(np.diff(np.reshape(p, (-1, 2)), axis=0)).sum()         # pycocotools stores each
            check(steps <= 1000 * (w + h), "a polygon of absurd length")
        return mask_tools.decode(mask_tools.merge(mask_tools.frPyObjects(segmentation, h, w))) > 0
    runs = segmentation.get("counts") if isinstance(segmentation, dict) else None
    check(isinstance(runs, (str, list)) and segmentation.get("size") == [h, w],
          f"run lengths of another size than {[h, w]}, or none")
    runs = run_lengths(runs) if isinstance(runs, str) else runs
    check(all(number(n, 0, h * w, whole=True) for n in runs) and sum(runs) == h * w,
          "run lengths that do not sum to the size of the picture")
    whole = {"size": [h, w], "counts": [int(n) for n in runs]}
    return mask_tools.decode(mask_tools.frPyObjects(whole, h, w)) > 0

# a thing: number of its class; polygons, run lengths, pixels or None; x, y, width, height or None; is it a
# crowd; why it must not be looked at, though it is there all the same
Annotation = namedtuple("Annotation", "category segmentation box crowd bad", defaults=[""])

def checked(a: dict, categories: dict[int, int], seen: set[int]) -> Annotation:
    """An entry of "annotations"; a BadRecord where not even what it says is there can be known."""
    category, key, box, segmentation = map(a.get, ("category_id", "id", "bbox", "segmentation"))
    check(isinstance(category, int) and category in categories, f"unknown category {category!r:.40}")
    bad = ""
    try:
        check(number(key, 1, 2 ** 62) and key not in seen,            # COCOeval takes a match with 0 for none
              f"annotation id {key!r:.40} is 0, no number or there twice")
        seen.add(key)
        is_box = isinstance(box, list) and len(box) == 4 and all(number(x, -1e5, 1e5) for x in box)
        check(box is None or is_box and min(box[2:]) >= 0, f"box {box!r:.60}")
        check(segmentation or box, "neither a mask nor a box")
    except BadRecord as e:
        bad = str(e)
    return Annotation(categories[category], segmentation or None, box, bool(a.get("iscrowd")), bad)

# --- readers of data sets: (root, the folder that no file may lie outside, bad) → sources, things, stuff

class File(NamedTuple):
    """A file of a data set, or a part of a .tar, not read yet."""
    path: Path
    within: Path
    offset: int = 0
    length: int | None = None         # None: all of it

    def read(self) -> bytes:
        real = Path(os.path.realpath(self.path))
        check(real.is_relative_to(self.within), "leads out of the folder")
        check(real.is_file(), f"no such file, or no plain one: {self.path.name!r:.80}")
        length = real.stat().st_size if self.length is None else self.length
        check(length <= LARGEST, "absurdly large")
        with real.open("rb") as f:
            f.seek(self.offset)
            return f.read(length)

# a photograph, not read yet: split is train, val or "" (not known); picture a File; labels a function () →
# (height, width), annotations; panoptic None, or the File of a PNG and a dict: id in it → 1 + class
Source = namedtuple("Source", "name split picture labels captions panoptic", defaults=[(), None])

def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path} is no JSON object ({type(e).__name__}); mend or remove it") from None

def entries(data: dict, key: str, *whole: str) -> list[dict]:
    """The objects in a list, if they have whole numbers in some fields; what is no object is an empty one."""
    found = data.get(key) if isinstance(data.get(key), list) else []
    found = [x if isinstance(x, dict) else {} for x in found]
    return [x for x in found if all(isinstance(x.get(field), int) for field in whole)]

def index_names(categories: list[dict], names: list[str]) -> dict[int, int]:
    """Category id → index into `names`, to which new names are added, of at most four words."""
    known = {c["id"]: " ".join(re.findall(r"\w+", str(c.get("name") or "").lower())[:4]) for c in categories}
    names += [name for name in dict.fromkeys(known.values()) if name and name not in names]
    return {key: names.index(name) for key, name in known.items() if name}

def read_coco(root: Path, within: Path, bad: list[str]) -> tuple[list[Source], list[str], list[str]]:
    """annotations/instances_train2017.json and train2017/ (official), train/instances.json and train/images/,
    or flat. Captions and panoptic files lie beside the instances, with names like theirs.
    """
    def first(*patterns: str) -> list[Path]:
        kinds = ("instances", "boxes", "_annotations.coco")
        return [f for p in patterns for kind in kinds for f in sorted(root.glob(p.replace("KIND", kind)))][:1]
    files = [(split, f) for split in ("train", "val")
             for f in first(f"annotations/KIND_{split}*.json", f"{split}*/KIND*.json", f"KIND_{split}*.json")]
    files = files or [("", f) for f in first("KIND*.json", "annotations/KIND*.json")]
    if not files:
        raise UserError(f"{root} and its annotations/, train/ hold no instances*.json; name a COCO folder")
    names, stuff, sources = [], [], []
    for split, f in files:
        sources += read_instances(f, split if len(files) == 2 else "", root, within, names, stuff, bad)
    if max(len(names), len(stuff)) > 200:          # they are bytes in the cache, and colors in a target
        raise UserError(f"{root} names {len(names)} kinds of things, {len(stuff)} of stuff; give at most 200")
    return sources, names, stuff

def read_instances(file: Path, split: str, root: Path, within: Path, names: list, stuff: list, bad: list):
    """The sources of one file of COCO; adds to names, stuff and bad."""
    ending = re.sub("^(instances|boxes|_annotations.coco)", "", file.stem)        # _train2017, or nothing
    data = read_json(file)
    categories = index_names(entries(data, "categories", "id"), names)
    images, things, captions, panoptic = {}, defaultdict(list), defaultdict(list), {}     # by id of the image
    for i in entries(data, "images"):
        key, name = i.get("id"), i.get("file_name")
        with naming(bad, f"image {name!r:.80} (id {key!r:.40})"):
            check(isinstance(key, int) and key not in images and isinstance(name, str),
                  "id or name is missing, absurd or there twice")
            images[key] = name, size_of(i)
    if not categories or not entries(data, "images"):
        raise UserError(f"{file} lists no categories or no images; is it a COCO instances file?")
    seen = set()
    for a in entries(data, "annotations"):
        key = a.get("image_id")
        with naming(bad, f"annotation {a.get('id')!r:.40}"):
            check(isinstance(key, int) and key in images, f"unknown image {key!r:.40}")
            things[key].append(checked(a, categories, seen))
    for f in sorted(file.parent.glob(f"captions{ending}*.json")):
        described = set(captions)                  # the first file that knows a picture describes it
        for c in entries(read_json(f), "annotations", "image_id"):
            if c["image_id"] not in described and isinstance(c.get("caption"), str):
                captions[c["image_id"]].append(" ".join(re.findall(r"[\w',-]+", c["caption"][:400].lower())))
    for f in sorted(file.parent.glob(f"panoptic{ending}*.json")):
        data = read_json(f)
        kinds = index_names([c for c in entries(data, "categories", "id") if not c.get("isthing")], stuff)
        for p in entries(data, "annotations", "image_id"):
            found = [s for s in entries(p, "segments_info", "id", "category_id") if s["category_id"] in kinds]
            if isinstance(p.get("file_name"), str):
                png = File(f.with_suffix("") / p["file_name"], within)
                panoptic[p["image_id"]] = png, {s["id"]: 1 + kinds[s["category_id"]] for s in found}
    tag, some = ending.removeprefix("_"), [name for name, _ in images.values()][:5]
    folders = [root / tag, root / "images" / tag, file.parent / "images", file.parent, root / "images", root]
    folder = next((f for f in folders if any(os.path.isfile(f / name) for name in some)), file.parent)
    return [Source(name, split, File(folder / name, within), functools.partial(tuple, (size, things[key])),
                   captions[key], panoptic.get(key)) for key, (name, size) in images.items()]

def read_sam(root: Path, within: Path, bad: list[str]) -> tuple[list[Source], list[str], list[str]]:
    """Pairs of sa_ID.jpg and sa_ID.json in a folder, in .tar files in it, or in one .tar; without classes."""
    def labels(file: File | None) -> tuple[tuple[int, int], list[Annotation]]:
        check(file, "no annotations beside it")
        data, seen = json.loads(file.read()), set()
        found = [checked({**a, "category_id": 0}, {0: 0}, seen) for a in entries(data, "annotations")]
        return size_of(data["image"]), found
    files: dict[str, File] = {}
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.name.endswith((".tar", ".tar.gz", ".tgz")):
            files.update(tar_members(path, within, bad))
        else:
            files[str(path.relative_to(root)) if root.is_dir() else path.name] = File(path, within)
    annotations = {name[:-5]: file for name, file in files.items() if name.lower().endswith(".json")}
    sources = [Source(name, "", file, functools.partial(labels, annotations.get(os.path.splitext(name)[0])))
               for name, file in sorted(files.items()) if name.lower().endswith((".jpg", ".jpeg"))]
    if not sources:
        raise UserError(f"{root} holds no pairs of .jpg and .json; name a folder or .tar of SA-1B")
    return sources, ["object"], []

def tar_members(path: Path, within: Path, bad: list[str]) -> dict[str, File]:
    """Where pictures and annotations lie in a .tar, to be read in place."""
    files = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                with naming(bad, f"image {member.name!r:.80} in {path.name}"):
                    name, size, plain = member.name, member.size, member.isreg() and not member.issparse()
                    check(not {"..", "/"} & set(Path(name).parts), "leads out of the archive")
                    if name.lower().endswith((".jpg", ".jpeg", ".json")):
                        check(plain and size <= LARGEST, "no plain file, or absurdly large")
                        files[f"{path.name}/{name}"] = File(path, within, member.offset_data, size)
    except Exception as e:                         # tarfile raises half a dozen kinds for damaged archives
        raise UserError(f"{path} is no whole .tar without compression ({type(e).__name__}: {e})") from None
    return files

VOC = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
       "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"]

def read_voc(root: Path, within: Path, bad: list[str]) -> tuple[list[Source], list[str], list[str]]:
    """JPEGImages/ beside SegmentationClass/ (0 background, 1-20, 255 void) and maybe SegmentationObject/; or
    images/ beside semantic/; also under train/ and val/.
    """
    def labels(files: list[File]) -> tuple[tuple[int, int], list[Annotation]]:
        maps = [np.asarray(Image.open(io.BytesIO(file.read()))) for file in files]
        kinds, parts, found = maps[0], maps[-1], []
        check(kinds.ndim == 2 and kinds.shape == parts.shape, "its masks are no index maps or differ in size")
        for part in np.unique(parts[(kinds > 0) & (parts > 0) & (parts < 255)]):
            kind = int(np.bincount(kinds[parts == part]).argmax())
            check(1 <= kind <= len(VOC), f"class {kind} in a map of classes 0 to {len(VOC)} and 255")
            found.append(Annotation(kind - 1, parts == part, None, False))
            if len(maps) == 1:                     # of who knows how many: a crowd, too, is never counted
                found.append(found[-1]._replace(crowd=True))
        return kinds.shape, found
    val, sources = root / "ImageSets/Segmentation/val.txt", []
    held_out = set(val.read_text("utf-8-sig", errors="replace").split() if val.is_file() else [])
    layouts = (("JPEGImages", "SegmentationClass"), ("images", "semantic"))
    for at, (photos, masks) in itertools.product((root, root / "train", root / "val"), layouts):
        for f in sorted((at / masks).glob("*.[pP][nN][gG]")):
            listed = ("val" if f.stem in held_out else "train") if held_out else ""
            maps = [File(path, within) for path in (f, at / "SegmentationObject" / f.name) if path.exists()]
            photo = File(at / photos / f"{f.stem}.jpg", within)
            split, name = listed if at == root else at.name, str(f.relative_to(root))
            sources.append(Source(name, split, photo, functools.partial(labels, maps)))
    if not sources:
        raise UserError(f"{root} holds no SegmentationClass/*.png, nor semantic/*.png; name a VOC folder")
    return sources, VOC, []

# --- the Hugging Face Hub: data sets come from it, finished runs go to it and come back

@contextlib.contextmanager
def hub(task: str):
    """huggingface_hub, imported late, quiet and impatient; whatever goes wrong in it becomes one line."""
    import huggingface_hub as hf
    from huggingface_hub import errors, utils
    utils.logging.set_verbosity(utils.logging.CRITICAL)               # what matters comes as an exception
    if not sys.stderr.isatty():
        utils.disable_progress_bars()

    def give_up(request):                          # or most requests wait for a silent server for ever
        for what, seconds in request.extensions["timeout"].items():
            request.extensions["timeout"][what] = seconds or (10 if what == "connect" else 60)
    hf.get_session().event_hooks["request"].append(give_up)
    try:
        yield hf
    except UserError:
        raise
    except Exception as e:                         # its own errors, those of HTTP, of locks, of disks, …
        while e.__cause__ and not isinstance(e, errors.HfHubHTTPError):
            e = e.__cause__
        login, said = "log in with: hf auth login", f"{type(e).__name__}: {e}"
        if isinstance(e, errors.HfHubHTTPError):
            said = f"HTTP {e.response.status_code}, {e.server_message or 'no reason given'}"
        advice = [(errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set and the cache lacks it; unset it"),
                  (errors.GatedRepoError, f"it is gated; ask for access on its page and {login}"),
                  (errors.RepositoryNotFoundError, f"it is not there or private; check the name, or {login}"),
                  (errors.RevisionNotFoundError, "it has no such revision; correct what follows the @"),
                  (errors.HfHubHTTPError, f"{said}; try later, or {login}"),
                  (errors.HFValidationError, f"{e}; give user/repo"),
                  (Exception, f"{said}; check the network and HF_ENDPOINT")]
        raise UserError(f"{task}: {next(line for kind, line in advice if isinstance(e, kind))}") from None

HUB_NAME = re.compile(r"(?!runs/|.*\.\.)\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")     # user/repo, or user/repo@v1

def on_hub(name: str) -> bool:
    """Whether a name is one on the Hugging Face Hub; where there is a folder `user`, user/repo is a path."""
    return bool(HUB_NAME.fullmatch(name)) and not Path(name.split("/")[0]).exists()

def pull(name: str, kind: str) -> Path:
    """The folder of a "model" (a run) or "dataset": the newest, or what is cached if the Hub is away."""
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name on the Hub; give user/repo or user/repo@revision")
    repo, _, revision = name.partition("@")
    weights = [f"{stage}.safetensors" for stage in ("tokenizer", "base", *PROXIES)]
    wanted = [*weights, "config.json", "report.*", "log.jsonl", "samples/*"]          # of a run
    with hub(f"cannot get the {kind} {name} from the Hub") as hf:
        return Path(hf.snapshot_download(repo, repo_type=kind, revision=revision or None,
                                         allow_patterns=wanted if kind == "model" else None))

# --- the cache: every photograph decoded and resized once

FORMAT = 2                            # of the cache; raise it when its meaning changes
USES = ["look", "questions", "captions", "masks"]

class Photographs:
    """A data set, memory-mapped: images (n, P, P, 3); maps (n, 3, P, P) of instances (0, or 1 + number of the
    object), categories and stuff (0, or 1 + index); objects (m, 6): category, x, y, radius, may it be asked
    about, is it in the instance map; first[i] is the first of photograph i.
    """
    def __init__(self, folder: Path):
        names = ("images", "maps", "objects", "first", "split", "fit")
        self.images, self.maps, self.objects, self.first, self.split, self.fit = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
        about = json.loads((folder / "about.json").read_text())
        self.names, self.stuff, self.captions = about["names"], about["stuff"], about["captions"]
        self.records, self.bad, self.folder = about["records"], about["bad"], folder

    def pool(self, split: str, use: str) -> np.ndarray:
        """Numbers of the photographs that fit one of the USES."""
        held_out = split in ("val", "grid")
        found = np.flatnonzero(self.fit[:, USES.index(use)] & (self.split == held_out))
        if not len(found):
            raise UserError(f"no {'validation' if held_out else 'training'} photograph has what {use} need"
                            + ", and boxes are no masks" * (use == "masks")
                            + "; give more, or other, annotated data")
        return found

    def complain(self, tolerate: float) -> str:
        """What was skipped, in a line; an error where it is over `tolerate` percent of a kind of records."""
        skipped, worst, examples = [], 0.0, []
        for kind, total in self.records.items():
            lines = [line for line in self.bad if line.startswith(kind)]
            if lines:
                skipped.append(f"{len(lines)} of {total} {kind}s")
                worst, examples = max((worst, examples), (100 * len(lines) / total, lines[:3]))
        said, file, few = ", ".join(skipped), self.folder / "bad_records.txt", "; ".join(examples)
        if worst > tolerate:
            raise UserError(f"{said} cannot be used, more than {tolerate:g} %: {few}; all are in {file}; "
                            f"mend them, or go on without them with --tolerate {math.ceil(worst)}")
        return f"skipped {said}; named in bad_records.txt" if said else ""

def digest(source: Source, P: int, most: int, bad: list[str]) -> tuple | None:
    """One photograph: image (P, P, 3), maps (3, P, P), objects (k, 6), fit for which USES; or None."""
    image = None
    with naming(bad, f"image {source.name!r:.80}"):
        (h, w), annotations = source.labels()
        picture = upright(io.BytesIO(source.picture.read()), (w, h))
        check(picture.size == (w, h), "has {} × {} pixels, annotated as {} × {}".format(*picture.size, w, h))
        image = squeeze(picture, P)
    if image is None:
        return None
    objects = []
    for nth, a in enumerate(annotations, 1):       # what a bad one names is there, though nobody knows where
        mask, x, y, area, visible = None, 0.0, 0.0, 0.0, False
        with naming(bad, f"annotation {nth} of {source.name!r:.80}"):
            check(not a.bad, a.bad)
            if a.segmentation is None:             # a box only: something to ask about, nothing to cut out
                left, top, width, height = a.box
                x, y, area = left + width / 2, top + height / 2, width * height
                x, y, area = x * P / w, y * P / h, area * P * P / (h * w)
            else:
                mask = squeeze(Image.fromarray(np.uint8(decode_mask(a.segmentation, h, w)) * 255), P) > 127
                rows, columns = np.nonzero(mask)
                area = float(len(rows))
                if area:
                    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
            visible = not a.crowd and area >= P * P / 256 and 0 <= x <= P >= y >= 0   # below: specks
        about = a.category, x, y, math.sqrt(area / math.pi), visible, visible and mask is not None
        objects.append((about, mask, a.crowd))
    objects.sort(key=lambda o: (not o[0][5], -o[0][3]))               # masks first, large ones first
    maps = np.zeros((3, P, P), np.uint8)
    table = np.array([about for about, *_ in objects], np.float32).reshape(-1, 6)
    table[most:, 5] = 0
    for i, (about, mask, _) in sorted(enumerate(objects), key=lambda o: not o[1][2]):   # crowds at the bottom
        if mask is not None:
            maps[1][mask] = 1 + about[0]
        if table[i, 5]:
            maps[0][mask] = 1 + i
    if source.panoptic:
        with naming(bad, f"panoptic {source.name!r:.80}"):
            file, segments = source.panoptic
            png, stuff = Image.open(io.BytesIO(file.read())), np.zeros((h, w), np.uint8)
            check(png.size == (w, h), f"{png.size[0]} × {png.size[1]} pixels")
            ids = np.asarray(png.convert("RGB"), np.int64) @ (1, 256, 65536)      # (h, w)
            for segment, kind in segments.items():
                stuff[ids == segment] = kind
            maps[2] = np.asarray(Image.fromarray(stuff).resize((P, P), Image.Resampling.NEAREST))
    asked, whole = table[:, 4].any(), all(mask is not None for _, mask, _ in objects)
    return image, maps, table, [True, asked, asked or bool(source.captions), whole and table[:, 5].any()]

def build_cache(target: Path, found: tuple, P: int, most: int, bad: list[str]) -> None:
    """Write to a new folder and rename it: nobody sees half a cache, and the first of two runs wins."""
    (sources, names, stuff), tables, fit, kept = found, [], [], []
    records = Counter(line.split()[0] for line in bad) + Counter(image=len(sources), panoptic=len(sources))
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < (needed := 6 * P * P * len(sources)):
        raise OSError(f"{needed / 1e9:.3g} GB do not fit")            # to find out while writing is a SIGBUS
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as temporary:
        folder, pool = Path(temporary) / "cache", ThreadPoolExecutor(os.cpu_count())
        folder.mkdir()
        create, n = np.lib.format.open_memmap, len(sources)
        images = create(folder / "images.npy", "w+", np.uint8, (n, P, P, 3))
        maps = create(folder / "maps.npy", "w+", np.uint8, (n, 3, P, P))
        try:
            read = pool.map(lambda source: digest(source, P, most, bad), sources)
            read = tqdm(read, "reading pictures", n, mininterval=1.0, dynamic_ncols=True)
            for source, result in zip(sources, read):
                if result:
                    images[len(kept)], maps[len(kept)], table, uses = result
                    tables.append(table), fit.append(uses), kept.append(source)
        finally:
            pool.shutdown(cancel_futures=True)     # or Ctrl-C would wait for all pictures
        if not kept:
            raise UserError(f"none of the {n} pictures can be used: {'; '.join(bad[:3])}")
        tenth = lambda name: hashlib.sha256(os.fsencode(name)).digest()[0] < 26
        held_out = [s.split == "val" if s.split else tenth(s.name) for s in kept]
        held_out[-1] |= not any(held_out)
        np.save(folder / "objects.npy", np.concatenate(tables))
        np.save(folder / "first.npy", np.cumsum([0, *map(len, tables)]))
        np.save(folder / "split.npy", held_out)
        np.save(folder / "fit.npy", fit)
        about = {"names": names, "stuff": stuff, "captions": [s.captions for s in kept], "bad": bad,
                 "records": records + Counter(annotation=sum(map(len, tables)))}
        (folder / "about.json").write_text(json.dumps(about))
        (folder / "bad_records.txt").write_text("".join(f"{line!r}\n" for line in bad), "utf-8")
        with contextlib.suppress(OSError):         # somebody else was faster
            folder.rename(target)

@functools.lru_cache(4)
def photographs(data: str, P: int, most: int) -> Photographs:
    """coco:DIR, voc:DIR, sam:PATH or hf:USER/NAME at P × P pixels, up to `most` instances. The cache lies in
    $SGT_CACHE or ~/.cache/sgt, under a key of names, sizes and times of all files and of these settings.
    """
    scheme, _, where = data.partition(":")
    root = Path(os.path.realpath(pull(where, "dataset") if scheme == "hf" else os.path.expanduser(where)))
    if not root.exists():
        raise UserError(f"there is no {root}; name data that is there, for example --data coco:path/to/coco")
    files = sorted(f for f in root.rglob("*") if f.is_file()) if root.is_dir() else [root]
    listing = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    key = hashlib.sha256(repr((FORMAT, scheme, P, most, listing)).encode()).hexdigest()[:24]
    target = Path(os.environ.get("SGT_CACHE") or os.path.expanduser("~/.cache/sgt")) / key
    if not (target / "about.json").exists():
        within, bad = root if root.is_dir() else root.parent, []
        if scheme == "hf":                         # in either layout; the files are links to ../../blobs
            within, shards = root.parents[1], [f for f in files if f.suffix == ".tar" or f.match("sa_*.json")]
            scheme = "sam" if shards else "coco"
        found = {"coco": read_coco, "voc": read_voc, "sam": read_sam}[scheme](root, within, bad)
        try:
            build_cache(target, found, P, most, bad)
        except OSError as e:
            raise UserError(f"cannot write the cache {target.parent} ({e}); set SGT_CACHE") from None
    try:
        return Photographs(target)
    except (OSError, EOFError, ValueError, KeyError) as e:
        raise UserError(f"the cache {target} is damaged ({type(e).__name__}); remove that folder") from None

@dataclass
class Photos:
    """A batch of photographs with what `Scenes` has that makes sense for them; large masks come first."""
    count: np.ndarray                 # (B,) things annotated
    painted: np.ndarray               # (B, M) whether a thing is in the instance map
    asked: np.ndarray                 # (B, M) whether it may be asked about: no crowd, no speck
    shape: np.ndarray                 # (B, M) category
    color: np.ndarray                 # (B, M) zeros: no color is known
    size: np.ndarray                  # (B, M) 0 small, 1 large
    x: np.ndarray                     # (B, M) pixels, centre of the box
    y: np.ndarray                     # (B, M)
    radius: np.ndarray                # (B, M) pixels, of a disc of the same area
    seeds: np.ndarray                 # (B, 8) uniforms for everything later
    which: np.ndarray                 # (B,) number in the data set
    flip: np.ndarray                  # (B,) whether left and right are swapped
    data: Photographs
    names, colors = property(lambda self: self.data.names), ("",)

    def __len__(self) -> int:
        return len(self.count)

def sample_photos(cfg: Config, split: str, index: np.ndarray, use: str) -> Photos:
    """Photographs that fit a use: drawn and mirrored at random in training, in turn in validation."""
    data, training = photographs(cfg.data, cfg.image_size, cfg.max_objects), split not in ("val", "grid")
    pool, u = data.pool(split, use), uniforms(cfg.seed, split, index, 16)
    which = pool[(u[:, 0] * len(pool)).astype(np.int64) if training else np.asarray(index) % len(pool)]
    flip = (u[:, 1] < 0.5) & (training and use != "captions")         # captions know left from right
    count = data.first[which + 1] - data.first[which]
    table = np.zeros((len(which), max(1, count.max()), 6), np.float32)                          # (B, M, 6)
    for b, i in enumerate(which):
        table[b, :count[b]] = data.objects[data.first[i]:data.first[i + 1]]
    category, x, y, radius, asked, painted = table.transpose(2, 0, 1)
    x, size = np.where(flip[:, None], cfg.image_size - x, x), radius > 0.14 * cfg.image_size
    category, size = category.astype(np.int64), size.astype(np.int64)
    return Photos(count, painted > 0, asked > 0, category, np.zeros_like(category), size, x, y, radius,
                  u[:, 8:], which, flip, data)

def show_photos(photos: Photos) -> Rendered:
    data, ways = photos.data, np.where(photos.flip, -1, 1)            # (B,) the way to go through the columns
    image = np.stack([data.images[i, :, ::way] for i, way in zip(photos.which, ways)])          # (B, P, P, 3)
    maps = np.stack([data.maps[i, :, :, ::way] for i, way in zip(photos.which, ways)])          # (B, 3, P, P)
    instance, category, stuff = torch.from_numpy(maps).unbind(1)      # (B, P, P) each, bytes
    image = torch.from_numpy(image).permute(0, 3, 1, 2).float().div_(255)
    return Rendered(image, instance, category, torch.zeros(()).expand(instance.shape), stuff)

def sample(cfg: Config, split: str, index: np.ndarray, use: str = "questions") -> Scenes | Photos:
    """Pictures number `index` of a split, fit for a use. Captions tell no overlap: scenes without any."""
    if cfg.photos:
        return sample_photos(cfg, split, index, use)
    return sample_scenes(cfg, split, index, 0.0 if use == "captions" else 0.5)

# ==== 4. Language: words, captions, questions ===============================================================

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
LEXICON = """a and is are there the of in than how many what color shape where object objects more plus list
big small left right above below front bigger smaller or top middle bottom center yes no zero one two three
four five six seven eight nine ten circle circles square squares triangle triangles cross crosses ring rings
bar bars diamond diamonds star stars red green blue yellow purple cyan orange white segment paint every each
separately instances with different colors another class by its kind things stuff everything only draw boxes
around all box this image picture depth map estimate near show view from camera shift fill missing part
complete hidden edges detect outlines trace copy remove noise clean blur make sharp restore detail their
just blurred very once bright dark enhance rain streaks now as it"""

class Text:
    """Words of the training text plus UTF-8 bytes: short sequences, no unknown words, nothing is lost."""
    PAD, BOS, END = 0, 1, 2

    def __init__(self, words: str = "") -> None:
        known = dict.fromkeys((LEXICON + " " + words).split())        # in this order, each once
        self.pieces = [b""] * 3 + [bytes([b]) for b in range(256)] + [b" " + word.encode() for word in known]
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if piece}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. A word carries the space before it; signs and unknown words become bytes."""
        return list(self.ids_of(text))

    @functools.lru_cache(100_000)                 # the sentences of the scenes come back again and again
    def ids_of(self, text: str) -> tuple[int, ...]:
        ids = []
        for chunk in re.findall(r" ?\w+| ?[^\w\s]|\s", " " + text) if text else []:
            chunk = chunk.encode("utf-8", "surrogatepass")
            ids += [self.ids[chunk]] if chunk in self.ids else [3 + byte for byte in chunk]
        return tuple(ids)

    def decode(self, ids: list[int]) -> str:
        """Text up to the first end token; bytes that are not valid UTF-8 become the replacement character."""
        ids = ids[:ids.index(self.END)] if self.END in ids else ids
        text = b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")
        return text[1:] if text.startswith(" ") else text

text_of = functools.cache(Text)       # the words of a run's data, beside the built-in ones → its Text
TEXT = text_of("")
Thing = namedtuple("Thing", "shape color size x y radius index")      # one object in words and pixels

def word_rng(scenes: Scenes, b: int) -> random.Random:
    return random.Random(int(scenes.seeds[b, 0] * 2 ** 53))

def things(scenes: Scenes | Photos, b: int) -> list[Thing]:
    """What is in a picture. A thing with index -1 is too small, crowded or ill annotated to be asked about."""
    asked = scenes.asked[b]                       # a property: once, not for each object
    return [Thing(shape=scenes.names[scenes.shape[b, m]], color=scenes.colors[scenes.color[b, m]],
                  size=("small", "big")[scenes.size[b, m]], x=float(scenes.x[b, m]), y=float(scenes.y[b, m]),
                  radius=float(scenes.radius[b, m]), index=m if asked[m] else -1)
            for m in range(int(scenes.count[b]))]

def noun(color: str, shape: str) -> str:
    return f"{color} {shape}".strip()             # things on photographs have no color

PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis",
           "scissors": "scissors"}

def plural(shape: str) -> str:
    before, space, last = shape.rpartition(" ")
    ending = "es" if re.search("(s|x|ch|sh)$", last) else "s"
    return before + space + PLURALS.get(last, last + ending)

def biggest(objects: list[Thing]) -> list[Thing]:
    """The thing on a photograph that is clearly larger than all others, or none; scenes have two sizes only."""
    order = sorted((o for o in objects if o.index >= 0 and not o.color), key=lambda o: -o.radius)
    if len(order) > 1 and order[0].radius <= 1.4 * order[1].radius:
        return []
    return order[:1]

def named(objects: list[Thing]) -> list[tuple[Thing, str]]:
    """Objects that can be told apart in words, with their shortest names: 'ring', or 'red ring' among rings."""
    shapes, nouns = Counter(o.shape for o in objects), Counter(noun(o.color, o.shape) for o in objects)
    found = [(o, o.shape if shapes[o.shape] == 1 else noun(o.color, o.shape))
             for o in objects if nouns[noun(o.color, o.shape)] == 1 and o.index >= 0]
    return found + [(o, "biggest object") for o in biggest(objects)]

def where(o: Thing, P: int) -> str:
    row = ("top", "middle", "bottom")[min(2, int(o.y * 3 / P))]
    column = ("left", "center", "right")[min(2, int(o.x * 3 / P))]
    return f"{row} {column}"

def relation(a: Thing, b: Thing) -> str | None:
    """How a lies to b, where one direction clearly wins; None on a diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)) + 1e-6:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"

def overlap(a: Thing, b: Thing) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) < 0.8 * (a.radius + b.radius)

# --- captions: GenEval's six kinds (arXiv 2310.11513), and a longer one

def captions(objects: list[Thing], rng: random.Random | None = None) -> dict[str, str]:
    """Every caption that fits a scene, by kind; two objects in random order, or as listed without rng."""
    objects = [o for o in objects if o.index >= 0]
    found, n = {}, len(objects)
    shapes, colored = {o.shape for o in objects}, any(o.color for o in objects)
    if n == 1:
        found["single"] = f"a {objects[0].shape}"
        if colored:
            found["colors"] = f"a {objects[0].color} {objects[0].shape}"
    if 2 <= n <= 10 and len(shapes) == 1:
        found["counting"] = f"{NUMBERS[n]} {plural(objects[0].shape)}"
        if colored and len({o.color for o in objects}) == 1:
            found["counting_color"] = f"{NUMBERS[n]} {objects[0].color} {plural(objects[0].shape)}"
    if n == 2 and len(shapes) == 2:
        a, b = rng.sample(objects, 2) if rng else objects
        colored_a, colored_b, between = noun(a.color, a.shape), noun(b.color, b.shape), relation(a, b)
        found["two"] = f"a {a.shape} and a {b.shape}"
        if colored:
            found["attribution"] = f"a {colored_a} and a {colored_b}"
        if between:
            found["position"] = f"a {a.shape} {between} a {b.shape}"
            if colored:
                found["position_color"] = f"a {colored_a} {between} a {colored_b}"
    if n >= 3 or not found:
        groups = Counter((o.color, o.shape) for o in objects)         # in the order of their first objects
        parts = []
        for (color, shape), k in list(groups.items())[:4]:
            amount = NUMBERS[k] if k <= 10 else "many"
            parts.append(f"a {noun(color, shape)}" if k == 1 else f"{amount} {noun(color, plural(shape))}")
        found["long"] = ", ".join(parts)
    return found

def describe(objects: list[Thing], rng: random.Random, P: int) -> str:
    """Everything there is to say about a scene, in random order: every word depends on the name before it, so
    this is the densest lesson in looking things up. Objects of a scene are listed back to front: of two that
    overlap one is hidden; photographs do not say which. Of many things the first five are told.
    """
    told = [o for o in objects if o.index >= 0][:5]
    parts = []
    for o in rng.sample(told, len(told)):
        name = " ".join(rng.sample([o.color, o.shape], 2)).strip()
        facts = [where(o, P), o.size]
        touching = [p for p in objects if p is not o and overlap(o, p)]
        if o.color and touching:
            facts.append("front" if o.index > touching[0].index else "hidden")
        parts.append(" ".join([name, *rng.sample(facts, len(facts))]))
    return ", ".join(parts) + "."

# --- questions: (objects, rng, cfg) → (question, answer), or None where the scene does not allow one

def balanced(options: list[tuple[str, str]], rng: random.Random) -> tuple[str, str] | None:
    """Draw the answer first, then the question: no answer is common only because the scenes make it so."""
    if not options:
        return None
    answer = rng.choice(sorted({a for _, a in options}))
    return rng.choice([option for option in options if option[1] == answer])

def categories(objects: list[Thing], rng: random.Random, cfg: Config, n: int) -> list[tuple[str, int]]:
    """Up to n sets of objects in words, with their sizes: 'circles', 'red objects'; a third perhaps empty."""
    def any_of(options: list):
        return options[int(rng.random() * len(options))]
    found = []
    for _ in range(n):
        pool = [(o.shape, o.color) for o in objects]
        if rng.random() >= 0.67:
            pool = [(any_of(cfg.shape_names), any_of(cfg.color_names))]
        shape, color = any_of(pool)
        if rng.random() < 0.5 or not color:
            name, members = plural(shape), [o for o in objects if o.shape == shape]
        else:
            name, members = f"{color} objects", [o for o in objects if o.color == color]
        if len(members) <= 10 and all(o.index >= 0 for o in members):
            found.append((name, len(members)))
    return found

def ask_existence(objects, rng, cfg):
    present = {(o.color, o.shape) for o in objects}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted({(o.color, o.shape) for o in objects if o.index >= 0}))
        return f"is there a {noun(color, shape)}?", "yes"
    # hard negatives: mostly a color and a shape that are both there, but not together; else one that is there
    absent = {(o.color, p.shape) for o in objects for p in objects} - present
    if not absent or rng.random() < 0.3:
        o = rng.choice(objects)
        absent = {(o.color, s) for s in cfg.shape_names} | {(c, o.shape) for c in cfg.color_names}
    if absent - present:
        color, shape = rng.choice(sorted(absent - present))
        return f"is there a {noun(color, shape)}?", "no"

def ask_counting(objects, rng, cfg):
    sets = categories(objects, rng, cfg, 4)
    if not cfg.photos:                            # where everything is annotated
        sets.append(("objects", len(objects)))
    return balanced([(f"how many {name}?", NUMBERS[n]) for name, n in sets], rng)

def ask_color(objects, rng, cfg):
    shapes = [o.shape for o in objects]
    options = [(f"what color is the {o.shape}?", o.color) for o in objects if shapes.count(o.shape) == 1]
    return rng.choice(options) if options else None

def ask_shape(objects, rng, cfg):
    colors = [o.color for o in objects]
    options = [(f"what shape is the {o.color} object?", o.shape) for o in objects if colors.count(o.color) == 1]
    return rng.choice(options) if options else None

def ask_category(objects, rng, cfg):
    """What photographs have for shapes."""
    places = [where(o, cfg.image_size) for o in objects]
    options = [(f"what object is {place}?", o.shape) for o, place in zip(objects, places)
               if places.count(place) == 1 and o.index >= 0]
    return balanced(options + [("what is the biggest object?", o.shape) for o in biggest(objects)], rng)

def pairs(objects: list[Thing], rng: random.Random):
    """Two different objects that can be told apart in words, and these words, in random order."""
    both = itertools.product(named(objects), repeat=2)
    found = [(a, b, name_a, name_b) for (a, name_a), (b, name_b) in both if a is not b]
    return rng.sample(found, len(found))

def ask_relation(objects, rng, cfg):
    for a, b, name_a, name_b in pairs(objects, rng):
        if relation(a, b):
            return f"where is the {name_a} from the {name_b}?", relation(a, b).split()[0]

def ask_location(objects, rng, cfg):
    options = named(objects)
    for o, name in rng.sample(options, len(options)):
        return f"where is the {name}?", where(o, cfg.image_size)

def ask_size(objects, rng, cfg):
    for a, b, name_a, name_b in pairs(objects, rng):
        clear = max(a.radius, b.radius) > 1.4 * min(a.radius, b.radius)
        if clear and "biggest object" not in (name_a, name_b):
            truth = "bigger" if a.radius > b.radius else "smaller"
            return f"is the {name_a} bigger or smaller than the {name_b}?", truth

def ask_occlusion(objects, rng, cfg):
    for a, b, name_a, name_b in pairs(objects, rng):
        if overlap(a, b):                                    # objects are listed back to front
            return f"is the {name_a} in front of the {name_b}?", "yes" if a.index > b.index else "no"

def ask_compare(objects, rng, cfg):
    sets = categories(objects, rng, cfg, 5)
    return balanced([(f"are there more {a} than {b}?", "yes" if n > m else "no")
                     for a, n in sets for b, m in sets if a != b], rng)

def ask_arithmetic(objects, rng, cfg):
    sets = categories(objects, rng, cfg, 3)
    options = [(f"how many {a} plus {NUMBERS[k]}?", n + k) for a, n in sets for k in (1, 2, 3)]
    options += [(f"how many {a} plus {b}?", n + m) for a, n in sets for b, m in sets if a != b]
    return balanced([(question, NUMBERS[n]) for question, n in options if n <= 10], rng)

QUESTIONS = {   # kind → (level, function). The paper: perception improves, reasoning does not.
    "existence": ("perception", ask_existence), "counting": ("perception", ask_counting),
    "color": ("perception", ask_color), "shape": ("perception", ask_shape),
    "relation": ("perception", ask_relation), "location": ("perception", ask_location),
    "size": ("perception", ask_size), "occlusion": ("perception", ask_occlusion),
    "compare": ("reasoning", ask_compare), "arithmetic": ("reasoning", ask_arithmetic),
    "category": ("perception", ask_category),
}
NOT_FOR = {"scenes": {"category"},
           "photographs": {"color", "shape", "occlusion"},            # depth and color are not annotated
           "one class": {"color", "shape", "occlusion", "existence", "category", "relation", "size", "compare"}}

def kinds_of(cfg: Config) -> list[str]:
    """The kinds of questions that the data of a run can answer."""
    world = "scenes"
    if cfg.photos:
        world = "photographs" if len(cfg.shape_names) > 1 else "one class"
    return [kind for kind in QUESTIONS if kind not in NOT_FOR[world]]

def caption(scenes: Scenes | Photos, b: int, rng: random.Random, cfg: Config) -> str:
    """A caption of a picture: of photographs a human one where there is one that is not too long."""
    human = [] if isinstance(scenes, Scenes) else scenes.data.captions[scenes.which[b]]
    human = [text for text in human if 0 < len(cfg.text.encode(text)) < cfg.prompt_len]
    return rng.choice(human or list(captions(things(scenes, b), rng).values()))

def find_words(data: Photographs, most: int = 600) -> str:
    """The vocabulary of a data set: the words of its names and the commonest ones of its training captions."""
    counts = Counter(word for i in np.flatnonzero(data.split == 0)
                     for text in data.captions[i] for word in text.split())
    words = " ".join([*data.names, *map(plural, data.names), "biggest", "nothing", "many"]).split()
    words += [word for word, n in counts.most_common(most) if n > 1 and re.fullmatch(r"\w+", word)]
    return " ".join(dict.fromkeys(words))

def dialogue(cfg: Config, objects: list[Thing], rng: random.Random, budget: int
             ) -> tuple[list[int], list[bool]]:
    """Questions and answers about one scene in random order until the budget is full, a description last.

    Returns ids and, for each, whether it is supervised (answers and their end token are).
    """
    def tokens(question: str, answer: str) -> tuple[list[int], list[bool]]:
        q, a = cfg.text.encode(question), cfg.text.encode(answer) + [Text.END]
        return q + a, [False] * len(q) + [True] * len(a)

    last = tokens("list the objects.", describe(objects, rng, cfg.image_size))
    budget -= len(last[0])
    ids, supervised, asked = [], [], set()
    kinds = kinds_of(cfg) * 2
    rng.shuffle(kinds)
    for kind in kinds:
        if budget < 6:                            # shorter is no question with its answer
            break
        turn = QUESTIONS[kind][1](objects, rng, cfg)
        if turn and turn not in asked:
            more, is_answer = tokens(*turn)
            if len(more) <= budget:
                asked.add(turn)
                ids += more
                supervised += is_answer
                budget -= len(more)
    return ids + last[0], supervised + last[1]

# ==== 5. Proxies: what the model may be asked to draw of an image that it looks at ==========================

def color_cube(levels: int, darkest: int, stride: int) -> list[tuple[int, int, int]]:
    """All colors with that many levels a channel, 60 apart; the stride puts similar ones far apart."""
    order = [stride * j % levels ** 3 for j in range(levels ** 3)]
    return [tuple(darkest + 60 * (i // unit % levels) for unit in (1, levels, levels ** 2)) for i in order]

# Well-separated colors; index 0 is the background. Instances take them in scan order, which leaves the model no
# choice to guess (SegGPT lost 9-10 points with random colors). The cubes are for classes of photographs.
PALETTE = torch.tensor([(0, 0, 0), (230, 25, 35), (40, 190, 60), (35, 70, 245), (250, 225, 25), (235, 60, 230),
                        (50, 225, 235), (250, 140, 20), (250, 250, 250), (130, 20, 190), (120, 75, 30),
                        (10, 110, 100), (128, 128, 128)]
                       + color_cube(5, 0, 37)[1:] + color_cube(4, 30, 11)) / 255

def paint(ids: Tensor, lut: Tensor) -> Tensor:
    """Color an index map: ids (B, P, P), lut (B, n, 3) of colors for each sample → (B, 3, P, P)."""
    B, P, _ = ids.shape
    flat = lut.gather(1, ids.reshape(B, -1, 1).long().expand(-1, -1, 3))                         # (B, P·P, 3)
    return flat.reshape(B, P, P, 3).permute(0, 3, 1, 2)

def instance_rank(cfg: Config, scenes: Scenes) -> np.ndarray:
    """1, 2, … for the objects of a scene from top to bottom (in quarters) and left to right; (B, M)."""
    key = np.floor(scenes.y * 4 / cfg.image_size) * cfg.image_size + scenes.x
    key = key + np.where(scenes.painted, 0, 1e6)
    return np.where(scenes.painted, key.argsort(1).argsort(1) + 1, 0)

def instance(cfg, scenes, r):
    return paint(r.instance, PALETTE[per_object(instance_rank(cfg, scenes))])

def semantic(cfg, scenes, r):
    return paint(r.category, PALETTE.expand(len(scenes), -1, -1))

def panoptic(cfg, scenes, r):
    """The class is the hue, the instance the shade; the background is stuff, not nothing."""
    shade = per_object(1.15 - 0.2 * instance_rank(cfg, scenes).clip(max=5)).float()
    colors = PALETTE[per_object(scenes.shape + 1)] * shade[..., None]
    colors[:, 0] = 0.5
    # classes of stuff take darker colors, counted from the other end
    stuff = paint(r.stuff, 0.6 * PALETTE.flip(0).expand(len(scenes), -1, -1))
    is_stuff = (r.instance == 0) & (r.stuff > 0)                                                  # (B, P, P)
    return torch.where(is_stuff[:, None], stuff, paint(r.instance, colors.clamp(0, 1)))

def referent(scenes: Scenes | Photos, b: int) -> Thing:
    objects = [o for o, painted in zip(things(scenes, b), scenes.painted[b]) if painted]
    return objects[int(scenes.seeds[b, 1] * len(objects))]

def referring(cfg, scenes, r):
    chosen = np.array([[referent(scenes, b).index] for b in range(len(scenes))])                  # (B, 1)
    same = lambda a: a == np.take_along_axis(a, chosen, 1)                                        # (B, M)
    match, white = scenes.painted & same(scenes.shape) & same(scenes.color), 8
    return paint(r.instance, PALETTE[white * per_object(match.astype(np.int64))])

def boxes(cfg, scenes, r):
    """The outline, one pixel wide, of each object's box, in the colors of `instance`."""
    ids = torch.zeros_like(r.instance)
    for b, m in np.ndindex(scenes.shape.shape):
        rows, cols = torch.nonzero(r.instance[b] == m + 1, as_tuple=True)
        if len(rows):
            top, bottom, left, right = rows.min(), rows.max(), cols.min(), cols.max()
            ids[b, [top, bottom], left:right + 1] = m + 1
            ids[b, top:bottom + 1, [left, right]] = m + 1
    return paint(ids, PALETTE[per_object(instance_rank(cfg, scenes))])

def depth(cfg, scenes, r):
    return r.depth[:, None].expand(-1, 3, -1, -1)

def novel_view(cfg, scenes, r):
    return render(cfg, scenes, shift=cfg.image_size / 6).image

def edges(cfg, scenes, r):
    gray = F.pad(r.image.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    dx = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]
    dy = gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
    return (4 * (dx.square() + dy.square()).sqrt()).clamp(0, 1).expand(-1, 3, -1, -1)

def original(cfg, scenes, r):
    return r.image

def shuffled(cfg, scenes, r):
    return instance(cfg, scenes, r).roll(1, 0)

# What restoration proxies do to the image that the model sees; (image, generator) → image.
def noise(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.15 * torch.randn(x.shape, generator=g)

def blur(x: Tensor, g: torch.Generator) -> Tensor:
    k = 2 * max(1, x.shape[-1] // 24) + 1
    return F.avg_pool2d(F.pad(x, (k // 2,) * 4, mode="replicate"), k, 1)

def shrink(x: Tensor, g: torch.Generator) -> Tensor:
    return F.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)

def darken(x: Tensor, g: torch.Generator) -> Tensor:
    return 0.2 * x + 0.02 * torch.randn(x.shape, generator=g)

def rain(x: Tensor, g: torch.Generator) -> Tensor:
    drops = (torch.rand(x.shape[0], 1, *x.shape[2:], generator=g) < 0.02).float()
    streaks = sum(drops.roll((i, -(i // 2)), (2, 3)) for i in range(x.shape[-1] // 8))
    return x + 0.5 * streaks.clamp(0, 1)

def hole(x: Tensor, g: torch.Generator) -> Tensor:
    P = x.shape[-1]
    corner = torch.rand(x.shape[0], 2, generator=g).mul(P / 2).long()
    line = torch.arange(P)
    inside = (line >= corner[..., None]) & (line < corner[..., None] + P // 2)                    # (B, 2, P)
    return torch.where((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.5, x)

# name → (level, prompts, target, source). All prompts about scenes have six tokens, every arm sees the same
# scenes, replay and steps: arms differ in the target image alone. DIFFERS: restoring something needs something
# broken, so the six arms with a `source` also change the image that is looked at; the paper does the same.
INSTANCE_PROMPTS = ("segment instances with different colors.", "paint each object another color.")
Proxy = namedtuple("Proxy", "level prompts target source", defaults=[None])
PROXIES = {
    "none": Proxy("control", (), None),
    "shuffled": Proxy("control", INSTANCE_PROMPTS, shuffled),
    "instance": Proxy("high", INSTANCE_PROMPTS, instance),
    "semantic": Proxy("high", ("paint every class another color.", "segment objects by their kind."), semantic),
    "panoptic": Proxy("high", ("segment things and stuff separately.", "paint everything by its kind."),
                      panoptic),
    "referring": Proxy("high", ("segment only the {name}.", "paint just the {name}."), referring),
    "boxes": Proxy("high", ("draw boxes around all objects.", "draw each object as box."), boxes),
    "depth": Proxy("mid", ("estimate the depth map now.", "show how near everything is."), depth),
    "novel_view": Proxy("mid", ("shift the camera right now.", "show it from another view."), novel_view),
    "inpainting": Proxy("mid", ("fill in the missing part.", "complete the hidden part now."), original, hole),
    "edges": Proxy("low", ("detect the edges of everything.", "trace all the outlines now."), edges),
    "reconstruction": Proxy("low", ("copy the picture as is.", "draw this image once more."), original),
    "denoise": Proxy("low", ("remove noise from the image.", "clean all of this picture."), original, noise),
    "deblur": Proxy("low", ("remove blur from the image.", "make this blurred picture sharp."), original, blur),
    "superres": Proxy("low", ("restore detail of the image.", "make this small picture big."),
                      original, shrink),
    "enhance": Proxy("low", ("enhance this very dark image.", "make this dark picture bright."),
                     original, darken),
    "derain": Proxy("low", ("remove rain from the image.", "clean streaks of the picture."), original, rain),
}

def proxies_of(cfg: Config) -> list[str]:
    """The proxies that the data of a run can supervise: photographs tell no depth and one view only."""
    return [name for name in PROXIES if not (cfg.photos and name in ("depth", "novel_view"))]

def proxy_batch(cfg: Config, name: str, scenes: Scenes, r: Rendered) -> tuple[Tensor, list[str], Tensor]:
    """What the model sees (B, 3, P, P), the prompts, and what it must draw (B, 3, P, P), for one proxy."""
    proxy = PROXIES[name]
    g = torch.Generator().manual_seed(int(scenes.seeds[0, 2] * 2 ** 53))
    source = proxy.source(r.image, g).clamp(0, 1) if proxy.source else r.image
    prompts = []
    for b in range(len(scenes)):
        prompt = proxy.prompts[int(scenes.seeds[b, 3] * len(proxy.prompts))]
        if "{" in prompt:
            chosen = referent(scenes, b)
            prompt = prompt.format(name=noun(chosen.color, chosen.shape))
        prompts.append(prompt)
    return source, prompts, proxy.target(cfg, scenes, r)

# ==== 6. Vision tokenizer: image ↔ grid of ids ==============================================================

def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (…, in) times a weight (out, in) kept in fp32 and used in the precision of x."""
    return F.linear(x, weight.to(x.dtype))

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))          # no learned scale: the next matrix can absorb one

def matrix(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """A weight (…, out, in) with outputs of about the variance of its inputs."""
    return nn.Parameter(torch.randn(*shape) * gain / math.sqrt(shape[-1]))

def rotary_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions in 2D: half of a head turns with the row, half with the column.

    positions (…, S, 2) → two tensors (…, 1, S, head_dim / 2). Text at place t uses (t, t). Half of the
    frequencies are zero: what does not turn can match by content alone, and a word finds its object anywhere.
    """
    n = head_dim // 4
    frequency = 100.0 ** (-torch.arange(n, device=positions.device, dtype=torch.float32) / n)
    frequency[n // 2:] = 0
    angle = (positions.float()[..., None] * frequency).flatten(-2)                        # (…, S, head_dim/2)
    return angle.cos().unsqueeze(-3), angle.sin().unsqueeze(-3)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)

def grid_positions(G: int, device: torch.device | None = None) -> Tensor:
    line = torch.arange(G, device=device)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(G * G, 2)           # (N, 2)

class Block(nn.Module):
    """Pre-norm transformer block: attention with normalised queries and keys, a squared-ReLU MLP; no biases."""
    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.heads = width // head_dim
        self.qkv = matrix(3, width, width)        # a stack of three, so that Muon sees three matrices
        self.out = matrix(width, width, gain=0.0)
        self.up = matrix(4 * width, width)
        self.down = matrix(width, 4 * width, gain=0.0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout,
                cache: KVCache | None = None, at: int | Tensor = 0) -> Tensor:
        """x (B, S, D) → (B, S, D). With a cache, the S rows continue what columns [0, at) of the cache hold."""
        B, S, D = x.shape
        qkv = linear(norm(x), self.qkv.flatten(0, 1)).view(B, S, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                                  # (B, H, S, D/H)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache.put(k, v, at)                                                        # (B, H, L, …)
        mixed = attention(q, k, v, layout)                                                    # (B, H, S, D/H)
        x = x + linear(mixed.transpose(1, 2).reshape(B, S, D), self.out)
        return x + linear(F.relu(linear(norm(x), self.up)).square(), self.down)

class Stem(nn.Module):
    """Image → a vector for each patch, from `reach` × `reach` patches around it: a convolutional stem as matrix
    products, which trains far faster than linear patches and runs far faster on a CPU than convolutions.
    """
    def __init__(self, patch: int, reach: int, hidden: int, width: int, residuals: int = 0):
        super().__init__()
        self.patch, self.reach = patch, reach
        self.stem_in = matrix(hidden, 3 * (reach * patch) ** 2)
        self.stem_out = matrix(width, hidden)
        self.up = nn.ParameterList(matrix(4 * width, width) for _ in range(residuals))
        self.down = nn.ParameterList(matrix(width, 4 * width, gain=0.0) for _ in range(residuals))

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, P, P) in [0, 1] → (B, N, D)."""
        p, k = self.patch, self.reach * self.patch
        padded = F.pad(image * 2 - 1, ((k - p + 1) // 2,) * 4, mode="replicate")
        windows = F.unfold(padded, k, stride=p)                                                   # (B, 3·k², N)
        windows = windows.transpose(1, 2).contiguous()      # else, without gradients, one slow product an image
        x = linear(F.gelu(linear(windows, self.stem_in)), self.stem_out)
        for up, down in zip(self.up, self.down):
            x = x + linear(F.relu(linear(norm(x), up)).square(), down)
        return norm(x)

def from_patches(x: Tensor, patch: int) -> Tensor:
    B, N, C = x.shape
    G = math.isqrt(N)
    x = x.view(B, G, G, C // patch ** 2, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, -1, G * patch, G * patch)

class VisionTokenizer(nn.Module):
    """Autoencoder with finite scalar quantization (arXiv 2309.15505): a few bounded channels, each rounded to a
    few levels; the codebook is their product, cannot collapse and needs no auxiliary loss.

    The encoder sees `tok_reach` patches, the decoder everything. With attention in the encoder equal patches
    get different codes in different pictures: harder to predict, and at equal steps 52 % of pictures survived a
    round trip, not 88 %.
    """
    def __init__(self, cfg: Config):
        super().__init__()
        self.patch, width, C = cfg.patch, cfg.tok_width, len(cfg.levels)
        self.encoder = Stem(cfg.patch, cfg.tok_reach, 4 * width, width, residuals=1)
        self.to_code = matrix(C, width)
        self.from_code = matrix(width, C, gain=2.0)
        self.place = nn.Parameter(0.5 * torch.randn(cfg.tokens, width))
        self.decoder = nn.ModuleList(Block(width, 32) for _ in range(cfg.tok_depth))
        self.patch_out = matrix(3 * cfg.patch ** 2, width, gain=0.1)
        levels, (cos, sin) = torch.tensor(cfg.levels), rotary_table(grid_positions(cfg.grid), 32)
        basis = torch.cumprod(F.pad(levels[:-1], (1, 0), value=1), 0)                             # (C,)
        for name, value in dict(levels=levels, basis=basis, cos=cos, sin=sin).items():
            self.register_buffer(name, value, persistent=False)

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (…, C) of any size → the nearest code in (-1, 1), with a straight-through gradient, and its id (…).

        Always in fp32: bf16 has 8 bits, and rounding a bf16 number picks neighbouring codes.
        """
        half = self.levels / 2
        bounded = torch.tanh(z.float()) * half                                                   # (-L/2, L/2)
        digits = torch.minimum((bounded + half).floor().clamp(min=0), self.levels - 1)            # 0 … L-1
        code = (digits + 0.5) / half - 1
        return bounded / half + (code - bounded / half).detach(), (digits.long() * self.basis).sum(-1)

    def code(self, ids: Tensor) -> Tensor:
        """ids (…) → codes (…, C) in (-1, 1)."""
        digits = ids[..., None] // self.basis % self.levels
        return (digits + 0.5) / (self.levels / 2) - 1

    def features(self, image: Tensor) -> Tensor:
        """image (B, 3, P, P) in [0, 1] → unquantized channels (B, N, C)."""
        return linear(self.encoder(image).float(), self.to_code)

    def reconstruct(self, code: Tensor, dtype: torch.dtype = torch.float32, block=Block.forward) -> Tensor:
        """code (B, N, C) → image (B, 3, P, P), the blocks in `dtype`; not clamped, for gradients everywhere."""
        x = (norm(linear(code, self.from_code)) + self.place).to(dtype)
        none = torch.zeros(x.shape[:2], dtype=torch.int32, device=x.device)
        layout = Layout(none, none + x.shape[1], none, none + x.shape[1])     # everything sees everything
        for weights in self.decoder:
            x = block(weights, x, self.cos, self.sin, layout)
        return from_patches(linear(norm(x).float(), self.patch_out), self.patch) * 0.5 + 0.5

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """image (B, 3, P, P) in [0, 1] → ids (B, N)."""
        return self.quantize(self.features(image.float()))[1]

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids (B, N) → image (B, 3, P, P) in [0, 1]."""
        return self.reconstruct(self.code(ids)).clamp(0, 1)

# ==== 7. The unified model ==================================================================================

class UnifiedModel(nn.Module):
    """One transformer over understanding patches, text ids and image ids, with a text head and an image head.

    Ids: [0, V) text, [V, V + K) the tokenizer's codes, V + K the mask. A `slot` says which learned position a
    token takes: 0 none, then U of understanding patches, N of image tokens, and the places of text.
    """
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, D = cfg, cfg.width
        self.mask_id = len(cfg.text) + cfg.codebook
        self.embed = nn.Parameter(torch.randn(self.mask_id + 1, D))
        self.place = nn.Parameter(0.5 * torch.randn(cfg.text_slot + cfg.row_len, D))
        self.see = Stem(cfg.see_patch, 2, 2 * D, D)                   # image (B, 3, P, P) → features (B, U, D)
        self.blocks = nn.ModuleList(Block(D, cfg.head_dim) for _ in range(cfg.depth))
        self.text_head = nn.Parameter(torch.zeros(len(cfg.text), D))  # zero: the first loss is ln V, ln K
        self.image_head = nn.Parameter(torch.zeros(cfg.codebook, D))
        # recorded by a GPU for each shape that they are called with, and forgotten together with the model
        self.begin, self.decode, self.refine = map(GraphedStep, (begin, decode, refine))

    def forward(self, function, *args):                       # what torch.func.functional_call calls
        return function(self, *args)

    def embed_rows(self, ids: Tensor, slots: Tensor, features: Tensor | None, patch_at: Tensor | None
                   ) -> Tensor:
        """ids, slots (B, S) → (B, S, D); understanding features go to the flat places patch_at."""
        few = ids.numel() < len(self.embed) and not torch.is_grad_enabled()   # less work, the same result
        x = norm(F.embedding(ids, self.embed)) if few else F.embedding(ids, norm(self.embed))
        if features is not None:
            x = x.flatten(0, 1).index_copy(0, patch_at, features.flatten(0, 1).to(x.dtype)).view_as(x)
        # features and positions on one scale, or the model stays blind to place
        return norm(x + F.embedding(slots, self.place))

    def trunk(self, x: Tensor, positions: Tensor, layout: Layout, caches: list[KVCache] | None = None,
              at: int | Tensor = 0, block=Block.forward) -> Tensor:
        cos, sin = rotary_table(positions, self.cfg.head_dim)                                # (B, 1, S, D/H/2)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        for i, weights in enumerate(self.blocks):
            x = block(weights, x, cos, sin, layout, caches[i] if caches else None, at)
        return norm(x)                                                                            # (B, S, D)

    def text_logits(self, h: Tensor) -> Tensor:
        return linear(h, self.text_head).float()

    def image_logits(self, h: Tensor) -> Tensor:
        return linear(h, self.image_head).float()

def token_loss(h: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy (n,) of h (n, D), through a head (K, D), in fp32; 0 where the target (n,) is -100."""
    return F.cross_entropy(linear(h, head).float(), target, reduction="none", ignore_index=-100)

# ==== 8. Batches: documents packed into rows of one length ==================================================

class Batch(NamedTuple):
    """Rows of S tokens, and where in the flat (B·S) rows everything lies; of equal shapes in every step."""
    ids: Tensor                       # (B, S) text ids; places of patches and image tokens hold 0
    slots: Tensor                     # (B, S) learned position
    positions: Tensor                 # (B, S, 2) rotary position
    layout: Layout                    # who may attend to whom, 4 × (B, S)
    images: Tensor                    # (n, 3, P, P) images to understand
    patch_at: Tensor                  # (n·U,) where their patches go
    text_at: Tensor                   # (t,) places whose next token may be supervised
    text_target: Tensor               # (t,) that token, or -100
    targets: Tensor                   # (m, 3, P, P) images to draw: those of captions, then those of the proxy
    code_at: Tensor                   # (m·N,) where their tokens go
    is_masked: Tensor                 # (m, N) which of their tokens the model must predict
    captioned: int                    # how many targets belong to captions
    reach: Tensor                     # () 1; 0: the loss of the proxy trains the image head alone

    def to(self, device) -> "Batch":
        return Batch(*(v.to(device) if isinstance(v, (Tensor, Layout)) else v for v in self))

class Rows:
    """Packs documents `[patches] text [image tokens]` into rows; the rest is padding, which sees nothing."""
    def __init__(self, cfg: Config, n: int, S: int):
        self.cfg, self.length = cfg, S
        self.ids, self.slots = np.zeros((n, S), np.int64), np.zeros((n, S), np.int64)
        self.positions = np.zeros((n, S, 2), np.float32)
        self.spans = np.zeros((4, n, S), np.int32)              # the four vectors of a Layout
        self.next = np.full((n, S), -100, np.int64)             # the token to predict, where it is supervised
        self.patch_at, self.code_at = [], []
        self.grid = grid_positions(cfg.grid).numpy()
        # patches lie on the grid of the image tokens, each in the middle of those that it covers
        scale = cfg.see_patch // cfg.patch
        self.see_grid = grid_positions(cfg.see_grid).numpy() * scale + (scale - 1) / 2

    def add(self, row: int, start: int, text: list[int], supervised: list[bool] | None = None, *,
            patches: bool = False, codes: bool = False) -> int:
        """Place one document at column `start` of a row and return the column behind it."""
        cfg, T, at = self.cfg, len(text), start
        blocks = [("image", cfg.patches)] * patches + [("text", T)] + [("image", cfg.tokens)] * codes
        end = write_document(self.spans, row, start, blocks)

        def place(n: int, slot: int, positions: np.ndarray) -> np.ndarray:
            nonlocal at
            here, at = slice(at, at + n), at + n
            self.slots[row, here], self.positions[row, here] = slot + np.arange(n), positions
            return row * self.length + np.arange(n) + here.start      # flat places
        if patches:
            self.patch_at.append(place(cfg.patches, 1, self.see_grid))
        self.ids[row, at:at + T] = text
        if supervised is not None:
            self.next[row, at - 1:at + T - 1] = np.where(supervised, text, -100)
        place(T, cfg.text_slot, (cfg.grid + np.arange(T))[:, None])
        if codes:
            self.code_at.append(place(cfg.tokens, cfg.image_slot, self.grid))
        return end

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Layout]:
        """ids, slots, positions and the layout."""
        ids, slots, positions = map(torch.from_numpy, (self.ids, self.slots, self.positions))
        return ids, slots, positions, Layout(*map(torch.from_numpy, self.spans))

def make_batch(cfg: Config, split: str, step: int, vqa: int, t2i: int, proxy: str = "none", draws: int = 0,
               reach: float = 1.0) -> Batch:
    """The batch of a training step, a pure function of its arguments.

    vqa dialogues, t2i captioned images and `draws` samples of one proxy, each of a new scene unless
    question_scenes or arm_scenes is set. The replay does not depend on the proxy, and the proxy's scenes do not
    depend on which proxy it is.
    """
    N, S, U = cfg.tokens, cfg.row_len, cfg.patches
    index = step * 4096 + np.r_[0:vqa + t2i, 2048:2048 + draws]           # replay, the proxy's from 2048 on
    rows, images, targets = Rows(cfg, len(index), S), [], []
    if vqa:
        asked, of = index[:vqa], split
        if cfg.question_scenes:                                       # the same few to base and arms
            few = np.random.default_rng([cfg.seed, step]).integers(cfg.question_scenes, size=vqa)
            asked, of = 2 ** 41 + few, "train"
        scenes = sample(cfg, of, asked)
        images.append(render(cfg, scenes).image)
        for i in range(vqa):
            rows.add(i, 0, *dialogue(cfg, things(scenes, i), word_rng(scenes, i), S - U), patches=True)
    if t2i:
        scenes = sample(cfg, split, index[vqa:vqa + t2i], "captions")
        targets.append(render(cfg, scenes).image)
        for i in range(t2i):
            rng = word_rng(scenes, i)
            prompt = caption(scenes, i, rng, cfg)
            words = cfg.text.encode(prompt) if rng.random() >= cfg.condition_drop else []
            rows.add(vqa + i, 0, [Text.BOS] + words, codes=True)
    if draws:
        drawn = index[vqa + t2i:]
        if cfg.arm_scenes:                                            # the same few again and again
            drawn = 2 ** 40 + (step * draws + np.arange(draws)) % cfg.arm_scenes
        scenes = sample(cfg, split, drawn, "masks")
        seen, prompts, wanted = proxy_batch(cfg, proxy, scenes, render(cfg, scenes))
        images.append(seen)
        targets.append(wanted)
        for i, prompt in enumerate(prompts):
            rows.add(vqa + t2i + i, 0, cfg.text.encode(prompt), patches=True, codes=True)
    # which tokens are masked: a share cos(π/2 · u) of each image, at least one (MaskGIT's cosine schedule)
    u = uniforms(cfg.seed + 1, split, index[vqa:], 1 + N)
    count = np.maximum(1, np.ceil(np.cos(np.pi / 2 * u[:, :1]) * N))
    is_masked = u[:, 1:].argsort(1).argsort(1) < count                                            # (m, N)
    text_at = (np.arange(vqa)[:, None] * S + np.arange(U - 1, S - 1)).reshape(-1)
    text_target = rows.next.reshape(-1)[text_at]
    flat = lambda places: torch.from_numpy(np.concatenate(places))
    return Batch(*rows.tensors(), images=torch.cat(images), patch_at=flat(rows.patch_at),
                 text_at=torch.from_numpy(text_at), text_target=torch.from_numpy(text_target),
                 targets=torch.cat(targets), code_at=flat(rows.code_at),
                 is_masked=torch.from_numpy(is_masked), captioned=t2i, reach=torch.tensor(reach))

def losses(model: UnifiedModel, tokenizer: VisionTokenizer, batch: Batch, block=Block.forward,
           token_loss=token_loss) -> dict[str, Tensor]:
    """Cross-entropy of the supervised text, and of the masked tokens of captioned images and of proxy targets.

    Each is averaged over its own tokens (the paper's rule): adding a proxy does not thin out the replay.
    """
    V, dtype = len(model.cfg.text), compute_dtype(batch.ids.device)
    codes = tokenizer.encode(batch.targets)                                                       # (m, N)
    shown = torch.where(batch.is_masked, model.mask_id, V + codes)
    ids = batch.ids.flatten().index_copy(0, batch.code_at, shown.flatten()).view_as(batch.ids)
    x = model.embed_rows(ids, batch.slots, model.see(batch.images.to(dtype)), batch.patch_at).to(dtype)
    h = model.trunk(x, batch.positions, batch.layout, block=block).flatten(0, 1)                  # (B·S, D)
    h_captioned, h_proxy = h[batch.code_at].tensor_split([batch.captioned * codes.shape[1]])
    h_proxy = h_proxy * batch.reach + h_proxy.detach() * (1 - batch.reach)        # no gradient where reach is 0
    each = token_loss(torch.cat([h_captioned, h_proxy]), model.image_head, codes.flatten()).view_as(codes)
    each = each * batch.is_masked                                                                 # (m, N)
    out = {}
    if len(batch.text_at):
        text = token_loss(h[batch.text_at], model.text_head, batch.text_target)
        out["text"] = text.sum() / (batch.text_target >= 0).sum()
    for name, part in (("t2i", slice(batch.captioned)), ("proxy", slice(batch.captioned, None))):
        if len(each[part]):
            out[name] = each[part].sum() / batch.is_masked[part].sum()
    return out

# ==== 9. Sampling: answers and pictures =====================================================================

def cast_once(function):
    """A function of a model and tensors that casts every matrix once, not in each step: the same to the bit."""
    @functools.wraps(function)
    @torch.no_grad()
    def run(model: UnifiedModel, *args):
        low = {name: weight.to(compute_dtype(weight.device)) for name, weight in model.named_parameters()
               if name not in ("embed", "place")}
        return torch.func.functional_call(model, low, (function, *args))
    return run

class Condition(NamedTuple):
    """What is read before anything is written: B rows [patches] text that all end at column L."""
    ids: Tensor                       # (B, L), as in a Batch
    slots: Tensor                     # (B, L)
    positions: Tensor                 # (B, L, 2)
    layout: Layout                    # 4 × (B, L)
    images: Tensor | None             # (B, 3, P, P)
    patch_at: Tensor | None           # (B·U,)

def condition(model: UnifiedModel, texts: list[list[int]], image: Tensor | None) -> Condition:
    """Texts, after images (B, 3, P, P) if given, as rows that are padded on the left."""
    device, U = model.embed.device, 0 if image is None else model.cfg.patches
    multiple = 16 if records(device) else 1       # there is a graph for each length: let there be few
    L = math.ceil((U + max(map(len, texts))) / multiple) * multiple
    rows = Rows(model.cfg, len(texts), L)
    for b, text in enumerate(texts):
        rows.add(b, L - U - len(text), text, patches=image is not None)
    ids, slots, positions, layout = (x.to(device) for x in rows.tensors())
    patch_at = torch.from_numpy(np.concatenate(rows.patch_at)).to(device) if U else None
    return Condition(ids, slots, positions, layout, image, patch_at)

def read(model: UnifiedModel, seen: Condition, room: int) -> tuple[Tensor, Tensor]:
    """Run the condition once: its last hidden state (B, D), and its keys and values with room for more columns,
    (layers, 2, B, H, L + room, D/H). It never sees what follows it, so they stay valid for every later step.
    """
    cfg, (B, L), dtype = model.cfg, seen.ids.shape, compute_dtype(seen.ids.device)
    features = None if seen.images is None else model.see(seen.images.to(dtype))
    x = model.embed_rows(seen.ids, seen.slots, features, seen.patch_at).to(dtype)
    memory = x.new_zeros(cfg.depth, 2, B, L + room, cfg.width // cfg.head_dim, cfg.head_dim).transpose(3, 4)
    h = model.trunk(x, seen.positions, seen.layout, [KVCache(*m) for m in memory])                # (B, L, D)
    return h[:, -1], memory

@cast_once
def refine(model: UnifiedModel, tokenizer: VisionTokenizer, seen: Condition, noise: Tensor, guidance: float,
           temperature: float, token_temperature: float, on_step=None) -> Tensor:
    """The pictures (B, 3, P, P) of B conditions, or 2 B with the empty prompts behind them if guided. All that
    is random is in noise (steps, 2, B, N): uniform for the tokens, Gumbel for their order. See `generate`.
    """
    cfg, device, V = model.cfg, noise.device, len(model.cfg.text)
    (steps, _, B, N), (R, L) = noise.shape, seen.ids.shape
    caches = [KVCache(*m) for m in read(model, seen, N)[1]]
    positions = grid_positions(cfg.grid, device).float().expand(R, N, 2)
    slots = (cfg.image_slot + torch.arange(N, device=device)).expand(R, N)
    lo = seen.layout.lo[:, -1:].expand(R, N)
    layout = Layout(lo, torch.full_like(lo, L + N))
    ids = torch.full((B, N), model.mask_id, device=device)
    for step in range(steps):
        is_masked = ids == model.mask_id                                                          # (B, N)
        if on_step:
            on_step(ids, is_masked)
        x = model.embed_rows(ids.repeat(R // B, 1), slots, None, None).to(compute_dtype(device))
        h = model.trunk(x, positions, layout, caches, L)                                          # (R, N, D)
        if R > B:                        # the head is linear: to guide its input guides the logits, for half
            conditional, empty = h.chunk(2)
            h = empty + guidance * (conditional - empty)
        sampled = temperature > 0 and token_temperature > 0
        p = model.image_logits(h / token_temperature if sampled else h).softmax(-1)               # (B, N, K)
        if sampled:                      # where the cumulated probability passes the uniform number
            passed = p.cumsum(-1) < noise[step, 0, ..., None]
            choice = passed.sum(-1).clamp(max=cfg.codebook - 1)                                   # (B, N)
        else:
            choice = p.argmax(-1)
        confidence = p.gather(-1, choice[..., None])[..., 0].clamp(min=1e-30).log()
        ratio = (step + 1) / steps
        confidence = confidence + temperature * (1 - ratio) * noise[step, 1]
        confidence = confidence.masked_fill(~is_masked, math.inf)     # what was kept stays kept
        still = int(N * math.cos(math.pi / 2 * ratio) + 1e-6)         # how many stay masked
        ids = torch.where(is_masked, V + choice, ids)
        if still:
            ids = ids.scatter(1, confidence.topk(still, largest=False).indices, model.mask_id)
    if on_step:
        on_step(ids, ids == model.mask_id)
    return tokenizer.decode(ids - V)

def generate(model: UnifiedModel, tokenizer: VisionTokenizer, texts: list[list[int]],
             image: Tensor | None = None, *, guidance: float = 1.0, steps: int | None = None,
             temperature: float | None = None, seed: int = 0, on_step=None) -> Tensor:
    """Draw one picture for each text (after looking at `image` (B, 3, P, P), if given); (B, 3, P, P) in [0, 1].

    MaskGIT (arXiv 2202.04200): start with every token masked; each step predicts all of them in parallel and
    keeps the most confident, so that cos(π/2 · step/steps) of them stay masked. Guidance moves the logits away
    from those of an empty prompt: u + guidance · (c − u). `temperature` is the randomness in the order of
    unmasking, annealed to zero; 0 also takes the likeliest tokens. `on_step(ids, is_masked)` is called before
    every step and at the end.
    """
    cfg, device, shape = model.cfg, model.embed.device, (len(texts), model.cfg.tokens)
    # where the model is unsure of a mask each step takes the last one's guesses for granted: few are better
    steps = steps or (cfg.sample_steps if image is None else cfg.proxy_steps)
    temperature = cfg.temperature if temperature is None else temperature
    g = torch.Generator(device).manual_seed(seed)
    noise = torch.zeros(steps, 2, *shape, device=device)                                  # (steps, 2, B, N)
    for uniform, gumbel in noise:
        if temperature and cfg.token_temperature:
            uniform.copy_(torch.rand(shape, device=device, generator=g))
        gumbel.copy_(-torch.empty(shape, device=device).exponential_(generator=g).log())
    if guidance != 1.0:                           # conditions and empty prompts in one batch
        texts = texts + [[Text.BOS]] * len(texts)
        image = None if image is None else torch.cat([image, image])
    seen = condition(model, texts, image)
    inputs = model, tokenizer, seen, noise, guidance, temperature, cfg.token_temperature
    return refine(*inputs, on_step) if on_step else model.refine(*inputs).clone()         # a graph calls nobody

class Written(NamedTuple):
    """Where the writing of B answers stands, in tensors that a recorded graph can carry on with."""
    memory: Tensor                    # (layers, 2, B, H, columns, D/H) keys and values
    start: Tensor                     # (B, 1) first column of each document
    at: Tensor | int                  # () next column to fill
    place: Tensor                     # (B, 1) place in the text of the token that comes there
    token: Tensor                     # (B, 1) that token: the last one written
    done: Tensor                      # (B, 1) whether an END has been written

@torch.no_grad()
def begin(model: UnifiedModel, seen: Condition, place: Tensor, room: int) -> Written:
    """Read questions whose texts have `place` (B, 1) tokens, and write the first token of each answer."""
    h, memory = read(model, seen, room)
    token, L = model.text_logits(h).argmax(-1, keepdim=True), seen.ids.shape[1]
    # a number lets attention end there, but is a constant of a graph
    at = torch.full((), L, device=h.device) if records(h.device) else L
    return Written(memory, seen.layout.lo[:, -1:], at, place, token, token == Text.END)

@cast_once
def decode(model: UnifiedModel, w: Written, n: int) -> tuple[Tensor, Written]:
    """Write n more tokens (B, n), END behind an END, or fewer where none is needed; fills the memory."""
    caches, out = [KVCache(*m) for m in w.memory], []
    for _ in range(n):
        if isinstance(w.at, int) and w.done.all():           # a graph cannot ask
            break
        x = model.embed_rows(w.token, model.cfg.text_slot + w.place, None, None)
        x = x.to(compute_dtype(w.token.device))
        positions = (model.cfg.grid + w.place).float()[..., None].expand(-1, 1, 2)
        layout = Layout(w.start, torch.zeros_like(w.start) + (w.at + 1))
        h = model.trunk(x, positions, layout, caches, w.at)[:, 0]
        token = model.text_logits(h).argmax(-1, keepdim=True).masked_fill(w.done, Text.END)
        w = w._replace(at=w.at + 1, place=w.place + 1, token=token, done=w.done | (token == Text.END))
        out.append(token)
    return torch.cat(out, 1), w

def answer(model: UnifiedModel, image: Tensor, questions: list[str], limit: int = 24) -> list[str]:
    """Greedy answers to one question for each image (B, 3, P, P), token by token with a key-value cache."""
    cfg, device = model.cfg, model.embed.device
    texts = [cfg.text.encode(q) for q in questions]
    limit = max(1, min(limit, cfg.row_len - cfg.patches - max(map(len, texts))))
    place = torch.tensor([[len(t)] for t in texts], device=device)
    written = model.begin(model, condition(model, texts, image), place, -(-limit // 16) * 16)
    out = written.token.tolist()
    while len(out[0]) < limit and not all(Text.END in row for row in out):
        left = limit - len(out[0])                # a GPU writes 8 before it is asked whether all have ended
        tokens, written = model.decode(model, written, min(8, left) if records(device) else left)
        out = [row + more for row, more in zip(out, tokens.tolist())]
    return [cfg.text.decode(row) for row in out]

# ==== 10. Training: one loop, the run folder ================================================================

def rate_factor(step: int, steps: int) -> float:
    """Learning-rate factor: a short warm-up, constant, then linear to zero over the last half."""
    return min(1.0, (step + 1) / min(20, steps), 2 * (steps - step) / steps)

def tokenizer_loss(tokenizer: VisionTokenizer, image: Tensor, block=Block.forward) -> dict[str, Tensor]:
    """Mean squared error of a round trip. Encoder and blocks may run in bf16, quantizer and loss do not."""
    dtype = compute_dtype(image.device)
    code, _ = tokenizer.quantize(tokenizer.features(image.to(dtype)))
    return {"mse": F.mse_loss(tokenizer.reconstruct(code, dtype, block), image)}

def tokenizer_batch(cfg: Config, step: int) -> Tensor:
    """Half pictures, half targets of the proxies in turn: the tokenizer must say both; (B, 3, P, P)."""
    drawn = [name for name in proxies_of(cfg) if PROXIES[name].target not in (None, original, shuffled)]
    index, half = step * 4096 + np.arange(cfg.tok_batch), cfg.tok_batch // 2
    seen = sample(cfg, "tokenizer", index[:half], "look")
    cut = sample(cfg, "tokenizer", index[half:], "masks")
    target = PROXIES[drawn[step % len(drawn)]].target(cfg, cut, render(cfg, cut))
    return torch.cat([render(cfg, seen).image, target])

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))     # set by torchrun

class Run:
    """A folder with everything about one training run: config.json, log.jsonl, weights, samples, report.

    A write goes to a temporary file that is renamed, so a crash leaves no half file; the log grows by lines.
    """
    def __init__(self, folder: Path, pulled: bool = False):
        self.folder, self.pulled = folder, pulled  # pulled: in the cache of the Hub, only to be read

    def write(self, name: str, data: bytes) -> None:
        if RANK:
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def differences(self, cfg: Config, but: set[str]) -> str:
        """The settings of this run that are others in cfg, with both values; `but` those that may be."""
        theirs = dataclasses.asdict(self.config())
        return ", ".join(f"{k} ({theirs[k]!r:.60} there, {v!r:.60} now)"
                         for k, v in dataclasses.asdict(cfg).items() if k not in but and theirs[k] != v)

    def open(self, cfg: Config) -> None:
        """Claim the folder for a configuration; one that holds another configuration is left as it is."""
        if (self.folder / "config.json").exists():
            different = self.differences(cfg, NOT_PART_OF_A_RUN)
            if different:
                raise UserError(f"{self.folder} holds a run with other settings: {different}; "
                                "use these settings, or another folder with --run")
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists and is not a run; choose another folder with --run")
        else:
            self.write("config.json", json.dumps(dataclasses.asdict(cfg), indent=1).encode())

    def config(self) -> Config:
        try:
            cfg = Config(**json.loads((self.folder / "config.json").read_text()))
            cfg.validate()
        except (OSError, ValueError, TypeError, AttributeError) as e:  # not there, not JSON, of another version
            raise UserError(f"{self.folder} holds no readable run (config.json: {e.__class__.__name__}); "
                            "train one with --train, or name one with --run") from None
        return cfg

    def done(self, name: str) -> bool:
        return (self.folder / f"{name}.safetensors").exists()

    def save(self, name: str, tensors: dict[str, Tensor], **metadata) -> None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        self.write(f"{name}.safetensors", save_safetensors(tensors, {k: str(v) for k, v in metadata.items()}))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
        except Exception as e:                     # safetensors raises its own error type for a damaged file
            raise UserError(f"cannot read {path} ({e.__class__.__name__}: {e}); "
                            "delete it to train that stage again") from None

    def restore(self, name: str, module: nn.Module) -> nn.Module:
        try:
            module.load_state_dict(self.load(name)[0])
        except RuntimeError as e:
            why = str(e).splitlines()[-1].strip()
            raise UserError(f"{self.folder}/{name}.safetensors does not fit config.json: {why}; "
                            "it comes from another run") from None
        return module.requires_grad_(False).eval()

    def log(self) -> list[dict]:
        """The whole lines of log.jsonl; a crash may have left a part of one."""
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def log_until(self, stage: str, step: int) -> None:
        """Forget log lines of a stage from `step` on, which a resumed run will write again."""
        kept = [line for line in self.log() if line["stage"] != stage or line["step"] < step]
        self.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())

NOT_PART_OF_A_RUN = {"device", "threads", "compile", "save_every", "tolerate"}    # may differ on resuming
# may differ from the run that --base names: neither tokenizer nor base knows them
ONLY_ARMS = {"arm_steps", "arm_vqa", "arm_t2i", "ratio", "arm_scenes", "proxies", "schedule", "arm_lr",
             "head_steps", "sample_steps", "proxy_steps", "guidance", "token_temperature", "temperature",
             "eval_questions", "eval_prompts", "eval_masks", "sample_every"}

def together() -> None:
    """Wait for the other processes, if there are any."""
    if WORLD > 1:
        torch.distributed.barrier()

class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the state has been saved; carries the exit code."""

def train_stage(run: Run, cfg: Config, name: str, module: nn.Module, steps: int, rates: tuple[float, float],
                make, step_losses, draw_grid, phases: int = 1):
    """The training loop of every stage: a batch, a step, the log, now and then a sample grid and a checkpoint.

    `make(step)` builds a batch, a pure function of the step, so a resumed run repeats the same numbers bit for
    bit; `step_losses(batch)` returns named losses; a GPU records it once, so what changes between steps must be
    in the batch. `rates` of Muon and AdamW rise and fall in each of `phases`; `draw_grid(step)` writes samples.
    """
    device = next(module.parameters()).device
    weights = {"mse": 4.0, "text": cfg.text_weight, "t2i": cfg.image_weight, "proxy": cfg.image_weight}
    optimizer, start = Optimizer(module, *rates), 0
    state, meta = run.load("state") if run.done("state") else ({}, {})
    if meta.get("stage") == name:
        start = int(meta["step"])
        if meta.get("world", "1") != str(WORLD):   # the steps ahead would repeat batches, or leave some out
            raise UserError(f"{name} was begun by {meta.get('world', 1)} processes, not {WORLD}; use as many")
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(part("module."))
        optimizer.load(part("optimizer."))
    state = None                                   # free what has been copied
    run.log_until(name, start)

    def update(batch, scale: Tensor) -> dict[str, Tensor]:
        for p in module.parameters():
            p.grad = None
        parts = step_losses(batch)
        sum(weights[k] * v for k, v in parts.items()).backward()
        if WORLD > 1:
            average_gradients(module, WORLD)
        optimizer.step(scale)
        return {k: v.detach() for k, v in parts.items()}
    update = GraphedStep(update)

    def checkpoint(step: int) -> None:
        tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
        tensors.update({f"optimizer.{k}": v for k, v in optimizer.state().items()})
        run.save("state", tensors, stage=name, step=step, world=WORLD)

    if start == 0 and not RANK:
        draw_grid(0)
    stopped: list[int] = []
    # several processes would stop at different steps: there a signal ends them, and the last checkpoint counts
    previous = {s: signal.signal(s, lambda number, frame: stopped.append(number))
                for s in (signal.SIGINT, signal.SIGTERM) if WORLD == 1}
    log = open(os.devnull if RANK else run.folder / "log.jsonl", "a", buffering=1)
    bar = tqdm(total=steps, initial=start, desc=name.ljust(14), unit="step", mininterval=1.0,
               dynamic_ncols=True, disable=RANK > 0)
    began, pending, cycle = time.perf_counter(), None, steps // phases
    try:
        with ThreadPoolExecutor(1) as ahead, bar:
            for step in range(start, steps):
                batch = (pending.result() if pending else make(step)).to(device)
                if device.type != "cpu" and step + 1 < steps:  # on a CPU two threads would fight for the cores
                    pending = ahead.submit(make, step + 1)
                before = time.perf_counter()
                parts = update(batch, torch.tensor(rate_factor(step % cycle, cycle), device=device))
                if step == start and cfg.compile and time.perf_counter() - before > 1:
                    bar.write(f"first step, with compilation: {time.perf_counter() - before:.0f} s")
                bar.update()
                if step % 10 == 0 or step == steps - 1 or (step + 1) % cfg.save_every == 0:
                    values = {k: v.item() for k, v in parts.items()}
                    if not all(map(math.isfinite, values.values())):
                        raise UserError(f"the loss of stage {name} became {values} at step {step}; "
                                        "try a lower --lr, in another --run")
                    bar.set_postfix({k: f"{v:.3f}" for k, v in values.items()})
                    log.write(json.dumps({"stage": name, "step": step, **values,
                                          "seconds": round(time.perf_counter() - began, 2)}) + "\n")
                if not RANK and ((step + 1) % cfg.sample_every == 0 or step + 1 == steps):
                    draw_grid(step + 1)
                if step + 1 < steps and (stopped or (step + 1) % cfg.save_every == 0):
                    checkpoint(step + 1)
                    if stopped:
                        raise Interrupted(128 + stopped[0])
        run.save(name, module.state_dict(), stage=name, steps=steps)
        if not RANK:
            (run.folder / "state.safetensors").unlink(missing_ok=True)
        together()                                                    # the others go on when the file is there
    finally:
        log.close()
        for s, handler in previous.items():
            signal.signal(s, handler)
    if stopped:
        raise Interrupted(128 + stopped[0])

# ==== 11. Commands ==========================================================================================

def choose_device(cfg: Config) -> tuple[torch.device, str]:
    """The device to use, and why."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if cfg.device == "auto":
        if cuda:
            return torch.device("cuda"), torch.cuda.get_device_name()
        return (torch.device("mps"), "Apple GPU, no CUDA") if mps else (torch.device("cpu"), "no GPU found")
    device = torch.device(cfg.device)
    if not {"cpu": True, "mps": mps, "cuda": (device.index or 0) < torch.cuda.device_count()}[device.type]:
        raise UserError(f"there is no device {cfg.device} here; try --device auto")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)   # Triton and graphs work on the current device
    return device, "asked for"

def picture_grid(rows: list[tuple[str, Tensor, list[str] | None]], cell: int = 96) -> bytes:
    """PNG of labelled rows of pictures: (label, (n, 3, P, P) in [0, 1], captions or None)."""
    side, gap, text = 110, 4, 26
    width = side + max(len(images) for _, images, _ in rows) * (cell + gap)
    canvas = Image.new("RGB", (width, sum(cell + gap + (text if c else 0) for _, _, c in rows)), "white")
    pen, y = ImageDraw.Draw(canvas), 0
    for label, images, words in rows:
        pen.text((4, y + cell // 2 - 6), label, fill="black")
        for i, image in enumerate(images):
            x = side + i * (cell + gap)
            canvas.paste(to_pil(image).resize((cell, cell), Image.NEAREST), (x, y))
            if words:
                lines = textwrap.fill(words[i], 17, max_lines=2, placeholder=" …")
                pen.text((x, y + cell), lines, fill="black", spacing=1, font_size=10)
        y += cell + gap + (text if words else 0)
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()

def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())

def read_image(path: str, size: int) -> tuple[Tensor, Image.Image]:
    """Any picture a person has, upright and in RGB: squeezed to (1, 3, size, size) in [0, 1], and as it was."""
    try:
        picture = upright(path)
    except Exception as e:                         # Pillow raises a dozen kinds of errors for damaged files
        raise UserError(f"cannot read {path} as a picture ({e.__class__.__name__}: {e}); "
                        "give a PNG or JPEG") from None
    return torch.from_numpy(squeeze(picture, size).copy()).permute(2, 0, 1)[None].float() / 255, picture

GRID_PROMPTS = ["a red circle", "a square", "two blue circles", "three yellow rings", "a cross left of a ring",
                "a bar above a circle", "a green triangle and a purple square", "a cyan cross and a red bar"]

def borrow(cfg: Config, run: Run, other: Run) -> None:
    """Take tokenizer and base of another run that trained them with the same settings, to train other arms."""
    different = other.differences(cfg, NOT_PART_OF_A_RUN | ONLY_ARMS)
    if different:
        raise UserError(f"{other.folder} trained its base with other settings: {different}; "
                        "leave out what differs, or --base")
    for name in ("tokenizer", "base"):
        if not other.done(name):
            raise UserError(f"{other.folder} has no finished {name}; "
                            "finish it with the command that started it")
    run.open(cfg)
    for name in ("tokenizer", "base"):
        if not run.done(name):
            run.write(f"{name}.safetensors", (other.folder / f"{name}.safetensors").read_bytes())

def with_names(cfg: Config) -> tuple[Config, str]:
    """Of photographs: the config with the names and words of the data, and a line about what was skipped."""
    if not cfg.photos:
        return cfg, ""
    data = photographs(cfg.data, cfg.image_size, cfg.max_objects)
    complaint, names = data.complain(cfg.tolerate), ",".join(data.names)
    if cfg.categories not in ("", names):
        raise UserError(f"categories={cfg.categories!r:.60} are not those of {cfg.data}; leave them out")
    words = f"{cfg.words} {find_words(data, 0)}" if cfg.words else find_words(data)
    cfg = dataclasses.replace(cfg, categories=names, words=" ".join(dict.fromkeys(words.split())))
    cfg.validate()
    for use, split in itertools.product(USES, ("train", "val")):
        data.pool(split, use)                      # complains about what is missing before anything is written
    return cfg, complaint

def join_processes(device: torch.device) -> torch.device:
    """Meet the other processes of torchrun; returns the device of this one. They wait for the first to read many
    photographs, hence the hours.
    """
    hours = datetime.timedelta(hours=6)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", timeout=hours, device_id=device)
    else:
        torch.distributed.init_process_group("gloo", timeout=hours)
    return device

def train(cfg: Config, run: Run, other: Run | None = None) -> None:
    """Every stage in order, each skipped if its weights are there: tokenizer, base (both of `other` if given),
    arms, report. Of W processes of torchrun, process r takes batches W · step + r, and the mean of gradients.
    """
    from eval import evaluate, show
    device, why = choose_device(cfg)
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    if WORLD > 1:
        device = join_processes(device)
    if RANK:                                      # what the first process writes is there for all
        together()
    cfg, complaint = with_names(cfg)
    if other:
        borrow(cfg, run, other)
    run.open(cfg)
    if complaint:
        print(complaint)
        cache = photographs(cfg.data, cfg.image_size, cfg.max_objects).folder
        run.write("bad_records.txt", (cache / "bad_records.txt").read_bytes())
    if not RANK:
        together()
    print(f"{run.folder} on {device} ({why}), {compute_dtype(device)}, seed {cfg.seed}, "
          f"torch {torch.__version__}")
    fast = compiled if cfg.compile and device.type != "mps" else lambda function: function
    block, loss = fast(Block.forward), fast(token_loss)
    val = sample(cfg, "grid", np.arange(8), "masks")
    val_r = render(cfg, val)
    seen = val_r.image.to(device)
    grid_prompts = [caption(val, b, word_rng(val, b), cfg) for b in range(8)] if cfg.photos else GRID_PROMPTS

    own = lambda step: step * WORLD + RANK                            # the batch that this process takes
    torch.manual_seed(cfg.seed)
    tokenizer = VisionTokenizer(cfg).to(device)
    base = UnifiedModel(cfg).to(device)
    size = lambda module: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}M parameters"
    print(f"tokenizer {size(tokenizer)}, {cfg.codebook} codes, {cfg.tokens} tokens an image; "
          f"model {size(base)}, rows of {cfg.row_len}")

    def sample_tokenizer(step: int) -> None:
        rows = []
        for label, x in (("image", seen), ("masks", instance(cfg, val, val_r).to(device))):
            rows += [(label, x, None), ("round trip", tokenizer.decode(tokenizer.encode(x)), None)]
        run.write(f"samples/tokenizer_{step:06d}.png", picture_grid(rows))

    def sample_model(model: UnifiedModel, name: str, step: int) -> None:
        names = [next((word for _, word in named(things(val, b))), "object") for b in range(len(val))]
        answers = answer(model, seen, [f"where is the {name}?" for name in names], 4)
        texts = [[Text.BOS] + cfg.text.encode(p) for p in grid_prompts]
        rows = [("text to image", generate(model, tokenizer, texts, guidance=cfg.guidance), grid_prompts),
                ("image", seen, [f"{name}? {reply}" for name, reply in zip(names, answers)])]
        if name in PROXIES and name != "none":
            source, prompts, target = proxy_batch(cfg, name, val, val_r)
            texts = [cfg.text.encode(p) for p in prompts]
            drawn = generate(model, tokenizer, texts, source.to(device), temperature=0.0)
            rows += [("seen", source, None)] * bool(PROXIES[name].source)
            rows += [(f"{name}: true", target, None), ("drawn", drawn, None)]
        run.write(f"samples/{name}_{step:06d}.png", picture_grid(rows))

    if not run.done("tokenizer"):
        train_stage(run, cfg, "tokenizer", tokenizer, cfg.tok_steps, (cfg.lr, cfg.tok_adam_lr),
                    lambda step: tokenizer_batch(cfg, own(step)),
                    lambda image: tokenizer_loss(tokenizer, image, block), sample_tokenizer)
    run.restore("tokenizer", tokenizer)
    if not run.done("base"):
        train_stage(run, cfg, "base", base, cfg.base_steps, (cfg.lr, cfg.adam_lr),
                    lambda step: make_batch(cfg, "train", own(step), cfg.vqa_batch, cfg.t2i_batch),
                    lambda batch: losses(base, tokenizer, batch, block, loss),
                    lambda step: sample_model(base, "base", step))
    for arm in cfg.arms:
        if not run.done(arm):
            model = run.restore("base", UnifiedModel(cfg).to(device)).requires_grad_(True)
            samples = 0 if arm == "none" else cfg.draws
            first = cfg.arm_steps if cfg.schedule == "sequential" and samples else 0      # of the proxy alone

            def make(step: int) -> Batch:
                reach = float(step >= cfg.head_steps)
                if step < first:
                    return make_batch(cfg, "arm", own(step), 0, 0, arm, samples, reach)
                draws = 0 if first else samples
                return make_batch(cfg, "arm", own(step - first), cfg.arm_vqa, cfg.arm_t2i, arm, draws, reach)

            rates = cfg.arm_lr * cfg.lr, cfg.arm_lr * cfg.adam_lr
            train_stage(run, cfg, arm, model, first + cfg.arm_steps, rates, make,
                        lambda batch: losses(model, tokenizer, batch, block, loss),
                        lambda step: sample_model(model, arm, step), phases=2 if first else 1)
    if WORLD > 1:
        torch.distributed.destroy_process_group()
    if not RANK:
        if not (run.folder / "report.json").exists():
            evaluate(run, device)
        print(show(run))

CARD = """---
license: mit
library_name: sgt
tags: [unified-multimodal, "arxiv:2605.18714"]
---
# {name}

A small unified multimodal model that answers questions about pictures, draws pictures from text and draws their
segmentation, trained from scratch by "SGT in one file" after
[arXiv 2605.18714](https://arxiv.org/abs/2605.18714).

    python sgt.py --run {name} --ask picture.png "how many {things}?"
    python sgt.py --run {name} --generate "two {things}"
{picture}
```
{report}
```

Settings other than the defaults: {settings}
"""

def without_places(text: str, values) -> str:
    """A text without the folders that settings name: coco:/home/me/photos becomes coco:photos."""
    for value in values:
        place = value.partition(":")[2] or value
        if len(Path(place).parts) > 1 and not on_hub(place):
            name = Path(place).name
            text = text.replace(json.dumps(place)[1:-1], json.dumps(name)[1:-1]).replace(place, name)
    return text

def push(run: Run, name: str, public: bool) -> None:
    """Publish a finished run on the Hub in one commit, with a model card; no photographs: they are others'."""
    if "@" in name or not HUB_NAME.fullmatch(name):
        raise UserError(f"--push {name!r} is no name on the Hub; give user/repo")
    cfg, picture = run.config(), ""
    texts, others = ["config.json", "report.json", "report.md"], []
    if not cfg.photos:
        texts, others = texts + ["report.html"], ["samples/comparison.png"]
        picture = f"\n![Scenes and prompts, as every model of the run draws them]({others[0]})\n"
    stages = [f"{stage}.safetensors" for stage in ("tokenizer", "base", *cfg.arms)]
    files = {file: run.folder / file for file in [*texts, *stages, *others]}
    for file, path in files.items():
        if not path.exists():
            raise UserError(f"{run.folder} is not finished, {file} is missing; "
                            "go on with the command that started it")
    files.update({file: files[file].read_text(encoding="utf-8") for file in texts})
    changed = {f.name: str(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)
               if f.name not in NOT_PART_OF_A_RUN | {"words"} and getattr(cfg, f.name) != f.default}
    settings = " ".join(f"`{flag(k)} {v}`" for k, v in changed.items()) or "none"
    files["README.md"] = CARD.format(name=name, things=plural(cfg.shape_names[0]), picture=picture,
                                     report=files["report.md"].strip(), settings=settings)
    for file in ["README.md", *texts]:
        files[file] = without_places(files[file], changed.values()).encode()
    with hub(f"cannot publish {run.folder} as {name}") as hf:
        if not hf.get_token():
            raise UserError("publishing needs a Hugging Face token; log in with: hf auth login")
        url = hf.create_repo(name, private=not public, exist_ok=True)
        if bool(hf.model_info(name).private) == public:              # it was there before
            raise UserError(f"{name} is there and is {'private' if public else 'public'}; change that on its "
                            f"page, or give another name, or {'leave out' if public else 'add'} --public")
        added = [hf.CommitOperationAdd(*file) for file in files.items()]
        commit = hf.create_commit(name, added, commit_message="A run of SGT")
    print(f"published {run.folder} at {url} ({'public' if public else 'private'}), commit {commit.oid}")

def find_run(name: str | None) -> Run:
    """A run by folder, by name under runs/ or by name on the Hub; without a name the newest."""
    if name and on_hub(name):
        return Run(pull(name, "model"), pulled=True)
    if name:
        is_folder = (Path(name) / "config.json").exists() or Path(name).name != name
        return Run(Path(name) if is_folder else Path("runs") / name)
    found = sorted(Path("runs").glob("*/config.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("there is no run under runs/; train one with: python sgt.py --train")
    return Run(found[-1].parent)

def load_run(run: Run, arm: str | None = None, device: str | torch.device = "cpu"):
    """Config, tokenizer and one finished model: `arm`, or the best there is: instance, another arm, base."""
    cfg = run.config()
    stages = [s for s in ["base", *cfg.arms] if run.done(s)]
    if not stages or not run.done("tokenizer"):
        raise UserError(f"{run.folder} has no finished model yet; finish it with the command that started it")
    arm = arm or ("instance" if "instance" in stages else stages[-1])
    if arm not in stages:
        raise UserError(f"{run.folder} has no model {arm!r}; it has {', '.join(stages)}")
    tokenizer = run.restore("tokenizer", VisionTokenizer(cfg)).to(device)
    return cfg, tokenizer, run.restore(arm, UnifiedModel(cfg)).to(device), arm

def prompt_ids(cfg: Config, text: str, room: int) -> list[int]:
    """A user's text as ids, lower-cased like the training text, with a word of warning about unknown words."""
    text = " ".join(text.lower().split())
    ids = cfg.text.encode(text)
    if not ids:
        raise UserError("the text is empty; say something, for example: two red circles")
    if len(ids) > room:
        raise UserError(f"the text has {len(ids)} tokens, the model takes {room}; make it shorter")
    unknown = [word for word in re.findall(r"\w+", text) if any(i < 259 for i in cfg.text.encode(word))]
    if unknown:
        words = ", ".join(map(repr, unknown))
        print(f"note: the training texts have no word {words}; expect little", file=sys.stderr)
    return ids

def writable(path: str, *kinds: str) -> Path:
    """A path for a result: not over the files of a run, a device or a file of another kind."""
    out = Path(path)
    if out.suffix.lower() not in kinds:
        raise UserError(f"cannot write {path!r}: no name that ends with {' or '.join(kinds)}; give one")
    if (out.parent / "config.json").exists() or out.exists() and not out.is_file():
        raise UserError(f"{path} is among the files of a run, or no plain file; choose another name")
    return out

def save_picture(image: Image.Image, path: str) -> None:
    out = io.BytesIO()
    try:
        image.save(out, Image.registered_extensions()[Path(path).suffix.lower()])
        Run(Path(path).parent).write(Path(path).name, out.getvalue())
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"cannot write {path} ({e}); choose another --out") from None

def use(args: argparse.Namespace, given: dict) -> None:
    """The four verbs on a trained run."""
    proxy = args.proxy or "instance"
    if proxy not in PROXIES or proxy == "none":
        raise UserError(f"there is no proxy {proxy!r} to draw; "
                        f"choose from {', '.join(n for n in PROXIES if n != 'none')}")
    pushed = args.push is not None
    useful = {"device", "threads"} if not pushed else set()
    if args.generate is not None:
        useful |= {"sample_steps", "guidance", "temperature", "seed", "token_temperature"}
    if args.segment is not None:                  # nothing is random, unless a temperature is given
        useful |= {"proxy_steps", "temperature"}
        useful |= {"seed", "token_temperature"} if "temperature" in given else set()
    useless = sorted(set(given) - useful)
    idle = {"base": True, "preset": True, "proxy": args.segment is None, "model": pushed,
            "out": args.ask is not None or pushed, "public": not pushed}
    useless += [name for name in idle if idle[name] and getattr(args, name)]
    if useless:
        raise UserError(f"{flag(useless[0])} has no effect here; leave it out")
    out = args.out or (f"{Path(args.segment).stem}.{proxy}.png" if args.segment is not None else "out.png")
    if args.generate is not None or args.segment is not None:
        writable(out, ".png", ".jpg", ".jpeg", ".webp")
    run = find_run(args.run)
    if pushed:
        return push(run, args.push, args.public)
    wanted = dataclasses.replace(run.config(), **{"seed": 0, "device": "auto", **given})
    wanted.validate()
    torch.set_num_threads(wanted.threads or torch.get_num_threads())
    device, _ = choose_device(wanted)
    cfg, tokenizer, model, arm = load_run(run, args.model or (proxy if args.segment else None), device)
    model.cfg = wanted
    draw = lambda ids, image=None, **kw: generate(model, tokenizer, [ids], image, seed=wanted.seed, **kw)[0]
    if args.ask is not None:
        image, _ = read_image(args.ask[0], cfg.image_size)
        text = cfg.text.decode(prompt_ids(cfg, args.ask[1], cfg.row_len - cfg.patches - 8))
        print(answer(model, image.to(device), [text if text[-1] in "?." else text + "?"], limit=60)[0])
        print(f"({run.folder}, model {arm})", file=sys.stderr)
        return
    if args.generate is not None:
        ids = [Text.BOS] + prompt_ids(cfg, args.generate, cfg.prompt_len - 1)
        sheet = to_pil(draw(ids, guidance=wanted.guidance))
        sheet = sheet.resize((max(256 // cfg.image_size, 1) * cfg.image_size,) * 2, Image.NEAREST)
        found = ""
    else:
        image, picture = read_image(args.segment, cfg.image_size)
        # names what is to be cut out, for a proxy that needs a name
        prompt = PROXIES[proxy].prompts[0].format(name=noun(cfg.color_names[0], cfg.shape_names[0]))
        drawn = draw(cfg.text.encode(prompt), image.to(device), temperature=given.get("temperature", 0.0))
        scale = max(1.0, 256 / max(picture.size))
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        sheet = Image.new("RGB", (size[0] * 2 + 4, size[1]), "white")  # the picture, and what was drawn of it
        sheet.paste(picture.resize(size, Image.NEAREST if scale > 1 else Image.BICUBIC), (0, 0))
        sheet.paste(to_pil(drawn).resize(size, Image.NEAREST), (size[0] + 4, 0))
        found = f"asked to {prompt.rstrip('.')}; "
        if proxy == "instance":
            from eval import masks_of
            found += f"{len(masks_of(drawn[None], cfg.max_objects)[0])} object(s); "
    save_picture(sheet, out)
    print(f"{found}wrote {out} ({run.folder}, model {arm})")

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see python {self.prog} --help")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        args = super().parse_args(argv)
        for name, value in vars(args).items():             # --run "$NAME" of a name that is not set
            if value in ("", [""]):
                self.error(f"{flag(name.removeprefix('cfg_'))} is empty; give a value or leave it out")
        return args

def parser() -> Parser:
    p = Parser(prog="sgt.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    verb = p.add_mutually_exclusive_group(required=True)
    verb.add_argument("--train", action="store_true", help="train and compare, or resume")
    verb.add_argument("--generate", metavar="TEXT", help="draw a picture of a text")
    verb.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="answer a question about a picture")
    verb.add_argument("--segment", metavar="IMAGE", help="draw the instances (or --proxy NAME) of a picture")
    verb.add_argument("--push", metavar="USER/REPO", help="publish a finished run on the Hub, privately")
    p.add_argument("--public", action="store_true", help="with --push: for everyone")
    p.add_argument("--run", metavar="RUN",
                   help="folder of a run, its name under runs/, or user/repo[@revision] "
                   "on the Hub to use it; default: the preset's name to train, the newest run to use")
    p.add_argument("--preset", choices=sorted(PRESETS), help="size of everything; default: tiny on a CPU, base "
                   "on a GPU; coco-tiny and coco for --data")
    p.add_argument("--base", metavar="RUN",
                   help="with --train: take tokenizer, base model and settings from this run, train other arms")
    p.add_argument("--model", metavar="NAME", help="which model of a run: base, none (SFT), instance, …")
    p.add_argument("--proxy", metavar="NAME", help="what --segment draws")
    p.add_argument("--out", metavar="FILE", help="where to write the picture")
    settings = p.add_argument_group("settings (defaults are those of the preset tiny)")
    source = Path(__file__).read_text(encoding="utf-8")
    help_of = dict(re.findall(r"^    (\w+): \w+ = .*?#\s*(.+)$", source, re.M))
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default), "metavar": field.type.upper()}
        if field.type == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        shown = f"{help_of[field.name]} (default: {field.default})".replace("%", "%%")
        settings.add_argument(flag(field.name), dest="cfg_" + field.name, default=argparse.SUPPRESS,
                              help=shown, **kind)
    return p

def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 2 for a mistake of the user, 130 or 143 when interrupted."""
    try:
        args = parser().parse_args(argv)
        given = {k[4:]: v for k, v in vars(args).items() if k.startswith("cfg_")}
        if args.train:
            if RANK:
                sys.stdout = open(os.devnull, "w")                    # the first process speaks for all
            preset, photos = args.preset, given.get("data", "scenes") != "scenes"
            other = find_run(args.base) if args.base else None
            if other and not preset:                                  # whatever is not said is as it was there
                start = dataclasses.asdict(dataclasses.replace(other.config(), device="auto", threads=0))
                print(f"settings of {other.folder}, but for those that are given")
            elif not preset:
                gpu = torch.cuda.is_available() and given.get("device") != "cpu"
                small, large = ("coco-tiny", "coco") if photos else ("tiny", "base")
                preset = large if gpu else small
                print(f"preset {preset}: the default {'on a GPU' if gpu else 'without a CUDA GPU'}"
                      + " for photographs" * photos)
            if preset:
                start = PRESETS[preset]
            for name in ("model", "proxy", "out", "public"):
                if getattr(args, name):
                    raise UserError(f"{flag(name)} is for using a run, not for --train"
                                    + ("; did you mean --proxies?" if name == "proxy" else "; leave it out"))
            if preset in ("coco", "coco-tiny") and not photos:
                raise UserError(f"the preset {preset} is for photographs; "
                                "add --data coco:DIR, or choose another")
            cfg = Config(**{**start, **given})
            cfg.validate()
            if args.run and on_hub(args.run):
                raise UserError(f"--run {args.run} is a name on the Hub, and --train writes a folder; "
                                f"for one say ./{args.run}")
            where = cfg.data.partition(":")[2]                    # of photographs; their folder names the run
            named = where and Path(os.path.abspath(os.path.expanduser(where))).stem
            train(cfg, find_run(args.run or named or preset or other.folder.name), other)
        else:
            use(args, given)
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:        # a full disk or device is no bug either
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except Interrupted as e:
        print("stopped and saved; the same command goes on from here", file=sys.stderr)
        return e.args[0]
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    import sgt                  # eval.py imports this file as `sgt`: run that copy, so that there is only one
    sys.exit(sgt.main())
