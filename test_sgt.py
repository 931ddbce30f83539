"""The specification, in the order of the files. Docstrings name the bugs they catch."""
import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import combinations, cycle, groupby, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import allclose, equal, tensor

import eval as evals
import kernels
import sgt
from sgt import (COLORS, PALETTE, PRESETS, PROXIES, QUESTIONS, RADII, SHAPES, Config, Scene, Thing,
                 UserError, encode, render, sample)

parametrize = pytest.mark.parametrize
HERE = Path(__file__).parent
SOURCE = (HERE / "sgt.py").read_text("utf-8")
README = (HERE / "README.md").read_text("utf-8")
CFG = Config(**PRESETS["smoke"] | dict(seed=3, encoder_depth=2, depth=2, textured_questions=3))
batch_of = functools.partial(sgt.make_batch, CFG)  # an arm, a step
CODES = argparse.Namespace(decode=lambda x: x)  # a tokenizer that shows the codes
DRAWN = [name for name, proxy in PROXIES.items() if proxy.target]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")
torch.set_num_threads(1)  # sums in another order are other bits
signal.signal(signal.SIGINT, signal.default_int_handler)  # else off in the background

@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(kernels, "BF16", False)  # fp32 everywhere

def models(cfg=CFG):
    torch.manual_seed(0)
    tokenizer, model = sgt.VisionTokenizer(cfg), sgt.UnifiedModel(cfg)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # or some are zero
    for head in (model.text_head, model.image_head):
        head.data.normal_()
    return tokenizer.requires_grad_(False), model

def thing(color, shape, x, y, size="big"):
    return Thing(shape, color, size, x, y, 32 * RADII[size], 0)
def scene_of(*things):
    return Scene("0/val/test/0", [o._replace(index=i) for i, o in enumerate(things, 1)])

def same(a, b):
    return equal(a, b) if torch.is_tensor(a) else a is b or all(map(same, a, b))

@parametrize("name, lines, size", [
    ("sgt.py", 1300, 68000), ("eval.py", 500, 28000), ("kernels.py", 450, 24000),
    ("test_sgt.py", 900, 52000), ("README.md", 260, 18000)])
def test_every_file_keeps_to_its_budget(name, lines, size):
    """A file that nobody reads."""
    rows = (HERE / name).read_text("utf-8").splitlines()
    counted = f"\n| {name} | {len(rows):,} |" in README
    assert name == "README.md" or counted and max(map(len, rows)) <= 100
    assert len(rows) <= lines and (HERE / name).stat().st_size <= size

def test_the_method_is_short_and_kernels_alone():
    """A cache between the fences; a formula left behind; kernels that need sgt.py."""
    parts = re.findall(r"^ *# ┌─ SGT(.*?)^ *# └─", SOURCE, re.M | re.S)
    assert len(parts) == len(re.findall("^ *# [┌└]─", SOURCE, re.M)) / 2 == 3
    assert 100 < "".join(parts).count("\n") <= 190
    assert not re.search(r"cache|GraphedStep|compile|[\"']cuda", "".join(parts))
    line, = re.findall(r"^ *(loss = 1\.5 \* text.*)", SOURCE, re.M)
    assert line in README
    text = (HERE / "kernels.py").read_text("utf-8")
    assert "import torch" in text and not re.search(r"^\s*(from|import) (sgt|eval)\b", text, re.M)

@parametrize("field, value", [
    ("image_size", 60), ("image_size", 24), ("patch", 0), ("fsq_levels", "8,x"), ("width", 100),
    ("head_dim", 12), ("lr", math.nan), ("lr", math.inf), ("lr", 0.0), ("base_steps", -1),
    ("depth", 0), ("proxies", "none,sky"), ("proxies", "none,none"), ("proxies", ""),
    ("arm_scenes", 1), ("seed", -1), ("seed", 2 ** 40), ("depth", "3"), ("depth", 1.5)])
def test_bad_settings_are_refused_by_name(field, value):
    """A crash an hour later."""
    for preset in PRESETS.values():
        Config(**preset).validate()
        with pytest.raises(UserError, match=field):
            Config(**preset | {field: value}).validate()

def test_a_scene_depends_on_its_key_alone():
    """Scenes that change with the batch or a global seed; one in two splits."""
    many = sample(CFG, "val", range(40), "masks")
    torch.manual_seed(1)
    one = sample(CFG, "val", [17], "masks")
    assert one[0] == many[17]
    assert same(render(CFG, one), [part[17:18] for part in render(CFG, many)])
    for split, seed in ("train", 3), ("arm", 3), ("val", 4):
        other = sample(replace(CFG, seed=seed), split, range(40), "masks")
        assert sum(a.things == b.things for a, b in zip(many, other)) < 4

@parametrize("preset", ["tiny", "base"])
def test_objects_stay_inside_and_apart(preset):
    """A shape cut off by the border; objects that merge; no occlusion."""
    cfg, seen = Config(**PRESETS[preset]), Counter()
    for use, most in (("masks", 1), ("captions", 0)):
        pairs = 0
        for scene in sample(cfg, "val", range(600), use):
            seen.update([len(scene.things)])
            for o in scene.things:
                seen.update([o.shape, o.color, o.size])
                assert o.radius <= min(o.x, o.y) <= max(o.x, o.y) <= cfg.image_size - o.radius
            close = [(a, b) for a, b in combinations(scene.things, 2)
                     if max(abs(a.x - b.x), abs(a.y - b.y)) < a.radius + b.radius + 0.99]
            assert len(close) <= most and all(a.color != b.color for a, b in close)
            pairs += len(close)
        assert pairs > 40 or not most
    assert set(seen) == {1, 2, 3, 4, *SHAPES, *COLORS, *RADII} and min(seen.values()) > 40

def test_objects_lie_where_the_map_says():
    """A map beside the object; the wrong object in front."""
    scenes = evals.val_scenes(CFG, 100, "plain")
    for scene, image, instance in zip(scenes, *render(CFG, scenes)):
        for o in scene.things:
            mask = instance == o.index
            assert mask.sum() >= 3
            assert (image[:, mask].mean(1) - tensor(COLORS[o.color])).abs().max() < 0.25
    pair = [thing("red", "square", 12, 16), thing("blue", "square", 18, 16)]
    front = render(CFG, [scene_of(*pair), scene_of(*pair[::-1])]).instance
    assert front[:, 16, 15].tolist() == [2, 2]

def test_all_looks_have_the_same_shapes():
    """A look that is another world, or none."""
    plain, *others = (render(CFG, evals.val_scenes(CFG, 20, look)) for look in sgt.LOOKS)
    for other in others:
        change = (plain.image - other.image).abs().mean(1)
        assert equal(plain.instance, other.instance) and 0.05 < min(
            change[plain.instance == 0].mean(), change[plain.instance > 0].mean())
    looks = lambda *uses: {s.look for use in uses for s in sample(CFG, "arm", range(20), use)}
    assert looks("masks") == {"plain", "textured"} and looks("questions", "captions") == {"plain"}
    images = torch.cat([sgt.question_batch(CFG, "arm", range(i, i + 4))[0] for i in (0, 4, 8)])
    few, plain = images[::2], images[1::2]  # the same few textured scenes again
    assert equal(few[:3], few[3:]) and len(images.unique(dim=0)) == 3 + 6
    assert few.diff().abs().mean((1, 2, 3)).min() > 1.5 * plain.diff().abs().mean((1, 2, 3)).max()

def everything_asked(things, times=300):
    """Every question about a scene, with its answer: always the same one."""
    asked = {}
    for i, kind in product(range(times), QUESTIONS.values()):
        for question, answer in kind(things, random.Random(i), 32):
            assert asked.setdefault(question, answer) == answer, question
    return asked

def test_every_sentence_is_of_known_words():
    """A word without an embedding."""
    for scene in sample(CFG, "train", range(150), "questions"):
        asked = everything_asked(scene.things, times=2)
        captions = list(sgt.captions(scene.things, random.Random(0), 32).values())
        told = sgt.describe(scene.things, random.Random(0), 32)
        for text in [*asked, *asked.values(), *captions, told, sgt.caption(CFG, scene)]:
            assert all(word in sgt.IDS for word in re.findall(r"\w+|[^\w\s]", text)), text
            assert sgt.decode([*encode(text), sgt.END, 7]) == text
        assert all(sgt.normalize(question) == question for question in asked)
        assert max(len(encode(text)) for text in captions) <= sgt.PROMPT_LEN

def test_answers_are_those_of_a_person():
    """Left for right, a wrong count, an ambiguous name, hidden for front."""
    asked = everything_asked([thing("red", "circle", 8, 8, "small"), thing("red", "ring", 24, 8),
                              thing("blue", "bar", 24, 24)])
    assert asked.items() >= {
        "is there a red circle?": "yes", "is there a blue circle?": "no",
        "how many objects?": "three", "how many red objects?": "two", "how many crosses?": "zero",
        "what color is the bar?": "blue", "what shape is the blue object?": "bar",
        "where is the ring from the bar?": "above", "where is the bar from the ring?": "below",
        "where is the circle from the ring?": "left", "where is the ring from the circle?": "right",
        "where is the bar?": "bottom right", "where is the circle?": "top left",
        "is the circle bigger or smaller than the bar?": "smaller",
        "is the bar bigger or smaller than the circle?": "bigger",
        "are there more red objects than bars?": "yes", "are there more bars than rings?": "no",
        "how many rings plus two?": "three", "how many red objects plus rings?": "three"}.items()
    assert not set(asked) & {"what shape is the red object?", "where is the circle from the bar?",
                             "is the ring bigger or smaller than the bar?"}
    pair = scene_of(thing("red", "circle", 10, 16), thing("blue", "ring", 16, 16)).things
    asked, (captions, facts) = everything_asked(pair), (
        about(pair, random.Random(0), 32) for about in (sgt.captions, sgt.describe))
    assert captions["attribution"] == "a red circle and a blue ring"
    assert captions["colored position"] == "a blue ring right of a red circle"
    assert {" ".join(sorted(fact.split())) for fact in facts[:-1].split(",")} == {
        "big blue center front middle ring", "big circle hidden left middle red"}
    assert asked["is the ring in front of the circle?"] == "yes"
    assert asked["is the circle in front of the ring?"] == "no"
    assert asked["where is the ring?"] == "middle center"

def test_a_dialogue_fits_and_supervises_answers():
    """A loss on questions; an answer without END; a description cut off."""
    for scene in sample(CFG, "train", range(60), "questions"):
        (ids, answers), turns = sgt.dialogue(CFG, scene), []
        assert len(ids) == len(answers) <= sgt.TEXT_LEN
        for is_answer, run in groupby(zip(ids, answers), lambda pair: pair[1] >= 0):
            turn, supervised = zip(*run)
            assert supervised == turn if is_answer else set(supervised) == {-100}
            assert turn.count(sgt.END) == is_answer == (turn[-1] == sgt.END)
            turns.append(sgt.decode(turn))
        assert len(turns) >= 6 and turns[-2] == "list the objects."
        assert turns[-1].count(",") + 1 == len(scene.things)

def test_no_answer_is_common():
    """A model that says yes and is right."""
    scenes = sample(CFG, "train", range(1200), "questions")
    for kind, most in {"existence": 0.6, "occlusion": 0.6, "compare": 0.6, "relation": 0.5,
                       "location": 0.22, "color": 0.33, "shape": 0.33, "size": 0.6}.items():
        turns = [sgt.ask(kind, scene.things, scene.rng(kind), 32) for scene in scenes]
        said = Counter(turn[1] for turn in turns if turn)
        assert max(said.values()) < most * said.total(), kind

@parametrize("asked, texts", {
    "is there a image?": """  IS THERE\n A IMAGE ??; is there a image; Please, is there a image.?;
        Is there an image in the image?; Is there an image? Please answer yes or no.;
        Is there a image? Answer with 'yes' or 'no'""",
    "list the objects.": "List the  objects", "": " ?; .", "is there a red bar?": "Is the bar red?",
    "how many cyclists?": "How many cyclists are there.; how many cyclists are in the picture?",
    "what color is the bar?": "What is the color of the bar?; which color is the bar",
    "is the bar bigger or smaller than the ring?": "is the bar larger than the ring?"}.items())
def test_the_wording_does_not_matter(asked, texts):
    """An answer that depends on manners."""
    assert {sgt.normalize(text) for text in texts.split(";")} == {asked}

def test_every_prompt_has_as_many_known_words():
    """Codes elsewhere; unknown words."""
    for name, color, shape in product(DRAWN, COLORS, SHAPES):
        prompt = PROXIES[name].prompt.format(name=f"{color} {shape}")
        assert len(encode(prompt)) == sgt.PROXY_LEN, prompt
        assert sgt.decode(encode(prompt)) == prompt

def test_targets_by_hand():
    """Colors in another order; a filled box; a wrong view."""
    scene = scene_of(thing("red", "square", 8, 8, "small"), thing("blue", "square", 24, 16),
                     thing("red", "ring", 8, 18))
    instance = render(CFG, [scene]).instance[0]
    target = {name: sgt.draw_proxy(CFG, name, [scene])[2][0] for name in DRAWN}
    pixels = lambda name: target[name][:, [0, 8, 18, 16], [0, 8, 11, 24]].T
    assert equal(pixels("instance"), PALETTE[:4]) and torch.pdist(PALETTE).min() > 0.3
    both = [scene, scene_of(*scene.things[:2])]  # the control: masks of another picture
    right, wrong = (sgt.draw_proxy(CFG, name, both)[2] for name in ("instance", "shuffled"))
    assert equal(wrong, right.flip(0)) and not equal(wrong, right)
    ground, a, _, b = pixels("panoptic")
    assert (ground == 0.5).all() and a.norm() > b.norm()
    assert allclose(a / a.norm(), b / b.norm(), atol=1e-5)
    for key in range(9):
        one = scene._replace(key=f"0/val/test/{key}")
        _, (prompt,), drawn = sgt.draw_proxy(CFG, "referring", [one])
        index, = [o.index for o in one.things if f"{o.color} {o.shape}" in prompt]
        assert equal(drawn[0].min(0).values > 0.9, instance == index)
    y, x = (instance == 2).nonzero(as_tuple=True)
    box = torch.zeros(32, 32, dtype=torch.bool)
    box[y.min():y.max() + 1, x.min():x.max() + 1] = True
    box[y.min() + 1:y.max(), x.min() + 1:x.max()] = False
    assert equal((target["boxes"] == PALETTE[3][:, None, None]).all(0), box)
    ground, small, ring, big = pixels("depth")[:, 0]
    assert ring > big > small > target["depth"][0, 31, 0] > ground
    moved = scene._replace(things=[o._replace(x=o.x - o.y / 6) for o in scene.things])
    assert allclose(target["novel_view"], render(CFG, [moved]).image[0], atol=1e-5)
    edges = target["edges"][0]
    assert edges[2, 16] == edges[8, 8] == 0 and edges[16, x.min()] > 0.5 < edges[y.max(), 24]

@parametrize("name", DRAWN)
def test_arms_differ_in_the_target_alone(name):
    """An arm with other pictures, masks or replay; old replay."""
    ours, other = (batch_of(arm, 5) for arm in (name, "instance"))
    assert same(ours[:2], other[:2]) and same(ours[:2], batch_of("none", 5)[:2])
    assert equal(ours.proxy[3], other.proxy[3]) and not same(ours[:2], batch_of(name, 6)[:2])
    image, _, target, _ = ours.proxy
    assert equal(image, other.proxy[0]) == (PROXIES[name].spoil is None)
    assert name == "instance" or not equal(target, other.proxy[2])
    assert equal(target, other.proxy[0]) or not (PROXIES[name].spoil or name == "reconstruction")
    assert image.shape == target.shape == (CFG.draws, 3, 32, 32)
    assert 0 <= min(image.min(), target.min()) and max(image.max(), target.max()) <= 1
    assert same(batch_of(name, 5).proxy, ours.proxy)
    seen = [make(CFG, "train", range(10, 12)) for make in (sgt.question_batch, sgt.caption_batch)]
    assert not any(map(same, ours[:2], seen))
    few = replace(CFG, arm_scenes=2)
    assert equal(*(sgt.make_batch(few, name, step).proxy[2] for step in (1, 2)))

@torch.no_grad()
def test_blocks_see_relative_places(exact):
    """Attention that depends on the place, or not on one axis."""
    x, blocks = torch.randn(1, 2, CFG.width), models()[1].encoder
    states = lambda *places: sgt.run_blocks(blocks, x, tensor(places))
    here = states((3.0, 5.0), (5.0, 6.0))
    assert allclose(here, states((10.0, 12.0), (12.0, 13.0)), atol=1e-4)
    for place in (5.0, 9.0), (7.0, 6.0):
        assert (here - states((3.0, 5.0), place)).abs().max() > 1e-3

@parametrize("levels", ["5,5,5,5", "8,3,2"])
def test_codes_are_points_and_points_codes(levels, monkeypatch):
    """Codes out of reach; channels in another order."""
    tokenizer = sgt.VisionTokenizer(Config(fsq_levels=levels))
    codes, points = torch.arange(tokenizer.levels.prod()), []
    monkeypatch.setattr(tokenizer, "reconstruct", lambda x: points.append(x[0]) or x)
    tokenizer.decode(codes[None])
    again, found = tokenizer.quantize(points[0].atanh())
    assert equal(found, codes) and allclose(again, points[0], atol=1e-6)
    assert len(again.unique(dim=0)) == len(codes)

def test_rounding_is_exact_and_straight_through():
    """Codes computed in bf16; a gradient not that of tanh."""
    tokenizer, z = sgt.VisionTokenizer(CFG), torch.randn(500, 4, requires_grad=True)
    point, _ = tokenizer.quantize(z)
    point.sum().backward()
    assert allclose(z.grad, 1 - z.detach().tanh() ** 2, atol=1e-6)
    point, code = tokenizer.quantize(tensor([[-99.0], [99.0], [0.0]]).expand(3, 4))
    assert code.tolist() == [0, 624, 312]
    assert allclose(point[:, 0], tensor([-0.8, 0.8, 0.0]), atol=1e-6)
    rough = z.detach().bfloat16()
    assert same(tokenizer.quantize(rough), tokenizer.quantize(rough.float()))

@torch.no_grad()
@parametrize("layout", ["understand", "generate", "proxy"])
def test_rows_see_what_they_may(layout, exact):
    """A leak: target into text, answer into question, words into patches."""
    _, model = models()
    image, other_image = torch.rand(2, 2, 3, 32, 32) if layout != "generate" else (None, None)
    codes = torch.randint(CFG.codebook, (2, 2, CFG.tokens))
    codes, other_codes = codes if layout != "understand" else (None, None)
    text, U = torch.randint(2, len(sgt.WORDS), (2, 9)), 0 if image is None else CFG.patches
    cases = [((other_image, text, codes), 0)] * (U > 0)  # what changes, and from which row on
    cases += [((image, text, other_codes), U + 9)] * (codes is not None)
    cases += [((image, (text + F.one_hot(tensor(t), 9)) % len(sgt.WORDS), codes), U + t)
              for t in (0, 4, 8)]
    states = lambda *inputs: sgt.run_blocks(model.blocks, *model.layout(*inputs))
    before, sees = states(image, text, codes), model.layout(image, text, codes)[2]
    assert equal(sees, kernels.staircase(U, 9, before.shape[1] - U - 9))
    for inputs, first in cases:
        changed = (states(*inputs) != before).any(-1)  # (B, S)
        assert not changed[:, :first].any() and changed[:, first:].all()

def test_a_proxy_learns_hidden_codes_of_its_target(exact, monkeypatch):
    """The official code's bug, codes of what is looked at; copying counted; a target in sight."""
    (tokenizer, model), batch, spied, real = models(), batch_of("instance", 0), [], sgt.token_loss
    monkeypatch.setattr(sgt, "token_loss", lambda h, head, target: spied.append((h, target)) or
                        h.retain_grad() or real(h, head, target))
    sgt.losses(model, tokenizer, batch)["proxy"].backward()
    (_, drawn), (h, codes) = spied[-2:]
    image, text, target, is_masked = batch.proxy
    assert equal(drawn, tokenizer.encode(batch.captions[2]))
    assert equal(codes, tokenizer.encode(target)) and not equal(codes, tokenizer.encode(image))
    assert equal(h.grad.abs().sum(-1) > 0, is_masked)
    sees = [p for name, p in model.named_parameters() if name.startswith(("stem", "encoder"))]
    assert len(sees) == 2 + 4 * CFG.encoder_depth and all(p.grad.abs().sum() > 0 for p in sees)
    assert model.text_head.grad is None
    features = model.see(image).detach()
    other = torch.where(is_masked, (codes + 1) % CFG.codebook, codes)
    monkeypatch.setattr(tokenizer, "encode", lambda image: other)
    monkeypatch.setattr(model, "see", lambda image: features)
    for x in (image, torch.zeros_like(image)):
        sgt.image_loss(model, tokenizer, x, text, target, is_masked)
    assert all(equal(again, h) for again, _ in spied[-2:])

def test_padding_is_no_target_and_never_seen(exact):
    """A model that learns to say nothing."""
    (_, model), (image, text, answer) = models(), sgt.question_batch(CFG, "train", range(6))
    other = text.clone()
    for row, changed, said in zip(text, other, answer):
        end = int(row.nonzero().max())
        assert said[end] == sgt.END and (said[end + 1:] == -100).all()
        changed[end:] = 9
    assert not equal(text, other)
    assert equal(*(sgt.text_loss(model, image, t, answer) for t in (text, other)))

def test_each_loss_is_the_mean_of_its_tokens(exact):
    """A proxy that thins out the replay."""
    cfg = replace(CFG, proxy_weight=0.5)
    (tokenizer, model), batch = models(cfg), batch_of("depth", 0)
    twice = batch._replace(proxy=[torch.cat([part, part]) for part in batch.proxy])
    three = batch, twice, batch._replace(proxy=None)
    one, two, none = (sgt.losses(model, tokenizer, each) for each in three)
    assert all(one[name] == two[name] == none[name] for name in ("text", "captions"))
    assert allclose(one["proxy"], two["proxy"], atol=1e-5) and none["proxy"] == 0
    assert allclose(one["loss"], 1.5 * one["text"] + one["captions"] + 0.5 * one["proxy"])

def test_the_hidden_share_follows_the_cosine():
    """An inverted schedule; no loss; always the same places; no empty caption."""
    is_masked = sgt.mask_codes(CFG, 4000, torch.Generator().manual_seed(0)).float()
    share, places = is_masked.mean(1).sort().values, (is_masked.mean(0) - 2 / math.pi).abs()
    assert (share - torch.linspace(math.pi / 2, 0, 4000).cos()).abs().max() < 0.06
    assert share[0] > 0 and places.max() < 0.05
    empty = ~sgt.caption_batch(CFG, "train", range(300))[1].any(1)
    assert 10 < empty.sum() < 50

def test_the_first_loss_is_a_guess_and_an_arm_a_copy():
    """A bad start; shared weights; matrices that AdamW gets."""
    tokenizer, base = sgt.VisionTokenizer(CFG), sgt.UnifiedModel(CFG)
    parts = sgt.losses(base, tokenizer, batch_of("depth", 0))
    for name, n in ("text", len(sgt.WORDS)), ("captions", CFG.codebook), ("proxy", CFG.codebook):
        assert allclose(parts[name], tensor(n).log(), rtol=1e-5)
    arm = sgt.make_arm(CFG, base)
    assert all(map(equal, arm.parameters(), base.parameters()))
    assert not {p.data_ptr() for p in arm.parameters()} & {p.data_ptr() for p in base.parameters()}
    matrices = kernels.Optimizer(arm, 0.1, 0.1).param_groups[0]["params"]
    assert len(matrices) == 2 + 4 * (CFG.encoder_depth + CFG.depth)

@torch.no_grad()
def test_cached_answers_are_those_of_full_passes(exact):
    """A cache off by one; padding before an answer; a neighbour's column."""
    (_, model), images = models(), render(CFG, evals.val_scenes(CFG, 4, "plain")).image
    questions = ["how many red objects?", "is there a ring?", "list the objects.",
                 "where is the blue square from the red circle?"]
    together = sgt.answer(model, images, questions, limit=7)
    for image, question, answer in zip(images[:, None], questions, together):
        ids = encode(question)
        for _ in range(7):
            h, _ = model(image, tensor([ids]), None)
            ids.append(int((h[0, -1] @ model.text_head.T).argmax()))
        assert answer == sgt.decode(ids[-7:]) == sgt.answer(model, image, [question], limit=7)[0]
    assert len(set(together)) > 1
    shouted = sgt.answer(model, images[:1], [f"{q} Please!".upper() for q in questions], limit=7)
    assert shouted[0] == together[0]

@torch.no_grad()
@parametrize("guidance, looks", [(1.0, False), (2.5, False), (2.5, True)])
def test_a_greedy_picture_is_that_of_full_passes(guidance, looks, exact):
    """An inverted schedule, changing codes, guidance the wrong way."""
    _, model = models(replace(CFG, guidance=guidance, temperature=0.0))
    image = torch.rand(2, 3, 32, 32) if looks else None
    texts = ["paint every class another color.", "segment only the red ring."]
    drawn = sgt.generate(model, CODES, texts, image)
    steps, length = (2, sgt.PROXY_LEN) if looks else (CFG.sample_steps, sgt.PROMPT_LEN)
    text = sgt.pad([encode(t) for t in texts], length)
    codes = torch.full((2, CFG.tokens), CFG.codebook)
    for step in range(1, 1 + steps):
        _, h = model(image, text, codes)
        _, empty = (None, h) if looks else model(image, torch.zeros_like(text), codes)
        logits = (empty + guidance * (h - empty)) @ model.image_head.T
        sure, choice = logits.softmax(-1).max(-1)
        sure[codes < CFG.codebook] = math.inf
        codes = torch.where(codes < CFG.codebook, codes, choice)
        still = int(CFG.tokens * math.cos(math.pi / 2 * step / steps))
        codes = codes.scatter(1, sure.argsort(1)[:, :still], CFG.codebook)
    assert equal(drawn, codes) and codes.max() < CFG.codebook

def test_a_seed_decides_and_every_code_is_drawn(exact):
    """A picture never drawn again; a code that stays masked; guidance of 1."""
    model = lambda guidance: models(replace(CFG, guidance=guidance))[1]
    draw = lambda seed, guidance: sgt.generate(model(guidance), CODES, ["a ring"], seed=seed)
    first = draw(1, 1.0)
    assert first.shape == (1, CFG.tokens) and 0 <= first.min() and first.max() < CFG.codebook
    torch.manual_seed(1)
    assert equal(first, draw(1, 1.0)) and (draw(1, 1 + 1e-6) == first).float().mean() > 0.9
    assert not equal(first, draw(2, 1.0)) and not equal(first, draw(1, 3.0))

SMOKE = ["--train", "--preset", "smoke", "--threads", "1"]

def python(file, *args, cwd=None, **env):
    return subprocess.run([sys.executable, HERE / file, *args], cwd=cwd, capture_output=True,
                          encoding="utf-8", errors="replace", env=os.environ | env)

def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}

def refused(code, said):
    return code == 2 and re.fullmatch("error: .*\n", said)

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with runs/smoke, made by the real command, and what is no run."""
    folder = tmp_path_factory.mktemp("trained")
    done = python("sgt.py", *SMOKE, cwd=folder)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (folder / "notes").mkdir()
    (folder / "junk.png").write_bytes(b"\x89PNG of a kind")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder

@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    return Path("runs/smoke")

@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(evals, "evaluate", lambda *_: None)
    monkeypatch.setattr(evals, "show", lambda run: "no report")

def test_training_leaves_all_files_and_again_none(trained):
    """A missing file; a run that trains again; ASCII."""
    stages, run = "tokenizer base none reconstruction instance".split(), trained / "runs/smoke"
    before = contents(run)
    assert not subprocess.getoutput(f"cd '{trained}'; '{sys.executable}' '{HERE}/eval.py' | true")
    assert set(before) == {
        ".lock", "sgt.py", "config.json", "log.jsonl", "report.json", "report.md", "report.html",
        "samples/comparison.png", "samples/prompts.png", *(f"{s}.safetensors" for s in stages)}
    again = python("sgt.py", *SMOKE, cwd=trained, PYTHONIOENCODING="ascii")
    assert again.returncode == 0 and not again.stderr and contents(run) == before
    assert before["report.md"].decode().encode("ascii", "replace").decode() in again.stdout
    page = before["report.html"].decode()
    assert "block 1" in page and not re.search(r'<script|<link|src="(?!data:)|url\(|://', page)
    assert page.count("<svg") == 5 and page.count("<img") == 2 and page.count(" SGT |") == 6

TYPED = ["", "-1", "nan", "1e400", "x", "9" * 30, "--", "\0", "💥", "../..", "[" * 5000]
EDITED = [None, [], {}, "x", -1, 0.5, True, "", 1e308, [[]], "3"]
MICRO = "--tok-steps=4 --base-steps=4 --arm-steps=3 --save-every=2 --proxies=none,instance".split()

def test_stops_and_threads_change_no_bit(tmp_path, monkeypatch, unmeasured):
    """Momentum, step or place in the data not saved; lines logged twice."""
    stops = [("tokenizer", 3), ("base", 2), ("none", 1), ("instance", 2)]
    whole, halves, thread = ([*SMOKE, *MICRO, "--run", str(tmp_path / name)] for name in "abc")
    assert ThreadPoolExecutor().submit(sgt.main, thread).result() == 0
    assert sgt.main(whole) == 0
    real = sgt.make_batch
    def make_batch(cfg, stage, step):
        if (stage, step) in stops:
            stops.remove((stage, step))
            assert sgt.main(halves) == 2
            os.kill(os.getpid(), signal.SIGINT)
        return real(cfg, stage, step)
    monkeypatch.setattr(sgt, "make_batch", make_batch)
    assert [sgt.main(halves) for _ in range(4)] == [130] * 4 and not stops
    (tmp_path / "b/log.jsonl").open("a").write('{"stage": "ba')
    assert sgt.main(halves) == 0
    a, b, c = (contents(tmp_path / name) for name in "abc")
    logs = [re.sub(rb', "seconds": [^}]*', b"", files.pop("log.jsonl")) for files in (a, b, c)]
    assert a == b == c and "base.pt" not in a and "instance.safetensors" in a
    assert len(set(logs)) == 1 and logs[0].count(b'"instance"') == 3

def test_a_stopped_run_says_what_it_lacks(tmp_path):
    """Work lost on Ctrl-C; a traceback; a half run taken for whole."""
    process = subprocess.Popen([sys.executable, HERE / "sgt.py", *SMOKE, "--tok-steps", "9999"],
                               cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    log = tmp_path / "runs/smoke/log.jsonl"
    while not log.exists() or not log.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said and "goes on" in said
    files = {"config.json", "log.jsonl", "sgt.py", ".lock"}
    assert contents(log.parent).keys() - {"tokenizer.pt"} == files
    done = python("eval.py", "runs/smoke", cwd=tmp_path)
    assert refused(done.returncode, done.stderr) and "base" in done.stderr

def test_arms_on_the_base_of_another_run(copied, unmeasured, capsys):
    """Arms with a base of their own, or of another world."""
    theirs, base = contents(copied), ["--train", "--base", "smoke", "--threads", "1", "--run"]
    for wrong in ("--width=128", "--seed=1", "--preset=tiny", "--base=nowhere"):
        assert refused(sgt.main([*base, "other", wrong]), capsys.readouterr().err)
    for alike, options in [("none instance", "--save-every 1"), ("none", "--ratio 0"),
                           ("", "--arm-batch 3"), ("none", "--arm-scenes 2 --proxies none,depth")]:
        shutil.rmtree("runs/other", ignore_errors=True)
        assert sgt.main([*base, "runs/other", *options.split()]) == 0, options
        ours = contents("runs/other")
        for stage in ("tokenizer", "base", "none", "instance"):
            name, same = f"{stage}.safetensors", stage in f"tokenizer base {alike}"
            assert name not in ours or (ours[name] == theirs[name]) == same
        if options == "--ratio 0":
            assert ours["instance.safetensors"] == theirs["none.safetensors"]

def test_help_explains_every_setting():
    """A comment that does not reach the keyboard."""
    said = " ".join(python("sgt.py", "--help", COLUMNS="99").stdout.split())
    for field in fields(Config):
        told, = re.findall(f"^    {field.name}: {field.type} = .*?# *(.*)", SOURCE, re.M)
        assert f"{told} (default: {field.default})" in said

def test_any_picture_can_be_asked_about(copied, tmp_path):
    """A crash on 16 bits or a palette; black glass; a picture on its side."""
    exif, deep = Image.Exif(), np.arange(4096, dtype=np.uint16).reshape(64, 64)
    exif[274] = 6  # turned by a quarter
    Image.linear_gradient("L").save(tmp_path / "turned.jpg", exif=exif)
    for name, picture in {
            "gray.png": Image.new("L", (7, 90), 255), "palette.gif": Image.new("P", (50, 20)),
            "half.png": Image.new("LA", (32, 32), (0, 0)), "dot.png": Image.new("1", (1, 1)),
            "glass.png": Image.new("RGBA", (3, 3), (9, 9, 9, 0)), "deep.png": Image.fromarray(deep),
            "flat.png": Image.fromarray(deep * 0 + 9), "nan.tiff": Image.new("F", (5, 5), math.nan),
            "ink.jpg": Image.new("CMYK", (64, 64), (0, 255, 255, 0))}.items():
        picture.save(tmp_path / name)
    low, high = {}, {}
    for path in tmp_path.glob("*.*"):
        assert sgt.main(["--ask", str(path), "What color is the ring?"]) == 0
        low[path.stem], high[path.stem] = sgt.read_image(path, 32)[0].flatten(1).aminmax(dim=1)
    assert min(low["half"].min(), low["glass"].min(), low["gray"].min()) == 1
    assert low["deep"].max() < 0.05 and high["deep"].min() > 0.95
    turned = sgt.read_image(tmp_path / "turned.jpg", 32)[0, 0]
    assert turned.std(0).max() < 0.02 and turned.std(1).min() > 0.2
    assert low["ink"][0] > 0.7 and high["ink"][1:].max() < 0.3

def test_the_verbs_use_the_newest_run(copied, tmp_path, capsys, monkeypatch):
    """A run not found; a seed without effect; a word not in ASCII."""
    run, red, drawn = ["--run", str(copied.resolve())], str(Path("red.png").resolve()), []
    assert sgt.main(["--ask", "red.png", "Is there an IMAGE?"]) == 0
    first = capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert sgt.main(["--ask", red, "is there a image?", *run]) == 0
    assert capsys.readouterr().out == first.out and "instance" in first.err
    for seed in "112":
        assert sgt.main(["--generate", "Two  RED circles", "--seed", seed, *run]) == 0
        drawn.append(Path("out.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2] and Image.open("out.png").size == (256, 256)
    for out, model in (("deep/a.png", "instance"), ("b.PNG", "base")):
        assert sgt.main(["--segment", red, "--out", out, "--model", model, *run]) == 0
        assert Image.open(out).size == ((2 * 32 + 1) * 8, 256)
    said = python("sgt.py", "--ask", red, "a 円 ring?", *run, PYTHONIOENCODING="ascii")
    assert said.returncode == 0 and "unknown and left out" in said.stderr

def test_the_snippets_of_the_readme_run(copied):
    """A name left behind; photographs with other masks, or held out and trained on."""
    lines, = re.findall("```python\n(.*?)```", README, re.S)
    exec(re.sub(r'"scenes.*png"', '"red.png"', lines.replace("runs/tiny", "runs/smoke")), got := {})
    assert got["masks"].size == got["drawn"].size == (32, 32)
    evals.segmentation(replace(CFG, eval_masks=50), None, models()[0], Path())
    script, = re.findall("```py\n(.*?)sys.exit", README, re.S)
    exec(script, got := {})
    scenes, ours = evals.val_scenes(CFG, 50, "plain"), got["load"](Path("plain/instances.json"))
    for scene, image, true, (things, photo, seen) in zip(scenes, *render(CFG, scenes), ours):
        assert allclose(photo, image, atol=0.01)
        assert len(things) == (true.flatten().bincount()[1:] > 10).sum()
        for o in things:
            there = scene.things[true[seen == o.index][0] - 1]
            assert equal(seen == o.index, true == there.index)
            assert math.hypot(o.x - there.x, o.y - there.y) < 2
    Path("photos.py").write_text(script + """code = sgt.main(sys.argv[1:], command)
of = lambda split: {id(s.background) for s in sgt.sample(sgt.Config, split, range(400), "")}
assert len(of("train")) == 40 and len(of("val") - of("train")) == 10""")
    done = python(Path("photos.py").resolve(), "plain", *SMOKE, PYTHONPATH=HERE)
    assert done.returncode == 0 and "SFT on photo" in done.stdout, done.stderr

def test_every_lab_can_be_done():
    """A lab that crashes, or whose line is gone."""
    labs = README.split("## Eight labs")[1].split("\n- **(")[1:]
    for lab in labs:
        text, edits = SOURCE, re.findall(r"`([^`]+)`\s→\s`([^`]+)`", lab)
        assert edits or lab.startswith("d")
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        exec(text, made := {"__name__": "sgt", "__file__": sgt.__file__})
        tokenizer, model = made["VisionTokenizer"](CFG), made["UnifiedModel"](CFG)
        arm, = set(made["PROXIES"]) - set(PROXIES) or {"instance"}
        assert made["losses"](model, tokenizer, made["make_batch"](CFG, arm, 0))["loss"].isfinite()
        assert made["generate"](model, tokenizer, ["a ring"]).isfinite().all()
    assert len(labs) == 8

@parametrize("line", ["", *re.split(r";\s*", """--train --model none; --train --run=; --ask red.png;
--train --base-step 3; --train --preset smoke --depth 3; --train --ratio 0.05; --train --device tpu;
--train --run red.png/x; --train --run notes/../red.png; --train --generate ring; --ask notes what?;
--train --run .; --ask red.png ?; --ask red.png what? --image-size 64; --ask red.png what? --seed 1;
--train --preset huge; --ask junk.png what?; --ask red.png what? --out a.png; --generate ring extra;
--segment red.png --model sky; --generate ring --run none; --generate ring --out runs/smoke/a/b.png;
--ask no.png what?; --generate ring --out a.txt; --generate ring --seed 1e3; --train --width 320000;
--segment red.png --out red.png""")])
def test_a_mistake_is_one_line_and_changes_nothing(line, copied, capsys, monkeypatch):
    """A traceback; a half-written file."""
    monkeypatch.setattr(sgt, "train_stage", None)
    before = contents(".")
    assert refused(sgt.main(line.split()), capsys.readouterr().err)
    assert contents(".") == before

@parametrize("preset", ["tiny", "base"])
def test_the_judge_is_right_and_strict(preset):
    """A judge who errs like a model, or takes anything."""
    cfg = Config(**PRESETS[preset])
    items = evals.collect(cfg, evals.GENEVAL, 120, "captions", evals.prompt)
    images = render(cfg, [item.scene for item in items]).image
    score = lambda items, images: evals.pictures_score(items, images)["average"]
    assert score(items, images) >= 99 and score(items, images.roll(7, 0)) < 35
    assert score(items, torch.rand(images.shape, generator=torch.Generator().manual_seed(0))) < 5
    for item, found in zip(items[::4], evals.judge(images[::4])):
        about = lambda o: (round(o.y / 4), round(o.x / 4), *o[:3])
        assert sorted(map(about, found)) == sorted(map(about, item.scene.things))
        assert "/val/" in item.scene.key

def test_prompts_are_judged_as_by_geneval():
    """Inexact counts; a color on the wrong object; left for right."""
    a, b = thing("red", "circle", 8, 16), thing("blue", "square", 24, 16)
    c, d = a._replace(color="blue"), b._replace(color="red")
    for kind, wanted, right, wrong in [
            ("single", [a], [c, b], [b]), ("two", [a, b], [d, c], [a, a]),
            ("counting", [a, a], [a, c, b], [a, a, a]), ("counting", [a, a], [a, a], [a]),
            ("colors", [a], [b, a], [c]), ("attribution", [a, b], [b, a], [c, d]),
            ("position", [a, b], [a, d, b._replace(x=2)], [a._replace(x=24), b._replace(x=8)])]:
        item = evals.Item(kind, scene_of(*wanted), "a circle left of a square")
        assert evals.satisfied(item, right) and not evals.satisfied(item, wrong), kind
        assert not evals.satisfied(item, [])

def test_panoptic_quality_by_hand():
    """Misses that do not count, a match at half, 0 / 0."""
    box = lambda h, w: F.pad(torch.ones(1, h, w, dtype=torch.bool), (0, 8 - w, 0, 8 - h))
    square, part, half = box(4, 4), box(3, 3), box(2, 4)  # IoU 0.5625; IoU 0.5 is no match
    far, nothing = square.roll(4, 1), square[:0]
    quality = lambda p, t: evals.panoptic_quality([p], [t])
    assert quality(square, square) == quality(nothing, nothing) == 100
    assert quality(half, square) == quality(nothing, square) == quality(square, nothing) == 0
    assert quality(part, square) == 56.25
    assert math.isclose(quality(torch.cat([square, far]), square), 100 / 1.5, rel_tol=1e-6)
    assert evals.panoptic_quality([part, nothing], [square, far]) == 37.5

def test_exported_masks_score_as_said(copied, capsys, monkeypatch):
    """Masks of another picture, or lost; an AP of our own."""
    cfg = sgt.Run("runs/smoke").config()
    scenes = sample(cfg, "val", range(cfg.eval_masks), "masks")
    right, truth = sgt.draw_proxy(cfg, "instance", scenes)[2], render(cfg, scenes).instance
    wrong = torch.cat([right[:3], right[3:].roll(1, 0)])  # most are of another picture
    for name, drawn in (("right", right), ("wrong", wrong)):
        monkeypatch.setattr(sgt, "generate", lambda *args, **options: drawn)
        assert evals.main(["smoke", "--export", f"new/{name}"]) == 0
        said = capsys.readouterr().out
        coco = evals.COCO(f"new/{name}/textured/instances.json")
        for i, masks in enumerate(evals.id_masks(truth), 1):
            assert np.array_equal([coco.annToMask(a) for a in coco.imgToAnns[i]], masks.numpy())
        measured = evals.COCOeval(coco, coco.loadRes(f"new/{name}/textured/results.json"), "segm")
        for step in (measured.evaluate, measured.accumulate, measured.summarize):
            step()
        assert f"AP, textured {100 * measured.stats[0]:.1f}" in said
        assert (name == "right") == ("AP, textured 100.0" in said) == ("PQ, textured 100.0" in said)
    assert len({p.read_bytes() for p in Path("new/right").glob("*/*/000000.png")}) == 3
    assert refused(evals.main(["smoke", "--export", "new"]), capsys.readouterr().err)

def test_baselines_and_probes_see_no_answers(monkeypatch):
    """A guess that knows the truth; a probe tested on what it fits."""
    items = evals.collect(CFG, QUESTIONS, 10, "questions", evals.question)
    seen, splits = [], set()
    monkeypatch.setattr(sgt, "answer", lambda model, image, *rest, **limit:
                        seen.append(image) or [item.truth for item in items])
    assert all(evals.right(models()[1], items, look).all() for look in sgt.LOOKS)
    assert not any(map(equal, seen, seen[1:]))
    assert evals.by_kind(items, [i.kind == "compare" for i in items])["reasoning"] == 50
    monkeypatch.setattr(sgt, "sample", lambda *args: splits.add(args[1]) or sample(*args))
    for kind, text, truths in (("existence", "is there a red ring?", ["yes", "no"]),
                               ("counting", "a text that never was", sgt.NUMBERS)):
        items = [evals.Item(kind, None, text, truth) for truth in truths]
        assert sum(evals.question_only(CFG, items)) == 1 and splits == {"train"}
    y, nothing = torch.randint(0, 3, (600,)), torch.randn(600, 200)
    linear = F.one_hot(y) + torch.randn(600, 3) / 3
    assert evals.probe(linear, y) > 95 and evals.probe(nothing, y) < 45
    asked = [o for scene in evals.val_scenes(CFG, 600, "plain")
             for o, name in sgt.named(scene.things)[:1] if name == o.shape]
    weight = F.one_hot(tensor([int(o.y) // 8 * 4 + int(o.x) // 8 for o in asked]))[:, None, None]
    monkeypatch.setattr(evals, "attention_reference", lambda *_: (None, weight))
    model, tag = models()[1], cycle((9, 18))  # plain, textured
    monkeypatch.setattr(model, "see", lambda x: next(tag) + torch.randn(len(x), 16, CFG.width))
    monkeypatch.setattr(evals, "probe", lambda x, y: float(x.mean()))
    found = evals.inside(CFG, model)
    assert found["attention to the object, block 2"] > 350
    assert abs(found["cosine of looks, encoder"]) < 5 and found["probe for shape, encoder"] > 17

def test_a_study_is_of_one_recipe(copied, capsys, monkeypatch):
    """A mean over other settings, or of one run twice."""
    other = shutil.copytree(copied, copied.parent / "other") / "report.json"
    report, before = json.loads(other.read_text()), other.read_bytes()
    hits = iter([n * n // 2 for n in range(12)])  # three looks of base, SFT, ...
    with monkeypatch.context() as patch:
        patch.setattr(evals, "right", lambda m, items, look: np.arange(len(items)) < next(hits))
        assert evals.main(["smoke", "--again"]) == 0
    assert "SGT − SFT on textured scenes: +70.0 ± 5.9" in capsys.readouterr().out
    (copied / "report.json").unlink()
    (copied / "sgt.py").write_text("")
    assert sgt.main(SMOKE) == 0 and (copied / "report.json").read_bytes() == before
    assert "began with another sgt.py" in capsys.readouterr().err
    report["config"]["seed"] = 1
    report["models"]["instance"]["textured - SFT"] = [7.0, 1.0]
    sft = report["models"]["none"]["textured"]
    sft["average"] += 10
    other.write_text(json.dumps(report))
    assert evals.main(["smoke", "other"]) == 0
    said = capsys.readouterr().out
    assert f"{sft['average'] - 5:.1f} ± 5.0" in said
    assert re.search(r"\| SGT .*[+-]\d+\.\d \+7\.0 +\|", said)
    for wrong in ({"lr": 1.0}, {"seed": 0}):
        other.write_text(json.dumps(report | {"config": report["config"] | wrong}))
        assert refused(evals.main(["smoke", "other"]), capsys.readouterr().err)

def test_timed_ways_differ(monkeypatch):
    """Two ways that are one; settings that stay."""
    now, seen = lambda: (kernels.CHOSEN, kernels.BF16, not sgt.Block.fast), set()
    monkeypatch.setattr(sgt, "attention", lambda *x: seen.add(now()) or kernels.attention(*x))
    monkeypatch.setattr(kernels, "compiled", lambda function: function)
    monkeypatch.setattr(kernels, "compare", lambda _, runs, turns: [f() for f in runs.values()])
    name, bf16, _ = before = now()
    assert evals.main(["--speed", "smoke"]) == 0 and now() == before
    assert seen == {(name, bf16, False), (name, bf16, True), ("sdpa", False, True)}

def test_the_check_passes_and_typos_fail():
    """A wrong kernel; a typo that measures something else."""
    done = [python("kernels.py", "--check", **env)
            for env in ({}, {"SGT_KERNELS": "fast"}, {"SGT_BF16": "yes"})]
    assert done[0].returncode == 0 and "all agree" in done[0].stdout, done[0].stdout
    assert all(refused(each.returncode, each.stderr) for each in done[1:])

@parametrize("backend", ["reference", "bmm", "sdpa"])
@parametrize("sees", [[3, 3, 3, 0, 5, 6, 9], [[9] * 7, [1, 2, 3, 4, 5, 0, 8]]])
def test_attention_is_its_definition(backend, sees):
    """A wrong backward pass; NaN from a row that sees nothing."""
    sees, rows = tensor(sees), []
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    for b, h, i in product(range(2), range(3), range(7)):
        n = int(sees.expand(2, 7)[b, i])
        weights = (q[b, h, i] @ k[b, h, :n].T / 8 ** 0.5).softmax(-1)
        rows.append(weights @ v[b, h, :n] if n else 0 * q[b, h, i])
    exact, out = torch.stack(rows).view(2, 3, 7, 8), kernels.BACKENDS[backend](q, k, v, sees)
    assert allclose(out, exact, atol=1e-12)
    grad = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(each, (q, k, v), grad) for each in (out, exact))):
        assert allclose(x, y, atol=1e-12)

def test_cached_columns_and_drawn_masks():
    """Keys of a sample in another's column; another mask's picture."""
    cache, new = kernels.KVCache(*torch.zeros(2, 2, 1, 6, 4)), torch.rand(2, 1, 2, 4)
    k, v = cache.put(new, -new, 1)
    assert k.shape == (2, 1, 3, 4) and equal(k[:, :, 1:], new) and equal(v, -k)
    k, _ = cache.put(new[:, :, :1] + 9, new[:, :, :1], tensor([0, 5]))
    assert equal(k[:, 0, :, 0] > 9, F.one_hot(tensor([0, 5])).bool())
    assert kernels.draw(kernels.staircase(2, 2, 1)) == "##...\n##...\n###..\n####.\n#####"

def test_the_optimizer_is_muon_and_adamw(exact):
    """Matrices that mix; a stack taken for one; a lost state."""
    module = torch.nn.ParameterList([sgt.matrix(3, 8, 8), sgt.matrix(16, 8), sgt.matrix(8, 24),
                                     sgt.matrix(16, 8), sgt.table(8, 8), sgt.table(5)])
    plain = [p.detach().clone() for p in module]
    rest, momentum = [w.requires_grad_() for w in plain[4:]], [0 * w for w in plain[:4]]
    adam = torch.optim.AdamW(rest, 0.01, betas=(0.9, 0.95), weight_decay=0)
    optimizer = kernels.Optimizer(module, 0.02, 0.02)
    for step in range(4):
        if step == 2:
            old, optimizer = optimizer, kernels.Optimizer(module, 0.02, 0.02)
            optimizer.load_state_dict(old.state_dict())
        for p in module:
            p.grad = torch.randn_like(p)
        for w, m, p in zip(plain[:4], momentum, module):
            m.lerp_(p.grad, 0.05)
            x = p.grad.lerp(m, 0.95)
            x = x / x.norm(dim=(-2, -1), keepdim=True)
            for _ in range(5):
                s = x @ x.mT
                x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
            w -= 0.01 * max(1, w.shape[-2] / w.shape[-1]) ** 0.5 * x
        for w, p in zip(rest, module[4:]):
            w.grad = p.grad.clone()
        adam.step()
        optimizer.step(0.5)
    assert all(allclose(p, w, atol=1e-5) for p, w in zip(module, plain))

def test_the_compiled_block_is_the_block(exact, monkeypatch, capsys):
    """A graph break; a compilation for each length; an unnoticed fallback."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True))
    (tokenizer, model), fast, grads = models(), kernels.compiled(sgt.Block.forward), []
    for stage, which in product(("base", "instance"), (fast, None)):
        monkeypatch.setattr(sgt.Block, "fast", which)
        sgt.VisionTokenizer(CFG).loss(torch.rand(64, 3, 32, 32)).backward()  # 64 codes each
        model.zero_grad()
        sgt.losses(model, tokenizer, batch_of(stage, 0))["loss"].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(allclose(*pair, atol=1e-4, rtol=1e-3) for pair in (grads[:2], grads[2:]))
    assert "not compiled" not in capsys.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

def test_nothing_ends_in_a_traceback(copied, capsys, monkeypatch):
    """Whatever no test above thought of."""
    rng, faults = random.Random(0), []
    monkeypatch.setattr(sgt, "train_stage", None)
    monkeypatch.setattr(evals, "evaluate", None)
    def attempt(main, *args, about=None):
        before = contents(".")
        try:
            code = main(list(args))
        except (Exception, SystemExit) as e:
            code = repr(e)[:90]
        Path("out.png").unlink(missing_ok=True)
        if code not in (0, 2) or contents(".") != before:
            faults.append((args, about, code))
    for field in fields(Config):
        flag = f"--{field.name.replace('_', '-')}={rng.choice(TYPED)}"
        attempt(sgt.main, *SMOKE, flag)
        attempt(sgt.main, "--generate", "ring", flag)
    for value in TYPED:
        for verb in ("--ask V ring", "--ask red.png V", "--segment V", "--generate V",
                     "--generate ring --run=V", "--generate ring --model=V"):
            attempt(sgt.main, *[word.replace("V", value) for word in verb.split()])
        attempt(evals.main, value)
    for file, main, args in ((copied / "config.json", sgt.main, ["--ask", "red.png", "a ring"]),
                             (copied / "report.json", evals.main, ["smoke"])):
        kept = file.read_text()
        whole = json.loads(kept)
        edited = EDITED + [whole | {key: rng.choice(EDITED)} for key in [*whole] * 2]
        for text in [*map(json.dumps, edited), kept[:-2], "[" * 9999]:
            file.write_text(text)
            attempt(main, *args, about=text[:60])
        file.write_text(kept)
    weights = copied / "instance.safetensors"
    for data in (b"", weights.read_bytes()[:-1], bytes(200), rng.randbytes(500)):
        weights.write_bytes(data)
        attempt(sgt.main, "--ask", "red.png", "a ring", about=len(data))
    assert not faults
