"""llama.cpp as a runtime: its cache, its speed, what it is asked of, and what it must not take down with it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models import llama_library
from models.errors import Refusal
from models.formats.format import Finished
from models.formats.gguf import Gguf
from models.formats.llama_cpp import LlamaCpp
from models.measure import Speed, served
from models.quantization.ggml import GgmlType
from models.quantization.scheme import WeightScheme
from tests.command import ROOT
from tests.formats.exporting import as_folder, differences, small, with_scheme
from tests.pruning.families import tokens

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def model() -> Any:
    return small("llama", max_position_embeddings=2048, num_attention_heads=2, num_key_value_heads=2)  # heads 32 wide


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    Gguf(type="f32").write(as_folder(model, made / "m"), made / "g")
    return made / "g"


def test_what_is_generated_with_the_cache_is_what_whole_texts_give(folder: Path, model: Any) -> None:
    runtime = LlamaCpp(folder, cache="f32")
    prompt = tokens(1, 9)
    made = runtime.generate(prompt, 12)
    text = torch.cat([prompt[0], made])[None]
    assert torch.equal(runtime.logits(text)[0, 8:-1].argmax(-1), made)
    theirs = model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(theirs[0, 9:], made)


def test_long_texts_and_many_rows_are_taken_in_parts(folder: Path, model: Any) -> None:
    ids = tokens(2, 1100)  # more than one context and more than one decode hold at first
    with torch.no_grad():
        truth = model(ids).logits
    runtime = LlamaCpp(folder, cache="f32")
    short = runtime.logits(ids[:, :7])
    whole = runtime.logits(ids)
    assert whole.shape == (2, 1100, 61)
    assert differences(whole, truth)[0] < 2e-3  # ggml's angles, each made of the one before, drift with the place
    assert differences(short, truth[:, :7])[0] < 3e-5
    for length in (1100, 1025, 514, 513, 512):
        assert int(runtime.generate(ids[:1, :length], 1)) == int(truth[0, length - 1].argmax()), length


def test_the_cache_can_be_of_eight_bits(folder: Path, model: Any) -> None:
    with torch.no_grad():
        truth = model(tokens(2, 40)).logits
    far = {
        kind: differences(LlamaCpp(folder, cache=kind).logits(tokens(2, 40)), truth) for kind in ("f32", "f16", "q8_0")
    }
    assert far["f32"][1] < far["f16"][1] < far["q8_0"][1] < 5e-3


def test_a_prompt_leaves_what_is_generated_its_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LlamaCpp(folder).limit == 2048
    asked = []
    monkeypatch.setattr(LlamaCpp, "limit", 30)
    monkeypatch.setattr(LlamaCpp, "speed", lambda self, prompt, settings: asked.append(prompt.shape[1]) or {})
    served(Gguf(type="f32"), folder, tokens(1, 64), "cpu", Speed(new_tokens=8, repeats=1))
    assert asked == [2, 22]  # the first only loads


def test_speed_says_what_transformers_speed_says(folder: Path) -> None:
    runtime = Gguf().open(folder, "cpu")
    assert runtime.name == "llama.cpp"
    told = runtime.speed(tokens(1, 16), Speed(16, 8, 1))
    assert set(told) == {"generate_tokens_per_second", "prefill_tokens_per_second", "first_token_ms"}
    assert all(value > 0 for value in told.values())


def test_tokens_that_are_none_are_refused_before_llama_cpp_sees_them(folder: Path) -> None:
    runtime = LlamaCpp(folder)
    for ids in ([[1, 61]], [[-1, 2]]):
        with pytest.raises(Refusal, match="not one of the 61"):
            runtime.logits(torch.tensor(ids))


def test_files_that_do_not_open_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no model\.gguf in it"):
        LlamaCpp(tmp_path)
    cut = (folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(Refusal, match="does not open it") as refused:
        LlamaCpp(tmp_path)
    assert len(str(refused.value).splitlines()) == 1


OPEN = """
import sys, json, torch
sys.path = [p for p in sys.path if p != ""] + [sys.argv[2]]
from pathlib import Path
from models.formats.gguf import Gguf
runtime = Gguf(cache="f32").open(Path(sys.argv[1]), "cpu")
name = "model.layers.1.self_attn.k_proj.weight"
print(json.dumps([runtime.weight(name).tolist(), runtime.logits(torch.tensor([[5, 6, 7]])).tolist()]))
"""


def test_a_process_that_has_only_the_folder_gets_the_same(tmp_path: Path) -> None:
    model = small("llama")
    finished = with_scheme(model, WeightScheme(4, "group", 32), tmp_path / "m")
    Gguf().write(finished, tmp_path / "g")
    for path in (tmp_path / "m").iterdir():
        path.unlink()
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "g"), str(ROOT)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    weight, logits = (torch.tensor(told) for told in json.loads(done.stdout.splitlines()[-1]))
    assert finished.quantized is not None
    assert torch.equal(weight, finished.quantized.matrices["model.layers.1.self_attn.k_proj.weight"].dequantized())
    torch.testing.assert_close(
        logits, Gguf(cache="f32").open(tmp_path / "g", "cpu").logits(torch.tensor([[5, 6, 7]])), rtol=0, atol=1e-6
    )


def test_another_layout_of_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_library.llama()
    for name, value in (("_CONTEXT_BYTES", 160), ("CONTEXT_FIELDS", {"n_ctx": (4, 512)}), ("_MODEL_BYTES", 72)):
        with monkeypatch.context() as patched:
            patched.setattr(llama_library, name, value)
            llama_library.llama.cache_clear()
            with pytest.raises(Refusal, match=r"pip install xllamacpp==2026\.10\.11549"):
                llama_library.llama()
    llama_library.llama.cache_clear()
    llama_library.llama()


def test_a_missing_library_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    llama_library.library.cache_clear()
    try:
        with pytest.raises(Refusal, match="is not installed; pip install xllamacpp=="):
            GgmlType("q4_k").pack(torch.ones(1, 256))
    finally:
        llama_library.library.cache_clear()


def test_a_library_that_ends_its_process_does_not_end_ours(folder: Path, tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "bad.gguf"), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"a", b"b"])  # no bytes among them: llama.cpp throws where nobody catches
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    told = llama_library.tokenized_apart(tmp_path / "bad.gguf", ["x"])
    assert isinstance(told, str)
    assert told
    absent = llama_library.tokenized_apart(tmp_path / "absent.gguf", ["x"])
    assert "does not open it" in absent


def test_the_commands_for_serving_name_the_file_and_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Gguf().serving(folder, "anywhere") == []  # it has no tokenizer, and texts are all that commands take
    monkeypatch.setattr("models.formats.gguf.has_tokenizer", lambda path: True)
    told = dict(Gguf(cache="q8_0").serving(folder, "some folder's"))
    assert all("some folder's/model.gguf" in shlex.split(command) for command in told.values())
    assert all("--cache-type-k q8_0 --cache-type-v q8_0" in command for command in told.values())
    assert all("cache" not in command for _, command in Gguf().serving(folder, "anywhere"))


def test_nothing_is_read_of_the_folder_but_the_file(tmp_path: Path) -> None:
    model = small("qwen2")
    Gguf(type="q8_0").write(Finished(as_folder(model, tmp_path / "m").folder, None, "float32"), tmp_path / "g")
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["model.gguf"]
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name)
    assert torch.equal(Gguf().open(tmp_path / "g", "cpu").weight(name), GgmlType("q8_0").rounded(weight))
