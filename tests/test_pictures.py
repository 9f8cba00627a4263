"""Pictures that can be read: titles within their width, lines apart for any count, scales for any colour vision."""

from __future__ import annotations

from itertools import pairwise

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from longrun.patterns.compare_maps import draw_comparison
from longrun.patterns.head_map import HeadMap
from longrun.patterns.head_map_picture import draw_head_map
from longrun.pictures import SCALE, series_style, wrapped

LONG = "some/folder/of/maps/" + "/".join(f"a-model-with-a-long-name-{number}" for number in range(4))


def lightness(colour) -> float:
    red, green, blue = to_rgb(colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_scale_grows_lighter_all_the_way():
    shades = [lightness(matplotlib.colormaps[SCALE](step / 20)) for step in range(21)]
    assert all(one < other for one, other in pairwise(shades)) and shades[-1] - shades[0] > 0.6


def test_any_number_of_series_can_be_told_apart():
    styles = [series_style(number) for number in range(300)]
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 300
    assert len({(style["color"], style["marker"]) for style in styles[:77]}) == 77
    for one, other in pairwise(styles):
        assert one["color"] != other["color"] and one["marker"] != other["marker"]
    axes = Figure().subplots()
    for style in styles[:40]:
        axes.plot([0, 1], [0, 1], **style)


def test_text_is_broken_to_its_width():
    assert wrapped("short", 5, 10) == "short" and wrapped("two\nlines", 5, 10) == "two\nlines"
    lines = wrapped(LONG, 3, 10).splitlines()
    assert len(lines) > 2 and "".join(lines) == LONG and max(map(len, lines)) <= 3 * 72 / 6


@pytest.mark.parametrize("heads", [1, 3, 32])
def test_titles_of_head_maps_stay_apart_and_inside(tmp_path, monkeypatch, heads):
    drawn = []
    save = Figure.savefig

    def measure(figure: Figure, *args, **kwargs) -> None:
        save(figure, *args, **kwargs)
        figure.draw_without_rendering()  # at the dpi of the figure again
        texts = [panel.title for panel in figure.axes if panel.get_title()] + [figure._suptitle]
        drawn.append((figure.bbox, [text.get_window_extent() for text in texts]))

    monkeypatch.setattr(Figure, "savefig", measure)
    one, other = HeadMap.uniform(4, heads, 0.5), HeadMap.uniform(4, heads, 0.25)
    draw_comparison(one, other, 0.5, (f"{LONG}/a", f"{LONG}/b"), "Spearman " * 12, tmp_path / "compare.png")
    draw_head_map(one, one.split(), f"{LONG}\n2 retrieval heads", tmp_path / "show.png")
    assert len(drawn) == 2
    for whole, boxes in drawn:
        assert all(box.x0 >= 0 and box.x1 <= whole.width and box.y1 <= whole.height for box in boxes)
        assert not any(box.overlaps(later) for number, box in enumerate(boxes) for later in boxes[number + 1 :])
