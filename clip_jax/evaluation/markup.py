"""Pieces of HTML for a page that needs nothing but itself: escaped text, cells, pictures as data, one style."""

import base64
import html
import math

from clip_jax.evaluation.pictures import MODELS, RIGHT, WRONG, Thumbnail

LONGEST = 160  # characters of a text that are shown
NOTHING = '<td class="n">–</td>'


def text(words: str, most: int = LONGEST) -> str:
    """Returns a text of somebody else's, which is never markup, on one line, its end cut off where it is long."""
    words = " ".join(words.encode("utf-8", "replace").decode().split())
    return html.escape(words if len(words) <= most else words[: most - 1] + "…")


def chip(letter: str, name: str = "") -> str:
    """Returns the mark of one model of two; of a model that is alone nothing."""
    return f'<span class="chip {letter.lower()}" title="{text(name)}">{letter}</span>' if letter else ""


def table(head: str, rows: list[str]) -> str:
    """Returns a table, which on a narrow screen is moved alone; `head` and `rows` are cells."""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def number(value: float | None) -> str:
    """Returns the cell of a share in per cent; of none, or one that is not defined, a dash."""
    return NOTHING if value is None or not math.isfinite(value) else f'<td class="n">{100 * value:.1f}</td>'


def difference(first: float | None, second: float | None) -> str:
    """Returns the cell that says how much more the second share is, in points, coloured."""
    if first is None or second is None or not math.isfinite(second - first):
        return NOTHING
    points = round(100 * (second - first), 1)
    sign = "up" if points > 0 else "down" if points < 0 else "same"
    said = "±0.0" if sign == "same" else f"{points:+.1f}".replace("-", "−")
    return f'<td class="n d {sign}">{said}</td>'


def bar(value: float, letter: str) -> str:
    """Returns the cell of a share, drawn."""
    share = f"{100 * value:.1f}"
    return f'<td class="n bar {letter.lower() or "a"}" style="--w:{share}%">{share}</td>'


def picture(data: bytes, words: str, *, format: str = "png", kind: str = "") -> str:
    """Returns an image that is in the page itself."""
    inside = base64.b64encode(data).decode()
    return f'<img class="{kind}" alt="{text(words)}" src="data:image/{format};base64,{inside}">'


def small(image: Thumbnail | str, words: str) -> str:
    """Returns a thumbnail, or why there is none."""
    if isinstance(image, str):
        return f'<div class="gone">{text(image)}</div>'
    kind = "thumb pixels" if image.format == "png" else "thumb"
    return picture(image.data, words, format=image.format, kind=kind)


def framed(image: str, caption: str = "", right: bool | None = None) -> str:
    """Returns an image with its caption; a frame says whether it is right."""
    frame = {None: "", True: "right", False: "wrong"}[right]
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{frame}">{image}{below}</figure>'


def document(title: str, body: str) -> str:
    """Returns the whole page."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE = f"""
:root {{ color-scheme: light; --a: {MODELS["A"]}; --b: {MODELS["B"]}; --right: {RIGHT}; --wrong: {WRONG};
  --line: #e3e5e8; --soft: #5d6570; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: #1d2126; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 5rem; }}
h1 {{ font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; letter-spacing: -0.01em; }}
h2 {{ font-size: 1.3rem; line-height: 1.3; margin: 0; overflow-wrap: anywhere; }}
h3 {{ font-size: 1rem; margin: 2.25rem 0 0.6rem; }}
h4 {{ font-size: 0.95rem; font-weight: 600; margin: 0.25rem 0 0.6rem; }}
p {{ margin: 0.3rem 0 0.7rem; max-width: 46rem; }}
section {{ border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1.75rem; }}
a {{ color: inherit; text-decoration-color: #b6bcc4; text-underline-offset: 3px; }}
.soft, figcaption {{ color: var(--soft); font-size: 0.875rem; }}
.models p {{ margin: 0.25rem 0; overflow-wrap: anywhere; }}
.chip {{ display: inline-block; min-width: 1.5em; padding: 0 0.4em; border-radius: 4px; color: #fff; font-weight: 600;
  font-size: 0.8rem; line-height: 1.5; text-align: center; background: var(--a); }}
.chip.b {{ background: var(--b); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.32rem 0.7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: baseline; }}
thead th {{ font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom; }}
tbody th {{ font-weight: 500; min-width: 11rem; max-width: 20rem; overflow-wrap: anywhere; }}
th.group {{ padding-top: 1.2rem; color: var(--soft); font-weight: 600; }}
.n {{ text-align: right; white-space: nowrap; }}
.d:not(:last-child) {{ border-right: 1px solid var(--line); }}
.up {{ color: var(--right); }} .down {{ color: var(--wrong); }} .same {{ color: var(--soft); }}
.bar {{ min-width: 7.5rem; --tint: color-mix(in srgb, var(--a) 24%, white);
  background: linear-gradient(90deg, var(--tint) var(--w), #f5f6f7 var(--w)) content-box; }}
.bar.b {{ --tint: color-mix(in srgb, var(--b) 24%, white); }}
.taken {{ color: var(--soft); min-width: 9rem; max-width: 16rem; overflow-wrap: anywhere; }}
.pair {{ display: grid; gap: 1.5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
.stack {{ display: grid; gap: 1.5rem; }}
.thumbs {{ display: grid; gap: 0.9rem 0.7rem; grid-template-columns: repeat(auto-fill, minmax(6.75rem, 1fr)); }}
.row {{ display: grid; gap: 0.5rem; grid-template-columns: repeat(auto-fill, minmax(5.25rem, 1fr)); margin: 0.4rem 0; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ line-height: 1.35; margin-top: 0.3rem; overflow-wrap: anywhere; }}
figcaption b {{ color: #1d2126; font-weight: 600; }}
img {{ max-width: 100%; height: auto; display: block; }}
.thumb {{ width: 100%; aspect-ratio: 1; object-fit: contain; background: #f5f6f7; border-radius: 3px; }}
.pixels {{ image-rendering: pixelated; }}
.right .thumb, .wrong .thumb {{ border: 3px solid var(--right); }} .wrong .thumb {{ border-color: var(--wrong); }}
.gone {{ aspect-ratio: 1; padding: 0.5rem; background: #f5f6f7; color: var(--soft); font-size: 0.75rem;
  overflow: hidden; }}
.example {{ margin: 0 0 1.3rem; }} .example > p {{ margin-bottom: 0.2rem; }}
.labelled {{ display: flex; gap: 0.6rem; align-items: flex-start; }} .labelled .chip {{ margin-top: 0.4rem; }}
.labelled .row {{ flex: 1; }}
details > summary {{ cursor: pointer; font-weight: 600; margin: 2.25rem 0 0.6rem; }}
@media (max-width: 40rem) {{ main {{ padding: 1.25rem 0.9rem 3rem; }} h1 {{ font-size: 1.45rem; }}
  th, td {{ padding: 0.3rem 0.45rem; }} .bar {{ min-width: 5.5rem; }} tbody th {{ min-width: 7rem; }}
  .row {{ grid-template-columns: repeat(auto-fill, minmax(3.6rem, 1fr)); }} }}
@media print {{ section {{ break-before: page; }} .wide {{ overflow: visible; }} }}
"""
