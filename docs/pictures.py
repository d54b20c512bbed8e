"""Make the pictures of the site: python docs/pictures.py [--run runs/quickstart/run]

Drawings (the router, the exchange, the rooms with their imports) are SVG, light and dark. With
--run also the report of that run as a browser shows it, on a desk and on a phone, and its terminal.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from html import escape
from io import StringIO
from itertools import pairwise
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
PACKAGE = Path(__file__).parents[1] / "promoe_ds"
#: By variant: paper, ink, muted, box, line; then the colours of tokens and experts, and of null.
PALETTES = {
    "light": ("#ffffff", "#1d2433", "#5b6575", "#f3f5f9", "#9aa5b8"),
    "dark": ("#1e2129", "#e6e9f0", "#a3adbd", "#2a2f3a", "#6b7688"),
}
EXPERTS = ("#4c7fdb", "#e08a3c", "#3fa37c", "#a66bd0")
NULL = "#8d96a5"


class Drawing:
    """An SVG in the making; coordinates are pixels at full size."""

    def __init__(self, width: int, height: int, variant: str, description: str) -> None:
        """Begin with an empty sheet."""
        self.paper, self.ink, self.muted, self.box_fill, self.line_colour = PALETTES[variant]
        self._size, self._description = (width, height), description
        self._parts: list[str] = []

    def text(
        self, x: float, y: float, words: str, *, size: int = 15, anchor: str = "middle", **look: str
    ) -> None:
        """Write a line; look: `colour`, `weight`."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
            f' font-weight="{look.get("weight", "400")}"'
            f' fill="{look.get("colour", self.ink)}">{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, *, fill: str = "", edge: str = ""
    ) -> None:
        """Draw a rectangle with round corners."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"'
            f' fill="{fill or self.box_fill}" stroke="{edge or self.line_colour}"'
            ' stroke-width="1.5"/>'
        )

    def tokens(self, x: float, y: float, colours: list[str], *, side: int = 16) -> None:
        """Draw a row of tokens, centred on x."""
        left = x - (len(colours) * (side + 4) - 4) / 2
        for number, colour in enumerate(colours):
            self._parts.append(
                f'<rect x="{left + number * (side + 4):g}" y="{y:g}" width="{side}"'
                f' height="{side}" rx="3" fill="{colour}"/>'
            )

    def arrow(
        self, *points: tuple[float, float], colour: str = "", is_headless: bool = False
    ) -> None:
        """Draw a line through points, with a head at its end."""
        way = " L".join(f"{x:g} {y:g}" for x, y in points)
        head = "" if is_headless else ' marker-end="url(#head)"'
        self._parts.append(
            f'<path d="M{way}" fill="none" stroke="{colour or self.line_colour}"'
            f' stroke-width="1.8"{head}/>'
        )

    def svg(self) -> str:
        """Return the whole file."""
        width, height = self._size
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            f' width="{width}" height="{height}" role="img"'
            ' font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, sans-serif">'
            f"<title>{escape(self._description)}</title>"
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7"'
            f' markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{self.line_colour}"/>'
            f'</marker></defs><rect width="{width}" height="{height}" rx="10" fill="{self.paper}"/>'
            + "".join(self._parts)
            + "</svg>\n"
        )


def draw_router(variant: str) -> str:
    """Return a token's way through the two steps."""
    sheet = Drawing(640, 510, variant, "A token's way through the two steps of the router")
    blue, orange, green, _ = EXPERTS
    sheet.text(190, 28, "tokens of an image with a label", weight="600")
    sheet.text(540, 28, "… without one (null)", weight="600")
    sheet.tokens(190, 38, [blue, blue, green, orange])
    sheet.tokens(540, 38, [NULL] * 4)
    sheet.arrow((190, 60), (190, 84))
    sheet.arrow((540, 60), (540, 84))
    sheet.box(20, 86, 600, 48)
    sheet.text(320, 106, "Step 1: does the sample have a label or a prompt?", weight="600")
    sheet.text(320, 125, "known before the layer; nothing is computed", size=14, colour=sheet.muted)
    sheet.arrow((190, 134), (190, 170))
    sheet.text(200, 156, "yes", size=14, anchor="start", colour=sheet.muted)
    sheet.arrow((557, 134), (557, 326))
    sheet.text(567, 156, "no", size=14, anchor="start", colour=sheet.muted)
    sheet.box(20, 172, 340, 94)
    sheet.text(190, 193, "Step 2: which prototype is nearest?", weight="600")
    sheet.text(190, 213, "highest cosine, which is also the gate", size=14, colour=sheet.muted)
    for number, colour in enumerate(EXPERTS):
        x = 65 + 83 * number
        sheet.arrow((x, 244), (x, 326), colour=colour)
        sheet.tokens(x, 228, [colour], side=20)
    sheet.text(440, 200, "every token", size=14, colour=sheet.muted)
    sheet.text(440, 218, "of both kinds", size=14, colour=sheet.muted)
    sheet.arrow((440, 228), (440, 326))
    for number, colour in enumerate(EXPERTS):
        x = 65 + 83 * number
        sheet.box(x - 38, 328, 76, 66, edge=colour)
        sheet.text(x, 350, f"expert {number}", size=14)
        sheet.tokens(x, 364, [[blue, blue], [orange], [green], []][number])
    sheet.box(386, 328, 108, 66)
    sheet.text(440, 350, "shared expert", size=14)
    sheet.tokens(440, 364, [blue, green, orange, NULL])
    sheet.box(502, 328, 118, 66, edge=NULL)
    sheet.text(561, 350, "unconditional", size=14)
    sheet.tokens(561, 364, [NULL] * 4)
    for x in (65, 148, 231, 314, 440, 561):
        sheet.arrow((x, 394), (x, 426))
    sheet.box(20, 428, 600, 62)
    sheet.text(320, 452, "with a label:  shared + Σ gate · expert", weight="600")
    sheet.text(320, 475, "null:  shared + unconditional", weight="600")
    return sheet.svg()


def draw_dispatch(variant: str) -> str:
    """Return how two ranks exchange tokens and null samples stay."""
    sheet = Drawing(640, 528, variant, "Two ranks exchange the tokens whose expert lives elsewhere")
    blue, orange, green, purple = EXPERTS
    held = [[blue, green, orange, purple], [green, blue, purple, purple]]
    for rank, left in enumerate((14, 332)):
        sheet.box(left, 12, 294, 456, fill=sheet.paper)
        sheet.text(left + 147, 36, f"rank {rank}", weight="600")
        sheet.text(left + 105, 60, "to be routed", size=14, colour=sheet.muted)
        sheet.text(left + 242, 60, "null", size=14, colour=sheet.muted)
        sheet.tokens(left + 105, 70, held[rank], side=22)
        sheet.tokens(left + 242, 70, [NULL] * 2, side=22)
        for number in (0, 1):
            colour = EXPERTS[2 * rank + number]
            x = left + 56 + 94 * number
            sheet.box(x - 43, 214, 86, 66, edge=colour)
            sheet.text(x, 236, f"expert {2 * rank + number}", size=14)
            sheet.tokens(x, 248, [colour] * sum(row.count(colour) for row in held), side=18)
        sheet.box(left + 198, 214, 86, 66, edge=NULL)
        sheet.text(left + 241, 236, "uncond.", size=14)
        sheet.tokens(left + 241, 248, [NULL] * 2, side=18)
        sheet.arrow((left + 241, 94), (left + 241, 212), colour=NULL)
        sheet.arrow((left + 241, 280), (left + 241, 394), colour=NULL)
        sheet.tokens(left + 105, 398, held[rank], side=22)
        sheet.tokens(left + 242, 398, [NULL] * 2, side=22)
        sheet.text(left + 147, 446, "in their old order, weighed and summed", size=14)
    for rank, left in enumerate((14, 332)):
        for place, colour in enumerate(held[rank]):
            x = left + 66 + 26 * place
            expert = EXPERTS.index(colour)
            there = (14, 332)[expert // 2] + 56 + 94 * (expert % 2)
            sheet.arrow((x, 94), (there + 6 * (place - 1.5), 212), colour=colour)
            sheet.arrow((there + 6 * (place - 1.5), 280), (x, 394), colour=colour)
    for y, words in (
        (494, "A colour is the expert that a token's prototypes chose. Exactly the rows"),
        (514, "whose expert is on the other rank travel, and their results come back."),
    ):
        sheet.text(320, y, words, size=14, colour=sheet.muted)
    return sheet.svg()


def read_imports() -> dict[str, set[str]]:
    """Return the rooms of the package, and from which others each imports."""
    rooms = sorted(
        path.name
        for path in PACKAGE.iterdir()
        if path.is_dir() and next(path.rglob("*.py"), None) and path.name != "recipes"
    )
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for file in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                found[room] |= {
                    name.split(".")[1] for name in names if name.startswith("promoe_ds.")
                } & set(rooms) - {room}
    return found


def levels_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """Return the length of the longest way down from each room."""

    @cache
    def level(room: str) -> int:
        return 1 + max(map(level, imports[room]), default=-1)

    return {room: level(room) for room in imports}


def direct_imports() -> dict[str, set[str]]:
    """Return the imports that do not follow from others."""
    imports, below = read_imports(), dict[str, set[str]]()
    for room in sorted(imports, key=levels_of(imports).__getitem__):
        below[room] = imports[room].union(*(below[each] for each in imports[room]))
    return {
        room: {each for each in found if not any(each in below[other] for other in found)}
        for room, found in imports.items()
    }


def draw_house(variant: str) -> str:
    """Return the rooms by level; long arrows go between the rooms of the levels that they pass."""
    imports = direct_imports()
    levels = levels_of(imports)
    top = max(levels.values())
    # The points of each arrow from its upper end down; those between are (from, to, level).
    ways = {
        (room, each): [
            room,
            *((room, each, n) for n in range(levels[room] - 1, levels[each], -1)),
            each,
        ]
        for room, found in imports.items()
        for each in sorted(found)
    }
    follows: dict[object, list[object]] = {}
    for way in ways.values():
        for upper, lower in pairwise(way):
            follows.setdefault(upper, []).append(lower)
    points = {point for way in ways.values() for point in way}
    place: dict[object, tuple[float, float]] = {}
    for number in range(top + 1):
        row = [p for p in points if (levels[p] if isinstance(p, str) else p[2]) == number]
        row.sort(
            key=lambda p: (
                sum(place[e][0] for e in follows.get(p, [])) / len(follows.get(p, " ")),
                str(p),
            )
        )
        widths = [124 if isinstance(point, str) else 22 for point in row]
        gap = (640 - sum(widths)) / (len(row) + 1)
        left = gap
        for point, width in zip(row, widths, strict=True):
            place[point] = (left + width / 2, 30 + 70 * (top - number))
            left += width + gap
    sheet = Drawing(640, 70 * top + 60, variant, "The rooms of the package by what they import")
    for way in ways.values():
        (x, y), *inner, (to_x, to_y) = (place[point] for point in way)
        passed = [(px, py + side) for px, py in inner for side in (-16, 16)]
        sheet.arrow((x, y + 16), *passed, (to_x, to_y - 17))
    for room in sorted(levels):
        x, y = place[room]
        sheet.box(x - 58, y - 16, 116, 32)
        sheet.text(x, y + 5, room)
    return sheet.svg()


def photograph(page: Path, out: Path, width: int, height: int, *, is_dark: bool = False) -> None:
    """Save what a browser shows of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    # Charts are drawn when they come into view, which takes no virtual time.
    flags = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--timeout=8000"]
    flags += [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"]
    flags += [f"--window-size={width},{height}", f"--screenshot={out}"]
    subprocess.run([browser, *flags, page.resolve().as_uri()], check=True, capture_output=True)


def picture_terminal(run_dir: Path) -> dict[str, str]:
    """Return what training printed and what --follow shows at its end, as SVG."""
    from rich.console import Console
    from rich.text import Text

    from promoe_ds.reports.load.terminal import Follower, draw

    log = (run_dir / "train.log").read_text(encoding="utf-8").splitlines()
    training, follow = (Console(record=True, width=w, file=StringIO()) for w in (132, 96))
    for line in log[-18:]:
        training.print(
            Text(line.replace(str(run_dir), "runs/a")), overflow="ellipsis", no_wrap=True
        )
    follower = Follower(run_dir)
    follower.look()
    for part in draw(follower.view, 96, 16):
        follow.print(part)
    return {
        name: re.sub(r"@font-face \{.*?\}", "", console.export_svg(title=title), flags=re.DOTALL)
        for name, title, console in (
            ("training", "training, two ranks", training),
            ("follow", "promoe-load runs/a --follow", follow),
        )
    }


def draw_loss(run_dir: Path) -> bytes:
    """Return the diffusion loss of a run over its steps, as PNG."""
    import numpy as np

    from promoe_ds.reports.charts import line_chart

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    entries = [
        entry for line in text.splitlines() if "loss_diffusion" in (entry := json.loads(line))
    ]
    losses = {"loss": np.array([entry["loss_diffusion"] for entry in entries])}
    return line_chart("Diffusion loss", ("step", [e["step"] for e in entries]), losses).png()


DRAWINGS: dict[str, Callable[[str], str]] = {
    "router": draw_router,
    "dispatch": draw_dispatch,
    "house": draw_house,
}


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run whose report has been written")
    parser.add_argument("--loss", type=Path, help="a run whose loss is drawn (emoji_loss.png)")
    options = parser.parse_args()
    for name, make in DRAWINGS.items():
        for variant in PALETTES:
            (IMAGES / f"{name}_{variant}.svg").write_text(make(variant), encoding="utf-8")
    if options.loss is not None:
        (IMAGES / "emoji_loss.png").write_bytes(draw_loss(options.loss))
    if (run_dir := options.run) is not None:
        for name, text in picture_terminal(run_dir).items():
            (IMAGES / f"{name}.svg").write_text(text, encoding="utf-8")
        page = run_dir / "expert_load.html"
        photograph(page, IMAGES / "report.png", 1200, 1000)
        photograph(page, IMAGES / "report_dark.png", 1200, 1000, is_dark=True)
        photograph(page, IMAGES / "phone.png", 400, 1420)


if __name__ == "__main__":
    main()
