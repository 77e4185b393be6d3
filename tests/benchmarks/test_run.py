"""The benchmark runner, as a program: what it lists, what a quick run writes, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
POLICIES = ["kvtier: full", "kvtier: quest", "kvtier: snapkv"]
STOCK, SDPA, GROUPED = "transformers: update and sdpa", "transformers: sdpa alone", "grouped matmul"
DID = ["published", "loaded"]
STREAMS = ["read stream", "copy stream"]
NAMES = ["bandwidth", "choices", "claims", "decode", "engines", "kernels", "policies", "prefix", "store"]

pytestmark = pytest.mark.skipif(not RUN.exists(), reason="a source distribution has no benchmarks, only a checkout has")


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # As README says, with the script's folder on sys.path: its kernels/ must not hide the package of that name.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, RUN, *words], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result and screen of a quick run of everything in float32."""
    folder = tmp_path_factory.mktemp("bench")
    done = run("decode", "--quick", "--dtypes", "float32", "--json", "result.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), done.stdout


def only_case(result: dict[str, Any], part: str) -> dict[str, Any]:
    (case,) = result["results"][part]
    assert (case["context"], case["dtype"]) == (2048, "float32")
    return case


def by_name(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in case["rows"]}


def test_list_names_every_benchmark(tmp_path: Path) -> None:
    done = run("--list", cwd=tmp_path)

    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


def test_list_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['run.py', '--list']\ntry: runpy.run_path({str(RUN)!r}, run_name='__main__')\n"
    )
    code += "except SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "name a benchmark"),
        (("prefill",), "invalid choice"),
        (("decode", "--quick", "--parts", "prefill"), "must be of attention, step, overhead"),
        (("decode", "--quick", "--contexts", "512"), "at least 2048"),
    ],
    ids=["nothing", "unknown benchmark", "unknown part", "short context"],
)
def test_bad_use_is_told(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)

    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_result_says_what_it_was_measured_on(quick: tuple[dict[str, Any], str]) -> None:
    result, _ = quick

    assert (result["benchmark"], result["schema"], result["quick"]) == ("decode", 1, True)
    assert result["settings"]["contexts"] == [2048]
    found = result["machine"]
    assert set(found["versions"]) == {"kvtier", "torch", "transformers", "numpy"}
    assert found["threads"] == 1
    assert min(found["cores"], found["memory_bytes"], found["last_level_cache_bytes"]) > 0
    assert all(found[key] for key in ("cpu", "architecture", "system", "python", "commit", "kernels"))


def test_result_holds_no_path_of_this_machine(quick: tuple[dict[str, Any], str]) -> None:
    text = json.dumps(quick[0])

    assert str(RUN.parents[1]) not in text
    assert str(Path(sys.prefix)) not in text


def test_attention_rows_agree_with_themselves(quick: tuple[dict[str, Any], str]) -> None:
    rows = by_name(only_case(quick[0], "attention"))

    assert set(rows) == {*POLICIES, STOCK, SDPA, GROUPED, *STREAMS}
    for row in rows.values():
        read = row["kv_bytes"] + row["sketch_bytes"]
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["gb_per_s"] == pytest.approx(read / row["median_s"] / 1e9)
        assert row["of_read_bandwidth"] == pytest.approx(row["gb_per_s"] / rows["read stream"]["gb_per_s"])
    for row in (rows[name] for name in rows.keys() - set(STREAMS)):
        for key, base in {"vs_stock": STOCK, "vs_sdpa": SDPA, "vs_grouped": GROUPED}.items():
            assert row[key] == pytest.approx(rows[base]["median_s"] / row["median_s"])


def test_attention_counts_the_bytes_that_were_read(quick: tuple[dict[str, Any], str]) -> None:
    case = only_case(quick[0], "attention")
    rows, token = by_name(case), case["layer_bytes"] // 2048

    assert token == 2 * 8 * 128 * 4
    assert 2048 <= rows["kvtier: full"]["kv_bytes"] / token <= 2048 + 16
    assert 2048 <= rows[STOCK]["kv_bytes"] / token <= 2048 + 16
    assert 2048 // 16 - 16 < rows["kvtier: quest"]["kv_bytes"] / token <= 2048 // 16
    assert rows["kvtier: quest"]["sketch_bytes"] == pytest.approx(2048 // 16 * token, rel=0.05)
    assert 2048 // 16 + 256 <= rows["kvtier: snapkv"]["kv_bytes"] / token <= 2048 // 16 + 256 + 16


def test_exact_competitors_were_compared_with_fp64(quick: tuple[dict[str, Any], str]) -> None:
    errors = only_case(quick[0], "attention")["max_error"]

    assert set(errors) == {"kvtier: full", SDPA, GROUPED}
    assert 0 < max(errors.values()) < 1e-5


def test_step_compares_the_patched_model_with_stock(quick: tuple[dict[str, Any], str]) -> None:
    case = only_case(quick[0], "step")
    rows = by_name(case)

    assert set(rows) == {"transformers", "kvtier: full", "kvtier: quest"}
    assert case["layers"] == quick[0]["settings"]["model_layers"]
    assert rows["transformers"]["vs_stock"] == 1.0
    assert rows["kvtier: full"]["kv_bytes"] == pytest.approx(rows["transformers"]["kv_bytes"], rel=0.01)
    assert rows["kvtier: quest"]["kv_bytes"] < rows["kvtier: full"]["kv_bytes"] / 15
    assert case["logit_difference"] < 1e-4


def test_overhead_has_both_measures_and_a_profile(quick: tuple[dict[str, Any], str]) -> None:
    rows = only_case(quick[0], "overhead")["rows"]

    assert [(row["name"], row["generated"]) for row in rows] == [(name, n) for name in POLICIES for n in (0, 256)]
    for row in rows:
        assert row["overhead_by_difference_us"] == pytest.approx(row["session_us"] - row["kernels_us"])
        assert 0 < row["overhead_p10_us"] <= row["overhead_us"] <= row["overhead_p90_us"]
        assert row["overhead_mean_us"] > 0
        assert sum(row["kernel_calls"].values()) >= only_case(quick[0], "overhead")["layers"]
        assert len(row["profile"]) == 15
        assert not any(entry["function"].startswith("kernels/") for entry in row["profile"])
        own = [entry["own_us"] for entry in row["profile"]]
        assert own == sorted(own, reverse=True)
        assert own[0] > 0


def test_quest_ranks_and_chooses_in_one_kernel(quick: tuple[dict[str, Any], str]) -> None:
    case = only_case(quick[0], "overhead")
    calls = next(row["kernel_calls"] for row in case["rows"] if row["name"] == "kvtier: quest")

    assert calls["attend_ranked"] == case["layers"]


def test_tables_show_every_row(quick: tuple[dict[str, Any], str]) -> None:
    _, screen = quick

    for title in ("Attention of one layer", "A whole decode step", "Session overhead"):
        assert title in screen
    for name in (*POLICIES, GROUPED, *STREAMS):
        assert name in screen
    for name in POLICIES:
        assert f"{name}, float32, 256 generated" in screen, "a profile for every policy"


def test_a_quick_run_of_prefixes_loads_what_it_published(tmp_path: Path) -> None:
    done = run("prefix", "--quick", "--json", "result.json", "--folder", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["results"]
    rows = {row["name"]: row for row in case["rows"]}

    assert rows.keys() == {"no store", *(f"{kind}: {what}" for kind in ("host", "segment") for what in DID)}
    for name, row in rows.items():
        assert row["tokens_saved"] == (256 if name.endswith("loaded") else 0)
        assert row["median_s"] > 0
    assert "First token of a prompt" in done.stdout
