"""What a trained run understands, draws and segments, beside the baselines and ceilings that give the numbers meaning.

    python eval.py runs/tiny                     # the tables of a run; its pictures are in report.html
    python eval.py runs/seed0 runs/seed1         # several seeds: means, standard errors, the paper's claims
    python eval.py runs/tiny --json              # the same facts for a program
    python eval.py runs/tiny --again             # measure again instead of reading report.json
    python eval.py runs/tiny --pope FILE.jsonl   # yes-or-no questions about your own pictures
    python eval.py runs/tiny --export FILE.json  # drawn masks as COCO results; --export-scenes DIR: the scenes as COCO data
    python eval.py runs/tiny --speed             # samples, answers and pictures a second

    1. Judge           parse a picture back into objects     5. One run     measure, tables
    2. Segmentation    PQ, mIoU, COCO's AP                   6. Study       arms and seeds, tests, claims
    3. Metrics         questions, POPE, prompts              7. Report      report.html
    4. Mechanism       attention, linear probes              8. Commands    the command line
"""
from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
import math
import re
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import kernels
import sgt
from sgt import COLOR_NAMES, COLORS, PALETTE, QUESTIONS, SHAPES, Config, Text, Thing, UserError

# ==== 1. Judge: parse a picture back into objects ===========================================================

def components(mask: Tensor) -> Tensor:
    """Label the 8-connected parts of masks: (B, P, P) bool → (B, P, P) int64, 0 outside, else 1 + the largest flat pixel
    index of the part. Labels spread by max-pooling until nothing changes.
    """
    B, P, _ = mask.shape
    labels = torch.arange(1, P * P + 1, device=mask.device, dtype=torch.float32).view(1, P, P) * mask
    while True:
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread

def split_parts(label_map: Tensor, classes: int, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of one class in an index map (B, P, P), 0 = background: sample (n,), class (n,), masks (n, P, P) bool."""
    B, P, _ = label_map.shape
    each = torch.arange(1, classes, device=label_map.device)[:, None, None]
    labels = components((label_map[:, None] == each).flatten(0, 1)).view(B, classes - 1, P * P)  # (B, classes-1, P·P)
    b, c, p = torch.nonzero(labels, as_tuple=True)
    key = (b * classes + c) * (P * P + 1) + labels[b, c, p]
    keys, part, area = key.unique(return_inverse=True, return_counts=True)
    masks = torch.zeros(len(keys), P * P, dtype=torch.bool, device=label_map.device)
    masks[part, p] = True
    keep = area >= smallest
    sample_class = (keys // (P * P + 1))[keep]
    return sample_class // classes, sample_class % classes + 1, masks[keep].view(-1, P, P)

def nearest(image: Tensor, palette: Tensor) -> Tensor:
    """Index of the palette color (n, 3) nearest to every pixel of (B, 3, P, P); (B, P, P)."""
    return distances(image, palette).argmin(1)

def distances(image: Tensor, palette: Tensor) -> Tensor:
    return torch.stack([(image - color[:, None, None]).square().sum(1) for color in palette], 1)          # (B, n, P, P)

def judge(cfg: Config, image: Tensor) -> list[list[Thing]]:
    """The objects in pictures (B, 3, P, P) of the scene world, by analysis through synthesis.

    Pixels are assigned to the nearest object or background color; every connected part of one color is compared with
    renderings of each shape and size at its place, and takes the best one if the overlap (soft IoU) exceeds 0.7.
    Parts hidden by another object do not count against a shape.
    """
    P, names = cfg.image_size, COLOR_NAMES[:cfg.colors]
    backgrounds = torch.tensor(sgt.BACKGROUNDS)
    palette = torch.cat([backgrounds, torch.tensor([COLORS[c] for c in names])])
    image = image.float().cpu()
    label = (nearest(image, palette) - len(backgrounds) + 1).clamp(min=0)                       # 0 background
    smallest = 0.4 * (0.3 * sgt.RADII[0] * P) ** 2 * math.pi + 2
    sample, color, masks = split_parts(label, len(names) + 1, smallest)
    found: list[list[Thing]] = [[] for _ in image]
    pixel = torch.arange(P) + 0.5
    radii = torch.tensor(sgt.RADII) * P
    for start in range(0, len(masks), 64):
        b, c, mask = sample[start:start + 64], color[start:start + 64], masks[start:start + 64]
        n = len(mask)
        # how much of each pixel the object covers: its position on the line from background to object color
        back = nearest(image[b], backgrounds).masked_fill(label[b] > 0, len(backgrounds))         # (n, P, P)
        votes = torch.stack([(back == i).flatten(1).sum(1) for i in range(len(backgrounds))], 1)
        ground = backgrounds[votes.argmax(1)]                                                     # (n, 3)
        ray = palette[len(backgrounds) - 1 + c] - ground
        cover = ((image[b] - ground[:, :, None, None]) * ray[:, :, None, None]).sum(1)
        cover = (cover / ray.square().sum(1)[:, None, None]).clamp(0, 1)                          # (n, P, P)
        near = F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0]                      # the part and its edge
        hidden = (label[b] != 0) & (label[b] != c[:, None, None])
        hidden = (F.max_pool2d(hidden[:, None].float(), 3, 1, 1)[:, 0] > 0) & ~mask
        cover = torch.maximum(cover * near, mask * 0.7)
        weight = 1.0 - hidden.float()
        rows, cols = mask.any(2).float(), mask.any(1).float()
        first = lambda line: line.argmax(1)
        last = lambda line: P - line.flip(1).argmax(1)
        middle_y, middle_x = (first(rows) + last(rows)) / 2, (first(cols) + last(cols)) / 2  # (n,) box centre
        best = torch.zeros(n)
        best_shape, best_size = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
        best_x, best_y = middle_x.clone(), middle_y.clone()
        for s, (name, outline) in enumerate(list(SHAPES.items())[:cfg.shapes]):
            for size, radius in enumerate(radii):
                # the box of a triangle or star is not centred on the point that the shape is drawn around
                lift = {"triangle": 0.125, "star": 0.095}.get(name, 0.0) * radius
                for oy in (-0.5, 0.0, 0.5):
                    for ox in (-0.5, 0.0, 0.5):
                        x, y = middle_x + ox, middle_y + lift + oy
                        dx, dy = (pixel - x[:, None]) / radius, (pixel - y[:, None]) / radius
                        model = (0.5 - outline(dx[:, None, :], dy[:, :, None]) * radius).clamp(0, 1)
                        overlap = (torch.minimum(model, cover) * weight).flatten(1).sum(1)
                        score = overlap / (torch.maximum(model, cover) * weight).flatten(1).sum(1)
                        seen = (model * weight).flatten(1).sum(1) > 0.5 * model.flatten(1).sum(1)
                        better = (score > best) & seen   # or noise would be a large object, almost all hidden
                        best = torch.where(better, score, best)
                        best_shape[better], best_size[better] = s, size
                        best_x, best_y = torch.where(better, x, best_x), torch.where(better, y, best_y)
        for i in range(n):
            if best[i] > 0.7:
                found[int(b[i])].append(Thing(sgt.SHAPE_NAMES[best_shape[i]], names[int(c[i]) - 1],
                                              ("small", "big")[best_size[i]], float(best_x[i]), float(best_y[i]),
                                              float(radii[best_size[i]]), len(found[int(b[i])])))
    return found

Prompt = namedtuple("Prompt", "kind text objects")
GENEVAL = ["single", "two", "counting", "colors", "position", "attribution"]

def satisfied(prompt: Prompt, found: list[Thing]) -> bool:
    """Whether parsed objects fulfil a prompt, by GenEval's rules: what is asked for must be there (extra objects are
    allowed), except that counts are exact, and positions hold for some pair of the named shapes.
    """
    wanted = prompt.objects
    if prompt.kind == "counting":
        return sum(o.shape == wanted[0].shape for o in found) == len(wanted)
    if prompt.kind in ("single", "two"):
        return {o.shape for o in wanted} <= {o.shape for o in found}
    if prompt.kind in ("colors", "attribution"):
        return {(o.color, o.shape) for o in wanted} <= {(o.color, o.shape) for o in found}
    a, b = wanted
    return any(sgt.relation(p, q) == sgt.relation(a, b) for p in found for q in found
               if p.shape == a.shape and q.shape == b.shape)

# ==== 2. Segmentation: colors → masks → PQ, mIoU, AP ==========================================================

def masks_of(target: Tensor, colors: int) -> list[Tensor]:
    """Instance masks in drawn targets (B, 3, P, P): nearest palette color, without specks. One color is one object, be it
    cut in two by another that lies in front.
    """
    P = target.shape[-1]
    label = nearest(target.float().cpu(), PALETTE[:colors + 1])
    sample, color, parts = split_parts(label, colors + 1, max(2.0, P * P / 256))
    masks = [[parts[(sample == b) & (color == c)].any(0) for c in color[sample == b].unique()] for b in range(len(target))]
    return [torch.stack(found) if found else parts[:0] for found in masks]

def true_masks(instance: Tensor) -> list[Tensor]:
    """Instance map (B, P, P) → a (n, P, P) bool tensor for every sample."""
    return [torch.stack([m == i for i in m.unique() if i > 0]) if (m > 0).any() else torch.zeros(0, *m.shape, dtype=torch.bool)
            for m in instance.cpu()]

def panoptic_quality(predicted: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Class-agnostic panoptic quality (arXiv 1801.00868) over a data set, 0-100: pairs with IoU > ½ match, and
    PQ = SQ · RQ = (mean IoU of matches) · (matches / (matches + ½ false positives + ½ misses)). Also mIoU: the mean, over
    true masks, of the best IoU of any prediction. Predicting nothing where nothing is scores 100.
    """
    matched, iou_sum, extra, missed, best = 0, 0.0, 0, 0, []
    for p, t in zip(predicted, truth):
        p_flat, t_flat = p.flatten(1).float(), t.flatten(1).float()
        both = p_flat @ t_flat.T                                                       # (predictions, truths)
        iou = both / (p_flat.sum(1)[:, None] + t_flat.sum(1)[None] - both).clamp(min=1)
        hits = iou > 0.5                          # masks of one image do not overlap, so a match is unique
        matched += int(hits.sum())
        iou_sum += float(iou[hits].sum())
        extra += len(p) - int(hits.any(1).sum())
        missed += len(t) - int(hits.any(0).sum())
        best += iou.max(0).values.tolist() if len(p) else [0.0] * len(t)
    if matched + extra + missed == 0:
        return {"pq": 100.0, "sq": 100.0, "rq": 100.0, "miou": 100.0}
    sq, rq = iou_sum / max(matched, 1), matched / (matched + 0.5 * extra + 0.5 * missed)
    return {"pq": 100 * sq * rq, "sq": 100 * sq, "rq": 100 * rq, "miou": 100 * float(np.mean(best)) if best else 0.0}

def as_coco(instance: Tensor) -> dict:
    """Instance maps (n, P, P) as a COCO data set without categories; annotation ids start at 1, because COCOeval takes
    a match with annotation 0 for none.
    """
    images = [{"id": i, "width": instance.shape[2], "height": instance.shape[1], "file_name": f"{i:06d}.png"}
              for i in range(len(instance))]
    found = [(i, m) for i, masks in enumerate(true_masks(instance)) for m in masks]
    annotations = [{"id": 1 + j, "image_id": i, "category_id": 1, "iscrowd": 0, "area": int(m.sum()), **encode_mask(m)}
                   for j, (i, m) in enumerate(found)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}

def encode_mask(mask: Tensor) -> dict:
    """A mask (P, P) bool as COCO's compressed run lengths, and its box [x, y, width, height]."""
    rle = mask_tools.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "bbox": mask_tools.toBbox(rle).tolist()}

def coco_results(predicted: list[Tensor], scores: list[list[float]]) -> list[dict]:
    return [{"image_id": i, "category_id": 1, "score": score, **encode_mask(mask)}
            for i, (masks, each) in enumerate(zip(predicted, scores)) for mask, score in zip(masks, each)]

def average_precision(truth: dict, results: list[dict]) -> dict[str, float]:
    """pycocotools' mask AP (mean over IoU 0.50:0.95), AP50 and AR of up to 100 masks, in percent, without classes. Nothing
    to find: 100 if nothing was drawn, else 0.
    """
    if not truth["annotations"] or not results:
        return dict.fromkeys(("ap", "ap50", "ar"), 100.0 * (not truth["annotations"] and not results))
    with contextlib.redirect_stdout(io.StringIO()):                   # pycocotools talks
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        judged = COCOeval(coco, coco.loadRes(results), "segm")
        judged.evaluate(), judged.accumulate(), judged.summarize()
    return {"ap": 100 * judged.stats[0], "ap50": 100 * judged.stats[1], "ar": 100 * judged.stats[8]}

def confidence(drawn: Tensor, masks: list[Tensor], colors: int) -> list[list[float]]:
    """How surely each mask was painted: 1 minus the mean distance of its pixels to their palette color."""
    palette = PALETTE[:colors + 1]
    distance = distances(drawn.cpu(), palette).min(1).values.sqrt()                                # (n, P, P)
    return [[round(1 - float(distance[i][m].mean()), 4) for m in each] for i, each in enumerate(masks)]

def semantic_miou(cfg: Config, drawn: Tensor, category: Tensor) -> float:
    """Mean IoU in percent of the classes that occur, background included, over all pictures together."""
    n = len(cfg.shape_names) + 1
    said = nearest(drawn.float().cpu(), PALETTE[:n])
    table = (said * n + category).flatten().bincount(minlength=n * n).view(n, n)                  # (said, true)
    both, occurs = table.diagonal(), table.sum(0) > 0
    return 100 * float((both / (table.sum(0) + table.sum(1) - both))[occurs].mean())

# ==== 3. Metrics of a model =================================================================================

def stream(cfg: Config, split: str, use: str = "questions", chunk: int = 256):
    """The scenes of a split without end, a chunk at a time; photographs come 40 times each."""
    photographs = 0 if cfg.data == "scenes" else len(sgt.photographs(cfg.data, cfg.image_size, cfg.max_objects).pool(split, use))
    for start in range(0, 40 * photographs or 10 ** 9, chunk):
        yield sgt.sample(cfg, split, np.arange(start, start + chunk), use)

Item = namedtuple("Item", "kind scenes index question truth")

def questions(cfg: Config, split: str, total: int) -> list[Item]:
    """The same number of questions of every kind, each about a scene of its own: errors of answers about one scene go
    together, and standard errors and tests take them for independent. Photographs are fewer: there each question is asked
    about a picture once, perhaps less often than wanted, and `hits_of` counts by pictures.
    """
    kinds, items, known = sgt.kinds_of(cfg), [], set()
    need, scenes_only = Counter(dict.fromkeys(kinds, max(1, total // len(kinds)))), cfg.data == "scenes"
    for scenes in stream(cfg, split):
        for b in range(len(scenes)):
            objects, rng = sgt.things(scenes, b), sgt.word_rng(scenes, b)
            for kind, missing in need.most_common():                  # the kind that lags behind first
                asked = QUESTIONS[kind][1](objects, rng, cfg) if missing else None
                if asked and (scenes_only or (scenes.which[b], asked) not in known):
                    known.add(None if scenes_only else (scenes.which[b], asked))
                    items.append(Item(kind, scenes, b, *asked))
                    need[kind] -= 1
                    break
        if not need.total():
            break
    return items

def blind_baselines(cfg: Config, items: list[Item]) -> dict[str, dict[str, float]]:
    """Accuracy without the image: the commonest training answer of a kind, and of the very question."""
    by_kind, by_question = {kind: Counter() for kind in QUESTIONS}, {}
    scenes = sgt.sample(cfg, "train", np.arange(10000))
    for b in range(len(scenes)):
        objects, rng = sgt.things(scenes, b), sgt.word_rng(scenes, b)
        for kind in sgt.kinds_of(cfg):
            question, truth = QUESTIONS[kind][1](objects, rng, cfg) or ("", "")
            if question:
                by_kind[kind][truth] += 1
                by_question.setdefault(question, Counter())[truth] += 1
    top = lambda counter: counter.most_common(1)[0][0]
    majority, question_only = {}, {}
    for kind in dict.fromkeys(item.kind for item in items):
        asked = [item for item in items if item.kind == kind]
        majority[kind] = 100 * np.mean([top(by_kind[kind]) == i.truth for i in asked])
        question_only[kind] = 100 * np.mean([top(by_question.get(i.question, by_kind[kind])) == i.truth for i in asked])
    return {"majority": summarize(majority), "question_only": summarize(question_only)}

def summarize(by_kind: dict[str, float]) -> dict[str, float]:
    """Add the averages over kinds: all, perception, reasoning."""
    level = lambda name: float(np.mean([v for k, v in by_kind.items() if QUESTIONS[k][0] == name]))
    return {**{k: float(v) for k, v in by_kind.items()}, "perception": level("perception"),
            "reasoning": level("reasoning"), "average": float(np.mean(list(by_kind.values())))}

def ask_all(model, items: list[Item], batch: int = 250) -> list[str]:
    """Greedy answers."""
    said = []
    for start in range(0, len(items), batch):
        part, rendered = items[start:start + batch], {}
        for item in part:
            if id(item.scenes) not in rendered:
                rendered[id(item.scenes)] = sgt.render(model.cfg, item.scenes).image
        images = torch.stack([rendered[id(item.scenes)][item.index] for item in part])
        said += sgt.answer(model, images.to(model.embed.device), [item.question for item in part], limit=5)
    return said

def understanding(model, items: list[Item]) -> dict:
    """Accuracy in percent by kind: the greedy answer must equal the true one to the letter. `hits` has every single one."""
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS if any(item.kind == kind for item in items)}
    for item, said in zip(items, ask_all(model, items)):
        right[item.kind].append(said == item.truth)
    return {**summarize({kind: 100 * np.mean(hits) for kind, hits in right.items()}), "hits": bits(right)}

def bits(hits: dict[str, list[bool]]) -> dict[str, str]:
    return {kind: "".join("01"[h] for h in each) for kind, each in hits.items()}

MEASURES = {"understanding": ("understanding", "average"), "perception": ("understanding", "perception"),
            "reasoning": ("understanding", "reasoning"), "generation": ("generation", "average"),
            "position": ("generation", "position")}

def hits_of(report: dict, arm: str, measure: str) -> np.ndarray:
    """0 or 1 for each question or prompt that a measure averages, always in the same order. Of questions about photographs
    the sums by photograph, because answers about one picture are not independent; every kind counts the same, and the mean
    is that of the measure.
    """
    part, which = MEASURES[measure]
    kinds = report["models"][arm][part]["hits"]
    chosen = [k for k in kinds if which == "average" or k == which or QUESTIONS.get(k, ("",))[0] == which]
    hits = np.array([int(c) for k in chosen for c in kinds[k]], np.float64)
    if part == "understanding" and "photographs" in report:
        _, picture = np.unique([i for k in chosen for i in report["photographs"][k]], return_inverse=True)
        share = np.concatenate([np.full(len(kinds[k]), 1 / len(kinds[k]) / len(chosen)) for k in chosen])
        hits = np.bincount(picture, hits * share) * (picture.max() + 1)
    return hits

def measures(report: dict) -> list[str]:
    """What was measured: pictures drawn of prompts are judged in the world of scenes only."""
    return [m for m, (part, _) in MEASURES.items() if part in report["models"]["base"]]

def pope_items(cfg: Config, negatives: str, total: int) -> list[Item]:
    """POPE (arXiv 2305.10355): of each picture one thing that is there and one that is not: any ("random"), the commonest
    in training ("popular", which says little of scenes, where all are about as common), or, "adversarial", a color and a
    shape that are both there but not together; on photographs what is most often seen with what is there.
    """
    total = max(2, total // 2 * 2)
    every = [(c, s) for c in cfg.color_names for s in cfg.shape_names]
    train = sgt.sample(cfg, "train", np.arange(4000 if negatives != "random" else 2))
    seen = [{(o.color, o.shape) for o in sgt.things(train, b)} for b in range(len(train))]
    common = [pair for pair, _ in Counter(pair for each in seen for pair in sorted(each)).most_common()]
    together = Counter(pair for each in seen for pair in ((a, b) for a in sorted(each) for b in sorted(each)))
    items = []
    for scenes in stream(cfg, "val"):
        for b in range(len(scenes)):
            objects, rng = sgt.things(scenes, b), sgt.word_rng(scenes, b)
            there = sorted({(o.color, o.shape) for o in objects})
            mixed = sorted({(o.color, p.shape) for o in objects for p in objects} - set(there))
            if cfg.data != "scenes":               # what is most often seen with one of the things that are there
                mixed = sorted((p for p in every if p not in there), key=lambda p: -max(together[p, q] for q in there))[:3]
            absent = {"random": [p for p in every if p not in there], "popular": [p for p in common if p not in there][:3],
                      "adversarial": mixed}[negatives]
            there = sorted({(o.color, o.shape) for o in objects if o.index >= 0})
            if absent:
                for (color, shape), truth in ((rng.choice(there), "yes"), (rng.choice(absent), "no")):
                    items.append(Item("existence", scenes, b, f"is there a {color} {shape}?".replace("  ", " "), truth))
        if len(items) >= total:
            break
    return items[:total]

def pope_scores(truth: list[str], said: list[str]) -> dict[str, float]:
    """POPE's metrics in percent. What is not "yes" counts as no; without any yes precision, recall and F1 are 0."""
    yes, true = np.array([s == "yes" for s in said]), np.array([t == "yes" for t in truth])
    hit = float((yes & true).sum())
    precision, recall = hit / max(1, yes.sum()), hit / max(1, true.sum())
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    return {name: 100 * float(x) for name, x in dict(accuracy=(yes == true).mean(), precision=precision, recall=recall, f1=f1,
                                                     yes=yes.mean()).items()}

def pope_file(cfg: Config, path: str) -> tuple[list[Tensor], list[str], list[str]]:
    """Images, questions and labels of a POPE-format JSONL file; image paths are relative to its folder."""
    images, texts, labels = [], [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} ({e.__class__.__name__}); give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, text, truth = str(entry["image"]), str(entry.get("text") or entry["question"]), entry["label"].strip().lower()
            if truth not in ("yes", "no"):
                raise ValueError(f"label {truth!r} is neither yes nor no")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} line {number}: {e.__class__.__name__} {e}; give "
                            '{"image": …, "text": …, "label": "yes" or "no"}') from None
        images.append(sgt.read_image(str(Path(path).parent / image), cfg.image_size)[0][0])
        texts.append(" ".join(text.lower().split()))
        labels.append(truth)
        if len(cfg.text.encode(texts[-1])) > cfg.row_len - cfg.patches - 8:
            raise UserError(f"{path} line {number}: the question is too long for the model; make it shorter")
    if not labels:
        raise UserError(f"{path} holds no questions; give one JSON object a line")
    return images, texts, labels

def geneval_prompts(cfg: Config, total: int) -> tuple[list[Prompt], Tensor]:
    """The same number of prompts of GenEval's six kinds, with a true picture (n, 3, P, P) of each."""
    per_kind, prompts, images = max(1, total // len(GENEVAL)), [], []
    need = Counter({kind: per_kind for kind in GENEVAL})
    for scenes in stream(cfg, "val", "captions"):                     # like GenEval's pictures: objects lie apart
        pictures = sgt.render(cfg, scenes).image
        for b in range(len(scenes)):
            objects = sgt.things(scenes, b)
            texts = sgt.captions(objects, sgt.word_rng(scenes, b))
            kinds = [kind for kind in GENEVAL if kind in texts and need[kind] > 0]
            if kinds:
                kind = max(kinds, key=lambda k: need[k])
                need[kind] -= 1
                prompts.append(Prompt(kind, texts[kind], objects))
                images.append(pictures[b])
        if not +need:
            return prompts, torch.stack(images)

def exactly(objects: list[Thing], found: list[Thing]) -> bool:
    """Whether a picture was parsed exactly: every object's color and shape within 1.5 pixels of its place, and nothing else."""
    rest = list(found)
    for o in objects:
        close = [f for f in rest if (f.color, f.shape) == (o.color, o.shape) and math.hypot(f.x - o.x, f.y - o.y) < 1.5]
        if not close:
            return False
        rest.remove(close[0])
    return not rest

def score_pictures(cfg: Config, prompts: list[Prompt], images: Tensor) -> dict:
    """GenEval score in percent by kind, and the mean over kinds. Also, of the pictures of position prompts that show both
    shapes (`layout_seen`, percent), how many pixels a centre is from where the words hold (`layout_error`), and the share of
    pictures that are parsed as exactly what the prompt was made of (`exact`).
    """
    found, hits, errors = judge(cfg, images), {kind: [] for kind in GENEVAL}, []
    for p, f in zip(prompts, found):
        hits[p.kind].append(satisfied(p, f))
        if p.kind == "position":
            errors.append(layout_error(p, f))
    score, errors = {kind: 100 * float(np.mean(each)) for kind, each in hits.items()}, [e for e in errors if e is not None]
    return {**score, "average": float(np.mean(list(score.values()))), "hits": bits(hits),
            "layout_seen": 100 * len(errors) / max(1, len(hits["position"])),
            "layout_error": float(np.mean(errors)) if errors else None,
            "exact": 100 * float(np.mean([exactly(p.objects, f) for p, f in zip(prompts, found)]))}

def layout_error(prompt: Prompt, found: list[Thing]) -> float | None:
    """How far (pixels) one of two objects must move, along the axis of the words, until they are true; 0 where they are;
    None where one of the shapes is missing.
    """
    a, b = prompt.objects
    pairs = [(p, q) for p in found for q in found if p.shape == a.shape and q.shape == b.shape]
    if not pairs:
        return None
    word = sgt.relation(a, b)
    axis = (lambda o: (o.x, o.y)) if word in ("left of", "right of") else (lambda o: (o.y, o.x))
    sign = -1 if word in ("left of", "above") else 1

    def distance(p: Thing, q: Thing) -> float:
        (along_p, across_p), (along_q, across_q) = axis(p), axis(q)
        needed = max(1.5 * abs(across_p - across_q), 1.0)             # the rule of `relation`
        return 0.0 if sgt.relation(p, q) == word else max(0.0, needed - sign * (along_p - along_q))
    return min(distance(p, q) for p, q in pairs)

def drawn_targets(cfg: Config, model, tokenizer, name: str, total: int, split: str = "val") -> tuple[Tensor, Tensor, Tensor]:
    """What a model draws of validation pictures when asked for proxy `name` (without a model the true target, sent through
    the tokenizer: the ceiling), and the true instance and category maps.
    """
    drawn, instance, category = [], [], []
    if cfg.data != "scenes":                       # each photograph once
        total = min(total, len(sgt.photographs(cfg.data, cfg.image_size, cfg.max_objects).pool(split, "masks")))
    for scenes in stream(cfg, split, "masks", min(total, 100)):
        rendered = sgt.render(cfg, scenes)
        source, prompts, target = sgt.proxy_batch(cfg, name, scenes, rendered)
        device = tokenizer.place.device
        drawn.append(tokenizer.decode(tokenizer.encode(target.to(device))) if model is None else sgt.generate(
            model, tokenizer, [cfg.text.encode(p) for p in prompts], source.to(device), temperature=0.0))
        instance.append(rendered.instance)
        category.append(rendered.category)
        if len(instance) * len(scenes) >= total:
            return tuple(torch.cat(x)[:total].cpu() for x in (drawn, instance, category))

def segmentation(cfg: Config, model, tokenizer, name: str, total: int, split: str = "val") -> dict[str, float]:
    """Panoptic quality, mIoU and COCO's AP of instance masks; of the proxy that paints classes their mIoU."""
    drawn, instance, category = drawn_targets(cfg, model, tokenizer, name, total, split)
    if name == "semantic":
        return {"semantic_miou": semantic_miou(cfg, drawn, category)}
    masks = masks_of(drawn, cfg.max_objects)
    results = coco_results(masks, confidence(drawn, masks, cfg.max_objects))
    return {**panoptic_quality(masks, true_masks(instance)), **average_precision(as_coco(instance), results)}

# ==== 4. Mechanism: where the model looks, and what its features hold ========================================

@contextlib.contextmanager
def recorded_attention():
    """Collect the attention weights (B, H, S, L) of every layer of the forward passes inside, read from the true queries
    and keys. The reference recomputes the output as well, which must be what the model went on with.
    """
    seen, real, graphs = [], sgt.attention, kernels.GRAPHS

    def record(q, k, v, layout):
        out = real(q, k, v, layout)
        again, weights = kernels.attention_reference(q.float(), k.float(), v.float(), layout)
        assert (again - out).abs().max() < 0.05 * again.abs().max() + 1e-3, "recorded weights are not those of the model"
        seen.append(weights)
        return out
    sgt.attention, kernels.GRAPHS = record, False             # a recorded graph calls nobody
    try:
        yield seen
    finally:
        sgt.attention, kernels.GRAPHS = real, graphs

@torch.no_grad()
def looks_at(cfg: Config, model, items: list[Item]) -> dict[str, list[float]]:
    """Attention in answering "what color is the SHAPE?", per layer, in percent: how much of that of the last token, which
    says the answer, goes to the image; how much of this falls on the object asked about, from the last token and from
    the word SHAPE itself; and the share of the image that the object covers (chance).
    """
    found = {"image": [], "object": [], "object from its name": [], "chance": []}
    for item in items:
        one, ids = sgt.pick(item.scenes, slice(item.index, item.index + 1)), cfg.text.encode(item.question)
        rendered = sgt.render(cfg, one)
        target = next(o for o in sgt.things(one, 0) if o.shape in item.question)
        cover = F.avg_pool2d((rendered.instance == target.index + 1).float()[:, None], cfg.see_patch).flatten() > 0   # (U,)
        with recorded_attention() as seen:
            sgt.prefill(model, [ids], rendered.image.to(model.embed.device), 0)
        weights = torch.stack([w[0].mean(0).cpu() for w in seen])[:, cfg.patches:, :cfg.patches]     # (layers, T, U)
        on_object = weights[..., cover].sum(-1) / weights.sum(-1).clamp(min=1e-9)                    # (layers, T)
        found["image"].append(weights[:, -1].sum(-1))
        found["object"].append(on_object[:, -1])
        found["object from its name"].append(on_object[:, len(cfg.text.encode("what color is the"))])
        found["chance"].append(cover.float().mean().expand(cfg.depth))
    return {name: (100 * torch.stack(values).mean(0)).tolist() for name, values in found.items()}

KEYWORDS = {"object": [w for s in SHAPES for w in (s, sgt.plural(s))], "color": COLOR_NAMES, "number": sgt.NUMBERS,
            "position": ["left", "right", "above", "below", "of"]}

@torch.no_grad()
def listens_to(cfg: Config, model, tokenizer, prompts: list[Prompt]) -> dict[str, float | None]:
    """How much attention image tokens pay to a prompt's words of each kind, 100 = to an average word of it; mean over
    layers, in the first step of a drawing, when every token is masked.
    """
    kind_of = {cfg.text.encode(word)[0]: kind for kind, words in KEYWORDS.items() for word in words}
    paid = {kind: [] for kind in [*KEYWORDS, "other"]}
    for prompt in prompts:
        ids = [Text.BOS] + cfg.text.encode(prompt.text)
        with recorded_attention() as seen:
            sgt.generate(model, tokenizer, [ids], steps=1, temperature=0.0)
        # layers of the condition, then those of the drawing, then the tokenizer's, which decodes what was drawn
        drawing = seen[cfg.depth:2 * cfg.depth]
        words = torch.stack([w[0].mean((0, 1))[1:len(ids)].cpu() for w in drawing]).mean(0)        # (T - 1,)
        for token, weight in zip(ids[1:], (100 * words / words.mean()).tolist()):
            paid[kind_of.get(token, "other")].append(weight)
    return {kind: float(np.mean(x)) if x else None for kind, x in paid.items()}

@torch.no_grad()
def patch_features(cfg: Config, model, scenes: sgt.Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the understanding patches hold at each layer, (layers + 1, B, U, D), and what they show: shape, color (B, U),
    0 where no object covers a twentieth of the patch, and the number of objects (B,).
    """
    rendered, states = sgt.render(cfg, scenes), []
    block = lambda weights, x, *rest: states.append(x[:, :cfg.patches].float().cpu()) or sgt.Block.forward(weights, x, *rest)
    rows = sgt.Rows(cfg, len(scenes), cfg.patches + 1)
    for b in range(len(scenes)):
        rows.add(b, 0, [Text.BOS], patches=True)
    ids, slots, positions, layout = (x.to(model.embed.device) for x in rows.tensors())
    dtype = kernels.compute_dtype(ids.device)
    features = model.see(rendered.image.to(ids.device, dtype))
    x = model.embed_rows(ids, slots, features, torch.from_numpy(np.concatenate(rows.patch_at)).to(ids.device)).to(dtype)
    states.append(model.trunk(x, positions, layout, block=block)[:, :cfg.patches].float().cpu())
    p, M = cfg.see_patch, scenes.shape.shape[1]
    cover = torch.stack([F.avg_pool2d((rendered.instance == m).float()[:, None], p).flatten(1) for m in range(1, M + 1)], -1)
    amount, which = cover.max(-1)                                                                 # (B, U)
    label = lambda values: torch.where(amount > 0.05, torch.from_numpy(values).gather(1, which) + 1, 0)
    return torch.stack(states), label(scenes.shape), label(scenes.color), torch.from_numpy(scenes.count)

def probe(x: Tensor, y: Tensor, classes: int) -> float:
    """Accuracy in percent, on the second half, of a linear classifier fitted to the first by ridge regression on one-hot
    targets; x (n, D), y (n,).
    """
    half = len(x) // 2
    x = torch.cat([(x - x[:half].mean(0)) / (x[:half].std(0) + 1e-6), torch.ones(len(x), 1)], 1).double()
    fit, target = x[:half], F.one_hot(y[:half].long(), classes).double()
    weight = torch.linalg.solve(fit.T @ fit + 0.01 * half * torch.eye(x.shape[1], dtype=torch.float64), fit.T @ target)
    return 100 * float(((x[half:] @ weight).argmax(1) == y[half:]).double().mean())

def separability(cfg: Config, model, total: int = 1000) -> dict:
    """Linear probes at every layer: shape and color of a patch that shows an object, and the number of objects from the
    mean of all patches; with the majority class, and two principal components of the last layer for a picture.
    """
    states, shape, color, count = patch_features(cfg, model, sgt.sample_scenes(cfg, "val", np.arange(total)))
    on, D = (shape > 0).flatten(), states.shape[-1]
    tasks = {"shape": (shape.flatten()[on] - 1, cfg.shapes), "color": (color.flatten()[on] - 1, cfg.colors),
             "count": (count - 1, cfg.max_objects)}
    found = {name: [probe(layer.reshape(-1, D)[on] if name != "count" else layer.mean(1), y, n) for layer in states]
             for name, (y, n) in tasks.items()}
    majority = {name: 100 * float(y.bincount().max() / len(y)) for name, (y, _) in tasks.items()}
    last = states[-1].reshape(-1, D)[on]
    last = last[:400] - last.mean(0)
    points = last @ torch.linalg.svd(last, full_matrices=False)[2][:2].T                          # (400, 2)
    return {"probes": found, "majority": majority, "points": points.tolist(), "shapes": tasks["shape"][0][:400].tolist()}

# ==== 5. One run ============================================================================================

def evaluate(run: sgt.Run, device: torch.device) -> dict:
    """Measure every finished model of a run; write report.json, report.md and report.html; return the report."""
    cfg = run.config()
    in_scenes, items = cfg.data == "scenes", questions(cfg, "val", cfg.eval_questions)
    pope = {kind: pope_items(cfg, kind, cfg.eval_questions // 5) for kind in ("random", "popular", "adversarial")}
    pope = {kind: asked for kind, asked in pope.items() if asked}     # none where everything is an "object"
    _, tokenizer, _, _ = sgt.load_run(run, "base", device)
    report = {
        "run": run.folder.name, "seed": cfg.seed, "torch": torch.__version__, "device": str(device),
        "config": dataclasses.asdict(cfg), "questions": len(items), "masks": cfg.eval_masks, "blind": blind_baselines(cfg, items),
        "mask_ceiling": segmentation(cfg, None, tokenizer, "instance", cfg.eval_masks), "models": {}, "mechanism": {},
    }
    val = sgt.sample(cfg, "grid", np.arange(8), "masks")
    rendered, segment = sgt.render(cfg, val), cfg.text.encode(sgt.PROXIES["instance"].prompts[0])
    seen, looking = rendered.image.to(device), {}
    if in_scenes:
        colors = [i for i in questions(cfg, "val", 2000) if i.kind == "color"]                    # for the mechanism
        prompts, pictures = geneval_prompts(cfg, cfg.eval_prompts)
        round_trip = torch.cat([tokenizer.decode(tokenizer.encode(p.to(device))).cpu() for p in pictures.split(250)])
        for name, images in (("judge", pictures), ("tokenizer", round_trip)):
            report[name] = score_pictures(cfg, prompts, images)
    else:                                          # no judge of what a drawn photograph shows; but what is learned by heart shows
        learned = questions(cfg, "train", cfg.eval_questions)
        prompts = [Prompt("", sgt.caption(val, b, sgt.word_rng(val, b), cfg), None) for b in range(8)]
        report["photographs"] = {kind: [int(i.scenes.which[i.index]) for i in items if i.kind == kind]
                                 for kind in sgt.kinds_of(cfg)}
    report["prompts"] = len(prompts)
    # the picture beside the numbers: eight pictures cut up, eight prompts drawn, by every model
    shown = [len(prompts) * i // 8 for i in range(8)]
    cut, free = [("input", seen, None), ("true masks", sgt.instance(cfg, val, rendered), None)], []
    for arm in ["base", *cfg.arms]:
        _, _, model, _ = sgt.load_run(run, arm, device)
        print(f"measuring {arm} …", flush=True)
        ids = [[Text.BOS] + cfg.text.encode(p.text) for p in prompts]
        drawn = torch.cat([sgt.generate(model, tokenizer, ids[i:i + 100], guidance=cfg.guidance, seed=i).cpu()
                           for i in range(0, len(ids), 100)])
        entry = {"understanding": understanding(model, items),
                 "pope": {kind: pope_scores([i.truth for i in asked], ask_all(model, asked)) for kind, asked in pope.items()}}
        if arm in ("instance", "shuffled", "semantic"):
            entry["segmentation"] = segmentation(cfg, model, tokenizer, arm, cfg.eval_masks)
        if in_scenes:
            entry["generation"] = score_pictures(cfg, prompts, drawn)
            inside = {"looks_at": looks_at(cfg, model, colors), "separability": separability(cfg, model),
                      "listens_to": listens_to(cfg, model, tokenizer, prompts[::4])}
            report["mechanism"][arm], looking[arm] = inside, (model, int(np.argmax(inside["looks_at"]["object from its name"])))
        else:
            entry["learned"] = understanding(model, learned)
            if "segmentation" in entry:
                entry["learned_segmentation"] = segmentation(cfg, model, tokenizer, arm, cfg.eval_masks, "train")
        report["models"][arm] = entry
        cut.append((f"{label(arm)}: masks", sgt.generate(model, tokenizer, [segment] * 8, seen, temperature=0.0), None))
        free.append((f"{label(arm)}: drawn", drawn[shown], [prompts[i].text for i in shown]))
    run.write("report.json", json.dumps(report, indent=1).encode())
    run.write("report.md", (markdown(report) + "\n").encode())
    run.write("samples/comparison.png", sgt.picture_grid(cut + free))
    if in_scenes:
        run.write("samples/attention.png", attention_maps(cfg, looking, colors))
    write_html(run, report)
    return report

def label(arm: str) -> str:
    return {"base": "base", "none": "SFT", "instance": "SGT"}.get(arm, arm)

def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table with aligned columns; numbers with one decimal, None as a dash."""
    cells = [head] + [["–" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    line = lambda row: "| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w)
                                         for i, (c, w) in enumerate(zip(row, widths))) + " |"
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])

def markdown(report: dict) -> str:
    """The tables of a report, and the comparison that the run was made for."""
    models, blind = report["models"], report["blind"]
    arms, names, kinds = list(models), [label(arm) for arm in models], [k for k in QUESTIONS if k in blind["majority"]]
    of = lambda part, key: [models[a][part][key] for a in arms]
    photographs = {i for each in report.get("photographs", {}).values() for i in each}
    error = 100 * math.sqrt(0.25 / (len(photographs) or report["questions"]))
    out = [f"Understanding: accuracy in %, {report['questions']} questions"
           + (f" about {len(photographs)} photographs (standard error of an average at most {error:.1f})" if photographs else
              f" (standard error of an average at most {error:.1f}, of a kind {error * math.sqrt(len(kinds)):.1f})"),
           table(["question", "majority", "question only", *names],
                 [[k, blind["majority"][k], blind["question_only"][k], *of("understanding", k)]
                  for k in [*kinds, "perception", "reasoning", "average"]]
                 + ([["average, training photographs", None, None, *of("learned", "average")]] if photographs else []))]
    if models["base"]["pope"]:
        out += ["\nExistence by POPE: yes or no, half and half, in %",
                table(["negatives", "metric", *names],
                      [[kind, metric, *(models[a]["pope"][kind][metric] for a in arms)] for kind in models["base"]["pope"]
                       for metric in ("accuracy", "precision", "recall", "f1", "yes")])]
    if "judge" in report:
        out += [f"\nGeneration: pictures that show what was asked, in %, {report['prompts']} prompts",
                table(["prompt", "judge", "ceiling", *names],
                      [[name, report["judge"][k], report["tokenizer"][k], *of("generation", k)]
                       for k, name in [*((k, k) for k in [*GENEVAL, "average"]), ("layout_seen", "position: both there"),
                                       ("layout_error", "layout error, px")]]),
                f"(judge: on true pictures, of which it parses {report['judge']['exact']:.1f} % exactly; "
                "ceiling: on true pictures after a round trip through the tokenizer)"]
    segmented = {label(a): models[a]["segmentation"] for a in arms if "pq" in models[a].get("segmentation", {})}
    segmented.update({f"{label(a)}, training": models[a]["learned_segmentation"] for a in arms
                      if "pq" in models[a].get("learned_segmentation", {})})
    if segmented:
        out += [f"\nSegmentation: class-agnostic instances, 0-100, at most {report['masks']} pictures",
                table(["measure", "ceiling", *segmented],
                      [[m.upper().replace("MIOU", "mIoU"), report["mask_ceiling"][m], *(part[m] for part in segmented.values())]
                       for m in ("pq", "sq", "rq", "miou", "ap", "ap50", "ar")])]
    if "semantic" in models:
        out.append(f"semantic: mIoU of classes {models['semantic']['segmentation']['semantic_miou']:.1f}")
    inside = report["mechanism"]
    if inside:
        best = lambda part, key: [max(inside[a][part][key] if part == "looks_at" else inside[a][part]["probes"][key]) for a in arms]
        out += ["\nInside, in % (attention to words: 100 = an average word), at the layer where it is clearest",
                table(["linear probe, or attention", "chance", *names],
                      [[f"{task} from the patches", inside["base"]["separability"]["majority"][task], *best("separability", task)]
                       for task in ("shape", "color", "count")]
                      + [[f"on the {key}", inside["base"]["looks_at"]["chance"][0], *best("looks_at", key)]
                         for key in ("object", "object from its name")]
                      + [[f"drawing: on {kind} words", 100.0, *(inside[a]["listens_to"][kind] for a in arms)]
                         for kind in [*KEYWORDS, "other"]])]
    if "none" in models and len(arms) > 2:
        out += ["", *(f"{label(a)} against SFT, one seed: {compare(report, a)}." for a in arms if a not in ("base", "none"))]
    return "\n".join(out)

def compare(report: dict, arm: str) -> str:
    """Paired differences to the SFT control in words, ± their standard error over questions and prompts."""
    def one(measure: str) -> str:
        d = 100 * (hits_of(report, arm, measure) - hits_of(report, "none", measure))
        return f"{measure} {d.mean():+.1f} ± {d.std() / math.sqrt(len(d)):.1f}"
    return ", ".join(map(one, measures(report)))

def read_report(run: sgt.Run) -> dict:
    try:
        report = json.loads((run.folder / "report.json").read_text())
        markdown(report)                           # whatever is missing shows here
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise UserError(f"{run.folder} has no readable report.json ({e.__class__.__name__}); "
                        f"make one with: python eval.py {run.folder} --again") from None

def show(run: sgt.Run) -> str:
    return markdown(read_report(run)) + f"\n\nPictures, curves and attention maps: {run.folder}/report.html"

# ==== 6. Study: several arms, several seeds ==================================================================

def permutation_test(differences: np.ndarray, rounds: int = 10000) -> float:
    """Two-sided p of the sum of paired differences (n,) against signs flipped at random. Differences of one size are
    drawn together: how many of them are positive is binomial.
    """
    sizes, counts = np.unique(abs(differences[differences != 0]).round(9), return_counts=True)
    rng, sums = np.random.default_rng(0), np.zeros(rounds)
    for size, count in zip(sizes, counts):
        sums += size * (2 * rng.binomial(count, 0.5, rounds) - count)
    return float((1 + (abs(sums) >= abs(differences.sum()) - 1e-6).sum()) / (1 + rounds))

def study(reports: list[dict]) -> str:
    """The paper's table over one or several runs (seeds), and one sentence for each of its claims."""
    arms = [a for a in ["base", *sgt.PROXIES] if all(a in r["models"] for r in reports)]
    if "none" not in arms or len(arms) < 3:
        raise UserError("a study needs runs that share the arm none and at least one proxy; train with --proxies none,instance,…")
    n, measured = len(reports), measures(reports[0])
    values = lambda arm, measure: np.array([r["models"][arm][MEASURES[measure][0]][MEASURES[measure][1]] for r in reports])
    spread = lambda x: f"{x.mean():.1f}" + (f" ± {x.std(ddof=1) / math.sqrt(n):.1f}" if n > 1 else "")

    def against(a: list[str], b: list[str], measure: str) -> tuple[float, float, bool]:
        """Mean difference of two groups of arms in points, its p over all questions of all seeds, do the seeds agree?
        Of "this - that" the difference of the two differences: each question counts by its share of its own mean.
        """
        def one(r: dict, measure: str) -> np.ndarray:
            mean = lambda group: np.mean([hits_of(r, x, measure) for x in group], 0)
            return (mean(a) - mean(b)) / len(mean(a))
        first, *second = measure.split(" - ")
        each = [np.concatenate([one(r, first), *(-one(r, m) for m in second)]) for r in reports]
        return 100 * float(np.mean([x.sum() for x in each])), permutation_test(np.concatenate(each) * 1e3), len(
            {np.sign(x.sum().round(9)) for x in each}) == 1
    rows = []
    for arm in arms:
        pq = [part["pq"] for r in reports if "pq" in (part := r["models"][arm].get("segmentation", {}))]
        difference = [""] * (2 if "generation" in measured else 1)
        if arm not in ("base", "none"):
            difference = ["{:+.1f} (p {:.3f})".format(*against([arm], ["none"], m))
                          for m in ("understanding", "generation") if m in measured]
        rows.append(["" if arm in ("base", "none") else sgt.PROXIES[arm].level, label(arm),
                     *(spread(values(arm, m)) for m in measured), spread(np.array(pq)) if len(pq) == n else "–", *difference])
    of_level = lambda level: [a for a in arms if a in sgt.PROXIES and sgt.PROXIES[a].level == level]
    high, lower = of_level("high"), of_level("mid") + of_level("low")

    def verdict(claim: str, tests: list[tuple[list[str], list[str], str, int]]) -> str:
        """tests: (arms, other arms, measure, wanted sign)."""
        said, states = [], []
        for a, b, measure, sign in tests:
            if not a or not b or measure not in [*measured, "perception - reasoning"]:
                return f"- {claim}: not measured."
            d, p, agree = against(a, b, measure)
            clear = p < 0.05 and agree
            states.append(("holds" if d * sign > 0 else "does not hold") if clear else "not resolved")
            said.append(f"{measure} {d:+.1f}, p {p:.3f}" + ", the seeds disagree" * (p < 0.05 and not agree))
        state = next((s for s in ("does not hold", "not resolved") if s in states), "holds")
        return f"- {claim}: **{state}** ({'; '.join(said)})."
    sgt_arm = ["instance"] if "instance" in arms else high[:1]
    other_masks = ["shuffled"] if "shuffled" in arms else []
    claims = [verdict("High-level proxies help understanding more than mid- and low-level ones", [(high, lower, "understanding", 1)]),
              verdict("Segmentation helps understanding more than replay alone (SFT)", [(sgt_arm, ["none"], "understanding", 1)]),
              verdict("It is perception that improves, more than reasoning",
                      [(sgt_arm, ["none"], "perception", 1), (sgt_arm, ["none"], "perception - reasoning", 1)]),
              verdict("Proxies improve the placing of objects in generation", [(high + lower, ["none"], "position", 1)]),
              verdict("Replay alone lowers generation below the base model", [(["none"], ["base"], "generation", -1)]),
              verdict("Masks of the right image teach more than masks of another", [(sgt_arm, other_masks, "understanding", 1)])]
    seeds = f"{n} seed{'s' * (n > 1)} ({', '.join(str(r['seed']) for r in reports)})"
    head = ["level", "arm", *measured, "PQ", "Δ understanding", *["Δ generation"] * ("generation" in measured)]
    return (f"{seeds}; {reports[0]['questions']} questions and {reports[0]['prompts']} prompts each; mean"
            f"{' ± standard error over seeds' * (n > 1)}; Δ against SFT, paired over questions and prompts\n"
            f"{table(head, rows)}\n\n" + "\n".join(claims) + "\np: permutation test over questions of the models at hand; it does "
            "not know how another seed would have turned out, and there are many tests here. So a claim holds only where "
            "p < 0.05 and every seed agrees on the sign.")

def sweep(reports: list[dict]) -> str:
    """Runs that differ in more than the seed: a line for each arm of each setting, seeds of one setting averaged."""
    settings = [{k: v for k, v in r["config"].items() if k not in sgt.NOT_PART_OF_A_RUN | {"seed"}} for r in reports]
    varied = [k for k in settings[0] if len({json.dumps(each.get(k)) for each in settings}) > 1]
    if {"data", "image_size", "shapes", "colors", "max_objects", "lattice", "texture", "eval_questions", "eval_prompts"} & set(varied):
        raise UserError(f"the runs are measured on different questions or worlds ({', '.join(varied)}); "
                        "compare runs that agree in these")
    same = lambda each: tuple(each[k] for k in varied)
    if len({(same(each), r["seed"]) for each, r in zip(settings, reports)}) < len(reports):
        raise UserError("two of the runs have the same settings and seed; name each run once")
    if not varied:
        return study(reports)
    rows = []
    for setting in dict.fromkeys(map(same, settings)):
        group = [r for r, each in zip(reports, settings) if same(each) == setting]
        for arm in group[0]["models"]:
            if all(arm in r["models"] for r in group):
                of = lambda part, key: float(np.mean([r["models"][arm][part][key] for r in group]))
                rows.append([*map(str, setting), len(group), label(arm), *(of(*MEASURES[m]) for m in measures(reports[0]))])
    return table([*varied, "seeds", "arm", *measures(reports[0])], rows)

# ==== 7. report.html ========================================================================================

INK = ["#c0392b", "#2471a3", "#1e8449", "#b7950b", "#7d3c98", "#148f77", "#a04000", "#34495e"]

def svg_lines(title: str, series: dict[str, list[tuple[float, float]]], low: float | None = None) -> str:
    """A line chart as inline SVG: name → points (x, y)."""
    series = {name: points for name, points in series.items() if points}
    xs, ys = [x for p in series.values() for x, _ in p], [y for p in series.values() for _, y in p]
    left, right, bottom, top = min(xs), max(max(xs), min(xs) + 1e-9), min(ys) if low is None else low, max(ys)
    top = max(top, bottom + 1e-9)
    at = lambda x, y: f"{44 + 340 * (x - left) / (right - left):.1f},{170 - 150 * (y - bottom) / (top - bottom):.1f}"
    out = [f'<figure><svg viewBox="0 0 400 {190 + 14 * len(series)}" role="img"><text x="44" y="12" class="t">{title}</text>',
           f'<path d="M44,20V170H384" class="a"/><text x="40" y="26" class="r">{top:.3g}</text>'
           f'<text x="40" y="170" class="r">{bottom:.3g}</text><text x="44" y="183">{left:.4g}</text>'
           f'<text x="384" y="183" class="r">{right:.4g}</text>']
    for i, (name, points) in enumerate(series.items()):
        color = INK[i % len(INK)]
        out.append(f'<polyline points="{" ".join(at(*p) for p in points)}" fill="none" stroke="{color}" stroke-width="1.6"/>'
                   f'<text x="56" y="{200 + 14 * i}" fill="{color}">{name}</text>')
    return "".join(out) + "</svg></figure>"

def svg_points(title: str, points: list[list[float]], classes: list[int], names: list[str]) -> str:
    """A scatter plot as inline SVG, one color a class."""
    p = np.array(points)
    p = (p - p.min(0)) / (p.max(0) - p.min(0) + 1e-9)
    dots = "".join(f'<circle cx="{20 + 360 * x:.1f}" cy="{180 - 155 * y:.1f}" r="2.4" fill="{INK[c]}"/>'
                   for (x, y), c in zip(p, classes))
    keys = "".join(f'<text x="{20 + 46 * i}" y="200" fill="{INK[i]}">{name}</text>' for i, name in enumerate(names))
    return f'<figure><svg viewBox="0 0 400 206" role="img"><text x="20" y="12" class="t">{title}</text>{dots}{keys}</svg></figure>'

@torch.no_grad()
def attention_maps(cfg: Config, models: dict, items: list[Item], n: int = 6) -> bytes:
    """Where each model looks when asked "what color is the SHAPE?": attention from the word SHAPE to the patches, mean over
    heads, at the layer that looks most at the object asked about; a PNG.
    """
    chosen = sorted(items, key=lambda i: -i.scenes.count[i.index])[:n]                             # crowded scenes
    seen = torch.cat([sgt.render(cfg, sgt.pick(i.scenes, slice(i.index, i.index + 1))).image for i in chosen])
    rows = [("asked", seen, [i.question for i in chosen])]
    word = len(cfg.text.encode("what color is the"))
    for arm, (model, layer) in models.items():
        with recorded_attention() as found:
            for i, item in enumerate(chosen):
                sgt.prefill(model, [cfg.text.encode(item.question)], seen[i:i + 1].to(model.embed.device), 0)
        heat = torch.stack([w[0, :, cfg.patches + word, :cfg.patches].mean(0).cpu() for w in found[layer::cfg.depth]])   # (n, U)
        heat = (heat / heat.max(1, keepdim=True).values).view(-1, 1, cfg.see_grid, cfg.see_grid)
        rows.append((f"{label(arm)}, layer {layer + 1}", seen * (0.15 + 0.85 * F.interpolate(heat, cfg.image_size)), None))
    return sgt.picture_grid(rows)

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}h1{font-size:1.5rem}
h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15rem .6rem;
text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}img{max-width:100%;
image-rendering:pixelated}figure{display:inline-block;width:min(26rem,100%);margin:.5rem 0}svg text{font:11px system-ui,sans-serif}
svg .t{font-weight:600}svg .a{fill:none;stroke:#999}svg .r{text-anchor:end}"""

def html_of(markdown_text: str) -> str:
    """Tables and paragraphs of the Markdown that this file writes."""
    out, rows = [], []
    for line in [*html.escape(markdown_text).splitlines(), ""]:
        line = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", line)
        if line.startswith("|"):
            cell = "td" if rows else "th"
            if not line.startswith("|-"):
                rows.append("<tr>" + "".join(f"<{cell}>{c.strip()}</{cell}>" for c in line.strip("|").split("|")) + "</tr>")
            continue
        if rows:
            out.append(f'<div class="wide"><table>{"".join(rows)}</table></div>')
            rows = []
        if line:
            out.append(f"<p>{line}</p>")
    return "\n".join(out)

def picture(name: str, data: bytes) -> str:
    return f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'

def write_html(run: sgt.Run, report: dict) -> None:
    """report.html: one file with everything in it, no script, nothing from elsewhere."""
    log, curves, arms = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()], [], report["mechanism"]
    for stage in dict.fromkeys(line["stage"] for line in log):
        lines = [line for line in log if line["stage"] == stage]
        names = dict.fromkeys(k for line in lines for k in line if k not in ("stage", "step", "seconds"))
        curves.append(svg_lines(f"loss: {label(stage)}", {k: [(line["step"], min(line[k], 8)) for line in lines if k in line]
                                                          for k in names}, 0.0))
    layers = []
    if arms:
        by_layer = lambda key, part: {label(a): list(enumerate(m[key][part], 1)) for a, m in arms.items()}
        first = next(iter(arms.values()))
        chance = {"chance": list(enumerate(first["looks_at"]["chance"], 1))}
        maps = (run.folder / "samples/attention.png").read_bytes()
        layers += [picture("Where the models look for the answer", maps), "<h2>Layers</h2>"]
        layers += [svg_lines("attention of the answer on the image, % by layer", by_layer("looks_at", "image"), 0.0),
                  svg_lines("… of that on the object asked about, %", {**by_layer("looks_at", "object"), **chance}, 0.0),
                  svg_lines("… and from the word that names it, %", {**by_layer("looks_at", "object from its name"), **chance}, 0.0)]
        for task, majority in first["separability"]["majority"].items():
            lines = {label(a): list(enumerate(m["separability"]["probes"][task])) for a, m in arms.items()}
            layers.append(svg_lines(f"linear probe for {task}, % by layer (majority {majority:.0f})", lines))
        last = list(arms)[-1]
        s = arms[last]["separability"]
        layers.append(svg_points(f"patches of the last layer, {label(last)}, by shape", s["points"], s["shapes"],
                                 sgt.SHAPE_NAMES[:max(s["shapes"]) + 1]))
    samples = []
    for path in sorted((run.folder / "samples").glob("*_*.png")):
        stage, step = path.stem.rsplit("_", 1)
        if int(step):
            samples.append(picture(f"{label(stage)}: samples at step {int(step)}", path.read_bytes()))
    body = [f"<h1>{html.escape(run.folder.name)}: seed {report['seed']}, {report['device']}, torch {report['torch']}</h1>",
            html_of(markdown(report)),
            picture("The same scenes and prompts, by every model", (run.folder / "samples/comparison.png").read_bytes()),
            *layers, "<h2>Training</h2>", *curves, *samples]
    page = ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
            f"<title>{html.escape(run.folder.name)}</title><style>{STYLE}</style>" + "\n".join(body))
    run.write("report.html", page.encode())

# ==== 8. Commands ===========================================================================================

def export_scenes(cfg: Config, folder: Path, count: int) -> str:
    """Validation scenes as a COCO data set: images/, instances.json (classes are shapes) and captions.json."""
    if cfg.data != "scenes":
        raise UserError("this run has no scenes, its data are photographs; name a run on scenes")
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another --export-scenes")
    scenes = sgt.sample_scenes(cfg, "val", np.arange(count))
    rendered, out = sgt.render(cfg, scenes), sgt.Run(folder)
    truth = as_coco(rendered.instance)
    truth["categories"] = [{"id": 1 + i, "name": name} for i, name in enumerate(sgt.SHAPE_NAMES[:cfg.shapes])]
    index = iter(truth["annotations"])
    for i in range(count):
        for m in rendered.instance[i].unique():
            if m > 0:
                next(index)["category_id"] = 1 + int(scenes.shape[i, m - 1])
        png = io.BytesIO()
        sgt.to_pil(rendered.image[i]).save(png, "PNG")
        out.write(f"images/{i:06d}.png", png.getvalue())
    texts = [(i, text) for i in range(count) for text in sgt.captions(sgt.things(scenes, i), sgt.word_rng(scenes, i)).values()]
    captions = [{"id": 1 + j, "image_id": i, "caption": text} for j, (i, text) in enumerate(texts)]
    out.write("captions.json", json.dumps({"images": truth["images"], "annotations": captions}).encode())
    out.write("instances.json", json.dumps(truth).encode())
    return f"wrote {count} scenes with {len(truth['annotations'])} masks to {folder}"

def speed(cfg: Config, seconds: float = 4.0) -> str:
    """Throughput of a run's model, beside plain eager fp32 PyTorch, in one process; weights do not matter for it."""
    found = kernels.bench(seconds, cfg)
    rows = [("training samples", "train step", cfg.vqa_batch + cfg.t2i_batch), ("answers", "64 answers of 4 tokens", 64),
            ("pictures", "64 pictures, guidance", 64)]
    lines = [[f"{what} a second", *(n / found[key][which] for which in ("ours", "eager fp32, sdpa")),
              found[key]["eager fp32, sdpa"] / found[key]["ours"]] for what, key, n in rows]
    return (f"{found['device']}, torch {found['torch']}\n" + table(["", "ours", "eager fp32, SDPA", "ratio"], lines)
            + f"\ntrain step at {100 * found['share of the matrix rate']:.0f} % of the matrix rate of {found['gemm_gflops']:.0f} "
            f"GFLOP/s; first step {found['first step, seconds']:.0f} s"
            + "".join(f"; {k.split(',')[0]} {v:.0f} MB" for k, v in found.items() if "MB" in k))

def main(argv: list[str] | None = None) -> int:
    try:
        p = sgt.Parser(prog="eval.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
        p.add_argument("run", nargs="*", help="folders of runs, their names under runs/ or on the Hub; default: the newest")
        p.add_argument("--json", action="store_true", help="print report.json instead of tables")
        p.add_argument("--again", action="store_true", help="measure again, on --device")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        p.add_argument("--pope", metavar="FILE", help="ask the models the questions of a POPE-format JSONL file")
        p.add_argument("--export", metavar="FILE", help="write the masks that --model draws of the validation scenes as COCO results")
        p.add_argument("--model", metavar="NAME", default="instance", help="which arm --export uses (default: instance)")
        p.add_argument("--export-scenes", metavar="DIR", help="write the scenes as a COCO data set")
        p.add_argument("--speed", action="store_true", help="measure throughput")
        args = p.parse_args(argv)
        runs = [sgt.find_run(name) for name in args.run] or [sgt.find_run(None)]
        cfg = dataclasses.replace(runs[0].config(), device=args.device)
        cfg.validate()
        device = sgt.choose_device(cfg)[0]
        alone = [flag for flag in ("speed", "export_scenes", "pope", "export") if getattr(args, flag)]
        if alone and len(runs) > 1:
            raise UserError(f"{sgt.flag(alone[0])} takes one run, got {len(runs)}; name one")
        if args.speed:
            print(speed(cfg))
            return 0
        if args.export_scenes:
            print(export_scenes(cfg, Path(args.export_scenes), cfg.eval_masks))
            return 0
        for run in runs:
            missing = [name for name in ["tokenizer", "base", *run.config().arms] if not run.done(name)]
            if missing:
                raise UserError(f"{run.folder} is not finished ({', '.join(missing)} missing); go on with: python sgt.py --train")
        if args.pope:
            images, texts, truth = pope_file(cfg, args.pope)
            scores = {}
            for arm in ["base", *cfg.arms]:
                model = sgt.load_run(runs[0], arm, device)[2]
                said = [a for i in range(0, len(texts), 250) for a in
                        sgt.answer(model, torch.stack(images[i:i + 250]).to(device), texts[i:i + 250], limit=5)]
                scores[label(arm)] = pope_scores(truth, said)
            majority = 100 * max(truth.count("yes"), truth.count("no")) / len(truth)
            rows = [[metric, *(s[metric] for s in scores.values())] for metric in next(iter(scores.values()))]
            print(table([f"{len(truth)} questions", *scores], rows)
                  + f"\nalways the same answer: accuracy {majority:.1f}")
            return 0
        if args.export:
            _, tokenizer, model, _ = sgt.load_run(runs[0], args.model, device)
            drawn, instance, _ = drawn_targets(cfg, model, tokenizer, "instance", cfg.eval_masks)
            masks = masks_of(drawn, cfg.max_objects)
            results = coco_results(masks, confidence(drawn, masks, cfg.max_objects))
            path = Path(args.export)
            sgt.Run(path.parent).write(path.name, json.dumps(results).encode())
            print(f"wrote {len(results)} masks of {len(masks)} scenes to {path}; "
                  + ", ".join(f"{k} {v:.1f}" for k, v in average_precision(as_coco(instance), results).items()))
            return 0
        for run in runs:
            if args.again or not (run.folder / "report.json").exists():
                if run.pulled:
                    raise UserError(f"{run.folder} is only to be read; measure a copy: cp -rL {run.folder} runs/copy")
                with contextlib.redirect_stdout(sys.stderr):
                    evaluate(run, device)
        reports = [read_report(run) for run in runs]
        if args.json:
            print(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1))
        else:
            compared = len(runs) > 1 or ("none" in reports[0]["models"] and len(reports[0]["models"]) > 3)
            print("\n\n".join([show(runs[0])] * (len(runs) == 1) + [sweep(reports)] * compared))
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
