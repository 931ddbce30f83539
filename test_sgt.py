"""The specification of sgt.py, eval.py and kernels.py, in the order of the files.

    python -m pytest -q test_sgt.py

Names are sentences; each docstring names the bug that the test would catch.
"""
import ast
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as evaluation
import kernels
import sgt
from sgt import (COLORS, PALETTE, PRESETS, PROXIES, QUESTIONS, RADII, SHAPES, Config, Scene, Thing,
                 UserError)

HERE = Path(__file__).parent
CFG = Config(**{**PRESETS["smoke"], "seed": 3, "encoder_depth": 2, "depth": 2})
DRAWN = [name for name, proxy in PROXIES.items() if proxy.target]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
torch.set_num_threads(1)  # as the runs of these tests: sums in another order are other bits

@pytest.fixture
def exact(monkeypatch):
    """fp32 everywhere, for comparisons to rounding."""
    monkeypatch.setattr(kernels, "BF16", False)

def models(cfg=CFG):
    """A tokenizer and a model in which every weight has a say: heads and outputs start at zero."""
    torch.manual_seed(0)
    tokenizer, model = sgt.VisionTokenizer(cfg), sgt.UnifiedModel(cfg)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for head in (model.text_head, model.image_head):
        head.data.normal_()
    return tokenizer.requires_grad_(False), model

def thing(color, shape, x, y, size="big"):
    return Thing(shape, color, size, x, y, 32 * RADII[size], 0)

def scene_of(*things):
    return Scene("0/val/test/0", [o._replace(index=i) for i, o in enumerate(things, 1)])

def same(a, b):
    """Whether two batches are equal to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a is b if a is None else all(map(same, a, b))

# ---- the code itself ----------------------------------------------------------------------------

SOURCE = (HERE / "sgt.py").read_text("utf-8").splitlines()

@pytest.mark.parametrize("name, lines, size", [
    ("sgt.py", 1300, 68000), ("eval.py", 500, 28000), ("kernels.py", 450, 24000),
    ("test_sgt.py", 900, 52000), ("README.md", 260, 18000)])
def test_every_file_keeps_to_its_budget(name, lines, size):
    """A file that grows until nobody reads it to its end."""
    data = (HERE / name).read_bytes()
    rows = data.decode().splitlines()
    assert len(rows) <= lines
    assert len(data) <= size
    assert name == "README.md" or max(map(len, rows)) <= 100

def test_the_method_stands_between_its_fences_and_is_short():
    """A reader who looks for the method and finds caches, graphs and devices."""
    inside, fenced = False, []
    for line in SOURCE:
        if re.match(r"\s*# (┌─ SGT|└─)", line):
            assert inside == ("└─" in line), line
            inside = not inside
        elif inside:
            fenced.append(line)
    assert not inside and 100 < len(fenced) <= 190
    assert not re.search(r"cache|GraphedStep|compile|[\"']cuda", "\n".join(fenced))

def test_the_readme_quotes_the_loss_as_it_is():
    """A formula in the README that the code has left behind."""
    line, = [line.strip() for line in SOURCE if line.strip().startswith("loss = 1.5 * text")]
    assert line in (HERE / "README.md").read_text("utf-8")

def test_kernels_stand_alone():
    """Kernels that nobody can take into another project."""
    nodes = list(ast.walk(ast.parse((HERE / "kernels.py").read_text("utf-8"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert "torch" in names and not names & {"sgt", "eval"}

# ---- 1. config ----------------------------------------------------------------------------------

@pytest.mark.parametrize("field, value", [
    ("image_size", 60), ("image_size", 24), ("patch", 0), ("fsq_levels", "8,x"), ("width", 100),
    ("head_dim", 12), ("lr", math.nan), ("lr", math.inf), ("lr", 0.0), ("base_steps", -1),
    ("depth", 0), ("schedule", "later"), ("proxies", "none,sky"), ("proxies", "none,none"),
    ("proxies", ""), ("arm_scenes", 1), ("seed", -1), ("seed", 2 ** 40), ("depth", "3"),
    ("depth", 1.5)])
def test_a_setting_that_cannot_work_is_refused_by_its_name(field, value):
    """A crash deep inside torch, an hour later."""
    with pytest.raises(UserError, match="one picture" if field == "arm_scenes" else field):
        Config(**{**PRESETS["smoke"], field: value}).validate()

def test_every_preset_is_valid():
    """A preset that its own validation refuses."""
    for fields in PRESETS.values():
        Config(**fields).validate()

# ---- 2. scenes ----------------------------------------------------------------------------------

def test_a_scene_and_its_picture_depend_on_its_key_alone():
    """Scenes that change with the batch, with the order of calls or with the global seed."""
    many = sgt.sample(CFG, "val", range(40), "masks")
    pictures = sgt.render(CFG, many)
    random.seed(1)
    torch.manual_seed(1)
    for number in (17, 3):
        one = sgt.sample(CFG, "val", [number], "masks")
        assert one[0] == many[number]
        assert same(sgt.render(CFG, one), [part[number:number + 1] for part in pictures])
    others = [sgt.sample(CFG, split, range(40), "masks") for split in ("train", "arm", "few")]
    others.append(sgt.sample(dataclasses.replace(CFG, seed=4), "val", range(40), "masks"))
    for other in others:
        assert sum(a.things == b.things for a, b in zip(many, other)) < 4

@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_objects_stay_inside_and_apart_but_for_one_pair(preset):
    """Shapes that the border cuts off; two objects that merge; nothing to ask about occlusion."""
    cfg, seen = Config(**PRESETS[preset]), Counter()
    for use, most in (("masks", 1), ("captions", 0)):
        overlapping = 0
        for scene in sgt.sample(cfg, "val", range(400), use):
            assert [o.index for o in scene.things] == [*range(1, 1 + len(scene.things))]
            seen.update([len(scene.things)])
            for o in scene.things:
                seen.update([o.shape, o.color, o.size])
                assert o.radius <= min(o.x, o.y) <= max(o.x, o.y) <= cfg.image_size - o.radius
            close = [(a, b) for a, b in itertools.combinations(scene.things, 2)
                     if max(abs(a.x - b.x), abs(a.y - b.y)) < a.radius + b.radius + 0.99]
            assert len(close) <= most and all(a.color != b.color for a, b in close)
            overlapping += len(close)
        assert overlapping > 40 * most
    assert set(seen) == {1, 2, 3, 4, *SHAPES, *COLORS, *RADII}
    assert min(seen.values()) > 40

def test_a_picture_shows_its_objects_where_the_instance_map_says():
    """A map that does not lie on the object; the wrong object in front."""
    scenes = evaluation.val_scenes(CFG, 100, False)
    r = sgt.render(CFG, scenes)
    assert r.image.shape == (100, 3, 32, 32) and 0 <= r.image.min() and r.image.max() <= 1
    for scene, image, instance in zip(scenes, r.image, r.instance):
        for o in scene.things:
            mask = instance == o.index
            assert mask.sum() >= 3
            assert (image[:, mask].mean(1) - torch.tensor(COLORS[o.color])).abs().max() < 0.25
    pair = [thing("red", "square", 12, 16), thing("blue", "square", 18, 16)]
    front = sgt.render(CFG, [scene_of(*pair), scene_of(*pair[::-1])]).instance[:, 16, 15]
    assert front.tolist() == [2, 2]

def test_the_textured_twin_has_the_same_shapes_and_other_pixels():
    """Two looks of which one is another world, or the same picture."""
    scenes = [evaluation.val_scenes(CFG, 20, textured) for textured in (False, True)]
    plain, textured = (sgt.render(CFG, each) for each in scenes)
    assert torch.equal(plain.instance, textured.instance)
    change = (plain.image - textured.image).abs().mean(1)
    for part in (plain.instance == 0, plain.instance > 0):
        assert change[part].mean() > 0.05
    looks = [s.textured for s in sgt.sample(CFG, "arm", range(200), "masks")]
    assert 70 < sum(looks) < 130
    assert not any(s.textured for s in sgt.sample(CFG, "arm", range(200), "questions"))

# ---- 3. language --------------------------------------------------------------------------------

def everything_asked(things, P=32, times=300):
    """Every question about a scene that comes up, with its answer: always the same one."""
    asked = {}
    for i, kind in itertools.product(range(times), QUESTIONS.values()):
        for question, answer in kind(things, random.Random(i), P):
            assert asked.setdefault(question, answer) == answer, question
    return asked

def test_every_sentence_of_the_program_is_made_of_known_words_and_fits():
    """A word that no embedding has is left out, and the model is asked something else."""
    for scene in sgt.sample(CFG, "train", range(150), "questions"):
        asked = everything_asked(scene.things, times=2)
        captions = list(sgt.captions(scene.things, random.Random(0)).values())
        told = sgt.describe(scene.things, random.Random(0), 32)
        for text in [*asked, *asked.values(), *captions, told, sgt.caption(scene)]:
            assert all(word in sgt.IDS for word in re.findall(r"\w+|[^\w\s]", text)), text
            assert sgt.decode([*sgt.encode(text), sgt.END, 7]) == text
        assert all(sgt.normalize(question) == question for question in asked)
        assert max(len(sgt.encode(text)) for text in captions) <= sgt.PROMPT_LEN
        assert max(len(sgt.encode(text)) for text in asked) <= sgt.TEXT_LEN - 8
    assert len(set(sgt.WORDS[2:])) == len(sgt.WORDS[2:])

def test_questions_have_the_answers_that_a_person_gives():
    """Left and right exchanged, a wrong count, an ambiguous name, the hidden object in front."""
    asked = everything_asked([
        thing("red", "circle", 8, 8, "small"), thing("red", "ring", 24, 8),
        thing("blue", "bar", 24, 24)])
    truth = {
        "is there a red circle?": "yes", "is there a blue circle?": "no",
        "how many objects?": "three", "how many red objects?": "two", "how many crosses?": "zero",
        "what color is the bar?": "blue", "what shape is the blue object?": "bar",
        "where is the ring from the bar?": "above", "where is the bar from the ring?": "below",
        "where is the circle from the ring?": "left", "where is the ring from the circle?": "right",
        "where is the bar?": "bottom right", "where is the circle?": "top left",
        "is the circle bigger or smaller than the bar?": "smaller",
        "is the bar bigger or smaller than the circle?": "bigger",
        "are there more red objects than bars?": "yes", "are there more bars than rings?": "no",
        "how many rings plus two?": "three", "how many red objects plus rings?": "three"}
    assert {question: asked.get(question) for question in truth} == truth
    for ambiguous in ("what shape is the red object?", "where is the circle from the bar?",
                      "is the ring bigger or smaller than the bar?", "what color is the cross?"):
        assert ambiguous not in asked
    pair = scene_of(thing("red", "circle", 10, 16), thing("blue", "ring", 16, 16)).things
    asked = everything_asked(pair)
    assert asked["is the ring in front of the circle?"] == "yes"
    assert asked["is the circle in front of the ring?"] == "no"
    assert asked["where is the ring?"] == "middle center"
    said = {sgt.describe(pair, random.Random(i), 32) for i in range(60)}
    assert "red circle middle left big hidden, blue ring middle center big front." in said

def test_captions_cover_the_kinds_of_geneval_and_are_true():
    """A caption of another picture: the drawing model learns nonsense."""
    captions = lambda *things: sgt.captions(list(things), random.Random(0))
    a, b = thing("red", "circle", 8, 16), thing("blue", "square", 24, 16)
    assert captions(a) == {"single": "a circle", "colors": "a red circle"}
    assert captions(a, a, a) == {"counting": "three circles", "counting_color": "three red circles"}
    assert captions(a, a._replace(color="blue")) == {"counting": "two circles"}
    both = {sgt.captions([a, b], random.Random(i))["position_color"] for i in range(20)}
    assert both == {"a red circle left of a blue square", "a blue square right of a red circle"}
    assert "position" not in captions(a, b._replace(y=0))
    assert captions(a, b, a) == {"long": "two red circles, a blue square"}

def test_a_dialogue_fits_supervises_its_answers_alone_and_ends_with_a_description():
    """A loss on questions; an answer without END never stops; a description that is cut off."""
    for scene in sgt.sample(CFG, "train", range(60), "questions"):
        ids, answers = sgt.dialogue(CFG, scene)
        assert len(ids) == len(answers) <= sgt.TEXT_LEN
        assert all(a in (-100, i) for i, a in zip(ids, answers))
        asked, turns = everything_asked(scene.things, times=20), []
        for is_answer, run in itertools.groupby(zip(ids, answers), lambda pair: pair[1] >= 0):
            turns.append([i for i, _ in run])
            assert turns[-1].count(sgt.END) == is_answer == (turns[-1][-1] == sgt.END)
        turns = [sgt.decode(turn) for turn in turns]
        assert len(turns) >= 6 and turns[-2] == "list the objects."
        assert turns[-1].count(",") + 1 == len(scene.things)
        for question, answer in zip(turns[:-2:2], turns[1:-2:2]):
            assert asked.get(question, answer) == answer

def test_no_answer_is_common_only_because_scenes_make_it_so():
    """A model that says yes to everything and is right."""
    said = {kind: Counter() for kind in QUESTIONS}
    for scene in sgt.sample(CFG, "train", range(1200), "questions"):
        for kind in QUESTIONS:
            turn = sgt.ask(kind, scene.things, scene.rng(kind), 32)
            said[kind].update(turn and [turn[1]])
    for kind in ("existence", "occlusion", "compare"):
        assert 0.42 < said[kind]["yes"] / said[kind].total() < 0.58, kind
    for kind, answers in (("relation", 4), ("location", 9), ("color", 6), ("shape", 6)):
        assert len(said[kind]) == answers
        assert max(said[kind].values()) < 2 * said[kind].total() / answers, kind

@pytest.mark.parametrize("text", [
    "Is there an image?", "is there a image", "  IS THERE\n A IMAGE ?? ", "Is there a image.?",
    "Is there an image in the image?", "Please, is there an image in this photo?",
    "Is there a image? Please answer yes or no.", "Is there a image? Answer with 'yes' or 'no'"])
def test_the_wording_of_a_question_does_not_matter(text):
    """A POPE score that depends on a question mark."""
    assert sgt.normalize(text) == "is there a image?"

def test_a_statement_stays_one_and_nothing_stays_nothing():
    """The model knows "list the objects." with a full stop alone."""
    assert sgt.normalize("List the  objects.") == "list the objects."
    assert sgt.normalize(" ? ") == sgt.normalize("") == ""

# ---- 4. proxies ---------------------------------------------------------------------------------

def test_every_prompt_has_the_same_number_of_tokens_and_known_words():
    """Arms that differ in where the codes stand; a prompt whose words are unknown."""
    for name in DRAWN:
        for color, shape in itertools.product(COLORS, SHAPES):
            prompt = PROXIES[name].prompt.format(name=f"{color} {shape}")
            assert len(sgt.encode(prompt)) == sgt.PROXY_LEN and sgt.normalize(prompt) == prompt
            assert sgt.decode(sgt.encode(prompt)) == prompt

@pytest.mark.parametrize("name", DRAWN)
def test_a_target_is_a_picture_and_always_the_same(name):
    """A target outside of [0, 1], which no code can say; noise from nowhere."""
    scenes = sgt.sample(CFG, "arm", range(6), "masks")
    image, prompts, target = sgt.draw_proxy(CFG, name, scenes)
    assert image.shape == target.shape == (6, 3, 32, 32) and len(prompts) == 6
    assert 0 <= min(image.min(), target.min()) and max(image.max(), target.max()) <= 1
    assert same(sgt.draw_proxy(CFG, name, scenes)[::2], (image, target))
    shown = sgt.render(CFG, scenes).image
    assert torch.equal(image, shown) == (PROXIES[name].source is None)
    if PROXIES[name].source or name == "reconstruction":
        assert torch.equal(target, shown)

def test_targets_of_a_scene_made_by_hand():
    """Colors in the order of the list; a box that is filled; a view from the other side."""
    scene = scene_of(thing("red", "square", 8, 8, "small"), thing("blue", "square", 24, 16),
                     thing("red", "ring", 8, 18))
    instance = sgt.render(CFG, [scene]).instance[0]
    target = {name: sgt.draw_proxy(CFG, name, [scene])[2][0] for name in DRAWN}
    # a pixel of the square, of the ring, of the big square, in the order of reading
    small, ring, big = (lambda t: t[:, 8, 8]), (lambda t: t[:, 18, 11]), (lambda t: t[:, 16, 24])
    for i, pixel in enumerate((small, ring, big), 1):
        assert torch.equal(pixel(target["instance"]), PALETTE[i])
    assert torch.equal(target["instance"][:, 0, 0], PALETTE[0])
    assert torch.equal(small(target["semantic"]), PALETTE[2])
    assert torch.equal(big(target["semantic"]), PALETTE[2])
    assert torch.equal(ring(target["semantic"]), PALETTE[5])
    a, b = small(target["panoptic"]), big(target["panoptic"])
    assert torch.allclose(a / a.norm(), b / b.norm(), atol=1e-5) and a.norm() > b.norm()
    assert (target["panoptic"][:, instance == 0] == 0.5).all()
    for key in range(9):
        one = scene._replace(key=f"0/val/test/{key}")
        _, (prompt,), drawn = sgt.draw_proxy(CFG, "referring", [one])
        index, = [o.index for o in one.things if f"{o.color} {o.shape}" in prompt]
        assert torch.equal(drawn[0].min(0).values > 0.9, instance == index)
    y, x = (instance == 2).nonzero(as_tuple=True)
    box = torch.zeros(32, 32, dtype=torch.bool)
    box[y.min():y.max() + 1, x.min():x.max() + 1] = True
    box[y.min() + 1:y.max(), x.min() + 1:x.max()] = False
    assert torch.equal((target["boxes"] == PALETTE[3][:, None, None]).all(0), box)
    depth = target["depth"]
    assert ring(depth)[0] > big(depth)[0] > small(depth)[0] > depth[0, 8, 0] > depth[0, 0, 0]
    moved = [o._replace(x=o.x - o.y / 6) for o in scene.things]
    moved = sgt.render(CFG, [scene._replace(things=moved)]).image[0]
    assert torch.allclose(target["novel_view"], moved, atol=1e-5)
    edges = target["edges"][0]
    assert edges[2, 16] == edges[8, 8] == 0 and edges[16, x.min()] > 0.5 < edges[y.max(), 24]

def test_the_control_draws_the_masks_of_another_picture():
    """A control that learns from the right masks."""
    scenes = sgt.sample(CFG, "arm", range(4), "masks")
    (_, _, right), (_, _, wrong) = (sgt.draw_proxy(CFG, name, scenes)
                                    for name in ("instance", "shuffled"))
    assert torch.equal(wrong, right[[3, 0, 1, 2]]) and not torch.equal(wrong, right)

def test_the_colors_of_masks_are_far_apart():
    """Two objects that a blurred drawing cannot tell apart."""
    assert torch.pdist(PALETTE).min() > 0.3 and len(PALETTE) > 8 >= sgt.MAX_OBJECTS

@pytest.mark.parametrize("name", DRAWN)
def test_arms_differ_in_the_target_alone(name):
    """An arm that sees other pictures, other masks or another replay than its rivals."""
    ours, other = (sgt.make_batch(CFG, arm, 5) for arm in (name, "instance"))
    assert same(ours[:2], other[:2]) and same(ours[:2], sgt.make_batch(CFG, "none", 5)[:2])
    assert torch.equal(ours.proxy[3], other.proxy[3])
    assert torch.equal(ours.proxy[0], other.proxy[0]) or PROXIES[name].source
    assert name == "instance" or not torch.equal(ours.proxy[2], other.proxy[2])
    assert not same(ours[:2], sgt.make_batch(CFG, name, 6)[:2])

# ---- 5. transformer, 6. tokenizer ---------------------------------------------------------------

def test_rotary_embeddings_know_where_one_is_from_the_other(exact):
    """Attention that depends on the place in the row, or not on the column of the grid."""
    q, k = torch.randn(2, 1, 1, 32)
    at = torch.tensor([[3.0, 5.0]])

    def score(one, other):
        a, b = (sgt.rotate(x, *sgt.rotary(place, 32, torch.float32))
                for x, place in ((q, one), (k, other)))
        return float((a * b).sum())
    here = score(at, at + torch.tensor([2.0, 1.0]))
    assert math.isclose(here, score(at + 7, at + 7 + torch.tensor([2.0, 1.0])), abs_tol=1e-4)
    for other in ([2.0, 4.0], [4.0, 1.0], [1.0, 2.0]):
        assert abs(here - score(at, at + torch.tensor(other))) > 1e-3

@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_every_code_is_a_point_and_every_point_its_code(preset, monkeypatch):
    """Codes that nothing can reach; a decoder that reads the channels in another order."""
    tokenizer = sgt.VisionTokenizer(Config(**PRESETS[preset]))
    codes = torch.arange(tokenizer.levels.prod())
    monkeypatch.setattr(tokenizer, "reconstruct", lambda point: point)
    points = tokenizer.decode(codes[None])[0] if preset == "" else None
    digits = codes[:, None] // tokenizer.basis % tokenizer.levels
    points = (digits + 0.5) / (tokenizer.levels / 2) - 1
    assert torch.equal(tokenizer.decode(codes[None])[0], points.clamp(0, 1))
    again, found = tokenizer.quantize(points.atanh())
    assert torch.equal(found, codes) and torch.allclose(again, points, atol=1e-6)
    assert len(points.unique(dim=0)) == len(codes)

def test_rounding_is_exact_in_value_and_straight_through_in_gradient():
    """Codes computed in bf16; a gradient of zero, or that of something else than tanh."""
    tokenizer = sgt.VisionTokenizer(CFG)
    z = torch.randn(500, 4, requires_grad=True)
    point, _ = tokenizer.quantize(z)
    point.sum().backward()
    assert torch.allclose(z.grad, 1 - z.detach().tanh() ** 2, atol=1e-6)
    assert (point - z.tanh()).abs().max() <= 1 / 5 + 1e-6
    point, code = tokenizer.quantize(100 * torch.tensor([-1.0, 1.0, 0.0])[:, None].expand(3, 4))
    assert code.tolist() == [0, 624, 312] and torch.allclose(point[:, 0] * 5, torch.tensor([-4.0, 4, 0]))
    rough = z.detach().bfloat16()
    assert same(tokenizer.quantize(rough), tokenizer.quantize(rough.float()))

def test_codes_do_not_depend_on_the_precision_of_training(monkeypatch):
    """Targets that differ between a machine with bf16 and one without."""
    (tokenizer, _), image = models(), torch.rand(4, 3, 32, 32)
    codes = []
    for bf16 in (True, False):
        monkeypatch.setattr(kernels, "BF16", bf16)
        codes.append(tokenizer.encode(image))
        assert tokenizer.loss(image).dtype == torch.float32
    assert torch.equal(*codes)

def test_a_code_tells_of_its_patch_alone_and_in_its_place(exact):
    """Equal patches with different codes; a picture put together in another order."""
    (tokenizer, _), image = models(), torch.rand(1, 3, 32, 32)
    other = image.clone()
    other[:, :, 4:8, 8:12] = 1 - other[:, :, 4:8, 8:12]
    a, b = tokenizer.features(image), tokenizer.features(other)
    assert (a != b).any(-1)[0].nonzero().tolist() == [[10]]
    tokenizer.position.data.zero_()
    codes = torch.zeros(1, 64, dtype=torch.int64)
    codes[0, 10] = 624
    drawn = tokenizer.decode(codes)[0]
    inside = (drawn - drawn[:, :4, :4].repeat(1, 8, 8)).abs()[:, 4:8, 8:12]
    assert inside.max() == (drawn - drawn[:, :4, :4].repeat(1, 8, 8)).abs().max() > 0

# ---- 7. the model -------------------------------------------------------------------------------

def inputs(seed=0):
    """A picture, a text and codes, (2, ...) each."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(2, 3, 32, 32, generator=g),
            torch.randint(2, len(sgt.WORDS), (2, 9), generator=g),
            torch.randint(CFG.codebook, (2, CFG.tokens), generator=g))

@torch.no_grad()
@pytest.mark.parametrize("layout", ["understand", "generate", "proxy"])
def test_what_a_row_may_not_see_does_not_change_it_by_a_bit(layout, exact):
    """A leak: the target into the text, the answer into the question, words into the patches."""
    (_, model), (image, text, codes), (new_image, new_text, new_codes) = models(), inputs(), inputs(1)
    image, U = (None, 0) if layout == "generate" else (image, CFG.patches)
    codes = None if layout == "understand" else codes

    def states(image, text, codes):
        return sgt.run_blocks(model.blocks, *model.layout(image, text, codes))

    def first_change(*changed):
        rows = (states(image, text, codes) != states(*changed)).any(-1).all(0)
        assert rows[rows.long().argmax():].all()  # and everything behind it
        return int(rows.long().argmax())
    sees = model.layout(image, text, codes)[2]
    assert sees.tolist() == kernels.staircase(U, 9, CFG.tokens * (codes is not None)).tolist()
    for t in (0, 4, 8):
        mixed = text.clone()
        mixed[:, t] = (text[:, t] + 1) % len(sgt.WORDS)
        assert first_change(image, mixed, codes) == U + t
    if codes is not None:
        assert first_change(image, text, new_codes) == U + 9
    if image is not None:
        assert first_change(new_image, text, codes) == 0

def test_the_target_is_supervised_and_not_the_picture(monkeypatch):
    """The official code's bug: codes of the picture that is looked at, in every arm."""
    (tokenizer, model), taken = models(), []
    real = sgt.token_loss
    monkeypatch.setattr(sgt, "token_loss", lambda h, head, target: taken.append(target) or real(
        h, head, target))
    batch = sgt.make_batch(CFG, "instance", 0)
    sgt.losses(model, tokenizer, batch)
    image, _, target, _ = batch.proxy
    assert torch.equal(taken[-1], tokenizer.encode(target))
    assert not torch.equal(taken[-1], tokenizer.encode(image))
    assert torch.equal(taken[-2], tokenizer.encode(batch.captions[2]))

def test_the_picture_enters_a_drawing_through_the_vision_encoder_alone(exact, monkeypatch):
    """A way around the encoder: codes of the picture in the row, and nothing learns to see."""
    (tokenizer, model), batch = models(), sgt.make_batch(CFG, "instance", 0)
    sgt.losses(model, tokenizer, batch)["proxy"].backward()
    sees = [p for name, p in model.named_parameters() if name.startswith(("stem", "encoder"))]
    assert len(sees) == 2 + 4 * CFG.encoder_depth and all(p.grad.abs().sum() > 0 for p in sees)
    assert model.text_head.grad is None
    model.zero_grad()
    features = model.see(batch.proxy[0]).detach()
    monkeypatch.setattr(model, "see", lambda image: features)
    _, *rest = batch.proxy
    blind = [sgt.image_loss(model, tokenizer, image, *rest)
             for image in (batch.proxy[0], torch.zeros_like(batch.proxy[0]))]
    assert torch.equal(*blind)
    blind[0].backward()
    assert all(p.grad is None for p in sees)

def test_the_picture_loss_is_on_hidden_codes_and_they_are_hidden(exact, monkeypatch):
    """Copying what is visible counted as learning; a target that can be read in the row."""
    (tokenizer, model), kept = models(), []
    real = sgt.token_loss

    def keep(h, head, target):
        h.retain_grad()
        kept.append((h, target))
        return real(h, head, target)
    monkeypatch.setattr(sgt, "token_loss", keep)
    image, text, target, is_masked = sgt.make_batch(CFG, "depth", 1).proxy
    sgt.image_loss(model, tokenizer, image, text, target, is_masked).backward()
    h, codes = kept[0]
    assert torch.equal(h.grad.abs().sum(-1) > 0, is_masked)
    other = torch.where(is_masked, (codes + 1) % CFG.codebook, codes)
    monkeypatch.setattr(tokenizer, "encode", lambda image: other)
    sgt.image_loss(model, tokenizer, image, text, target, is_masked)
    assert torch.equal(kept[1][0], h)

def test_padding_is_never_a_target_and_never_seen(exact):
    """A model that learns to say nothing."""
    (_, model), (image, text, answer) = models(), sgt.question_batch(CFG, "train", 0, 6)
    ends = [max(row.nonzero()) for row in text]
    assert min(ends) < sgt.TEXT_LEN - 1
    other = text.clone()
    for row, end in enumerate(ends):
        assert (answer[row, end + 1:] == -100).all() and answer[row, end] == sgt.END
        other[row, end + 1:] = 9
    assert torch.equal(*(sgt.text_loss(model, image, t, answer) for t in (text, other)))

def test_each_loss_is_the_mean_over_its_own_tokens(exact):
    """A proxy that thins out the replay: arms would differ in their learning rate."""
    cfg = dataclasses.replace(CFG, proxy_weight=0.5)
    (tokenizer, model), batch = models(cfg), sgt.make_batch(CFG, "depth", 0)
    twice = batch._replace(proxy=[torch.cat([part, part]) for part in batch.proxy])
    one, two, none = (sgt.losses(model, tokenizer, b)
                      for b in (batch, twice, batch._replace(proxy=None)))
    assert one["text"] == two["text"] == none["text"]
    assert one["captions"] == two["captions"] == none["captions"]
    assert torch.allclose(one["proxy"], two["proxy"], atol=1e-5) and none["proxy"] == 0
    assert torch.allclose(one["loss"], 1.5 * one["text"] + one["captions"] + 0.5 * one["proxy"])
    text = [sgt.text_loss(model, *(part[i:i + 1] for part in batch.questions)) for i in (0, 1)]
    counts = (batch.questions[2][:, 1:] >= 0).sum(1)
    assert torch.allclose(one["text"], torch.stack(text) @ counts.float() / counts.sum())

def test_the_hidden_share_follows_the_cosine_and_is_never_empty():
    """An inverted schedule; a picture without a loss; the same places each time."""
    is_masked = sgt.mask_codes(CFG, 4000, torch.Generator().manual_seed(0))
    share = is_masked.float().mean(1)
    assert share.min() > 0 and abs(share.mean() - 2 / math.pi) < 0.02
    assert abs((share > math.cos(math.pi / 4)).float().mean() - 0.5) < 0.03
    assert (is_masked.float().mean(0) - 0.64).abs().max() < 0.05

def test_the_first_losses_are_those_of_a_uniform_guess():
    """A wrong vocabulary, a bad start."""
    tokenizer, model = sgt.VisionTokenizer(CFG), sgt.UnifiedModel(CFG)
    parts = sgt.losses(model, tokenizer, sgt.make_batch(CFG, "depth", 0))
    assert math.isclose(parts["text"], math.log(len(sgt.WORDS)), rel_tol=1e-5)
    for name in ("captions", "proxy"):
        assert math.isclose(parts[name], math.log(CFG.codebook), rel_tol=1e-5)

def test_an_arm_is_a_copy_of_the_base_and_leaves_it_alone():
    """An arm that starts anew, changes its base, or whose matrices AdamW gets."""
    _, base = models()
    arm = sgt.make_arm(CFG, base)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    assert all(torch.equal(p, before[name]) for name, p in arm.state_dict().items())
    groups = [kernels.Optimizer(m, 0.1, 0.1).param_groups for m in (arm, base)]
    assert [len(g["params"]) for g in groups[0]] == [len(g["params"]) for g in groups[1]]
    assert len(groups[0][0]["params"]) == 2 + 4 * (CFG.encoder_depth + CFG.depth)
    for p in arm.parameters():
        p.data += 1
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())

def test_one_batch_can_be_learned_by_heart():
    """Whatever keeps the model from fitting: a cut path, a wrong target, a dead optimizer."""
    tokenizer, _ = models()
    model, batch = sgt.UnifiedModel(CFG), sgt.make_batch(CFG, "instance", 0)
    optimizer = kernels.Optimizer(model, 0.02, 0.02)
    for step in range(60):
        parts = sgt.losses(model, tokenizer, batch)
        model.zero_grad()
        parts["loss"].backward()
        optimizer.step(sgt.rate_factor(step, 60))
    assert all(parts[name] < 0.4 for name in ("text", "captions", "proxy")), parts

def test_batches_never_repeat_unless_few_scenes_are_asked_for():
    """A study of few labels in which every setting sees the same data."""
    few = dataclasses.replace(CFG, arm_scenes=3, textured_questions=2, arm_batch=8)
    seen = lambda cfg, part: torch.cat([sgt.make_batch(cfg, "depth", step)[part][0]
                                        for step in range(4)]).flatten(1)
    assert len(seen(few, 2).unique(dim=0)) == 3 and len(seen(few, 2)) == 64
    assert len(seen(CFG, 2).unique(dim=0)) == len(seen(CFG, 2))
    assert len(seen(few, 0).unique(dim=0)) == 4 * (8 - 2) + 2
    plain = dataclasses.replace(few, textured_questions=0)
    assert torch.equal(seen(few, 0)[2:8], seen(plain, 0)[2:8])
    masks = [sgt.make_batch(few, "depth", step).proxy[3] for step in (0, 3)]
    assert not torch.equal(*masks)

# ---- 8. sampling --------------------------------------------------------------------------------

@torch.no_grad()
def test_cached_answers_are_those_of_reading_everything_again(exact):
    """A cache that is off by one; padding between question and answer; a neighbour's column."""
    _, model = models()
    image = sgt.render(CFG, evaluation.val_scenes(CFG, 4, True)).image
    questions = ["how many red objects?", "is there a ring?", "list the objects.",
                 "where is the blue square from the red circle?"]
    together = sgt.answer(model, image, questions, limit=7)
    for i, question in enumerate(questions):
        ids = sgt.encode(question)
        for _ in range(7):
            h, _ = model(image[i:i + 1], torch.tensor([ids]), None)
            ids = [*ids, int((h[0, -1] @ model.text_head.T).argmax())]
        slow = sgt.decode(ids[len(sgt.encode(question)):])
        assert together[i] == slow == sgt.answer(model, image[i:i + 1], [question], limit=7)[0]
    assert len(set(together)) > 1

CODES = types.SimpleNamespace(decode=lambda codes: codes)  # a tokenizer that shows the codes

@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("looks", [False, True])
def test_a_greedy_picture_is_that_of_a_loop_of_full_passes(guidance, looks, exact):
    """An inverted schedule, codes that change after they were fixed, guidance the wrong way."""
    _, model = models()
    image = torch.rand(2, 3, 32, 32) if looks else None
    texts = ["paint every class another color.", "segment only the red ring."]
    drawn = sgt.generate(model, CODES, texts, image, guidance=guidance, temperature=0)
    steps, length = (2, sgt.PROXY_LEN) if looks else (CFG.sample_steps, sgt.PROMPT_LEN)
    text = sgt.pad([sgt.encode(t) for t in texts], length)
    N, codes = CFG.tokens, torch.full((2, CFG.tokens), CFG.codebook)
    for step in range(1, 1 + steps):
        _, h = model(image, text, codes)
        _, empty = model(image, torch.zeros_like(text), codes)
        logits = (empty + guidance * (h - empty)) @ model.image_head.T
        sure, choice = logits.softmax(-1).max(-1)
        is_masked = codes == CFG.codebook
        sure[~is_masked] = math.inf
        codes = torch.where(is_masked, choice, codes)
        still = int(N * math.cos(math.pi / 2 * step / steps) + 1e-6)
        codes = codes.scatter(1, sure.argsort(1)[:, :still], CFG.codebook)
    assert torch.equal(drawn, codes) and codes.max() < CFG.codebook
    assert not torch.equal(drawn[0], drawn[1])

def test_a_seed_decides_the_picture_and_every_code_is_drawn(exact):
    """A picture that cannot be drawn twice; a code that stays masked; no guidance that guides."""
    _, model = models()
    draw = lambda **options: sgt.generate(model, CODES, ["a ring", "two bars"], **options)
    torch.manual_seed(1)
    first = draw(seed=1)
    assert first.shape == (2, CFG.tokens) and 0 <= first.min() and first.max() < CFG.codebook
    assert torch.equal(first, draw(seed=1)) and not torch.equal(first, draw(seed=2))
    assert not torch.equal(first, draw(seed=1, guidance=3.0))
    close = (draw(seed=1, guidance=1 + 1e-6) == first).float().mean()
    assert close > 0.9

# ---- 9. training and the run folder -------------------------------------------------------------

def python(*args, cwd=None, **env):
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True,
                          encoding="utf-8", errors="replace", env={**os.environ, **env})

SMOKE = ["--train", "--preset", "smoke", "--threads", "1"]

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with runs/smoke, made by the real command, and some things that are no runs."""
    folder = tmp_path_factory.mktemp("trained")
    done = python(HERE / "sgt.py", *SMOKE, cwd=folder)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "SGT" in done.stdout and "question only" in done.stdout
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("mine")
    (folder / "junk.png").write_bytes(b"\x89PNG of a kind")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return folder

@pytest.fixture
def here(trained, monkeypatch):
    """In the folder of `trained`, which must be the same afterwards."""
    monkeypatch.chdir(trained)
    before = contents(trained)
    yield trained
    assert contents(trained) == before

@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """In a copy of `trained`, to be damaged."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy/runs/smoke"

@pytest.fixture
def unmeasured(monkeypatch):
    """Training without a report, for speed."""
    monkeypatch.setattr(evaluation, "evaluate", lambda run, device: None)
    monkeypatch.setattr(evaluation, "show", lambda run: "no report")

def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}

def refused(code, capsys):
    """The one line of a mistake."""
    line, = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: ") and len(line) < 800
    return line

def test_training_leaves_every_file_and_the_same_command_again_changes_nothing(here):
    """A missing file; a finished run that trains again; a report that ASCII cannot say."""
    stages = ["tokenizer", "base", "none", "reconstruction", "instance"]
    assert set(contents(here / "runs/smoke")) == {
        "config.json", "log.jsonl", "report.json", "report.md", "report.html",
        "samples/comparison.png", "samples/prompts.png", *(f"{s}.safetensors" for s in stages)}
    log = [json.loads(line) for line in Path("runs/smoke/log.jsonl").read_text().splitlines()]
    assert [*dict.fromkeys(line["stage"] for line in log)] == stages
    assert all(math.isfinite(line["loss"]) for line in log)
    began = time.perf_counter()
    again = python(HERE / "sgt.py", *SMOKE, "--no-compile", PYTHONIOENCODING="ascii")
    assert again.returncode == 0 and not again.stderr and time.perf_counter() - began < 30
    report = Path("runs/smoke/report.md").read_text("utf-8")
    assert again.stdout.isascii() and report.encode("ascii", "replace").decode() in again.stdout

MICRO = [*SMOKE, "--tok-steps", "4", "--base-steps", "4", "--arm-steps", "3", "--save-every", "2",
         "--proxies", "none,instance", "--schedule", "sequential"]

def test_a_run_that_was_stopped_or_is_in_a_thread_ends_with_the_same_bits(
        tmp_path, monkeypatch, unmeasured, capsys):
    """State that is not saved: momentum, step, place in the data; a log with lines twice."""
    stops, real = [("tokenizer", 1), ("base", 2), ("none", 2), ("instance", 0), ("instance", 4)], sgt.make_batch
    whole, halves, thread = (tmp_path / name for name in ("whole", "halves", "thread"))
    assert sgt.main([*MICRO, "--run", str(whole)]) == 0

    def make_batch(cfg, stage, step):
        if (stage, step) in stops:
            stops.remove((stage, step))
            os.kill(os.getpid(), signal.SIGTERM)
        return real(cfg, stage, step)
    monkeypatch.setattr(sgt, "make_batch", make_batch)
    for _ in range(5):
        assert sgt.main([*MICRO, "--run", str(halves)]) == 143
        assert "stopped; the same command goes on" in capsys.readouterr().err
    with open(halves / "log.jsonl", "a") as log:
        log.write('{"stage": "ba')  # a crash left a part of a line
    assert sgt.main([*MICRO, "--run", str(halves)]) == 0 and not stops
    code = []
    one = threading.Thread(target=lambda: code.append(sgt.main([*MICRO, "--run", str(thread)])))
    one.start()
    one.join()
    assert code == [0]
    files = [contents(folder) for folder in (whole, halves, thread)]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for name, data in files[0].items():
        if name == "log.jsonl":
            assert len({re.sub(rb', "seconds": [^}]*', b"", f[name]) for f in files}) == 1
        else:
            assert data == files[1][name] == files[2][name], name
    assert len(re.findall(b'"instance", "step": (0|5)', files[0]["log.jsonl"])) == 2

def test_a_run_can_be_stopped_with_ctrl_c_and_says_what_it_lacks(tmp_path):
    """Work lost on Ctrl-C; a traceback; a half-made run that is taken for a whole one."""
    process = subprocess.Popen([sys.executable, HERE / "sgt.py", *SMOKE, "--tok-steps", "9999"],
                               cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    run = tmp_path / "runs/smoke"
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said and "goes on" in said
    assert set(contents(run)) == {"config.json", "log.jsonl", "state.pt"}
    done = python(HERE / "eval.py", "runs/smoke", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "lacks" in done.stderr

def test_a_lost_report_is_made_again_to_the_byte(copied, capsys):
    """An evaluation that depends on the training before it, or on chance."""
    report = (copied / "report.json").read_bytes()
    (copied / "report.json").unlink()
    assert sgt.main(SMOKE) == 0
    assert (copied / "report.json").read_bytes() == report

def test_arms_can_be_trained_on_the_base_of_another_run(copied, unmeasured, capsys):
    """A comparison in which every arm has a base of its own, or one of another world."""
    base = ["--train", "--base", "smoke", "--threads", "1"]
    for wrong in (["--width", "128"], ["--seed", "1"], ["--preset", "tiny"], ["--base", "nowhere"]):
        refused(sgt.main([*base, "--run", "other", *wrong]), capsys)
    for i, options in enumerate([
            "--proxies none,depth --schedule sequential", "--arm-scenes 3 --arm-steps 4",
            "--textured-questions 2 --arm-batch 4 --proxies none", "--ratio 0", "--save-every 1"]):
        other = copied.parent / str(i)
        assert sgt.main([*base, "--run", str(other), *options.split()]) == 0, options
        files, theirs = contents(other), contents(copied)
        for name in ("tokenizer.safetensors", "base.safetensors"):
            assert files[name] == theirs[name]
        same_arms = files["none.safetensors"] == theirs["none.safetensors"]
        assert same_arms == ("arm" not in options.replace("arm-scenes 3 --arm-steps 4", "arm"))
    assert len((copied.parent / "3/instance.safetensors").read_bytes()) == len(theirs["instance.safetensors"])
    assert contents(copied.parent / "3")["instance.safetensors"] == theirs["none.safetensors"]
    assert contents(copied.parent / "4")["instance.safetensors"] == theirs["instance.safetensors"]

def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A report cut off by a full disk; temporary files left behind."""
    run = sgt.Run(tmp_path)
    run.write("a/b.txt", "whole")
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.write("a/b.txt", "half")
    assert contents(tmp_path) == {"a/b.txt": b"whole"}

# ---- 10. commands -------------------------------------------------------------------------------

def test_help_explains_every_setting(capsys):
    """A setting whose comment does not reach the person at the keyboard."""
    with pytest.raises(SystemExit) as stopped:
        sgt.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(Config):
        line, = [line for line in SOURCE if line.startswith(f"    {field.name}: {field.type} = ")]
        about = line.split("#", 1)[1].strip()
        assert f"{about} (default: {field.default})" in said
        assert f"--{field.name.replace('_', '-')}" in said

PICTURES = {
    "gray.png": Image.new("L", (7, 90), 255), "palette.gif": Image.new("P", (50, 20)),
    "half.png": Image.new("LA", (32, 32), (0, 0)), "clear.png": Image.new("RGBA", (3, 3), (9, 9, 9, 0)),
    "flat.png": Image.fromarray(np.full((40, 40), 300, np.uint16)),
    "deep.png": Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 9),
    "float.tiff": Image.fromarray(np.full((5, 5), np.nan, np.float32)),
    "bit.png": Image.new("1", (1, 1)), "ink.jpg": Image.new("CMYK", (64, 64), (0, 255, 255, 0))}

def test_any_picture_can_be_asked_about(here, tmp_path, capsys):
    """A crash on 16 bits, a palette or a constant; glass that is black; a photograph on its side."""
    for name, picture in PICTURES.items():
        picture.save(tmp_path / name)
        small, upright = sgt.read_image(tmp_path / name, 32)
        assert small.shape == (1, 3, 32, 32) and 0 <= small.min() and small.max() <= 1
        assert upright.mode == "RGB" and upright.size == picture.size
        assert sgt.main(["--ask", str(tmp_path / name), "What color is the ring?"]) == 0
    shade = lambda name: sgt.read_image(tmp_path / name, 32)[0]
    assert shade("half.png").min() == shade("clear.png").min() == shade("gray.png").min() == 1
    assert shade("deep.png").min() < 0.05 and shade("deep.png").max() > 0.95
    assert shade("ink.jpg")[0, 0].min() > 0.7 > 0.3 > shade("ink.jpg")[0, 1].max()
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert sgt.read_image(tmp_path / "turned.jpg", 32)[1].size == (20, 40)

def test_the_verbs_use_the_newest_run_from_anywhere(here, tmp_path, capsys, monkeypatch):
    """A picture written among the files of a run; a seed without effect; a run that is not found."""
    run = ["--run", str(here / "runs/smoke")]
    assert sgt.main(["--ask", "red.png", "Is there an IMAGE?"]) == 0
    first = capsys.readouterr()
    assert len(first.out.splitlines()) == 1 and "instance" in first.err
    monkeypatch.chdir(tmp_path)
    assert sgt.main(["--ask", str(here / "red.png"), "is there a image?", *run]) == 0
    assert capsys.readouterr().out == first.out
    drawn = []
    for seed in ("1", "1", "2"):
        assert sgt.main(["--generate", "Two  RED circles", "--seed", seed, *run]) == 0
        drawn.append(Path("out.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2] and Image.open("out.png").size == (256, 256)
    for name in ("deep/a.png", "b.JPG", "c.webp"):
        assert sgt.main(["--segment", str(here / "red.png"), "--out", name, *run]) == 0
        assert Image.open(name).size == (2 * 256 + 4, 192)
    assert sgt.main(["--segment", str(here / "red.png"), "--proxy", "reconstruction", *run]) == 0
    said = python(HERE / "sgt.py", "--ask", here / "red.png", "is there a naïve 円 ring?", *run,
                  PYTHONIOENCODING="ascii")
    assert said.returncode == 0 and "unknown and left out" in said.stderr

@pytest.mark.parametrize("line", [
    "", "--trian", "--train --generate ring", "--train --base-step 3", "--train --lr fast",
    "--train --lr nan", "--train --depth -1", "--train --preset huge", "--train --preset=",
    "--train --preset smoke --depth 3", "--train --run notes", "--train --run red.png",
    "--train --run=", "--train --run red.png/x", "--train --model none", "--train --proxy depth",
    "--train --proxies none,sky", "--train --ratio 0.05", "--train --device tpu", "--ask red.png",
    "--ask no.png what?", "--ask notes what?", "--ask junk.png what?", "--ask red.png 円",
    "--ask red.png=", "--ask red.png what? --image-size 64", "--segment", "--segment=",
    "--segment red.png --proxy none", "--segment red.png --proxy depth", "--generate=",
    "--segment red.png --model sky", "--generate ring extra", "--generate ring --out .",
    "--generate ring --run nowhere", "--generate ring --out runs/smoke/a.png",
    "--generate ring --out runs/smoke/samples/prompts.png", "--generate ring --out a.txt",
    "--generate ring --out a\0.png", "--generate ring --guidance -1", "--generate ring --seed 1e3",
    "--generate ring --image-size 64", "--generate " + "red_" * 17,
    "--train --run a\0b"])
def test_a_mistake_is_one_line_with_exit_code_two_and_changes_nothing(line, here, capsys):
    """A traceback; a half-written file; a run with other settings than it says."""
    args = [part.replace("_", " ") for part in line.split(" ") if part]
    refused(sgt.main(args), capsys)

def test_the_real_command_refuses_in_one_line_too(here):
    """A warning of a library, or a traceback, that only the real interpreter prints."""
    done = python(HERE / "sgt.py", "--train", "--preset", "smoke", "--depth", "3", "--width", "32")
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
    assert "depth (1 there, 3 now), " in done.stderr or "width (64 there, 32 now)" in done.stderr

# ---- eval.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_the_judge_parses_true_pictures_and_is_not_easily_pleased(preset):
    """A judge whose mistakes look like the model's, or who says yes to anything."""
    cfg = Config(**PRESETS[preset])
    items = evaluation.prompts(cfg, 120)
    images = sgt.render(cfg, [item.scene for item in items]).image
    assert evaluation.pictures_score(items, images)["average"] >= 99
    about = lambda o: (o.shape, o.color, o.size, round(o.x), round(o.y))
    for item, found in zip(items[:40], evaluation.judge(images[:40])):
        assert sorted(map(about, found)) == sorted(map(about, item.scene.things))
    assert evaluation.pictures_score(items, images.roll(7, 0))["average"] < 35
    assert evaluation.pictures_score(items[:40], torch.rand_like(images[:40]))["average"] < 5

def test_prompts_are_judged_by_the_rules_of_geneval():
    """Counts that are not exact; a color on the wrong object; left taken for right."""
    def ok(kind, wanted, found, text=""):
        return evaluation.satisfied(evaluation.Item(kind, scene_of(*wanted), text), found)
    a, b = thing("red", "circle", 8, 16), thing("blue", "square", 24, 16)
    c, d = a._replace(color="blue"), b._replace(color="red")
    assert ok("single", [a], [c, b]) and not ok("single", [a], [b]) and not ok("single", [a], [])
    assert ok("two", [a, b], [d, c]) and not ok("two", [a, b], [a, a])
    assert ok("counting", [a, a], [a, c, b]) and not ok("counting", [a, a], [a, a, a])
    assert ok("colors", [a], [a, b]) and not ok("colors", [a], [c])
    assert ok("attribution", [a, b], [b, a]) and not ok("attribution", [a, b], [c, d])
    text = "a circle left of a square"
    assert ok("position", [a, b], [d, c], text)
    assert not ok("position", [a, b], [a._replace(x=24), b._replace(x=8)], text)
    assert ok("position", [a, b], [a, b, b._replace(x=2)], text)  # some pair lies right

def test_panoptic_quality_of_cases_worked_by_hand():
    """Misses that do not count, a match at half an overlap, nothing divided by nothing."""
    square = torch.zeros(1, 8, 8, dtype=torch.bool)
    square[0, :4, :4] = True
    part, half = square.clone(), square.clone()
    part[0, 3] = False  # 12 of 16 pixels: IoU 0.75
    half[0, 2:] = False  # IoU 0.5 is no match
    nothing, far = square[:0], square.roll(4, 1)
    quality = lambda p, t: evaluation.panoptic_quality([p], [t])
    assert quality(square, square) == quality(nothing, nothing) == 100
    assert quality(part, square) == 75
    assert quality(half, square) == quality(nothing, square) == quality(square, nothing) == 0
    assert math.isclose(quality(torch.cat([square, far]), square), 100 / 1.5, rel_tol=1e-6)
    assert evaluation.panoptic_quality([part, nothing], [square, far]) == 50

def test_true_masks_that_are_drawn_are_found_again_and_score_a_hundred(exact):
    """A mask lost, split or transposed on its way through a picture; a speck that counts."""
    scenes = evaluation.val_scenes(CFG, 30, True)
    _, _, target = sgt.draw_proxy(CFG, "instance", scenes)
    truth = evaluation.true_masks(sgt.render(CFG, scenes).instance)
    target[0, :, 0, 0] = PALETTE[1]
    noisy = (target + 0.1 * torch.randn_like(target)).clamp(0, 1)
    masks = evaluation.masks_of(noisy)
    assert evaluation.panoptic_quality(masks, truth) == 100
    data, results = evaluation.coco_data(truth, 32), evaluation.coco_results(noisy, masks)
    assert math.isclose(evaluation.average_precision(data, results), 100)
    assert all(0.5 < result["score"] < 1 for result in results)
    assert evaluation.average_precision(data, []) == 0
    assert evaluation.average_precision(data, results[:len(results) // 2]) < 60

@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """The scenes of the smoke run as a COCO data set, and what the command said."""
    folder = tmp_path_factory.mktemp("exported") / "new"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert evaluation.main([str(trained / "runs/smoke"), "--export", str(folder)]) == 0
    return folder, said.getvalue()

def test_exported_masks_score_by_default_cocoeval_what_the_command_says(exported, trained, capsys):
    """Masks of another picture; results that COCO's own loader refuses; an AP of our own."""
    folder, said = exported
    report = json.loads((trained / "runs/smoke/report.json").read_text())
    for look in ("plain", "textured"):
        truth = evaluation.COCO(folder / look / "instances.json")
        results = json.loads((folder / look / "results.json").read_text())
        scored = 0.0
        if results:
            measured = evaluation.COCOeval(truth, truth.loadRes(results), "segm")
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
            scored = 100 * measured.stats[0]
        assert re.search(rf"{look}: 8 scenes, {len(results)} masks.* AP {scored:.1f}\n", said)
        instance = sgt.render(CFG, evaluation.val_scenes(Config(), 8, False)).instance
        for image, about in truth.imgs.items():
            picture, _ = sgt.read_image(folder / look / "images" / about["file_name"], 32)
            masks = [truth.annToMask(a) for a in truth.imgToAnns[image]]
            assert np.array_equal(sum(masks), (instance[image - 1] > 0).numpy())
    assert evaluation.main([str(trained / "runs/smoke"), "--export", str(folder)]) == 2

def test_items_are_even_over_kinds_and_their_answers_are_true():
    """A question whose label is wrong; negatives of the wrong kind; scenes seen in training."""
    items = evaluation.pope(CFG, 300)
    assert set(Counter(item.kind for item in items).values()) == {100}
    assert 120 < sum(item.truth == "yes" for item in items) < 180
    assert len({item.scene.key for item in items}) == 300
    for item in items:
        color, shape = item.text[:-1].split()[-2:]
        there = [(o.color, o.shape) for o in item.scene.things]
        assert "/val/" in item.scene.key and ((color, shape) in there) == (item.truth == "yes")
        if item.kind == "adversarial":
            assert color in dict(there) and shape in dict(there).values()

def test_the_answer_without_the_picture_is_the_commonest_in_training():
    """A baseline that has seen the answers."""
    scene = evaluation.val_scenes(CFG, 1, False)[0]
    texts = {"is there a red ring?": ["yes", "no"], "how many plus?": sgt.NUMBERS}
    for text, truths in texts.items():
        items = [evaluation.Item("existence" if "ring" in text else "counting", scene, text, truth)
                 for truth in truths]
        assert sum(evaluation.question_only(CFG, items)) == 1

@torch.no_grad()
def test_recorded_attention_is_that_of_the_model(exact, monkeypatch):
    """Attention computed again without norm, rotation or mask: what the official code shows."""
    (_, model), (image, text, codes) = models(), inputs()
    plain = model(image, text, codes)
    with evaluation.recorded_attention() as seen:
        assert same(model(image, text, codes), plain)
    assert len(seen) == CFG.encoder_depth + CFG.depth
    may = kernels.may_attend(kernels.staircase(CFG.patches, 9, CFG.tokens), seen[-1].shape[-1])
    for weights, allowed in zip(seen, (1, 1, may, may)):
        assert torch.allclose(weights.sum(-1), torch.tensor(1.0), atol=1e-5)
        assert not (weights * ~torch.as_tensor(allowed).bool()).any()
    assert same(model(image, text, codes), plain)
    flat = lambda q, k, v, sees: (v.mean(2, keepdim=True).expand_as(q), None)
    monkeypatch.setattr(kernels, "attention_reference", flat)
    monkeypatch.setattr(sgt, "attention", kernels.attention_sdpa)
    with pytest.raises(AssertionError), evaluation.recorded_attention():
        model(image, text, codes)

def test_a_linear_probe_finds_what_is_linear_and_nothing_else():
    """A probe that is scored on what it was fitted to."""
    torch.manual_seed(0)
    y, nothing = torch.randint(0, 3, (600,)), torch.randn(600, 200)
    linear = F.one_hot(y, 3) + 0.3 * torch.randn(600, 3)
    assert evaluation.probe(linear, y) > 95 and evaluation.probe(nothing, y) < 45
    assert evaluation.probe(linear, y, -linear) < 20

def test_a_pope_file_is_asked_whatever_its_wording_and_its_bytes(here, exported, tmp_path, capsys):
    """Answers against the wrong labels; a score that depends on a question mark or a BOM."""
    file, scores = tmp_path / "ask.jsonl", []
    for text in ("is there a red circle?", "Is there an  RED circle in the image"):
        lines = [{"image": str(exported[0] / "plain/images/000000.png"), "text": text,
                  "label": label, "note": "\u2028"} for label in ("yes", "No ", "no")]
        rows = [json.dumps(line, ensure_ascii=False) for line in lines]
        file.write_bytes("\n\n".join(rows).encode("utf-8-sig"))
        assert evaluation.main(["smoke", "--pope", str(file)]) == 0
        scores.append(capsys.readouterr().out)
    assert scores[0] == scores[1] and "3 questions" in scores[0] and "33.3" in scores[0]
    for row in scores[0].splitlines()[2:6]:
        _, accuracy, *_, yes, neither = [cell.strip() for cell in row.strip("| ").split("|")]
        always = {("100.0", "0.0"): "33.3", ("0.0", "100.0"): "0.0", ("0.0", "0.0"): "66.7"}
        assert accuracy == always[yes, neither]
    for bad in ("{", '{"image": "red.png"}', '{"image": "no.png", "text": "a ring?", "label": "no"}',
                "", "[]", '{"image": "red.png", "text": "a ring?", "label": "perhaps"}'):
        file.write_text(bad)
        assert file.name in refused(evaluation.main(["smoke", "--pope", str(file)]), capsys) or "no.png" in bad

def test_a_study_shows_means_and_each_difference_of_one_recipe_alone(copied, capsys):
    """A mean over runs with other settings, or over one run twice."""
    other = copied.parent / "other"
    shutil.copytree(copied, other)
    report = json.loads((copied / "report.json").read_text())
    report["config"]["seed"] = 1
    sgt_arm, sft = report["models"]["instance"], report["models"]["none"]
    sgt_arm["textured - SFT"] = [7.0, 1.0]
    before = sft["textured"]["average"]
    sft["textured"]["average"] += 10
    (other / "report.json").write_text(json.dumps(report))
    assert evaluation.main(["smoke", "other"]) == 0
    said = capsys.readouterr().out
    assert f"{before + 5:.1f} ± 5.0" in said and re.search(r"\| SGT .*[+-]\d+\.\d \+7\.0 \|", said)
    for wrong in ({"lr": 1.0}, {"seed": 0}):
        changed = {**report, "config": {**report["config"], **wrong}}
        (other / "report.json").write_text(json.dumps(changed))
        refused(evaluation.main(["smoke", "other"]), capsys)

def test_the_html_report_needs_nothing_from_elsewhere(trained):
    """A page that is blank without a network; a table or a curve that was forgotten."""
    page = (trained / "runs/smoke/report.html").read_text("utf-8")
    assert not re.search(r'<script|<link|src="(?!data:)|url\(|://', page)
    assert page.count("<svg") == 5 and page.count("<img") == 2 and page.count("<table") >= 4

def test_speed_is_measured_against_plain_pytorch(monkeypatch):
    """A comparison that crashes, or leaves the kernels in another state."""
    monkeypatch.setattr(sgt, "compile_blocks", lambda module: None)
    before = kernels.CHOSEN, kernels.BF16, kernels.GRAPHS
    said = evaluation.speed(CFG, torch.device("cpu"), 0.0)
    assert (kernels.CHOSEN, kernels.BF16, kernels.GRAPHS) == before
    assert said.count("\n") == 6 and "nan" not in said

# ---- kernels.py ---------------------------------------------------------------------------------

def test_the_check_of_all_backends_passes():
    """A kernel that is wrong on this machine."""
    done = python(HERE / "kernels.py", "--check")
    assert done.returncode == 0 and "BAD" not in done.stdout, done.stdout + done.stderr

@pytest.mark.parametrize("env", [{"SGT_KERNELS": "fast"}, {"SGT_BF16": "yes"}])
def test_an_unknown_setting_of_the_environment_is_refused(env, tmp_path):
    """A typo that silently measures something else."""
    done = python(HERE / "sgt.py", *SMOKE, cwd=tmp_path, **env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not contents(tmp_path)
    assert done.stderr.count("\n") == 1

@pytest.mark.parametrize("backend", ["reference", "bmm", "sdpa"])
@pytest.mark.parametrize("sees", [[3, 3, 3, 0, 5, 6, 9], [[9] * 7, [1, 2, 3, 4, 5, 0, 8]]])
def test_attention_is_its_definition_in_value_and_gradient(backend, sees):
    """A wrong backward pass; NaN from a row that sees nothing; a leak of a bit."""
    torch.manual_seed(0)
    sees, rows = torch.tensor(sees), []
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    for b, h, i in itertools.product(range(2), range(3), range(7)):
        n = int(sees.expand(2, 7)[b, i])
        weights = (q[b, h, i] @ k[b, h, :n].T / 8 ** 0.5).softmax(-1)
        rows.append(weights @ v[b, h, :n] if n else 0 * q[b, h, i])
    exact = torch.stack(rows).view(2, 3, 7, 8)
    out = kernels.attention(q, k, v, sees, backend)
    assert torch.allclose(out, exact, atol=1e-12)
    grad = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(each, (q, k, v), grad) for each in (out, exact))):
        assert torch.allclose(x, y, atol=1e-12)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[:, :, 5], v2[:, :, 5] = 30, -1000
    changed = (kernels.attention(q, k2, v2, sees, backend) != out).any(-1)
    assert torch.equal(changed, (sees > 5).expand(2, 7)[:, None].expand(2, 3, 7))

def test_the_mask_can_be_drawn():
    """A picture of the mask that is not the mask."""
    assert kernels.draw(kernels.staircase(2, 2, 1)) == "##...\n##...\n###..\n####.\n#####"

def test_a_cache_is_written_where_it_is_told():
    """Keys of one sample in the column of another."""
    cache = kernels.KVCache(*torch.zeros(2, 2, 1, 6, 4))
    new = torch.arange(1.0, 17).view(2, 1, 2, 4)
    k, v = cache.put(new, -new, 1)
    assert k.shape == v.shape == (2, 1, 3, 4) and torch.equal(k[:, :, 1:], new) and torch.equal(v, -k)
    k, _ = cache.put(new[:, :, :1] + 90, new[:, :, :1], torch.tensor([0, 5]))
    assert k.shape == (2, 1, 6, 4)
    assert [float(k[0, 0, 0, 0]), float(k[1, 0, 5, 0]), float(k[1, 0, 0, 0])] == [91, 99, 0]

def test_the_optimizer_is_muon_for_each_matrix_and_adamw_for_the_rest(exact):
    """Matrices of a batch that mix; a stack taken for one matrix; a state that is not saved."""
    torch.manual_seed(0)
    module = torch.nn.ParameterList([sgt.matrix(3, 8, 8), sgt.matrix(16, 8), sgt.matrix(8, 24),
                                     sgt.matrix(16, 8), sgt.table(8, 8), sgt.table(5)])
    start = [p.detach().clone() for p in module]
    plain = [w.clone() for w in start]
    momentum = [torch.zeros_like(w) for w in plain]
    rest = [plain[4].requires_grad_(), plain[5].requires_grad_()]
    adam = torch.optim.AdamW(rest, 0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    optimizer = kernels.Optimizer(module, 0.02, 0.02)

    def muon(w, m, g):
        m.lerp_(g, 0.05)
        x = g.lerp(m, 0.95)
        x = x / x.norm()
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        w -= 0.01 * max(1, len(w) / w.shape[1]) ** 0.5 * x
    for step in range(4):
        if step == 2:  # as after an interruption
            saved = optimizer.state_dict()
            optimizer = kernels.Optimizer(module, 0.02, 0.02)
            optimizer.load_state_dict(saved)
        for i, p in enumerate(module):
            p.grad = torch.randn_like(p)
            parts = zip(plain[i], momentum[i], p.grad) if p.ndim == 3 else [(plain[i], momentum[i], p.grad)]
            for part in parts if i < 4 else ():
                muon(*part)
        for w, p in zip(rest, module[4:]):
            w.grad = p.grad.clone()
        adam.step()
        optimizer.step(0.5)
    for p, w, first in zip(module, plain, start):
        assert torch.allclose(p, w, atol=1e-5) and not torch.allclose(p, first, atol=1e-3)

def test_the_compiled_block_is_the_block_for_every_length(exact, monkeypatch, capsys):
    """A graph break; a compilation for each length; a fallback that nobody notices."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, fullgraph=True))
    (tokenizer, model), (_, fast) = models(), models()
    sgt.compile_blocks(fast)
    for batch in (sgt.make_batch(CFG, "base", 0), sgt.make_batch(CFG, "instance", 0)):
        for each in (model, fast):
            each.zero_grad()
            sgt.losses(each, tokenizer, batch)["loss"].backward()
        for p, q in zip(model.parameters(), fast.parameters()):
            assert torch.allclose(p.grad, q.grad, atol=1e-4, rtol=1e-3)
    assert "not compiled" not in capsys.readouterr().out

def test_what_does_not_compile_runs_eagerly_and_says_so_once(monkeypatch, capsys):
    """A run that ends because a laptop has no C++ compiler."""
    def broken(*args, **options):
        raise RuntimeError("no\ncompiler")
    monkeypatch.setattr(torch, "compile", lambda *args, **options: broken)
    double = kernels.compiled(lambda x: 2 * x)
    assert double(2) == 4 and double(3) == 6
    assert capsys.readouterr().out.count("not compiled") == 1

# ---- hostile inputs -----------------------------------------------------------------------------

HOSTILE = ["", "-1", "0", "nan", "1e400", "x", "9" * 30, "--", "\0", "💥", "1,2", "../..", "[" * 5000]
JSON = [None, [], {}, "x", -1, 0.5, True, "", 1e308, [[]], "3"]

def test_nothing_that_a_person_types_or_edits_ends_in_a_traceback(copied, capsys):
    """Whatever the tests above did not think of."""
    rng, folder, faults = random.Random(0), copied.parent.parent, []
    names = [field.name for field in dataclasses.fields(Config) if field.name != "threads"]
    config, log = (json.loads((copied / name).read_text()) for name in ("config.json", "report.json"))
    entry = {"image": "red.png", "text": "is there a ring?", "label": "yes"}

    def attempt(about, main, *args):
        before = contents(folder)
        try:
            code = main(list(args))
        except SystemExit as e:
            code = e.code
        except Exception as e:
            code = f"{type(e).__name__}: {e}"
        after = contents(folder)
        (folder / "out.png").unlink(missing_ok=True)
        after.pop("out.png", None)
        if code not in (0, 2) or after != before or "Traceback" in capsys.readouterr().err:
            faults.append((about, str(code)[:100]))
    for name in names:
        flag, value = "--" + name.replace("_", "-"), rng.choice(HOSTILE)
        attempt((flag, value), sgt.main, *SMOKE, f"{flag}={value}")
        attempt(("use", flag, value), sgt.main, "--generate", "ring", f"{flag}={value}")
    for value in HOSTILE:
        for verb in (["--ask", value, "a ring"], ["--ask", "red.png", value], ["--segment", value],
                     ["--generate", value], ["--generate", "ring", "--run", value],
                     ["--segment", "red.png", "--proxy", value], ["--ask", "red.png", "a", value],
                     ["--generate", "ring", "--model", value]):
            attempt(verb, sgt.main, *verb)
        attempt(("eval", value), evaluation.main, value)
    for value in JSON + [{"config": log["config"], "models": {}}]:
        for file, main, args in (("config.json", sgt.main, ["--ask", "red.png", "a ring"]),
                                 ("report.json", evaluation.main, ["smoke"])):
            kept = (copied / file).read_bytes()
            texts = [json.dumps(value), json.dumps(value)[:-1], "[" * 9999]
            texts += [json.dumps({**config, name: value}) for name in rng.sample(names, 6)]
            for text in texts:
                (copied / file).write_text(text)
                attempt((file, text[:40], value), main, *args)
            (copied / file).write_bytes(kept)
        for text in [json.dumps(value), "[" * 9999, *(json.dumps({**entry, k: value}) for k in entry)]:
            (folder / "q.jsonl").write_text(text)
            attempt(("pope", text[:60]), evaluation.main, "smoke", "--pope", "q.jsonl")
    for file in ("base.safetensors", "tokenizer.safetensors", "instance.safetensors", "log.jsonl"):
        kept = (copied / file).read_bytes()
        for data in (b"", kept[:100], kept[:-1], bytes(200), rng.randbytes(500)):
            (copied / file).write_bytes(data)
            attempt((file, len(data)), sgt.main, "--ask", "red.png", "a ring")
            attempt((file, len(data)), evaluation.main, "smoke", "--pope", "red.png")
        (copied / file).write_bytes(kept)
    assert not faults, f"{len(faults)}: {faults[:40]}"
