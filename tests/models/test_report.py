"""Reports: rows, labels, and every form of the table; and what metrics and reports
refuse."""

import builtins
import json
import re

import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eqxreg._models._report import _label
from quick import filter_jit


pytestmark = pytest.mark.usefixtures("quick_compilation")


# Errors


def test_nothing_selected_is_an_error(mlp):
    for fn in (eqxreg.metrics, eqxreg.report):
        with pytest.raises(ValueError, match="selects nothing"):
            fn(mlp, eqxreg.embeddings)


def test_a_map_that_is_no_projection_is_an_error(mlp):
    for fn in (eqxreg.metrics, eqxreg.report):
        with pytest.raises(TypeError, match="Projection"):
            fn(mlp, projection=eqxreg.Positive())


def test_a_report_inside_jit_says_what_to_use(mlp):
    with pytest.raises(TypeError, match="use `eqxreg.metrics`"):
        filter_jit(lambda model: eqxreg.report(model).rows)(mlp)


# The report


def test_rows_say_what_is_known_of_a_weight(key):
    model = {
        "conv": eqx.nn.Conv2d(1, 2, 3, dtype=jnp.bfloat16, key=key),
        "weight": jnp.ones(2, jnp.complex64),
    }
    conv, plain = eqxreg.report(model).rows
    assert (conv.path, conv.layer) == ("['conv'].weight", "Conv2d")
    assert (conv.shape, conv.dtype) == ((2, 1, 3, 3), "bfloat16")
    assert (plain.path, plain.layer) == ("['weight']", "")
    assert (plain.shape, plain.dtype) == ((2,), "complex64")
    assert (plain.map, plain.distance, plain.active) == ("", None, None)


@pytest.mark.parametrize(
    "projection, label",
    [
        (eqxreg.MaxNorm(2.0, axis="unit"), "MaxNorm(2.0, axis='unit')"),
        (eqxreg.MaxNorm(jnp.array(2.0)), "MaxNorm(2)"),
        (eqxreg.MinMaxNorm(0.5, 2.0, rate=0.5), "MinMaxNorm(0.5, 2.0, rate=0.5)"),
        (eqxreg.UnitNorm(), "UnitNorm()"),
        (eqxreg.SpectralNorm(0.5, blocks=2), "SpectralNorm(norm=0.5, blocks=2)"),
        (eqxreg.Masked(jnp.ones((4, 3), bool)), "Masked(bool[4,3])"),
        (
            eqxreg.StraightThrough(eqxreg.Box(-1.0, 1.0)),
            "StraightThrough(Box(-1.0, 1.0))",
        ),
        (
            eqxreg.Chain(eqxreg.NonNegative(), eqxreg.UnitNorm()),
            "NonNegative() → UnitNorm()",
        ),
    ],
    ids=str,
)
def test_a_label_is_what_the_user_wrote(projection, label):
    assert _label(projection) == label


@pytest.fixture(scope="module")
def report():
    mlp = eqx.nn.MLP(4, 4, 4, depth=2, key=jax.random.key(0))
    model = {"<b>": mlp, "weight": jnp.ones((4, 4))}
    last = eqxreg.select(where=lambda path, layer, array: "layers[2]" in path)
    model = eqxreg.constrain(model, eqxreg.MaxNorm(0.3, axis="unit"), where=last)
    return eqxreg.report(model)


COLUMNS = (
    "path", "shape", "dtype", "layer", "map",
    "bounded", "norm", "σ₁", "stable rank", "distance", "active",
)  # fmt: skip


def cells_of(text):
    """The cells of a table in which two spaces or more separate columns."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def without(monkeypatch, package):
    original = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


def test_the_table_has_the_same_cells_without_rich(report, monkeypatch):
    with_rich = cells_of(str(report))
    without(monkeypatch, "rich")
    head, _, *body = cells_of(str(report))
    assert head == list(COLUMNS)
    assert with_rich == [head, *body]
    assert len(body) == len(report.rows)


def test_the_table_has_the_numbers(report):
    last = report.rows[2]
    assert last.map and last.distance is not None and last.active is not None
    [line] = [cells for cells in cells_of(str(report)) if "layers[2]" in cells[0]]
    assert line == [
        last.path,
        "4×4",
        "float32",
        "Linear",
        "MaxNorm(0.3, axis='unit')",
        f"{last.bounded:.4g}",
        f"{last.norm:.4g}",
        f"{last.singular_value:.4g}",
        f"{last.stable_rank:.4g}",
        f"{last.distance:.4g}",
        f"{last.active:.1%}",
    ]


RAW = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
TOP = lambda matrix: np.linalg.svd(matrix.astype("float64"), compute_uv=False)[0]
BOUNDED = {
    "unit": (eqxreg.MaxNorm(0.5, axis="unit"), 0.5),
    "ring": (eqxreg.MinMaxNorm(0.1, 9.0), np.linalg.norm(RAW)),
    "taxicab": (eqxreg.MaxNorm(0.3, axis="unit", ord=1), 0.3),
    "largest": (eqxreg.MaxNorm(99.0, ord=jnp.inf), abs(RAW).max()),
    "spectral": (eqxreg.SpectralScale(99.0), TOP(RAW)),
    "blocks": (eqxreg.SpectralCap(99.0, blocks=2), max(TOP(RAW[:3]), TOP(RAW[3:]))),
    "last": (eqxreg.Chain(eqxreg.NonNegative(), eqxreg.UnitNorm()), 1.0),
    "through": (eqxreg.StraightThrough(eqxreg.MaxNorm(0.5)), 0.5),
    "relative": (
        eqxreg.Relative(eqxreg.MaxNorm(0.5, axis="unit")),
        0.5 * np.linalg.norm(RAW, axis=1).max(),
    ),
}


@pytest.mark.parametrize(("p", "norm"), BOUNDED.values(), ids=BOUNDED)
def test_a_report_shows_the_norm_that_is_bounded(key, p, norm):
    layer = eqx.nn.Linear(4, 6, key=key)
    layer = eqx.tree_at(lambda node: node.weight, layer, jnp.asarray(RAW))
    [row] = eqxreg.report(eqxreg.constrain(layer, p)).rows
    assert row.bounded == pytest.approx(norm, rel=2e-3)
    # Without a wrapper it is that of the weight as it is.
    if not isinstance(p, eqxreg.Relative):
        [row] = eqxreg.report(layer, projection=p).rows
        [free] = eqxreg.report(layer, projection=eqxreg.MaxNorm(99.0)).rows
        assert row.bounded >= norm * (1 - 1e-5) and row.norm == free.norm


def test_what_bounds_no_norm_of_the_weight_says_so(key):
    linear = eqx.nn.Linear(4, 6, key=key)
    [row] = eqxreg.report(linear, projection=eqxreg.NonNegative()).rows
    assert row.bounded is None and row.distance is not None
    conv = eqx.nn.Conv2d(1, 2, 3, key=key)
    conv, state = eqx.nn.make_with_state(eqxreg.SpectralNormConstraint)(
        conv, "weight", input_shape=(1, 6, 6), key=key
    )
    report = eqxreg.report(conv, state=state)
    [row] = report.rows
    assert row.map == "SpectralNorm()" and row.bounds_operator
    assert row.bounded is None and row.singular_value < 0.99
    assert cells_of(str(report))[-1][5] == "operator"


def test_the_table_has_no_colour_codes(report, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in str(report)
    assert repr(report) == str(report)


def test_rich_prints_a_report(report, capsys):
    import rich

    rich.print(report)
    text = capsys.readouterr().out
    assert "float32" in text and f"{report.rows[0].norm:.4g}" in text


def test_to_dict_goes_through_json(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert list(found) == [row.path for row in report.rows]
    for row in report.rows:
        entry = found[row.path]
        assert entry.pop("shape") == list(row.shape)
        assert all(getattr(row, name) == value for name, value in entry.items())
        assert len(entry) == len(vars(row)) - 2


def test_html_has_a_cell_for_each_and_is_escaped(report):
    text = report._repr_html_()
    assert text.count("<th>") == len(COLUMNS)
    assert text.count("<td>") == len(COLUMNS) * len(report.rows)
    assert "<b>" not in text
    assert "<td>[&#x27;&lt;b&gt;&#x27;].layers[0].weight</td>" in text


def test_a_plot_has_two_bars_for_each_weight(report):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = report.plot()
    norms, values = ax.containers
    np.testing.assert_allclose(norms.datavalues, [row.norm for row in report.rows])
    np.testing.assert_allclose(
        values.datavalues, [row.singular_value for row in report.rows]
    )
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [row.path for row in report.rows]
    assert report.plot(ax) is ax
    plt.close(ax.figure)


def test_a_plot_without_matplotlib_says_what_to_install(report, monkeypatch):
    without(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match=r'pip install "eqxreg\[examples\]"'):
        report.plot()
