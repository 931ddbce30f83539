"""What a trained run understands, draws and segments, beside the baselines and ceilings that give the numbers meaning.

    python eval.py runs/tiny              # print the table of a run
    python eval.py runs/tiny --json       # the same facts for a program
    python eval.py runs/tiny --again      # measure again instead of reading report.json

    1. Judge           parse a picture back into objects, by synthesis       3. Metrics    questions, prompts, masks
    2. Segmentation    colors → masks → panoptic quality                     4. Report     tables and the command line
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import sgt
from sgt import COLOR_NAMES, COLORS, PALETTE, QUESTIONS, SHAPES, TEXT, Config, Thing, UserError

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
    return (image[:, None] - palette[:, :, None, None]).square().sum(2).argmin(1)

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

# ==== 2. Segmentation: colors → masks → panoptic quality ====================================================

def masks_of(target: Tensor, colors: int) -> list[Tensor]:
    """Instance masks in drawn targets (B, 3, P, P): nearest palette color, connected parts, tiny ones dropped."""
    P = target.shape[-1]
    label = nearest(target.float().cpu(), PALETTE[:colors + 1])
    sample, _, masks = split_parts(label, colors + 1, max(2.0, P * P / 256))
    return [masks[sample == b] for b in range(len(target))]

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

# ==== 3. Metrics of a model =================================================================================

def scene_stream(cfg: Config, split: str, chunk: int = 256, overlap: float = 0.25):
    """The scenes of a split without end, a chunk at a time."""
    start = 0
    while True:
        yield sgt.sample_scenes(cfg, split, np.arange(start, start + chunk), overlap)
        start += chunk

def questions(cfg: Config, split: str, total: int) -> list[tuple[str, sgt.Scenes, int, str, str]]:
    """The same number of questions of every kind: (kind, scenes, index in them, question, answer)."""
    per_kind = max(1, total // len(QUESTIONS))
    items: dict[str, list] = {kind: [] for kind in QUESTIONS}
    for scenes in scene_stream(cfg, split):
        for b in range(len(scenes)):
            objects, rng = sgt.things(scenes, b), sgt.word_rng(scenes, b)
            for kind, (_, ask) in QUESTIONS.items():
                asked = ask(objects, rng, cfg) if len(items[kind]) < per_kind else None
                if asked:
                    items[kind].append((kind, scenes, b, *asked))
        if all(len(found) >= per_kind for found in items.values()):
            return [item for found in items.values() for item in found]

def blind_baselines(cfg: Config, items: list) -> dict[str, dict[str, float]]:
    """Accuracy without the image: the commonest training answer of a kind, and of the very question."""
    by_kind, by_question = {kind: Counter() for kind in QUESTIONS}, {}
    for kind, _, _, question, truth in questions(cfg, "train", 20000):
        by_kind[kind][truth] += 1
        by_question.setdefault(question, Counter())[truth] += 1
    top = lambda counter: counter.most_common(1)[0][0]
    majority, question_only = {}, {}
    for kind in QUESTIONS:
        asked = [(q, a) for k, _, _, q, a in items if k == kind]
        majority[kind] = 100 * np.mean([top(by_kind[kind]) == a for _, a in asked])
        question_only[kind] = 100 * np.mean([top(by_question.get(q, by_kind[kind])) == a for q, a in asked])
    return {"majority": summarize(majority), "question_only": summarize(question_only)}

def summarize(by_kind: dict[str, float]) -> dict[str, float]:
    """Add the averages over kinds: all, perception, reasoning."""
    level = lambda name: float(np.mean([by_kind[k] for k, (at, _) in QUESTIONS.items() if at == name]))
    return {**{k: float(v) for k, v in by_kind.items()}, "perception": level("perception"),
            "reasoning": level("reasoning"), "average": float(np.mean([by_kind[k] for k in QUESTIONS]))}

def understanding(model, items: list, batch: int = 250) -> dict[str, float]:
    """Accuracy in percent by kind: the greedy answer must equal the true one to the letter."""
    right: dict[str, list[bool]] = {kind: [] for kind in QUESTIONS}
    device = model.embed.device
    for start in range(0, len(items), batch):
        part = items[start:start + batch]
        chunks = {id(scenes): scenes for _, scenes, *_ in part}
        rendered = {key: sgt.render(model.cfg, scenes).image for key, scenes in chunks.items()}
        images = torch.stack([rendered[id(scenes)][b] for _, scenes, b, *_ in part])
        given = sgt.answer(model, images.to(device), [question for *_, question, _ in part], limit=5)
        for (kind, *_, truth), said in zip(part, given):
            right[kind].append(said == truth)
    return summarize({kind: 100 * np.mean(hits) for kind, hits in right.items()})

def geneval_prompts(cfg: Config, total: int) -> tuple[list[Prompt], Tensor]:
    """The same number of prompts of GenEval's six kinds, with a true picture (n, 3, P, P) of each."""
    per_kind, prompts, images = max(1, total // len(GENEVAL)), [], []
    need = Counter({kind: per_kind for kind in GENEVAL})
    for scenes in scene_stream(cfg, "val", overlap=0.0):          # like GenEval's pictures: objects lie apart
        pictures = sgt.render(cfg, scenes).image
        for b in range(len(scenes)):
            objects = sgt.things(scenes, b)
            texts = sgt.captions(objects)
            kinds = [kind for kind in GENEVAL if kind in texts and need[kind] > 0]
            if kinds:
                kind = max(kinds, key=lambda k: need[k])
                need[kind] -= 1
                prompts.append(Prompt(kind, texts[kind], objects))
                images.append(pictures[b])
        if not +need:
            return prompts, torch.stack(images)

def score_pictures(cfg: Config, prompts: list[Prompt], images: Tensor) -> dict[str, float]:
    """GenEval score in percent by kind, and the mean over kinds."""
    found = judge(cfg, images)
    score = {kind: 100 * float(np.mean([satisfied(p, f) for p, f in zip(prompts, found) if p.kind == kind]))
             for kind in GENEVAL}
    return {**score, "average": float(np.mean(list(score.values())))}

def judge_accuracy(cfg: Config, prompts: list[Prompt], images: Tensor) -> float:
    """Share of true pictures that the judge parses exactly: every object's color and shape, nothing else, within 1.5
    pixels of its place."""
    def exact(objects: list[Thing], found: list[Thing]) -> bool:
        if len(objects) != len(found):
            return False
        rest = list(found)
        for o in objects:
            close = [f for f in rest if (f.color, f.shape) == (o.color, o.shape) and math.hypot(f.x - o.x, f.y - o.y) < 1.5]
            if not close:
                return False
            rest.remove(close[0])
        return True
    return 100 * float(np.mean([exact(p.objects, f) for p, f in zip(prompts, judge(cfg, images))]))

def segmentation(cfg: Config, model, tokenizer, name: str, total: int) -> dict[str, float]:
    """Panoptic quality of what a model draws when asked for proxy `name`; without a model, of the true target sent
    through the tokenizer (the ceiling).
    """
    predicted, truth = [], []
    for scenes in scene_stream(cfg, "val", min(total, 100)):
        rendered = sgt.render(cfg, scenes)
        source, prompts, target = sgt.proxy_batch(cfg, name, scenes, rendered)
        if model is None:
            drawn = tokenizer.decode(tokenizer.encode(target.to(tokenizer.place.device)))
        else:
            device = model.embed.device
            drawn = sgt.generate(model, tokenizer, [TEXT.encode(p) for p in prompts], source.to(device), temperature=0.0)
        predicted += masks_of(drawn, cfg.max_objects)
        truth += true_masks(rendered.instance)
        if len(truth) >= total:
            return panoptic_quality(predicted[:total], truth[:total])

# ==== 4. Report =============================================================================================

def evaluate(run: sgt.Run, device: torch.device) -> dict:
    """Measure every finished model of a run; write and return report.json (and report.md)."""
    cfg = run.config()
    items = questions(cfg, "val", cfg.eval_questions)
    prompts, pictures = geneval_prompts(cfg, cfg.eval_prompts)
    _, tokenizer, _, _ = sgt.load_run(run, "base", device)
    round_trip = torch.cat([tokenizer.decode(tokenizer.encode(p.to(device))).cpu() for p in pictures.split(250)])
    report = {
        "run": run.folder.name, "seed": cfg.seed, "torch": torch.__version__, "device": str(device),
        "questions": len(items), "prompts": len(prompts), "masks": cfg.eval_masks,
        "blind": blind_baselines(cfg, items),
        "judge": {"exact": judge_accuracy(cfg, prompts, pictures), **score_pictures(cfg, prompts, pictures)},
        "tokenizer": {"exact": judge_accuracy(cfg, prompts, round_trip), **score_pictures(cfg, prompts, round_trip)},
        "mask_ceiling": segmentation(cfg, None, tokenizer, "instance", cfg.eval_masks),
        "models": {},
    }
    # the picture beside the numbers: eight scenes cut up, eight prompts drawn, by every model
    val = sgt.sample_scenes(cfg, "grid", np.arange(8))
    rendered, segment = sgt.render(cfg, val), TEXT.encode(sgt.PROXIES["instance"].prompts[0])
    seen, shown = rendered.image.to(device), [len(prompts) * i // 8 for i in range(8)]
    cut, free = [("input", seen, None), ("true masks", sgt.instance(cfg, val, rendered), None)], []
    for arm in ["base", *cfg.arms]:
        _, _, model, _ = sgt.load_run(run, arm, device)
        print(f"measuring {arm} …", flush=True)
        ids = [[TEXT.BOS] + TEXT.encode(p.text) for p in prompts]
        drawn = [sgt.generate(model, tokenizer, ids[i:i + 100], guidance=cfg.guidance, seed=i).cpu()
                 for i in range(0, len(ids), 100)]
        entry = {"understanding": understanding(model, items), "generation": score_pictures(cfg, prompts, torch.cat(drawn))}
        if arm in ("instance", "shuffled"):
            entry["segmentation"] = segmentation(cfg, model, tokenizer, arm, cfg.eval_masks)
        report["models"][arm] = entry
        cut.append((f"{label(arm)}: masks", sgt.generate(model, tokenizer, [segment] * 8, seen, temperature=0.0), None))
        free.append((f"{label(arm)}: drawn", torch.cat(drawn)[shown], [prompts[i].text for i in shown]))
    run.write("samples/comparison.png", sgt.picture_grid(cut + free))
    run.write("report.md", (markdown(report) + "\n").encode())
    run.write("report.json", json.dumps(report, indent=1).encode())
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
    """The three tables of a report, and the comparison that the run was made for."""
    models, blind = report["models"], report["blind"]
    arms = list(models)
    kinds = [*QUESTIONS, "perception", "reasoning", "average"]
    out = [f"Understanding: accuracy in %, {report['questions']} questions",
           table(["question", "majority", "question only", *map(label, arms)],
                 [[k, blind["majority"][k], blind["question_only"][k], *(models[a]["understanding"][k] for a in arms)]
                  for k in kinds]),
           f"\nGeneration: pictures that show what was asked, in %, {report['prompts']} prompts",
           table(["prompt", "judge", "ceiling", *map(label, arms)],
                 [[k, report["judge"][k], report["tokenizer"][k], *(models[a]["generation"][k] for a in arms)]
                  for k in [*GENEVAL, "average"]]),
           f"(judge: on true pictures, of which it parses {report['judge']['exact']:.1f} % exactly; "
           "ceiling: on true pictures after a round trip through the tokenizer)"]
    segmented = [a for a in arms if "segmentation" in models[a]]
    if segmented:
        out += [f"\nSegmentation: class-agnostic instances, 0-100, {report['masks']} scenes",
                table(["measure", "ceiling", *map(label, segmented)],
                      [[m.upper().replace("MIOU", "mIoU"), report["mask_ceiling"][m],
                        *(models[a]["segmentation"][m] for a in segmented)] for m in ("pq", "sq", "rq", "miou")])]
    if "none" in models:
        out.append("")
        for arm in arms:
            if arm not in ("base", "none"):
                out.append(f"{label(arm)} against SFT, one seed: " + compare(report, arm) + ".")
    return "\n".join(out)

def compare(report: dict, arm: str) -> str:
    """Differences to the SFT control in words. The standard errors are those of two independent samples: a little wide, as
    both models answer the same questions.
    """
    def one(part: str, key: str, n: int) -> str:
        a, b = report["models"][arm][part][key], report["models"]["none"][part][key]
        error = 100 * math.sqrt(sum(p * (1 - p) for p in (a / 100, b / 100)) / n)
        return f"{a - b:+.1f} ± {error:.1f}"
    n, kinds = report["questions"], len(QUESTIONS)
    levels = Counter(level for level, _ in QUESTIONS.values())
    return (f"understanding {one('understanding', 'average', n)} "
            f"(perception {one('understanding', 'perception', n * levels['perception'] // kinds)}, "
            f"reasoning {one('understanding', 'reasoning', n * levels['reasoning'] // kinds)}), "
            f"generation {one('generation', 'average', report['prompts'])}")

def show(run: sgt.Run) -> str:
    try:
        return markdown(json.loads((run.folder / "report.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{run.folder} has no readable report.json ({e.__class__.__name__}); "
                        f"make one with: python eval.py {run.folder} --again") from None

def main(argv: list[str] | None = None) -> int:
    try:
        p = sgt.Parser(prog="eval.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
        p.add_argument("run", nargs="?", help="folder of a run, or its name under runs/; default: the newest")
        p.add_argument("--json", action="store_true", help="print report.json instead of tables")
        p.add_argument("--again", action="store_true", help="measure again, on --device")
        p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
        args = p.parse_args(argv)
        run = sgt.find_run(args.run)
        cfg = dataclasses.replace(run.config(), device=args.device)
        cfg.validate()
        missing = [name for name in ["tokenizer", "base", *cfg.arms] if not run.done(name)]
        if missing:
            raise UserError(f"{run.folder} is not finished ({', '.join(missing)} missing); go on with: python sgt.py --train")
        if args.again or not (run.folder / "report.json").exists():
            with contextlib.redirect_stdout(sys.stderr):
                evaluate(run, sgt.choose_device(cfg)[0])
        text = show(run)
        print((run.folder / "report.json").read_text() if args.json else text)
        return 0
    except (UserError, OSError, torch.OutOfMemoryError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    sys.exit(main())
