"""What a trained run understands, draws and segments, beside the baselines and ceilings that give the numbers
meaning.

    python eval.py runs/tiny                     # the tables of a run; its pictures are in report.html
    python eval.py runs/seed0 runs/seed1         # several seeds: means, standard errors, the paper's claims
    python eval.py runs/tiny --json              # the same facts for a program
    python eval.py runs/tiny --again             # measure again instead of reading report.json
    python eval.py runs/tiny --pope FILE.jsonl   # yes-or-no questions about your own pictures
    python eval.py runs/tiny --export FILE.json  # drawn masks as COCO results
    python eval.py runs/tiny --export-scenes DIR # scenes, masks and captions as a COCO data set
    python eval.py runs/tiny --speed             # samples, answers and pictures a second

    1. Judge           parse a picture back into objects     5. Tables      what a report says, in Markdown
    2. Segmentation    PQ, mIoU, COCO's AP                   6. Study       arms and seeds, tests, claims
    3. Metrics         questions, POPE, prompts              7. Pages       charts and report.html
    4. Mechanism       attention, linear probes              8. Commands    measure a run, the command line
"""
from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import itertools
import json
import math
import sys
from collections import Counter, defaultdict, namedtuple
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
from sgt import COLOR_NAMES, COLORS, PALETTE, QUESTIONS, SHAPE_NAMES, SHAPES, Config, Text, Thing, UserError

# ==== 1. Judge: parse a picture back into objects ===========================================================

def components(mask: Tensor) -> Tensor:
    """Number the 8-connected parts of masks (B, P, P): 0 outside, else 1 + the part's last flat index."""
    B, P, _ = mask.shape
    labels = torch.arange(1, P * P + 1, device=mask.device, dtype=torch.float32).view(1, P, P) * mask
    while True:                                                       # spread them until nothing changes
        spread = F.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread

def parts_of(label: Tensor, colors: int, smallest: float) -> Tensor:
    """Number the connected parts of one color in index maps (B, P, P); 0: background, or part of a speck."""
    B, P, _ = label.shape
    of_color = label[:, None] == torch.arange(1, colors + 1)[:, None, None]                # (B, colors, P, P)
    parts = components(of_color.flatten(0, 1)).view(B, colors, P, P).amax(1)                 # (B, P, P)
    key = parts + torch.arange(B)[:, None, None] * (P * P + 1)        # another number in each picture
    return parts * (key.flatten().bincount()[key] >= smallest)

def distances(image: Tensor, palette: Tensor) -> Tensor:
    """Squared distance of every pixel of (B, 3, P, P) to every color of (n, 3); (B, n, P, P)."""
    return torch.stack([(image - color[:, None, None]).square().sum(1) for color in palette], 1)

def nearest(image: Tensor, palette: Tensor) -> Tensor:
    """Index of the palette color (n, 3) nearest to every pixel of (B, 3, P, P); (B, P, P)."""
    return distances(image, palette).argmin(1)

def widened(mask: Tensor) -> Tensor:
    """A mask (P, P) and its edge of one pixel, as floats."""
    return F.max_pool2d(mask[None].float(), 3, 1, 1)[0]

# the box of these shapes is not centred on the point that they are drawn around; as a share of the radius
LIFT = {"triangle": 0.125, "star": 0.095}

def best_fit(cfg: Config, cover: Tensor, visible: Tensor, middle_x: float, middle_y: float) -> tuple:
    """The object whose rendering is most like `cover` (P, P) if visible: soft IoU, shape, size, x, y, radius.
    Every shape is tried in both sizes, at nine places around the middle of the part's box.
    """
    shapes, offsets = SHAPE_NAMES[:cfg.shapes], [-0.5, 0.0, 0.5]
    pixel, reach = torch.arange(cfg.image_size) + 0.5, 1.2 * max(sgt.RADII) * cfg.image_size + 2
    tried = torch.tensor(list(itertools.product(range(len(shapes)), (0, 1), offsets, offsets)))
    shape, size, (dy, dx) = tried[:, 0].long(), tried[:, 1].long(), tried[:, 2:].T                # (C,) each
    radius = (torch.tensor(sgt.RADII) * cfg.image_size)[size]
    lift = torch.tensor([LIFT.get(name, 0.0) for name in shapes])[shape]
    x, y = middle_x + dx, middle_y + lift * radius + dy
    # elsewhere there is neither the part nor any candidate
    rows = ((pixel - middle_y).abs() < reach) | (cover > 0).any(1)
    cols = ((pixel - middle_x).abs() < reach) | (cover > 0).any(0)
    cover, visible = cover[rows][:, cols], visible[rows][:, cols]
    u = (pixel[cols] - x[:, None]) / radius[:, None]                                            # (C, columns)
    v = (pixel[rows] - y[:, None]) / radius[:, None]                                              # (C, rows)
    outline = torch.cat([SHAPES[name](u[shape == s][:, None, :], v[shape == s][:, :, None])
                         for s, name in enumerate(shapes)]) * radius[:, None, None]               # (C, P, P)
    model = (0.5 - outline).clamp(0, 1)
    overlap = (torch.minimum(model, cover) * visible).sum((1, 2))
    union = (torch.maximum(model, cover) * visible).sum((1, 2))
    # or noise would be a large object, almost all hidden
    mostly_visible = (model * visible).sum((1, 2)) > 0.5 * model.sum((1, 2))
    score, i = (overlap / union).where(mostly_visible, 0.0).max(0)
    x, y, radius = (float(values[i]) for values in (x, y, radius))
    return float(score), shapes[shape[i]], ("small", "big")[size[i]], x, y, radius

def judge(cfg: Config, image: Tensor) -> list[list[Thing]]:
    """The objects in pictures (B, 3, P, P) of scenes, by analysis through synthesis: a connected part of one
    color is what fits it best, if the soft IoU exceeds 0.7. Pixels that another may hide do not count.
    """
    image, found = image.float().cpu(), []
    grounds, colors = torch.tensor(sgt.BACKGROUNDS), torch.tensor(list(COLORS.values())[:cfg.colors])
    nearest_color = nearest(image, torch.cat([grounds, colors]))                                  # (B, P, P)
    labels = (nearest_color - len(grounds) + 1).clamp(min=0)                                    # 0 background
    smallest = 0.4 * (0.3 * sgt.RADII[0] * cfg.image_size) ** 2 * math.pi + 2
    all_parts = parts_of(labels, cfg.colors, smallest)
    for picture, index, label, parts in zip(image, nearest_color, labels, all_parts):
        votes, objects = index[label == 0].bincount(minlength=len(grounds)), []
        ground = grounds[votes.argmax()][:, None, None]                                           # (3, 1, 1)
        for number in parts[parts > 0].unique():
            mask = parts == number                                                                # (P, P)
            color = int(label[mask][0])
            # how much of a pixel the object covers: its place on the line from background to object color
            ray = colors[color - 1][:, None, None] - ground
            cover = (((picture - ground) * ray).sum(0) / ray.square().sum()).clamp(0, 1)          # (P, P)
            cover = torch.maximum(cover * widened(mask), mask * 0.7)
            hidden = (widened((label > 0) & (label != color)) > 0) & ~mask
            y, x = mask.nonzero(as_tuple=True)
            middle_x, middle_y = (float(line.min() + line.max() + 1) / 2 for line in (x, y))
            score, shape, size, x, y, radius = best_fit(cfg, cover, 1.0 - hidden.float(), middle_x, middle_y)
            if score > 0.7:
                objects.append(Thing(shape, COLOR_NAMES[color - 1], size, x, y, radius, len(objects)))
        found.append(objects)
    return found

Prompt = namedtuple("Prompt", "kind text objects")
GENEVAL = ["single", "two", "counting", "colors", "position", "attribution"]

def like(prompt: Prompt, found: list[Thing]) -> list[tuple[Thing, Thing]]:
    """Pairs of found objects with the shapes of the two that a prompt names."""
    a, b = prompt.objects
    return [(p, q) for p in found for q in found if (p.shape, q.shape) == (a.shape, b.shape)]

def satisfied(prompt: Prompt, found: list[Thing]) -> bool:
    """GenEval's rules: all that is asked for is there; counts are exact; some pair lies as it should."""
    wanted = prompt.objects
    if prompt.kind == "counting":
        return sum(o.shape == wanted[0].shape for o in found) == len(wanted)
    if prompt.kind in ("single", "two"):
        return {o.shape for o in wanted} <= {o.shape for o in found}
    if prompt.kind in ("colors", "attribution"):
        return {(o.color, o.shape) for o in wanted} <= {(o.color, o.shape) for o in found}
    return any(sgt.relation(p, q) == sgt.relation(*wanted) for p, q in like(prompt, found))

def layout_error(prompt: Prompt, found: list[Thing]) -> float | None:
    """How many pixels an object must move until the words are true; None where one is missing."""
    word, errors = sgt.relation(*prompt.objects), []
    sign = -1 if word in ("left of", "above") else 1
    for p, q in like(prompt, found):
        along, across = p.x - q.x, p.y - q.y
        if word in ("above", "below"):
            along, across = across, along
        needed = max(1.5 * abs(across), 1.0)                          # the rule of `relation`
        errors.append(0.0 if sgt.relation(p, q) == word else max(0.0, needed - sign * along))
    return min(errors, default=None)

def exactly(objects: list[Thing], found: list[Thing]) -> bool:
    """Whether a picture was parsed as every object's color and shape within 1.5 pixels, and nothing else."""
    rest = list(found)
    for o in objects:
        same = [f for f in rest if (f.color, f.shape) == (o.color, o.shape)]
        close = [f for f in same if math.hypot(f.x - o.x, f.y - o.y) < 1.5]
        if not close:
            return False
        rest.remove(close[0])
    return not rest

# ==== 2. Segmentation: colors → masks → PQ, mIoU, AP ========================================================

def true_masks(instance: Tensor) -> list[Tensor]:
    """Index maps (B, P, P), 0 = background → a (n, P, P) bool tensor for every sample."""
    return [ids == ids[ids > 0].unique()[:, None, None] for ids in instance.cpu()]

def masks_of(target: Tensor, colors: int) -> list[Tensor]:
    """Masks in drawn targets (B, 3, P, P), without specks. One color is one object, even if cut in two."""
    label = nearest(target.float().cpu(), PALETTE[:colors + 1])
    smallest = max(2.0, target.shape[-1] ** 2 / 256)
    return true_masks(label * (parts_of(label, colors, smallest) > 0))

def panoptic_quality(predicted: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Class-agnostic PQ, SQ, RQ (arXiv 1801.00868) and mIoU of a data set, 0-100; nothing of nothing: 100."""
    matched, iou_sum, extra, missed, best = 0, 0.0, 0, 0, []
    for p, t in zip(predicted, truth):
        p, t = p.flatten(1).float(), t.flatten(1).float()
        both = p @ t.T                                                                 # (predictions, truths)
        iou = both / (p.sum(1)[:, None] + t.sum(1) - both).clamp(min=1)
        hits = iou > 0.5                          # masks of one image do not overlap, so a match is unique
        matched += int(hits.sum())
        iou_sum += float(iou[hits].sum())
        extra += len(p) - int(hits.any(1).sum())
        missed += len(t) - int(hits.any(0).sum())
        best += iou.max(0).values.tolist() if len(p) else [0.0] * len(t)
    if matched + extra + missed == 0:
        return dict.fromkeys(("pq", "sq", "rq", "miou"), 100.0)
    sq, rq = iou_sum / max(matched, 1), matched / (matched + 0.5 * extra + 0.5 * missed)
    miou = float(np.mean(best)) if best else 0.0
    return {"pq": 100 * sq * rq, "sq": 100 * sq, "rq": 100 * rq, "miou": 100 * miou}

def encode_mask(mask: Tensor) -> dict:
    """A mask (P, P) bool as COCO's compressed run lengths, and its box [x, y, width, height]."""
    rle = mask_tools.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            "bbox": mask_tools.toBbox(rle).tolist()}

def as_coco(instance: Tensor, category: Tensor | None = None, names: tuple[str, ...] = ("object",)) -> dict:
    """Instance maps (n, P, P) as a COCO data set, with the classes of category maps if given."""
    images = [{"id": i, "width": ids.shape[1], "height": ids.shape[0], "file_name": f"{i:06d}.png"}
              for i, ids in enumerate(instance)]
    annotations = []
    for i, masks in enumerate(true_masks(instance)):
        for mask in masks:
            kind = 1 if category is None else int(category[i][mask][0])
            number = 1 + len(annotations)          # COCOeval takes a match with annotation 0 for none
            annotations.append({"id": number, "image_id": i, "category_id": kind, "iscrowd": 0,
                                "area": int(mask.sum()), **encode_mask(mask)})
    categories = [{"id": 1 + j, "name": name} for j, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}

def coco_results(predicted: list[Tensor], scores: list[list[float]]) -> list[dict]:
    return [{"image_id": i, "category_id": 1, "score": score, **encode_mask(mask)}
            for i, masks in enumerate(predicted) for mask, score in zip(masks, scores[i])]

def average_precision(truth: dict, results: list[dict]) -> dict[str, float]:
    """COCO's AP, AP50 and AR of masks, in percent, without classes; of no mask where there is none 100."""
    if not truth["annotations"] or not results:
        return dict.fromkeys(("ap", "ap50", "ar"), 100.0 * (not truth["annotations"] and not results))
    with contextlib.redirect_stdout(io.StringIO()):                   # pycocotools talks
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        measured = COCOeval(coco, coco.loadRes(results), "segm")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return {"ap": 100 * measured.stats[0], "ap50": 100 * measured.stats[1], "ar": 100 * measured.stats[8]}

def confidence(drawn: Tensor, masks: list[Tensor], colors: int) -> list[list[float]]:
    """How surely each mask was painted: 1 minus the mean distance of its pixels to their palette color."""
    distance = distances(drawn.cpu(), PALETTE[:colors + 1]).amin(1).sqrt()                        # (n, P, P)
    return [[round(1 - float(far[mask].mean()), 4) for mask in each] for far, each in zip(distance, masks)]

def semantic_miou(cfg: Config, drawn: Tensor, category: Tensor) -> float:
    """Mean IoU in percent of the classes that occur, background included, over all pictures together."""
    n = len(cfg.shape_names) + 1
    said = nearest(drawn.float().cpu(), PALETTE[:n])
    table = (said * n + category).flatten().bincount(minlength=n * n).view(n, n)                # (said, true)
    both, occurs = table.diagonal(), table.sum(0) > 0
    return 100 * float((both / (table.sum(0) + table.sum(1) - both))[occurs].mean())

# ==== 3. Metrics of a model =================================================================================

def pool_size(cfg: Config, split: str, use: str) -> int:
    """How many photographs fit a use."""
    return len(sgt.photographs(cfg.data, cfg.image_size, cfg.max_objects).pool(split, use))

def stream(cfg: Config, split: str, use: str = "questions", count: int = 0):
    """Pictures of a split, as batch, place in it, objects, and the randomness of words about it: the first
    `count`, or scenes without end and every photograph 40 times.
    """
    count = count or (40 * pool_size(cfg, split, use) if cfg.photos else 10 ** 9)
    for start in range(0, count, 256):
        scenes = sgt.sample(cfg, split, np.arange(start, min(start + 256, count)), use)
        for b in range(len(scenes)):
            yield scenes, b, sgt.things(scenes, b), sgt.word_rng(scenes, b)

def rendered(cfg: Config, scenes, b: int) -> sgt.Rendered:
    """One picture of a batch."""
    return sgt.render(cfg, sgt.pick(scenes, slice(b, b + 1)))

Item = namedtuple("Item", "kind scenes index question truth")

def questions(cfg: Config, split: str, total: int) -> list[Item]:
    """The same number of questions of every kind, each about a scene of its own, because standard errors and
    tests take answers for independent. About a photograph many are asked, none twice.
    """
    kinds, items, known = sgt.kinds_of(cfg), [], set()
    need = Counter({kind: max(1, total // len(kinds)) for kind in kinds})
    for n, (scenes, b, objects, rng) in enumerate(stream(cfg, split)):
        picture = scenes.which[b] if cfg.photos else n
        for kind, missing in need.most_common():                      # the kind that lags behind first
            turn = QUESTIONS[kind][1](objects, rng, cfg) if missing else None
            if turn and (picture, turn) not in known:
                known.add((picture, turn))
                items.append(Item(kind, scenes, b, *turn))
                need[kind] -= 1
                break
        if not need.total():
            break
    return items

def grade(items: list[Item], said: list[str]) -> dict[str, list[bool]]:
    """Which answers equal the true ones to the letter, by kind of question."""
    right = defaultdict(list)
    for item, answer in zip(items, said):
        right[item.kind].append(answer == item.truth)
    return right

def summarize(right: dict[str, list[bool]]) -> dict[str, float]:
    """Percent right of every kind of question, and averages over kinds: perception, reasoning, all."""
    by_kind = {kind: 100 * float(np.mean(hits)) for kind, hits in right.items()}
    level = {name: float(np.mean([v for kind, v in by_kind.items() if QUESTIONS[kind][0] == name]))
             for name in ("perception", "reasoning")}
    return {**by_kind, **level, "average": float(np.mean(list(by_kind.values())))}

def bits(right: dict[str, list[bool]]) -> dict[str, str]:
    return {kind: "".join("01"[hit] for hit in hits) for kind, hits in right.items()}

def blind_baselines(cfg: Config, items: list[Item]) -> dict[str, dict[str, float]]:
    """Accuracy without the image: the commonest training answer of a kind, and of the very question."""
    by_kind, by_question = defaultdict(Counter), defaultdict(Counter)
    for _, _, objects, rng in stream(cfg, "train", count=10000):
        for kind in sgt.kinds_of(cfg):
            if turn := QUESTIONS[kind][1](objects, rng, cfg):
                question, answer = turn
                by_kind[kind][answer] += 1
                by_question[question][answer] += 1
    commonest = lambda answers: max(answers, key=answers.get, default="")
    majority = [commonest(by_kind[item.kind]) for item in items]
    question_only = [commonest(by_question.get(item.question, by_kind[item.kind])) for item in items]
    return {"majority": summarize(grade(items, majority)),
            "question_only": summarize(grade(items, question_only))}

def ask_all(model, items: list[Item], batch: int = 250) -> list[str]:
    """Greedy answers."""
    said = []
    for start in range(0, len(items), batch):
        part = items[start:start + batch]
        scenes = {id(item.scenes): item.scenes for item in part}
        image = {key: sgt.render(model.cfg, each).image for key, each in scenes.items()}
        images = torch.stack([image[id(item.scenes)][item.index] for item in part])
        said += sgt.answer(model, images.to(model.embed.device), [item.question for item in part], limit=5)
    return said

def understanding(model, items: list[Item]) -> dict:
    """Accuracy in percent by kind of question; `hits` has every single one."""
    right = grade(items, ask_all(model, items))
    right = {kind: right[kind] for kind in QUESTIONS if kind in right}
    return {**summarize(right), "hits": bits(right)}

def pope_items(cfg: Config, negatives: str, total: int) -> list[Item]:
    """POPE (arXiv 2305.10355): of each picture one thing that is there and one that is not: any ("random"), a
    common one ("popular"), or ("adversarial") a color and a shape that are both there but not together; on
    photographs, what is most often seen with what is there.
    """
    total = max(2, total // 2 * 2)
    every = [(color, shape) for color in cfg.color_names for shape in cfg.shape_names]
    count, together = Counter(), Counter()
    if negatives != "random":
        for _, _, objects, _ in stream(cfg, "train", count=4000):
            seen = sorted({(o.color, o.shape) for o in objects})
            count.update(seen)
            together.update(itertools.product(seen, seen))
    common = [pair for pair, _ in count.most_common()]
    items = []
    for scenes, b, objects, rng in stream(cfg, "val"):
        there = {(o.color, o.shape) for o in objects}
        absent = [pair for pair in every if pair not in there]
        if negatives == "popular":
            absent = [pair for pair in common if pair not in there][:3]
        elif negatives == "adversarial" and not cfg.photos:
            absent = sorted({(o.color, p.shape) for o in objects for p in objects} - there)
        elif negatives == "adversarial":
            absent = sorted(absent, key=lambda pair: -max(together[pair, other] for other in there))[:3]
        if absent:
            present = rng.choice(sorted({(o.color, o.shape) for o in objects if o.index >= 0}))
            for (color, shape), truth in ((present, "yes"), (rng.choice(absent), "no")):
                question = f"is there a {sgt.noun(color, shape)}?"
                items.append(Item("existence", scenes, b, question, truth))
        if len(items) == total:
            break
    return items

def pope_scores(truth: list[str], said: list[str]) -> dict[str, float]:
    """POPE's metrics in percent. What is not "yes" is no; without any yes precision, recall and F1 are 0."""
    yes, true = np.array(said) == "yes", np.array(truth) == "yes"
    hit = float((yes & true).sum())
    precision, recall = hit / max(1, yes.sum()), hit / max(1, true.sum())
    scores = {"accuracy": (yes == true).mean(), "precision": precision, "recall": recall,
              "f1": 2 * precision * recall / (precision + recall) if hit else 0.0, "yes": yes.mean()}
    return {name: 100 * float(score) for name, score in scores.items()}

def pope_file(cfg: Config, path: Path) -> tuple[Tensor, list[str], list[str]]:
    """Images, questions and labels of a POPE-format JSONL file; image paths are relative to its folder."""
    images, texts, labels = [], [], []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path} ({e.__class__.__name__}); give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            image, text = str(entry["image"]), str(entry.get("text") or entry["question"])
            label = entry["label"].strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"label {label!r} is neither yes nor no")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} line {number}: {e.__class__.__name__} {e}; give "
                            '{"image": …, "text": …, "label": "yes" or "no"}') from None
        text = " ".join(text.lower().split())
        if len(cfg.text.encode(text)) > cfg.row_len - cfg.patches - 8:
            raise UserError(f"{path} line {number}: the question is too long for the model; make it shorter")
        images.append(sgt.read_image(str(path.parent / image), cfg.image_size)[0])
        texts.append(text)
        labels.append(label)
    if not labels:
        raise UserError(f"{path} holds no questions; give one JSON object a line")
    return torch.cat(images), texts, labels

def geneval_prompts(cfg: Config, total: int) -> tuple[list[Prompt], Tensor]:
    """The same number of prompts of GenEval's six kinds, with a true picture (n, 3, P, P) of each."""
    prompts, images = [], []
    need = Counter({kind: max(1, total // len(GENEVAL)) for kind in GENEVAL})
    for scenes, b, objects, rng in stream(cfg, "val", "captions"):  # as in GenEval objects lie apart
        texts = sgt.captions(objects, rng)
        for kind, missing in need.most_common():                      # the kind that lags behind first
            if missing and kind in texts:
                prompts.append(Prompt(kind, texts[kind], objects))
                images.append(rendered(cfg, scenes, b).image)
                need[kind] -= 1
                break
        if not need.total():
            break
    return prompts, torch.cat(images)

def score_pictures(cfg: Config, prompts: list[Prompt], images: Tensor) -> dict:
    """GenEval score in percent by kind and on average; how positions fail; how many are parsed `exactly`."""
    found = judge(cfg, images)
    hits = {kind: [satisfied(p, f) for p, f in zip(prompts, found) if p.kind == kind] for kind in GENEVAL}
    score = {kind: 100 * float(np.mean(each)) for kind, each in hits.items()}
    errors = [layout_error(p, f) for p, f in zip(prompts, found) if p.kind == "position"]
    errors = [error for error in errors if error is not None]
    return {**score, "average": float(np.mean(list(score.values()))), "hits": bits(hits),
            "layout_seen": 100 * len(errors) / max(1, len(hits["position"])),
            "layout_error": float(np.mean(errors)) if errors else None,
            "exact": 100 * float(np.mean([exactly(p.objects, f) for p, f in zip(prompts, found)]))}

def drawn_targets(cfg: Config, model, tokenizer, name: str, total: int, split: str = "val"
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """What a model (None: the tokenizer, the ceiling) draws of a proxy; true instance and category maps."""
    drawn, instance, category, device = [], [], [], tokenizer.place.device
    if cfg.photos:                       # each photograph once
        total = min(total, pool_size(cfg, split, "masks"))
    for start in range(0, total, 100):
        scenes = sgt.sample(cfg, split, np.arange(start, min(start + 100, total)), "masks")
        truth = sgt.render(cfg, scenes)
        source, prompts, target = sgt.proxy_batch(cfg, name, scenes, truth)
        if model is None:
            drawn.append(tokenizer.decode(tokenizer.encode(target.to(device))))
        else:
            ids = [cfg.text.encode(prompt) for prompt in prompts]
            drawn.append(sgt.generate(model, tokenizer, ids, source.to(device), temperature=0.0))
        instance.append(truth.instance)
        category.append(truth.category)
    return torch.cat(drawn).cpu(), torch.cat(instance), torch.cat(category)

def segmentation(cfg: Config, model, tokenizer, name: str, total: int, split: str = "val") -> dict:
    """Panoptic quality, mIoU and COCO's AP of instance masks; of the proxy that paints classes their mIoU."""
    drawn, instance, category = drawn_targets(cfg, model, tokenizer, name, total, split)
    if name == "semantic":
        return {"semantic_miou": semantic_miou(cfg, drawn, category)}
    masks = masks_of(drawn, cfg.max_objects)
    results = coco_results(masks, confidence(drawn, masks, cfg.max_objects))
    return {**panoptic_quality(masks, true_masks(instance)), **average_precision(as_coco(instance), results)}

# ==== 4. Mechanism: where the model looks, and what its features hold =======================================

@contextlib.contextmanager
def recorded_attention():
    """Collect the attention weights (B, H, S, L) of every layer of the forward passes inside. The reference
    recomputes the output from the true queries and keys, which must be what the model went on with.
    """
    seen, real, graphs = [], sgt.attention, kernels.GRAPHS

    def record(q, k, v, layout):
        out = real(q, k, v, layout)
        again, weights = kernels.attention_reference(q.float(), k.float(), v.float(), layout)
        assert (again - out).abs().max() < 0.05 * again.abs().max() + 1e-3, "not the model's weights"
        seen.append(weights)
        return out
    sgt.attention, kernels.GRAPHS = record, False             # a recorded graph calls nobody
    try:
        yield seen
    finally:
        sgt.attention, kernels.GRAPHS = real, graphs

@torch.no_grad()
def looks_at(cfg: Config, model, items: list[Item]) -> tuple[dict[str, list[float]], Tensor]:
    """Attention in answering "what color is the SHAPE?", per layer, in percent: how much of that of the last
    token goes to the image; how much of this falls on the object, from it and from the word SHAPE; the share of
    the image that the object covers (chance). Also the attention from SHAPE to patches, (layers, items, U).
    """
    named, maps = len(cfg.text.encode("what color is the")), []       # where SHAPE stands
    found = {"image": [], "object": [], "object from its name": [], "chance": []}
    for _, scenes, b, question, _ in items:
        picture = rendered(cfg, scenes, b)
        target = next(o for o in sgt.things(scenes, b) if o.shape in question)
        is_target = (picture.instance == target.index + 1).float()
        cover = F.max_pool2d(is_target, cfg.see_patch).flatten() > 0  # (U,)
        with recorded_attention() as seen:
            image = picture.image.to(model.embed.device)
            sgt.read(model, sgt.condition(model, [cfg.text.encode(question)], image), 0)
        heads = torch.stack([w[0, :, cfg.patches:, :cfg.patches] for w in seen])
        weights = heads.mean(1).cpu()                                                         # (layers, T, U)
        on_object = weights[..., cover].sum(-1) / weights.sum(-1).clamp(min=1e-9)                # (layers, T)
        found["image"].append(weights[:, -1].sum(-1))
        found["object"].append(on_object[:, -1])
        found["object from its name"].append(on_object[:, named])
        found["chance"].append(cover.float().mean().expand(cfg.depth))
        maps.append(weights[:, named])
    return {name: (100 * torch.stack(x).mean(0)).tolist() for name, x in found.items()}, torch.stack(maps, 1)

KEYWORDS = {"object": [word for shape in SHAPES for word in (shape, sgt.plural(shape))], "color": COLOR_NAMES,
            "number": sgt.NUMBERS, "position": ["left", "right", "above", "below", "of"]}

@torch.no_grad()
def listens_to(cfg: Config, model, tokenizer, prompts: list[Prompt]) -> dict[str, float | None]:
    """Attention of masked image tokens to words of a prompt by kind, 100: an average word; mean of layers."""
    kind_of = {cfg.text.encode(word)[0]: kind for kind, words in KEYWORDS.items() for word in words}
    paid = {kind: [] for kind in [*KEYWORDS, "other"]}
    for prompt in prompts:
        ids = [Text.BOS] + cfg.text.encode(prompt.text)
        with recorded_attention() as seen:
            sgt.generate(model, tokenizer, [ids], steps=1, temperature=0.0)
        # layers of the condition, those of the drawing, then the tokenizer's, which decodes what was drawn
        drawing = seen[cfg.depth:2 * cfg.depth]
        words = torch.stack([w[0].mean((0, 1))[1:len(ids)].cpu() for w in drawing]).mean(0)         # (T - 1,)
        for token, weight in zip(ids[1:], (100 * words / words.mean()).tolist()):
            paid[kind_of.get(token, "other")].append(weight)
    return {kind: float(np.mean(x)) if x else None for kind, x in paid.items()}

@torch.no_grad()
def patch_features(cfg: Config, model, scenes: sgt.Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the understanding patches hold at each layer, (layers + 1, B, U, D), and what they show: shape,
    color (B, U), 0 where no object covers a twentieth of the patch, and the number of objects (B,).
    """
    states, truth, device = [], sgt.render(cfg, scenes), model.embed.device
    patches = slice(-1 - cfg.patches, -1)          # the one word behind them is the beginning of nothing

    def block(weights, x, *rest):
        states.append(x[:, patches].float().cpu())
        return sgt.Block.forward(weights, x, *rest)
    dtype = kernels.compute_dtype(device)
    seen = sgt.condition(model, [[Text.BOS]] * len(scenes), truth.image.to(device, dtype))
    x = model.embed_rows(seen.ids, seen.slots, model.see(seen.images), seen.patch_at).to(dtype)
    states.append(model.trunk(x, seen.positions, seen.layout, block=block)[:, patches].float().cpu())
    ids = torch.arange(1, scenes.shape.shape[1] + 1)[:, None, None]
    cover = F.avg_pool2d((truth.instance[:, None] == ids).float(), cfg.see_patch).flatten(2)       # (B, M, U)
    amount, which = cover.max(1)                                                                      # (B, U)
    shape, color = (torch.where(amount > 0.05, torch.from_numpy(values).gather(1, which) + 1, 0)
                    for values in (scenes.shape, scenes.color))
    return torch.stack(states), shape, color, torch.from_numpy(scenes.count)

def probe(x: Tensor, y: Tensor, classes: int) -> float:
    """Accuracy in percent, on the second half, of ridge regression fitted to the first; x (n, D), y (n,)."""
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-6)
    x = F.pad(x, (0, 1), value=1.0).double()                          # a column for the bias
    fit, target = x[:half], F.one_hot(y[:half].long(), classes).double()
    penalty = 0.01 * half * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(fit.T @ fit + penalty, fit.T @ target)
    return 100 * float(((x[half:] @ weight).argmax(1) == y[half:]).double().mean())

def separability(cfg: Config, model, total: int = 1000) -> dict:
    """Linear probes at every layer: shape and color of a patch with an object, and the number of objects
    from the mean of all; the majority class; and two principal components of the last layer, for a picture.
    """
    states, shape, color, count = patch_features(cfg, model, sgt.sample_scenes(cfg, "val", np.arange(total)))
    patches, means = states[:, shape > 0], states.mean(2)             # (layers + 1, n, D), (layers + 1, B, D)
    tasks = {"shape": (patches, shape[shape > 0] - 1, cfg.shapes),
             "color": (patches, color[shape > 0] - 1, cfg.colors),
             "count": (means, count - 1, cfg.max_objects)}
    last = patches[-1, :400] - patches[-1].mean(0)
    points = last @ torch.linalg.svd(last, full_matrices=False)[2][:2].T                            # (400, 2)
    return {"probes": {task: [probe(layer, y, n) for layer in x] for task, (x, y, n) in tasks.items()},
            "majority": {task: 100 * float(y.bincount().max() / len(y)) for task, (_, y, _) in tasks.items()},
            "points": points.tolist(), "shapes": tasks["shape"][1][:400].tolist()}

# ==== 5. Tables: what a report says =========================================================================

def label(arm: str) -> str:
    return {"none": "SFT", "instance": "SGT"}.get(arm, arm)

# what a study compares → where it is in the report of an arm
MEASURES = {"understanding": ("understanding", "average"), "perception": ("understanding", "perception"),
            "reasoning": ("understanding", "reasoning"), "generation": ("generation", "average"),
            "position": ("generation", "position")}

def measures(report: dict) -> list[str]:
    """What was measured: pictures drawn of prompts are judged in the world of scenes only."""
    return [name for name, (part, _) in MEASURES.items() if part in report["models"]["base"]]

def hits_of(report: dict, arm: str, measure: str) -> np.ndarray:
    """0 or 1 for each question or prompt of a measure. Of questions about photographs the sums by photograph,
    because answers about one are not independent; every kind counts the same, and the mean is the measure.
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

def compare(report: dict, arm: str) -> str:
    """Paired differences to the SFT control in words, ± their standard error over questions and prompts."""
    said = []
    for measure in measures(report):
        d = 100 * (hits_of(report, arm, measure) - hits_of(report, "none", measure))
        said.append(f"{measure} {d.mean():+.1f} ± {d.std() / math.sqrt(len(d)):.1f}")
    return f"{label(arm)} against SFT, one seed: {', '.join(said)}."

def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table with aligned columns; numbers with one decimal, None as a dash."""
    text = lambda cell: "–" if cell is None else f"{cell:.1f}" if isinstance(cell, float) else str(cell)
    cells = [list(map(text, row)) for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [" | ".join(f"{c:{'>' if i else '<'}{widths[i]}}" for i, c in enumerate(row)) for row in cells]
    rule = "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])

def markdown(report: dict) -> str:
    """The tables of a report, and the comparison that the run was made for."""
    models, blind, inside = report["models"], report["blind"], report["mechanism"]
    names = [label(arm) for arm in models]
    scores = lambda part, key: [entry[part][key] for entry in models.values()]

    kinds = [kind for kind in QUESTIONS if kind in blind["majority"]]
    photographs = {i for each in report.get("photographs", {}).values() for i in each}
    error = 100 * math.sqrt(0.25 / (len(photographs) or report["questions"]))
    title = f"Understanding: accuracy in %, {report['questions']} questions"
    rows = [[key, blind["majority"][key], blind["question_only"][key], *scores("understanding", key)]
            for key in [*kinds, "perception", "reasoning", "average"]]
    if photographs:
        title += f" about {len(photographs)} photographs (standard error of an average at most {error:.1f})"
        rows.append(["average, training photographs", None, None, *scores("learned", "average")])
    else:
        of_kind = error * math.sqrt(len(kinds))
        title += f" (standard error of an average at most {error:.1f}, of a kind {of_kind:.1f})"
    out = [title, table(["question", "majority", "question only", *names], rows)]

    if models["base"]["pope"]:
        rows = [[negatives, metric, *(entry["pope"][negatives][metric] for entry in models.values())]
                for negatives, metrics in models["base"]["pope"].items() for metric in metrics]
        out += ["\nExistence by POPE: yes or no, half and half, in %",
                table(["negatives", "metric", *names], rows)]

    if "judge" in report:
        keys = {**{key: key for key in [*GENEVAL, "average"]}, "layout_seen": "position: both there",
                "layout_error": "layout error, px"}
        rows = [[name, report["judge"][key], report["tokenizer"][key], *scores("generation", key)]
                for key, name in keys.items()]
        out += [f"\nGeneration: pictures that show what was asked, in %, {report['prompts']} prompts",
                table(["prompt", "judge", "ceiling", *names], rows),
                f"(judge: on true pictures, of which it parses {report['judge']['exact']:.1f} % exactly; "
                "ceiling: on true pictures after a round trip through the tokenizer)"]

    parts = {"segmentation": "", "learned_segmentation": ", training"}
    drawn = {label(arm) + note: entry[part] for part, note in parts.items() for arm, entry in models.items()
             if "pq" in entry.get(part, {})}
    if drawn:
        keys = {"pq": "PQ", "sq": "SQ", "rq": "RQ", "miou": "mIoU", "ap": "AP", "ap50": "AP50", "ar": "AR"}
        rows = [[name, report["mask_ceiling"][key], *(part[key] for part in drawn.values())]
                for key, name in keys.items()]
        out += [f"\nSegmentation: class-agnostic instances, 0-100, at most {report['masks']} pictures",
                table(["measure", "ceiling", *drawn], rows)]
    if "semantic" in models:
        out.append(f"semantic: mIoU of classes {models['semantic']['segmentation']['semantic_miou']:.1f}")

    if inside:
        base, every = inside["base"], inside.values()
        rows = [[f"{task} from the patches", chance, *(max(m["separability"]["probes"][task]) for m in every)]
                for task, chance in base["separability"]["majority"].items()]
        rows += [[f"on the {key}", base["looks_at"]["chance"][0], *(max(m["looks_at"][key]) for m in every)]
                 for key in ("object", "object from its name")]
        rows += [[f"drawing: on {kind} words", 100.0, *(m["listens_to"][kind] for m in every)]
                 for kind in base["listens_to"]]
        title = "Inside, in % (attention to words: 100 = an average word), at the layer where it is clearest"
        out += [f"\n{title}",
                table(["linear probe, or attention", "chance", *names], rows)]

    if "none" in models and len(models) > 2:
        out += ["", *(compare(report, arm) for arm in models if arm not in ("base", "none"))]
    return "\n".join(out)

def read_report(run: sgt.Run) -> dict:
    try:
        report = json.loads((run.folder / "report.json").read_text())
        markdown(report), report["config"], report["seed"]            # whatever is missing shows here
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as e:
        raise UserError(f"{run.folder} has no readable report.json ({e.__class__.__name__}); "
                        f"make one with: python eval.py {run.folder} --again") from None

def show(run: sgt.Run) -> str:
    return markdown(read_report(run)) + f"\n\nPictures, curves and attention maps: {run.folder}/report.html"

# ==== 6. Study: several arms, several seeds =================================================================

def permutation_test(differences: np.ndarray, rounds: int = 10000) -> float:
    """Two-sided p of the sum of paired differences (n,) against signs flipped at random."""
    sizes, counts = np.unique(abs(differences[differences != 0]).round(9), return_counts=True)
    rng, sums = np.random.default_rng(0), np.zeros(rounds)
    for size, count in zip(sizes, counts):      # of those of one size the number of positive ones is binomial
        sums += size * (2 * rng.binomial(count, 0.5, rounds) - count)
    return float((1 + (abs(sums) >= abs(differences.sum()) - 1e-6).sum()) / (1 + rounds))

def shares(report: dict, a: list[str], b: list[str], measure: str) -> np.ndarray:
    """What each answer adds to the difference of the means of two groups of arms, in "x - y" to both."""
    if " - " in measure:
        first, second = measure.split(" - ")
        return np.concatenate([shares(report, a, b, first), -shares(report, a, b, second)])
    ours, theirs = (np.mean([hits_of(report, arm, measure) for arm in group], 0) for group in (a, b))
    return (ours - theirs) / len(ours)

def against(reports: list[dict], a: list[str], b: list[str], measure: str
            ) -> tuple[float, float, list[float]]:
    """Difference of two groups of arms in points, its p over all questions of all seeds, and each seed's."""
    each = [shares(report, a, b, measure) for report in reports]
    seeds = [100 * float(x.sum().round(9)) for x in each]
    return float(np.mean(seeds)), permutation_test(np.concatenate(each) * 1e3), seeds

def verdict(reports: list[dict], claim: str, *tests: tuple[list[str], list[str], str, int]) -> str:
    """Does a claim hold? tests: (arms, other arms, measure, wanted sign)."""
    said, states = [], []
    for a, b, measure, sign in tests:
        if not a or not b or not {*measure.split(" - ")} <= {*measures(reports[0])}:
            return f"- {claim}: not measured."
        d, p, seeds = against(reports, a, b, measure)
        agree = len(set(np.sign(seeds))) == 1
        clear = p < 0.05 and agree
        states.append("not resolved" if not clear else "holds" if d * sign > 0 else "does not hold")
        each = f" ({', '.join(f'{x:+.1f}' for x in seeds)} by seed)" if len(seeds) > 1 else ""
        said.append(f"{measure} {d:+.1f}{each}, p {p:.3f}" + ", the seeds disagree" * (p < 0.05 and not agree))
    state = next((s for s in ("does not hold", "not resolved") if s in states), "holds")
    return f"- {claim}: **{state}** ({'; '.join(said)})."

def study(reports: list[dict]) -> str:
    """The paper's table over one or several runs (seeds), and one sentence for each of its claims."""
    arms = [arm for arm in ["base", *sgt.PROXIES] if all(arm in r["models"] for r in reports)]
    if "none" not in arms or len(arms) < 3:
        raise UserError("a study needs runs that share the arm none and at least one proxy; "
                        "train with --proxies none,instance,…")
    n, measured = len(reports), measures(reports[0])
    compared = [name for name in ("understanding", "generation") if name in measured]

    def spread(values: list[float]) -> str:
        if len(values) < n:
            return "–"
        error = f" ± {np.std(values, ddof=1) / math.sqrt(n):.1f}" if n > 1 else ""
        return f"{np.mean(values):.1f}{error}"
    rows = []
    for arm in arms:
        entries, control = [r["models"][arm] for r in reports], arm in ("base", "none")
        means = [spread([entry[part][key] for entry in entries]) for part, key in map(MEASURES.get, measured)]
        pq = spread([e["segmentation"]["pq"] for e in entries if "pq" in e.get("segmentation", {})])
        differences = [against(reports, [arm], ["none"], name) for name in compared]
        differences = ["" if control else f"{d:+.1f} (p {p:.3f})" for d, p, _ in differences]
        rows.append(["" if control else sgt.PROXIES[arm].level, label(arm), *means, pq, *differences])

    high, lower = ([a for a in arms if a in sgt.PROXIES and sgt.PROXIES[a].level in levels]
                   for levels in (["high"], ["mid", "low"]))
    ours = ["instance"] if "instance" in arms else high[:1]
    shuffled = [arm for arm in arms if arm == "shuffled"]
    sft, base = ["none"], ["base"]
    claims = [
        ("High-level proxies help understanding more than mid- and low-level ones",
         (high, lower, "understanding", 1)),
        ("Segmentation helps understanding more than replay alone (SFT)", (ours, sft, "understanding", 1)),
        ("It is perception that improves, more than reasoning",
         (ours, sft, "perception", 1), (ours, sft, "perception - reasoning", 1)),
        ("Proxies improve the placing of objects in generation", (high + lower, sft, "position", 1)),
        ("Replay alone lowers generation below the base model", (sft, base, "generation", -1)),
        ("Masks of the right image teach more than masks of another", (ours, shuffled, "understanding", 1))]
    seeds = f"{n} seed{'s' * (n > 1)} ({', '.join(str(r['seed']) for r in reports)})"
    return "\n".join([
        f"{seeds}; {reports[0]['questions']} questions and {reports[0]['prompts']} prompts each; mean"
        f"{' ± standard error over seeds' * (n > 1)}; Δ against SFT, paired over questions and prompts",
        table(["level", "arm", *measured, "PQ", *(f"Δ {name}" for name in compared)], rows), "",
        *(verdict(reports, *claim) for claim in claims),
        "p: permutation test over questions of the models at hand; it does not know how another seed would "
        "have turned out, and there are many tests here. So a claim holds only where p < 0.05 and every seed "
        "agrees on the sign. That is little: by this rule a gain of one point held in three seeds, and was gone "
        "in two more."])

# what makes another world, or other questions about it
WORLD = {"data", "image_size", "shapes", "colors", "max_objects", "lattice", "texture", "eval_questions",
         "eval_prompts"}

def sweep(reports: list[dict]) -> str:
    """Runs that differ in more than the seed: a line for each arm of each setting, the mean of its seeds."""
    varied = [key for key in reports[0]["config"] if key not in sgt.NOT_PART_OF_A_RUN | {"seed"}
              and len({json.dumps(r["config"].get(key)) for r in reports}) > 1]
    if WORLD & set(varied):
        raise UserError(f"the runs are measured on different questions or worlds ({', '.join(varied)}); "
                        "compare runs that agree in these")
    groups = defaultdict(list)                     # the values of what varies → its seeds
    for report in reports:
        groups[tuple(str(report["config"].get(key)) for key in varied)].append(report)
    if any(len({r["seed"] for r in group}) < len(group) for group in groups.values()):
        raise UserError("two of the runs have the same settings and seed; name each run once")
    if not varied:
        return study(reports)
    measured = measures(reports[0])
    rows = []
    for values, group in groups.items():
        for arm in group[0]["models"]:
            if all(arm in r["models"] for r in group):
                means = [float(np.mean([r["models"][arm][part][key] for r in group]))
                         for part, key in map(MEASURES.get, measured)]
                rows.append([*values, len(group), label(arm), *means])
    return table([*varied, "seeds", "arm", *measured], rows)

# ==== 7. Pages: charts and report.html ======================================================================

INK = ["#c0392b", "#2471a3", "#1e8449", "#b7950b", "#7d3c98", "#148f77", "#a04000", "#34495e"]

def chart(title: str, series: dict, dots: bool = False) -> str:
    """A line chart from 0, or points, as inline SVG: name → points (x, y)."""
    points = np.array([point for each in series.values() for point in each])
    (left, bottom), (right, top) = points.min(0), points.max(0)
    bottom = bottom if dots else 0.0
    scale = 340 / max(right - left, 1e-9), -150 / max(top - bottom, 1e-9)
    out = [f'<figure><svg viewBox="0 0 400 {190 + 14 * len(series)}" role="img">'
           f'<text x="44" y="12" class="t">{title}</text><path d="M44,20V170H384" class="a"/>'
           f'<text x="40" y="26" class="r">{top:.3g}</text><text x="40" y="170" class="r">{bottom:.3g}</text>'
           f'<text x="44" y="183">{left:.4g}</text><text x="384" y="183" class="r">{right:.4g}</text>']
    for i, (name, each) in enumerate(series.items()):
        ink, places = INK[i % len(INK)], (np.array(each) - (left, bottom)) * scale + (44, 170)
        if dots:
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{ink}"/>' for x, y in places]
        else:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            out.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-width="1.6"/>')
        out.append(f'<text x="56" y="{200 + 14 * i}" fill="{ink}">{name}</text>')
    return "".join(out) + "</svg></figure>"

def html_of(text: str) -> str:
    """Tables and paragraphs of the Markdown of a report."""
    out = []
    for is_table, lines in itertools.groupby(html.escape(text).splitlines(), lambda line: line[:1] == "|"):
        if is_table:
            rows = ["".join(f"<td>{cell.strip()}</td>" for cell in line.strip("|").split("|"))
                    for line in lines if not line.startswith("|-")]
            rows[0] = rows[0].replace("td>", "th>")
            out.append(f'<div class="wide"><table><tr>{"</tr><tr>".join(rows)}</tr></table></div>')
        else:
            out += [f"<p>{line}</p>" for line in lines if line]
    return "\n".join(out)

def picture(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>{name}</h2><img alt="{name}" src="data:image/png;base64,{data}">'

TERMS = """<p>base: the model before post-training. SFT: post-trained with replayed questions and captions
alone. SGT: the same, and it draws the instance masks of pictures that it looks at; other arms draw their own
target, shuffled the masks of another picture. majority: always the commonest answer to this kind of question.
question only: the commonest training answer to the very question, without the picture. judge: the score of
true pictures; ceiling: of true pictures or masks after a round trip through the tokenizer. PQ = SQ · RQ: how
well masks fit, times how many are found. position: both there: both objects were drawn; layout error: how far
one is from where it should be. linear probe: what a linear classifier reads off the features of a layer. ±:
standard error.</p>"""
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%;image-rendering:pixelated}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #ddd}
:is(td,th):first-child{text-align:left}
figure{display:inline-block;width:min(26rem,100%);margin:.5rem 0}svg text{font:11px system-ui,sans-serif}
svg .t{font-weight:600}svg .a{fill:none;stroke:#999}svg .r{text-anchor:end}"""

def write_html(run: sgt.Run, report: dict) -> None:
    """report.html: one file with everything in it, no script, nothing from elsewhere."""
    samples, inside, title = run.folder / "samples", report["mechanism"], html.escape(run.folder.name)
    body = [f"<h1>{title}: seed {report['seed']}, {report['device']}, torch {report['torch']}</h1>",
            html_of(markdown(report)), f"<h2>Terms</h2>{TERMS}",
            picture("The same scenes and prompts, by every model", samples / "comparison.png")]
    if inside:
        body.append(picture("Where the models look for the answer", samples / "attention.png"))
        body.append("<h2>Layers</h2>")
        *_, (last, last_layers) = inside.items()
        chance = {"chance": list(enumerate(last_layers["looks_at"]["chance"], 1))}
        names = {"image": "attention of the answer on the image, % by layer",
                 "object": "… of that on the object asked about, %",
                 "object from its name": "… and from the word that names it, %"}
        for key, name in names.items():
            series = {label(arm): list(enumerate(m["looks_at"][key], 1)) for arm, m in inside.items()}
            body.append(chart(name, series if key == "image" else series | chance))
        features = last_layers["separability"]
        for task, majority in features["majority"].items():
            series = {label(arm): list(enumerate(m["separability"]["probes"][task]))
                      for arm, m in inside.items()}
            series["chance"] = [(layer, majority) for layer, _ in series["base"]]
            body.append(chart(f"linear probe for {task}, % by layer", series))
        series = defaultdict(list)
        for shape, point in sorted(zip(features["shapes"], features["points"])):
            series[SHAPE_NAMES[shape]].append(point)
        body.append(chart(f"patches of the last layer, {label(last)}, by shape", series, dots=True))
    body.append("<h2>Training</h2>")
    log = run.log()
    for stage in dict.fromkeys(line["stage"] for line in log):
        curves = defaultdict(list)
        for line in log:
            for name, value in line.items() if line["stage"] == stage else ():
                if name not in ("stage", "step", "seconds"):
                    curves[name].append((line["step"], min(value, 8)))
        body.append(chart(f"loss: {label(stage)}", curves))
    for path in sorted(samples.glob("*_[0-9][0-9][0-9][0-9][0-9][0-9].png")):
        stage, step = path.stem.rsplit("_", 1)
        if int(step):
            body.append(picture(f"{label(stage)}: samples at step {int(step)}", path))
    page = ("<!doctype html><html lang=en><meta charset=utf-8>"
            "<meta name=viewport content='width=device-width,initial-scale=1'>"
            f"<title>{title}</title><style>{STYLE}</style>" + "\n".join(body))
    run.write("report.html", page.encode())

# ==== 8. Commands ===========================================================================================

def evaluate(run: sgt.Run, device: torch.device) -> dict:
    """Measure every model of a run; write report.json, report.md and report.html; return the report."""
    cfg, tokenizer, _, _ = sgt.load_run(run, "base", device)
    in_scenes, items = not cfg.photos, questions(cfg, "val", cfg.eval_questions)
    pope = {kind: pope_items(cfg, kind, cfg.eval_questions // 5)
            for kind in ("random", "popular", "adversarial")}
    pope = {kind: asked for kind, asked in pope.items() if asked}     # none where everything is an "object"
    report = {
        "run": run.folder.name, "seed": cfg.seed, "torch": torch.__version__, "device": str(device),
        "config": dataclasses.asdict(cfg), "questions": len(items), "masks": cfg.eval_masks,
        "blind": blind_baselines(cfg, items),
        "mask_ceiling": segmentation(cfg, None, tokenizer, "instance", cfg.eval_masks),
        "models": {}, "mechanism": {},
    }
    grid = sgt.sample(cfg, "grid", np.arange(8), "masks")
    truth = sgt.render(cfg, grid)
    seen, segment = truth.image.to(device), [cfg.text.encode(sgt.PROXIES["instance"].prompts[0])] * 8
    if in_scenes:
        prompts, images = geneval_prompts(cfg, cfg.eval_prompts)
        round_trip = [tokenizer.decode(tokenizer.encode(part.to(device))).cpu() for part in images.split(250)]
        report["judge"] = score_pictures(cfg, prompts, images)
        report["tokenizer"] = score_pictures(cfg, prompts, torch.cat(round_trip))
        colors = [item for item in questions(cfg, "val", 2000) if item.kind == "color"]   # for the mechanism
        crowded = sorted(range(len(colors)), key=lambda i: -colors[i].scenes.count[colors[i].index])[:6]
        crowds = torch.cat([rendered(cfg, colors[i].scenes, colors[i].index).image for i in crowded])
        attention = [("asked", crowds, [colors[i].question for i in crowded])]
    else:                      # no judge of what a drawn photograph shows; but what is learned by heart shows
        learned = questions(cfg, "train", cfg.eval_questions)
        prompts = [Prompt("", sgt.caption(grid, b, sgt.word_rng(grid, b), cfg), None) for b in range(8)]
        report["photographs"] = {kind: [int(i.scenes.which[i.index]) for i in items if i.kind == kind]
                                 for kind in sgt.kinds_of(cfg)}
    report["prompts"] = len(prompts)
    ids = [[Text.BOS] + cfg.text.encode(prompt.text) for prompt in prompts]
    # the picture beside the numbers: eight pictures cut up, eight prompts drawn, by every model
    shown = [len(prompts) * i // 8 for i in range(8)]
    cut, free = [("input", seen, None), ("true masks", sgt.instance(cfg, grid, truth), None)], []
    for arm in ["base", *cfg.arms]:
        _, _, model, _ = sgt.load_run(run, arm, device)
        print(f"measuring {arm} …", flush=True)
        drawn = torch.cat([sgt.generate(model, tokenizer, ids[i:i + 100], guidance=cfg.guidance, seed=i).cpu()
                           for i in range(0, len(ids), 100)])
        entry = report["models"][arm] = {
            "understanding": understanding(model, items),
            "pope": {kind: pope_scores([item.truth for item in asked], ask_all(model, asked))
                     for kind, asked in pope.items()}}
        if arm in ("instance", "shuffled", "semantic"):
            entry["segmentation"] = segmentation(cfg, model, tokenizer, arm, cfg.eval_masks)
        if in_scenes:
            entry["generation"] = score_pictures(cfg, prompts, drawn)
            looks, maps = looks_at(cfg, model, colors)
            report["mechanism"][arm] = {"looks_at": looks, "separability": separability(cfg, model),
                                        "listens_to": listens_to(cfg, model, tokenizer, prompts[::4])}
            # the picture shows the layer that looks most at the object asked about
            layer = int(np.argmax(looks["object from its name"]))
            heat = maps[layer, crowded] / maps[layer, crowded].amax(1, keepdim=True)
            heat = F.interpolate(heat.view(-1, 1, cfg.see_grid, cfg.see_grid), cfg.image_size)
            attention.append((f"{label(arm)}, layer {layer + 1}", crowds * (0.15 + 0.85 * heat), None))
        else:
            entry["learned"] = understanding(model, learned)
            if "segmentation" in entry:
                learned_masks = segmentation(cfg, model, tokenizer, arm, cfg.eval_masks, "train")
                entry["learned_segmentation"] = learned_masks
        masks = sgt.generate(model, tokenizer, segment, seen, temperature=0.0)
        cut.append((f"{label(arm)}: masks", masks, None))
        free.append((f"{label(arm)}: drawn", drawn[shown], [prompts[i].text for i in shown]))
    run.write("report.json", json.dumps(report, indent=1).encode())
    run.write("report.md", (markdown(report) + "\n").encode())
    run.write("samples/comparison.png", sgt.picture_grid(cut + free))
    if in_scenes:
        run.write("samples/attention.png", sgt.picture_grid(attention))
    write_html(run, report)
    return report

def ask_file(run: sgt.Run, path: Path, device: torch.device) -> str:
    """POPE's metrics of every model on the questions of a file."""
    cfg, scores = run.config(), {}
    images, texts, truth = pope_file(cfg, path)
    for arm in ["base", *cfg.arms]:
        model, said = sgt.load_run(run, arm, device)[2], []
        for i in range(0, len(texts), 250):
            said += sgt.answer(model, images[i:i + 250].to(device), texts[i:i + 250], limit=5)
        scores[label(arm)] = pope_scores(truth, said)
    rows = [[metric, *(each[metric] for each in scores.values())] for metric in scores["base"]]
    majority = 100 * max(truth.count("yes"), truth.count("no")) / len(truth)
    answers = table([f"{len(truth)} questions", *scores], rows)
    return f"{answers}\nalways the same answer: accuracy {majority:.1f}"

def export_masks(run: sgt.Run, arm: str, path: Path, device: torch.device) -> str:
    """What an arm draws of the validation pictures as COCO results."""
    cfg, tokenizer, model, _ = sgt.load_run(run, arm, device)
    drawn, instance, _ = drawn_targets(cfg, model, tokenizer, "instance", cfg.eval_masks)
    masks = masks_of(drawn, cfg.max_objects)
    results = coco_results(masks, confidence(drawn, masks, cfg.max_objects))
    sgt.Run(path.parent).write(path.name, json.dumps(results).encode())
    scores = average_precision(as_coco(instance), results)
    return (f"wrote {len(results)} masks of {len(masks)} pictures to {path}; "
            + ", ".join(f"{name} {score:.1f}" for name, score in scores.items()))

def export_scenes(cfg: Config, folder: Path, count: int) -> str:
    """Validation scenes as a COCO data set: images/, instances.json (shapes are classes), captions.json."""
    if cfg.photos:
        raise UserError("this run has no scenes, its data are photographs; name a run on scenes")
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another --export-scenes")
    scenes = sgt.sample_scenes(cfg, "val", np.arange(count))
    truth, out, captions = sgt.render(cfg, scenes), sgt.Run(folder), []
    for i in range(count):
        sgt.save_picture(sgt.to_pil(truth.image[i]), str(folder / f"images/{i:06d}.png"))
        for text in sgt.captions(sgt.things(scenes, i), sgt.word_rng(scenes, i)).values():
            captions.append({"id": 1 + len(captions), "image_id": i, "caption": text})
    found = as_coco(truth.instance, truth.category, cfg.shape_names)
    out.write("captions.json", json.dumps({"images": found["images"], "annotations": captions}).encode())
    out.write("instances.json", json.dumps(found).encode())
    return f"wrote {count} scenes with {len(found['annotations'])} masks to {folder}"

def speed(cfg: Config, device: torch.device) -> str:
    """Throughput of a run's model, beside plain eager fp32 PyTorch; weights do not matter for it."""
    found, rows = kernels.bench(4.0, cfg, device), []
    for name, key, n in (("training samples", "train step", cfg.vqa_batch + cfg.t2i_batch),
                         ("answers", "64 answers of 4 tokens", 64),
                         ("pictures", "64 pictures, guidance", 64)):
        ours, plain = found[key]["ours"], found[key]["eager fp32, sdpa"]
        rows.append([f"{name} a second", n / ours, n / plain, plain / ours])
    memory = "".join(f"; {key.split(',')[0]} {value:.0f} MB" for key, value in found.items() if "MB" in key)
    rates = table(["", "ours", "eager fp32, SDPA", "ratio"], rows)
    return (f"{found['device']}, torch {found['torch']}\n{rates}\n"
            f"train step at {100 * found['share of the matrix rate']:.0f} % of the matrix rate of "
            f"{found['gemm_gflops']:.0f} GFLOP/s; first step {found['first step, seconds']:.0f} s{memory}")

def tables(runs: list[sgt.Run], again: bool, as_json: bool, device: torch.device) -> str:
    """The reports of runs, which are measured first if need be, and what they say together."""
    for run in runs:
        if again or not (run.folder / "report.json").exists():
            if run.pulled:
                raise UserError(f"{run.folder} is only to be read; "
                                f"measure a copy: cp -rL {run.folder} runs/copy")
            with contextlib.redirect_stdout(sys.stderr):
                evaluate(run, device)
    reports = [read_report(run) for run in runs]
    if as_json:
        return json.dumps(reports[0] if len(runs) == 1 else reports, indent=1)
    if len(runs) > 1:
        return sweep(reports)
    models = reports[0]["models"]
    return show(runs[0]) + (f"\n\n{sweep(reports)}" if "none" in models and len(models) > 3 else "")

def command(argv: list[str] | None) -> str:
    """Do what the command line asks for; what there is to print."""
    p = sgt.Parser(prog="eval.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("run", nargs="*",
                   help="folders of runs, their names under runs/ or on the Hub; default: the newest")
    p.add_argument("--json", action="store_true", help="print report.json instead of tables")
    p.add_argument("--again", action="store_true", help="measure again, on --device")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--pope", metavar="FILE", help="ask the models the questions of a POPE-format JSONL file")
    p.add_argument("--export", metavar="FILE",
                   help="write the masks that --model draws of the validation scenes as COCO results")
    p.add_argument("--model", metavar="NAME", help="which arm --export uses (default: instance)")
    p.add_argument("--export-scenes", metavar="DIR", help="write the scenes as a COCO data set")
    p.add_argument("--speed", action="store_true", help="measure throughput")
    args = p.parse_args(argv)
    runs = [sgt.find_run(name) for name in args.run or [None]]
    cfg = dataclasses.replace(runs[0].config(), device=args.device)
    cfg.validate()
    device = sgt.choose_device(cfg)[0]
    alone = [name for name in ("speed", "export_scenes", "pope", "export") if getattr(args, name)]
    if alone and len(runs) > 1:
        raise UserError(f"{sgt.flag(alone[0])} takes one run, got {len(runs)}; name one")
    useless = alone[1:] + [name for name in ("json", "again") if alone and getattr(args, name)]
    useless += ["model"] if args.model and alone[:1] != ["export"] else []
    if useless:
        beside = f"beside {sgt.flag(alone[0])}" if alone else "here"
        raise UserError(f"{sgt.flag(useless[0])} has no effect {beside}; leave it out")
    if args.speed:
        return speed(cfg, device)
    if args.export_scenes:
        return export_scenes(cfg, Path(args.export_scenes), cfg.eval_masks)
    for run in runs:
        missing = [name for name in ["tokenizer", "base", *run.config().arms] if not run.done(name)]
        if missing:
            raise UserError(f"{run.folder} is not finished ({', '.join(missing)} missing); "
                            "go on with the command that started it")
    if args.pope:
        return ask_file(runs[0], Path(args.pope), device)
    if args.export:
        return export_masks(runs[0], args.model or "instance", sgt.writable(args.export, ".json"), device)
    return tables(runs, args.again, args.json, device)

def main(argv: list[str] | None = None) -> int:
    try:
        print(command(argv))
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
