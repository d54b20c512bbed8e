"""The page of an analysed model: its figures, the numbers behind them, JSON.

Letters: M noise levels, B images, S tokens per image, D width, E routed experts, L MoE layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from promoe_ds.analysis.drawing import Scene, palette
from promoe_ds.analysis.drawing import page as html
from promoe_ds.analysis.drawing.charts import WIDTH, Axes, Cells, bar_chart, cell_chart, line_chart, scatter_chart
from promoe_ds.analysis.specialisation.collect import Batch, Observations, observe
from promoe_ds.analysis.specialisation.measures import Information, inter_intra_ratio, specialisation, subspace_similarity
from promoe_ds.errors import ConfigError, DataError
from promoe_ds.model.dit import DiT

_CLUSTERS = 10
_SHOWN_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to look at: noise levels, tokens kept of each for t-SNE and k-means, singular vectors, rounds of shuffling."""

    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    tokens: int = 800
    singular_vectors: int = 8
    rounds: int = 100
    seed: int = 0


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer's figures in numbers.

    similarity_EE: overlap of the experts' output subspaces; ratios: inter/intra class distance by level, of k-means clusters,
    of experts and of classes; tsne_n2: at the middle level.
    """

    layer: int
    seen: Observations
    similarity_EE: np.ndarray
    ratios: dict[str, list[float]]
    information: dict[str, Information]
    tsne_n2: np.ndarray


@dataclass(frozen=True)
class Analysis:
    """All of it."""

    name: str
    settings: Settings
    batch: Batch
    experts: int
    width: int
    layers: list[LayerAnalysis]


def analyse(network: DiT, batch: Batch, settings: Settings, *, name: str) -> Analysis:
    """Look at every MoE layer of a model.

    Raises: ConfigError if the model has none, or a library of the extra `report` is missing.
    """
    if not network.moe_layers():
        raise ConfigError(f"{name} is dense: it has no experts to analyse")
    similarity = {index: subspace_similarity(layer.routed.down_weight.detach(), settings.singular_vectors)
                  for index, layer in network.moe_layers().items()}
    seen = observe(network, batch, list(settings.sigmas), kept=settings.tokens, seed=settings.seed)
    layers = [_analyse_layer(index, similarity_EE, seen[index], batch, settings) for index, similarity_EE in similarity.items()]
    return Analysis(name, settings, batch, network.config.routing.num_experts, network.config.model.hidden_size, layers)


def _analyse_layer(index: int, similarity_EE: np.ndarray, seen: Observations, batch: Batch, settings: Settings) -> LayerAnalysis:
    try:
        from sklearn.cluster import KMeans
        from sklearn.manifold import TSNE
    except ImportError:
        raise ConfigError("scikit-learn is not installed, t-SNE and k-means need it: pip install 'promoe_ds[report]'") from None
    labels_n = batch.labels_B.numpy()[seen.places_n // seen.experts_MBS.shape[2]]
    ratios: dict[str, list[float]] = {"k-means clusters": [], "experts": [], "classes": []}
    for level, tokens_nD in enumerate(seen.tokens_MnD):
        clusters = KMeans(min(_CLUSTERS, len(tokens_nD)), n_init=3, random_state=settings.seed).fit_predict(tokens_nD)
        experts_n = seen.experts_MBS[level].ravel()[seen.places_n]
        for key, groups in zip(ratios, (clusters, experts_n, labels_n), strict=True):
            ratios[key].append(inter_intra_ratio(tokens_nD, groups))
    middle = seen.tokens_MnD[len(settings.sigmas) // 2]
    perplexity = min(30.0, (len(middle) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=settings.seed).fit_transform(middle)
    return LayerAnalysis(index, seen, similarity_EE, ratios,
                         specialisation(seen.experts_MBS, batch.labels_B.numpy(), rounds=settings.rounds, seed=settings.seed), tsne)


def overview_figures(analysis: Analysis) -> list[Scene]:
    """Return the figures that compare layers."""
    rows = [str(layer.layer) for layer in analysis.layers]
    kinds = list(analysis.layers[0].information)
    scores = np.array([[layer.information[kind].score for kind in kinds] for layer in analysis.layers])
    chance = analysis.settings.singular_vectors / analysis.width
    similar = [(f"layer {layer.layer}", float(_off_diagonal(layer.similarity_EE).mean()),
                f"{_off_diagonal(layer.similarity_EE).mean():.3f}", "under") for layer in analysis.layers]
    sigmas = list(analysis.settings.sigmas)
    ratio_notes = {
        "k-means clusters": "Clusters of k-means (10), as in the paper's Fig. 1(a): far above 1 where tokens form clusters.",
        "experts": "Tokens grouped by their expert: high where each expert's tokens are a group of their own.",
        "classes": "Tokens grouped by the class of their image: low where patches of a class differ more than classes do."}
    return [
        cell_chart("What the choice of expert tells", scores,
                   Cells(rows=rows, columns=kinds, show="{:.3f}".format, shade=lambda x: np.clip(x / 0.5, -1, 1), row_name="layer",
                         column_name="attribute"),
                   note="Mutual information with the class, the noise level and the patch's place, over the entropy of the expert, "
                        "minus that of shuffled data: 0 is chance, 1 is all."),
        bar_chart("Overlap of experts' subspaces", similar, mark=chance, mark_name=f"chance {chance:.3f}",
                  note=f"Mean over pairs of experts: |UᵢᵀUⱼ|²/k of the top {analysis.settings.singular_vectors} left singular "
                       "vectors of the down projections. Lower is more diverse (Fig. 1(b))."),
        *(line_chart(f"Inter/intra distance of {kind}", [(f"layer {layer.layer}", sigmas, layer.ratios[kind])
                                                         for layer in analysis.layers],
                      Axes(x_name="sigma", even=1.0, is_ordered=True), note=note)
          for kind, note in ratio_notes.items())]


def layer_figures(analysis: Analysis, layer: LayerAnalysis) -> list[Scene]:
    """Return the figures of one layer."""
    names = [f"e{expert}" for expert in range(analysis.experts)]
    middle = len(analysis.settings.sigmas) // 2
    experts_n = layer.seen.experts_MBS[middle].ravel()[layer.seen.places_n]
    routed = experts_n >= 0
    bars = [(kind, each.share, f"{each.share:.3f}, chance {each.chance:.3f}, p {each.p_value:.2g}", place)
            for place, (kind, each) in enumerate(layer.information.items())]
    return [
        scatter_chart(f"Layer {layer.layer}: t-SNE of tokens", layer.tsne_n2[routed], experts_n[routed], names,
                      note=f"{routed.sum()} tokens at sigma {analysis.settings.sigmas[middle]:g}, coloured by expert (Fig. 6)."),
        token_maps(analysis, layer),
        bar_chart(f"Layer {layer.layer}: mutual information", bars, label_width=66.0,
                  note=f"Over the entropy of the expert; chance by {analysis.settings.rounds} shufflings: images, levels within an "
                       "image, places within an image and level."),
        cell_chart(f"Layer {layer.layer}: overlap of subspaces", layer.similarity_EE,
                   Cells(rows=names, columns=names, show="{:.2f}".format, shade=lambda x: x, column_name="and"),
                   note="Expert by expert; 1 on the diagonal.")]


def token_maps(analysis: Analysis, layer: LayerAnalysis) -> Scene:
    """Draw some images with the expert of every patch, level by level."""
    levels, images, tokens = layer.seen.experts_MBS.shape
    shown = min(_SHOWN_IMAGES, images)
    columns = levels + 1
    side = (WIDTH - 6.0 * (columns + 1)) / columns
    colors, bottom = palette(analysis.experts), 18 + shown * (side + 6)
    apart = 29.0 if analysis.experts <= 12 else 35.0
    in_a_row = int((WIDTH - 6) / apart)
    scene = Scene(WIDTH, bottom + 4 + 14 * -(-analysis.experts // in_a_row), f"Layer {layer.layer}: experts over images",
                  "Left the image, then each patch's expert by noise level, drawn over it.")
    scene.numbers = [["image", "class", "sigma", "patch", "expert"]]
    grid = round(tokens**0.5)
    for column, name in enumerate(["image", *(f"σ {sigma:g}" for sigma in analysis.settings.sigmas)]):
        scene.text((6 + column * (side + 6) + side / 2, 12), name, color="muted", anchor="middle", size=10)
    for row in range(shown):
        y, image = 18 + row * (side + 6), _gray(analysis.batch.clean_BZHW[row].numpy())
        for column in range(columns):
            x = 6 + column * (side + 6)
            scene.pixels((x, y, side, side), image)
            if column:
                experts_S = layer.seen.experts_MBS[column - 1, row]
                scene.pixels((x, y, side, side), _tint(experts_S.reshape(grid, grid), colors))
                head = [row, int(analysis.batch.labels_B[row]), analysis.settings.sigmas[column - 1]]
                scene.numbers += [[*head, place, int(expert)] for place, expert in enumerate(experts_S)]
    for expert, color in enumerate(colors):
        x, y = 6 + apart * (expert % in_a_row), bottom + 8 + 14 * (expert // in_a_row)
        scene.rect((x, y - 7, 8, 8), color, radius=2)
        scene.text((x + 11, y), f"e{expert}", color="muted", size=9.5)
    return scene


def _gray(image_ZHW: np.ndarray) -> np.ndarray:
    """Show an image of one channel as it is, of latents their first channel."""
    plane = image_ZHW[0]
    low, high = np.quantile(plane, [0.01, 0.99])
    levels = (np.clip((plane - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    return np.dstack([levels] * 3 + [np.full_like(levels, 255)])


def _tint(experts_HW: np.ndarray, colors: Sequence[str]) -> np.ndarray:
    """Colour each patch by its expert; one without (-1) stays clear, by the last row."""
    rgba = np.array([[int(color[at:at + 2], 16) for at in (1, 3, 5)] + [165] for color in colors] + [[0, 0, 0, 0]], np.uint8)
    return rgba[experts_HW]


def numbers(analysis: Analysis) -> dict[str, Any]:
    """Return all numbers, for JSON."""
    return {"format": 1, "model": analysis.name, "settings": asdict(analysis.settings), "images": len(analysis.batch.labels_B),
            "subspace_chance": analysis.settings.singular_vectors / analysis.width,
            "layers": [{"layer": layer.layer, "subspace_similarity": layer.similarity_EE.round(5).tolist(),
                        "inter_intra_ratio": {kind: [None if np.isnan(ratio) else ratio for ratio in ratios]
                                              for kind, ratios in layer.ratios.items()},
                        "information": {kind: {**asdict(each), "score": each.score} for kind, each in layer.information.items()}}
                       for layer in analysis.layers]}


def render(analysis: Analysis) -> str:
    """Return the page."""
    settings = analysis.settings
    sigmas = ", ".join(f"{sigma:g}" for sigma in settings.sigmas)
    head = (f"<header><p class=muted>Specialisation of experts</p><h1>{escape(analysis.name)}</h1><p class='muted facts'>"
            f"{len(analysis.layers)} layers × {analysis.experts} experts · {len(analysis.batch.labels_B)} images at sigma {sigmas} "
            f"· seed {settings.seed}</p></header>")
    best = {kind: max(analysis.layers, key=lambda layer, kind=kind: layer.information[kind].score)
            for kind in analysis.layers[0].information}
    cards = []
    for kind, layer in best.items():
        found = layer.information[kind]
        cards.append(html.stat(f"Expert and {kind}", f"{found.score:.3f}", f"beyond chance, at most (layer {layer.layer})",
                               "good" if found.share > found.chance_high else ""))
    overlap = np.mean([_off_diagonal(layer.similarity_EE).mean() for layer in analysis.layers])
    cards.append(html.stat("Overlap of subspaces", f"{overlap:.3f}", f"chance {settings.singular_vectors / analysis.width:.3f}"))
    parts = [head, f'<div class="cards">{"".join(cards)}</div>', "<h2>All layers</h2>",
             html.figures([[scene] for scene in overview_figures(analysis)], [analysis.name])]
    for layer in analysis.layers:
        figures = html.figures([[scene] for scene in layer_figures(analysis, layer)], [analysis.name])
        parts.append(f"<details open><summary>Layer {layer.layer}</summary>{figures}</details>")
    parts.append('<p class="muted">How each number is made, and what it says: docs/profiling.md.</p>')
    return html.page(f"Specialisation of {analysis.name}", "\n".join(parts))


def check_place(out: Path) -> None:
    """Find out, before a long analysis, whether its page can be written.

    Raises: ConfigError if the numbers beside it would have its name; DataError if it or they cannot be written.
    """
    if out.suffix == ".json":
        raise ConfigError(f"--out {out}: the numbers get this name, the page needs another: {out.with_suffix('.html')}")
    try:
        for path in [out] if out.is_dir() else [out, out.with_suffix(".json")]:
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
    except OSError as error:
        raise _cannot_write(out, error) from None


def write(analysis: Analysis, out: Path) -> None:
    """Write the page and, beside it, the numbers as JSON.

    Raises: DataError if they cannot be written.
    """
    try:
        out.write_text(render(analysis), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(numbers(analysis), indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise _cannot_write(out, error) from None


def _cannot_write(out: Path, error: OSError) -> DataError:
    return DataError(f"{out} cannot be written: {error.strerror}: name another place with --out")


def _off_diagonal(matrix_EE: np.ndarray) -> np.ndarray:
    return matrix_EE[~np.eye(len(matrix_EE), dtype=bool)] if len(matrix_EE) > 1 else np.full(1, np.nan)
