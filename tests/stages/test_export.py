"""The stage export as it is run: folders that are whole, certified in fresh processes, or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from models.errors import Refusal
from models.formats.compressed_tensors import CompressedTensors
from models.formats.format import Finished, Format, Written
from models.formats.gguf import Gguf
from models.formats.gptq import GPTQ
from models.formats.huggingface import HuggingFace
from models.measure import likelihood_of, likelihood_served, open_for_inference, pieces
from models.quantization.scheme import WeightScheme
from pipeline import artifact
from pipeline.artifact import checked, content_hash, publish, read_manifest
from pipeline.building import build
from pipeline.check import check
from pipeline.context import Context
from pipeline.data.batch import collate
from pipeline.data.tokenizer import train_tokenizer
from pipeline.report import units
from pipeline.report.report import write_report
from pipeline.report.terminal import table
from pipeline.stages.stage import Makes, Plan, Stage
from tests.formats.quantized import quantized
from tests.staged import Experiment, make, manifest

LITTLE = [
    "data=stdlib",
    "data.max_documents=60",
    "data.max_length=48",
    "quantizer=round_to_nearest",
    "scheme.weights.group_size=16",
    "stages.export.samples=3",
    "stages.export.length=32",
    "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 4, new_tokens: 3, repeats: 1}",
    "trainer.accelerator=cpu",
    "logger=none",
]
WITH_GPTQ = "format=[huggingface,compressed_tensors,gptq]"
EXPERIMENT = Experiment("quantize_export", LITTLE)
FORMATS = ("huggingface", "compressed_tensors", "gptq")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, not quantized, and a run in which it has been quantized."""
    root = tmp_path_factory.mktemp("export") / "my runs"  # which shells want quoted
    train_tokenizer(["pack my box with five dozen liquor jugs " * 9], 300, root / "teacher")
    other = quantized(root / "other", WeightScheme(8, "channel", None), intermediate_size=48, num_hidden_layers=2)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(other / name, root / "teacher" / name)
    EXPERIMENT.make(root / "run", "quantize", f"model.path={root}/teacher")
    return root


@pytest.fixture(scope="module")
def exported(start: Path) -> Path:
    return EXPERIMENT.make(start / "run", "export", f"model.path={start}/teacher", WITH_GPTQ)


def run_of(start: Path, tmp_path: Path) -> Path:
    """Another run of the same quantized model."""
    shutil.copytree(start / "run" / "quantize", tmp_path / "run" / "quantize")
    return tmp_path / "run"


def test_every_format_is_a_folder_of_its_own_with_a_certificate(exported: Path) -> None:
    told = manifest(exported)
    assert (told["stage"], told["kind"]) == ("export", "exports")
    assert sorted(p.name for p in exported.iterdir()) == sorted([*FORMATS, "manifest.json"])
    for name in FORMATS:
        folder = exported / name
        inner = manifest(folder)
        certificate = inner["certificates"]
        assert certificate == told["certificates"][name]
        assert certificate["weights_bit_equal"] is True
        assert certificate["logits_max_difference"] < 1e-4 * certificate["largest_logit"]
        assert certificate["kl"] < 1e-9
        assert certificate["perplexity_reloaded"] == pytest.approx(certificate["perplexity_before"], rel=1e-5)
        assert certificate["fallbacks"] == {}
        assert certificate["runtime"].startswith("transformers")
        assert ("unpacked" in certificate["runtime"]) == (name == "gptq")
        stored = sum(8 * t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())
        assert certificate["bits_per_weight"] == pytest.approx(stored / told["metrics"]["parameters"])
        assert (folder / "tokenizer.json").is_file()
        assert inner["parents"] == told["parents"]
        assert inner["format"]["_target_"].startswith("models.formats.")
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(told["files"]) == files
    assert read_manifest(exported) == checked(told)


def test_the_hash_is_of_what_was_exported_and_not_of_the_hour(exported: Path, tmp_path: Path) -> None:
    assert content_hash(exported) == manifest(exported)["content_hash"]
    other = tmp_path / "export"
    shutil.copytree(exported, other)
    later = json.loads((other / "gptq" / "manifest.json").read_text()) | {"seconds": 1e6}
    (other / "gptq" / "manifest.json").write_text(json.dumps(later))
    assert content_hash(other) == content_hash(exported)
    card = other / "gptq" / "README.md"
    card.write_text(card.read_text() + "at another speed")
    assert content_hash(other) == content_hash(exported)
    (other / "gptq" / "quantize_config.json").write_text("{}")
    assert content_hash(other) != content_hash(exported)


def test_the_card_tells_where_it_comes_from_what_it_is_worth_and_how_it_is_served(exported: Path) -> None:
    quantize = manifest(exported.parent / "quantize")
    for name in FORMATS:
        card = (exported / name / "README.md").read_text()
        certificate = manifest(exported / name)["certificates"]
        headings, _, figures = [line.strip("| ").split(" | ") for line in card.splitlines() if line[:1] == "|"][:3]
        row, metrics = dict(zip(headings, figures, strict=True)), manifest(exported / name)["metrics"]
        assert row["bits per weight"] == f"{certificate['bits_per_weight']:.2f}"
        assert row["on disk"] == units.size(metrics["bytes"])
        served = {"generate tokens/s": "generate_tokens_per_second", "peak memory": "peak_memory_bytes"}
        for heading, key in served.items() if name != "gptq" else ():  # which is not opened by what serves it
            assert row[heading] == (units.size if key.endswith("bytes") else units.si)(metrics[key])
        assert (served.keys() <= row.keys()) == (name != "gptq") == ("threads of a CPU" in card)
        assert f"| {certificate['perplexity_reloaded']:.3f} |" in card
        assert certificate["runtime"] in card
        assert f"**quantize** `{quantize['content_hash'].removeprefix('sha256:')[:12]}`" in card
        assert "group_size 16" in card
        assert "**teacher**" in card
        assert f"transformers serve '{exported / name}'" in card
        assert "partial" not in card
    assert "vllm serve" in (exported / "huggingface" / "README.md").read_text()
    assert "vllm" not in (exported / "gptq" / "README.md").read_text()  # groups of 16


def test_a_gguf_is_named_tried_on_its_own_text_and_its_fallbacks_are_summed(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    given: list[Finished] = []
    plain = Gguf.write
    monkeypatch.setattr(Gguf, "write", lambda *words: given.append(words[1]) or plain(*words))
    words = [f"model.path={start}/teacher", f"stages.export.model={start}/teacher", "format=[gguf]"]
    folder = EXPERIMENT.make(tmp_path / "run", "export", *words, "formats.gguf.type=q4_0") / "gguf"
    fields = gguf.GGUFReader(str(folder / "model.gguf"))
    said = {name: fields.get_field(name).contents() for name in ("general.name", "tokenizer.ggml.pre")}
    assert said == {"general.name": "teacher", "tokenizer.ggml.pre": "gpt-2"}
    assert len(given[0].texts) > 3  # more than the samples, and whole
    tokenizer = AutoTokenizer.from_pretrained(start / "teacher")
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in given[0].texts)
    down = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(2)]  # 48 wide: 32 does not divide them
    card = (folder / "README.md").read_text()
    assert manifest(folder)["certificates"]["fallbacks"].items() >= dict.fromkeys(down, "f16").items()
    before, _, folded = card.partition("<details>")
    assert "- of the parameters, whose widths do not allow what was asked for: 2 are f16, 1 is q8_0\n" in before
    assert not any(name in before for name in down)
    lines = {line for line in folded.partition("</details>")[0].splitlines() if line.startswith("- ")}
    assert lines == {*(f"- `{name}`: f16" for name in down), "- `lm_head.weight`: q8_0"}


def test_a_run_that_was_killed_goes_on_behind_the_formats_that_are_done(
    start: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_of(start, tmp_path)
    stage, context = EXPERIMENT.begin(run_dir, "export", f"model.path={start}/teacher", WITH_GPTQ)
    stage.prepare(context)

    def dies(self: Any, finished: Finished, folder: Path) -> Any:
        (folder / "half.safetensors").write_bytes(b"0")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CompressedTensors, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
    assert not context.out.exists()
    done = context.work / "huggingface" / "model.safetensors"
    before = os.stat(done).st_mtime_ns
    stage.run(context)
    assert os.stat(context.out / "huggingface" / "model.safetensors").st_mtime_ns == before
    for name in FORMATS:
        for file in ("model.safetensors", "config.json"):
            assert (context.out / name / file).read_bytes() == (exported / name / file).read_bytes()
        assert not (context.out / name / "half.safetensors").exists()


@pytest.mark.parametrize("harm", ["a weight", "the manifest", "a figure", "a file more", "a reference"])
def test_a_finished_format_that_was_changed_is_told_and_made_again(
    start: Path,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    harm: str,
) -> None:
    run_dir = run_of(start, tmp_path)
    words = [f"model.path={start}/teacher", "format=[huggingface]"]
    stage, context = EXPERIMENT.begin(run_dir, "export", *words)
    stage.prepare(context)
    with monkeypatch.context() as patch:

        def dies(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(artifact, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
    capsys.readouterr()
    done = context.work / "huggingface"
    told = done / "manifest.json"
    if harm == "a weight":
        content = bytearray((done / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (done / "model.safetensors").write_bytes(content)
    elif harm == "the manifest":
        told.write_bytes(told.read_bytes()[:99])
    elif harm == "a figure":
        told.write_text(told.read_text().replace('"kl": ', '"kl": 9'))
    elif harm == "a file more":
        (done / "modeling.py").touch()
    else:
        shutil.rmtree(done)
        (references,) = context.work.glob(".references*")
        first = min(references.glob("logits-*"))
        held = {name: tensor + 1 for name, tensor in load_file(first).items()}
        save_file(held, first)
    stage.run(context)
    out = capsys.readouterr().out
    assert out.count("was changed since it was written; it is made again") == (harm != "a reference")
    assert {path.name for path in (context.out / "huggingface").iterdir()} == {
        path.name for path in (exported / "huggingface").iterdir()
    }
    for file in ("model.safetensors", "config.json"):
        assert (context.out / "huggingface" / file).read_bytes() == (exported / "huggingface" / file).read_bytes()
    assert manifest(context.out)["certificates"]["huggingface"]["kl"] < 1e-9
    assert not artifact.foreign(context.out)
    assert artifact.altered(context.out, manifest(context.out)) == []


def test_a_failed_certificate_is_one_line_and_leaves_nothing(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = run_of(start, tmp_path)
    words = [f"model.path={start}/teacher", "format=[gptq]"]
    stage, context = EXPERIMENT.begin(run_dir, "export", *words)
    stage.prepare(context)
    plain = GPTQ.write

    def other(self: Any, finished: Finished, folder: Path) -> Any:
        found = plain(self, finished, folder)
        held = load_file(folder / "model.safetensors")
        held["model.layers.1.mlp.up_proj.qweight"][0, 0] ^= 1 << 4  # one integer by one
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return found

    monkeypatch.setattr(GPTQ, "write", other)
    with pytest.raises(Refusal, match=r"gptq: model\.layers\.1\.mlp\.up_proj\.weight is another one") as refused:
        stage.run(context)
    assert "\n" not in str(refused.value)
    assert not context.out.exists()
    assert not list(context.work.glob("*gptq*"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("norm", r"compressed_tensors: model\.norm\.weight is another one once reloaded; nothing was written"),
        ("skipped", r"compressed_tensors: model\.embed_tokens\.weight is another one once reloaded"),
        ("epsilon", r"its logits differ by .* is allowed \(export\.logits_tolerance\)"),
    ],
)
def test_what_is_not_quantized_is_certified_too(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    run_dir = run_of(start, tmp_path)
    words = [f"model.path={start}/teacher", "formats.huggingface=null"]
    stage, context = EXPERIMENT.begin(run_dir, "export", *words)
    stage.prepare(context)
    plain = CompressedTensors.write

    def other(self: Any, finished: Finished, folder: Path) -> Any:
        found = plain(self, finished, folder)
        held = load_file(folder / "model.safetensors")
        if what == "norm":
            held["model.norm.weight"] *= 1.001
        elif what == "skipped":  # in eight bits, which hardly shows in what the model says
            step = held["model.embed_tokens.weight"].abs().amax() / 127
            held["model.embed_tokens.weight"] = (held["model.embed_tokens.weight"] / step).round() * step
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return found

    monkeypatch.setattr(CompressedTensors, "write", other)
    with pytest.raises(Refusal, match=said) as refused:
        stage.run(context)
    if what == "epsilon":
        assert "(stages.export.logits_tolerance)" in context.in_its_words(str(refused.value))
    assert not context.out.exists()


def test_every_export_is_measured_and_reported(start: Path, exported: Path) -> None:
    words = [f"model.path={start}/teacher", WITH_GPTQ, "stages.evaluate.models=[quantize,export]"]
    results = manifest(EXPERIMENT.make(start / "run", "evaluate", *words))
    assert set(results["parents"]) == {"quantize", "export"}
    rows = {row["stage"]: row for row in results["metrics"]["rows"]}
    assert list(rows) == ["quantize", *(f"export/{name}" for name in FORMATS)]
    for name in FORMATS:
        row = rows[f"export/{name}"]
        assert row["perplexity"] == pytest.approx(rows["quantize"]["perplexity"], rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(rows["quantize"]["bits_per_byte"], rel=1e-5)
        assert row["bits_per_weight"] == manifest(exported / name)["certificates"]["bits_per_weight"]
        assert row["parameters"] == rows["quantize"]["parameters"]
        # whoever unpacks a layout here is not who serves it
        assert ("generate_tokens_per_second" in row) == ("peak_memory_bytes" in row) == (name != "gptq")
    assert rows["export/compressed_tensors"]["bytes"] < rows["export/huggingface"]["bytes"] < 10**6
    report = write_report(start / "run")
    assert {"quantize", *(f"export/{name}" for name in FORMATS)} <= {row["stage"] for row in report["rows"]}
    page = (start / "run" / "report.md").read_text()
    assert "bits per weight" in page
    assert "measured by" in page
    assert "bits/\nweight" in [column.header for column in table(report).columns]


def test_activations_are_certified_as_the_runtime_rounds_them_and_the_card_tells_the_difference(
    start: Path, tmp_path: Path
) -> None:
    words = [
        f"model.path={start}/teacher",
        "scheme=w8a8",
        "scheme.weights.group_size=null",
    ]
    EXPERIMENT.make(tmp_path, "quantize", *words)
    exported = EXPERIMENT.make(tmp_path, "export", *words)
    for name, said in (
        ("huggingface", "no runtime that opens this rounds activations"),
        ("compressed_tensors", "2 max |x| / 255"),
    ):
        certificate = manifest(exported / name)["certificates"]
        assert certificate["weights_bit_equal"]
        assert certificate["kl"] < 1e-9 < certificate["kl_as_quantized"]
        told = f"{said}.*; KL {certificate['kl_as_quantized']:.1e} from the model as it was quantized"
        assert re.search(told.replace("|", r"\|"), (exported / name / "README.md").read_text())


def test_a_file_that_was_damaged_since_is_not_measured_as_what_was_certified(
    start: Path, exported: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(start / "run", run_dir)
    path = run_dir / "export" / "compressed_tensors" / "model.safetensors"
    held = bytearray(path.read_bytes())
    held[-1] ^= 1
    path.write_bytes(held)
    with pytest.raises(Refusal, match=r"/export: its files have changed since they were certified; force=\[export\]"):
        EXPERIMENT.make(
            run_dir, "evaluate", f"model.path={start}/teacher", WITH_GPTQ, "stages.evaluate.models=[export]"
        )


def test_a_format_that_was_not_made_is_refused_before_anything_is_measured(start: Path, exported: Path) -> None:
    words = [f"model.path={start}/teacher", "format=[huggingface,compressed_tensors,gptq,awq]"]
    config = EXPERIMENT.composed(start / "run", *words)
    with pytest.raises(
        Refusal, match=r"export has made no awq; run export too, or leave it out with formats\.awq=null"
    ):
        check({"config": config, "stages": ["evaluate"]})


def test_figures_of_an_export_that_was_made_anew_are_not_passed_off_as_its_own(exported: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(exported, run_dir / "export")
    row = {"stage": "export/gptq", "path": "x", "perplexity": 1.5, "bytes": 1}
    other = {"export": {"path": str(run_dir / "export"), "content_hash": "sha256:other"}}
    results = {"stage": "evaluate", "kind": "results", "parents": other, "files": {}, "content_hash": "sha256:0"}
    (run_dir / "evaluate").mkdir()
    (run_dir / "evaluate" / "manifest.json").write_text(
        json.dumps({**results, "metrics": {"rows": [row], "comparisons": []}})
    )
    rows = {each["stage"]: each for each in write_report(run_dir)["rows"]}
    assert sorted(rows) == sorted(f"export/{name}" for name in FORMATS)
    assert all(each["perplexity"] is None and each["bits_per_weight"] > 0 for each in rows.values())


def test_documents_are_scored_one_by_one_as_packed_rows_are(start: Path) -> None:
    model = open_for_inference(str(start / "teacher"), "cpu", "float32")
    draw = torch.Generator().manual_seed(0)

    def row(*lengths: int) -> dict[str, Any]:
        ids = torch.randint(3, 300, (sum(lengths),), generator=draw).tolist()
        positions = [at for length in lengths for at in range(length)]
        targets = [*ids[1:], -100]
        ends = {sum(lengths[: number + 1]) - 1 for number in range(len(lengths))}
        return {
            "input_ids": ids,
            "position_ids": positions,
            "targets": [-100 if at in ends else target for at, target in enumerate(targets)],
        }

    batch = collate([row(5, 9, 3), row(8), row(1, 6)], pad_token=0)
    assert [len(ids) for ids, *_ in pieces(batch)] == [5, 9, 3, 8, 6]

    class Runtime:
        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=ids).logits

    want, got = likelihood_of(model, [batch]), likelihood_served(Runtime(), [batch])
    assert got.tokens == want.tokens == 4 + 8 + 2 + 7 + 5
    assert got.nats == pytest.approx(want.nats, rel=1e-5)


REFUSED = {
    "scheme.weights.bits=3 format=[compressed_tensors,awq]": [
        "format=awq: it has no 3 bits; quantize with scheme.weights.bits=4"
    ],
    "scheme.weights.symmetric=false": ["format=compressed_tensors: asymmetric", "scheme.weights.symmetric=true"],
    "stages.quantize.dtype=bfloat16": ["rounds scales in float16", "scheme.weights.scale_dtype=bfloat16"],
    "stages.export.dtype=int8": ["export.dtype=int8", "float32"],
    "stages.export.samples=0": ["export.samples=0", "at least 1"],
    "stages.export.length=100": ["export.length=100", "at most 64"],
    "stages.export.kl_tolerance=0": ["kl_tolerance=0", "above 0"],
    "formats.huggingface=null formats.compressed_tensors=null": ["none is left"],
    "format=[]": ["none is left", "format=[huggingface,gptq]"],
    "stages.export.formats=null": ["none is left"],
    "+scheme@formats.four=w4a16_g32": ["formats.four: W4A16 g32 is no format"],
    "+formats.gguf.type=q8_0": ["formats.gguf: {'type': 'q8_0'} is no format", "format=[gguf]"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_container_holds_is_refused_before_a_model_is_quantized(
    words: str, start: Path, tmp_path: Path
) -> None:
    config = EXPERIMENT.composed(tmp_path / "run", f"model.path={start}/teacher", *words.split())
    with pytest.raises(Refusal) as refused:
        check({"config": config, "stages": ["quantize", "export"]})
    assert "\n" not in str(refused.value)
    for part in REFUSED[words]:
        assert part in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_plan_of_the_whole_chain_passes_where_all_fits(start: Path, tmp_path: Path) -> None:
    config = EXPERIMENT.composed(tmp_path / "run", f"model.path={start}/teacher", WITH_GPTQ)
    plan = check({"config": config, "stages": ["quantize", "export", "evaluate"]})["plan"]
    assert plan[1]["until"] == "huggingface, compressed_tensors, gptq"
    assert plan[1]["parents"] == {"model": str(tmp_path / "run" / "quantize")}
    assert plan[2]["model"] == "5 models"
    assert plan[2]["parents"]["export"] == str(tmp_path / "run" / "export")


def test_an_export_is_no_model_to_export(exported: Path) -> None:
    words = [f"stages.export.model={exported}/gptq", f"model.path={exported}"]
    with pytest.raises(Refusal, match="its weights are packed; give the model it was made of"):
        check({"config": EXPERIMENT.composed(exported.parent / "again", *words), "stages": ["export"]})


@pytest.mark.parametrize("stage", ["quantize", "export", "evaluate"])
def test_a_folder_that_an_old_version_has_quantized_is_refused_in_one_line(
    stage: str, start: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(start / "teacher", old)
    (old / "grid.safetensors").write_bytes(b"")
    words = [f"model.path={old}", f"stages.export.model={old}", f"stages.evaluate.models=[{old}]"]
    with pytest.raises(
        Refusal, match=r"old: it was quantized by a version before 0\.2 \(grid\.safetensors\); run"
    ) as no:
        check({"config": EXPERIMENT.composed(tmp_path / "run", *words), "stages": [stage]})
    assert "\n" not in str(no.value)


def test_widths_are_rounded_to_what_schemes_and_formats_of_later_stages_need(start: Path, tmp_path: Path) -> None:
    words = ["+stage@stages.prune=prune", "stages.prune.multiple_of=auto", "order=[prune,quantize,export]"]
    words += [f"model.path={start}/teacher", "~stages.evaluate"]
    gguf = "format=[gguf]"
    blocks = ["+stage@stages.qat=qat", "qat=ggml", "order=[prune,quantize,qat,export]"]
    for more, want in (
        ([], 16),
        ([WITH_GPTQ], 32),
        (["scheme.weights.group_size=24", WITH_GPTQ], 96),
        ([gguf], 32),
        ([gguf, "formats.gguf.type=q4_k_m"], 256),
        (blocks, 256),
    ):
        config = EXPERIMENT.composed(tmp_path, *words, *more)
        stage, context = EXPERIMENT.begin(tmp_path, "prune", *words, *more)
        assert stage._multiple(context) == want, config["stages"]["export"]["formats"]
    stage = build(EXPERIMENT.composed(tmp_path, *words[:1], "stages.prune.multiple_of=64", *words[2:]), "prune")
    assert stage._multiple(context) == 64
    told = set()
    for size in (8, 16):
        config = EXPERIMENT.composed(tmp_path, *words, f"scheme.weights.group_size={size}")
        told.add(check({"config": config, "stages": ["prune"]})["plan"][0]["content"])
    assert len(told) == 2  # a finished cut is made anew where they need another number
    with pytest.raises(Refusal, match="need a whole number, or auto"):
        build(EXPERIMENT.composed(tmp_path, *words[:1], "stages.prune.multiple_of=most", *words[2:]), "prune")


@dataclass(frozen=True)
class Twins(Stage):
    """Makes exports, and has no field `formats`."""

    makes: ClassVar[Makes] = "exports"

    @classmethod
    def multiple(cls, settings: Mapping[str, Any]) -> int:
        return 40

    @classmethod
    def exports(cls, settings: Mapping[str, Any]) -> dict[str, Format]:
        return {"one": HuggingFace(), "other": HuggingFace()}

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return {}

    def content(self) -> str:
        return ""

    def check(self, context: Context) -> Plan:
        return Plan()

    def prepare(self, context: Context) -> None:
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        def build(folder: Path) -> None:
            for name in self.exports({}):
                (folder / name).mkdir()
                (folder / name / "config.json").write_text("{}")

        publish(context.out, build, context.manifest(self.makes))


def with_twins(run_dir: Path, start: Path, *words: str) -> dict[str, Any]:
    words = (*words, "+stage@stages.prune=prune", "order=[prune,quantize,export,evaluate]")
    config = EXPERIMENT.composed(run_dir, f"model.path={start}/teacher", *words)
    config["stages"]["twins"] = {"_target_": f"{__name__}.Twins"}
    config["order"] = ["prune", "twins", "evaluate"]
    return config


def test_a_stage_of_ones_own_says_what_it_exports_and_which_widths_it_needs(start: Path, tmp_path: Path) -> None:
    config = with_twins(tmp_path / "run", start, "stages.prune.multiple_of=auto", "stages.evaluate.models=[twins]")
    assert build(config, "prune")._multiple(Context(config, "prune")) == 40
    stage = build(config, "evaluate")
    assert stage.parents(Context(config, "evaluate", planned=["twins"])) == {"twins": f"{tmp_path}/run/twins"}
    make(config, "twins")
    assert list(stage._exports(Context(config, "evaluate"))) == ["twins/one", "twins/other"]
    rows = write_report(tmp_path / "run")["rows"]
    assert [row["stage"] for row in rows] == ["twins/one", "twins/other"]
    assert check({"config": config, "stages": ["evaluate"]})["plan"][0]["model"] == "2 models"


def test_a_plain_model_that_comes_out_as_another_fails_the_stage(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = HuggingFace.write

    def other(self: HuggingFace, finished: Finished, folder: Path) -> Written:
        written = plain(self, finished, folder)
        held = load_file(folder / "model.safetensors")
        held["model.layers.0.mlp.up_proj.weight"] *= -7
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(HuggingFace, "write", other)
    words = [f"model.path={start}/teacher", f"stages.export.model={start}/teacher", "format=[huggingface]"]
    with pytest.raises(Refusal, match=r"up_proj\.weight is another one once reloaded; nothing was written"):
        EXPERIMENT.make(tmp_path / "run", "export", *words)
    assert not (tmp_path / "run" / "export").exists()
