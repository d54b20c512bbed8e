"""The page of an analysed model: its charts, and the numbers behind them as JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from promoe_ds.errors import ConfigError, DataError
from promoe_ds.files import json_text
from promoe_ds.reports.charts import (
    DRAWING,
    Chart,
    Rows,
    bar_chart,
    line_chart,
    require_libraries,
    scatter_chart,
)
from promoe_ds.reports.maps import heat_chart, plane
from promoe_ds.reports.page import Page, Part, figures, part, write_page, write_text
from promoe_ds.reports.specialisation.analysis import Analysis, LayerAnalysis
from promoe_ds.reports.theme import WIDTH, color_of, linear_color, png_url, tooltip

_SHOWN_IMAGES = 4
_RATIO_NOTES = {
    "k-means clusters": (
        "Clusters of k-means (10), as in the paper's Fig. 1(a): far above 1 if tokens form"
        " clusters."
    ),
    "experts": (
        "Tokens grouped by their expert: high if each expert's tokens are a group of their own."
    ),
}


def overview_charts(analysis: Analysis) -> list[Chart]:
    """Return the charts that compare layers."""
    layers, settings, batch = analysis.layers, analysis.settings, analysis.batch
    notes = _RATIO_NOTES | {
        batch.groups: (
            f"Tokens grouped by the {batch.group} of their image: low if patches of a {batch.group}"
            f" differ more than {batch.groups} do."
        )
    }
    kinds = list(layers[0].information)
    scores = np.array([[each.information[kind].score for kind in kinds] for each in layers])
    overlaps = [(f"layer {each.layer}", each.overlap, f"{each.overlap:.3f}") for each in layers]
    return [
        heat_chart(
            "What the choice of expert depends on",
            scores,
            [str(each.layer) for each in layers],
            kinds,
            names=("layer", "attribute"),
            color=linear_color(-0.5, 0.5),
            form=".3f",
            note=(
                f"Mutual information with the {batch.group}, the noise level and the patch's place,"
                " over the entropy of the expert, minus that of shuffled data: 0 is chance, 1 is"
                " all."
            ),
        ),
        bar_chart(
            "Overlap of experts' subspaces",
            overlaps,
            mark=(analysis.chance, f"chance {analysis.chance:.3f}"),
            note=(
                f"Mean over pairs of experts: |UᵢᵀUⱼ|²/k of the top {settings.singular_vectors}"
                " left singular vectors of the down projections. Lower is more diverse (Fig."
                " 1(b))."
            ),
        ),
        *(
            line_chart(
                f"Inter/intra distance of {kind}",
                ("sigma", settings.sigmas),
                {f"layer {each.layer}": np.array(each.ratios[kind]) for each in layers},
                even=1.0,
                is_ordered=True,
                note=note,
            )
            for kind, note in notes.items()
        ),
    ]


def layer_charts(analysis: Analysis, layer: LayerAnalysis) -> list[Chart]:
    """Return the charts of one layer."""
    settings, names = analysis.settings, [f"e{expert}" for expert in range(analysis.experts)]
    middle, title = len(settings.sigmas) // 2, f"Layer {layer.layer}"
    experts_n = layer.seen.experts_MBS[middle].ravel()[layer.seen.places_n]
    is_routed = experts_n >= 0
    bars = [
        (kind, each.share, f"{each.share:.3f}, chance {each.chance:.3f}, p {each.p_value:.2g}")
        for kind, each in layer.information.items()
    ]
    return [
        scatter_chart(
            f"{title}: t-SNE of tokens",
            layer.tsne_n2[is_routed],
            [names[e] for e in experts_n[is_routed]],
            names,
            note=(
                f"{is_routed.sum()} tokens at sigma {settings.sigmas[middle]:g}, coloured by expert"
                " (Fig. 6)."
            ),
        ),
        token_maps(analysis, layer, names),
        bar_chart(
            f"{title}: mutual information",
            bars,
            columns={
                "chance": [each.chance for each in layer.information.values()],
                "p": [each.p_value for each in layer.information.values()],
            },
            note=(
                f"Over the entropy of the expert; chance by {settings.rounds} shufflings: images,"
                " levels within an image, places within an image and level."
            ),
        ),
        heat_chart(
            f"{title}: overlap of subspaces",
            layer.similarity_EE,
            names,
            names,
            names=("expert", "and"),
            color=linear_color(-1, 1),
            note="Expert by expert; 1 on the diagonal.",
        ),
    ]


def token_maps(analysis: Analysis, layer: LayerAnalysis, names: list[str]) -> Chart:
    """Draw some images with the expert of every patch, level by level."""
    titles = ["image", *(f"σ {sigma:g}" for sigma in analysis.settings.sigmas)]
    experts_BMS = layer.seen.experts_MBS[:, :_SHOWN_IMAGES].transpose(1, 0, 2)
    batch, patches = analysis.batch, experts_BMS.shape[2]
    height, width = batch.clean_BZHW.shape[2:]
    across = round((patches * width / height) ** 0.5)
    down = patches // across
    x_step, y_step = 1.08 * across, 1.08 * down  # from one map to the next
    wide, tall = x_step * len(titles), y_step * len(experts_BMS)
    rows: Rows = [["image", batch.group, "sigma", "patch", "expert", "x", "y", "x2", "y2"]]
    for (image, level, patch), expert in np.ndenumerate(experts_BMS):
        x, y = (level + 1) * x_step + patch % across, image * y_step + patch // across
        label, sigma = int(batch.labels_B[image]), analysis.settings.sigmas[level]
        name = names[expert] if expert >= 0 else ""
        rows.append([image, label, sigma, patch, name, x, y, x + 1, y + 1])
    pictures = [
        {
            "url": url,
            "x": column * x_step,
            "x2": column * x_step + across,
            "y": image * y_step,
            "y2": image * y_step + down,
        }
        for image, url in enumerate(
            png_url(_gray(clean.numpy())) for clean in batch.clean_BZHW[: len(experts_BMS)]
        )
        for column in range(len(titles))
    ]
    heads = [{"x": (column + 0.5) * x_step, "text": title} for column, title in enumerate(titles)]
    place = {**plane(wide, tall), "x2": {"field": "x2"}, "y2": {"field": "y2"}}
    shown = {
        "color": color_of("expert", names),
        "tooltip": tooltip("expert", batch.group, "sigma", "patch"),
    }
    layers = [
        {
            "data": {"values": pictures},
            "mark": {"type": "image", "aspect": False},
            "encoding": {**place, "url": {"field": "url"}},
        },
        {
            "transform": [{"filter": "datum.expert"}],
            "mark": {"type": "rect", "opacity": 0.62},
            "encoding": {**place, **shown},
        },
        {
            "data": {"values": heads},
            "mark": {"type": "text", "baseline": "bottom", "dy": -3, "style": "muted"},
            "encoding": {"x": place["x"], "y": {"value": 0}, "text": {"field": "text"}},
        },
    ]
    size = {"width": WIDTH, "height": WIDTH * tall / wide, "padding": {"top": 18}}
    return Chart(
        title=f"Layer {layer.layer}: experts over images",
        rows=rows,
        note="Left the image, then each patch's expert by noise level, drawn over it.",
        spec={**size, "layer": layers},
    )


def _gray(image_ZHW: np.ndarray) -> Image.Image:
    """Return an image of one channel as it is, of latents their first channel."""
    low, high = np.quantile(image_ZHW[0], [0.01, 0.99])
    levels = (np.clip((image_ZHW[0] - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    # Vega smooths an image that it enlarges: patches keep their edges.
    zoom = max(1, 64 // len(levels))
    return Image.fromarray(levels.repeat(zoom, axis=0).repeat(zoom, axis=1))


def build_page(analysis: Analysis) -> Page:
    """Return the page."""
    settings, layers = analysis.settings, analysis.layers
    overlap = np.mean([each.overlap for each in layers])
    cards = []
    for kind in layers[0].information:
        best = max(layers, key=lambda layer: layer.information[kind].score)
        found = best.information[kind]
        words = f"beyond chance, at most (layer {best.layer})"
        level = "good" if found.share > found.chance_high else ""
        cards.append((f"Expert and {kind}", f"{found.score:.3f}", words, level))
    cards.append(("Overlap of subspaces", f"{overlap:.3f}", f"chance {analysis.chance:.3f}", ""))
    return Page(
        "Specialisation of experts",
        analysis.name,
        facts=[
            f"{len(layers)} layers × {analysis.experts} experts · {len(analysis.batch.labels_B)}"
            f" images at sigma {', '.join(f'{sigma:g}' for sigma in settings.sigmas)} · seed"
            f" {settings.seed}"
        ],
        parts=[
            *part("cards", items=cards),
            *part("heading", text="All layers"),
            *_figures(overview_charts(analysis)),
            *part("heading", text="Layer by layer"),
            *(
                {
                    "kind": "details",
                    "title": f"Layer {layer.layer}",
                    "text": "",
                    "is_open": True,
                    "items": _figures(layer_charts(analysis, layer)),
                }
                for layer in layers
            ),
            *part(
                "text", text="How each number is made, and what it says: docs/guides/profiling.md."
            ),
        ],
    )


def _figures(charts: list[Chart]) -> list[Part]:
    return part("figures", items=figures([[chart] for chart in charts], [""]))


def check_place(out: Path) -> None:
    """Find out, before a long analysis, whether its page can be made and written.

    Raises: ConfigError if the numbers beside it would have its name, or without a library;
    DataError if it or they cannot be written.
    """
    require_libraries(DRAWING | {"sklearn": "report"})
    if out.suffix == ".json":
        raise ConfigError(
            f"--out {out}: the numbers get this name, the page needs another:"
            f" {out.with_suffix('.html')}"
        )
    try:
        for path in [out] if out.is_dir() else [out, out.with_suffix(".json")]:
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror}: name another place with --out"
        ) from None


def write_report(analysis: Analysis, out: Path) -> None:
    """Write the page and, beside it, the numbers as JSON.

    Raises: DataError if they cannot be written.
    """
    write_page(out, build_page(analysis))
    write_text(out.with_suffix(".json"), json_text(analysis.numbers(), indent=1))
