"""A self-contained page: figures in cards, light and dark, from a phone to a wide screen; no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from promoe_ds.analysis.drawing.scene import THEMES, Scene

_CSS = """
*{box-sizing:border-box}
:root{color-scheme:light dark;%(light)s}
@media (prefers-color-scheme:dark){:root{%(dark)s}}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1640px;margin:0 auto;padding:20px clamp(12px,2.5vw,36px) 48px}
h1{font-size:clamp(22px,3vw,30px);line-height:1.2;margin:6px 0 4px;letter-spacing:-.01em}
h2{font-size:19px;margin:36px 0 10px;letter-spacing:-.005em}
p{margin:4px 0;max-width:90ch}.muted,figcaption small{color:var(--muted)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:10px 0 0;font-size:14px}a{color:var(--under);text-decoration:none}
a:hover{text-decoration:underline}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,158px),1fr));gap:10px;margin:18px 0 12px}
.stat{background:var(--card);border:1px solid var(--grid);border-top:3px solid var(--grid);border-radius:10px;padding:10px 13px}
.stat.good{border-top-color:var(--good)}.stat.warn{border-top-color:var(--warn)}.stat.bad{border-top-color:var(--bad)}
.stat b{display:block;font-size:24px;line-height:1.25;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.stat span{font-size:13px;color:var(--muted)}.stat em{font-style:normal;font-size:13px}
.found{list-style:none;margin:0;padding:0;display:grid;gap:8px}
.found li{background:var(--card);border:1px solid var(--grid);border-left:4px solid var(--grid);border-radius:8px;padding:8px 14px}
.found li.bad{border-left-color:var(--bad)}.found li.warn{border-left-color:var(--warn)}
.found li.good{border-left-color:var(--good)}
.found strong{display:block}.tag{font-size:12px;font-weight:600;text-transform:uppercase;letter-spacing:.04em;margin-right:8px}
.tag.bad{color:var(--bad)}.tag.warn{color:var(--warn)}.tag.good{color:var(--good)}
.facts{max-width:none}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,340px),1fr));gap:12px;align-items:start}
.pairs{grid-template-columns:repeat(auto-fit,minmax(min(100%%,700px),1fr))}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%%,320px),1fr));gap:12px}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:10px 12px;min-width:0}
figcaption{font-weight:600;font-size:14.5px;line-height:1.35;margin-bottom:6px}
figcaption small{display:block;font-weight:400;font-size:12.5px}
figcaption i{font-style:normal;font-weight:600;font-size:12px;color:var(--under);float:right;margin-left:8px}
svg{display:block;width:100%%;height:auto;margin:0 auto;font-family:inherit}.px{image-rendering:pixelated}
details{border-top:1px solid var(--grid);padding:10px 0}summary{cursor:pointer;font-weight:600;padding:2px 0}
summary span{font-weight:400;color:var(--muted);margin-left:8px}details .grid{margin-top:10px}
.table{overflow-x:auto;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:4px 12px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px;width:100%%}
th,td{text-align:right;padding:5px 10px;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:last-child td{border-bottom:0}th{color:var(--muted);font-weight:600}
.notes{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:8px 14px 8px 30px;margin:10px 0;font-size:14px}
%(fills)s
"""


def page(title: str, body: str) -> str:
    """Return the whole document."""
    variables = {name: ";".join(f"--{key}:{value}" for key, value in colors.items()) for name, colors in THEMES.items()}
    fills = "".join(f".f-{key}{{fill:var(--{key})}}.s-{key}{{stroke:var(--{key})}}" for key in THEMES["light"])
    style = _CSS % {**variables, "fills": fills}
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{style}</style></head>\n'
            f"<body><main>\n{body}\n</main></body></html>\n")


def figure(scene: Scene, label: str = "") -> str:
    """Return a figure with its caption; `label` names the run where there are several."""
    name = f"<i>{escape(label)}</i>" if label else ""
    note = f"<small>{escape(scene.note)}</small>" if scene.note else ""
    return f"<figure><figcaption>{name}{escape(scene.title)}{note}</figcaption>{scene.svg()}</figure>"


def missing(title: str, label: str) -> str:
    """Return the card of a figure that another run has and this one has not."""
    return (f'<figure class="missing"><figcaption><i>{escape(label)}</i>{escape(title)}<small>Not in this run: its log holds '
            "nothing of the kind.</small></figcaption></figure>")


def figures(groups: Sequence[Sequence[Scene | None]], labels: Sequence[str]) -> str:
    """Return figures in a grid; those of several runs side by side.

    Args:
        groups: each the same figure of every run, None where a run has none; labels: the runs' names.
    """
    groups = [group for group in groups if any(group)]
    if len(labels) < 2:
        return f'<div class="grid">{"".join(figure(scene) for group in groups for scene in group if scene)}</div>'
    pairs = []
    for group in groups:
        title = next(scene.title for scene in group if scene)
        pairs.append("".join(figure(scene, label) if scene else missing(title, label)
                             for scene, label in zip(group, labels, strict=True)))
    return f'<div class="grid pairs">{"".join(f"<div class=pair>{pair}</div>" for pair in pairs)}</div>'


def stat(name: str, value: str, words: str, level: str = "") -> str:
    """Return one number with its name and a word about it."""
    told = f"<span>{escape(name)}</span><b>{escape(value)}</b><em class=muted>{escape(words)}</em>"
    return f'<div class="stat {level}">{told}</div>'


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return a table; the first row is its heading."""
    head, *body = rows
    cells = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in body)
    return f'<div class="table"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
