"""The lint passes good kernels and names what is wrong with each bad one, in processes of its own and for sm_90."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.compiled


def lint(*arguments, module=("tests/kernels/toys.py",), **environment):
    return subprocess.run([sys.executable, *module, *arguments], cwd=ROOT, env=os.environ | environment,
                          capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def own_triton_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def toys():
    return lint("--arch", "sm_90", "--json")


@pytest.fixture(scope="module")
def rows(toys):
    return {row["case"]: row for row in json.loads(toys.stdout.splitlines()[-1])["rows"]}


@pytest.mark.parametrize("case, verdict", [
    ("good/copy", "ok"),
    ("good/product", "ok"),
    ("good/float32_product", "ok"),
    ("serialized/attend", "WGMMA serialized"),
    ("shared/product", "shared memory over 232448"),
    ("registers/subtract_sum", "more registers than an SM has"),
    ("float32/product", "dot without HGMMA"),
    ("warp_level/product", "dot without HGMMA"),
    ("narrow/copy", "no wide loads"),
    ("broken/broken", "does not compile: CompileTimeAssertionFailure"),
])
def test_verdicts(toys, rows, case, verdict):
    assert rows[case]["verdict"] == verdict
    assert (f"failed: {case} sm_90: {verdict}\n" in toys.stdout) == (verdict != "ok")


def test_a_spill_is_found_with_its_size(rows):
    row = rows["spills/subtract_sum"]
    assert row["spill_bytes"] > 100 and row["verdict"] == f"spills {row['spill_bytes']} bytes"


def test_an_op_without_kernels_fails(toys):
    assert "failed: empty sm_90: no kernel ships\n" in toys.stdout


def test_failure_is_the_exit_code_and_the_compiler_s_message_is_shown(toys):
    assert toys.returncode == 1
    assert "the toy that does not compile" in toys.stderr


def test_figures(rows):
    copy, product, float32 = rows["good/copy"], rows["good/product"], rows["good/float32_product"]
    assert copy["loads"] == copy["stores"] == [2, 2]            # 2048 numbers of 2 bytes, 128 threads of 16 bytes
    assert copy["registers"] <= 32 and copy["ctas_per_sm"] == 16 and copy["shared_bytes"] == 0
    assert rows["narrow/copy"]["loads"] == rows["narrow/copy"]["stores"] == [0, 4]
    assert product["tensor_core"] == {"HGMMA": 4}               # a step of K = 64 in instructions of K = 16
    assert product["shared_bytes"] == 3 * 2 * 64 * 64 * 2 and product["ctas_per_sm"] == 4
    assert product["cp_async"][0] == product["cp_async"][1] > 0
    assert float32["tensor_core"] == {}
    assert rows["warp_level/product"]["tensor_core"].keys() == {"HMMA"}
    assert rows["shared/product"]["ctas_per_sm"] == 0


def test_good_kernels_pass(rows):
    """On a second run, which compiles nothing and finds the same."""
    result = lint("--arch", "sm_90", "--op", "good", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report.keys() == {"triton", "date", "failures", "rows"} and report["failures"] == []
    assert report["rows"] == [row for case, row in rows.items() if case.startswith("good/")]


def test_cases_are_picked_by_name(rows):
    result = lint("--arch", "sm_90", "--op", "good", "narrow", "--case", "d/co", "good/p", "bad", "--json")
    report = json.loads(result.stdout.splitlines()[-1])
    assert [row["case"] for row in report["rows"]] == ["good/copy", "good/product"]
    assert report["failures"] == ["--case 'bad' matches nothing"] and result.returncode == 1


def test_an_empty_table_fails():
    result = lint("--op", "empty")
    assert result.returncode == 1
    assert "failed: the table is empty\n" in result.stdout


def test_the_interpreter_is_refused():
    result = lint(module=("-m", "kernels.lint"), TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("TRITON_INTERPRET=1 is set, and interpreted kernels are not "
                                                   "compiled; unset it")
