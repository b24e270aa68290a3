"""`examples/monotone.py`: networks that must rise do, measured by hand in float64."""

import functools as ft

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import monotone
import numpy as np
import pytest
from common import table
from common.run import Failure
from scripts import ROOT
from sklearn.datasets import load_diabetes
from trainer import (
    assert_left,
    assert_one_line,
    completed,
    numbers,
    rows,
    run_of,
    saved_arrays,
    strict_json,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


run = ft.partial(run_of, monotone.MonotoneFlags, monotone.train, "--quick")

# What each way makes of the weights that it keeps.
MADE = {
    "straight": lambda raw: np.maximum(raw, 0),
    "positive": lambda raw: np.logaddexp(0, raw),
    "project": lambda raw: raw,
    "convex": lambda raw: np.maximum(raw, 0),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("monotone")
    return completed(run, out)


def weights(finished, name):
    """The weights of the first seed, by layer, as they are computed with."""
    kept = {"rising", "hidden", "readout"}
    found = {}
    for key, array in saved_arrays(finished).items():
        way, *path = key.split(".params.")
        if way == name and path:
            path = path[0].split(".")
            value = np.asarray(array[0], np.float64)
            if path[0] in kept and path[-1] == "weight" and name in MADE:
                value = MADE[name](value)
            found[f"{path[0]}.{path[-1]}"] = value
    return found


def network(w, x):
    def maxmin(h):
        pairs = h.reshape(len(h) // 2, 2)
        return np.sort(pairs, axis=1).ravel()

    h = w["rising.weight"] @ x[:3] + w["others.weight"] @ x[3:] + w["others.bias"]
    h = w["hidden.weight"] @ maxmin(h) + w["hidden.bias"]
    return (w["readout.weight"] @ maxmin(h) + w["readout.bias"])[0]


def convex_network(w, x):
    h = np.logaddexp(0, w["first.weight"] @ x + w["first.bias"])
    h = w["hidden.weight"] @ h + w["past_hidden.weight"] @ x + w["hidden.bias"]
    h = np.logaddexp(0, h)
    out = w["readout.weight"] @ h + w["past_readout.weight"] @ x + w["readout.bias"]
    return out[0]


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 5 * 10 * 2
    methods = strict_json(finished / "results.json")["methods"]
    assert list(methods) == [*monotone.MonotoneFlags.QUICK["methods"], "line"]


@pytest.mark.parametrize("name", ["straight", "project", "positive"])
def test_a_network_that_must_rise_does(finished, name):
    w = weights(finished, name)
    for layer in ("rising", "hidden", "readout"):
        assert w[f"{layer}.weight"].min() >= 0
    rng = np.random.default_rng(0)
    rises = []
    for x in rng.uniform(-5, 5, (200, 10)):
        for i in range(3):
            step = np.zeros(10)
            step[i] = rng.uniform(0, 2)
            rises.append(network(w, x + step) - network(w, x))
    assert min(rises) >= -1e-12 and max(rises) > 0
    result = strict_json(finished / "results.json")["methods"][name]
    assert min(result["smallest_slope"]["seeds"]) >= 0
    assert result["falling_share"]["largest"] == 0


def test_a_convex_network_bends_upwards_alone(finished):
    w = weights(finished, "convex")
    rng = np.random.default_rng(1)
    bends = []
    for x, step in rng.uniform(-3, 3, (200, 2, 10)):
        two = convex_network(w, x + step) + convex_network(w, x - step)
        bends.append(two - 2 * convex_network(w, x))
    assert min(bends) >= -1e-12 and max(bends) > 0
    result = strict_json(finished / "results.json")["methods"]["convex"]
    assert min(result["smallest_bend"]["seeds"]) >= -1e-9


def test_a_sorted_network_may_bend_both_ways(finished):
    # With ReLU in place of MaxMin it could not, and would be a poor fit.
    methods = strict_json(finished / "results.json")["methods"]
    assert max(methods["straight"]["smallest_bend"]["seeds"]) < -1e-3


def test_what_is_reported_is_the_error_by_hand(finished):
    data = table.load("diabetes").first(("bmi", "bp", "s5"))
    split = table.split(442, 2)
    rest = np.concatenate([split.train[0], split.validation[0]])
    assert sorted([*rest, *split.test]) == list(range(442))
    x = (data.inputs - data.inputs[rest].mean(axis=0)) / data.inputs[rest].std(axis=0)
    mean, deviation = data.target[rest].mean(), data.target[rest].std()
    w = weights(finished, "positive")
    found = np.array([mean + deviation * network(w, row) for row in x[split.test]])
    error = np.sqrt(np.mean((found - data.target[split.test]) ** 2))
    methods = strict_json(finished / "results.json")["methods"]
    assert methods["positive"]["test_error"]["seeds"][0] == pytest.approx(error, 1e-4)


def test_a_network_that_falls_is_found_out():
    data = table.load("diabetes").first(("bmi", "bp", "s5"))
    split = table.split(442, 2)
    measure = monotone.measure_on(table.scaled(data, split), split, 3, False)
    new = eqx.filter_vmap(lambda key: monotone.Network(3, 10, 8, key=key))
    kept = monotone.make_method("straight", 1e-3, 0.0)
    rising = kept.finish(eqx.filter_vmap(kept.wrap)(new(jr.split(jr.key(0), 2))))
    assert measure(rising)["smallest_slope"].min() >= 0
    falling = eqx.tree_at(
        lambda model: model.readout.weight, rising, replace_fn=jnp.negative
    )
    assert measure(falling)["smallest_slope"].max() < 0
    assert measure(falling)["falling_share"].min() > 0.9


def test_a_finished_run_goes_on_to_the_same_numbers(finished, tmp_path):
    few = ("--methods", "free", "straight", "--out", tmp_path)
    assert run(*few, "--epochs", 4).code == 0
    assert run(*few, "--resume").code == 0
    methods, lines = numbers(tmp_path)
    wanted, all_lines = numbers(finished)
    assert methods == {name: wanted[name] for name in ("free", "straight", "line")}
    assert lines == [x for x in all_lines if x["method"] in ("free", "straight")]


def test_names_of_the_diabetes_data_are_right():
    assert table.DIABETES == tuple(load_diabetes()["feature_names"])


def test_a_table_of_ones_own(tmp_path):
    file = tmp_path / "own.csv"
    x = np.random.default_rng(0).normal(size=(60, 2))
    lines = [f"{a},{b},{a - b}" for a, b in x]
    file.write_text("\n".join(["price,age,worth", *lines]))
    found = table.load(str(file)).first(("age",))
    assert found.names == ("age", "price")
    np.testing.assert_array_equal(found.inputs, x[:, ::-1])
    np.testing.assert_array_equal(found.target, x[:, 0] - x[:, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "must name three or more columns"),
        ("", "must name three or more columns"),
        ("a,b,c\n1,2,x\n", "row 2: could not convert string to float: 'x'"),
        ("a,b,c\n1,2,3\n", "30 rows or more of finite numbers are needed"),
        ("a,b,c\n" + "1,2,nan\n" * 40, "30 rows or more of finite numbers"),
    ],
)
def test_a_broken_table_is_one_clear_line(tmp_path, text, message):
    file = tmp_path / "own.csv"
    file.write_text(text)
    with pytest.raises(Failure, match=message):
        table.load(str(file))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--width", 3), "--width must be even and at least 2, got 3"),
        (
            ("--increasing", "bmi", "weight"),
            "--increasing must be some, not all, of age, sex",
        ),
        (("--increasing", "bmi", "bmi"), "--increasing must be named once each"),
        (("--batch-size", 300), "--batch-size must be at most 236 here"),
        (("--learning-rate", "nan"), "--learning-rate must be at least 0 and finite"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=2)


def test_data_that_is_not_there_is_one_clear_line(tmp_path):
    outcome = run("--out", tmp_path / "new", "--data", "nowhere.csv")
    assert_one_line(outcome, "nowhere.csv is not a file (nor is it `diabetes`)")


@pytest.fixture(scope="module")
def published():
    path = ROOT / "docs" / "gallery" / "monotone.json"
    return strict_json(path)["methods"]


def test_the_page_has_networks_that_rise_and_free_ones_that_do_not(published):
    for name in ("clip", "straight", "project", "positive", "bare_positive"):
        assert min(published[name]["smallest_slope"]["seeds"]) >= 0
        assert published[name]["falling_share"]["largest"] == 0
    assert published["bare"]["smallest_slope"]["largest"] < 0
    assert min(published["free"]["smallest_slope"]["seeds"]) > 0
    assert min(published["convex"]["smallest_bend"]["seeds"]) >= -1e-9
    assert published["positive"]["smallest_bend"]["largest"] < 0


def test_the_page_has_errors_of_which_it_says_the_truth(published):
    error = {name: result["test_error"]["mean"] for name, result in published.items()}
    assert error["bare"] > error["bare_positive"] + 5
    for name in ("clip", "straight", "project", "positive"):
        assert error["free"] - 2 < error[name] < error["free"]
    assert error["convex"] == min(error.values())
    assert abs(error["free"] - error["line"]) < 0.5
    assert error["convex"] > error["line"] - 2
    assert all(
        len(result["test_error"]["seeds"]) == 20 for result in published.values()
    )


def test_the_note_says_what_was_found():
    result = lambda slopes, error: {
        "smallest_slope": {"seeds": slopes},
        "test_error": {"mean": error},
    }
    results = {
        "bare": result([-9.0, -9.0], 66.0),
        "free": result([-3.0, 2.0], 60.0),
        "positive": result([0.0, 1.0], 55.5),
        "bare_positive": result([0.0, 1.0], 57.5),
    }
    assert monotone.note(results) == (
        "No penalty: 2 of 2 free networks fall, error 66.0; positive: 0, 57.5. "
        "Penalty tuned: 1 and 0, 60.0 and 55.5."
    )
    assert monotone.note({"free": results["free"]}) == ""
