"""`examples/charlm.py`: its bounds, against NumPy's singular values in float64."""

import functools as ft

import charlm
import equinox as eqx
import eqxreg
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from common import text
from common.run import Failure
from common.transformer import Transformer
from scripts import ROOT
from trainer import (
    assert_left,
    assert_one_line,
    completed,
    numbers,
    rows,
    run_of,
    saved_arrays,
    saved_state,
    strict_json,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")

run = ft.partial(run_of, charlm.CharlmFlags, charlm.train, "--quick")
# A cap that binds from the start, and a strong decay.
STRENGTH = 0.8
# All but one, which `beside` has.
METHODS = tuple(name for name in charlm.LABELS if name != "adam_cap")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compilation):
    out = tmp_path_factory.mktemp("charlm")
    return completed(run, out, "--strength", STRENGTH, "--methods", *METHODS)


@pytest.fixture(scope="module")
def beside(tmp_path_factory, quick_compilation):
    out = tmp_path_factory.mktemp("beside")
    methods = ("adam_cap", "adam_decay")
    assert run("--out", out, "--strength", STRENGTH, "--methods", *methods).code == 0
    return out


def results(out):
    return strict_json(out / "results.json")["methods"]


def test_a_run_leaves_its_results(finished):
    assert_left(finished)
    assert len(rows(finished)) == 6 * 3 * 2
    found = strict_json(finished / "results.json")
    assert tuple(found["methods"]) == METHODS
    assert found["data"]["name"] == "stdlib" and found["data"]["bytes"] > 1e6


def quick_flags(**given):
    return charlm.CharlmFlags(**{**charlm.CharlmFlags.QUICK, **given})


def arm(name, out=None):
    """A way to train, and the trained models of all seeds if there was a run."""
    flags = quick_flags(methods=(name,), strength=STRENGTH)
    _, parts = text.parts("stdlib", flags.length, flags.windows)
    (arm,) = charlm.make_arms(flags, parts.train)
    state = arm.start if out is None else saved_state(arm, out)
    return arm.finish(state), parts


def weights(model):
    return [np.asarray(x.weight, np.float64) for x in charlm.linears(model)]


@pytest.mark.parametrize(
    ("name", "where"), [("adam_cap", "beside"), ("muon_cap", "finished")]
)
def test_no_singular_value_is_above_the_cap(request, name, where):
    out = request.getfixturevalue(where)
    model, _ = arm(name, out)
    values = [np.linalg.svd(w, compute_uv=False) for w in weights(model)]
    largest = np.max([v.max(axis=(1, 2)) for v in values], axis=0)
    assert np.all(largest <= STRENGTH * (1 + 1e-6)) and largest.min() > 0.99 * STRENGTH
    # Several of them were above it: it binds.
    assert min((v > 0.999 * STRENGTH).sum() for v in values) >= 4
    kept = results(out)[name]["largest_singular_value"]["seeds"]
    np.testing.assert_allclose(kept, largest, rtol=1e-12)


def test_without_a_cap_they_are_above_it(finished):
    for name, found in results(finished).items():
        if not name.endswith("cap"):
            assert min(found["largest_singular_value"]["seeds"]) > 1.2 * STRENGTH


def test_fixed_norms_stay_and_others_do_not(finished):
    start, _ = arm("muon_fixed")
    first = [np.linalg.norm(w, axis=(-2, -1)) for w in weights(start)]
    for name in ("muon_fixed", "muon_decay"):
        model, _ = arm(name, finished)
        now = [np.linalg.norm(w, axis=(-2, -1)) for w in weights(model)]
        change = max(np.abs(a / b - 1).max() for a, b in zip(now, first, strict=True))
        assert change < 1e-5 if name == "muon_fixed" else change > 1e-3
    before, after = weights(start)[0], weights(arm("muon_fixed", finished)[0])[0]
    assert np.abs(before - after).max() > 1e-3


def test_weight_norm_has_a_gain_for_each_unit_and_starts_where_the_others_do(finished):
    start, _ = arm("muon_weight_norm")
    plain, _ = arm("muon_decay")
    for a, b in zip(weights(start), weights(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    saved = saved_arrays(finished)
    gains = {
        name: x.shape
        for name, x in saved.items()
        if name.startswith("muon_weight_norm.params.blocks") and x.shape[-1:] == (1,)
    }
    assert len(gains) == 6 and set(gains.values()) == {(2, 2, 16, 1), (2, 2, 64, 1)}


def normalised(x, gain):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * gain


def test_no_logit_of_attention_is_above_what_is_certified(finished):
    for name in ("adam_decay", "muon_weight_norm"):
        model, parts = arm(name, finished)
        bounds = results(finished)[name]["attention_logit_bound"]["seeds"]
        arrays, static = eqx.partition(model, eqx.is_array)
        for seed, bound in enumerate(bounds):
            one = eqx.combine(jax.tree.map(lambda x: x[seed], arrays), static)  # noqa: B023
            symbols = parts.test[:, :-1]
            x = np.asarray(one.embedding.weight, np.float64)[symbols]
            x = x + np.asarray(one.position.weight, np.float64)
            attention = one.blocks.attention
            worst = 0.0
            for layer in range(2):
                gain = np.asarray(one.blocks.attention_norm.weight, np.float64)[layer]
                query, key = (
                    np.asarray(p.weight, np.float64)[layer].reshape(4, 4, 16)
                    for p in (attention.query_proj, attention.key_proj)
                )
                between = gain[:, None] * (query.swapaxes(1, 2) @ key) * gain
                # The largest of any input, whatever the text: 16 / sqrt(4) times this.
                top = 8 * np.linalg.norm(between, 2, (1, 2)).max()
                assert top <= bound
                worst = max(worst, top)
                if layer == 0:
                    y = normalised(x, gain / gain)
                    logits = np.einsum("bsi,hij,btj->bhst", y, between, y) / 2
                    assert 0.05 * top < np.abs(logits).max() <= top
            # The bound is of that order, and no empty promise.
            assert bound < 8 * worst


def test_no_feed_forward_layer_is_steeper_than_certified(finished):
    model, _ = arm("muon_decay", finished)
    bounds = results(finished)["muon_decay"]["feed_forward_bound"]["seeds"]
    up, down = (
        np.asarray(x.weight, np.float64)[:, :, :, :]
        for x in (model.blocks.up, model.blocks.down)
    )
    for seed, bound in enumerate(bounds):
        for layer in range(2):
            first, second = jnp.asarray(up[seed, layer]), jnp.asarray(down[seed, layer])
            jacobian = jax.jacobian(lambda x: second @ jax.nn.gelu(first @ x))  # noqa: B023
            found = jax.vmap(jacobian)(3 * jr.normal(jr.key(layer), (64, 16)))
            steepest = np.linalg.norm(np.asarray(found, np.float64), 2, (1, 2)).max()
            assert 0.1 * bound < steepest <= bound


def test_a_finished_run_goes_on_to_the_same_numbers(beside):
    before = numbers(beside)
    flags = ("--strength", STRENGTH, "--methods", "adam_cap", "adam_decay")
    assert run("--out", beside, "--resume", *flags).code == 0
    assert numbers(beside) == before


def test_a_way_trains_alike_whatever_is_beside_it(finished, beside):
    (methods, lines), (others, more) = numbers(finished), numbers(beside)
    assert methods["adam_decay"] == others["adam_decay"]
    of = lambda lines: [line for line in lines if line["method"] == "adam_decay"]
    assert of(lines) == of(more) and len(of(lines)) == 6


def test_another_strength_is_another_run(beside):
    flags = ("--strength", 0.5, "--methods", "adam_cap", "adam_decay")
    outcome = run("--out", beside, "--resume", *flags)
    assert_one_line(outcome, "--resume: strength is 0.5 now, but was 0.8 in")


def test_a_step_of_muon_turns_all_singular_values_into_one():
    gradient = {
        "a": jr.normal(jr.key(0), (2, 24, 6)),
        "b": jr.normal(jr.key(1), (8, 8)),
    }
    muon = charlm.muon(lambda step: 0.1)
    updates, _ = muon.update(gradient, muon.init(gradient), gradient)
    for name, size in (("a", np.sqrt(24)), ("b", np.sqrt(8))):
        values = np.linalg.svd(np.asarray(updates[name]), compute_uv=False)
        assert np.all(values > 0.6 * 0.02 * size)
        assert np.all(values < 1.25 * 0.02 * size)
        against = np.sum(
            np.asarray(updates[name]) * np.asarray(gradient[name]), (-2, -1)
        )
        assert np.all(against < 0)


def test_only_matrices_of_the_blocks_are_held():
    model = Transformer(8, 16, 2, 4, key=jr.key(0))
    paths = [path for path, _ in eqxreg.trainables(model, charlm.matrices, paths=True)]
    assert len(paths) == 6 and all(path.startswith(".blocks") for path in paths)
    wrapped = charlm.with_weight_norm(model)
    assert len(eqxreg.trainables(wrapped, charlm.matrices)) == 6


@pytest.fixture
def numbered(tmp_path):
    """A text in which every character tells its place."""
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)))
    return path


def test_a_text_is_cut_into_parts_that_share_no_character(numbered):
    about, parts = text.parts(str(numbered), 4, 3)
    assert about["bytes"] == 250
    for part, low, high in (
        (parts.train, 0, 200),
        (parts.validation, 200, 225),
        (parts.test, 225, 250),
    ):
        assert np.all(np.diff(part.astype(int), axis=1) == 1)
        assert part.min() == low and low <= part.max() < high
    assert parts.train.shape == (49, 5)
    assert parts.test.shape == parts.validation.shape == (3, 5)
    assert parts.test.max() == 249


def test_a_text_that_is_too_short_is_refused(numbered):
    with pytest.raises(Failure, match="has 250 bytes; 310 are needed"):
        text.parts(str(numbered), 10, 3)


def test_windows_are_drawn_anew_in_every_epoch_and_alike_for_all_ways():
    keys = jr.split(jr.key(0), 2)
    first, second = (
        charlm.WindowPlanner(keys, 1000, quick_flags())(epoch).rows for epoch in (1, 2)
    )
    again = charlm.WindowPlanner(keys, 1000, quick_flags())(1).rows
    assert first.shape == (2, 5, 4) and jnp.array_equal(first, again)
    assert jnp.mean(first == second) < 0.1 and jnp.mean(first[0] == first[1]) < 0.2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere"), "--data: nowhere is not a file (nor is it `stdlib`)"),
        (("--width", 18), "--width must be a multiple of --heads, got 18"),
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--strength", 0), "--strength must be positive and finite, got 0"),
        (("--learning-rate", "nan"), "--learning-rate must be positive and finite"),
        (("--base-rate", -1), "--base-rate must be positive and finite"),
        (("--first-seed", -1), "--first-seed must be at least 0, got -1"),
        (("--methods", "adam_cap", "adam_cap"), "--methods must be named once each"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(tmp_path, flags, message):
    code = 1 if flags[0] == "--data" else 2
    assert_one_line(run("--out", tmp_path / "new", *flags), message, code=code)


def test_the_note_says_what_was_found():
    found = {
        name: {"loss": {"mean": loss}, "largest_singular_value": {"largest": size}}
        for name, loss, size in (
            ("adam_decay", 1.2345, 7.77),
            ("adam_cap", 1.25, 2.0),
            ("muon_decay", 1.1, 4.21),
            ("muon_cap", 1.0999, 1.999999),
        )
    }
    adam, muon = (
        "Adam's loss 1.234 → 1.250, σ₁ 7.8 → 2.0",
        "Muon's loss 1.100 → 1.100, σ₁ 4.2 → 2.0",
    )
    assert charlm.note(found) == f"From decay to a cap: {adam}; {muon}."
    del found["adam_cap"]
    assert charlm.note(found) == f"From decay to a cap: {muon}."
    assert charlm.note({}) == ""


def test_the_page_says_what_was_found():
    found = strict_json(ROOT / "docs" / "gallery" / "charlm.json")["methods"]
    loss = {name: result["loss"] for name, result in found.items()}
    mean = {name: numbers["mean"] for name, numbers in loss.items()}
    assert mean["adam_decay"] - mean["adam_cap"] > 0.1
    pairs = zip(loss["muon_cap"]["seeds"], loss["muon_decay"]["seeds"], strict=True)
    assert all(0 < capped - decayed < 0.1 for capped, decayed in pairs)
    assert min(mean, key=mean.get) == "muon_decay"
    others = mean["muon_fixed"], mean["muon_weight_norm"]
    assert min(others) > mean["muon_cap"] + 0.05
    assert abs(mean["adam_decay"] - mean["adam_cautious"]) < 0.011
    largest = {
        name: result["largest_singular_value"]["largest"]
        for name, result in found.items()
    }
    assert largest["muon_cap"] <= 2.003 and largest["adam_cap"] <= 2.003
    assert 4 < largest["muon_decay"] < 5
