"""The specification of sgt.py, kernels.py and eval.py, in the order of the files. `python -m pytest -q` runs it.

Names are sentences; each docstring names the bug that the test would catch.
"""
import base64
import contextlib
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
import weakref
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map

import eval as benchmark
import kernels
import sgt
from sgt import PRESETS, PROXIES, QUESTIONS, TEXT, Config, Text, Thing

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")           # of pycocotools, for each mask
CFG = Config(**{**PRESETS["smoke"], "seed": 3, "row_len": 88})
DRAWN = [name for name in PROXIES if name != "none"]

def models(cfg=CFG, seed=0):
    torch.manual_seed(seed)
    tokenizer, model = sgt.VisionTokenizer(cfg), sgt.UnifiedModel(cfg)
    for p in model.parameters():                # heads and block outputs start at zero: give everything a say
        p.data += 0.2 * torch.randn_like(p) * (p.std() + 0.05)
    return tokenizer.requires_grad_(False), model

@pytest.fixture
def exact(monkeypatch):
    """fp32 everywhere, for comparisons to rounding."""
    monkeypatch.setattr(sgt, "compute_dtype", lambda device: torch.float32)

def known(text):
    """Whether a text is made of words of the lexicon and punctuation."""
    return all(i >= 259 or TEXT.pieces[i] in b"?,." for i in TEXT.encode(text))

def thing(color, shape, x, y, size="big", index=0):
    return Thing(shape, color, size, x, y, {"small": 3.5, "big": 5.5}[size], index)

# ---- config ------------------------------------------------------------------------------------------------

def test_every_preset_is_valid_and_every_setting_has_a_help_text():
    """A preset that its own validation refuses; a field whose comment does not reach --help."""
    for name, fields in PRESETS.items():
        Config(**fields, data="coco:photos" if name.startswith("coco") else "scenes").validate()
    text = sgt.parser().format_help()
    for field in dataclasses.fields(Config):
        assert sgt.flag(field.name) in text

@pytest.mark.parametrize("field, value, says", [
    ("image_size", 62, "divisible"), ("fsq_levels", "8,x", "levels"), ("width", 100, "head_dim"), ("shapes", 99, "shapes"),
    ("proxies", "none,sky", "sky"), ("proxies", "none,none", "once"), ("lr", float("nan"), "lr"), ("lr", 0.0, "lr"),
    ("base_steps", -1, "base_steps"), ("device", "tpu", "device"), ("schedule", "later", "schedule"), ("seed", -1, "seed"),
    ("seed", 10**20, "seed"), ("threads", -1, "threads"), ("patch", 0, "patch"), ("see_patch", 0, "see_patch"),
    ("arm_scenes", 1, "arm_scenes"), ("arm_scenes", 3, "give 2"), ("vqa_batch", 5000, "4096"), ("head_dim", 4, "head_dim"), ("max_objects", 1, "max_objects"), ("colors", 2, "colors"), ("tok_reach", 0, "tok_reach"), ("device", "cuda:999", "device"),
    ("width", 2**14, "weights"), ("width", 2**30, "width"), ("sample_steps", 10**6, "sample_steps"), ("depth", 10**400, "depth"), ("patch", 4.0, "patch"), ("device", 1, "device")])
def test_a_setting_that_cannot_work_is_refused_with_its_name(field, value, says):
    """A crash deep inside torch, an hour later."""
    with pytest.raises(sgt.UserError, match=says):
        Config(**{**PRESETS["smoke"], field: value}).validate()

def test_a_gpu_may_be_named_with_or_without_its_number(monkeypatch):
    """`--device cuda` as a traceback: torch wants a number."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.cuda._utils._get_device_index(device)))
    for name in ("cuda", "cuda:1"):
        sgt.choose_device(Config(device=name))
    assert chosen == [0, 1]
    with pytest.raises(sgt.UserError, match="cuda:2"):
        sgt.choose_device(Config(device="cuda:2"))

# ---- scenes ------------------------------------------------------------------------------------------------

def test_a_scene_depends_on_seed_split_and_index_alone():
    """Scenes that change with the batch they are drawn in; train and validation sharing scenes."""
    many, one = sgt.sample_scenes(CFG, "train", np.arange(50)), sgt.sample_scenes(CFG, "train", np.array([17]))
    for name, value in vars(one).items():
        assert np.array_equal(vars(many)[name][17:18], value), name
    for other in (sgt.sample_scenes(CFG, "val", np.arange(50)),
                  sgt.sample_scenes(dataclasses.replace(CFG, seed=4), "train", np.arange(50))):
        assert np.mean([np.array_equal(other.x[i], many.x[i]) for i in range(50)]) < 0.2
    u = sgt.uniforms(0, "train", np.arange(2000), 50)
    assert abs(u.mean() - 0.5) < 0.005 and abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.1 and u.min() >= 0 and u.max() < 1

@pytest.mark.parametrize("preset", ["smoke", "base"])
def test_objects_lie_inside_and_apart_but_for_the_overlapping_pair(preset):
    """Shapes cut off by the border; two objects merging into one blob; nothing to ask about occlusion."""
    cfg = Config(**PRESETS[preset])
    scenes, overlapping = sgt.sample_scenes(cfg, "val", np.arange(400)), 0
    for b in range(400):
        objects = sgt.things(scenes, b)
        assert 1 <= len(objects) <= cfg.max_objects
        touching = []
        for i, o in enumerate(objects):
            assert o.radius <= o.x <= cfg.image_size - o.radius and o.radius <= o.y <= cfg.image_size - o.radius
            touching += [(o, p) for p in objects[:i] if max(abs(o.x - p.x), abs(o.y - p.y)) < o.radius + p.radius]
        assert len(touching) <= 1 and all(o.color != p.color for o, p in touching)
        overlapping += len(touching)
    assert overlapping > 30
    assert set(scenes.count) == {1, 2, 3, 4}

def test_rendering_agrees_with_its_own_labels():
    """An instance map that does not lie on the object; the wrong object in front."""
    scenes = sgt.sample_scenes(CFG, "val", np.arange(200))
    r = sgt.render(CFG, scenes)
    assert r.image.min() >= 0 and r.image.max() <= 1 and r.image.shape == (200, 3, 32, 32)
    for b in range(200):
        for o in sgt.things(scenes, b):
            mask = r.instance[b] == o.index + 1
            assert mask.sum() >= 3
            assert (r.category[b][mask] == sgt.SHAPE_NAMES.index(o.shape) + 1).all()
            color = r.image[b][:, mask].mean(1)
            assert (color - torch.tensor(sgt.COLORS[o.color])).abs().max() < 0.25
    order = np.argsort(-scenes.y[:, 0])[:1]            # a nearer object must not be farther than one above it
    depths = [float(r.depth[b][r.instance[b] == m + 1].mean()) for b in order for m in range(int(scenes.count[b]))]
    assert depths == sorted(depths)

# ---- language ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["is there a red circle?", "", "a  b ?", " x", "naïve Ångström, 日本 \n\t🙂", "?,.", "redcircle"])
def test_text_survives_encoding_whatever_it_says(text):
    """Lost spaces, lost case, unknown words."""
    assert TEXT.decode(TEXT.encode(text)) == text

def test_everything_the_scenes_say_is_made_of_known_words_and_fits():
    """A template word missing from the lexicon turns into bytes and overflows the row."""
    scenes = sgt.sample_scenes(Config(**PRESETS["base"]), "train", np.arange(600))
    for b in range(600):
        objects, rng = sgt.things(scenes, b), random.Random(b)
        texts = list(sgt.captions(objects).values()) + [sgt.describe(objects, random.Random(b), 64)]
        texts += [t for _, ask in QUESTIONS.values() for t in ask(objects, rng, CFG) or ()]
        for text in texts:
            assert known(text) and TEXT.decode(TEXT.encode(text)) == text, text
        assert all(len(TEXT.encode(t)) < 16 for t in sgt.captions(objects).values())

def test_questions_about_a_known_scene_have_the_answers_a_person_gives():
    """Left and right swapped, wrong counts, the hidden object called the front one."""
    scene = [thing("red", "circle", 8, 8), thing("blue", "square", 24, 8, "small"), thing("red", "square", 24, 24)]
    truth = {"how many squares?": "two", "how many red objects?": "two", "how many objects?": "three",
             "what color is the circle?": "red", "what shape is the blue object?": "square",
             "where is the circle?": "top left", "where is the red square?": "bottom right",
             "where is the circle from the blue square?": "left",
             "where is the red square from the blue square?": "below",
             "is the circle bigger or smaller than the blue square?": "bigger",
             "is the blue square bigger or smaller than the red square?": "smaller",
             "are there more squares than circles?": "yes", "are there more circles than red objects?": "no",
             "how many squares plus one?": "three", "how many circles plus red objects?": "three",
             "is there a red square?": "yes", "is there a blue circle?": "no"}
    asked = {}
    for i in range(3000):
        for _, ask in QUESTIONS.values():
            asked.update([ask(scene, random.Random(i), CFG) or ("", "")])
    for question, answer in truth.items():
        assert asked[question] == answer, question
    assert sgt.relation(thing("red", "bar", 10, 10), thing("red", "bar", 16, 15)) is None
    pair = [thing("red", "circle", 10, 10, index=0), thing("blue", "ring", 16, 10, index=1)]
    assert {sgt.ask_occlusion(pair, random.Random(i), CFG) for i in range(9)} == {
        ("is the circle in front of the ring?", "no"), ("is the ring in front of the circle?", "yes")}

def test_captions_of_known_scenes_cover_the_six_kinds_of_geneval():
    """A caption that does not describe its picture."""
    a, b = thing("red", "circle", 8, 16), thing("blue", "square", 24, 16)
    assert sgt.captions([a])["colors"] == "a red circle" and sgt.captions([a])["single"] == "a circle"
    two = sgt.captions([a, b])
    assert two["two"] == "a circle and a square" and two["position"] == "a circle left of a square"
    assert two["attribution"] == "a red circle and a blue square"
    assert sgt.captions([a, thing("green", "circle", 8, 28)])["counting"] == "two circles"
    assert sgt.plural("cross") == "crosses"

def test_prompts_name_every_direction():
    """Objects are sorted by height: in that order nothing is ever below anything."""
    prompts, _ = benchmark.geneval_prompts(CFG, 240)
    words = [p.text for p in prompts if p.kind == "position"]
    assert all(any(word in text for text in words) for word in ("left of", "right of", "above", "below"))
    for p in prompts:                                  # named in either order, the true picture fulfils them
        assert benchmark.satisfied(p, p.objects), p

def test_yes_and_no_are_balanced_and_every_kind_of_question_appears():
    """A kind that answers itself without the image."""
    items = benchmark.questions(CFG, "train", 4000)
    for kind in sgt.kinds_of(CFG):
        answers = [i.truth for i in items if i.kind == kind]
        assert len(answers) == 400
        if set(answers) == {"yes", "no"}:
            assert 0.4 < answers.count("yes") / 400 < 0.6, kind
    blind = benchmark.blind_baselines(CFG, items)["question_only"]
    assert blind["average"] < 50

def test_a_dialogue_supervises_answers_and_their_end_token_only():
    """Loss on the questions, or no loss on the end token (one of the official code's mistakes)."""
    scenes = sgt.sample_scenes(CFG, "train", np.arange(20))
    for b in range(20):
        ids, supervised = sgt.dialogue(CFG, sgt.things(scenes, b), sgt.word_rng(scenes, b), 96)
        assert len(ids) == len(supervised) <= 96 and ids[-1] == Text.END
        text = ""
        for token, counts in zip(ids, supervised):
            text += ("|" if token == Text.END else TEXT.pieces[token].decode()) if counts else "_"
        for said in re.findall(r"[^_]+", text):
            assert said.endswith("|") and "?" not in said
        assert sum(token == Text.END for token in ids) >= 4

# ---- proxies -----------------------------------------------------------------------------------------------

def test_all_prompts_have_six_tokens():
    """A proxy that gains or loses because its prompt is longer: one of the paper's confounds."""
    for name in DRAWN:
        for prompt in PROXIES[name].prompts:
            prompt = prompt.format(name="red circle")
            assert len(TEXT.encode(prompt)) == 6 and known(prompt), prompt

@pytest.mark.parametrize("name", DRAWN)
def test_the_supervised_tokens_are_those_of_the_proxy_target(name, monkeypatch):
    """Until commit e004548 the official code supervised the input image in place of the target."""
    tokenizer, model = models()
    tokenizer.to_code.data *= 4
    batch = sgt.make_batch(CFG, "arm", 5, 2, 2, name, 4)
    supervised, original = [], F.cross_entropy

    def record(logits, target, **kwargs):
        supervised.append(target)
        return original(logits, target, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", record)
    sgt.losses(model, tokenizer, batch)
    index = 5 * 4096 + 2048 + np.arange(4)
    scenes = sgt.sample_scenes(CFG, "arm", index)
    rendered = sgt.render(CFG, scenes)
    target = PROXIES[name].target(CFG, scenes, rendered)
    ids = supervised[0].view(-1, CFG.tokens)[2:]
    assert torch.equal(ids, tokenizer.encode(target))
    source = batch.images[2:]
    assert torch.equal(source, rendered.image) == (PROXIES[name].source is None)
    if PROXIES[name].target is not sgt.original:
        assert not torch.equal(ids, tokenizer.encode(source))

def test_arms_see_the_same_images_and_replay_and_differ_in_the_target_alone():
    """A difference between arms that is not the proxy."""
    none, instance = sgt.make_batch(CFG, "arm", 2, 4, 4), sgt.make_batch(CFG, "arm", 2, 4, 4, "instance", 6)
    depth = sgt.make_batch(CFG, "arm", 2, 4, 4, "depth", 6)
    rows = len(none.ids)
    for name in ("ids", "slots", "positions"):
        assert torch.equal(getattr(none, name), getattr(instance, name)[:rows])
    assert all(torch.equal(a, b[:rows]) for a, b in zip(none.layout, instance.layout))
    assert torch.equal(none.images, instance.images[:4]) and torch.equal(none.targets, instance.targets[:4])
    assert torch.equal(none.text_target, instance.text_target)
    assert torch.equal(none.is_masked, instance.is_masked[:4]) and torch.equal(instance.is_masked, depth.is_masked)
    assert torch.equal(instance.images, depth.images) and not torch.equal(instance.targets[4:], depth.targets[4:])

def test_shuffled_targets_are_masks_of_other_images():
    """A control that is no control."""
    scenes = sgt.sample_scenes(CFG, "arm", np.arange(6))
    r = sgt.render(CFG, scenes)
    assert torch.equal(sgt.shuffled(CFG, scenes, r)[1], sgt.instance(CFG, scenes, r)[0])

# ---- tokenizer ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", ["8,5,5,5", "2,3,4", "8,8,8,5"])
def test_every_code_survives_the_quantizer_even_in_bf16(levels):
    """Levels of an even and an odd count that round differently; ids that bf16 moves to a neighbour."""
    tokenizer = sgt.VisionTokenizer(dataclasses.replace(CFG, fsq_levels=levels))
    ids = torch.arange(dataclasses.replace(CFG, fsq_levels=levels).codebook)
    code = tokenizer.code(ids)
    assert code.abs().max() < 1 and len(code.unique(dim=0)) == len(ids)
    for dtype in (torch.float32, torch.bfloat16):
        again, back = tokenizer.quantize(torch.atanh(code).to(dtype))
        assert torch.equal(back, ids) and torch.allclose(again, code)
    _, edge = tokenizer.quantize(torch.tensor([[1e4] * len(tokenizer.levels), [-1e4] * len(tokenizer.levels)]))
    assert edge.tolist() == [len(ids) - 1, 0]

def test_the_quantizer_passes_gradients_straight_through():
    """A tokenizer whose encoder never learns."""
    z = torch.zeros(3, 4, requires_grad=True)
    code, _ = sgt.VisionTokenizer(CFG).quantize(z)
    code.sum().backward()
    assert torch.allclose(z.grad, torch.ones(3, 4))          # d tanh(0) = 1

def test_palette_colors_survive_a_trained_tokenizer_and_masks_come_back():
    """Instance colors that the tokenizer confuses: the ceiling of every segmentation score."""
    torch.manual_seed(0)
    tokenizer = sgt.VisionTokenizer(CFG)
    optimizer = kernels.Optimizer(tokenizer, 0.02, 0.004)
    scenes = sgt.sample_scenes(CFG, "tokenizer", np.arange(32))
    r = sgt.render(CFG, scenes)
    target = sgt.instance(CFG, scenes, r)
    masks, truth = benchmark.masks_of(target, CFG.max_objects), benchmark.true_masks(r.instance)
    assert benchmark.panoptic_quality(masks, truth)["pq"] > 99.9
    for step in range(250):
        loss = sgt.tokenizer_loss(tokenizer, target)["mse"]
        tokenizer.zero_grad()
        loss.backward()
        optimizer.step(sgt.rate_factor(step, 250))
    drawn = tokenizer.decode(tokenizer.encode(target))
    palette = sgt.PALETTE[:CFG.max_objects + 1]
    assert (benchmark.nearest(drawn, palette) == benchmark.nearest(target, palette)).float().mean() > 0.99
    assert benchmark.panoptic_quality(benchmark.masks_of(drawn, CFG.max_objects), truth)["pq"] > 80

# ---- attention and the model -------------------------------------------------------------------------------

def test_the_mask_of_packed_documents_is_the_one_of_the_paper():
    """Text that sees the future, a condition that sees the target, a document that sees its neighbour."""
    cfg = dataclasses.replace(CFG, image_size=16, patch=8)    # 4 tokens an image
    rows = sgt.Rows(cfg, 1, 14)
    end = rows.add(0, 0, [5, 6], patches=True, codes=True)    # [patches][prompt][target]
    rows.add(0, end, [7], patches=False)
    drawn = kernels.draw(rows.tensors()[3])
    assert drawn.split() == ["####.........."] * 4 + ["#####.........", "######........"] + ["##########...."] * 4 + [
        "..........#..."] + [".............."] * 3

def random_layout(B, S, L):
    lo = torch.randint(0, L, (B, S), dtype=torch.int32)
    return kernels.Layout(lo, (lo + torch.randint(0, L, (B, S), dtype=torch.int32)).clamp(max=L))

def test_the_transpose_of_a_layout_says_which_rows_see_a_column():
    """A backward pass over columns that skips rows, or counts rows that see nothing."""
    for seed in range(5):
        layout = kernels.random_layout(np.random.default_rng(seed), 3, 150)
        seen = layout.may_attend(150)[:, 0].transpose(1, 2)                                       # (B, columns, rows)
        row = torch.arange(150)
        assert torch.equal(seen, (row >= layout.first[..., None]) & (row < layout.last[..., None]))

def test_every_backend_agrees_with_float64_and_leaks_nothing(capsys):
    """A wrong kernel; one that reads what it has not written, or what a row may not see."""
    try:
        assert kernels.check(3) == 0
        assert re.search(r"bmm +bfloat16", capsys.readouterr().out)
        with pytest.MonkeyPatch.context() as patch:           # and a check that cannot fail is none
            patch.setitem(kernels.BACKENDS, "bmm", lambda q, k, v, layout: kernels.attention_sdpa(q, k, v.roll(1, 2), layout))
            assert kernels.check(1) == 1 and "BAD" in capsys.readouterr().out
    finally:
        torch.use_deterministic_algorithms(False)

@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed (it comes with torch for CUDA)")
@pytest.mark.parametrize("capability, shared", [(89, 101376), (90, 232448)])
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_here(capability, shared, monkeypatch):
    """A kernel that only the interpreter accepts; a tile that needs more shared memory than an RTX 4090 or H100 has."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kinds_of, made = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", int: "i32", float: "fp32"}, []

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, num_warps, **constants):
            kinds = [kinds_of[x.dtype if isinstance(x, torch.Tensor) else type(x)] for x in args] + ["constexpr"] * len(constants)
            aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
            source = ASTSource(fn=self.kernel, signature=dict(zip(self.kernel.arg_names, kinds)), constexprs=constants, attrs=aligned)
            done = kernels.triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
            assert done.asm["cubin"] and done.metadata.shared <= shared
            made.append(done)
    for name in ("forward_kernel", "rows_kernel", "columns_kernel"):
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name)))
    layout = kernels.random_layout(np.random.default_rng(0), 2, 70)
    for dtype, D in ((torch.float32, 64), (torch.bfloat16, 16), (torch.bfloat16, 64)):
        q = torch.zeros(2, 2, 70, D, dtype=dtype)
        out, lse = kernels.triton_forward(q, q, q, *layout)
        kernels.triton_backward(q, q, q, out, lse, q, *layout)
    assert len(made) == 9

@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed (it comes with torch for CUDA)")
@pytest.mark.skipif(tuple(map(int, np.__version__.split(".")[:2])) >= (2, 3), reason="Triton's interpreter needs numpy < 2.3")
def test_the_triton_kernels_agree_with_float64_in_the_interpreter():
    """A GPU kernel that nobody ran."""
    done = subprocess.run([sys.executable, str(HERE / "kernels.py"), "--check"], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and re.search(r"triton +float32", done.stdout), done.stdout + done.stderr

def test_the_model_does_the_same_with_every_backend(exact, monkeypatch):
    """A backend that is fast on another model."""
    tokenizer, model = models()
    batch, found = sgt.make_batch(CFG, "arm", 0, 2, 2, "instance", 2), {}
    for name in ("", *kernels.backends_here(torch.device("cpu"))):
        monkeypatch.setattr(kernels, "CHOSEN", name)
        model.zero_grad()
        loss = sum(sgt.losses(model, tokenizer, batch).values())
        loss.backward()
        found[name] = loss.item(), model.see.stem_in.grad.clone()
    for loss, grad in found.values():
        assert abs(loss - found["reference"][0]) < 1e-5
        assert torch.allclose(grad, found["reference"][1], atol=1e-5)

def test_a_recorded_step_is_the_step_where_there_is_no_graph():
    """Arguments that get lost on their way through a nested structure."""
    layout = random_layout(1, 3, 3)
    step = kernels.GraphedStep(lambda batch, scale: (batch[0].hi * scale, batch[1]))
    got = step((layout, 5), torch.tensor(2))
    assert torch.equal(got[0], layout.hi * 2) and got[1] == 5

def test_the_split_baseline_is_the_same_attention_where_it_applies():
    """A baseline that is beaten because it computes something else."""
    blocks, spans = [("image", 5), ("text", 4), ("image", 5)], np.zeros((4, 2, 14), np.int32)
    for row in range(2):
        kernels.write_document(spans, row, 0, blocks)
    layout = kernels.Layout(*map(torch.from_numpy, spans))
    q, k, v = torch.randn(3, 2, 2, 14, 8)
    want = kernels.attention_reference(q, k, v, layout)[0]
    assert torch.allclose(kernels.attention_split(q, k, v, blocks), want, atol=1e-5)

@pytest.mark.parametrize("name", ["fast"] + ["flex"] * (not torch.cuda.is_available()))
def test_an_unknown_backend_is_a_mistake_of_the_user(name):
    """Measuring something else than what was asked for; FlexAttention, which has no backward on a CPU, in a traceback."""
    done = subprocess.run([sys.executable, str(HERE / "sgt.py"), "--help"], env={**os.environ, "SGT_KERNELS": name},
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and name in done.stderr

def test_triton_refuses_heads_that_it_has_no_tiles_for(capsys):
    """A traceback out of a compiler, or half of a head left out."""
    with pytest.raises(SystemExit):
        kernels.attention(*torch.zeros(3, 1, 2, 16, 24), random_layout(1, 16, 16), "triton")
    assert capsys.readouterr().err == "error: Triton takes heads of 16, 32, 64 or 128 on a GPU, not of 24 on cpu; leave out SGT_KERNELS=triton\n"

def test_the_benchmark_measures_everything_it_prints():
    """A table with a hole; a ratio of nothing."""
    found = kernels.bench(0.0, CFG)
    table = kernels.show(found)
    for group in ("attention, forward + backward", "train step", "64 pictures, guidance"):
        assert all(0 < t < 60 for t in found[group].values()) and group in table
        assert f"{found[group]['ours'] * 1000:.2f}" in table
    assert 0 < found["share of the matrix rate"] < 1

def test_attention_agrees_with_float64_in_value_and_gradient_and_empty_rows_are_zero():
    """A wrong backward; NaN from rows that may attend to nothing."""
    torch.manual_seed(0)
    layout = random_layout(3, 21, 21)
    layout.hi[0, 3] = layout.lo[0, 3]
    inputs = [torch.randn(3, 2, 21, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    want, weights = kernels.attention_reference(*inputs, layout)
    assert torch.allclose(weights.sum(-1)[:, 0], (layout.hi > layout.lo).double()) and want[0, :, 3].abs().max() == 0
    row = weights[1, 0, 7] * 0                               # the definition, by hand, for one row
    lo, hi = int(layout.lo[1, 7]), int(layout.hi[1, 7])
    row[lo:hi] = torch.softmax(inputs[0][1, 0, 7] @ inputs[1][1, 0, lo:hi].T / 8 ** 0.5, -1)
    assert torch.allclose(weights[1, 0, 7], row)
    out = torch.randn_like(want)
    for path in (kernels.attention, kernels.attention_sdpa):
        got = path(*inputs, layout)
        assert torch.allclose(got, want, atol=1e-12) and got[0, :, 3].abs().max() == 0
        for a, b in zip(torch.autograd.grad(got, inputs, out), torch.autograd.grad(want, inputs, out, retain_graph=True)):
            assert torch.allclose(a, b, atol=1e-12)

def test_what_a_row_may_not_see_does_not_change_it_by_a_bit(exact):
    """A leak: the target into the condition, the future into the past, one document into another, padding into anything."""
    tokenizer, model = models()
    batch = sgt.make_batch(CFG, "arm", 0, 2, 2, "instance", 2)

    def hidden(ids):
        x = model.embed_rows(ids, batch.slots, model.see(batch.images), batch.patch_at)
        return model.trunk(x, batch.positions, batch.layout)
    before = hidden(batch.ids)
    for row in range(len(batch.ids)):
        tokens = (batch.slots[row] >= CFG.image_slot).nonzero()[:, 0]      # not the places that patches overwrite
        for column in [*tokens[[0, len(tokens) // 3, len(tokens) // 2, -1]].tolist(), CFG.row_len - 1]:
            ids = batch.ids.clone()
            ids[row, column] = 300 if ids[row, column] != 300 else 301
            changed = (hidden(ids) != before).any(-1)                                             # (B, S)
            sees = (batch.layout.lo <= column) & (column < batch.layout.hi)
            sees[torch.arange(len(sees)) != row] = False
            sees[row, column] = True                          # a token that nobody sees still sees itself
            assert not (changed & ~sees).any(), (row, column)
            if sees[row].sum() > 1:
                assert (changed & sees).any(), (row, column)

def test_the_first_losses_are_those_of_a_uniform_guess():
    """A wrong vocabulary, a loss on the wrong positions, a bad start."""
    torch.manual_seed(0)
    parts = sgt.losses(sgt.UnifiedModel(CFG), sgt.VisionTokenizer(CFG), sgt.make_batch(CFG, "arm", 0, 2, 2, "depth", 2))
    assert math.isclose(parts["text"].item(), math.log(len(TEXT)), rel_tol=1e-4)
    assert math.isclose(parts["t2i"].item(), math.log(CFG.codebook), rel_tol=1e-4)
    assert math.isclose(parts["proxy"].item(), math.log(CFG.codebook), rel_tol=1e-4)

def test_the_image_loss_is_on_masked_tokens_only():
    """Copying visible tokens counted as learning (a mistake seen in public MaskGIT code)."""
    tokenizer, model = models()
    batch = sgt.make_batch(CFG, "arm", 1, 2, 4, "instance", 4)
    seen = []

    def keep(h, head, target):
        h.retain_grad()
        seen.append(h)
        return sgt.token_loss(h, head, target)
    torch.nn.init.normal_(model.image_head)                  # zero at the start, and then nothing flows back
    parts = sgt.losses(model, tokenizer, batch, token_loss=keep)
    (parts["t2i"] + parts["proxy"]).backward()
    assert torch.equal(seen[0].grad.abs().sum(-1) > 0, batch.is_masked.flatten())
    assert 0 < batch.is_masked.float().mean() < 1 and batch.is_masked.any(1).all()

def test_the_dense_loss_reaches_the_understanding_path():
    """The method itself: the proxy loss must train what sees."""
    tokenizer, model = models()
    sgt.losses(model, tokenizer, sgt.make_batch(CFG, "arm", 1, 2, 2, "instance", 4))["proxy"].backward()
    assert model.see.stem_in.grad.abs().sum() > 0 and model.text_head.grad is None

def test_at_first_the_proxy_may_train_the_image_head_alone():
    """A loss of 16 nats of colors never seen, which wrecks what sees; a gate that changes the loss or stays shut."""
    tokenizer, model = models()
    for reach in (0.0, 1.0):
        model.zero_grad()
        loss = sgt.losses(model, tokenizer, sgt.make_batch(CFG, "arm", 1, 2, 2, "instance", 4, reach))["proxy"]
        loss.backward()
        assert model.image_head.grad.abs().sum() > 0 and bool(model.see.stem_in.grad.abs().sum() > 0) == bool(reach)
        assert reach or loss == sgt.losses(model, tokenizer, sgt.make_batch(CFG, "arm", 1, 2, 2, "instance", 4))["proxy"]

def test_one_batch_can_be_learned_by_heart():
    """Anything that keeps the model from fitting: a detached path, a wrong target, a dead optimizer."""
    cfg = dataclasses.replace(CFG, width=96, fsq_levels="5,5,5")
    tokenizer, _ = models(cfg)
    model = sgt.UnifiedModel(cfg)
    batch = sgt.make_batch(cfg, "arm", 0, 2, 2, "instance", 2)
    optimizer = kernels.Optimizer(model, 0.02, 0.01)
    for step in range(90):
        parts = sgt.losses(model, tokenizer, batch)
        model.zero_grad()
        sum(parts.values()).backward()
        optimizer.step(sgt.rate_factor(step, 90))
    assert all(v < 0.2 for v in parts.values()), parts

def test_muon_in_batches_is_muon_one_by_one():
    """Matrices of a batch that mix; a step that does not make singular values equal."""
    g = torch.randn(4, 48, 24)
    together = kernels.orthogonalize(g)
    for i in range(4):
        assert torch.allclose(together[i], kernels.orthogonalize(g[i]), atol=3e-2)
    values = torch.linalg.svdvals(together.float())
    assert 0.5 < values.min() and values.max() < 1.5

# ---- sampling ----------------------------------------------------------------------------------------------

def test_everything_is_masked_at_first_nothing_at_last_and_what_is_kept_stays():
    """An inverted schedule; tokens that change after they were fixed (mistakes seen in public MaskGIT code)."""
    tokenizer, model = models()
    seen = []
    sgt.generate(model, tokenizer, [[1, 300], [1, 301, 302]], guidance=2.0, steps=5,
                 on_step=lambda ids, is_masked: seen.append((ids.clone(), is_masked)))
    counts = [int(m[0].sum()) for _, m in seen]
    N = CFG.tokens
    assert counts == [int(N * math.cos(math.pi / 2 * i / 5) + 1e-6) for i in range(5)] + [0]
    for (ids, masked), (later, _) in zip(seen, seen[1:]):
        assert torch.equal(ids[~masked], later[~masked])
    assert (seen[-1][0] >= len(TEXT)).all() and (seen[-1][0] < model.mask_id).all()

def test_guidance_one_is_the_conditional_model_and_seeds_decide_the_picture(exact):
    """Guidance that extrapolates in the wrong direction; a picture that cannot be drawn twice."""
    tokenizer, model = models()
    model.image_head.data *= 50                              # an opinion that noise does not drown
    draw = lambda **kw: sgt.generate(model, tokenizer, [[1, 300], [1, 305, 306]], steps=4, **kw)
    assert torch.equal(draw(guidance=1.0), draw(guidance=1.0 + 1e-7))
    assert not torch.equal(draw(guidance=1.0), draw(guidance=4.0))
    assert not torch.equal(draw(seed=0), draw(seed=1)) and torch.equal(draw(seed=1), draw(seed=1))

@torch.no_grad()
def test_the_cached_condition_gives_what_the_whole_sequence_gives(exact):
    """A cache off by one; positions that differ between training and sampling."""
    tokenizer, model = models()
    batch = sgt.make_batch(CFG, "arm", 0, 2, 2, "instance", 2)
    x = model.embed_rows(batch.ids, batch.slots, model.see(batch.images), batch.patch_at)
    whole = model.trunk(x, batch.positions, batch.layout).flatten(0, 1)
    want = whole[batch.code_at].view(-1, CFG.tokens, CFG.width)[2:]                      # the proxy's targets
    texts = [batch.ids.flatten()[rows[0] - 6:rows[0]].tolist() for rows in batch.code_at.view(-1, CFG.tokens)[2:]]
    seen = sgt.condition(model, texts, batch.images[2:])
    caches, L = [kernels.KVCache(*m) for m in sgt.read(model, seen, CFG.tokens)[1]], seen.ids.shape[1]
    rows = batch.code_at.view(-1, CFG.tokens)[2:]
    take = lambda a: a.flatten(0, 1)[rows]
    lo = seen.layout.lo[:, -1:].expand(2, CFG.tokens)
    target = model.embed_rows(take(batch.ids), take(batch.slots), None, None)
    got = model.trunk(target, take(batch.positions), kernels.Layout(lo, torch.full_like(lo, L + CFG.tokens)), caches, L)
    assert torch.allclose(got, want, atol=2e-5)

@torch.no_grad()
def test_cached_answers_are_those_of_reading_everything_again(exact):
    """A decoder that looks at the wrong column after the first token."""
    _, model = models()
    image = sgt.render(CFG, sgt.sample_scenes(CFG, "val", np.arange(3))).image
    questions = ["how many red objects?", "is there a ring?", "where is the blue square from the red circle?"]
    fast = sgt.answer(model, image, questions, limit=5)
    for i, question in enumerate(questions):
        ids = TEXT.encode(question)
        for _ in range(5):
            hidden, *_ = sgt.read(model, sgt.condition(model, [ids], image[i:i + 1]), 0)
            ids = ids + [int(model.text_logits(hidden).argmax())]
            if ids[-1] == Text.END:
                break
        assert TEXT.decode(ids[len(TEXT.encode(question)):]) == fast[i]

class Tape(torch.utils._python_dispatch.TorchDispatchMode):
    """A CUDA graph on a CPU: what is recorded changes nothing yet, and then runs again on the same memory, without Python."""
    def __init__(self):
        super().__init__()
        self.ops, self.before, self.replays = [], [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        named = {**dict(zip((a.name for a in op._schema.arguments), args)), **(kwargs or {})}
        for a in op._schema.arguments:
            if a.alias_info and a.alias_info.is_write:
                self.before += [(x, x.clone()) for x in tree_leaves(named[a.name])]
        out = op(*args, **(kwargs or {}))
        if not op.is_view and op.namespace != "profiler":
            self.ops.append((op, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def __exit__(self, *error):
        super().__exit__(*error)
        for x, value in reversed(self.before):
            x.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.ops:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if new is not old:                            # an operator in place returns what it changed
                    old.copy_(new)

@pytest.fixture
def tapes(monkeypatch):
    """Everything is recorded as if there were a GPU; the list of recordings."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, **kw: tape)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: type("Stream", (), {"wait_stream": lambda self, other: None})())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for module in (kernels, sgt):
        monkeypatch.setattr(module, "records", lambda device: kernels.GRAPHS)
    return made

def test_recorded_pictures_and_answers_are_those_of_plain_calls(tapes, exact, monkeypatch):
    """A constant that was an input; a result that the next call overwrites; a cache, a weight or noise of another call."""
    tokenizer, model = models()
    model.image_head.data *= 50
    model.text_head.data *= 50
    image = sgt.render(CFG, sgt.sample_scenes(CFG, "val", np.arange(12))).image.view(6, 2, 3, 32, 32)
    asked = [["how many red objects?", "is there a ring?"], ["where is the blue square from the red circle?", "what?"]]

    def use(i):
        if i == 4:                                            # trained on, in place
            model.image_head.data += 0.5
            model.text_head.data[Text.END] += 0.02
        ids = [[1, 300 + i], [1, 301, 302][:3 - i % 2]]
        return (sgt.generate(model, tokenizer, ids, guidance=2.0, seed=i), sgt.generate(model, tokenizer, ids, image[i], temperature=0.0),
                sgt.answer(model, image[i], asked[i % 2], 21))
    recorded = [use(i) for i in range(6)]
    assert len(tapes) == 5 and min(tape.replays for tape in tapes) >= 3     # two of drawing, one to begin, of 8 tokens and of 4
    first = weakref.ref(model)
    tokenizer, model = models()
    assert first() is None                                    # its recordings do not keep it
    model.image_head.data *= 50
    model.text_head.data *= 50
    monkeypatch.setattr(kernels, "GRAPHS", False)
    for i, (drawn, cut, said) in enumerate(recorded):
        plain = use(i)
        assert torch.allclose(drawn, plain[0], atol=1e-4) and torch.allclose(cut, plain[1], atol=1e-4) and said == plain[2], i
        assert len(tapes) == 5

def test_a_recorded_training_step_trains_as_a_plain_one(tapes, exact, monkeypatch, tmp_path):
    """A batch, a learning rate or the state of an optimizer that became a constant."""
    finals = []
    for graphs in (True, False):
        monkeypatch.setattr(kernels, "GRAPHS", graphs)
        run, (tokenizer, model) = sgt.Run(tmp_path / str(graphs)), models()
        run.open(CFG)
        sgt.train_stage(run, CFG, "base", model, 8, (0.02, 0.01), lambda step: sgt.make_batch(CFG, "arm", step, 2, 2, "depth", 2),
                        lambda batch: sgt.losses(model, tokenizer, batch), lambda step: None)
        finals.append(run.load("base")[0])
    assert len(tapes) == 1 and tapes[0].replays == 5
    assert all(torch.allclose(finals[0][k], finals[1][k], atol=1e-5) for k in finals[0])

class OneDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a tensor of another device appears: a graph that reads the host's memory reads what is no longer there."""
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        assert all(x.is_meta for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)), op
        return out

def test_nothing_that_is_recorded_asks_for_a_value_or_touches_the_host(exact, monkeypatch):
    """What cannot be recorded: a decision on data, a table that is made on the host. Meta tensors have no values to ask for."""
    monkeypatch.setattr(sgt, "records", lambda device: True)
    meta = lambda tree: tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, tree)
    (tokenizer, model), image = models(), torch.rand(2, 3, 32, 32)
    seen, asked = (meta(sgt.condition(model, [[300]] * 2 + [[1]] * i, x)) for i, x in ((2, None), (0, image)))
    noise, place = meta((torch.rand(4, 2, 2, CFG.tokens), torch.ones(2, 1, dtype=torch.long)))
    tokenizer, model = tokenizer.to("meta"), model.to("meta")
    with OneDevice():
        for temperature in (0.0, 1.0):
            assert sgt.refine(model, tokenizer, seen, noise, 2.0, temperature, 0.8).shape == (2, 3, 32, 32)
        written = sgt.begin(model, asked, place, 9)
        assert sgt.decode(model, written, 8)[0].shape == (2, 8)
        for ask in (lambda: bool(written.done.all()), lambda: written.done + torch.ones(2, 1)):     # and this test can fail
            with pytest.raises((RuntimeError, AssertionError)):
                ask()

@torch.no_grad()
def test_a_condition_padded_to_a_common_length_is_the_same_condition(exact, monkeypatch):
    """Padding that is seen, or that moves what comes behind it."""
    _, model = models()
    image = sgt.render(CFG, sgt.sample_scenes(CFG, "val", np.arange(2))).image
    tight = sgt.condition(model, [[300, 301, 302], [303]], image)
    monkeypatch.setattr(sgt, "records", lambda device: True)
    padded = sgt.condition(model, [[300, 301, 302], [303]], image)
    assert tight.ids.shape[1] == 19 and padded.ids.shape[1] == 32
    assert torch.allclose(sgt.read(model, tight, 0)[0], sgt.read(model, padded, 0)[0], atol=1e-5)

# ---- training ----------------------------------------------------------------------------------------------

def test_an_interrupted_stage_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """State that is not saved: momentum, step, the place in the data, log lines written twice; other batches than planned."""
    finals, logs = [], []
    for name, stop_at in (("whole", None), ("halves", 5)):
        run = sgt.Run(tmp_path / name)
        run.open(CFG)

        def stage():
            tokenizer, _ = models()
            torch.manual_seed(0)
            model = sgt.UnifiedModel(CFG)

            def make(step):                                   # the sequential schedule: first the proxy, then replay
                if step == stop_at and not run.done("state"):
                    os.kill(os.getpid(), signal.SIGTERM)
                return sgt.make_batch(CFG, "arm", step, *((0, 0, "depth", 2) if step < 3 else (2, 2)))
            sgt.train_stage(run, CFG, "depth", model, 9, (0.02, 0.01), make,
                            lambda batch: sgt.losses(model, tokenizer, batch), lambda step: None)
        if stop_at:
            with pytest.raises(sgt.Interrupted) as stopped:
                stage()
            assert stopped.value.args == (143,) and not run.done("depth")
            with monkeypatch.context() as patch, pytest.raises(sgt.UserError, match="1 processes, not 2"):
                patch.setattr(sgt, "WORLD", 2)
                stage()
        stage()
        finals.append(run.load("depth")[0])
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
        assert not run.done("state")
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0]) and logs[0] == logs[1]

RANKS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import eval, kernels, sgt
made, real, save = [], sgt.make_batch, sgt.Run.save
sgt.make_batch = lambda cfg, split, step, *rest: made.append((split, step)) or real(cfg, split, step, *rest)
def keep(run, name, tensors, **meta):
    if name == "tokenizer":                          # the processes have met: the mean of two halves is the mean of the whole
        line, x = torch.nn.Linear(3, 2, bias=False), torch.arange(12.0).view(4, 3)
        torch.nn.init.ones_(line.weight)
        line(x[2 * sgt.RANK:][:2]).square().mean().backward()
        kernels.average_gradients(line, 2)
        assert torch.allclose(line.weight.grad, torch.autograd.grad(line(x).square().mean(), line.weight)[0])
    torch.save((dict(tensors), made), f"{name}.{sgt.RANK}.pt")
    save(run, name, tensors, **meta)
sgt.Run.save, eval.evaluate, eval.show = keep, lambda *args: None, lambda run: "finished"
sys.exit(sgt.main(sys.argv[2:]))
"""

def test_two_processes_train_one_model_on_batches_of_their_own(tmp_path):
    """Weights that drift apart; a batch that both see; a sum where a mean belongs; two processes that write one file."""
    (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ranks.py", str(HERE),
                           "--train", "--preset", "smoke", "--device", "cpu", "--tok-steps", "3", "--base-steps", "4", "--arm-steps", "2",
                           "--proxies", "depth", "--schedule", "sequential", "--save-every", "3"],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("finished") == 1, done.stderr
    for stage in ("tokenizer", "base", "depth"):
        (ours, made), (theirs, others) = (torch.load(tmp_path / f"{stage}.{rank}.pt") for rank in (0, 1))
        assert ours and all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert all(torch.equal(ours[k], v) for k, v in sgt.Run(tmp_path / "runs/smoke").load(stage)[0].items())
    assert made == [("train", 2 * i) for i in range(4)] + [("arm", 2 * i) for i in (0, 1, 0, 1)]
    assert others == [(split, step + 1) for split, step in made]

# ---- benchmark ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_the_judge_parses_true_pictures_and_is_not_easily_pleased(preset):
    """A judge whose mistakes look like the model's, or who says yes to anything."""
    cfg = Config(**PRESETS[preset])
    prompts, images = benchmark.geneval_prompts(cfg, 150)
    score = benchmark.score_pictures(cfg, prompts, images)
    assert min(score["exact"], score["average"]) >= 98
    other = images.roll(7, 0)
    assert benchmark.score_pictures(cfg, prompts, other)["average"] < 35
    assert benchmark.score_pictures(cfg, prompts, torch.rand_like(images))["average"] < 5

def test_prompts_are_judged_by_the_rules_of_geneval():
    """Counts that are not exact; a color on the wrong object; left taken for right."""
    a, b = thing("red", "circle", 8, 16), thing("blue", "square", 24, 16)
    ok = lambda kind, wanted, found: benchmark.satisfied(benchmark.Prompt(kind, "", wanted), found)
    assert ok("single", [a], [a, b]) and not ok("single", [a], [b]) and not ok("single", [a], [])
    assert ok("counting", [a, a], [a, a, b]) and not ok("counting", [a, a], [a, a, a])
    assert ok("attribution", [a, b], [b, a])
    assert not ok("attribution", [a, b], [thing("blue", "circle", 8, 16), thing("red", "square", 24, 16)])
    assert ok("position", [a, b], [a, b])
    assert not ok("position", [a, b], [thing("red", "circle", 24, 16), thing("blue", "square", 8, 16)])

def test_panoptic_quality_of_cases_worked_by_hand():
    """Misses not counted, empty images dividing by zero, matches at half an overlap."""
    square = torch.zeros(1, 8, 8, dtype=torch.bool)
    square[0, :4, :4] = True
    part, pixel, nothing = square.clone(), torch.zeros_like(square), torch.zeros(0, 8, 8, dtype=torch.bool)
    part[0, 3] = False                                       # 12 of 16 pixels: IoU 0.75
    pixel[0, 0, 0] = True
    quality = lambda p, t: benchmark.panoptic_quality([p], [t])
    assert quality(square, square) == {"pq": 100, "sq": 100, "rq": 100, "miou": 100}
    assert quality(part, square)["pq"] == 75 and quality(part, square)["miou"] == 75
    assert quality(nothing, square)["pq"] == 0 and quality(square, nothing)["pq"] == 0
    assert quality(nothing, nothing)["pq"] == 100
    assert quality(pixel, pixel)["pq"] == 100 and quality(pixel, square)["miou"] == 100 / 16
    both = benchmark.panoptic_quality([torch.cat([part, pixel]), square], [square, nothing])
    assert both["sq"] == 75 and math.isclose(both["rq"], 100 / (1 + 1))  # one match, two extra: 1 / (1 + ½ · 2)

def test_connected_parts_are_found_whatever_their_form():
    """A ring or a spiral split into pieces; diagonal neighbours torn apart."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    assert len(benchmark.components(mask[None]).unique()) == 2           # background and one spiral
    assert len(benchmark.components(torch.eye(5).bool()[None]).unique()) == 2
    assert len(benchmark.components((torch.arange(25) % 2 == 0).view(1, 5, 5) & (torch.arange(5) % 2 == 0)).unique()) == 10

def test_average_precision_is_that_of_pycocotools_on_cases_worked_by_hand():
    """A mask written the wrong way round; an annotation numbered 0; a crash on nothing."""
    instance = torch.zeros(2, 16, 16, dtype=torch.long)
    instance[0, 1:5, 2:12], instance[0, 8:12, 8:12], instance[1, 0, 0] = 1, 2, 1        # one of a single pixel
    truth, masks = benchmark.as_coco(instance), benchmark.true_masks(instance)
    ap = lambda masks, scores: benchmark.average_precision(truth, benchmark.coco_results(masks, scores))
    ones = [[1.0] * len(m) for m in masks]
    assert ap(masks, ones) == {"ap": 100, "ap50": 100, "ar": 100}
    assert ap([m[:0] for m in masks], [[], []])["ap"] == 0
    assert benchmark.average_precision(benchmark.as_coco(instance * 0), []) == {"ap": 100, "ap50": 100, "ar": 100}
    missed = ap([masks[0], masks[1][:0]], ones[:1] + [[]])            # 2 of 3 found, none wrong: precision 1 up to recall 2/3
    assert abs(missed["ap"] - 100 * 67 / 101) < 0.01 and abs(missed["ar"] - 200 / 3) < 0.01
    wrong = torch.cat([masks[0], masks[0][:1].roll(8, 1)])            # a surer wrong mask: precision 1/2, then 2/3, 3/4
    assert abs(ap([wrong, masks[1]], [[0.5, 0.5, 0.9], [0.5]])["ap50"] - 75) < 0.01
    drawn = sgt.paint(instance, sgt.PALETTE.expand(2, -1, -1))
    assert benchmark.confidence(drawn, masks, 4) == ones
    category = instance.clamp(max=1)
    assert benchmark.semantic_miou(CFG, sgt.paint(category, sgt.PALETTE.expand(2, -1, -1)), category) == 100
    assert abs(benchmark.semantic_miou(CFG, torch.zeros(2, 3, 16, 16), category) - 50 * float((category == 0).float().mean())) < 1e-3

def test_pope_counts_as_pope_does_and_asks_what_it_says():
    """Precision and recall exchanged; a question whose label is wrong; negatives of the wrong kind."""
    scores = benchmark.pope_scores(["yes", "yes", "no", "no"], ["yes", "no", "yes", "a circle"])
    assert scores == {"accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes": 50}
    assert benchmark.pope_scores(["yes", "no"], ["no", "no"])["f1"] == 0
    for kind in ("random", "popular", "adversarial"):
        items = benchmark.pope_items(CFG, kind, 200)
        assert sum(i.truth == "yes" for i in items) == 100
        for _, scenes, b, question, truth in items:
            color, shape = question[:-1].split()[-2:]
            objects = sgt.things(scenes, b)
            assert ((color, shape) in [(o.color, o.shape) for o in objects]) == (truth == "yes")
            if kind == "adversarial":
                assert color in [o.color for o in objects] and shape in [o.shape for o in objects]

def test_the_layout_error_is_the_way_to_where_the_words_hold():
    """A picture with the objects exchanged that counts as nearly right."""
    prompt = benchmark.Prompt("position", "", [thing("red", "circle", 8, 16), thing("red", "square", 24, 16)])   # left of
    error = lambda *found: benchmark.layout_error(prompt, [thing("blue", *f) for f in found])
    assert error(("circle", 4, 10), ("square", 20, 12)) == 0
    assert error(("circle", 20, 10), ("square", 4, 10)) == 17         # 16 apart the wrong way, and 1 to be left at all
    assert error(("circle", 10, 10), ("square", 14, 20)) == 11        # 10 of height ask for 15 of width; there are 4
    assert error(("circle", 10, 10)) is None

@torch.no_grad()
def test_recorded_attention_is_that_of_the_model_and_sums_to_one(exact):
    """Attention recomputed without norm, rotation or mask: what the official code shows."""
    _, model = models()
    image = sgt.render(CFG, sgt.sample_scenes(CFG, "val", np.arange(2))).image
    condition = sgt.condition(model, [TEXT.encode("is there a red circle?"), TEXT.encode("how many?")], image)
    with benchmark.recorded_attention() as seen:
        h, _ = sgt.read(model, condition, 0)
    assert len(seen) == CFG.depth and torch.equal(h, sgt.read(model, condition, 0)[0])
    for weights in seen:
        total = weights.sum(-1)
        assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all() and (total[0] > 0).all()
    with pytest.raises(AssertionError), benchmark.recorded_attention():
        with pytest.MonkeyPatch.context() as patch:           # a model that adds something of its own is found out
            patch.setattr(kernels, "attention_reference", lambda q, k, v, layout: (v.mean(2, keepdim=True).expand_as(q), None))
            sgt.read(model, sgt.condition(model, [TEXT.encode("how many?")], image[:1]), 0)

def test_a_linear_probe_finds_what_is_linear_and_nothing_else():
    """A probe that is scored on what it was fitted to."""
    torch.manual_seed(0)
    y = torch.randint(0, 3, (600,))
    assert benchmark.probe(F.one_hot(y, 3) + 0.3 * torch.randn(600, 3), y, 3) > 95
    assert benchmark.probe(torch.randn(600, 200), y, 3) < 45
    states, shape, color, count = benchmark.patch_features(CFG, models()[1], sgt.sample_scenes(CFG, "val", np.arange(40)))
    assert states.shape == (CFG.depth + 1, 40, CFG.patches, CFG.width) and torch.equal(shape > 0, color > 0)
    assert 1 <= count.min() and shape.max() <= CFG.shapes and (shape > 0).float().mean() > 0.1

def test_a_permutation_test_knows_chance_from_effect():
    """A p-value that is always small, or never."""
    rng = np.random.default_rng(0)
    assert benchmark.permutation_test(np.zeros(50)) == 1
    assert benchmark.permutation_test(np.ones(12)) < 0.01 and benchmark.permutation_test(np.ones(3)) > 0.2
    assert benchmark.permutation_test(rng.normal(0, 1, 400)) > 0.05 > benchmark.permutation_test(rng.normal(0.3, 1, 400))
    assert benchmark.permutation_test(np.array([1.0, -1.0] * 50)) > 0.9

def made_up_report(seed, gains, n=100):
    """A report in which arm a answers 50 + gains[a] percent of everything right."""
    def bits(arm, kinds):
        return {k: "".join("01"[(i * 37 + seed) % n < 50 + gains[arm]] for i in range(n)) for k in kinds}
    entry = lambda arm: {part: {"hits": bits(arm, kinds), **dict.fromkeys(
        [*kinds, "average", "perception", "reasoning"], 50.0 + gains[arm])} for part, kinds in (
        ("understanding", QUESTIONS), ("generation", benchmark.GENEVAL))}
    return {"seed": seed, "questions": n * 10, "prompts": n * 6, "config": dataclasses.asdict(dataclasses.replace(CFG, seed=seed)),
            "models": {arm: {**entry(arm), **({"segmentation": {"semantic_miou": 9.0} if arm == "semantic" else {"pq": 50.0}}
                                               if arm in ("instance", "semantic") else {})} for arm in gains}}

def test_the_study_says_what_the_numbers_say():
    """A verdict that flatters; a sign the wrong way; runs that cannot be compared."""
    gains = {"base": 0, "none": -10, "shuffled": -10, "instance": 12, "semantic": 12, "depth": 0, "edges": 1}
    text = benchmark.study([made_up_report(0, gains), made_up_report(1, gains)])
    assert "2 seeds (0, 1)" in text and "62.0 ± 0.0" in text
    assert "High-level proxies help understanding more than mid- and low-level ones: **holds**" in text
    assert "It is perception that improves, more than reasoning: **not resolved**" in text      # both do alike
    assert "Masks of the right image teach more than masks of another: **holds** (understanding +22.0 (+22.0, +22.0 by seed), p 0.000)" in text
    text = benchmark.study([made_up_report(0, {**gains, "instance": -30})])
    assert "more than replay alone (SFT): **does not hold**" in text
    text = benchmark.study([made_up_report(0, {"base": 0, "none": 0, "instance": 0})])
    assert "more than replay alone (SFT): **not resolved**" in text and "not measured" in text

def test_runs_of_other_settings_become_a_sweep_and_never_an_average():
    """A ratio of 1 averaged with a ratio of 3 as if they were two seeds."""
    gains = {"base": 0, "none": -10, "instance": 12}
    ratio = lambda seed, r: {**(report := made_up_report(seed, {**gains, "instance": r})), "config": {**report["config"], "ratio": r}}
    text = benchmark.sweep([ratio(0, 1.0), ratio(1, 1.0), ratio(0, 3.0)])
    assert re.search(r"\| 1.0 +\| +2 \| +SGT \| +51.0", text) and re.search(r"\| 3.0 +\| +1 \| +SGT \| +53.0", text)
    assert "2 seeds (0, 1)" in benchmark.sweep([made_up_report(0, gains), made_up_report(1, gains)])
    for others in ([made_up_report(0, gains)] * 2, [made_up_report(0, gains), {**made_up_report(1, gains), "config": {
            **made_up_report(1, gains)["config"], "shapes": 8}}]):
        with pytest.raises(sgt.UserError):
            benchmark.sweep(others)

# ---- the command line --------------------------------------------------------------------------------------

def command(*args, cwd, script="sgt.py", **env):
    return subprocess.run([sys.executable, str(HERE / script), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env})

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A smoke run made by the real command."""
    folder = tmp_path_factory.mktemp("run")
    done = command("--train", "--preset", "smoke", "--threads", 1, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout

def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def test_training_leaves_every_file_and_the_same_command_again_changes_nothing(trained):
    """A missing file; a finished run that trains again."""
    folder, said = trained
    files = contents(folder / "runs" / "smoke")
    for name in ("config.json", "log.jsonl", "report.json", "report.md", "tokenizer.safetensors", "base.safetensors",
                 "none.safetensors", "instance.safetensors"):
        assert name in files
    assert "report.html" in files and "samples/comparison.png" in files and "samples/attention.png" in files
    assert "samples/base_000000.png" in files and "samples/instance_000006.png" in files
    assert "SGT against SFT" in said and "question only" in said
    again = command("--train", "--preset", "smoke", cwd=folder)
    assert again.returncode == 0 and contents(folder / "runs" / "smoke") == files
    as_json = command("runs/smoke", "--json", cwd=folder, script="eval.py")
    assert json.loads(as_json.stdout) == json.loads(files["report.json"])
    assert set(json.loads(as_json.stdout)["models"]) == {"base", "none", "instance"}

def test_another_arm_can_grow_on_a_finished_base(trained, capsys, monkeypatch):
    """A sweep that trains its base again, or one on a base of another world."""
    folder, _ = trained
    monkeypatch.chdir(folder)
    smoke, other = folder / "runs/smoke", folder / "elsewhere"
    args = ["--train", "--base", str(smoke), "--run", str(other), "--ratio", "1", "--proxies", "none,depth",
            "--arm-scenes", "2", "--eval-questions", "10", "--eval-prompts", "6", "--eval-masks", "2", "--arm-steps", "2"]
    for wrong in (["--depth", "3"], ["--preset", "tiny"]):
        assert sgt.main([*args, *wrong]) == 2 and not other.exists()
        assert f"depth (2 there, {wrong[1].replace('tiny', '4')} now)" in capsys.readouterr().err
    assert sgt.main(args) == 0 and (other / "depth.safetensors").exists()      # the rest is as it was there
    changed = {k for k, v in json.loads((other / "config.json").read_text()).items() if json.loads((smoke / "config.json").read_text())[k] != v}
    assert changed == {"ratio", "proxies", "arm_scenes", "eval_questions", "eval_prompts", "eval_masks", "arm_steps", "threads"}
    assert (other / "base.safetensors").read_bytes() == (smoke / "base.safetensors").read_bytes()
    assert {json.loads(line)["stage"] for line in (other / "log.jsonl").read_text().splitlines()} == {"none", "depth"}

def test_the_proxy_may_be_given_few_scenes():
    """A data-scaling sweep in which every setting sees the same data."""
    cfg = dataclasses.replace(CFG, arm_scenes=3)
    seen = [sgt.make_batch(cfg, "arm", step, 2, 2, "depth", 2).images[2:] for step in range(3)]
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 3 and torch.equal(seen[0][0], seen[1][1])
    assert len(torch.cat([sgt.make_batch(CFG, "arm", s, 2, 2, "depth", 2).images[2:] for s in range(3)]).flatten(1).unique(dim=0)) == 6

def test_questions_may_be_about_few_scenes_the_same_in_base_and_arms():
    """Labels that are not scarce after all: new scenes, or new questions about the old ones."""
    cfg, seen = dataclasses.replace(CFG, question_scenes=3), {}
    for step in range(8):
        for split in ("train", "arm"):
            batch = sgt.make_batch(cfg, split, step, 4, 2)
            for image, ids in zip(batch.images, batch.ids):
                seen.setdefault(image.numpy().tobytes(), set()).add(tuple(ids.tolist()))
    assert len(seen) == 3 and all(len(dialogues) == 1 for dialogues in seen.values())
    one, two = (sgt.make_batch(cfg, "arm", step, 2, 2, "depth", 2) for step in (0, 1))
    assert not torch.equal(one.images[2:], two.images[2:])              # the proxy draws new ones

def test_scenes_and_masks_leave_as_coco_files_that_pycocotools_reads(trained, tmp_path, capsys):
    """Masks of another picture; results that COCO's own loader refuses."""
    run = str(trained[0] / "runs/smoke")
    assert benchmark.main([run, "--export-scenes", str(tmp_path / "scenes")]) == 0
    assert benchmark.main([run, "--export-scenes", str(tmp_path / "scenes")]) == 2                # not over what is there
    for mistake in (["--export", f"{run}/config.json"], ["--export", "."], ["--export", "masks.txt"], ["--model", "none"],
                    ["--export", "masks.json", "--json"], ["--speed", "--pope", "questions.jsonl"]):
        capsys.readouterr()
        assert benchmark.main([run, *mistake]) == 2 and capsys.readouterr().err.count("\n") == 1
    assert benchmark.main([run, "--export", str(tmp_path / "masks.json")]) == 0
    truth = benchmark.COCO(tmp_path / "scenes/instances.json")
    cfg = Config(**PRESETS["smoke"])
    scenes = sgt.sample_scenes(cfg, "val", np.arange(8))
    instance = sgt.render(cfg, scenes).instance
    assert sorted(truth.getImgIds()) == list(range(8)) and len(truth.anns) == sum(len(m) for m in benchmark.true_masks(instance))
    for annotation in truth.anns.values():
        mask = torch.from_numpy(truth.annToMask(annotation)).bool()
        shown = instance[annotation["image_id"]][mask].unique()
        assert len(shown) == 1 and annotation["category_id"] == 1 + scenes.shape[annotation["image_id"], shown - 1]
    drawn = json.loads((tmp_path / "masks.json").read_text())
    assert not drawn or len(truth.loadRes(str(tmp_path / "masks.json")).anns) == len(drawn)
    assert sgt.read_image(str(tmp_path / "scenes/images/000003.png"), 32)[0].shape == (1, 3, 32, 32)

def test_a_pope_file_of_ones_own_is_asked_and_a_bad_one_is_named(trained, tmp_path, capsys):
    """Answers counted against the wrong labels; a traceback from a stray line."""
    run, ask = str(trained[0] / "runs/smoke"), tmp_path / "ask.jsonl"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "text": "Is there a circle?", "label": label} for label in ("yes", "no", "no")]
    ask.write_text("\n".join(map(json.dumps, lines)))
    assert benchmark.main([run, "--pope", str(ask)]) == 0 and "accuracy 66.7" in capsys.readouterr().out
    for bad in ("{", '{"image": "a.png"}', '{"image": "no.png", "text": "x?", "label": "yes"}', ""):
        ask.write_text(bad)
        assert benchmark.main([run, "--pope", str(ask)]) == 2
        assert capsys.readouterr().err.startswith("error: ")

def test_the_html_report_needs_nothing_from_elsewhere(trained):
    """A page that is blank without a network; a table or a curve that was forgotten."""
    page = (trained[0] / "runs/smoke/report.html").read_text()
    assert not re.search(r'<script|<link|src="(?!data:)', page) and "://" not in page
    for part in ("Understanding", "POPE", "Generation", "Segmentation", "linear probe for shape", "loss: base", "SGT: samples"):
        assert part in page, part

def test_the_verbs_work_on_any_picture(trained, tmp_path):
    """A palette image, 16 bits, transparency, a single pixel, a rotated photograph."""
    folder, _ = trained
    pictures = {"rgb.png": Image.new("RGB", (50, 20), "red"), "palette.gif": Image.new("P", (7, 90)),
                "deep.png": Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100),
                "alpha.png": Image.new("RGBA", (32, 32), (0, 255, 0, 90)), "dot.png": Image.new("1", (1, 1)),
                "cmyk.jpg": Image.new("CMYK", (64, 64))}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        small, upright = sgt.read_image(str(tmp_path / name), 32)
        assert small.shape == (1, 3, 32, 32) and 0 <= small.min() and small.max() <= 1 and upright.mode == "RGB"
    exif = Image.Exif()
    exif[274] = 6                                             # turned by a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert sgt.read_image(str(tmp_path / "turned.jpg"), 32)[1].size == (20, 40)
    asked = command("--ask", tmp_path / "rgb.png", "What color is it?", cwd=folder)
    assert asked.returncode == 0 and len(asked.stdout.splitlines()) == 1
    drawn = command("--generate", "two red circles", "--out", tmp_path / "a.png", "--seed", 1, cwd=folder)
    assert drawn.returncode == 0 and Image.open(tmp_path / "a.png").size == (256, 256)
    cut = command("--segment", tmp_path / "rgb.png", "--out", tmp_path / "b.png", cwd=folder)
    assert cut.returncode == 0 and "object" in cut.stdout and Image.open(tmp_path / "b.png").height >= 20

@pytest.mark.parametrize("args, says", [
    (["--train", "--preset", "smoke", "--depth", 3], "depth (2 there, 3 now)"),
    (["--train", "--preset", "smoke", "--image-size", 30], "divisible"), (["--train", "--base-step", 3], "base-step"),
    (["--train", "--generate", "x"], "not allowed with"), ([], "is required"), (["--ask", "no.png", "x?"], "no.png"),
    (["--generate", ""], "empty"), (["--generate", "red " * 50], "shorter"), (["--generate", "x", "--run", "none"], "no readable"),
    (["--segment", "junk.png"], "junk.png"), (["--segment", "junk.png", "--proxy", "depth"], "no model 'depth'"),
    (["--generate", "x", "--width", 64], "--width"), (["--generate", "a ring", "--out", "no/such/\0.png"], "error"),
    (["--train", "--lr", "fast"], "lr"), (["--generate", "x", "--device", "cuda:9"], "cuda:9"),
    (["--generate", "x", "--out", "runs/smoke/report.png"], "files of a run"), (["--generate", "x", "--out", "."], "ends with"),
    (["--generate", "x", "--out", "runs/smoke/base.safetensors"], "ends with"),
    (["--ask", "junk.png", "x?", "--guidance", 3], "no effect"), (["--segment", "junk.png", "--seed", 3], "no effect"),
    (["--generate", "x", "--run", ""], "--run is empty"), (["--train", "--preset", "smoke", "--data", ""], "--data is empty")])
def test_a_mistake_gets_one_line_and_exit_code_two_and_changes_nothing(trained, args, says, monkeypatch, capsys):
    """A traceback; a half-written file; a run overwritten with other settings."""
    folder, _ = trained
    if not (folder / "junk.png").exists():
        (folder / "junk.png").write_bytes(b"\x89PNG not a picture")
    before = contents(folder)
    monkeypatch.chdir(folder)
    assert sgt.main(list(map(str, args))) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and says in error and len(error.splitlines()) == 1
    assert contents(folder) == before

def test_a_damaged_run_is_reported_in_one_line(trained, tmp_path):
    """A traceback from safetensors or json."""
    folder, _ = trained
    for name, damage in (("config.json", b"{"), ("instance.safetensors", b"short")):
        copy = tmp_path / name / "runs" / "smoke"
        for path, data in contents(folder / "runs" / "smoke").items():
            (copy / path).parent.mkdir(parents=True, exist_ok=True)
            (copy / path).write_bytes(damage if path == name else data)
        done = command("--generate", "a ring", cwd=tmp_path / name)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and name in done.stderr
        assert len(done.stderr.splitlines()) == 1

def test_a_terminated_run_says_so_and_goes_on(tmp_path):
    """Work lost on Ctrl-C; the wrong exit code; a signal that arrives between two stages and is forgotten."""
    args = ["--train", "--preset", "smoke", "--tok-steps", 60, "--eval-questions", 10, "--eval-prompts", 6, "--eval-masks", 2]
    process = subprocess.Popen([sys.executable, str(HERE / "sgt.py"), *map(str, args)], cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    log = tmp_path / "runs/smoke/log.jsonl"
    while not log.exists() or log.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said
    assert not (tmp_path / "runs/smoke/report.json").exists()
    again = command(*args, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "runs/smoke/report.json").exists(), again.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line["step"] for line in lines if line["stage"] == "tokenizer"]
    assert steps == sorted(set(steps)) and steps[-1] == 59

# ---- the Hub -----------------------------------------------------------------------------------------------

class FakeHub(BaseHTTPRequestHandler):
    """What huggingface_hub needs of the Hub to push and pull: files in memory, one revision for each commit, no Xet."""
    protocol_version = "HTTP/1.1"

    def respond(self):
        body, hub, data, status, head = self.rfile.read(int(self.headers["Content-Length"] or 0)), self.server, {}, 200, {}
        hub.sent.append(body)
        path = re.sub("^/api/models|^/api/datasets|^/datasets", "", self.path.split("?")[0])
        name, verb, rest = re.fullmatch(r"/([\w-]+/[\w-]+)(?:\.git)?/?([\w-]*)/?(.*)", path).groups()
        commits = hub.repos.get(name, {})
        if name == "api/repos":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status, data = 409 if name in hub.repos else 200, {"url": f"{hub.url}/{name}"}
            hub.repos.setdefault(name, {"0" * 40: {}})
            hub.private.setdefault(name, asked.get("visibility") == "private")
        elif name.startswith("upload/"):
            hub.uploads[name[7:]] = body
        elif name.startswith("api/"):                             # checks the card: nothing to say
            pass
        elif not commits:
            status, head = 404, {"X-Error-Code": "RepoNotFound"}
        elif verb in ("", "revision"):
            sha = list(commits)[-1] if rest in ("", "main") else rest
            data = {"id": name, "sha": sha, "private": hub.private[name]}
            status, head = (200, {}) if sha in commits else (404, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "preupload":
            mode = lambda file: "lfs" if file.endswith(("safetensors", "png")) else "regular"
            data = {"files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]]}
        elif verb == "info":
            data = {"objects": [{**o, "actions": {"upload": {"href": f"{hub.url}/upload/{o['oid']}"}}} for o in json.loads(body)["objects"]]}
        elif verb == "commit":
            values = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
            commits[sha := hashlib.sha1(body).hexdigest()] = {
                v["path"]: base64.b64decode(v["content"]) if key == "file" else hub.uploads[v["oid"]] for key, v in values if "path" in v}
            data = {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha}
        elif verb == "tree":
            data = [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in commits[rest].items()]
        elif verb == "resolve":
            sha, _, file = rest.partition("/")
            data = commits[sha][file]
            head = {"X-Repo-Commit": sha, "ETag": hashlib.sha1(data).hexdigest()}
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {**head, "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data if self.command != "HEAD" else b"")

    do_GET = do_HEAD = do_POST = do_PUT = respond
    log_message = lambda *_: None

@pytest.fixture(scope="module")
def hub(trained, tmp_path_factory):
    """A Hub to which the smoke run has been pushed, and the environment that leads to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.repos, server.private, server.uploads, server.sent = {}, {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("hf")), "HF_TOKEN": "hf_secret",
                  "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    pushed = command("--push", "user/repo", "--run", "smoke", cwd=trained[0], **server.env)
    assert pushed.returncode == 0 and "(private)" in pushed.stdout and not pushed.stderr, pushed.stderr
    yield server
    server.shutdown()

def test_a_pushed_run_comes_back_to_the_bit_and_takes_nothing_along(hub, trained, tmp_path):
    """Weights that change on the way; a run published to everyone; a path, a token or a half-done stage among what is published."""
    original, [_, (sha, files)] = contents(trained[0] / "runs/smoke"), hub.repos["user/repo"].items()
    stages = {f"{stage}.safetensors" for stage in ("tokenizer", "base", "none", "instance")}
    assert set(files) == stages | {"README.md", "config.json", "report.json", "report.md", "report.html", "samples/comparison.png"}
    assert hub.private["user/repo"] and all(original[file] == data for file, data in files.items() if file != "README.md")
    assert not any(secret in data for secret in (b"hf_secret", str(trained[0]).encode()) for data in hub.sent)
    card = files["README.md"].decode()
    assert original["report.md"].decode().strip() in card and "--run user/repo --ask" in card and "`--width 64`" in card
    hub.repos["user/repo"][sha]["model-00001-of-00099.safetensors"] = b"of another model, and large"
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    asked = [command("--run", run, "--ask", tmp_path / "a.png", "what color is it?", cwd=cwd, **hub.env)
             for run, cwd in (("smoke", trained[0]), ("user/repo", tmp_path), (f"user/repo@{sha}", tmp_path))]
    assert asked[0].stdout and len({a.stdout for a in asked}) == 1
    assert all(a.stderr.startswith("(") and len(a.stderr.splitlines()) == 1 for a in asked)             # the run and the model
    snapshot, = Path(hub.env["HF_HOME"]).glob("hub/models--user--repo/snapshots/*")
    assert contents(snapshot) == {file: data for file, data in files.items() if file != "README.md" and "of" not in file}

def test_settings_lose_the_folders_that_they_name(monkeypatch, tmp_path):
    """The name of a person, in the path of their photographs, published with the weights."""
    monkeypatch.chdir(tmp_path)
    values = ["coco:/home/Jürgen/photos/", "coco:user/repo@v1", "0.5", "/", "coco:."]
    text = json.dumps({"data": values[0], "hub": values[1]}) + " / 0.5 " + values[0]
    assert sgt.without_places(text, values) == '{"data": "coco:photos", "hub": "coco:user/repo@v1"} / 0.5 coco:photos'

def test_whatever_goes_wrong_between_here_and_the_hub_is_one_line(hub, trained, tmp_path):
    """A traceback; a wait for minutes; a copy in the cache that is not used; a published fragment of a run."""
    (tmp_path / "half/samples").mkdir(parents=True)
    (tmp_path / "half/config.json").write_bytes((trained[0] / "runs/smoke/config.json").read_bytes())
    (tmp_path / "all.py").write_text("import json, sys, eval, sgt\nfor args in json.loads(sys.argv[1]):\n"
                                     "    print((eval if args[0] == 'user/repo' else sgt).main(args), file=sys.stderr)")
    smoke, use = str(trained[0] / "runs/smoke"), lambda name: ["--run", name, "--generate", "a ring"]
    cases = [({}, [(["user/repo"], None), (["user/repo", "--again"], "measure a copy"), (use("user/none"), "not there"),
                   (use("user/repo@v9"), "revision"), (use("user/a--b"), "give user/repo"),
                   (["--push", "user/new", "--run", str(tmp_path / "half")], "not finished"),
                   (["--push", "user/repo", "--run", smoke, "--public"], "is private"), (["--push", "user/new@v1", "--run", smoke], "no name"),
                   (["--train", "--preset", "smoke", "--run", "user/repo"], "./user/repo")]),
             ({"HF_TOKEN": ""}, [(["--push", "user/new", "--run", smoke], "log in")]),
             ({"HF_ENDPOINT": "http://127.0.0.1:9"}, [(use("user/repo"), None), (use("user/none"), "refused"), (use("runs/a"), "no readable"),
                                                      (["--push", "user/new", "--run", smoke], "refused")]),
             ({"HF_HUB_OFFLINE": "1"}, [(use("user/repo"), None), (use("user/none"), "OFFLINE")])]
    for env, asked in cases:
        began = time.perf_counter()
        said = command(json.dumps([args for args, _ in asked]), cwd=tmp_path, script=tmp_path / "all.py", PYTHONPATH=str(HERE),
                       **{**hub.env, **env}).stderr.splitlines()
        expected = [line for _, says in asked for line in (["0"] if says is None else [says, "2"])]
        assert len(said) == len(expected) and all(map(str.__contains__, said, expected)), said
        assert time.perf_counter() - began < 30
    assert set(hub.repos) == {"user/repo"}

def test_the_readme_tells_the_length_of_every_file():
    """A file map that has gone stale."""
    readme = (HERE / "README.md").read_text()
    for name in ("sgt.py", "kernels.py", "eval.py", "test_sgt.py"):
        said = int(re.search(rf"`{name}` \| ([\d,]+)", readme)[1].replace(",", ""))
        assert abs(said - len((HERE / name).read_text().splitlines())) <= 25, name

# ---- photographs -------------------------------------------------------------------------------------------

PHOTOS = dict(PRESETS["smoke"], data="coco:photos", max_objects=4)

def write_coco(root, n=8, size=(48, 32), change=None, save=None):
    """A COCO folder in the official layout: on each picture a dog below a cat; change(data, i) edits the training file."""
    (root / "annotations").mkdir(parents=True)
    for split, first in (("train2017", 1), ("val2017", 101)):
        (root / split).mkdir()
        w, h = size
        data = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "Dog"}, {"id": 9, "name": "cat"}]}
        for i in range(first, first + n):
            name = f"{i:012d}.jpg"
            pixels = np.random.default_rng(i).integers(0, 255, (h, w, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / name) if not save else save(root / split / name, pixels)
            data["images"].append({"id": i, "file_name": name, "width": w, "height": h})
            for j, (category, y) in enumerate(((7, 18), (9, 2))):
                box = [4 + i % 5, y, 4 + i % 5, y + 12, 30, y + 12, 30, y]
                data["annotations"].append({"id": 10 * i + j, "image_id": i, "category_id": category, "iscrowd": 0,
                                            "segmentation": [box], "bbox": [4 + i % 5, y, 26 - i % 5, 12]})
        if change and split == "train2017":
            change(data)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
        captions = [{"id": i["id"], "image_id": i["id"], "caption": "A dog, under a cat."} for i in data["images"][:2] if "id" in i]
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps({"annotations": captions}))
    return root

@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("SGT_CACHE", str(tmp_path / "cache"))
    sgt.photographs.cache_clear()
    return tmp_path

def opened(folder, P=32, scheme="coco"):
    data = sgt.photographs(f"{scheme}:{folder}", P, 4)
    return data, dataclasses.replace(Config(**PHOTOS), image_size=P, data=f"{scheme}:{folder}", categories=",".join(data.names),
                                     words=sgt.find_words(data))

def test_masks_of_photographs_are_those_of_pycocotools_small_ones_on_top(cached):
    """A mask that is shifted, transposed or covered by a larger one; captions of another picture."""
    def inner(data):                          # a third thing inside the dog, listed first
        data["annotations"].insert(0, {"id": 9999, "image_id": 1, "category_id": 9, "segmentation": [[10, 20, 10, 26, 18, 26, 18, 20]]})
    folder = write_coco(cached / "coco", size=(32, 32), change=inner)
    data, cfg = opened(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = benchmark.COCO(str(folder / "annotations/instances_train2017.json"))
    masks = [coco.annToMask(a) for a in sorted(coco.imgToAnns[1], key=lambda a: -int(coco.annToMask(a).sum()))]
    want = np.zeros((32, 32), int)
    for i, mask in enumerate(masks, 1):
        want[mask > 0] = i
    where = data.captions.index(["a dog, under a cat"])
    assert (data.maps[where, 0] == want).all() and len(masks) == 3
    assert np.asarray(Image.open(folder / "train2017/000000000001.jpg")).tolist() == data.images[where].tolist()
    assert data.names == ["dog", "cat"] and data.split.tolist() == [0] * 8 + [1] * 8 and not data.bad

def test_other_layouts_give_the_same_photographs_and_a_tenth_is_held_out_where_no_split_is_given(cached):
    """A folder of Roboflow, of this project's own export, or of one split alone that is not found; validation without pictures."""
    folder = write_coco(cached / "coco", n=40)
    for layout, file, pictures in (("flat", "instances.json", "."), ("flat_images", "instances.json", "images"),
                                   ("roboflow", "train/_annotations.coco.json", "train"), ("mini", "train/instances.json", "train/images")):
        (cached / layout / pictures).mkdir(parents=True)
        (cached / layout / file).write_bytes((folder / "annotations/instances_train2017.json").read_bytes())
        for f in (folder / "train2017").iterdir():
            (cached / layout / pictures / f.name).write_bytes(f.read_bytes())
        data, _ = opened(cached / layout)
        assert not data.bad and len(data.split) == 40 and 0 < data.split.sum() < 12
        assert (data.images[:40] == opened(folder)[0].images[:40]).all()
    (cached / "mini/val").mkdir()
    (cached / "mini/val/instances.json").write_bytes((folder / "annotations/instances_val2017.json").read_bytes())
    (cached / "mini/val/images").symlink_to(folder / "val2017")
    assert all("leads out" in line for line in opened(cached / "mini")[0].bad)

def test_run_lengths_are_read_as_pycocotools_writes_them():
    """A wrong sign, carry or difference in the decoder that checks what pycocotools is given."""
    rng = np.random.default_rng(0)
    for h, w in ((1, 1), (7, 300), (200, 90)):
        for share in (0.0, 0.01, 0.5, 1.0):
            mask = rng.random((h, w)) < share
            rle = benchmark.mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert (sgt.decode_mask({"size": [h, w], "counts": rle["counts"].decode()}, h, w) == mask).all()
            runs = sgt.run_lengths(rle["counts"].decode())
            assert sum(runs) == h * w and (sgt.decode_mask({"size": [h, w], "counts": runs}, h, w) == mask).all()

BAD_ANNOTATIONS = [
    ({"segmentation": [[math.nan, 1, 5, 1, 5, 5]]}, "absurd coordinates"), ({"segmentation": [[math.inf, 1, 5, 1, 5, 5]]}, "absurd"),
    ({"segmentation": [[1e30, 1, 5, 1, 5, 5]]}, "absurd"), ({"segmentation": [[10 ** 400, 1, 5, 1, 5, 5]]}, "absurd"),
    ({"segmentation": [["a", 1, 5, 1, 5, 5]]}, "absurd"), ({"segmentation": [[0, 0, 90, 31] * 5000]}, "absurd length"),
    ({"segmentation": [[1, 1, 5, 5]]}, "fewer than three points"), ({"segmentation": [[1, 1, 5, 1, 5, 5, 2]]}, "three points"),
    ({"segmentation": [5]}, "three points"), ({"segmentation": "dog"}, "run lengths"), ({"segmentation": 7}, "run lengths"),
    ({"segmentation": {"size": [32, 48], "counts": [32, 48]}}, "do not sum"), ({"segmentation": {"size": [48, 32], "counts": [1536]}}, "size"),
    ({"segmentation": {"size": [32, 48], "counts": [-4, 1540]}}, "do not sum"), ({"segmentation": {"size": [32, 48], "counts": "zz}"}}, "run lengths"),
    ({"segmentation": {"size": [32, 48], "counts": "11P"}}, "do not sum"), ({"segmentation": {"size": [32, 48]}}, "run lengths"),
    ({"segmentation": None, "bbox": None}, "neither a mask nor a box"), ({"segmentation": [], "bbox": [1, 2, math.nan, 4]}, "box"),
    ({"bbox": [1, 2, 3]}, "box"), ({"id": 0}, "annotation id 0"), ({"id": 11}, "there twice"), ({"id": "x"}, "no number"),
    ({"category_id": 8}, "unknown category 8"), ({"category_id": [7]}, "unknown category"), ({"image_id": 999}, "unknown image 999"),
    ({"image_id": "1"}, "unknown image"),
]

@pytest.mark.parametrize("bad, says", BAD_ANNOTATIONS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_bad_annotation_is_named_and_poisons_nothing(cached, bad, says):
    """pycocotools crashed or fed with garbage; a question about what is ill annotated, or its absence claimed; a lost picture."""
    data, cfg = opened(write_coco(cached / "coco", change=lambda data: data["annotations"][4].update(bad)))      # the dog of image 3
    assert len(data.bad) == 1 and says in data.bad[0] and len(data.split) == 16
    with pytest.raises(sgt.UserError, match="of 32 annotations cannot be used.*--tolerate 4"):
        data.complain(1.0)
    assert "1 of 32 annotations" in data.complain(4.0)
    photos = sgt.sample_photos(cfg, "train", np.arange(200), "questions")
    third = np.flatnonzero(photos.which == 2)
    assert len(third)
    lost = says.startswith("unknown")            # then nobody can know what was there
    for b in third:
        assert [o.shape for o in sgt.things(photos, b) if o.index >= 0] == ["cat"]
        assert lost or [o.shape for o in sgt.things(photos, b) if o.index < 0] == ["dog"]
        for kind in sgt.kinds_of(cfg):
            turn = QUESTIONS[kind][1](sgt.things(photos, b), random.Random(int(b)), cfg)
            assert lost or not turn or "dog" not in turn[0], turn
    assert lost or 2 not in data.pool("train", "masks")          # a target without the dog would teach that there is none

def jpeg_cut(path): path.write_bytes(path.read_bytes()[:400])
def leave(path): path.unlink(), path.symlink_to(Path(__file__).resolve())
def huge(path): path.unlink(), open(path, "wb").truncate(sgt.LARGEST + 1)
def bomb(path):
    Image.new("1", (20000, 20000)).save(path, "PNG")

BAD_IMAGES = [
    ({"file_name": "../annotations/instances_val2017.json"}, None, "UnidentifiedImage"), ({"file_name": "../../secret.jpg"}, None, "leads out"),
    ({"file_name": "/etc/passwd"}, None, "leads out"), ({"file_name": "no.jpg"}, None, "no such file"), ({"file_name": "a\0b"}, None, "ValueError"),
    ({"file_name": 5}, None, "missing, absurd"), ({"width": 47}, None, "annotated as 47"), ({"width": math.nan}, None, "absurd"),
    ({"width": 10 ** 9, "height": 10 ** 9}, None, "absurd"), ({"id": 1}, None, "there twice"), ({"id": None}, None, "missing"),
    ({}, jpeg_cut, "OSError"), ({}, leave, "leads out"), ({}, huge, "absurdly large"), ({}, bomb, "pixels"), ({}, Path.unlink, "no such file"),
]

@pytest.mark.parametrize("bad, spoil, says", BAD_IMAGES)
def test_a_bad_picture_is_named_and_skipped(cached, bad, spoil, says):
    """A name that leaves the folder is read; a bomb or half a file kills the run or trains it on gray."""
    folder = write_coco(cached / "deep/coco", change=lambda data: data["images"][2].update(bad))
    (cached / "deep/secret.jpg").write_bytes((folder / "train2017/000000000001.jpg").read_bytes())
    if spoil:
        spoil(folder / "train2017/000000000003.jpg")
    data, _ = opened(folder)
    assert sum(line.startswith("image") for line in data.bad) == 1 and says in " ".join(data.bad) and len(data.split) == 15
    with pytest.raises(sgt.UserError, match="1 of 16 images.* cannot be used"):
        data.complain(6.0)

def test_unusual_pictures_are_read_as_people_see_them(cached):
    """16 bits clipped to white, CMYK inverted, a palette as gray, a portrait lying on its side."""
    gradient = np.linspace(0, 255, 48 * 32).reshape(32, 48).astype(np.uint8)
    gray = Image.fromarray(gradient)
    gray.convert("CMYK").save(cached / "cmyk.jpg", quality=100)
    gray.convert("P").save(cached / "palette.png")
    Image.fromarray(gradient.astype(np.uint16) * 200).save(cached / "deep.png")
    turn = Image.Exif()
    turn[0x112] = 6
    gray.transpose(Image.Transpose.ROTATE_90).save(cached / "turned.jpg", exif=turn, quality=100)
    for name in ("cmyk.jpg", "palette.png", "deep.png", "turned.jpg"):
        assert abs(np.asarray(sgt.upright(cached / name)).astype(float) - gradient[..., None]).max() < 12, name
    assert sgt.upright(cached / "turned.jpg", (32, 48)).size == (32, 48)         # annotated as it lies

def test_questions_about_photographs_are_true_and_nothing_ill_known_is_asked(cached):
    """An answer that the annotations contradict; a crowd that is counted; left and right not swapped with the picture."""
    folder = write_coco(cached / "coco", change=lambda data: data["annotations"][1].update(iscrowd=1))     # the cats of image 1
    data, cfg = opened(folder)
    photos = sgt.sample_photos(cfg, "train", np.arange(300), "questions")
    assert photos.flip.any() and not photos.flip.all()
    r, asked = sgt.render(cfg, photos), set()
    for b in range(300):
        objects, rng = sgt.things(photos, b), random.Random(b)
        for o, painted in zip(objects, photos.painted[b]):
            rows, columns = torch.nonzero(r.instance[b] == objects.index(o) + 1, as_tuple=True)
            assert bool(painted) == bool(len(rows))
            if painted:
                assert abs((columns.min() + columns.max() + 1) / 2 - o.x) < 1e-3 and abs((rows.min() + rows.max() + 1) / 2 - o.y) < 1e-3
        for kind in sgt.kinds_of(cfg):
            question, said = QUESTIONS[kind][1](objects, rng, cfg) or ("", "")
            asked.add(kind if question else "")
            if photos.which[b] == 0:
                assert "cat" not in question and (question, said) != ("is there a cat?", "no")
            elif "from the" in question:
                assert said == ("above" if question.startswith("where is the cat") else "below")
            assert (question, said) not in {("is there a dog?", "no"), ("how many dogs?", "zero"), ("what object is top center?", "dog")}
    assert asked - {""} >= {"existence", "counting", "relation", "location", "compare", "arithmetic", "category"}
    captioned = sgt.sample_photos(cfg, "train", np.arange(50), "captions")
    assert not captioned.flip.any()
    texts = {(int(captioned.which[b]) < 2, sgt.caption(captioned, b, random.Random(b), cfg)) for b in range(50)}
    assert {text for human, text in texts if human} == {"a dog, under a cat"} and len(texts) > 1

def test_the_cache_is_used_again_and_only_for_the_same_files_and_settings(cached, monkeypatch):
    """Old pictures after the data changed; decoding in every run; half a cache after a crash; two runs that spoil each other's."""
    folder = write_coco(cached / "coco")
    real, calls = sgt.digest, []
    monkeypatch.setattr(sgt, "digest", lambda *a: calls.append(1) or real(*a))
    first = opened(folder)[0]
    sgt.photographs.cache_clear()
    again = opened(folder)[0]
    assert len(calls) == 16 and again.folder == first.folder
    opened(folder, 48)                            # another size
    os.utime(folder / "train2017/000000000001.jpg", (1, 1))
    sgt.photographs.cache_clear()
    assert opened(folder)[0].folder != first.folder and len(calls) == 48
    monkeypatch.setattr(sgt, "digest", lambda *a: 1 / 0)
    os.utime(folder / "train2017/000000000001.jpg", (2, 2))
    sgt.photographs.cache_clear()
    with pytest.raises(ZeroDivisionError):
        opened(folder)
    assert len(list((cached / "cache").iterdir())) == 3           # no half one
    code = f"import sgt; d = sgt.photographs('coco:{folder}', 40, 4); print(d.images[:].astype(int).sum())"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert len({p.communicate()[0] for p in both}) == 1 and [p.returncode for p in both] == [0, 0]
    assert len(list((cached / "cache").iterdir())) == 4

def write_tar(path, folder, extra=()):
    """An SA-1B shard made of a COCO folder, with hostile members on request."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = benchmark.COCO(str(folder / "annotations/instances_train2017.json"))
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        def add(name, data=b"", **about):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in about.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
        for i, about in coco.imgs.items():
            found = [{"id": a["id"], "bbox": a["bbox"], "segmentation": {"size": coco.annToRLE(a)["size"],
                      "counts": coco.annToRLE(a)["counts"].decode()}} for a in coco.imgToAnns[i]]
            add(f"sa_{i}.json", json.dumps({"image": {"image_id": i, **about}, "annotations": found}).encode())
            add(f"sa_{i}.jpg", (folder / "train2017" / about["file_name"]).read_bytes())
        for name, data, about in extra:
            add(name, data, **about)
    return path

def test_a_tar_of_class_agnostic_masks_is_read_where_it_lies_and_hostile_members_are_named(cached, monkeypatch):
    """A link, device, absurd size or path in a shard; a picture without annotations; masks of another picture."""
    folder = write_coco(cached / "coco", n=30)
    hostile = [("sa_900.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), ("sa_900.json", b'{"image": {}}', {}),
               ("sa_901.jpg", b"", {"type": tarfile.CHRTYPE}), ("sa_901.json", b'{"image": {"height": 32, "width": 48}}', {}),
               ("../sa_902.jpg", b"x", {}), ("sa_903.jpg", b"x", {}), ("sa_904.jpg", b"x", {}), ("sa_904.json", b"[" * 100000, {}),
               ("sa_905.json", b'{"image": {"height": NaN, "width": 48}}', {}), ("sa_905.jpg", b"x", {}),
               ("sa_906.json", b'{"image": {"height": 32, "width": 48}}', {}), ("sa_906.jpg", b"x" * 200001, {})]
    monkeypatch.setattr(sgt, "LARGEST", 200000)
    data, cfg = opened(write_tar(cached / "shard.tar", folder, hostile), scheme="sam")
    assert len(data.split) == 30 and data.names == ["object"] and 0 < data.split.sum() < 30
    said = "\n".join(data.bad)
    assert len(data.bad) == 7 and all(f"sa_90{i}" in said for i in range(7)), said
    assert not list(cached.glob("**/sa_*"))                       # nothing was extracted
    photos = sgt.sample_photos(cfg, "train", np.arange(20), "masks")
    assert (photos.count == 2).all() and set(sgt.kinds_of(cfg)) == {"counting", "location", "arithmetic"}
    sgt.proxy_batch(cfg, "referring", photos, sgt.render(cfg, photos))
    (cached / "cut.tar").write_bytes((cached / "shard.tar").read_bytes()[:3000])
    with pytest.raises(sgt.UserError):
        sgt.photographs(f"sam:{cached / 'cut.tar'}", 32, 4)
    unpacked = cached / "unpacked"
    with tarfile.open(cached / "shard.tar") as tar:
        tar.extractall(unpacked, [m for m in tar if m.isreg() and "90" not in m.name], filter="data")
    assert sorted(opened(unpacked, scheme="sam")[0].images.reshape(30, -1).sum(1)) == sorted(data.images[:30].reshape(30, -1).sum(1))

def test_a_voc_folder_gives_classes_and_instances_and_void_is_neither(cached):
    """255 taken for a class; instances merged; a class that does not exist."""
    root = cached / "VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    kinds, parts = np.zeros((2, 32, 32), np.uint8)
    kinds[4:12, 4:28], kinds[20:30, 4:28], kinds[12:14] = 15, 12, 255
    parts[4:12, 4:14], parts[4:12, 14:28], parts[20:30, 4:28], parts[12:14] = 1, 2, 3, 255
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 9, 9)).save(root / f"JPEGImages/{i}.jpg")
        Image.fromarray(kinds + np.uint8(9 * (i == 5) * (kinds == 15))).save(root / f"SegmentationClass/{i}.png")
        Image.fromarray(parts).save(root / f"SegmentationObject/{i}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("3\n4\n")
    data, cfg = opened(root, scheme="voc")
    photos = sgt.sample_photos(cfg, "val", np.arange(2), "masks")
    assert [o.shape for o in sgt.things(photos, 0)] == ["dog", "person", "person"] and data.split.sum() == 2
    assert sgt.render(cfg, photos).instance[0, 13].sum() == 0 and sgt.render(cfg, photos).category[0, 6, 6] == 15
    assert len(data.bad) == 1 and "class 24" in data.bad[0]

def test_names_that_are_missing_or_odd_are_skipped_or_read_and_never_end_the_run(cached):
    """A class called "none"; a missing class taken for class 0; a name that is not UTF-8; .JPG left out without a word."""
    def change(data):
        data["categories"][0].update(name=None), data["categories"].append({"id": 0, "name": "zebra"})
        data["annotations"][1].pop("category_id")                     # of a cat
    data, _ = opened(write_coco(cached / "coco", change=change))
    assert data.names == ["cat", "zebra", "dog"] and len(data.bad) == 9
    assert sum("unknown category 7" in line for line in data.bad) == 8 and "annotation 11: unknown category None" in data.bad
    def rename(data):
        data["images"][0]["file_name"] = "\udcff.jpg"
    folder = write_coco(cached / "odd", change=rename)
    (folder / "train2017/000000000001.jpg").rename(folder / "train2017/\udcff.jpg")
    (folder / "annotations/instances_val2017.json").unlink()
    assert not opened(folder)[0].bad
    with tarfile.open(cached / "shard.tar", "w") as out:
        for suffix, content in ((".JPG", (cached / "coco/train2017/000000000001.jpg").read_bytes()),
                                (".json", b'{"image": {"height": 32, "width": 48}, "annotations": []}')):
            info = tarfile.TarInfo("sa_\udcff" + suffix)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    assert len(opened(cached / "shard.tar", scheme="sam")[0].split) == 1

def test_a_broken_list_of_the_held_out_is_read_as_far_as_it_goes(cached):
    """A traceback for one byte that is not UTF-8; a byte order mark taken for a part of the first name."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (cached / "voc" / name).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 32)).save(cached / f"voc/JPEGImages/{i}.jpg")
        Image.new("L", (32, 32), 1).save(cached / f"voc/SegmentationClass/{i}.png")
    (cached / "voc/ImageSets/Segmentation/val.txt").write_bytes(b"\xef\xbb\xbf1\n\xff\n")
    assert opened(cached / "voc", scheme="voc")[0].split.tolist() == [False, True, False]

def test_a_place_that_cannot_be_read_is_one_line(cached, capsys):
    """A traceback: a loop of links, nobody's home, an archive that is compressed, empty or nested without end."""
    (cached / "loop").symlink_to(cached / "loop")
    plain = write_tar(cached / "plain.tar", write_coco(cached / "coco")).read_bytes()
    (cached / "gz.tar.gz").write_bytes(gzip.compress(plain)), (cached / "gz.tar").write_bytes(gzip.compress(plain))
    (cached / "empty.tar").write_bytes(b"")
    link = tarfile.TarInfo("././@LongLink")
    link.type = tarfile.GNUTYPE_LONGNAME
    (cached / "deep.tar").write_bytes(link.tobuf(tarfile.GNU_FORMAT) * 3000)
    (cached / "shards").mkdir()
    (cached / "shards/a.tar").write_bytes(plain), (cached / "shards/b.tar.gz").write_bytes(gzip.compress(plain))
    for data, says in ((f"coco:{cached / 'loop'}", "there is no"), ("coco:~nobody-of-that-name/x", "there is no"),
                       *((f"sam:{cached / name}", "no whole .tar") for name in ("gz.tar.gz", "gz.tar", "empty.tar", "deep.tar", "shards"))):
        assert sgt.main(["--train", "--preset", "smoke", "--row-len", "96", "--data", data]) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line

def test_a_cache_that_cannot_be_used_is_one_line_and_nobody_elses_is_touched(cached, monkeypatch):
    """A full disk that ends the interpreter (SIGBUS); a traceback for what a power cut left; a run of another container,
    with the same process id, whose half-written cache is removed."""
    folder = write_coco(cached / "coco")
    first = opened(folder)[0].folder
    other = first.with_name(f"{first.name}.{os.getpid()}")
    other.mkdir()
    for name, content in (("maps.npy", b""), ("about.json", b""), ("about.json", None)):
        (first / name).unlink() if content is None else (first / name).write_bytes(content)
        sgt.photographs.cache_clear()
        with pytest.raises(sgt.UserError, match="is damaged.*remove"):
            opened(folder)
        assert other.exists()
    sgt.photographs.cache_clear()
    shutil.rmtree(first)
    monkeypatch.setattr(sgt.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(sgt.UserError, match="cannot write the cache .* do not fit"):
        opened(folder)
    monkeypatch.setenv("SGT_CACHE", str(folder / "annotations/instances_train2017.json"))
    with pytest.raises(sgt.UserError, match="cannot write the cache .*SGT_CACHE"):
        opened(folder)

def test_photographs_train_from_the_command_line_and_mistakes_get_one_line(cached, monkeypatch, capsys):
    """A stage, proxy or report that works on scenes only; a data error as a traceback, or after something was written."""
    folder = write_coco(cached / "coco", n=12)
    args = ("--train", "--preset", "smoke", "--base-steps", 4, "--tok-steps", 4, "--arm-steps", 2, "--eval-questions", 40,
            "--threads", 2, "--data")
    done = command(*args, f"coco:{folder}", "--proxies", "none,instance,panoptic,referring", cwd=cached)
    assert done.returncode == 0, done.stderr
    report = json.loads((cached / "runs/coco/report.json").read_text())
    assert "category" in done.stdout and "SGT, training" in done.stdout and "generation" not in report["models"]["instance"]
    for arm, entry in report["models"].items():
        assert math.isclose(100 * benchmark.hits_of(report, arm, "understanding").mean(), entry["understanding"]["average"])
    assert json.loads((cached / "runs/coco/config.json").read_text())["categories"] == "dog,cat"
    picture = folder / "val2017/000000000101.jpg"
    for verb in (("--ask", picture, "is there a dog?"), ("--segment", picture), ("--segment", picture, "--proxy", "referring"),
                 ("--generate", "a dog and a cat")):
        done = command(*verb, cwd=cached)
        assert done.returncode == 0, done.stderr
    done = command(*args, f"sam:{write_tar(cached / 'shard.tar', folder)}", cwd=cached)
    assert done.returncode == 0 and "counting" in done.stdout, done.stderr
    spoiled = write_coco(cached / "spoiled", change=lambda data: data["annotations"][0].update(id=0))
    monkeypatch.chdir(cached)
    for data, says in ((f"coco:{spoiled}", "annotation id 0"), ("coco:nowhere", "there is no"), (f"coco:{cached}", "no instances*.json"),
                       (f"voc:{folder}", "no SegmentationClass"), (f"sam:{folder}", "none of the"), ("zip:x", "choose scenes"),
                       (f"coco:{folder}", "holds a run with other settings"), (f"coco:{folder} --proxies depth", "name each once")):
        before, _ = contents(cached / "runs"), capsys.readouterr()
        assert sgt.main([*map(str, args), *data.split(" ")]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and says in line and contents(cached / "runs") == before

def test_a_data_set_comes_from_the_hub_in_either_layout_and_from_the_cache_when_it_is_away(hub, cached):
    """Links of the Hub's cache taken for paths that leave the folder; a fetched data set that needs the network again."""
    folder = write_coco(cached / "coco")
    write_tar(cached / "shards/shard.tar", folder)
    for name, local in (("photos", folder), ("shards", cached / "shards")):
        hub.repos[f"user/{name}"], hub.private[f"user/{name}"] = {"1" * 40: contents(local)}, False
    code = ("import sgt, sys\ntry:\n    d = sgt.photographs(sys.argv[1], 32, 4)\n    print(d.images[:].astype(int).sum(), d.bad)\n"
            "except sgt.UserError as e:\n    print(e)")
    show = lambda data, **env: subprocess.run([sys.executable, "-c", code, data], cwd=HERE, env={**os.environ, **hub.env, **env},
                                              capture_output=True, text=True).stdout.strip()
    local = show(f"coco:{folder}")
    assert local.endswith("[]") and show("hf:user/photos") == local == show("hf:user/photos", HF_ENDPOINT="http://127.0.0.1:9")
    assert show("hf:user/shards") == show(f"sam:{cached / 'shards'}") != local
    assert "not there" in show("hf:user/none") and "is no name" in show("hf:photos") and "OFFLINE" in show("hf:user/none", HF_HUB_OFFLINE="1")
