"""What a trained run understands, draws and segments, beside baselines and ceilings.

    python eval.py runs/tiny               # its tables; pictures are in report.html
    python eval.py runs/seed0 runs/seed1   # several seeds: means, errors, each difference
    python eval.py runs/tiny --export DIR  # scenes as COCO data, drawn masks as results
"""
import base64
import functools
import html
import itertools
import json
import math
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path
from statistics import fmean, mean, stdev
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import kernels
import sgt
from kernels import attention_reference
from sgt import LOOKS, MAX_OBJECTS, PALETTE, PROXIES, QUESTIONS, RADII, Run, Thing, UserError

SHAPES, COLORS = list(sgt.SHAPES), list(sgt.COLORS)
REASONING = {"compare", "arithmetic"}  # the others are perception

# ==== 1. Judge: parse a picture back into objects
def parts_of(label, colors, smallest):
    """Number the 8-connected parts of each color, from 1, in index maps (B, P, P): a part gets 1 +
    the flat index of its last pixel, and 0 if it has fewer than `smallest` pixels."""
    mask = label[:, None] == torch.arange(1, colors + 1)[:, None, None]  # (B, colors, P, P)
    parts = torch.arange(1, 1 + label.numel(), dtype=torch.int32).view_as(label)[:, None] * mask
    while not torch.equal(parts, wider := F.max_pool2d(parts, 3, 1, 1) * mask):
        parts = wider  # spread the numbers until nothing changes
    parts = parts.amax(1)  # (B, P, P)
    return parts * (parts.flatten().bincount()[parts] >= smallest)

def nearest(image, palette):
    """Squared distance and index (B, P, P) of the palette color (n, 3) nearest to each pixel."""
    return torch.stack([(image - c[:, None, None]).square().sum(1) for c in palette]).min(0)

def id_masks(instance):
    """Index maps (B, P, P), 0 = background -> (n, P, P) bool for every picture."""
    return [ids == ids[ids > 0].unique()[:, None, None] for ids in instance]

def best_fit(color, cover, visible, x, y):
    """The Thing near (x, y), of any shape and size, most like `cover` (P, P) if visible."""
    P, pixel = len(cover), torch.arange(len(cover)) + 0.5
    tried = list(itertools.product(RADII, (-0.5, 0, 0.5), (-0.5, 0, 0.5)))
    numbers = torch.tensor([(RADII[size] * P, dx, dy) for size, dx, dy in tried])
    radius, dx, dy = numbers.T[..., None, None]  # (n, 1, 1) each
    best, found = 0.7, None  # a soft IoU that is not above 0.7 is no Thing
    for shape, distance in sgt.SHAPES.items():
        # the box of a triangle is not centred on the point that it is drawn around
        middle = y + dy + 0.125 * radius * (shape == "triangle")
        outline = distance((pixel - x - dx) / radius, (pixel[:, None] - middle) / radius)
        model = (0.5 - outline * radius).clamp(0, 1)  # (n, P, P)
        overlap = (torch.minimum(model, cover) * visible).sum((1, 2))
        union = (torch.maximum(model, cover) * visible).sum((1, 2))
        # or noise would fit a big object that is hidden
        seen = (model * visible).sum((1, 2)) > 0.5 * model.sum((1, 2))
        score, i = (overlap / union).where(seen, 0.0).max(0)
        if score > best:
            place = x + float(dx[i]), float(middle[i]), float(radius[i])
            best, found = score, Thing(shape, color, tried[i][0], *place, 0)
    return found

def judge(image):
    """The Things in pictures (B, 3, P, P) of plain scenes, by analysis through synthesis: a part of
    one color is what fits it best; hidden pixels do not count."""
    image, found = image.float().cpu(), [[] for _ in image]
    palette, first = torch.tensor([*sgt.BACKGROUNDS, *sgt.COLORS.values()]), len(sgt.BACKGROUNDS)
    hues = nearest(image, palette)[1]  # (B, P, P), of a color from `first` on
    smallest = 0.4 * (0.3 * RADII["small"] * image.shape[-1]) ** 2 * math.pi + 2  # less is noise
    parts = id_masks(parts_of(hues - first + 1, len(COLORS), smallest))
    for picture, hue, masks, things in zip(image, hues, parts, found):
        ground = palette[hue[hue < first].bincount(minlength=1).argmax(), :, None, None]
        for mask in masks:  # (P, P)
            color = hue[mask][0]
            # how much of a pixel is covered: its place between ground and color
            ray = palette[color, :, None, None] - ground
            cover = (((picture - ground) * ray).sum(0) / ray.square().sum()).clamp(0, 1)
            others = (hue >= first) & (hue != color)
            near, hidden = F.max_pool2d(torch.stack([mask, others]).float(), 3, 1, 1)
            cover = torch.maximum(cover * near, mask * 0.7)  # mostly covered
            y, x = (float(line.min() + line.max() + 1) / 2 for line in mask.nonzero().T)
            if thing := best_fit(COLORS[color - first], cover, 1 - hidden * ~mask, x, y):
                things.append(thing)
    return found

# ==== 2. Masks: panoptic quality, COCO's AP
def masks_of(drawn):
    """Masks in drawn targets (B, 3, P, P), without specks: one color is one object. And the score
    of each mask: how close its pixels are to their palette color."""
    far, label = nearest(drawn, PALETTE[:MAX_OBJECTS + 1])  # (B, P, P)
    masks = id_masks(label * (parts_of(label, MAX_OBJECTS, drawn.shape[-1] ** 2 / 256) > 0))
    return masks, [1 - float(d[mask].mean()) for d, of in zip(far.sqrt(), masks) for mask in of]

def panoptic_quality(predicted, truth):
    """Class-agnostic PQ (arXiv 1801.00868) in percent; nothing of nothing is 100."""
    iou_sum, count = 0.0, 0.0
    for p, t in zip(predicted, truth):
        p, t = p.flatten(1).float(), t.flatten(1).float()
        both = p @ t.T  # (predictions, truths)
        iou = both / (p.sum(1)[:, None] + t.sum(1) - both)
        iou_sum += float(iou[iou > 0.5].sum())  # masks of a picture are disjoint: a match is unique
        count += (len(p) + len(t)) / 2  # matched, and half of extra or missed
    return 100 * iou_sum / count if count else 100.0

def coco_masks(masks):
    """Masks of pictures as COCO annotations of category 1; ids from 1, as COCOeval needs."""
    found = []
    for image, each in enumerate(masks, 1):
        for rle in mask_api.encode(np.asfortranarray(each.byte().permute(1, 2, 0).numpy())):
            found.append({"id": len(found) + 1, "image_id": image, "category_id": 1, "iscrowd": 0,
                          "area": int(mask_api.area(rle)), "bbox": mask_api.toBbox(rle).tolist(),
                          "segmentation": {**rle, "counts": rle["counts"].decode()}})
    return found

def average_precision(truth, results):
    """COCO's AP of masks in percent, by COCOeval as it comes."""
    with mock.patch("builtins.print"):  # pycocotools talks
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        measured = COCOeval(coco, coco.loadRes(results) if results else COCO(), "segm")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return 100 * measured.stats[0]

def val_scenes(cfg, n, *looks):
    return [scene._replace(look=look) for scene in sgt.sample(cfg, "val", range(n), "masks")
            for look in looks]

def segmentation(cfg, model, tokenizer, folder=None):
    """PQ and AP of the masks that a model (None: the tokenizer, the ceiling) draws of held-out
    scenes, by look; scenes and masks are written to a folder, if given, as COCO files."""
    found, device = {}, tokenizer.position.device
    for look in LOOKS:
        scenes = val_scenes(cfg, cfg.eval_masks, look)
        image, prompts, target = sgt.draw_proxy(cfg, "instance", scenes)
        drawn = (sgt.generate(model, tokenizer, prompts, image.to(device)) if model else
                 tokenizer.decode(tokenizer.encode(target.to(device)))).cpu()
        (masks, scores), true = masks_of(drawn), id_masks(sgt.render(cfg, scenes).instance)
        data = {"images": [{"id": i + 1, "file_name": f"{i:06d}.png", "width": cfg.image_size,
                            "height": cfg.image_size} for i in range(len(scenes))],
                "categories": [{"id": 1, "name": "object"}], "annotations": coco_masks(true)}
        results = [{**mask, "score": score} for mask, score in zip(coco_masks(masks), scores)]
        if folder:
            out = Run(folder / look)
            for about, picture in zip(data["images"], image):
                out.write(f"images/{about['file_name']}", sgt.png(sgt.to_pil(picture)))
            out.write("instances.json", json.dumps(data))
            out.write("results.json", json.dumps(results))
        found[f"PQ, {look}"] = panoptic_quality(masks, true)
        found[f"AP, {look}"] = average_precision(data, results)  # last: pycocotools changes both
    return found

# ==== 3. Questions and prompts
# A question about a held-out scene with its answer, or a prompt that fits it.
Item = namedtuple("Item", "kind scene text truth", defaults=[""])

def collect(cfg, kinds, total, use, turn):
    """`total` items, as many of every kind, each about a scene of its own: independent errors.
    `turn(cfg, kind, scene)` gives text and truth, or None."""
    items, numbers = {kind: [] for kind in kinds}, itertools.count()
    while lacking := [kind for kind in kinds if len(items[kind]) < max(1, total // len(kinds))]:
        scene = sgt.sample(cfg, "val", [next(numbers)], use)[0]
        for kind in sorted(lacking, key=lambda kind: len(items[kind])):  # what lags behind first
            if found := turn(cfg, kind, scene):
                items[kind].append(Item(kind, scene, *found))
                break
    return sum(items.values(), [])

def question(cfg, kind, scene):
    return sgt.ask(kind, scene.things, scene.rng(kind), cfg.image_size)

def right(model, items, look):
    """Which of a model's greedy answers, about one look of the scenes, are the true ones."""
    said = []
    for part in (items[i:i + 250] for i in range(0, len(items), 250)):
        image = sgt.render(model.cfg, [i.scene._replace(look=look) for i in part]).image
        said += sgt.answer(model, image.to(model.word.device), [i.text for i in part], limit=5)
    return np.array([answer == item.truth for answer, item in zip(said, items)])

def by_kind(items, hits):
    """Percent of hits by kind, their average and, for questions, each level's."""
    kinds, hits = np.array([item.kind for item in items]), 100.0 * np.array(hits)
    score = {kind: hits[kinds == kind].mean() for kind in dict.fromkeys(kinds.tolist())}
    levels = {"average": score}
    if REASONING <= set(score):
        levels |= {"perception": set(score) - REASONING, "reasoning": REASONING}
    return score | {name: fmean(map(score.get, part)) for name, part in levels.items()}

def question_only(cfg, items):
    """Hits without the picture: the commonest training answer to the question."""
    answers = defaultdict(Counter)  # to a text, or to all of a kind
    for scene in sgt.sample(cfg, "train", range(4000), "questions"):
        for kind in QUESTIONS:
            if asked := question(cfg, kind, scene):
                answers[asked[0]][asked[1]] += 1
                answers[kind][asked[1]] += 1
    return [i.truth == (answers.get(i.text) or answers[i.kind]).most_common(1)[0][0] for i in items]

GENEVAL = ("single", "two", "counting", "colors", "position", "attribution")

def prompt(cfg, kind, scene):
    text = sgt.captions(scene.things, scene.rng("prompt"), cfg.image_size).get(kind)
    return text and (text,)

def satisfied(item, found):
    """GenEval's rules: all that is asked for is there; counts are exact; some pair lies right."""
    wanted, shapes = item.scene.things, [o.shape for o in found]
    if item.kind == "counting":
        return shapes.count(wanted[0].shape) == len(wanted)
    if item.kind in ("colors", "attribution"):
        return set(map(sgt.noun, wanted)) <= set(map(sgt.noun, found))
    if item.kind == "position":
        return any(item.text == f"a {a.shape} {sgt.relation(a, b)} a {b.shape}"
                   for a, b in itertools.permutations(found, 2))
    return {o.shape for o in wanted} <= set(shapes)

def pictures_score(items, images):
    return by_kind(items, list(map(satisfied, items, judge(images))))

# ==== 4. Inside the model: linear probes, the two looks
def probe(x, y):
    """Ridge regression of y (n,) on the first half of x (n, D): percent right on the second."""
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / (x[:half].std(0) + 1e-6)
    x = F.pad(x, (0, 1), value=1.0).double()
    penalty = 0.01 * half * torch.eye(x.shape[1]).double()
    target = x[:half].T @ F.one_hot(y[:half]).double()
    weight = torch.linalg.solve(x[:half].T @ x[:half] + penalty, target)
    return 100 * float(((x[half:] @ weight).argmax(1) == y[half:]).double().mean())

@torch.no_grad()
def inside(cfg, model, n=600):
    """In %, behind the encoder and the last block: a linear probe for the shape in textured
    patches, the cosine of a scene's centred features, plain and textured. By block: attention
    to the object asked about, beside an even share."""
    scenes = [val_scenes(cfg, n, look) for look in LOOKS[:2]]
    looks, U, device = [sgt.render(cfg, each) for each in scenes], cfg.patches, model.word.device
    cover = F.one_hot(looks[1].instance, MAX_OBJECTS + 1).float().permute(0, 3, 1, 2)
    cover = F.avg_pool2d(cover, cfg.see_patch).flatten(2)  # (B, 1 + M, U)
    amount, index = cover[:, 1:].max(1)
    seen, found = amount > 0.05, {}  # seen: patches with an object
    shape = sgt.pad([[SHAPES.index(o.shape) for o in s.things] for s in scenes[1]], MAX_OBJECTS)
    shape = shape.gather(1, index)[seen]
    last = lambda x: sgt.prefill(model, x, x.new_zeros(n, 1).long(), 0)[0][:, :U]
    for behind, see in ("encoder", model.see), ("last block", last):  # each (B, U, D)
        features = [see(look.image.to(device)).float().cpu() for look in looks]
        cosine = F.cosine_similarity(*(x - x.mean((0, 1)) for x in features), -1).mean()
        found[f"cosine of looks, {behind}"] = 100 * float(cosine)
        found[f"probe for shape, {behind}"] = probe(features[1][seen], shape)
    # a spy in the forward pass: where does the end of "where is the ring?" look?
    asked = [(row, o.index, sgt.encode(f"where is the {name}?")) for row in range(n)
             for o, name in sgt.named(scenes[1][row].things)[:1] if name == o.shape]
    row, thing, text = map(torch.tensor, zip(*asked))
    there = (cover[row, thing] > 0.05).float().to(device)  # (B, U)
    with mock.patch("sgt.attention", wraps=sgt.attention) as spy:
        model(looks[1].image[row].to(device), text.to(device), None)
    for block, ((q, k, v, sees), _) in enumerate(spy.call_args_list, 1):
        weight = attention_reference(q[:, :, -1:], k, v, sees[-1:])[1][:, :, 0, :U]
        weight = weight.float().sum(1)  # (B, U), of all heads
        share = (weight * there).sum() / weight.sum() / there.mean()
        found[f"attention to the object, block {block}"] = 100 * float(share)
    return found

# ==== 5. Report
LABELS = {arm: arm for arm in ("base", *PROXIES)} | {"none": "SFT", "instance": "SGT"}

def table(head, rows):
    """A Markdown table with aligned columns."""
    first, *others = (max(map(len, column)) for column in zip(head, *rows))
    form = f"| {{:{first}}} |" + "".join(f" {{:>{width}}} |" for width in others)
    rule = f"|{'-' * (first + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in others)
    return "\n".join([form.format(*head), rule, *(form.format(*row) for row in rows)])

def markdown(report):
    """The tables of a report, and the sentences that the run is for."""
    models, n, out = report["models"], report["config"]["eval_questions"], []
    asked = f"{n:g} questions, % right, average ± {50 / math.sqrt(n):.1f} (standard error)"
    for part, beside, title in [
        *((look, "question only", f"Understanding of {look} scenes: {asked}") for look in LOOKS),
        ("generation", "ceiling", "Generation: % of pictures that show what was asked (ceiling: "
         "true ones, as codes and back)"),
        ("masks", "mask ceiling", "Masks: panoptic quality and average precision"),
        ("inside", "", "Inside, on textured scenes (attention: 100 is even)"),
    ]:
        columns = {beside: report[beside]} if beside else {}
        columns |= {LABELS[arm]: entry[part] for arm, entry in models.items() if part in entry}
        keys = next(iter(columns.values()))
        rows = [[key, *(f"{column[key]:.1f}" for column in columns.values())] for key in keys]
        out += [title, table(["", *columns], rows), ""]
    for (arm, entry), look in itertools.product(models.items(), LOOKS):
        if f"{look} - SFT" in entry:
            value, error = entry[f"{look} - SFT"]
            out.append(f"{LABELS[arm]} − SFT on {look} scenes: {value:+.1f} ± {error:.1f}")
    return "\n".join(out)

def read_report(run):
    """A report and its tables; whatever is missing shows in these."""
    def reader(path):
        report = json.loads(path.read_bytes())
        return report, markdown(report)
    return sgt.read(run.folder / "report.json", reader,
                    f"make one with: python eval.py {run.folder} --again")

def show(run):
    return (f"{read_report(run)[1]}\n\nPictures and curves: {run.folder / 'report.html'}\n"
            f"Pictures to ask about: python eval.py {run.folder} --export scenes")

def evaluate(run, device):
    """Measure every model of a run; write samples/, report.md, .html, .json."""
    cfg, tokenizer, _, _ = sgt.load_run(run, "base", device)
    items = collect(cfg, QUESTIONS, cfg.eval_questions, "questions", question)
    drawn_of = collect(cfg, GENEVAL, cfg.eval_prompts, "captions", prompt)
    texts = [item.text for item in drawn_of]
    true = sgt.render(cfg, [item.scene for item in drawn_of]).image
    round_trip = tokenizer.decode(tokenizer.encode(true.to(device)))
    report = {"config": vars(cfg), "device": str(device), "torch": torch.__version__,
              "question only": by_kind(items, question_only(cfg, items)),
              "ceiling": pictures_score(drawn_of, round_trip),
              "mask ceiling": segmentation(cfg, None, tokenizer), "models": {}}
    # three scenes in all looks, their masks, what each model draws and says
    shown = val_scenes(cfg, 3, *LOOKS)
    seen, _, target = sgt.draw_proxy(cfg, "instance", shown)
    wonder = [f"how many {sgt.plural(scene.things[0].shape)}?" for scene in shown]
    masks, free, hits = [("picture", seen, wonder), ("true masks", target, None)], [], {}
    for arm in tqdm(["base", *cfg.arms], "measuring"):
        model = sgt.load_run(run, arm, device)[2]
        hits[arm] = {look: right(model, items, look) for look in LOOKS}
        drawn = torch.cat([sgt.generate(model, tokenizer, texts[i:i + 100], seed=i)
                           for i in range(0, len(texts), 100)])
        entry = report["models"][arm] = {
            **{look: by_kind(items, each) for look, each in hits[arm].items()},
            "generation": pictures_score(drawn_of, drawn), "inside": inside(cfg, model)}
        if arm in ("instance", "shuffled"):
            entry["masks"] = segmentation(cfg, model, tokenizer)
        proxy = arm if arm in PROXIES and PROXIES[arm].target else "instance"
        source, ordered, _ = sgt.draw_proxy(cfg, proxy, shown)
        picture = sgt.generate(model, tokenizer, ordered, source.to(device))
        said = sgt.answer(model, seen.to(device), wonder)
        masks.append((f"{LABELS[arm]}: draws, says", picture, said))
        few = [i * len(texts) // 8 for i in range(8)]
        free.append((f"{LABELS[arm]}: of a text", drawn[few], [texts[i] for i in few]))
    arms = set(hits) - {"base", "none"} if "none" in hits else ()
    for arm, look in itertools.product(arms, LOOKS):
        d = 100.0 * hits[arm][look] - 100.0 * hits["none"][look]
        report["models"][arm][f"{look} - SFT"] = [d.mean(), d.std() / len(d) ** 0.5]
    run.write("samples/comparison.png", sgt.picture_grid(masks))
    run.write("samples/prompts.png", sgt.picture_grid(free))
    run.write("report.md", markdown(report) + "\n")
    run.write("report.html", page(run, report))
    run.write("report.json", json.dumps(report, indent=1))  # last: if cut off, again

STYLE = "body{font:15px sans-serif;margin:2rem}img{max-width:100%}svg{width:24rem;font-size:11px}"

def curve(title, lines):
    """The losses of a stage as an SVG line chart."""
    names = [name for name in lines[0] if name not in ("stage", "step", "seconds")]
    last, top = lines[-1]["step"] or 1, max(min(line[name], 8) for line in lines for name in names)
    svg = (f'<svg viewBox="0 0 400 {170 + 14 * len(names)}"><text x="30" y="12">{title}, 0 to '
           f'{top:.2g}</text><path d="M30,20V160H390" fill="none" stroke="#999"/>')
    for i, (name, ink) in enumerate(zip(names, ("#c0392b", "#2471a3", "#1e8449", "#b7950b"))):
        points = " ".join(f"{30 + 360 * line['step'] / last:.0f},"
                          f"{160 - 140 * min(line[name], 8) / top:.1f}" for line in lines)
        svg += (f'<polyline points="{points}" fill="none" stroke="{ink}"/>'
                f'<text x="30" y="{176 + 14 * i}" fill="{ink}">{name}</text>')
    return svg + "</svg>"

def page(run, report):
    """report.html: tables, pictures and curves in one file."""
    title = html.escape(f"{run.folder.name}, seed {report['config']['seed']}")
    out = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
           f"<h1>{title}, torch {report['torch']}</h1><pre>{html.escape(markdown(report))}</pre>"]
    for name in ("comparison", "prompts"):
        data = base64.b64encode((run.folder / f"samples/{name}.png").read_bytes()).decode()
        out.append(f'<p><img alt="{name}" src="data:image/png;base64,{data}">')
    for stage, part in itertools.groupby(run.log(), lambda line: line["stage"]):
        out.append(curve(f"loss of {LABELS.get(stage, stage)}", list(part)))
    return "\n".join(out)

# ==== 6. Speed
def speed(cfg, device):
    """Time drawing and a step of SGT as they run, and then with one means less each time."""
    tokenizer, model = sgt.VisionTokenizer(cfg).to(device), sgt.UnifiedModel(cfg).to(device)
    batch = tree_map_only(torch.Tensor, lambda x: x.to(device), sgt.make_batch(cfg, "instance", 0))
    optimizer, rate = kernels.Optimizer(model, 0.0, 0.0), torch.ones((), device=device)
    update, fast = kernels.GraphedStep(sgt.train_step), kernels.compiled(sgt.Block.forward)
    jobs = {f"draw {n}": functools.partial(sgt.generate, model, tokenizer, ["a ring"] * n)
            for n in (1, 64)}
    jobs["SGT step"] = functools.partial(update, model, tokenizer, optimizer, batch, rate)
    ways = {"CUDA graph": (fast, dict(GRAPHS=True)), "compiled": (fast, dict(GRAPHS=False)),
            "eager": (None, dict(GRAPHS=False)),
            "eager fp32 SDPA": (None, dict(GRAPHS=False, BF16=False, CHOSEN="sdpa"))}
    if device.type == "cpu":
        del ways["CUDA graph"]
    def run(job, fast, settings):
        with mock.patch.object(sgt.Block, "fast", fast), mock.patch.multiple(kernels, **settings):
            job()
    with FlopCounterMode(display=False) as counter:
        run(jobs["SGT step"], *ways["eager"])
    print(f"{device.type}; {counter.get_total_flops() / 1e9:.1f} GFLOP a step")
    for title, job in jobs.items():
        kernels.compare(title, {name: functools.partial(run, job, *way)
                                for name, way in ways.items()}, turns=3)

# ==== 7. Commands
def merged(parts, of=fmean):
    """Reports of several seeds as one: means, or another function, of the numbers that all hold."""
    if not isinstance(parts[0], dict):
        return of(parts) if isinstance(parts[0], (int, float)) else parts[0]
    return {key: merged([part[key] for part in parts], of) for key in parts[0]
            if all(key in part for part in parts) and "- SFT" not in key}

def spread(values):
    return f"{mean(values):.1f} ± {stdev(values) / len(values) ** 0.5:.1f}"

def study(reports):
    """Arms over seeds: means ± standard errors, and each seed's difference to SFT."""
    free = dict.fromkeys(["seed", "proxies", *sgt.FREE])
    recipes = {sgt.Config(**r["config"] | free) for r in reports}  # a setting may be new
    seeds = [r["config"]["seed"] for r in reports]
    if len(recipes) > 1 or len(set(seeds)) < len(seeds):
        raise UserError("these runs differ in more than seeds, or share one; name others")
    columns = {"perception": ("textured", "perception"), "reasoning": ("textured", "reasoning"),
               **{look: (look, "average") for look in LOOKS},
               "position": ("generation", "position"), "generation": ("generation", "average"),
               "PQ": ("masks", "PQ, textured"), "cosine": ("inside", "cosine of looks, last block")}
    entries = [r["models"] | {"question only": dict.fromkeys(LOOKS, r["question only"])}
               for r in reports]
    arms, rows = merged(entries, spread), []
    for arm in filter(arms.get, ["question only", "base", *PROXIES]):
        row = [LABELS.get(arm, arm), PROXIES[arm].level if arm in PROXIES else ""]
        row += [arms[arm].get(part, {}).get(key, "") for part, key in columns.values()]
        each = [e[arm]["textured - SFT"][0] for e in entries if "textured - SFT" in e[arm]]
        rows.append([*row, " ".join(f"{difference:+.1f}" for difference in each)])
    return (f"{markdown(merged(reports))}\n\nAbove: means of seeds {', '.join(map(str, seeds))}. "
            "Below: ± standard error over them; perception, reasoning, PQ: textured scenes\n"
            + table(["arm", "level", *columns, "textured − SFT by seed"], rows))

def command(argv):
    p = sgt.Parser(prog="eval.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    p.add_argument("run", nargs="*", help="folders of runs, or names under runs/; default: newest")
    verb = p.add_mutually_exclusive_group()
    verb.add_argument("--again", action="store_true", help="measure again")
    verb.add_argument("--export", metavar="DIR", type=Path, help="write scenes, masks as COCO data")
    verb.add_argument("--speed", choices=sgt.PRESETS, nargs="?", const="tiny",
                      help="time training and drawing of a preset")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = p.parse_args(argv)
    device = sgt.choose_device(args.device)
    if args.speed and args.run:
        raise UserError("--speed takes a preset, no run; leave it out")
    if args.speed:
        return speed(sgt.Config(**sgt.PRESETS[args.speed]), device)
    runs = list(map(sgt.find_run, args.run or [None]))
    for run in runs:
        stages = ("tokenizer", "base", *run.config().arms)
        if missing := [stage for stage in stages if not run.has(f"{stage}.safetensors")]:
            raise UserError(f"{run.folder} lacks {', '.join(missing)}; go on with its --train")
    if args.export:
        if len(runs) > 1 or args.export.exists():
            raise UserError("--export takes one run and a new folder")
        cfg, tokenizer, model, name = sgt.load_run(runs[0], None, device)
        scores = segmentation(cfg, model, tokenizer, args.export)
        said = ", ".join(f"{key} {value:.1f}" for key, value in scores.items())
        return print(f"wrote scenes and masks by {LABELS[name]} to {args.export}: {said}")
    for run in runs:
        if args.again or not run.has("report.json"):
            evaluate(run, device)
    print(study([read_report(run)[0] for run in runs]) if len(runs) > 1 else show(runs[0]))

def main(argv=None):
    return sgt.main(argv, command)

if __name__ == "__main__":
    sys.exit(main())
