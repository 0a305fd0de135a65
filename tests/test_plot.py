"""bench/plot.py: lines that tell settings apart, the newest of repeated rows, and errors in a line."""

from __future__ import annotations

import csv
import importlib

import pytest

CASE = {
    "op": "lora_linear", "format": "nf4-nested", "method": "lora", "K": "64", "N": "32", "R": "16", "M": "1",
    "dtype": "bfloat16", "dropout": "0.0", "layers": "Tiny.up", "device": "CPU", "threads": "1",
    "cold": "True", "date": "2026-01-01", "commit": "abc", "noisy": "False", "provider": "ours",
    "measure": "forward+backward", "p20": "0.9", "p50": "1", "p80": "1.1", "over_dense": "2",
    "saved_bytes": "1024", "peak_bytes": "2048",
    "gb_per_s": "10", "tflop_per_s": "1", "roofline_percent": "50",
}  # fmt: skip
OTHERS = {
    "format": "fp4", "R": "64", "dtype": "float32", "dropout": "0.1", "device": "GPU", "threads": "2",
    "cold": "False",
}  # fmt: skip
TOLD = ("fp4", "R=64", "float32", "dropout 0.1", "GPU", "2 threads", "warm caches")


@pytest.fixture
def plot():
    return importlib.import_module("peft_fast.bench.plot")


@pytest.fixture
def write(tmp_path):
    """Writes rows, each as the differences from `CASE`, and returns the file."""

    def written(*rows):
        path = tmp_path / "suite.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(CASE))
            writer.writeheader()
            writer.writerows({**CASE, **row} for row in rows)
        return path

    return written


def lines(axis):
    """By label, {M: ratio} of the points of each line of an axis."""
    found = {line.get_label(): {} for line in axis.lines if not line.get_label().startswith("_")}
    for line in axis.lines:
        if (label := line.get_label().removeprefix("_")) in found:
            found[label] |= dict(zip(*line.get_data(), strict=True))
    return found


def drawn(plot, path, kind="ratio"):
    return plot.KINDS[kind](plot.read(path))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("column", "told"), zip(OTHERS, TOLD, strict=True))
def test_what_varies_has_a_line_of_its_own(plot, write, column, told):
    values = {CASE[column]: 2, OTHERS[column]: 5}
    rows = [{"M": M, column: value, "over_dense": values[value]} for value in values for M in ("1", "16")]
    figure = drawn(plot, write(*rows, {"provider": "peft"}))
    (axis,) = figure.axes
    found = lines(axis)
    assert found[f"ours, {told}"] == {1: 5.0, 16: 5.0}
    (other,) = set(found) - {f"ours, {told}"} - {label for label in found if label.startswith("peft")}
    assert found[other] == {1: 2.0, 16: 2.0}
    assert {line.get_linestyle() for line in axis.lines if line.get_label() in found} == {"-", "--"}
    assert legend(figure) == [*found, "frozen dense layer"]
    assert told not in axis.get_title()


def test_what_does_not_vary_within_axes_is_in_their_titles(plot, write):
    shapes = ({"K": "64", "R": "16"}, {"K": "128", "R": "64"})
    rows = [{**shape, "M": M} for shape in shapes for M in ("1", "16", "300")]
    figure = drawn(plot, write(*rows))
    titles = [axis.get_title() for axis in figure.axes]
    assert ["R=16" in title for title in titles] == [True, False]
    assert ["R=64" in title for title in titles] == [False, True]
    for axis in figure.axes:
        assert list(lines(axis)) == ["ours"]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "16", "300"]
        assert axis.get_xscale() == "log"
        assert [line.get_ydata()[0] for line in axis.lines if line.get_color() == plot.DENSE] == [1]


def test_points_lines_and_bands_are_faint_where_an_end_is_noisy(plot, write):
    rows = [{"M": str(M), "noisy": str(M in (16, 1024))} for M in (1, 4, 16, 64, 256, 1024)]
    (axis,) = drawn(plot, write(*rows)).axes
    points = {line.get_xdata()[0]: line.get_alpha() for line in axis.lines if line.get_label() == "_ours"}
    faint = plot.FAINT
    assert points == {1: 1, 4: 1, 16: faint, 64: 1, 256: 1, 1024: faint}
    parts = [line for line in axis.lines if len(line.get_xdata()) > 1 and line.get_color() != plot.DENSE]
    expected = [([1, 4], 1), ([4, 16, 64], faint), ([64, 256], 1), ([256, 1024], faint)]
    assert [(list(line.get_xdata()), line.get_alpha()) for line in parts] == expected
    bands = [(band.get_paths()[0].vertices[:, 0], band.get_alpha()) for band in axis.collections]
    assert [([x.min(), x.max()], alpha) for x, alpha in bands] == [
        ([Ms[0], Ms[-1]], plot.BAND_ALPHA * alpha) for Ms, alpha in expected
    ]


def test_the_legend_covers_no_axes(plot, write):
    figure = drawn(plot, write({}, {"M": "16"}, {"provider": "peft-compile"}))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_the_newest_run_of_a_row_counts_and_the_others_are_told(plot, write, capsys):
    new, old, same_day = ({"date": "2026-02-01", "over_dense": "3"}, {"over_dense": "4"}, {"over_dense": "5"})
    rows = [{**new, "M": "1"}, {**old, "M": "1"}, {**old, "M": "16"}, {**same_day, "M": "16"}]
    path = write(*rows)
    (axis,) = drawn(plot, path).axes
    assert lines(axis) == {"ours": {1: 3.0, 16: 5.0}}
    assert capsys.readouterr().err == f"{path}: left out 2 rows of earlier runs, the newest of each counts\n"
    drawn(plot, write({}, {"M": "16"}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("where", "ranks"),
    [(["rank=16"], {"16"}), (["R=64,256"], {"64", "256"}), (["threads=1", "R=8.0"], {"8"}),
     (["device=C*", "provider=ours"], {"8", "16", "64", "256"})],
)  # fmt: skip
def test_where_chooses_rows(plot, write, tmp_path, monkeypatch, where, ranks):
    rows = [
        {"R": R, "provider": name} for R in ("8", "16", "64", "256") for name in ("ours", "ours[reference]")
    ]
    path, seen = write(*rows), []
    monkeypatch.setitem(plot.KINDS, "ratio", lambda rows: seen.extend(rows) or plot.ratio(rows))
    assert (
        plot.command(["ratio", "--csv", str(path), "--out", str(tmp_path / "x.png"), "--where", *where]) == 0
    )
    assert {row["R"] for row in seen} == ranks


def test_where_takes_brackets_of_names_as_they_are(plot, write, tmp_path, monkeypatch):
    path, seen = write({}, {"provider": "ours[reference]"}), []
    monkeypatch.setitem(plot.KINDS, "ratio", lambda rows: seen.extend(rows) or plot.ratio(rows))
    options = ["--out", str(tmp_path / "x.png"), "--where", "provider=ours[reference]"]
    assert plot.command(["ratio", "--csv", str(path), *options]) == 0
    assert [row["provider"] for row in seen] == ["ours[reference]"]


def test_rows_without_a_ratio_are_left_out(plot, write):
    dense = {"provider": "dense-bfloat16", "over_dense": "1"}
    rows = [{"over_dense": ""}, {"M": "16"}, {**dense, "K": "128"}, dense]
    (axis,) = drawn(plot, write(*rows)).axes
    assert lines(axis) == {"ours": {16: 2.0}}


def test_memory_has_a_bar_for_each_variant_and_one_of_the_dense_layer(plot, write):
    dense = {"provider": "dense-bfloat16", "peak_bytes": "4096"}
    rows = [{**row, "R": R} for R in ("16", "64") for row in ({"peak_bytes": R}, dense)]
    (axis,) = drawn(plot, write(*rows), "memory").axes
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert names == ["ours, R=16", "ours, R=64", "dense-bfloat16"]
    widths = [bar.get_width() * 2**20 for bar in axis.containers[0]]
    assert widths == [16, 64, 4096]


def test_roofline_tells_methods_and_settings_apart(plot, write):
    rows = [{"method": method, "R": R} for method in ("lora", "dora") for R in ("16", "64")]
    figure = drawn(plot, write(*rows, {"provider": "dense-float32"}), "roofline")
    expected = {f"ours, {method}, R={R}" for method in ("lora", "dora") for R in (16, 64)}
    assert set(legend(figure)) == {*expected, "dense-float32"}
    (axis,) = figure.axes
    shapes = {points.get_paths()[0].vertices.tobytes() for points in axis.collections}
    assert len(shapes) == 5


@pytest.mark.parametrize(
    ("kind", "options", "rows", "message"),
    [
        ("ratio", ["--csv", "missing.csv"], [{}], "No such file or directory: 'missing.csv'"),
        ("ratio", ["--where", "R=3"], [{}], "expected rows for the options, got none of 1"),
        ("ratio", ["--where", "ranks=3"], [{}], "--where: expected COLUMN=VALUE with one of"),
        ("ratio", ["--where", "R"], [{}], "--where: expected COLUMN=VALUE with one of"),
        ("ratio", [], [{"p50": ""}], "--csv: expected rows with figures, got none"),
        ("ratio", [], [{"over_dense": ""}], "ratio: expected rows of adapted layers beside a dense one"),
        ("ratio", [], [{"provider": "dense-bfloat16"}], "ratio: expected rows of adapted layers beside"),
        ("ratio", [], [{"R": R} for R in "12345"], "ratio: lines of a provider: expected at most 4 that can "
         "be told apart by R, got 5 (R=1, R=2, R=3, R=4, R=5): choose with --where"),
        ("ratio", [], [{"K": str(K)} for K in range(13)], "expected at most 12 cases with axes of their own"),
        ("ratio", [], [{"provider": f"ours[{i}]"} for i in range(5)], "backends of ours: expected at most 4"),
        ("memory", ["--measure", "dX"], [{"measure": "dX", "saved_bytes": "", "peak_bytes": ""}],
         "memory: expected --measure forward+backward, which it is known of, got dX"),
        ("memory", [], [{"R": str(R)} for R in range(17)], "memory: bars of a case: expected at most 16"),
        ("roofline", [], [{"roofline_percent": ""}], "roofline: expected rows of a device whose peak"),
        ("roofline", [], [{"R": str(R)} for R in range(9)], "roofline: points: expected at most 8"),
        ("ratio", ["--out", "no/such/folder.png"], [{}], "No such file or directory"),
        ("ratio", ["--out", "x.doc"], [{}], "doc"),
    ],
)  # fmt: skip
def test_errors_are_a_line_on_stderr(
    plot, write, tmp_path, monkeypatch, capsys, kind, options, rows, message
):
    monkeypatch.chdir(tmp_path)
    code = plot.command([kind, "--csv", str(write(*rows)), "--out", "x.png", *options])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("plot: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.glob("x.*"))
