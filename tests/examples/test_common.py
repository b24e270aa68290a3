"""What the trainers share: the plan of an epoch, the files, the progress bar."""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from common import show
from common.arm import Planner, State, scan_epoch
from common.report import strict_json
from common.run import Failure, write_files
from rich.console import Console


def make_planner(seeds: int) -> Planner:
    """Plans for 23 examples, in batches of 5: three are left out of every epoch."""
    return Planner(jax.vmap(jr.key)(jnp.arange(seeds)), size=23, batch_size=5)


def test_an_epoch_takes_every_example_at_most_once():
    rows = np.asarray(make_planner(2)(1).rows)
    assert rows.shape == (2, 4, 5)
    for seed in range(2):
        assert len(set(rows[seed].ravel())) == 20
        assert set(rows[seed].ravel()) <= set(range(23))


def test_a_plan_depends_on_the_seed_and_the_epoch_alone():
    plan, again = make_planner(2)(3), make_planner(3)(3)
    np.testing.assert_array_equal(plan.rows, again.rows[:2])
    np.testing.assert_array_equal(jr.key_data(plan.key), jr.key_data(again.key[:2]))
    assert not np.array_equal(plan.rows[0], plan.rows[1])
    assert not np.array_equal(plan.rows, make_planner(2)(4).rows)


def test_all_keys_differ():
    keys = [jr.key_data(make_planner(2)(epoch).key) for epoch in (1, 2)]
    assert len({tuple(key) for key in np.reshape(keys, (-1, 2)).tolist()}) == 16


def test_an_epoch_passes_the_planned_batches_to_the_step():
    def step(state: State, batch: jax.Array, key: jax.Array):
        return State(state.params.at[batch].add(1), ()), batch.sum()

    plan = jax.tree.map(lambda array: array[0], make_planner(1)(1))
    start = State(jnp.zeros(23), ())
    state, loss = scan_epoch(step, start, jnp.arange(23), plan)
    assert sorted(state.params.tolist()) == [0.0] * 3 + [1.0] * 20
    assert float(loss) == pytest.approx(np.asarray(plan.rows).sum() / 4)


def test_files_are_written_together_or_not_at_all(tmp_path: Path):
    write_files(tmp_path, {"a": b"old", "b": b"old"})
    # `b` cannot be replaced any more, and nothing of the new files may stay.
    (tmp_path / ".b.tmp").mkdir()
    with pytest.raises(Failure, match="cannot write a and b: Is a directory"):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert not (tmp_path / ".a.tmp").exists()


def test_what_is_not_finite_is_null_in_json():
    values = {"a": np.array([1.5, np.nan]), "b": (Path("c"), None, -np.inf, 2, True)}
    assert strict_json(values).split() == (
        b'{ "a": [ 1.5, null ], "b": [ "c", null, null, 2, true ] }'.split()
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_reaches_the_end(monkeypatch: pytest.MonkeyPatch, terminal: bool):
    screen = io.StringIO()
    monkeypatch.setattr(
        show,
        "Console",
        lambda **options: Console(file=screen, force_terminal=terminal, **options),
    )
    with show.progress(total=25) as advance:
        for epoch in range(25):
            advance(f"epoch {epoch + 1}")
    shown = screen.getvalue()
    assert "epoch 25" in shown
    # A bar is redrawn with control codes; a file gets ten plain lines.
    assert ("\x1b[" in shown) == terminal
    assert terminal or shown.count("\n") == 10
