"""Every benchmark keeps the convention of benchmarks/README.md, on settings too small to mean anything."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pruning.families import model_of

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = Path(os.environ.get("RETORT_PEER_PYTHON", ROOT / ".venv-peers/bin/python"))
TINY = [
    "--vocabulary=96",
    "--student-hidden=16",
    "--teacher-hidden=32",
    "--student-layers=1",
    "--teacher-layers=1",
    "--sequences=2",
    "--length=8",
    "--steps=2",
    "--warmup-steps=1",
    "--repeats=1",
    "--threads=1",
    "--device=cpu",
]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_of_the_project_is_there(path: Path) -> None:
    """They import inside functions, most of which the default run never enters."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "models",
            "pipeline",
            "callbacks",
        ):
            module = importlib.import_module(node.module or "")
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name), f"{path.name} line {node.lineno}: {node.module} has no {name}"


def distillation_step(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/distillation_step.py", *words], capture_output=True, text=True, timeout=300
    )


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_last_line_is_one_json_object_with_the_figures() -> None:
    found = figures(distillation_step("--quick", "--sides=ours", *TINY))
    assert set(found) == {"ours", "device", "settings"}
    assert found["ours"]["tokens_per_second"] > 0
    assert found["ours"]["peak_memory"] > 0
    assert found["settings"]["vocabulary"] == 96


@pytest.mark.skipif(not PEER_PYTHON.is_file(), reason="no environment with TRL; see benchmarks/README.md")
def test_both_sides_work_out_the_same_divergence() -> None:
    found = figures(distillation_step("--sides=ours,trl", *TINY))
    assert found["ours"]["first_divergence"] == pytest.approx(found["trl"]["first_divergence"], rel=1e-4)
    assert set(found["ratio"]) == {"tokens_per_second", "peak_memory"}


def test_without_the_peers_environment_the_remedy_is_named_in_one_line() -> None:
    done = distillation_step("--peer-python=/nowhere/python", *TINY)
    assert done.returncode == 2
    assert "--peer-python /nowhere/python: not there" in done.stderr.splitlines()[-1]


TINY_OBJECTIVE = [
    "--cases=96x512",
    "--hidden=16",
    "--teacher-hidden=32",
    "--calls=1",
    "--repeats=1",
    "--threads=1",
    "--device=cpu",
]


def objective(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/objective.py", *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_our_losses_have_the_value_and_the_gradients_of_the_dense_formula() -> None:
    found = figures(objective("--sides=dense,bound,ours,ours_kl,ours_jsd,ours_top_k", *TINY_OBJECTIVE))
    assert set(found) == {"cases", "device", "settings"}
    case = found["cases"]["96x512"]
    assert case["left_out"] == {}
    sides = case["sides"]
    for name in ("dense", "ours", "ours_kl", "ours_jsd", "ours_top_k"):
        assert sides[name]["divergence"] == pytest.approx(sides[name]["reference"], rel=1e-5), name
        assert sides[name]["seconds"] > 0
        assert sides[name]["peak_memory"] > 0
    assert sides["ours"]["gradient_norms"] == pytest.approx(sides["dense"]["gradient_norms"], rel=1e-5)
    assert sides["bound"]["divergence"] is None
    assert sides["bound"]["ratios"]["time_to_bound"] == 1
    assert set(case["goals"]["ours"]) == {"time_to_dense", "time_to_bound", "memory_to_dense"}


def test_a_case_that_does_not_fit_is_left_out_with_its_estimate() -> None:
    found = figures(objective("--sides=dense,ours", *TINY_OBJECTIVE, "--cases=10000000000x96"))
    case = found["cases"]["10000000000x96"]
    assert case["sides"] == {}
    assert set(case["left_out"]) == {"dense", "ours"}
    assert case["left_out"]["dense"].startswith("does not fit: about ")


@pytest.mark.skipif(not PEER_PYTHON.is_file(), reason="no environment with the peers; see benchmarks/README.md")
def test_the_peers_losses_come_to_the_same_divergences() -> None:
    found = figures(objective("--sides=ours,ours_kl,trl,liger,torchtune,trl_jsd,liger_jsd", *TINY_OBJECTIVE))
    case = found["cases"]["96x512"]
    assert case["left_out"] == {}
    sides = case["sides"]
    for name, side in sides.items():
        assert side["divergence"] == pytest.approx(side["reference"], rel=1e-5), name
    assert sides["ours"]["gradient_norms"] == pytest.approx(sides["liger"]["gradient_norms"], rel=1e-5)
    assert sides["ours_kl"]["gradient_norms"] == pytest.approx(sides["trl"]["gradient_norms"], rel=1e-5)
    assert case["goals"]["ours"]["fastest_peer"] in ("trl", "liger", "torchtune")


def test_distillkit_is_named_with_where_to_get_it() -> None:
    done = objective("--sides=distillkit", *TINY_OBJECTIVE)
    assert done.returncode == 2
    assert "--sides distillkit: need --distillkit" in done.stderr.splitlines()[-1]


TINY_CACHE = [
    "--vocabulary=300",
    "--student-hidden=16",
    "--teacher-hidden=32",
    "--student-layers=1",
    "--teacher-layers=1",
    "--teacher-steps=2",
    "--length=16",
    "--steps=2",
    "--warmup-steps=1",
    "--sequences=2",
    "--repeats=1",
    "--threads=1",
    "--device=cpu",
]


@pytest.mark.slow
def test_every_source_of_the_teacher_trains_on_the_same_sequences_and_tells_its_cost() -> None:
    sides = ["cross_entropy", "online", "cached_top_k", "cached_hidden_bf16"]
    words = [sys.executable, ROOT / "benchmarks/teacher_cache.py", "--quick", f"--sides={','.join(sides)}", *TINY_CACHE]
    found = figures(subprocess.run(words, capture_output=True, text=True, timeout=600))
    assert set(found) == {"sides", "teacher", "goals", "device", "settings"}
    assert list(found["sides"]) == sides
    assert all(each["tokens_per_second"] > 0 and each["peak_memory"] > 0 for each in found["sides"].values())
    online, top_k, exact = (found["sides"][side] for side in sides[1:])
    assert exact["first_divergence"] == pytest.approx(online["first_divergence"], rel=0.01)
    assert top_k["first_divergence"] < online["first_divergence"]  # of 65 categories, by data processing
    assert exact["bytes_per_token"] > 2 * 32
    assert exact["gradient_error"] < top_k["gradient_error"]
    assert online["first_gradient_error"] == 0
    assert 0 < exact["first_gradient_error"] < top_k["first_gradient_error"]
    assert set(found["goals"]) == set(sides[2:])


@pytest.mark.slow
def test_as_many_tokens_are_prepared_in_one_process_as_in_two(tmp_path: Path) -> None:
    words = [
        "--sides=tokenizer,ours_1,ours_2",
        "--megabytes=2",
        "--part-megabytes=1",
        "--vocabulary=400",
        "--repeats=1",
    ]
    command = [sys.executable, ROOT / "benchmarks/prepare.py", *words]
    found = figures(subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path))
    for kind in ("short", "long"):
        sides = found["figures"][kind]
        assert sides["ours_1"]["tokens"] == sides["ours_2"]["tokens"]
        assert sides["ours_1"]["tokens"] == pytest.approx(
            sides["tokenizer"]["tokens"], rel=0.01
        )  # windows share tokens
        assert sides["ours_2"]["bytes_per_token"] < 5
        assert set(found["ratios"][kind]) == {"ours_2 ÷ ours_1", "ours_1 ÷ tokenizer"}


TINY_GENERATION = [
    "--vocabulary=300",
    "--hidden=32",
    "--layers=1",
    "--heads=4",
    "--prompt-tokens=4",
    "--lengths=4,8",
    "--repeats=1",
    "--threads=1",
    "--device=cpu",
]


@pytest.mark.slow
def test_generation_writes_the_same_text_with_and_without_the_cache_and_tells_its_bytes() -> None:
    words = [sys.executable, ROOT / "benchmarks/generation.py", *TINY_GENERATION]
    found = figures(subprocess.run(words, capture_output=True, text=True, timeout=600))
    assert set(found) == {"sides", "ratio", "same_text", "device", "settings"}
    assert found["same_text"] == {"mha": True, "gqa": True, "mqa": True}
    assert set(found["ratio"]["gqa"]) == {"4", "8"}
    for attention, heads in (("mha", 4), ("gqa", 2), ("mqa", 1)):
        for mode in ("cached", "uncached"):
            assert all(speed > 0 for speed in found["sides"][f"{attention}_{mode}"]["tokens_per_second"].values())
        # keys and values, of one layer, of 8 numbers a head in fp32
        assert found["sides"][f"{attention}_cached"]["cache_bytes_per_token"] == 2 * 1 * heads * 8 * 4


TINY_PRUNING = ["--train-steps=2", "--held-out-sequences=4", "--repeats=1", "--threads=1", "--device=cpu"]


def pruning(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks/pruning.py", *TINY_PRUNING, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_pruning_is_measured_by_perplexity_seconds_and_memory() -> None:
    found = figures(pruning("--sides=ours,ours_random"))
    assert set(found) == {"sides", "ratio", "goals", "perplexity_before", "weights", "device", "settings"}
    for side in ("ours", "ours_random"):
        each = found["sides"][side]
        assert each["perplexity"] > 1
        assert each["peak_memory"] > 0
        assert set(each["parts"]) == {"load", "score", "prune", "save"}
    assert found["sides"]["ours"]["parameters"] == found["sides"]["ours_random"]["parameters"]


@pytest.mark.skipif(not PEER_PYTHON.is_file(), reason="no environment with torch-pruning; see benchmarks/README.md")
def test_llm_pruners_algorithm_removes_the_same_units() -> None:
    ratio = figures(pruning("--sides=ours,llm_pruner"))["ratio"]["ours ÷ llm_pruner"]
    assert ratio["same_removed"] == 1
    assert ratio["perplexity"] == 1


TINY_QUANTIZATION = [
    "--calibration-samples=4",
    "--calibration-length=32",
    "--held-out-sequences=4",
    "--documents=200",
    "--repeats=1",
    "--threads=1",
]
AUTO_ROUND_PYTHON = Path(os.environ.get("RETORT_AUTO_ROUND_PYTHON", ROOT / ".venv-auto-round/bin/python"))


def quantization(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "benchmarks/quantization.py", *TINY_QUANTIZATION, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    from pipeline.data.tokenizer import load_tokenizer, train_tokenizer

    words = ["the cat sat on the mat, and nobody said a word about it " * 9]
    model_of("llama", dtype=torch.float32, vocab_size=300).save_pretrained(tmp_path / "model")
    train_tokenizer(words, 270, tmp_path / "tokenizer")
    load_tokenizer(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_scheme_is_measured_by_method_and_beside_models_that_were_made_already(tiny_llama: Path) -> None:
    found = figures(
        quantization(
            f"--model={tiny_llama}", "--sides=awq", f"--also=itself={tiny_llama}",
            "--schemes=w3a16_g32,w3a16_g128",
        )
    )  # fmt: skip
    assert found["also"]["itself"] == found["float"]
    assert found["float"]["kl"] == 0
    assert set(found["schemes"]) == {"w3a16_g32"}  # 128 divides nothing here
    of_scheme = found["schemes"]["w3a16_g32"]
    assert of_scheme["awq"]["matrices"] == 3 * 6  # down_proj reads 20
    assert of_scheme["awq"]["kl"] > 0
    found_awq = of_scheme["awq"]
    assert found_awq["increase"] == pytest.approx(found_awq["perplexity"] / found["float"]["perplexity"] - 1)


@pytest.mark.slow
def test_quantization_aware_training_is_measured_beside_the_same_training_on_none(tiny_llama: Path) -> None:
    words = [f"--model={tiny_llama}", "--sides=gptq,qat,trained", "--schemes=w3a16", "--qat-steps=4"]
    of_scheme = figures(quantization(*words))["schemes"]["w3a16"]
    assert [of_scheme[side]["matrices"] for side in ("gptq", "qat", "trained")] == [3 * 7, 3 * 7, 0]
    assert of_scheme["trained"]["kl"] < of_scheme["qat"]["kl"]


@pytest.mark.slow
@pytest.mark.skipif(not AUTO_ROUND_PYTHON.is_file(), reason="no environment with auto-round; see benchmarks/README.md")
def test_auto_round_quantizes_the_same_matrices(tiny_llama: Path) -> None:
    words = [f"--model={tiny_llama}", "--sides=awq,auto_round_awq", "--schemes=w8a16"]
    found = figures(quantization(*words, f"--peer-python={AUTO_ROUND_PYTHON}"))
    of_scheme = found["schemes"]["w8a16"]
    assert of_scheme["awq"]["matrices"] == 3 * 7
    # It leaves widths alone that 32 does not divide.
    assert of_scheme["auto_round_awq"]["matrices"] < 3 * 7
    assert found["ratio"] == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--peer-python=/nowhere/python", "leave auto-round out with --sides ours"),
        ("--schemes=int5", "need some of w8a16"),
        ("--also=/some/folder", "need NAME=FOLDER"),
        ("--also=qat=/nowhere", "give a model folder"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(word: str, said: str) -> None:
    done = quantization("--sides=auto_round" if "peer" in word else "--sides=ours", word)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
