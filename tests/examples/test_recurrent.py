"""`examples/recurrent.py`: its numbers, against NumPy's in double precision."""

import functools as ft
import json

import equinox as eqx
import eqxreg
import jax
import jax.extend
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import quick
import recurrent
import wheel
from common import sequences
from scripts import ROOT
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


run = ft.partial(run_of, recurrent.RecurrentFlags, recurrent.train, "--quick")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compilation):
    out = tmp_path_factory.mktemp("recurrent")
    return completed(run, out)


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 4 * 3 * 2
    results = strict_json(finished / "results.json")
    assert list(results["methods"]) == ["tanh", "start", "orthogonal", "gru"]
    assert results["data"]["name"] == "copying"


def test_the_orthogonal_weights_stay_so_and_the_others_do_not(finished):
    found = strict_json(finished / "results.json")["methods"]
    distance = {name: x["distance_to_orthogonal"] for name, x in found.items()}
    assert distance["orthogonal"]["largest"] < 1e-6
    assert min(distance["start"]["seeds"]) > 1e-3
    assert min(distance["tanh"]["seeds"]) > 0.1
    # What is trained is any matrix, and what is computed with the nearest orthogonal.
    (raw,) = (
        array
        for name, array in saved_arrays(finished).items()
        if name.startswith("orthogonal.params.cell.recurrent") and array.ndim == 3
    )
    values = np.linalg.svd(raw.astype(np.float64), compute_uv=False)
    assert np.abs(values - 1).max() > 1e-5


def test_a_finished_run_goes_on_to_the_same_numbers(finished, tmp_path):
    assert run("--out", finished, "--resume").code == 0
    assert run("--out", tmp_path).code == 0
    assert numbers(tmp_path) == numbers(finished)


def test_other_rates_are_another_run(finished):
    outcome = run("--out", finished, "--resume", "--recurrent-share", 0.5)
    assert_one_line(outcome, "--resume: recurrent_share is 0.5 now, but was None in")


def task(length=4):
    return sequences.copying(length, 32)


def test_the_symbols_come_again_after_the_sign():
    inputs, targets = task().read(task().test, jr.key(0))
    assert inputs.shape == (128, 24, 9) and targets.shape == (128, 24)
    kinds = np.where(inputs.any(axis=2), inputs.argmax(axis=2) + 1, 0)
    np.testing.assert_array_equal(kinds[:, :10], targets[:, 14:])
    assert set(kinds[:, :10].ravel()) == set(range(1, 9))
    assert not kinds[:, 10:13].any() and not kinds[:, 14:].any()
    assert np.all(kinds[:, 13] == 9) and not targets[:, :14].any()


def test_sequences_to_train_on_are_new_in_every_step():
    first, second = (task().read(task().train, jr.key(i))[1] for i in range(2))
    assert jnp.mean(first[:, 14:] == second[:, 14:]) < 0.3


def test_the_baseline_is_the_loss_of_guessing():
    _, targets = task().read(task().test, jr.key(0))
    counts = [len(np.unique(column)) for column in np.asarray(targets).T]
    assert task().baseline == pytest.approx(np.log(counts).mean())
    # All is known but the symbols, which are equally likely.
    logits = np.full((24, 128, 9), -100.0)
    logits[:14, :, 0], logits[14:, :, 1:] = 100, 0
    loss, _ = task().judged(jnp.asarray(logits), targets)
    assert loss == pytest.approx(task().baseline, rel=1e-5)


def test_a_rotation_is_orthogonal():
    weight = np.asarray(recurrent.rotations(10, jr.key(0)), np.float64)
    np.testing.assert_allclose(weight @ weight.T, np.eye(10), atol=1e-6)
    assert np.abs(np.angle(np.linalg.eigvals(weight))).min() > 0


def new(name, key=0):
    return eqxreg.bake(recurrent.network(name, task(), 6, jr.key(key)))


def test_a_gradient_that_is_sent_back_is_a_product_of_jacobians():
    model = new("start", 1)
    model = eqx.tree_at(lambda m: m.cell.bias, model, jnp.full(6, -0.05))
    signal = quick.filter_jit(lambda model: recurrent.signal(task(), model))
    found = np.asarray(signal(model), np.float64)

    inputs, _ = task().read(task().test[:32], jr.key(0))
    weight, into = (
        np.asarray(linear.weight, np.float64)
        for linear in (model.cell.recurrent, model.cell.inputs)
    )
    sent = np.asarray(jr.normal(jr.key(0), (32, 6)), np.float64)
    squares = np.zeros((32, 24))
    for row, (sequence, back) in enumerate(
        zip(np.asarray(inputs, np.float64), sent, strict=True)
    ):
        state, active = np.zeros(6), []
        for x in sequence:
            before = weight @ state + into @ x
            active.append(np.abs(before) > 0.05)
            state = np.sign(before) * np.maximum(np.abs(before) - 0.05, 0)
        back = back / np.linalg.norm(back)
        for step in reversed(range(24)):
            squares[row, step] = back @ back
            back = weight.T @ (active[step] * back)
    np.testing.assert_allclose(found, np.sqrt(squares.mean(axis=0)), rtol=1e-4)


def test_before_training_orthogonal_weights_keep_a_gradient_and_others_lose_it():
    np.testing.assert_allclose(
        recurrent.signal(task(), new("orthogonal")), 1, rtol=1e-5
    )
    tanh = recurrent.signal(task(30), new("tanh"))
    assert tanh[-1] == pytest.approx(1, abs=1e-5) and 0 < tanh[0] < 1e-4


def primitives(jaxpr, inside=False):
    """The names of all operations, and whether they are in a scan."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside
        below = inside or equation.primitive.name == "scan"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inner, below)


def in_loops(differentiate, baked):
    """The operations that a loss of orthogonal weights has in loops over time."""
    model = recurrent.network("orthogonal", task(), 6, jr.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        model = eqx.combine(params, static)
        if baked:
            return recurrent.loss(task(), model, task().train, jr.key(0))
        return recurrent.losses(task(), model, task().train, jr.key(0))[0]

    found = list(primitives(jax.make_jaxpr(differentiate(loss))(params).jaxpr))
    assert "svd" in {name for name, _ in found}
    return [name for name, inside in found if inside]


def test_the_weight_is_decomposed_once_and_not_in_each_step():
    assert "svd" in in_loops(lambda loss: loss, baked=False)
    assert "svd" not in in_loops(lambda loss: loss, baked=True)
    # Forwards: W h and V x. Backwards: the weights' gradients, and the states'.
    assert in_loops(jax.grad, baked=True).count("dot_general") == 5
    assert in_loops(jax.grad, baked=False).count("dot_general") > 10


def test_recurrent_weights_have_a_rate_of_their_own():
    for name in ("tanh", "orthogonal", "gru"):
        model = recurrent.network(name, task(), 6, jr.key(0))
        marked = recurrent.is_recurrent(eqx.filter(model, eqx.is_inexact_array))
        assert sum(jax.tree.leaves(marked)) == 1
        assert recurrent.recurrent_weights(marked) or name == "orthogonal"


def test_gates_have_about_as_many_recurrent_weights():
    gates, plain = (
        recurrent.recurrent_weights(recurrent.network(name, task(), 128, jr.key(0)))
        for name in ("gru", "tanh")
    )
    assert 0.9 < gates.size / plain.size < 1.1


def test_speakers_are_told_apart(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    classes = ["a", "b", "c"]
    folder = "aeon/datasets/data/JapaneseVowels/"
    members = {}
    for part, count in (("TRAIN", 48), ("TEST", 24)):
        labels = np.arange(count) % 3
        values = rng.normal(size=(count, 2, 5)) + labels[:, None, None]
        name = f"{folder}JapaneseVowels_eq_{part}.ts"
        members[name] = wheel.series(values, [classes[i] for i in labels], classes)
    monkeypatch.setattr(sequences, "VOWELS", wheel.write(tmp_path, members, "aeon"))
    out = tmp_path / "out"
    flags = ("--data", "vowels", "--cache", tmp_path, "--epochs", 20)
    assert run(*flags, "--methods", "orthogonal", "--out", out).code == 0
    results = strict_json(out / "results.json")
    assert results["data"]["training_examples"] == 48
    found = results["methods"]["orthogonal"]
    assert found["accuracy"]["mean"] > 0.6
    for loss, ratio in zip(
        found["loss"]["seeds"], found["loss_to_baseline"]["seeds"], strict=True
    ):
        assert ratio == pytest.approx(loss / np.log(3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--width", 3), "--width must be even and at least 2, got 3"),
        (("--data", "digits"), "--data must be `copying` or `vowels`, got digits"),
        (("--sequences", 8), "--sequences must be at least `batch_size`, got 8"),
        (("--learning-rate", 0), "--learning-rate must be positive and finite"),
        (("--recurrent-share", "nan"), "--recurrent-share must be positive and finite"),
        (("--first-seed", -1), "--first-seed must be at least 0, got -1"),
        (("--methods", "tanh", "tanh"), "--methods must be named once each"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=2)


def test_the_note_says_what_was_found():
    results = {
        name: {"accuracy": {"mean": mean}}
        for name, mean in (("tanh", 0.124), ("orthogonal", 0.9987))
    }
    flags = recurrent.RecurrentFlags(length=50)
    assert recurrent.note(flags, results) == (
        "Symbols right after 50 steps: 99.9 % with orthogonal weights, 12.4 % with "
        "plain ones, and 12.5 % by guessing."
    )
    vowels = recurrent.RecurrentFlags(data="vowels")
    assert "speaker: 99.9 % with" in recurrent.note(vowels, results)
    assert recurrent.note(flags, {"tanh": results["tanh"]}) == ""


def on_page(name):
    text = (ROOT / "docs" / "gallery" / f"{name}.json").read_text(encoding="utf-8")
    return json.loads(text)["methods"]


def test_the_page_is_right_about_the_symbols():
    found = on_page("recurrent")
    right = {name: result["accuracy"] for name, result in found.items()}
    assert min(right["orthogonal"]["seeds"]) > 0.98
    assert 0.6 < right["start"]["mean"] < 0.7
    assert right["tanh"]["largest"] < 0.15 and right["gru"]["largest"] < 0.17
    kept = {name: x["gradient_at_first_step"]["seeds"] for name, x in found.items()}
    assert min(kept["orthogonal"]) > 0.8 and max(kept["tanh"]) < 1e-12
    moved = {name: x["distance_to_orthogonal"] for name, x in found.items()}
    assert moved["orthogonal"]["largest"] < 1e-6 < 0.5 < moved["start"]["mean"]
    # The dashed line, from which the plain network does not part.
    lowest = min(found["tanh"]["loss_to_baseline"]["seeds"])
    assert 0.99 < lowest and found["tanh"]["loss_to_baseline"]["largest"] < 1.01


def test_the_page_is_right_about_the_speakers():
    found = on_page("recurrent-vowels")
    right = {name: result["accuracy"]["mean"] for name, result in found.items()}
    assert min(right.values()) >= 0.97 and max(right, key=lambda n: right[n]) == "gru"
    assert found["tanh"]["gradient_at_first_step"]["largest"] < 1e-6
