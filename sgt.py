"""Semantic Generative Tuning in one file: a unified multimodal model, from nothing to an answer.

    python sgt.py --train

A unified model answers questions about pictures and draws pictures of texts. Semantic Generative
Tuning (SGT, arXiv 2605.18714) then trains it to draw the *segmentation* of a picture it looks at.
That picture enters through the vision encoder alone, as for questions: the dense loss of the
drawing teaches it to see. Other copies ("arms") draw something else, or nothing (SFT).

  image --> stem --> vision encoder --> features --+                     +--> image head --> codes
  text --> words ----------------------------------+--> one transformer --+
  target --> tokenizer --> codes, some masked -----+                     +--> text head --> words

The method stands between "┌─ SGT" and "└─".

Shapes: B batch, P pixels a side of a picture (32 by default), U patches looked at (16), T words,
N = G x G codes of a picture (64), S sequence, D width, H heads, K codebook size, C channels of a
code, M objects.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import random
import re
import sqlite3
import sys
import textwrap
import time
from collections import Counter, namedtuple
from itertools import permutations, product, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from kernels import GraphedStep, KVCache, Optimizer, attention, compiled, compute_dtype

class UserError(Exception):
    """A mistake of the user: printed as one line, exit code 2."""

# ==== 1. Config
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting; the comment behind it is its --help text. Presets are dicts over it."""
    seed: int = 0  # everything random derives from it
    image_size: int = 32  # P, pixels a side
    # the vision tokenizer
    patch: int = 4  # pixels a side of one code
    fsq_levels: str = "5,5,5,5"  # levels of each channel; their product is the codebook size
    tok_width: int = 128  # width
    tok_depth: int = 2  # transformer blocks of the decoder
    tok_steps: int = 1200  # training steps
    tok_batch: int = 64  # pictures a step
    # the unified model
    width: int = 128  # D
    encoder_depth: int = 4  # blocks of the vision encoder, over patches alone; 0: none
    depth: int = 3  # blocks of the transformer over everything
    head_dim: int = 32  # width of one attention head
    # training of the base
    base_steps: int = 1900  # steps
    vqa_batch: int = 36  # dialogues a step
    t2i_batch: int = 24  # captioned pictures a step
    lr: float = 0.02  # Muon learning rate of the matrices
    adam_lr: float = 0.012  # Adam learning rate of embeddings and heads
    # the arms; with --base settings may differ from here on
    arm_steps: int = 500  # steps of every arm
    arm_batch: int = 16  # dialogues and captioned pictures a step (the replay)
    ratio: float = 2.0  # proxy pictures per dialogue (the paper: 2)
    textured_questions: int = 0  # textured scenes asked about, in half of the dialogues
    arm_scenes: int = 0  # pictures that have masks; 0: ever new ones
    proxies: str = "none,reconstruction,instance"  # arms, or "all"; none is SFT, instance SGT
    proxy_weight: float = 1.0  # weight of the proxy's loss (the paper: 1)
    # sampling and evaluation
    sample_steps: int = 24  # refinement steps of a picture
    guidance: float = 2.0  # guidance scale; 1: none
    temperature: float = 6.0  # noise in the order of sampled codes; 0: greedy
    eval_questions: int = 3000  # questions about each look, evenly by kind
    eval_prompts: int = 240  # pictures drawn, evenly by kind
    eval_masks: int = 100  # pictures of each look to segment
    # the machine; these may change while a run goes on
    save_every: int = 100  # steps between checkpoints
    compile: bool = True  # compile the transformer block: starts later, runs faster
    device: str = "auto"  # auto, cpu or cuda
    threads: int = 0  # CPU threads; 0: all

    grid = property(lambda self: self.image_size // self.patch)  # G
    tokens = property(lambda self: self.grid ** 2)  # N
    see_patch = property(lambda self: 2 * self.patch)  # pixels a side of a patch
    patches = property(lambda self: self.tokens // 4)  # U
    levels = property(lambda self: list(map(int, self.fsq_levels.split(","))))
    codebook = property(lambda self: math.prod(self.levels))  # K
    draws = property(lambda self: round(self.ratio * self.arm_batch))  # proxy pictures a step
    arms = property(lambda self: list(PROXIES) if self.proxies == "all"
                    else self.proxies.split(","))

    def validate(self):
        """Refuse what would otherwise fail late or obscurely."""
        for name, value in vars(self).items():
            kind, lowest = type(getattr(Config, name)), 0 if name in MAY_BE_ZERO else 1e-9
            if type(value) is not kind or (kind is not str and not lowest <= value < 2 ** 31):
                raise UserError(f"{name}={value} is out of range or no {kind.__name__}; give one")
        for ok, names, how in [
            (re.fullmatch("[1-9][0-9]?(,[1-9][0-9]?)*", self.fsq_levels), "fsq_levels",
             "try 5,5,5,5"),
            (self.image_size % self.see_patch == 0 and self.image_size >= 32, "image_size",
             f"give a multiple of {self.see_patch}, 32 or more"),
            (not (self.width % self.head_dim or self.head_dim % 8 or self.tok_width % 32),
             "width head_dim tok_width", "must be divisible by head_dim, 8 and 32"),
            (Counter(self.arms) <= Counter(list(PROXIES)), "proxies",
             f"name each once, of {', '.join(PROXIES)}, or all"),
            ((self.draws > 1 or not self.ratio) and 1 not in (self.arm_scenes, self.tok_batch),
             "ratio arm_scenes tok_batch", "one picture has no other; give 2")
        ]:
            if not ok:
                got = ", ".join(f"{name}={getattr(self, name)}" for name in names.split())
                raise UserError(f"{got}; {how}")

NAMES = list(Config.__annotations__)
ONLY_ARMS, FREE = NAMES[NAMES.index("arm_steps"):], NAMES[NAMES.index("save_every"):]
MAY_BE_ZERO = """seed encoder_depth ratio textured_questions arm_scenes proxy_weight guidance
temperature compile threads""".split()
PRESETS = {
    "smoke": dict(tok_width=64, tok_depth=1, tok_steps=30, tok_batch=16, width=64, encoder_depth=1,
                  depth=1, base_steps=20, arm_steps=6, vqa_batch=4, t2i_batch=4, arm_batch=2,
                  sample_steps=4, eval_questions=60, eval_prompts=12, eval_masks=8, save_every=10,
                  compile=False),
    "tiny": {},  # the default; base is for GPUs
    "base": dict(image_size=64, tok_width=256, tok_depth=4, tok_steps=1400, tok_batch=128,
                 width=512, encoder_depth=6, depth=8, head_dim=64, base_steps=2800, vqa_batch=64,
                 t2i_batch=64, arm_batch=24, adam_lr=0.004, save_every=500),
}

# ==== 2. Scenes: the data, rendered
# Signed distance to the outline of a shape of radius 1, < 0 inside; y points down.
SHAPES = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.82,
    "triangle": lambda x, y: torch.maximum(y - 0.75, 0.889 * x.abs() - 0.457 * y - 0.457),
    "cross": lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.32, y.abs() - 0.95),
                                        torch.maximum(x.abs() - 0.95, y.abs() - 0.32)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.68).abs() - 0.27,
    "bar": lambda x, y: torch.maximum(x.abs() - 0.98, y.abs() - 0.40),
}
COLORS = {"red": (0.90, 0.16, 0.18), "green": (0.15, 0.70, 0.25), "blue": (0.18, 0.35, 0.95),
          "yellow": (0.97, 0.87, 0.15), "purple": (0.65, 0.20, 0.85), "cyan": (0.20, 0.85, 0.90)}
BACKGROUNDS = [(0.08, 0.08, 0.10), (0.22, 0.24, 0.30), (0.38, 0.33, 0.30), (0.45, 0.48, 0.50)]
RADII = {"small": 0.11, "big": 0.172}  # as a share of the picture's side
MAX_OBJECTS, LATTICE = 4, 8  # M; the lattice of most centres, in pixels
INDICES = torch.arange(1, 1 + MAX_OBJECTS)[:, None, None]  # (M, 1, 1)

# One object: three words, centre and radius in pixels, its number in the instance map, from 1.
Thing = namedtuple("Thing", "shape color size x y radius index")

class Scene(NamedTuple):
    """What is in a picture. Everything random about it derives from its key."""
    key: str  # "seed/split/use/number"
    things: list[Thing]  # back to front
    background: int = 0  # index into BACKGROUNDS
    look: str = "plain"  # one of LOOKS

    def rng(self, purpose):
        """A random stream for each purpose: the order of calls does not matter."""
        return random.Random(f"{self.key}/{purpose}")

    def generator(self, purpose):
        return torch.Generator().manual_seed(self.rng(purpose).getrandbits(63))

LOOKS = ("plain", "textured", "noisy")  # nothing is trained on noisy scenes
# Share of textured scenes by use. Proxies look at "masks", the tokenizer also at "pictures".
TEXTURED = {"questions": 0.0, "captions": 0.0, "masks": 0.5, "pictures": 0.15}

def sample_scene(cfg, key, use):
    """Objects that stay apart, but for one pair in up to half of the scenes without caption.
    The camera looks down on a table: objects lower in the picture are nearer."""
    rng, P, placed = random.Random(key), cfg.image_size, []
    count = 1 + int(rng.random() ** 0.7 * MAX_OBJECTS)
    shapes, colors, sizes = (rng.choices(list(names), k=count) for names in (SHAPES, COLORS, RADII))
    luck = rng.random()  # something to count: one shape, one color, or both
    if luck < 0.35:
        shapes = shapes[:1] * count
    if luck < 0.2 or luck > 0.9:
        colors = colors[:1] * count
    # captions name up to two things, or any number of one shape
    if use == "captions" and len(set(shapes)) > 1:
        count = 2
    # two touching objects of one color would be one blob
    overlaps = rng.random() < 0.5 and use != "captions" and count > 1 and colors[0] != colors[1]
    if overlaps:
        sizes[:2] = ["big", "big"]
    for i in range(count):
        radius = RADII[sizes[i]] * P
        low = math.ceil((radius + 0.5) / LATTICE) * LATTICE
        touches = overlaps and i == 1
        for _ in range(12):  # tries
            x, y = (rng.randrange(low, P - low + 1, LATTICE) for _ in "xy")
            if touches:  # a diagonal neighbour of the first
                x, y = (c + rng.choice([-1, 1]) * round(rng.uniform(0.3, 0.6) * 2 * radius)
                        for c in (placed[0].x, placed[0].y))
            apart = all(max(abs(x - o.x), abs(y - o.y)) - radius - o.radius >= 1 for o in placed)
            if (touches or apart) and low <= min(x, y) and max(x, y) <= P - low:
                placed.append(Thing(shapes[i], colors[i], sizes[i], x, y, radius, 0))
                break
    placed.sort(key=lambda o: o.y)
    things = [o._replace(index=i) for i, o in enumerate(placed, 1)]
    scene = Scene(key, things, rng.randrange(len(BACKGROUNDS)))
    textured = scene.rng("look").random() < TEXTURED[use]
    return scene._replace(look="textured") if textured else scene

def sample(cfg, split, numbers, use):
    """Scenes by number, of a split: "tokenizer", "train" (base), "arm", "labelled", or "val"."""
    return [sample_scene(cfg, f"{cfg.seed}/{split}/{use}/{number}", use) for number in numbers]

def waves(cfg, scene):
    """Textures (1 + M, 3, P, P) of ground and objects: three waves each and noise, or noise."""
    rng, shape = np.random.default_rng(list(scene.key.encode())), (1 + MAX_OBJECTS, 3, 1, 1)
    angle, phase = rng.uniform(0, 2 * np.pi, (2, *shape))
    frequency = 2 * np.pi / rng.uniform(2.5, 10.5, shape)  # in radians a pixel
    color = rng.normal(size=(1 + MAX_OBJECTS, 3, 3))
    color = 0.5 * color / np.linalg.norm(color, axis=-1, keepdims=True)
    color += 0.35 * rng.choice([-1, 1], shape[:3])  # light and dark
    pixel = np.arange(cfg.image_size) + 0.5
    x, y = frequency * np.cos(angle), frequency * np.sin(angle)
    lines = x * pixel + y * pixel[:, None] + phase  # (1 + M, 3 waves, P, P)
    texture = np.einsum("mwc,mwyx->mcyx", color, np.sin(np.float32(lines)))
    wave, noise = (0.28, 0.06) if scene.look == "textured" else (0.0, 0.22)
    texture = wave * texture + noise * rng.normal(size=texture.shape[1:])
    return torch.from_numpy(texture).float()

def pad(rows, length, value=0):
    """Lists of unequal length -> a tensor (B, length, ...)."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])

Rendered = namedtuple("Rendered", "image instance")

def render(cfg, scenes, shift=0.0):
    """Paint scenes back to front: image (B, 3, P, P) in [0, 1], and instance (B, P, P), the index
    of the Thing in front, 0 for background. `shift` moves near objects so many pixels left."""
    B, P = len(scenes), cfg.image_size
    numbers = pad([[(o.x - shift * o.y / P, o.y, o.radius, *COLORS[o.color]) for o in scene.things]
                   for scene in scenes], MAX_OBJECTS, (0,) * 6)  # (B, M, 6)
    x, y, radius = numbers[..., :3, None, None].unbind(2)  # (B, M, 1, 1) each
    pixel, cover = torch.arange(P) + 0.5, torch.zeros(B, MAX_OBJECTS, P, P)  # share of a pixel
    for shape, distance in SHAPES.items():
        here = pad([[o.shape == shape for o in s.things] for s in scenes], MAX_OBJECTS, False)
        dx, dy = (pixel - x[here]) / radius[here], (pixel[:, None] - y[here]) / radius[here]
        cover[here] = (0.5 - distance(dx, dy) * radius[here]).clamp(0, 1)  # (n, P, P)
    image = torch.tensor(BACKGROUNDS)[[s.background for s in scenes], :, None, None]
    for m in range(MAX_OBJECTS):
        image = torch.lerp(image, numbers[:, m, 3:, None, None], cover[:, m, None])
    instance = ((cover > 0.5) * INDICES).amax(1)
    for b, scene in enumerate(scenes):
        if scene.look != "plain":
            image[b] += waves(cfg, scene).gather(0, instance[b].expand(1, 3, P, P))[0]
    return Rendered(image.clamp(0, 1), instance)

# ==== 3. Language: words, captions, questions
NUMBERS = "zero one two three four five six seven eight".split()

def plural(word):
    return word + ("es" if word.endswith("s") else "s")

PAD, END = 0, 1  # the padding of prompts is seen, and harmless
TEXT_LEN, PROMPT_LEN = 72, 20  # tokens of a dialogue, of a caption
WORDS = ["", "", "?", ".", ",", *NUMBERS, *SHAPES, *map(plural, SHAPES), *COLORS, *"""a and is are
there the of in than how many what color shape where object objects more plus list big small left
right above below from front hidden bigger smaller or top middle bottom center yes no segment
instances with different colors paint every class another all things stuff only draw boxes around
estimate depth map now shift camera fill missing part detect edges everything copy picture as
remove noise image blur restore detail enhance very dark rain""".split()]
IDS = {word: i for i, word in enumerate(WORDS) if word}

def encode(text):
    """The ids of known words and signs."""
    return [IDS[word] for word in re.findall(r"\w+|[?.,]", text)]

def decode(ids):
    """The text up to the first END."""
    words = [WORDS[i] for i in takewhile(lambda i: i != END, ids)]
    return re.sub(r" ([?.,])", r"\1", " ".join(words))

# Users' wordings and what training asks.
REWORDINGS = {
    r"\W+": " ",
    r"\bin (the|this) (image|picture|photo(graph)?|scene)\b|\b(please|kindly)\b": "",
    r"\b(answer|reply|respond)\b.*?\byes\b.*?\bno\b|\bare( there)?$": "",
    r"\bis there an\b": "is there a",
    r"^which\b": "what", r"^what is the (color|shape) of\b": r"what \1 is",
    r"(?<!or )\b(bigger|larger|smaller) than\b": "bigger or smaller than",
    rf"^is the (\w+) ({'|'.join(COLORS)})$": r"is there a \2 \1"}

def normalize(question):
    """A question as training asks it: case, signs, manners and some wordings do not matter."""
    text = question.lower()
    for wording, asked in REWORDINGS.items():
        text = " ".join(re.sub(wording, asked, text).split())
    return text + ("." if "list" in text.split() else "?") if text else ""

def checked(text, room):
    """The ids of a user's text of up to `room` words and signs; unknown ones are named."""
    words = re.findall(r"\w+|[?.,]", text)
    if unknown := [word for word in words if word not in IDS]:
        print(f"note: unknown and left out: {', '.join(unknown)}", file=sys.stderr)
    known = [word for word in words if word in IDS]
    if set(known) <= set("?.,") or len(known) > room:
        raise UserError(f"{text:.40} has no known word, or over {room}; see the README")
    return [IDS[word] for word in known]

def noun(o):
    return f"{o.color} {o.shape}"

def named(things):
    """Things that words can tell apart, with their shortest names: 'ring', 'red ring'."""
    shape, nouns = Counter(o.shape for o in things), Counter(map(noun, things))
    return [(o, o.shape if shape[o.shape] == 1 else noun(o)) for o in things if nouns[noun(o)] == 1]

def where(o, P):
    row = ("top", "middle", "bottom")[int(o.y * 3 / P)]
    return row + (" left", " center", " right")[int(o.x * 3 / P)]

def relation(a, b):
    """How a lies to b, where one direction clearly wins; None on a diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= 1.5 * abs(dy) + 1e-6:
        return "left of" if dx < 0 else "right of"
    if abs(dy) >= 1.5 * abs(dx) + 1e-6:
        return "above" if dy < 0 else "below"
    return None

def overlap(a, b):
    return max(abs(a.x - b.x), abs(a.y - b.y)) < 0.8 * (a.radius + b.radius)

def reading_order(things, P):
    """From top to bottom in quarters of the picture, and from left to right."""
    return sorted(things, key=lambda o: (int(4 * o.y / P), o.x))

def captions(things, rng, P):
    """Every caption that fits: GenEval's six kinds (arXiv 2310.11513), two also with colors, and
    places. Things are in reading order, but for positions: the first is the upper left one."""
    things = reading_order(things, P)
    n = len(things)
    found = {"places": ", ".join(f"{noun(o)} {where(o, P)}" for o in things)}
    if n == 1:
        found |= {"single": f"a {things[0].shape}", "colors": f"a {noun(things[0])}"}
    elif len({o.shape for o in things}) == 1:
        found["counting"] = f"{NUMBERS[n]} {plural(things[0].shape)}"
        if len({o.color for o in things}) == 1:
            found["colored counting"] = f"{NUMBERS[n]} {plural(noun(things[0]))}"
    elif n == 2:
        a, b = things
        found["two"] = f"a {a.shape} and a {b.shape}"
        found["attribution"] = f"a {noun(a)} and a {noun(b)}"
        a, b = rng.sample(things, 2)
        if way := relation(a, b):
            found["position"] = f"a {a.shape} {way} a {b.shape}"
            found["colored position"] = f"a {noun(a)} {way} a {noun(b)}"
    return found

def caption(cfg, scene):
    rng = scene.rng("caption")
    return rng.choice(list(captions(scene.things, rng, cfg.image_size).values()))

def describe(things, rng, P):
    """All there is to say about a scene, in any order: the densest lesson."""
    parts = []
    for o in rng.sample(things, len(things)):
        facts = [where(o, P), o.size]
        facts += ["front" if o.index > p.index else "hidden"
                  for p in things if p is not o and overlap(o, p)]
        words = rng.sample([o.color, o.shape], 2) + rng.sample(facts, len(facts))
        parts.append(" ".join(words))
    return ", ".join(parts) + "."

# Kinds of questions: (things, rng, P) -> every (question, answer) possible.

def groups(things, rng):
    """Up to five groups in words, with their sizes: ('circles', 2), ('red objects', 0)."""
    found = {}
    for _ in range(5):
        shape, color = rng.choice(things)[:2]
        if rng.random() < 0.33:
            shape, color = rng.choice(list(SHAPES)), rng.choice(list(COLORS))
        if rng.random() < 0.5:
            found[f"{color} objects"] = sum(o.color == color for o in things)
        else:
            found[plural(shape)] = sum(o.shape == shape for o in things)
    return list(found.items())

def existence(things, rng, P):
    present = {noun(o) for o in things}
    # hard negatives: a color and a shape that are there, but not together
    names = {f"{o.color} {p.shape}" for o in things for p in things}
    if names == present or rng.random() < 0.3:
        o = rng.choice(things)
        names = present | {f"{o.color} {s}" for s in SHAPES} | {f"{c} {o.shape}" for c in COLORS}
    return [(f"is there a {name}?", "yes" if name in present else "no") for name in sorted(names)]

def arithmetic(things, rng, P):
    few = groups(things, rng)
    both = product(few, few + [("one", 1), ("two", 2), ("three", 3)])
    return [(f"how many {a} plus {b}?", NUMBERS[n + m]) for (a, n), (b, m) in both if a != b]

QUESTIONS = {
    "existence": existence,
    "counting": lambda things, rng, P: [
        (f"how many {name}?", NUMBERS[n])
        for name, n in [("objects", len(things)), *groups(things, rng)]],
    "color": lambda things, rng, P: [
        (f"what color is the {name}?", o.color) for o, name in named(things) if name == o.shape],
    "shape": lambda things, rng, P: [
        (f"what shape is the {o.color} object?", o.shape)
        for o in things if [p.color for p in things].count(o.color) == 1],
    "relation": lambda things, rng, P: [
        (f"where is the {x} from the {y}?", relation(a, b).split()[0])
        for (a, x), (b, y) in permutations(named(things), 2) if relation(a, b)],
    "location": lambda things, rng, P: [
        (f"where is the {name}?", where(o, P)) for o, name in named(things)],
    "size": lambda things, rng, P: [
        (f"is the {x} bigger or smaller than the {y}?", "bigger" if a.size == "big" else "smaller")
        for (a, x), (b, y) in permutations(named(things), 2) if a.size != b.size],
    "occlusion": lambda things, rng, P: [
        (f"is the {x} in front of the {y}?", "yes" if a.index > b.index else "no")
        for (a, x), (b, y) in permutations(named(things), 2) if overlap(a, b)],
    "compare": lambda things, rng, P: [
        (f"are there more {a} than {b}?", "yes" if n > m else "no")
        for (a, n), (b, m) in permutations(groups(things, rng), 2)],
    "arithmetic": arithmetic,
}

def ask(kind, things, rng, P):
    """A question and its answer, or None; the answer evenly from those possible here."""
    options = QUESTIONS[kind](things, rng, P)
    if not options:
        return None
    wanted = rng.choice(sorted({answer for _, answer in options}))
    return rng.choice([option for option in options if option[1] == wanted])

def dialogue(cfg, scene):
    """Questions and answers, then a description: ids, targets (ids in answers, -100 elsewhere)."""
    rng, P, said = scene.rng("dialogue"), cfg.image_size, []
    def tokens(question, answer):  # each with its target
        return [(i, -100) for i in encode(question)] + [(i, i) for i in [*encode(answer), END]]
    last = tokens("list the objects.", describe(scene.things, rng, P))
    for kind in rng.sample(2 * list(QUESTIONS), 2 * len(QUESTIONS)):
        if len(said + last) + 6 > TEXT_LEN:
            break  # no turn is shorter
        turn = ask(kind, scene.things, rng, P)
        new = tokens(*turn) if turn else []
        if len(said + new + last) <= TEXT_LEN:
            said += new
    return [list(part) for part in zip(*said + last)]

# ==== 4. Proxies: what the model draws of a picture that it looks at
# Targets: (cfg, scenes, Rendered) -> image. Color 0 is the background.
PALETTE = torch.tensor([
    (0, 0, 0), (230, 25, 35), (40, 190, 60), (35, 70, 245), (250, 225, 25), (235, 60, 230),
    (50, 225, 235), (250, 140, 20), (250, 250, 250)]) / 255

# ┌─ SGT, 1 of 3: the segmentation of a scene, painted as a picture

def per_pixel(scenes, r, value):
    """value(scene, thing) of the thing in front at each pixel, (B, P, P); 0: background."""
    rows = [[0, *(value(scene, o) for o in scene.things)] for scene in scenes]
    return pad(rows, 1 + MAX_OBJECTS)[torch.arange(len(rows))[:, None, None], r.instance]

def paint(index):
    """Index maps (B, P, P) in the colors of the palette -> (B, 3, P, P)."""
    return PALETTE[index].permute(0, 3, 1, 2)

def scan_order(cfg, scenes, r):
    """The place of every object in reading order, from 1. Random colors could only be guessed."""
    rank = lambda scene, o: 1 + reading_order(scene.things, cfg.image_size).index(o)
    return per_pixel(scenes, r, rank)

def instance(cfg, scenes, r):
    """Every object in a color of its own: what SGT draws."""
    return paint(scan_order(cfg, scenes, r))

def shuffled(cfg, scenes, r):
    """The masks of another picture of the batch: as much to draw, and nothing to see."""
    return instance(cfg, scenes, r).roll(1, 0)

# └─

def semantic(cfg, scenes, r):
    return paint(per_pixel(scenes, r, lambda scene, o: 1 + list(SHAPES).index(o.shape)))

def panoptic(cfg, scenes, r):
    """The category is the hue, the instance the shade; the background is gray."""
    shade = 1.15 - 0.2 * scan_order(cfg, scenes, r)[:, None]  # (B, 1, P, P)
    colored = (semantic(cfg, scenes, r) * shade).clamp(0, 1)
    return torch.where(r.instance[:, None] > 0, colored, 0.5)

def referent(scene):
    """The name that a referring prompt is about."""
    return noun(scene.rng("referent").choice(scene.things))

def referring(cfg, scenes, r):
    return paint(per_pixel(scenes, r, lambda scene, o: 8 * (noun(o) == referent(scene))))

def depth(cfg, scenes, r):
    """White is near: what is lower in the picture."""
    P = cfg.image_size
    near = per_pixel(scenes, r, lambda scene, o: 0.3 + 0.6 * o.y / P + 0.02 * o.index)
    ground = 0.3 * (torch.arange(P) + 0.5) / P  # from top to bottom
    near = torch.where(r.instance > 0, near, ground[:, None])  # (B, P, P)
    return near[:, None].expand(-1, 3, -1, -1)

def boxes(cfg, scenes, r):
    """The outline, one pixel wide, of each object's box, in the colors of `instance`."""
    mask = r.instance[:, None] == INDICES  # (B, M, P, P)
    box = (mask.any(2, keepdim=True) & mask.any(3, keepdim=True)).float()
    inside = -F.max_pool2d(-box, 3, 1, 1)  # the box without its outline
    return instance(cfg, scenes, r._replace(instance=((box > inside) * INDICES).amax(1)))

def edges(cfg, scenes, r):
    dy, dx = torch.gradient(r.image.mean(1, keepdim=True), dim=(2, 3))
    return (8 * torch.hypot(dx, dy)).clamp(0, 1).expand(-1, 3, -1, -1)

def original(cfg, scenes, r):
    return r.image

# What restoration proxies do to what is looked at: (image, generator) -> image.

def rain(x, g):
    drops = (torch.rand(len(x), 1, *x.shape[2:], generator=g) < 0.02).float()
    streaks = sum(drops.roll((i, -(i // 2)), (2, 3)) for i in range(x.shape[-1] // 8))
    return x + 0.5 * streaks.clamp(0, 1)

def hole(x, g):
    x, half = x.clone(), x.shape[-1] // 2
    for image, (top, left) in zip(x, torch.randint(half, (len(x), 2), generator=g).tolist()):
        image[:, top:top + half, left:left + half] = 0.5
    return x

# ┌─ SGT, 2 of 3: arms that draw differ in their row of this table alone

PROXY_LEN = 6  # tokens of every prompt below
Proxy = namedtuple("Proxy", "level prompt target spoil", defaults=[None])
PROXIES = {
    "none": Proxy("control", "", None),  # SFT: replay alone
    "shuffled": Proxy("control", "segment instances with different colors.", shuffled),
    "instance": Proxy("high", "segment instances with different colors.", instance),
    "semantic": Proxy("high", "paint every class another color.", semantic),
    "panoptic": Proxy("high", "segment all things and stuff.", panoptic),
    "referring": Proxy("high", "segment only the {name}.", referring),
    "boxes": Proxy("high", "draw boxes around all objects.", boxes),
    "depth": Proxy("mid", "estimate the depth map now.", depth),
    "novel_view": Proxy("mid", "shift the camera right now.", lambda cfg, scenes, r: render(
        cfg, scenes, shift=cfg.image_size / 6).image),
    # `spoil` breaks what is looked at, to be restored
    "inpainting": Proxy("mid", "fill in the missing part.", original, hole),
    "edges": Proxy("low", "detect the edges of everything.", edges),
    "reconstruction": Proxy("low", "copy the picture as is.", original),
    "denoise": Proxy("low", "remove noise from the image.", original,
                     lambda x, g: x + 0.15 * torch.randn(x.shape, generator=g)),
    "deblur": Proxy("low", "remove blur from the image.", original,
                    lambda x, g: F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)),
    "superres": Proxy("low", "restore detail of the image.", original,
                      lambda x, g: F.interpolate(F.avg_pool2d(x, 4), x.shape[2:])),
    "enhance": Proxy("low", "enhance the very dark image.", original,
                     lambda x, g: 0.2 * x + 0.02 * torch.randn(x.shape, generator=g)),
    "derain": Proxy("low", "remove rain from the image.", original, rain),
}

def draw_proxy(cfg, name, scenes):
    """What is looked at (B, 3, P, P), the prompts, and what is to be drawn (B, 3, P, P)."""
    proxy, r = PROXIES[name], render(cfg, scenes)
    image = r.image
    if proxy.spoil:
        image = proxy.spoil(image, scenes[0].generator("source")).clamp(0, 1)
    prompts = [proxy.prompt.format(name=referent(scene)) for scene in scenes]
    return image, prompts, proxy.target(cfg, scenes, r)
# └─

# ==== 5. Transformer
def linear(x, weight):
    """x (..., in) times a weight (out, in) that is kept in fp32 and used in x's precision."""
    return F.linear(x, weight.to(x.dtype))

def norm(x):
    return F.rms_norm(x, (x.shape[-1],))  # the next matrix can absorb a scale

def matrix(*shape, gain=1.0):
    """A weight (..., out, in), for Muon; with gain 1 outputs keep the variance of inputs."""
    weight = nn.Parameter(torch.randn(*shape) * gain / math.sqrt(shape[-1]))
    weight.is_matrix = True
    return weight

def table(*shape, scale=1.0):
    return nn.Parameter(scale * torch.randn(*shape))  # for Adam: embeddings, heads

def constant(x):
    return nn.Buffer(x, persistent=False)  # not saved

def rotary(positions, head_dim, dtype):
    """cos and sin (..., 1, S, head_dim / 2) of rotary position embeddings in 2-D, of positions
    (..., S, 2): a quarter of a head turns with the row, a quarter with the column."""
    n = head_dim // 4
    frequency = 100.0 ** (-torch.arange(n, device=positions.device) / n)
    frequency[n // 2:] = 0  # the rest matches by content: a word finds its object
    angle = (positions[..., None] * frequency).flatten(-2).unsqueeze(-3)
    return angle.cos().to(dtype), angle.sin().to(dtype)

def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

def grid_positions(G):
    return torch.cartesian_prod(torch.arange(G), torch.arange(G)).float()  # (G * G, 2) row, column

class Block(nn.Module):
    """Pre-norm transformer block: normalized queries and keys, a squared-ReLU MLP, no biases."""
    fast = None  # forward, compiled, for training; in sampling shapes change

    def __init__(self, width, head_dim):
        super().__init__()
        self.heads = width // head_dim
        self.qkv = matrix(3, width, width)  # a stack of three, so that Muon sees three matrices
        self.out = matrix(width, width, gain=0.0)
        self.up = matrix(4 * width, width)
        self.down = matrix(width, 4 * width, gain=0.0)

    def forward(self, x, cos, sin, sees, cache=None, at=0):
        """x (B, S, D) -> (B, S, D). Row i attends to columns [0, sees[i]). With a KV cache the S
        rows stand in columns [at, at + S), behind those that it holds."""
        qkv = linear(norm(x), self.qkv.flatten(0, 1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, S, D/H) each
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        if cache is not None:
            k, v = cache.put(k, v, at)  # (B, H, L, D/H)
        y = F.scaled_dot_product_attention(q, k, v) if sees is None else attention(q, k, v, sees)
        x = x + linear(y.transpose(1, 2).flatten(2), self.out)
        return x + linear(F.relu(linear(norm(x), self.up)).square(), self.down)

def run_blocks(blocks, x, positions, sees=None, caches=None, at=0):
    """x (B, S, D) at rotary positions (..., S, 2) through blocks, each with its cache if given;
    sees (S,) or, with a column `at` per sample, (B, S). By default all rows see all rows."""
    S, dtype = x.shape[1], compute_dtype(x.device)
    if sees is None and torch.is_grad_enabled():  # without gradients SDPA is faster
        sees = torch.full((S,), S, dtype=torch.int32, device=x.device)
    x = x.to(dtype)
    for i, block in enumerate(blocks):
        cos, sin = rotary(positions, x.shape[-1] // block.heads, dtype)
        if torch.is_grad_enabled() and Block.fast and not caches:
            x = Block.fast(block, x, cos, sin, sees)
        else:
            x = block(x, cos, sin, sees, caches and caches[i], at)
    return x

class Stem(nn.Module):
    """A vector for each patch, from `reach` x `reach` patches around it. A hidden
    layer and overlap, as in a convolutional stem: linear patches train far slower."""
    def __init__(self, patch, reach, hidden, width):
        super().__init__()
        self.patch, self.window = patch, reach * patch
        self.stem_in = matrix(hidden, 3 * self.window ** 2)
        self.stem_out = matrix(width, hidden)

    def forward(self, image):
        """image (B, 3, P, P) in [0, 1] -> (B, patches, width)."""
        p, k = self.patch, self.window
        padded = F.pad(image * 2 - 1, ((k - p) // 2,) * 4, mode="replicate")
        windows = padded.unfold(2, k, p).unfold(3, k, p)  # (B, 3, rows, columns, k, k)
        windows = windows.movedim(1, 3).flatten(3).flatten(1, 2)  # (B, patches, 3kk)
        return norm(linear(F.gelu(linear(windows, self.stem_in)), self.stem_out))

# ==== 6. Vision tokenizer: picture <-> codes
class VisionTokenizer(nn.Module):
    """Autoencoder with finite scalar quantization (FSQ, arXiv 2309.15505): a few bounded channels,
    each rounded to a few levels. The encoder sees one patch, so that equal patches get equal codes,
    which can be predicted; the decoder sees everything."""
    def __init__(self, cfg):
        super().__init__()
        self.side, self.patch, D, C = cfg.image_size, cfg.patch, cfg.tok_width, len(cfg.levels)
        self.encoder = Stem(cfg.patch, 1, 4 * D, D)
        self.up, self.down = matrix(4 * D, D), matrix(D, 4 * D, gain=0.0)
        self.to_code = table(C, D, scale=D ** -0.5)
        self.from_code = table(D, C, scale=2 * C ** -0.5)
        self.position = table(cfg.tokens, D, scale=0.5)
        self.decoder = nn.ModuleList(Block(D, 32) for _ in range(cfg.tok_depth))
        self.patch_out = table(3 * cfg.patch ** 2, D, scale=0.1 * D ** -0.5)
        self.levels = constant(torch.tensor(cfg.levels))  # (C,)
        self.basis = constant(torch.tensor([math.prod(cfg.levels[:c]) for c in range(C)]))  # (C,)
        self.places = constant(grid_positions(cfg.grid))  # (N, 2)

    def quantize(self, z):
        """z (..., C) -> the nearest grid point in (-1, 1), and its code (...). In fp32: rounding a
        bf16 number, of 8 bits, picks neighbouring codes."""
        half, smooth = self.levels / 2, torch.tanh(z.float())  # smooth: in (-1, 1)
        digits = torch.minimum(((smooth + 1) * half).floor(), self.levels - 1)  # 0 ... L - 1
        point = (digits + 0.5) / half - 1
        # straight-through: the value of the grid point, the gradient of what was rounded
        return smooth + (point - smooth).detach(), (digits.long() * self.basis).sum(-1)

    def features(self, image):
        """image (B, 3, P, P) in [0, 1] -> channels before quantization (B, N, C)."""
        x = self.encoder(image)
        x = norm(x + linear(F.relu(linear(x, self.up)).square(), self.down))
        return linear(x.float(), self.to_code)

    def reconstruct(self, point):
        """Grid points (B, N, C) -> image (B, 3, P, P), not clamped, for gradients everywhere."""
        x = norm(linear(point, self.from_code)) + self.position  # (B, N, D)
        x = norm(run_blocks(self.decoder, x, self.places)).float()
        x = linear(x, self.patch_out).transpose(1, 2)  # (B, 3 * patch * patch, N)
        return F.fold(x, self.side, self.patch, stride=self.patch) * 0.5 + 0.5

    def loss(self, image):
        """Mean squared error of a round trip; the encoder may run in bf16, the quantizer not."""
        point, _ = self.quantize(self.features(image.to(compute_dtype(image.device))))
        return F.mse_loss(self.reconstruct(point), image)

    @torch.no_grad()
    def encode(self, image):
        """image (B, 3, P, P) in [0, 1] -> codes (B, N)."""
        return self.quantize(self.features(image.float()))[1]

    @torch.no_grad()
    def decode(self, codes):
        """codes (B, N) -> image (B, 3, P, P) in [0, 1]."""
        digits = codes[..., None] // self.basis % self.levels  # (B, N, C)
        return self.reconstruct((digits + 0.5) / (self.levels / 2) - 1).clamp(0, 1)

# ==== 7. SGT: model, losses, arms
# ┌─ SGT, 3 of 3
# Three layouts of fixed lengths; a sample has one of them:
#
#     understand   [U patches] [T text: questions, answers]         loss on answers
#     generate                 [T prompt] [N codes]                 loss on masked codes
#     proxy        [U patches] [T prompt] [N codes of the target]   loss on masked codes
#
# The whole attention mask is `sees` (S,): position i attends to the positions [0, sees[i]).
# Patches see patches, text what came before it, codes everything. The picture looked at enters as
# patches alone: what the visible codes of the target leave open, the vision encoder must tell.

class UnifiedModel(nn.Module):
    """A vision encoder, one transformer for everything, a text and an image head."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D, V, K = cfg, cfg.width, len(WORDS), cfg.codebook
        self.stem = Stem(cfg.see_patch, 2, 2 * D, D)
        self.encoder = nn.ModuleList(Block(D, cfg.head_dim) for _ in range(cfg.encoder_depth))
        self.blocks = nn.ModuleList(Block(D, cfg.head_dim) for _ in range(cfg.depth))
        self.word, self.word_before, self.code = table(V, D), table(V, D), table(K + 1, D)
        self.patch_position = table(cfg.patches, D, scale=0.5)
        self.text_position = table(TEXT_LEN, D, scale=0.5)
        self.code_position = table(cfg.tokens, D, scale=0.5)
        self.text_head, self.image_head = table(V, D, scale=0.0), table(K, D, scale=0.0)
        # rotary positions: a patch lies amid the 2 x 2 codes it covers
        self.patch_places = constant(grid_positions(cfg.grid // 2) * 2 + 0.5)  # (U, 2)
        self.code_places = constant(grid_positions(cfg.grid))  # (N, 2)

    def see(self, image):
        """image (B, 3, P, P) -> features (B, U, D), in fp32, that answers and drawings share."""
        x = self.stem(image.to(compute_dtype(image.device)))
        return norm(run_blocks(self.encoder, x, self.patch_places).float())

    def embed_text(self, text, before, index):
        """text (B, T), the word before each, their index (T,) or (B, T) -> embeddings (B, T, D),
        rotary positions. Without `before` a small model learns late to find a "red ring"."""
        x = F.embedding(text, norm(self.word)) + F.embedding(before, norm(self.word_before))
        positions = torch.stack([self.cfg.grid + index] * 2, -1)  # a diagonal behind the grid
        return x + self.text_position[index], positions

    def embed_codes(self, codes):
        """codes (B, N), K where masked -> embeddings (B, N, D), rotary positions (N, 2)."""
        return F.embedding(codes, norm(self.code)) + self.code_position, self.code_places

    def layout(self, image, text, codes):
        """One of the three layouts -> x (B, S, D), rotary positions (S, 2), sees (S,)."""
        T, parts = text.shape[1], []
        if image is not None:
            parts.append((self.see(image) + self.patch_position, self.patch_places))
        before = F.pad(text[:, :-1], (1, 0), value=PAD)
        parts.append(self.embed_text(text, before, torch.arange(T, device=text.device)))
        if codes is not None:
            parts.append(self.embed_codes(codes))
        x, positions = (torch.cat(part, -2) for part in zip(*parts))
        S, U = x.shape[1], (0 if image is None else self.cfg.patches)
        column = torch.arange(S, dtype=torch.int32, device=x.device)
        sees = torch.where(column < U, U, torch.where(column < U + T, column + 1, S))
        # Summed and normalized in fp32: rounded to bf16 the sum loses what look-ups need.
        return norm(x), positions, sees

    def forward(self, image, text, codes):
        """image or None, text (B, T), codes or None -> hidden text (B, T, D), codes (B, N, D)."""
        h = norm(run_blocks(self.blocks, *self.layout(image, text, codes)))  # (B, S, D)
        U, T = (0 if image is None else self.cfg.patches), text.shape[1]
        return h[:, U:U + T], h[:, U + T:]

def token_loss(h, head, target):
    """Cross-entropy (B, S), in fp32, of h (B, S, D) for targets (B, S); 0 where they are -100."""
    logits = linear(h, head).float().flatten(0, 1)  # (B * S, K)
    return F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)

def text_loss(model, image, text, answer):
    """Each token of an answer (B, T), -100 elsewhere, is predicted from the one before it."""
    h, _ = model(image, text, None)
    each = token_loss(h[:, :-1], model.text_head, answer[:, 1:])
    return each.sum() / (answer[:, 1:] >= 0).sum()

def image_loss(model, tokenizer, image, text, target, is_masked):
    """Loss of the target's (B, 3, P, P) codes where is_masked (B, N); the others are input."""
    codes = tokenizer.encode(target)  # (B, N)
    _, h = model(image, text, torch.where(is_masked, model.cfg.codebook, codes))
    return (token_loss(h, model.image_head, codes) * is_masked).sum() / is_masked.sum()

# A training step: questions are image (B, 3, P, P), text (B, T), answer (B, T); captions and proxy
# (none in the base and SFT) are image or None, text, target (B, 3, P, P), is_masked (B, N).
Batch = namedtuple("Batch", "questions captions proxy", defaults=[None])

def losses(model, tokenizer, batch):
    """Each the mean over its own tokens; weighted 1.5, 1 and 1 as in the paper."""
    text = text_loss(model, *batch.questions)
    captions = image_loss(model, tokenizer, *batch.captions)
    proxy = image_loss(model, tokenizer, *batch.proxy) if batch.proxy else 0.0
    loss = 1.5 * text + captions + model.cfg.proxy_weight * proxy
    return {"loss": loss, "text": text, "captions": captions, "proxy": proxy}

def mask_codes(cfg, n, g):
    """Which codes of n pictures to hide (n, N): a share cos(pi/2 * u), u uniform (MaskGIT)."""
    count = (torch.cos(torch.rand(n, 1, generator=g) * math.pi / 2) * cfg.tokens).ceil()
    rank = torch.rand(n, cfg.tokens, generator=g).argsort(1).argsort(1)  # random order
    return rank < count.clamp(min=1)

def make_arm(cfg, base):
    """A copy of the base that trains: Run.load froze the base."""
    arm = UnifiedModel(cfg).to(base.word.device)
    arm.load_state_dict(base.state_dict())
    return arm
# └─

# Batches depend on (stage, step) alone: a resumed run sees what it would have seen.

def question_batch(cfg, split, numbers):
    """Dialogues about plain scenes, or half of them about a few textured: image, text, answer."""
    scenes = sample(cfg, split, numbers, "questions")
    if split == "arm" and cfg.textured_questions:
        few = [i // 2 % cfg.textured_questions for i in numbers[::2]]
        scenes[::2] = [scene._replace(look="textured")
                       for scene in sample(cfg, "labelled", few, "questions")]
    ids, answers = zip(*(dialogue(cfg, scene) for scene in scenes))
    return render(cfg, scenes).image, pad(ids, TEXT_LEN), pad(answers, TEXT_LEN, -100)

def caption_batch(cfg, split, numbers):
    """Captions of plain scenes: None, text, target, is_masked."""
    scenes = sample(cfg, split, numbers, "captions")
    # a tenth without a prompt, for guidance
    texts = [encode(caption(cfg, scene)) if scene.rng("empty").random() >= 0.1 else []
             for scene in scenes]
    is_masked = mask_codes(cfg, len(scenes), scenes[0].generator("codes"))
    return None, pad(texts, PROMPT_LEN), render(cfg, scenes).image, is_masked

def proxy_batch(cfg, name, numbers, step):
    """Plain and textured pictures and what to draw of them: image, text, target, is_masked."""
    # with arm_scenes the same few again
    scenes = sample(cfg, "arm", [i % (cfg.arm_scenes or 2 ** 40) for i in numbers], "masks")
    image, prompts, target = draw_proxy(cfg, name, scenes)
    is_masked = mask_codes(cfg, len(scenes), scenes[0].generator(f"codes {step}"))
    return image, pad(map(encode, prompts), PROXY_LEN), target, is_masked

def tokenizer_batch(cfg, numbers, step):
    """Half pictures, half targets of the proxies in turn: the tokenizer must say both."""
    drawn = [name for name in PROXIES if PROXIES[name].target not in (None, original, shuffled)]
    pictures = render(cfg, sample(cfg, "tokenizer", numbers, "pictures")).image
    scenes = sample(cfg, "tokenizer", numbers, "masks")
    return torch.cat([pictures, draw_proxy(cfg, drawn[step % len(drawn)], scenes)[2]])

def make_batch(cfg, stage, step):
    numbers = lambda n: range(step * n, step * n + n)  # of n new scenes
    if stage == "tokenizer":
        return tokenizer_batch(cfg, numbers(cfg.tok_batch // 2), step)
    if stage == "base":
        return Batch(question_batch(cfg, "train", numbers(cfg.vqa_batch)),
                     caption_batch(cfg, "train", numbers(cfg.t2i_batch)))
    replay, draws = numbers(cfg.arm_batch), numbers(cfg.draws)
    return Batch(question_batch(cfg, "arm", replay), caption_batch(cfg, "arm", replay),
                 proxy_batch(cfg, stage, draws, step) if draws and stage != "none" else None)

# ==== 8. Sampling: answers and pictures
def prefill(model, image, text, room):
    """Run [patches] [text] once -> hidden states (B, S, D), KV caches with room for more columns:
    these rows never see what follows, so their keys and values stay valid."""
    x, positions, sees = model.layout(image, text, None)
    (B, S, D), d, dtype = x.shape, model.cfg.head_dim, compute_dtype(x.device)
    shape = (2, B, D // d, S + room, d)  # keys and values
    caches = [KVCache(*x.new_zeros(shape, dtype=dtype)) for _ in model.blocks]
    return norm(run_blocks(model.blocks, x, positions, sees, caches)), caches

@torch.no_grad()
def refine(model, tokenizer, image, text, noise, guidance, temperature):
    """Pictures (B, 3, P, P) of B texts; if guided, B empty ones follow. All randomness is in
    noise (steps, 2, B, N): uniform for the codes, Gumbel for their order."""
    (steps, _, B, N), MASK = noise.shape, model.cfg.codebook
    h, caches = prefill(model, image, text, N)
    at = h.shape[1]
    codes = torch.full((B, N), MASK, device=h.device)
    for step in range(steps):
        x, positions = model.embed_codes(codes.repeat(len(text) // B, 1))
        h = norm(run_blocks(model.blocks, norm(x), positions, None, caches, at))
        if len(text) > B:  # guiding the input of a linear head guides its logits
            conditional, empty = h.chunk(2)
            h = empty + guidance * (conditional - empty)
        logits = linear(h, model.image_head).float()  # (B, N, K)
        p = (logits / 0.8 if temperature else logits).softmax(-1)
        choice = p.argmax(-1)
        if temperature:  # where cumulated probability passes the uniform number
            choice = (p.cumsum(-1) < noise[step, 0, ..., None]).sum(-1).clamp(max=MASK - 1)
        is_masked, done = codes == MASK, (step + 1) / steps
        sure = p.gather(-1, choice[..., None])[..., 0].clamp(min=1e-30).log()  # (B, N)
        sure = sure + temperature * (1 - done) * noise[step, 1]
        sure = sure.masked_fill(~is_masked, math.inf)  # kept stays kept
        codes = torch.where(is_masked, choice, codes)
        still = int(N * math.cos(math.pi / 2 * done))  # so many stay masked
        codes = codes.scatter(1, sure.topk(still, largest=False).indices, MASK)
    return tokenizer.decode(codes)

def generate(model, tokenizer, texts, image=None, seed=0):
    """Draw each text or, given images (B, 3, P, P), what the texts ask to draw of them.
    MaskGIT (arXiv 2202.04200): all codes start masked; each step predicts them all and keeps the
    most confident, so that cos(pi/2 * step/steps) stay masked."""
    cfg, device = model.cfg, model.word.device
    free = cfg.sample_steps, PROMPT_LEN, cfg.guidance, cfg.temperature
    greedy = 2, PROXY_LEN, 1.0, 0.0  # a proxy leaves little open
    steps, length, guidance, temperature = free if image is None else greedy
    shape, g = (steps, len(texts), cfg.tokens), torch.Generator().manual_seed(seed)
    gumbel = -torch.empty(shape).exponential_(generator=g).log()
    noise = torch.stack([torch.rand(shape, generator=g), gumbel], 1).to(device)
    text = pad([checked(text.lower(), length) for text in texts], length)
    if guidance != 1:  # and as many empty ones, in one batch
        text = torch.cat([text, torch.full_like(text, PAD)])
    # on a GPU one CUDA graph, which lives as long as the model
    draw = vars(model).setdefault("graph", GraphedStep(refine))
    return draw(model, tokenizer, image, text.to(device), noise, guidance, temperature).clone()

@torch.no_grad()
def answer(model, image, questions, limit=24):
    """Greedy answers to one question about each image (B, 3, P, P), or to all about one."""
    device, U = model.word.device, model.cfg.patches
    texts = [checked(normalize(question), TEXT_LEN - 8) for question in questions]
    longest = max(map(len, texts))
    limit = min(limit, TEXT_LEN - longest)
    length = torch.tensor([len(text) for text in texts], device=device)  # (B,)
    image = image.expand(len(texts), -1, -1, -1)
    h, caches = prefill(model, image, pad(texts, longest).to(device), limit)
    h = h[torch.arange(len(texts)), U + length - 1]  # (B, D)
    words = torch.tensor([[text[-1]] for text in texts], device=device)  # (B, 1 + said)
    for i in range(limit):
        words = torch.cat([words, linear(h, model.text_head).float().argmax(-1)[:, None]], 1)
        if (words[:, 1:] == END).any(1).all():
            break
        # an answer begins right behind its question, over the padding: a column a sample
        place = (length + i)[:, None]  # (B, 1)
        x, positions = model.embed_text(words[:, -1:], words[:, -2:-1], place)
        at, sees = U + place[:, 0], (U + place + 1).int()
        h = norm(run_blocks(model.blocks, norm(x), positions, sees, caches, at))[:, 0]
    return [decode(row) for row in words[:, 1:].tolist()]

# ==== 9. Training: one loop, the run folder
def read(path, reader, advice="undo edits, or delete it and --train"):
    """What a reader makes of a whole file."""
    try:
        return reader(path)
    except Exception as e:  # torch, safetensors and Pillow raise a dozen kinds
        why = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"cannot use {path} ({why}); {advice}") from None

CODE = Path(__file__).read_bytes()

class Run:
    """A folder: config.json, log.jsonl, *.safetensors, samples/, report.*, sgt.py at first."""
    def __init__(self, folder):
        self.folder = Path(folder)

    def has(self, name):
        return (self.folder / name).exists()

    def write(self, name, data):
        """Write a file whole or not at all: a temporary one is renamed."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(data if isinstance(data, bytes) else data.encode())
            os.replace(temporary, path)
        except OSError as e:
            raise UserError(f"cannot write {path} ({e.strerror}); make room") from None
        finally:
            temporary.unlink(missing_ok=True)

    def config(self):
        reader = lambda path: Config(**json.loads(path.read_text("utf-8")))
        cfg = read(self.folder / "config.json", reader, "name another run")
        cfg.validate()
        return cfg

    def open(self, cfg):
        """Claim the folder for these settings, if it is empty or has them."""
        if self.has("config.json"):
            there, now = vars(self.config()), vars(cfg)
            others = [f"{name} ({there[name]} there, {now[name]} now)" for name in NAMES
                      if name not in FREE and there[name] != now[name]]
            if others:
                raise UserError(f"{self.folder} has other settings: {', '.join(others)}; use "
                                "these, or another --run")
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is no run; choose another --run")
        else:
            self.write("config.json", json.dumps(vars(cfg), indent=1))
            self.write("sgt.py", CODE)

    def load(self, stage, module):
        """Weights of a stage into a module, frozen."""
        read(self.folder / f"{stage}.safetensors",
             lambda path: module.load_state_dict(load_file(path)))
        return module.requires_grad_(False)

    def log(self):
        """The whole lines of log.jsonl; a crash may have left a part of one."""
        reader = lambda path: [json.loads(line) for line in path.read_text().splitlines()
                               if line.endswith("}")]
        return read(self.folder / "log.jsonl", reader) if self.has("log.jsonl") else []

def train_step(module, tokenizer, optimizer, batch, scale):
    """One update of a model, or of the tokenizer itself: its losses."""
    each = {"loss": module.loss(batch)} if module is tokenizer else losses(module, tokenizer, batch)
    module.zero_grad()
    each["loss"].backward()
    optimizer.step(scale)
    return {name: loss.detach() for name, loss in each.items() if torch.is_tensor(loss)}

def train_stage(run, cfg, stage, tokenizer, module):
    """The loop of every stage, with its log and checkpoints."""
    steps = {"tokenizer": cfg.tok_steps, "base": cfg.base_steps}.get(stage, cfg.arm_steps)
    optimizer = Optimizer(module, cfg.lr, 0.002 if module is tokenizer else cfg.adam_lr)
    start, device, checkpoint = 0, next(module.parameters()).device, f"{stage}.pt"
    Block.fast = compiled(Block.forward) if cfg.compile else None
    if run.has(checkpoint):
        def resume(path):
            state = torch.load(path, map_location=device)
            module.load_state_dict(state["module"])
            optimizer.load_state_dict(state["optimizer"])
            return state["step"]
        start = read(run.folder / checkpoint, resume)
    kept = [line for line in run.log() if line["stage"] != stage or line["step"] < start]
    run.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    # collate_fn makes a step's number a batch, on a GPU in other processes.
    gpu, update = device.type == "cuda", GraphedStep(train_step)
    batches = DataLoader(range(start, steps), batch_size=None, pin_memory=gpu,
                         num_workers=gpu * min(8, torch.get_num_threads()),
                         collate_fn=functools.partial(make_batch, cfg, stage))
    bar, began = tqdm(batches, f"{stage:14}", steps, initial=start), time.time()
    with open(run.folder / "log.jsonl", "a", buffering=1) as log:
        for step, batch in enumerate(bar, start):
            batch = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), batch)
            # an arm's rate falls from the start, or it unlearns what the base can do
            falls = steps if stage in PROXIES else steps / 2
            rate = min(1.0, (step + 1) / min(20, steps), (steps - step) / falls)
            parts = update(module, tokenizer, optimizer, batch, torch.full((), rate, device=device))
            last, saves = step + 1 == steps, (step + 1) % cfg.save_every == 0
            if step % 10 == 0 or last or saves:
                values = {name: round(part.item(), 4) for name, part in parts.items()}
                if not math.isfinite(values["loss"]):
                    raise UserError(f"{stage}: loss {values['loss']} at step {step}; lower --lr")
                bar.set_postfix(values)
                values["seconds"] = round(time.time() - began, 2)
                log.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
            if saves and not last:
                state = {"step": step + 1, "module": module.state_dict()}
                torch.save({**state, "optimizer": optimizer.state_dict()}, data := io.BytesIO())
                run.write(checkpoint, data.getvalue())
    run.write(f"{stage}.safetensors", save(module.state_dict()))
    (run.folder / checkpoint).unlink(missing_ok=True)

def choose_device(name):
    name = name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda") or not getattr(torch, name).is_available():
        raise UserError(f"there is no device {name!r} here; choose auto or cpu")
    return torch.device(name)

def train(cfg, folder, base=None):
    """Every missing stage, then the report; `base`: a run to copy from."""
    from eval import evaluate, show
    cfg.validate()
    run, device = Run(folder), choose_device(cfg.device)
    torch.set_num_threads(min(cfg.threads, os.cpu_count()) or torch.get_num_threads())
    copied = {name: (base.folder / name).read_bytes()
              for name in ("tokenizer.safetensors", "base.safetensors") if base}
    torch.manual_seed(cfg.seed)  # no folder yet: these may not fit
    tokenizer, model = VisionTokenizer(cfg).to(device), UnifiedModel(cfg).to(device)
    run.open(cfg)
    try:
        lock = sqlite3.connect(run.folder / ".lock", timeout=0)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as e:
        raise UserError(f"cannot lock {run.folder} ({e}); is it in training?") from None
    with lock:  # freed at its end
        run.open(cfg)  # another may be first
        for name, data in copied.items():
            if not run.has(name):
                run.write(name, data)
        size = sum(p.numel() for p in model.parameters())
        print(f"{run.folder}: {size / 1e6:.1f}M weights, {device} {compute_dtype(device)};",
              "tokenizer base", *cfg.arms, "(tiny on two cores: 15 minutes; fp32: 52)")
        if not run.has("tokenizer.safetensors"):
            train_stage(run, cfg, "tokenizer", tokenizer, tokenizer)
        run.load("tokenizer", tokenizer)
        for stage in ("base", *cfg.arms):
            if stage in PROXIES:
                model = make_arm(cfg, run.load("base", UnifiedModel(cfg).to(device)))
            if not run.has(f"{stage}.safetensors"):
                train_stage(run, cfg, stage, tokenizer, model)
        if not run.has("report.json"):
            evaluate(run, device)
    print(show(run))
    if run.has("sgt.py") and (run.folder / "sgt.py").read_bytes() != CODE:
        print(f"note: {run.folder} began with another sgt.py; for this one take another --run",
              file=sys.stderr)

# ==== 10. Commands
def find_run(name):
    """A run by its folder or its name under runs/; else the newest finished."""
    if name:
        return Run(name if Path(name).exists() or Path(name).name != name else Path("runs", name))
    newest = max(Path("runs").glob("*/report.json"), key=os.path.getmtime, default=None)
    if not newest:
        raise UserError("no finished run under runs/; python sgt.py --train")
    return Run(newest.parent)

def load_run(run, name=None, device="cpu"):
    """Config, tokenizer, model, its name: the one asked for, else instance, else the last."""
    cfg = run.config()
    stages = [stage for stage in ["base", *cfg.arms] if run.has(f"{stage}.safetensors")]
    name = name or ("instance" if "instance" in stages or not stages else stages[-1])
    if name not in stages:
        raise UserError(f"{run.folder} has no model {name}, only {stages}; train it")
    tokenizer = run.load("tokenizer", VisionTokenizer(cfg)).to(device)
    return cfg, tokenizer, run.load(name, UnifiedModel(cfg)).to(device), name

def read_image(path, size):
    """Any picture as a person sees it, squeezed to (1, 3, size, size) in [0, 1]."""
    def reader(path):
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode[0] in "IF":  # 16 bits and more: the used range
                values = np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)
                low, span = values.min(), np.ptp(values) or 1
                picture = Image.fromarray(np.uint8((values - low) / span * 255))
            return picture.convert("RGBA").resize((size, size), Image.BOX)
    picture = read(path, reader, "give a PNG or JPEG")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[..., :3].permute(2, 0, 1)[None]

def to_pil(image):
    pixels = (image.float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())

def png(picture):
    picture.save(out := io.BytesIO(), "PNG")
    return out.getvalue()

def picture_grid(rows):
    """PNG of rows: (label, pictures (n, 3, P, P), texts below them or None)."""
    strips = []
    for name, images, texts in rows:
        strip = Image.new("RGB", (150 + 100 * len(images), 126 if texts else 100), "white")
        pen = ImageDraw.Draw(strip)
        pen.text((4, 42), name, fill="black")
        for i, image in enumerate(images):
            x = 150 + 100 * i
            strip.paste(to_pil(image).resize((96, 96), Image.NEAREST), (x, 0))
            if texts:
                lines = textwrap.fill(texts[i], 17, max_lines=2, placeholder=" ...")
                pen.text((x, 96), lines, fill="black", spacing=1, font_size=10)
        strips.append(np.asarray(strip))
    return png(Image.fromarray(np.concatenate(strips)))

def save_png(image, path, source=""):
    """Write (3, h, w), enlarged."""
    runs = [p for p in path.absolute().parents if (p / "log.jsonl").exists()]
    if path.suffix.lower() != ".png" or runs or path.resolve() == Path(source).resolve():
        raise UserError(f"will not write {path}; give another .png outside of runs")
    picture = ImageOps.scale(to_pil(image), 256 / image.shape[1], Image.NEAREST)
    Run(path.parent).write(path.name, png(picture))

def use(args, given):
    """A verb other than --train."""
    run, out = find_run(args.run), Path(args.out or "out.png")
    used = {"device", "seed"} if args.generate else {"device"}
    if unused := set(given) - used:
        raise UserError(f"{', '.join(unused)} has no use here; leave it out")
    device, seed = choose_device(given.get("device", "auto")), given.get("seed", 0) % 2 ** 32
    cfg, tokenizer, model, name = load_run(run, args.model, device)
    who = f"({run.folder}, model {name})"
    if args.generate:
        save_png(generate(model, tokenizer, [args.generate.strip(" .?!")], seed=seed)[0], out)
        return print(f"wrote {out} {who}")
    image = read_image(args.segment or args.ask[0], cfg.image_size).to(device)
    if args.segment:  # what this model learned to draw
        proxy = PROXIES[name if name in PROXIES and PROXIES[name].target else "instance"]
        prompt = proxy.prompt.format(name="red circle")
        drawn = generate(model, tokenizer, [prompt], image)
        save_png(torch.cat([F.pad(image, (0, 1), value=1.0), drawn], -1)[0], out, args.segment)
        return print(f"wrote {out} {who}: {prompt}")
    print(answer(model, image, [args.ask[1]], limit=60)[0])
    print(who, file=sys.stderr)

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

def parser():
    p = Parser(prog="sgt.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    verb = p.add_mutually_exclusive_group(required=True)
    verb.add_argument("--train", action="store_true",
                      help="train and compare, 15 minutes on two cores; or go on")
    verb.add_argument("--ask", nargs=2, metavar=("IMAGE", "QUESTION"), help="answer a question")
    verb.add_argument("--segment", metavar="IMAGE", help="draw the masks, or what --model draws")
    verb.add_argument("--generate", metavar="TEXT", help="draw a picture of a text")
    p.add_argument("--preset", choices=PRESETS, help="sizes (default: tiny)")
    p.add_argument("--run", help="a run's folder, or its name under runs/")
    p.add_argument("--base", help="train arms on the base of this run")
    p.add_argument("--model", help="base, none (SFT), instance (SGT, the default), ...")
    p.add_argument("--out", help="where to draw (default: out.png)")
    settings = p.add_argument_group("settings (defaults: preset tiny)")
    help_of = dict(re.findall(r"^    (\w+): \w+ = .*?# *(.+)$", CODE.decode(), re.M))
    for field in dataclasses.fields(Config):
        kind = {"type": type(field.default), "metavar": field.type.upper()}
        if field.type == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        settings.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                              help=f"{help_of[field.name]} (default: {field.default})", **kind)
    return p

def command(argv):
    args = parser().parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in NAMES}
    if any(value in ("", []) for value in vars(args).values()):
        raise UserError("an argument is empty; leave it out")
    unused = "model out" if args.train else "preset base out" if args.ask else "preset base"
    for name in unused.split():
        if getattr(args, name):
            raise UserError(f"--{name} has no use here; leave it out")
    if not args.train:
        return use(args, given)
    preset, base = args.preset or "tiny", None
    start = PRESETS[preset]
    if args.base:  # its settings, but for the arms'
        base, fixed = find_run(args.base), set(given) - set(ONLY_ARMS)
        if fixed or args.preset:
            raise UserError(f"--base has its own {', '.join(fixed) or 'preset'}; leave that out")
        start = vars(base.config()) | {"device": "auto", "threads": 0}
    cfg = Config(**start | given)
    train(cfg, find_run(args.run or "runs/" + ("arms" if base else preset)).folder, base)

def main(argv=None, command=command):
    """A command's exit code: 0, 2 for a mistake of the user, 130 if interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII pipe
            stream.reconfigure(errors="replace")
    try:
        command(argv)
        print(end="", flush=True)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (UserError, OSError, RuntimeError) as e:  # a full disk, no memory
        if isinstance(e, RuntimeError) and "allocate" not in str(e):
            raise
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; --train goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0

if __name__ == "__main__":
    import sgt  # eval.py imports `sgt`: run that copy, or there would be two
    sys.exit(sgt.main())
