"""One page of what was found out: the numbers of one model, or of two side by side, and the images behind them.

The page is one file that needs no other, and no network: it can be sent, or put beside a paper.
"""

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax.data.sources import Source
from clip_jax.evaluation import breakdown, markup, pictures
from clip_jax.evaluation.breakdown import PerClass
from clip_jax.evaluation.markup import chip, difference, number, table, text
from clip_jax.evaluation.run import SHARES, Done, in_words
from clip_jax.evaluation.tasks import Retrieved
from clip_jax.evaluation.zero_shot import Predictions
from clip_jax.files import AnyPath, write_text
from clip_jax.typing import Int

ALL_CLASSES = 50  # with more classes only some are shown:
WORST, BEST, APART = 20, 10, 20
PICTURES = 12  # mistakes of each kind that are shown
SIDE_BY_SIDE = 12  # classes up to which two confusion matrices are
OPEN = 20  # classes up to which they are shown without being asked for
APART_HEAD = '<th class="n d">B − A</th>'
OF_IMAGES, OF_TEXTS = "image_retrieval_recall@", "text_retrieval_recall@"  # what metrics begin with


class Shown(NamedTuple):
    """An evaluation of a model, which is told by its letter where there are two."""

    letter: str
    done: Done

    @property
    def name(self) -> str:
        return self.done.written["pretrained"]

    @property
    def chip(self) -> str:
        return chip(self.letter, self.name)

    @property
    def metrics(self) -> dict[str, float]:
        return self.done.written["metrics"]


def write(folder: AnyPath, done: Sequence[Done]) -> AnyPath:
    """Returns FOLDER/index.html, a page of all evaluations of a model, or of two that were evaluated alike.

    Raises:
        UserError: it cannot be written.
    """
    models = _by_model(done)
    assert 0 < len(models) < 3, "one model, or two"
    assert len({tuple(one.done.evaluation.name for one in model) for model in models}) == 1, "evaluated alike"
    together = list(zip(*models, strict=True))
    parts = [_header(together[0]), _overview(together)]
    parts += [_section(f"e{i}", shown) for i, shown in enumerate(together)]
    file = folder / "index.html"
    names = " and ".join(one.name for one in together[0])
    write_text(file, markup.document(f"Evaluation of {names}", "\n".join(parts)))
    return file


def _by_model(done: Sequence[Done]) -> list[list[Shown]]:
    """Returns the evaluations of each model; one that is there twice is two."""
    seen, models = collections.Counter(), {}
    for one in done:
        known = one.written["pretrained"], one.evaluation.name
        models.setdefault((known[0], seen[known]), []).append(one)
        seen[known] += 1
    letters = [""] if len(models) == 1 else "AB"
    return [[Shown(letter, one) for one in model] for letter, model in zip(letters, models.values(), strict=False)]


def _header(models: Sequence[Shown]) -> str:
    said = (f"<p>{one.chip} <b>{text(one.name, 300)}</b> · {text(one.done.written['model'])}</p>" for one in models)
    return f'<header class="models"><h1>Evaluation</h1>{"".join(said)}</header>'


def _difference(values: Sequence[float | None]) -> str:
    """Returns the cell of how two values differ; nothing, where there is one."""
    return difference(*values) if len(values) == 2 else ""


def _overview(together: Sequence[Sequence[Shown]]) -> str:
    """Returns a table for every task: its data sets, and their metrics that are shares."""
    by_task = collections.defaultdict(list)
    for at, shown in enumerate(together):
        by_task[shown[0].done.evaluation.task].append((at, shown))
    parts = ["<section><h2>Overview</h2><p class='soft'>All numbers are per cent.</p>"]
    for task, several in by_task.items():
        names = [name for name in several[0][1][0].metrics if any(word in name for word in SHARES)]
        rows = [_named(f'<a href="#e{at}">{_data_set(shown)}</a>') + _cells(names, shown) for at, shown in several]
        if len(several) > 1:
            means = [{name: _mean(shown[i].metrics.get(name) for _, shown in several) for name in names}
                     for i in range(len(several[0][1]))]  # fmt: skip
            rows.append(_named("mean") + "".join(_values([mean[name] for mean in means]) for name in names))
        parts.append(f"<h3>{text(task)}</h3>{table(_head('data set', names, several[0][1]), rows)}")
    return "".join(parts) + "</section>"


def _named(words: str) -> str:
    return f'<th scope="row">{words}</th>'


def _data_set(shown: Sequence[Shown]) -> str:
    source = shown[0].done.evaluation.source
    return f"{text(source.name)}:{text(source.split)}"


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean, where all are defined."""
    values = list(values)
    return None if any(value is None or not math.isfinite(value) for value in values) else sum(values) / len(values)


def _values(values: Sequence[float | None]) -> str:
    return "".join(map(number, values)) + _difference(values)


def _cells(names: Sequence[str], shown: Sequence[Shown]) -> str:
    return "".join(_values([one.metrics.get(name) for one in shown]) for name in names)


def _head(first: str, names: Sequence[str], shown: Sequence[Shown]) -> str:
    """Returns the head of a table of metrics; of two models, each has three columns."""
    if len(shown) == 1:
        columns = "".join(f'<th class="n">{_broken(name)}</th>' for name in names)
        return f"<tr><th>{first}</th>{columns}</tr>"
    upper = "".join(f'<th colspan="3" class="n d">{_broken(name)}</th>' for name in names)
    lower = "".join(f'<th class="n">{one.chip}</th>' for one in shown) + APART_HEAD
    return f'<tr><th rowspan="2">{first}</th>{upper}</tr><tr>{lower * len(names)}</tr>'


def _broken(name: str) -> str:
    """Returns the name of a metric, which may go on in a second line."""
    return text(name).replace("_", "_<wbr>")


def _section(anchor: str, shown: Sequence[Shown]) -> str:
    """Returns what is known of a task on a data set."""
    task = shown[0].done.evaluation.task
    parts = [f'<section id="{anchor}"><h2>{_data_set(shown)} <span class="soft">{text(task)}</span></h2>']
    parts += [_notes(shown), _metrics(shown)]
    known = [one for one in shown if one.done.result is not None]
    if known:
        classifies = isinstance(known[0].done.result.found, Predictions)
        parts += [part(known) for part in (CLASSIFICATION if classifies else RETRIEVAL)]
    return "".join(parts) + "</section>"


def _notes(shown: Sequence[Shown]) -> str:
    """Returns how many images there were, what was left out, and what is not known any more."""
    notes = []
    for one in shown:
        written, source = one.done.written, one.done.evaluation.source
        words = [f"{written.get('evaluated', len(source)):,} images"]
        left_out = ", ".join(f"{words} {count:,}" for words, count in written.get("left_out", {}).items())
        words += [f"left out: {text(left_out, 600)}"] if left_out else []
        words += ["done before (--resume): only its metrics are known"] if one.done.result is None else []
        notes.append("; ".join(words))
    if len(set(notes)) == 1:
        return f'<p class="soft">{notes[0]}</p>'
    said = zip(shown, notes, strict=True)
    return "".join(f'<p class="soft">{one.chip} {note}</p>' for one, note in said)


def _metrics(shown: Sequence[Shown]) -> str:
    """Returns a table of all metrics; those of a retrieval by how many of the nearest count."""
    names = list(shown[0].metrics)
    ends = {name.rpartition("@")[2]: None for name in names if name.startswith(OF_IMAGES)}
    if ends:
        columns = {"a text's image": OF_IMAGES, "an image's text": OF_TEXTS}
        rows = [_named(f"{k}") + _cells([f"{way}{k}" for way in columns.values()], shown) for k in ends]
        return "<h3>Recall: found among the nearest</h3>" + table(_head("nearest", list(columns), shown), rows)
    rows = []
    for name in names:
        values = [one.metrics.get(name) for one in shown]
        if any(word in name for word in SHARES):
            rows.append(_named(text(name)) + _values(values))
        else:
            cells = "".join(f'<td class="n">{text(in_words(name, value))}</td>' for value in values)
            rows.append(_named(text(name)) + cells + (markup.NOTHING if len(shown) == 2 else ""))
    columns = "".join(f'<th class="n">{one.chip or "value"}</th>' for one in shown)
    head = f"<tr><th>metric</th>{columns}{APART_HEAD if len(shown) == 2 else ''}</tr>"
    return "<h3>Metrics</h3>" + table(head, rows)


def _calibration(known: Sequence[Shown]) -> str:
    curves, words = {}, []
    for one in known:
        found = one.done.result.found
        right = found.best[:, 0] == found.labels
        curves[one.letter] = curve = breakdown.calibration(found.confidence, right)
        words.append(
            f"<p>{one.chip} Expected calibration error: <b>{100 * curve.error:.1f} %</b>. It is "
            f"{100 * found.confidence.mean():.1f} % sure on average, and right in {100 * right.mean():.1f} %.</p>"
        )
    drawn = markup.picture(pictures.reliability(curves), "share that is right, by confidence")
    how = f"In {breakdown.BINS} bins of confidence; on the dotted line a model is as often right as it is sure."
    said = f'<div>{"".join(words)}<p class="soft">{how}</p></div>'
    return f'<h3>Calibration</h3><div class="pair">{drawn}{said}</div>'


def _classes(known: Sequence[Shown]) -> str:
    """Returns the accuracy of every class, or of some, worst first."""
    names = known[0].done.result.classnames
    of_each = [breakdown.per_class(one.done.result.found) for one in known]
    several = "".join(f'<th class="n">{one.chip} right, %</th><th>most often taken for</th>' for one in known)
    head = f'<tr><th>class</th><th class="n">images</th>{several}{APART_HEAD if len(known) == 2 else ""}</tr>'
    rows = []
    for heading, classes in _chosen(of_each):
        if heading:
            rows.append(f'<th colspan="{3 * len(known) + 2}" class="group">{heading}</th>')
        for c in classes.tolist():
            images = " / ".join(dict.fromkeys(f"{one.images[c]:,}" for one in of_each))
            cells = "".join(_class(one, c, names, shown.letter) for one, shown in zip(of_each, known, strict=True))
            both = _difference([float(one.share[c]) for one in of_each])
            rows.append(f'{_named(text(names[c], 60))}<td class="n">{images}</td>{cells}{both}')
    none = sum(int(c) for c in np.all([one.images == 0 for one in of_each], axis=0))
    said = f'<p class="soft">{none:,} of {len(names):,} classes have no image.</p>' if none else ""
    return f"<h3>Classes</h3>{said}{table(head, rows)}"


def _class(one: PerClass, c: int, names: Sequence[str], letter: str) -> str:
    """Returns the cells of a model's class."""
    if one.taken_for[c] < 0:
        return markup.bar(float(one.share[c]), letter) + '<td class="taken"></td>'
    share = 100 * one.times[c] / one.images[c]
    taken = f"{text(names[one.taken_for[c]], 60)}, {share:.1f}&nbsp;%"
    return markup.bar(float(one.share[c]), letter) + f'<td class="taken">{taken}</td>'


def _chosen(of_each: Sequence[PerClass]) -> list[tuple[str, Int[np.ndarray, " n"]]]:
    """Returns the classes that are shown, with a heading where they are not all; those without an image never are."""
    shares = np.stack([one.share for one in of_each])
    mean = shares.mean(axis=0)
    there = np.flatnonzero(np.isfinite(mean))
    order = there[np.argsort(mean[there], kind="stable")]
    if len(order) <= ALL_CLASSES:
        return [("", order)]
    groups = [(f"the {WORST} worst", order[:WORST]), (f"the {BEST} best", order[::-1][:BEST])]
    if len(of_each) == 2:
        apart = np.abs(shares[1] - shares[0])[there]
        groups.append((f"the {APART} that differ most", there[np.argsort(-apart, kind="stable")][:APART]))
    return groups


def _confusion(known: Sequence[Shown]) -> str:
    """Returns a picture for each model of what is taken for what, unless a class would have no pixel."""
    names, drawn = known[0].done.result.classnames, []
    if len(names) > pictures.DRAWN_CLASSES:
        return ""
    for one in known:
        found = one.done.result.found
        image = pictures.confusion_png(found.labels, found.best[:, 0], names)
        head = f"<h4>{one.chip}</h4>" if one.letter else ""
        drawn.append(f"<div>{head}{markup.picture(image, 'confusion matrix')}</div>")
    how = '<p class="soft">A row is a class, and says what its images were taken for.</p>'
    inside = f'{how}<div class="{"pair" if len(names) <= SIDE_BY_SIDE else "stack"}">{"".join(drawn)}</div>'
    opened = " open" if len(names) <= OPEN else ""
    return f"<details{opened}><summary>Confusion matrix</summary>{inside}</details>"


def _mistakes(known: Sequence[Shown]) -> str:
    """Returns the images that each model was surest of and wrong about."""
    names = known[0].done.result.classnames

    def of(one: Shown) -> str:
        found, source = one.done.result.found, one.done.evaluation.source
        figures = []
        for row in breakdown.mistakes(found, PICTURES).tolist():
            true, taken = (text(names[c], 60) for c in (found.labels[row], found.best[row, 0]))
            said = f"<b>{true}</b> taken for <b>{taken}</b>, {100 * found.confidence[row]:.1f}&nbsp;% sure"
            figures.append(markup.framed(_thumbnail(source, int(found.index[row]), true), said))
        return f'<div class="thumbs">{"".join(figures)}</div>' if figures else '<p class="soft">There is none.</p>'

    return f"<h3>The surest mistakes</h3>{_each(known, of)}"


def _each(known: Sequence[Shown], of: Callable[[Shown], str]) -> str:
    """Returns what there is of each model, side by side."""
    if len(known) == 1 and not known[0].letter:
        return of(known[0])
    inside = "".join(f"<div><h4>{one.chip} {text(one.name, 60)}</h4>{of(one)}</div>" for one in known)
    return f'<div class="pair">{inside}</div>'


def _thumbnail(source: Source, index: int, words: str) -> str:
    """Returns an image of a data set, or why it cannot be read any more."""
    return markup.small(pictures.thumbnail_of(source, index), words)


def _ranks(known: Sequence[Shown]) -> str:
    """Returns at which places the right ones are."""
    words = []
    for one in known:
        texts, images = (np.median(ranks) + 1 for ranks in one.done.result.found.ranks)
        found = one.done.result.found
        words.append(
            f"<p>{one.chip} Half of the {len(found.texts):,} texts have their image at place {texts:,.0f} or before, "
            f"and half of the {len(found.index):,} images one of their texts at {images:,.0f} or before.</p>"
        )
    drawn = pictures.rank_histogram({one.letter: one.done.result.found.ranks for one in known})
    return f"<h3>Places</h3>{''.join(words)}{markup.picture(drawn, 'places of the right ones')}"


def _examples(known: Sequence[Shown]) -> str:
    """Returns some captions and the images that each model has nearest to them."""
    by_caption = collections.defaultdict(list)
    for one in known:
        for match in one.done.result.matches:
            by_caption[match.caption].append((one, match))
    parts = []
    for caption, several in by_caption.items():
        rows = []
        for one, match in several:
            source = one.done.evaluation.source
            nearest = zip(match.images, match.right, strict=True)
            images = "".join(
                markup.framed(_thumbnail(source, index, "right" if right else "wrong"), right=right)
                for index, right in nearest
            )
            rows.append(f'<div class="labelled">{one.chip}<div class="row">{images}</div></div>')
        parts.append(f'<div class="example"><p dir="auto">{text(caption, 300)}</p>{"".join(rows)}</div>')
    how = '<p class="soft">The nearest images, best first. The right one has a green frame.</p>'
    return f"<h3>Examples</h3>{how}{''.join(parts)}" if parts else ""


def _failures(known: Sequence[Shown]) -> str:
    """Returns the texts whose own image has the most others before it, with that image."""

    def of(one: Shown) -> str:
        found, source = one.done.result.found, one.done.evaluation.source
        figures = []
        for t in worst(found, PICTURES).tolist():
            place = f"<b>place {found.ranks.images[t] + 1:,}</b> of {len(found.index):,}"
            said = f'{place}<br><span dir="auto">{text(found.texts[t], 90)}</span>'
            image = int(found.index[found.image_of_text[t]])
            figures.append(markup.framed(_thumbnail(source, image, found.texts[t]), said))
        return f'<div class="thumbs">{"".join(figures)}</div>' if figures else '<p class="soft">There is none.</p>'

    how = '<p class="soft">Texts, and the image each belongs to, which comes late among the nearest.</p>'
    return f"<h3>The worst failures</h3>{how}{_each(known, of)}"


def worst(found: Retrieved, most: int) -> Int[np.ndarray, " n"]:
    """Returns the texts that have the most images before their own, of equals the first; never those that have none."""
    order = np.argsort(-found.ranks.images.astype(np.int64), kind="stable")[:most]
    return order[found.ranks.images[order] > 0]


CLASSIFICATION = (_calibration, _classes, _mistakes, _confusion)
RETRIEVAL = (_ranks, _examples, _failures)
