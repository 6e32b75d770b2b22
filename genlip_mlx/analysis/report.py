"""One page about one model and one data set: what it says, where it looks, how good its features are.

The one idea: a page is a list of sections, each a function from the material to HTML. A section that does not apply
raises the same one-line error that its command would print, and the page gives that line instead of it.
"""

from __future__ import annotations

import base64
import html
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np

from .. import __version__
from ..data.records import Record, RecordError
from ..data.sources import Source, open_source
from ..files import atomic_file
from ..generate import captions as generate
from ..info import ModelInfo
from ..model.genlip import GenLIP, VisionOnlyError
from ..processing.images import ImageError, list_images, open_image
from ..processing.processor import Processor
from ..processing.reader import ImageLike
from . import attention, readout
from .evaluation import answer, evaluate, first_records, questions
from .labelled import LabelledSet, open_labelled
from .picture import Picture, read_picture
from .probe import probe
from .zeroshot import Gallery, classify

CAPTIONS = 8  # pictures captioned
READOUTS = 2  # pictures read out patch by patch
ATTENDED = 16  # pictures that shares of attention are averaged over
PICTURE_PIXELS = 320  # longer side of a small picture
PAGE = "report.html"


class ReportError(ValueError):
    """Data of which no section could be made."""


@dataclass(frozen=True)
class Sample:
    """A picture to show, with the record it comes from where it has a caption."""

    name: str
    image: ImageLike
    record: Record | None = None


@dataclass(frozen=True)
class Material:
    """What sections are made of.

    Args:
        data: captioned records, or pictures; see `open_source`.
        labelled: where labels are; see `open_labelled`.
        limit: records, and labelled pictures of each split, that are measured at most.
        templates: captions of classes, with {} for the name.
    """

    info: ModelInfo
    model: GenLIP
    processor: Processor
    data: str
    labelled: str
    label: str | None
    templates: Sequence[str]
    limit: int

    @cached_property
    def source(self) -> Source:
        """The first records of the data.

        Raises:
            SourceError, SceneError: if it is no set of records.
        """
        return first_records(open_source(self.data), self.limit)

    @cached_property
    def labels(self) -> LabelledSet:
        """The labelled set, each split cut to a random `limit` of its pictures.

        Raises:
            LabelledError, ImageError: if it has no labels.
        """
        whole = open_labelled(self.labelled, "classify", self.label)
        rng = np.random.default_rng(0)
        splits = {
            name: split.subset(np.sort(rng.permutation(len(split))[: self.limit]))
            for name, split in whole.splits.items()
        }
        return LabelledSet(whole.name, whole.task, whole.classes, splits, whole.notes)

    @cached_property
    def samples(self) -> list[Sample]:
        """Pictures to show: of records that have captions, else labelled ones, else whatever pictures there are.

        Raises:
            ReportError, ImageError: if there is none.
        """
        found = [Sample(record.picture, record.image, record) for record in self._records()]
        if found:
            return found
        try:
            test = self.labels.splits["test"]
        except (ValueError, OSError):
            if "://" not in self.data and not Path(self.data).expanduser().exists():
                raise ReportError(self._why_no_records()) from None
            return [Sample(name, name) for name in list_images([self.data])[:ATTENDED]]
        chosen = np.linspace(0, len(test) - 1, min(ATTENDED, len(test))).astype(int)
        return [Sample(test.names[i], test.picture(int(i))) for i in chosen]

    def pictures(self) -> Iterator[tuple[Sample, Picture]]:
        """The samples that can be read."""
        for sample in self.samples:
            try:
                yield sample, read_picture(self.processor.image_processor, sample.image, sample.name)
            except ImageError:
                continue

    def _why_no_records(self) -> str:
        try:
            return f"{self.source.name}: none of its first {self.limit} records can be used"
        except (ValueError, OSError) as error:
            return str(error)

    def _records(self) -> Iterator[Record]:
        """The first records that can be used; none if the data is no set of records."""
        try:
            source = self.source
        except (ValueError, OSError):
            return
        found = 0
        for number in range(len(source)):
            try:
                record = source[number]
            except RecordError:
                continue
            yield record
            found += 1
            if found == ATTENDED:
                return


# --- HTML ---


def text(value: object) -> str:
    """Any value, safe between tags and in quoted attributes."""
    return html.escape(str(value))


def table(header: Sequence[str], rows: Sequence[Sequence[object]], words: int = 1) -> str:
    """A table whose first `words` columns are text and the others numbers, aligned to the right."""

    def row(tag: str, cells: Sequence[object]) -> str:
        kinds = ["" if i < words else ' class="number"' for i in range(len(cells))]
        return f"<tr>{''.join(f'<{tag}{kind}>{text(cell)}</{tag}>' for kind, cell in zip(kinds, cells))}</tr>"

    body = "\n".join(row("td", cells) for cells in rows)
    head = f"<thead>{row('th', header)}</thead>\n" if header else ""
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>\n'


def picture(content: bytes, kind: str, description: str) -> str:
    """An image within the page itself."""
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{text(description)}">'


def figure(draw: Callable[[Path], None], description: str) -> str:
    """What a drawing function writes to a .png file, with its description below.

    Raises:
        ValueError: if matplotlib is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        content = path.read_bytes()
    return f"<figure>{picture(content, 'png', description)}<figcaption>{text(description)}</figcaption></figure>\n"


def small(image: ImageLike, name: str) -> str:
    """A picture, small."""
    opened = open_image(image, name).copy()
    opened.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    opened.save(buffer, "JPEG", quality=88)
    return picture(buffer.getvalue(), "jpeg", name)


# --- Sections ---


def facts(material: Material) -> str:
    """The model card's numbers."""
    info = material.info
    config, tokens = info.config, info.image_tokens
    what = f"{tokens.min_tokens} to {tokens.max_tokens}" if tokens.native else f"{tokens.max_tokens}"
    rows: list[tuple[str, str]] = [
        ("blocks", f"{config.num_hidden_layers}, hidden size {config.hidden_size}"),
        ("attention", f"{config.num_attention_heads} heads of {config.head_dim}, {_gate(config.gated_attention)}"),
        ("feed-forward", f"{'SwiGLU' if config.use_swiglu_ffn else 'MLP'}, width {config.intermediate_size}"),
        ("picture", f"{what} tokens of {tokens.patch_size} x {tokens.patch_size} pixels"),
        ("text", "none: vision-only" if config.vision_only else f"vocabulary of {config.vocab_size:,} tokens"),
        ("weights", info.dtype if info.quantized is None else f"{info.quantized.bits_per_weight:.2f} bits a weight"),
        ("on disk", f"{info.disk_bytes / 1e6:,.1f} MB"),
    ]
    parts = [(part.name.replace("_", " "), f"{part.parameters:,}") for part in info.parts if part.parameters]
    return table((), rows, words=2) + table(("part", "parameters"), parts)


def _gate(gated: bool) -> str:
    return "gated" if gated else "no gate"


def loss(material: Material) -> str:
    """How well it foretells the captions of the data."""
    found = evaluate(material.model, material.processor, material.source)
    rows: list[tuple[str, object]] = [
        ("loss, nats a label token", f"{found.nll:.4f}"),
        ("perplexity", f"{found.perplexity:,.3f}"),
        ("label tokens", f"{found.label_tokens:,}"),
        ("records", f"{found.samples:,}"),
        *((f"skipped: {reason}", f"{number:,}") for reason, number in found.skipped.items()),
    ]
    return table((), rows)


def captions(material: Material) -> str:
    """What it says of some pictures, greedily, beside what the data says."""
    if material.model.config.vision_only:
        raise VisionOnlyError
    shown: list[tuple[str, ImageLike, str, str, Sequence[str]]] = []
    try:
        source = material.source
        asked = questions(source, material.processor, CAPTIONS)
    except (ValueError, OSError):  # pictures without captions
        samples = material.samples[:CAPTIONS]
        said = generate(material.model, material.processor, [sample.image for sample in samples])
        for sample, one in zip(samples, said):
            if one.caption is not None:
                shown.append((sample.name, sample.image, one.prompt, one.caption, ()))
    else:
        for found in answer(material.model, material.processor, source, asked):
            question = found.question
            picture: ImageLike = source[question.record].image
            shown.append((question.name, picture, question.prompt, found.caption, question.references))
    if not shown:
        raise ReportError(f"{material.data}: none of its first pictures can be read")
    cards = []
    for name, image, prompt, caption, references in shown:
        lines = [("asked", prompt)] if prompt else []
        lines += [("model", caption), *(("data", reference) for reference in references)]
        words = "".join(f"<dt>{text(who)}</dt><dd>{text(what)}</dd>" for who, what in lines)
        cards.append(f'<div class="card">{small(image, name)}<p class="name">{text(name)}</p><dl>{words}</dl></div>')
    return f'<div class="cards">\n{chr(10).join(cards)}\n</div>\n'


def patches(material: Material) -> str:
    """What each patch would say."""
    tokenizer = material.processor.tokenizer
    if tokenizer is None:
        raise VisionOnlyError
    parts = []
    for sample, seen in islice(material.pictures(), READOUTS):
        result = readout.readout(material.model, seen.patches, seen.grid)
        tokens = readout.drawn_tokens(tokenizer, result)
        draw = partial(readout.draw, picture=seen, tokens=tokens)
        parts.append(figure(draw, f"Tokens of the patches of {sample.name}"))
    if not parts:
        raise ReportError(f"{material.data}: none of its first pictures can be read")
    return "".join(parts)


def looks(material: Material) -> str:
    """Where attention goes, block by block."""
    model, processor = material.model, material.processor
    blocks = attention.spread(model)
    found, first = [], None
    for sample, seen in material.pictures():
        if sample.record is not None:
            ids = sample.record.text(processor).input_ids.tolist()
        else:
            ids, _ = attention.own_words(model, processor, seen)
        shares, maps = attention.look(model, seen.patches, seen.grid, ids, () if first else blocks)
        found.append(shares)
        first = first or (seen, maps)
    if first is None:
        raise ReportError(f"{material.data}: none of its first pictures can be read")
    mean = attention.mean_allocation(found)
    drawn = attention.Drawn("model", mean, *first)
    columns = [mean.vision_to_first, mean.text_to_first, mean.text_to_vision]
    header = ["block", "vision to first", "text to first", "text to vision"]
    if mean.gate_mean is not None and mean.gate_closed is not None:
        columns += [mean.gate_mean, mean.gate_closed]
        header += ["gate, mean", f"gate under {attention.CLOSED:.0%}"]
    rows = [[i, *(f"{column[i - 1]:.2%}" for column in columns)] for i in range(1, len(columns[0]) + 1)]
    told = f"Shares of attention, means over heads and {mean.samples} pictures; maps of {first[0].name}"
    even = f"<p>If a patch gave all patches the same, the first would get {mean.even:.2%}.</p>\n"
    return figure(lambda path: attention.draw(path, [drawn]), told) + table(header, rows) + even


def probes(material: Material) -> str:
    """How good the frozen features are."""
    found = probe(material.model, material.processor, material.labels)
    rows = [
        (
            f"{result.probe} probe",
            result.chosen.layer,
            f"{result.chosen.validation:.1%}",
            f"{result.test:.1%}",
            f"{result.interval[0]:.1%} to {result.interval[1]:.1%}",
        )
        for result in found.results
    ]
    used = ", ".join(f"{number} {split}" for split, number in found.pictures.items())
    header = ("probe", "layer", "validation accuracy", "test accuracy", "95 % interval")
    return f"<p>{len(found.classes)} classes; pictures: {text(used)}.</p>\n" + table(header, rows, words=2)


def zeroshot(material: Material) -> str:
    """How often the class whose caption is likeliest is the right one."""
    if material.model.config.vision_only:
        raise VisionOnlyError
    test = material.labels.splits["test"]
    names = {label: label.replace("_", " ") for label in material.labels.classes}
    pictures = Gallery(test.names, [material.labels.classes[number] for number in test.labels], test.picture)
    result = classify(material.model, material.processor, pictures, names, material.templates)
    accuracy = result.accuracy()
    if accuracy is None:
        raise ReportError(f"{material.labelled}: none of its pictures can be used")
    counts = result.by_class()
    rows = [(label, n, f"{right / n:.1%}") for label, (n, right) in counts.items()]
    rows.append(("all classes", sum(n for n, _ in counts.values()), f"{accuracy:.1%}"))
    listed = ", ".join(f"“{template}”" for template in material.templates)
    told = f"The class is the one with the likeliest caption, of {len(names)}; by chance {1 / len(names):.1%}."
    return f"<p>{told} Captions: {text(listed)}.</p>\n" + table(("class", "pictures", "correct"), rows)


SECTIONS: Mapping[str, Callable[[Material], str]] = {
    "Model": facts,
    "Loss": loss,
    "Captions": captions,
    "What each patch says": patches,
    "Where attention goes": looks,
    "Probes": probes,
    "Zero-shot classification": zeroshot,
}

# --- The page ---

STYLE = """
:root { color-scheme: light dark;
  --ground: #ffffff; --ink: #1c1c1c; --faint: #5f5f5f; --line: #d4d4d4; --card: #f6f6f6 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17181a; --ink: #e8e8e8; --faint: #a5a5a5; --line: #3c3e42; --card: #212327 }
}
body { background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 }
main { max-width: 1200px; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.7rem; overflow-wrap: anywhere } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
.number { text-align: right } .scroll { overflow-x: auto }
figure { margin: 1rem 0 } figure img { max-width: 100%; background: #ffffff; border-radius: 6px }
figcaption, .name, .out, footer { color: var(--faint); font-size: .9rem; overflow-wrap: anywhere }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1rem }
.card { background: var(--card); border-radius: 6px; padding: .8rem } .card img { max-width: 100%; border-radius: 4px }
dl { margin: 0 } dt { color: var(--faint); font-size: .8rem } dd { margin: 0 0 .5rem; overflow-wrap: anywhere }
"""


def write_report(
    folder: str | Path,
    material: Material,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, str]:
    """Write `PAGE` into a folder, made if missing.

    Args:
        progress: called with (done, total) sections.

    Returns:
        the sections that were left out, with the reason of each.

    Raises:
        ReportError, ImageError: if there is no data, or it holds no picture.
        OSError: if the page cannot be written.
    """
    if next(material.pictures(), None) is None:
        raise ReportError(f"{material.data}: none of its first pictures can be read")
    parts: list[str] = []
    left_out: dict[str, str] = {}
    for number, (title, section) in enumerate(SECTIONS.items(), 1):
        try:
            body = section(material)
        except (ValueError, OSError) as error:
            left_out[title] = " ".join(str(error).split())
            body = f'<p class="out">Left out: {text(left_out[title])}.</p>\n'
        parts.append(f"<section>\n<h2>{text(title)}</h2>\n{body}</section>\n")
        progress(number, len(SECTIONS))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with atomic_file(path / PAGE, text=True) as file:
        file.write(_page(material, "".join(parts)))
    return left_out


def _page(material: Material, body: str) -> str:
    name = text(material.info.folder)
    sets = dict.fromkeys([material.data, material.labelled])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>GenLIP report: {name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>GenLIP report: {name}</h1>
<p>Data: {text(" and ".join(sets))}; at most {material.limit:,} records, and pictures of a
labelled split, are measured.</p>
{body}<footer>Made by genlip-mlx {text(__version__)}.</footer>
</main>
</body>
</html>
"""
