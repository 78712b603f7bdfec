"""Page and charts of a probe's report."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from fixtures.tiny_probes import draw_photo, save_tiny
from vitlib import probe
from vitlib.probe.figures import draw_classes
from vitlib.probe.projection import MAX_POINTS, principal_components, sample_points, tsne

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
pytest.importorskip("sklearn", reason="probes need scikit-learn: pip install 'vitlib[eval]'")

HOSTILE = "<img src=x onerror=alert(1)> & $x^2$ _\u202e"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> probe.ProbeReport:
    root = tmp_path_factory.mktemp("hostile")
    lines = ["filename,label"]
    (root / "data").mkdir()
    for i in range(24):
        label = (HOSTILE, "_hidden")[i % 2]
        draw_photo([["red"], ["blue"]][i % 2], i).save(root / "data" / f"{i}.png")
        lines.append(f'{i}.png,"{label}"')
    (root / "data" / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    return probe.run(
        root / "data", str(save_tiny(root / "model")), root / "out", layers="all", few_shot=(2,),
        methods=("knn", "logistic"), k=(3,),
    )  # fmt: skip


def test_page_is_one_file_that_fetches_nothing(report: probe.ProbeReport) -> None:
    page = (report.folder / "report.html").read_text()
    parser = Tags()
    parser.feed(page)
    assert parser.tags.count("script") == 1
    assert all(source.startswith("data:image/") for source in parser.sources)
    assert "default-src 'none'" in page
    for title in ("By layer", "Map of the classes", "Few photos of a class", "Settings"):
        assert f"<h2>{title}" in page


def test_hostile_labels_are_text(report: probe.ProbeReport) -> None:
    assert any("onerror" in label for label in report.labels)
    page = (report.folder / "report.html").read_text()
    parser = Tags()
    parser.feed(page)
    assert "x" not in parser.sources
    assert "\u202e" not in page


def test_page_shows_the_numbers_of_the_report(report: probe.ProbeReport) -> None:
    page = (report.folder / "report.html").read_text()
    text = re.sub("<[^>]+>", " ", page)
    for row in report.rows:
        assert f"{row.value:.4f}" in text
        assert f"{row.interval[0]:.3f} to {row.interval[1]:.3f}" in text
    assert f"layer {report.best.layer}, {report.best.pool}" in text


def test_classes_beyond_the_colours_are_others() -> None:
    points = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
    names = [f"class {i % 30}" for i in range(60)]
    figure = draw_classes([("map", points)], names)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 25
    assert texts[0] == "6 others"
    # matplotlib would leave a name out that starts with an underscore.
    other = draw_classes([("map", points)], ["_a", "b"] * 30)
    assert [text.get_text().strip() for text in other.legends[0].get_texts()] == ["_a", "b"]


def test_principal_components_equal_sklearn() -> None:
    from sklearn.decomposition import PCA

    x = np.random.default_rng(0).standard_normal((50, 20)).astype(np.float32) * np.arange(1, 21)
    points, shares = principal_components(x.astype(np.float32))
    peer = PCA(2).fit(x)
    assert np.abs(np.abs(points) - np.abs(peer.transform(x))).max() < 1e-3
    np.testing.assert_allclose(shares, peer.explained_variance_ratio_, rtol=1e-5)


def test_maps_of_few_or_equal_photos() -> None:
    assert tsne(np.ones((4, 3), np.float32)) is None
    assert tsne(np.ones((40, 3), np.float32)) is None
    points, shares = principal_components(np.ones((2, 1), np.float32))
    assert points.shape == (2, 2)
    assert shares == (0, 0)
    assert len(sample_points(10 * MAX_POINTS)) == MAX_POINTS


def test_tsne_separates_classes() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((40, 16)).astype(np.float32)
    x[20:] += 20
    points = tsne(x)
    first, second = points[:20], points[20:]
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * first.std()
