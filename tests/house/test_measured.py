"""The tables of the page on accelerators are made from what was measured."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from scripts import ROOT, loaded


RESULT = {
    "about": {"card": "A card", "versions": {"jax": "0.12.0"}, "quick": False},
    "checks": [
        {
            "name": "MaxNorm",
            "dtype": "bfloat16",
            "value": value,
            "gradient": 1e-3,
            "limit": 1e-2,
            "same_twice": True,
            "passed": value < 1e-2,
        }
        for value in (1e-3, 0.5)
    ],
    "times": [
        {
            "title": "step, batch 256",
            "baseline": "unconstrained",
            "calls_in_a_burst": 3,
            "milliseconds": {"unconstrained": 0.5, "MaxNormConstraint": 0.6},
            "ratios": {"unconstrained": 1.0, "MaxNormConstraint": 1.204},
        }
    ],
    "failed": [{"title": "a group", "error": "MemoryError()"}],
    "left_out": ["another group"],
    "seconds": 300.0,
}


@pytest.fixture
def measured():
    return loaded("docs/_measured.py")


@pytest.fixture
def page():
    return (ROOT / "docs" / "accelerators.md").read_text(encoding="utf-8")


def test_the_page_says_that_nothing_ran_where_nothing_did(measured, page, tmp_path):
    text = measured.with_tables(page, tmp_path / "none.json")
    assert "Not run yet" in text
    assert measured.PLACE not in text


def test_the_page_has_what_was_measured(measured, page, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(RESULT), encoding="utf-8")
    text = measured.with_tables(page, path)
    assert "On one A card, with jax 0.12.0. 1 of 2 checks" in text
    assert re.search(
        r"^- \*\*Not passed\*\*: MaxNorm in bfloat16, value 5e-01", text, re.M
    )
    assert "| MaxNormConstraint | 0.6 | 1.20 |" in text
    assert "Without a result: another group; a group." in text
    assert "Not run yet" not in text


def test_a_page_without_the_place_stays_as_it_is(measured):
    assert measured.with_tables("# A page\n") == "# A page\n"


def test_the_script_runs_where_there_is_no_gpu(measured, page, tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--platform", "cpu", "--quick"]
    only = r"float16 Box$|^map, 256 x 256, bfloat16"
    command += ["--only", only, "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [check["name"] for check in result["checks"]] == ["Box"] * 2
    assert all(check["passed"] for check in result["checks"])
    [times] = result["times"]
    assert times["ratios"]["copy"] == 1
    assert result["about"]["versions"]["eqxreg"]
    text = measured.with_tables(page, output)
    assert "2 of 2 checks against float64" in text
    assert "| MaxNorm, unit |" in text


@pytest.fixture
def counted():
    return loaded("docs/_counted.py")


def test_the_page_has_what_compilers_count(counted, page):
    assert len(counted.PLACE.findall(page)) == 12
    text = counted.with_counts(page)
    assert not counted.PLACE.search(text)
    row = (
        r"^\| MaxNorm, unit, only multiplies \| bfloat16 \| 256 \| 0\.\d+ \| 1\.10 \|$"
    )
    assert re.search(row, text, re.M)
    # Both dtypes with both batches on one chip and a GPU, and one dtype on four chips.
    plain = re.findall(r"^\| unconstrained \|", text, re.M)
    assert len(plain) == 10


def test_what_was_not_counted_is_no_empty_table(counted):
    with pytest.raises(ValueError, match="Nothing was counted"):
        counted.with_counts("<!-- counted: one chip, float64, 256 -->")
    assert counted.with_counts("# A page\n") == "# A page\n"


def numbers(name):
    path = ROOT / "docs" / "data" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_steps_on_tpus_keep_their_limits():
    limits = numbers("tpu")["limits"]
    assert len(limits) == 26
    for limit in limits:
        assert limit["ratio"] <= limit["limit"], limit


# How many kernels a norm of units adds to the forward pass and to the step, and how
# many times the bytes it moves, by batch.
KERNELS = {
    "MaxNorm, unit": (2, 6, {256: 2.0, 4096: 2.05}),
    "MaxNorm, unit, only multiplies": (2, 6, {256: 2.0, 4096: 2.05}),
    "MaxNorm, unit, own module": (3, 6, {256: 2.95, 4096: 1.85}),
}


@pytest.mark.parametrize("variant", list(KERNELS))
def test_steps_on_a_gpu_keep_their_limits(variant):
    forward, step, bytes_of = KERNELS[variant]
    kernels = {
        (k["dtype"], k["batch"], k["variant"]): k for k in numbers("h100")["kernels"]
    }
    for dtype in ("float32", "bfloat16"):
        for batch, ratio in bytes_of.items():
            k = kernels[dtype, batch, variant]
            base = kernels[dtype, batch, "unconstrained"]
            assert sum(k["forward"].values()) - sum(base["forward"].values()) <= forward
            assert sum(k["step"].values()) - sum(base["step"].values()) <= step
            assert k["bytes"] <= ratio * base["bytes"]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the compiler for TPUs, as `make bench-tpu` installs it",
)
def test_the_compiler_for_tpus_keeps_them_today():
    command = [sys.executable, "benchmarks/accelerators.py", "--no-lowering"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
