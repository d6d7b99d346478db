"""A teacher that ran once, or answered over HTTP, against one that runs beside the student: the same numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.errors import Refusal
from models.teachers.cache import Cache, read_header, write_header
from models.teachers.encodings.encoding import Payload
from models.teachers.encodings.top_k import TopK
from models.teachers.endpoint import Endpoint
from models.teachers.served import Served
from models.teachers.served_payload import served_payload
from pipeline.artifact import content_hash
from pipeline.check import check
from pipeline.context import Context
from pipeline.data.documents import Documents
from pipeline.stages.record import Record
from tests import staged
from tests.command import ROOT, SMALL, train, unclocked, weights
from tests.staged import manifest

LITTLE = [
    *SMALL,
    "data.max_documents=12",
    "stages.pretrain.training.max_steps=4",
    "stages.distill.training.max_steps=5",
    "stages.distill.training.validate_every_steps=5",
    "trainer.log_every_steps=1",
    "+student.shape.attention_dropout=0.0",  # which draws differently on every rank
]
CACHED = ["teacher=cached", "stages.record.shard_mb=1"]
HIDDEN = [*CACHED, "encoding=hidden_states", "encoding.dtype=float32"]
WHOLE = [*CACHED, "encoding.k=400", "encoding.dtype=float32"]


def composed(run_dir: Path, *words: str) -> dict[str, Any]:
    return staged.composed(run_dir, "+experiment=quickstart", *LITTLE, *words)


def make(run_dir: Path, stage: str, *words: str) -> Path:
    return staged.make(composed(run_dir, *words), stage)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    near = ("teacher_gap", "top1_agreement")  # which a teacher's likeliest tokens do not say, or otherwise in a tie
    found = [value for line in lines for name, value in unclocked(line).items() if name not in near]
    assert len(found) >= 30
    return found


def same_training(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=tolerance)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance, msg=name)


def signals(folder: Path) -> dict[bytes, Payload]:
    """All that a cache holds, by key."""
    cache = Cache(folder)
    keys = [shard.keys_P2[place].tobytes() for shard in cache.shards for place in range(len(shard.keys_P2))]
    return {key: cache.read([key], torch.device("cpu")) for key in keys}


def same_signals(one: Path, other: Path) -> None:
    mine, theirs = signals(one), signals(other)
    assert mine.keys() == theirs.keys()
    for key, payload in mine.items():
        for name, tensor in payload.items():
            # Batches of other widths round elsewhere.
            torch.testing.assert_close(tensor, theirs[key][name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the teacher beside the student."""
    run_dir = tmp_path_factory.mktemp("record") / "online"
    done = train(f"run_dir={run_dir}", *LITTLE, "stop=distill")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


@pytest.fixture(scope="module")
def hidden(online: Path) -> Path:
    """A run that records float32 hidden states, and trains from them after the teacher's weights are gone."""
    run_dir = online.parent / "hidden"
    shutil.copytree(online / "pretrain", run_dir / "pretrain")
    done = train(f"run_dir={run_dir}", *LITTLE, *HIDDEN, "stop=record")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished, skipped") == 1
    return run_dir


def teacher_of(run: Path) -> str:
    return f"teacher.path={run / 'pretrain'}"


def cache_of(run: Path) -> str:
    return f"teacher.cache={run / 'record'}"


# --- the same training ---


def test_hidden_states_train_as_the_teacher_beside_does_and_it_is_never_opened(
    online: Path, hidden: Path, tmp_path: Path
) -> None:
    record = tmp_path / "record"  # without the teacher's weights anywhere near
    shutil.copytree(hidden / "record", record)
    made = make(tmp_path, "distill", "teacher=cached", f"teacher.path={record}", f"teacher.cache={record}")
    same_training(made, online / "distill")


def test_a_cache_of_another_teacher_is_refused(hidden: Path, tmp_path: Path) -> None:
    """Its tokenizer, and so every piece, is the same; only its weights differ."""
    other = tmp_path / "other"
    shutil.copytree(hidden / "pretrain", other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(Refusal, match="recorded of another teacher"):
        make(tmp_path, "distill", "teacher=cached", f"teacher.path={other}", cache_of(hidden))


def test_a_whole_top_k_trains_as_the_teacher_beside_does(online: Path, tmp_path: Path) -> None:
    record = make(tmp_path, "record", *WHOLE, teacher_of(online))
    assert "tails" not in next(iter(signals(record).values()))
    same_training(make(tmp_path, "distill", *WHOLE, teacher_of(online)), online / "distill")


OTHERS = {
    "another student": ["student.shape.num_hidden_layers=2", "student.shape.intermediate_size=48"],
    "another batch": ["stages.distill.training.global_batch=6", "stages.distill.training.micro_batch=2"],
    "another seed": ["seed=5", "stages.distill.training.micro_batch=8"],
    "no packing": ["data.packing=false"],
    "another divergence": ["divergence=jensen_shannon", "divergence.temperature=3.0"],
}


@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS)
def test_one_cache_serves_every_student_and_every_batch(
    words: list[str], online: Path, hidden: Path, tmp_path: Path
) -> None:
    beside = make(tmp_path / "online", "distill", teacher_of(online), *words)
    cached = make(tmp_path / "cached", "distill", "teacher=cached", teacher_of(online), cache_of(hidden), *words)
    same_training(cached, beside)


@pytest.mark.slow
def test_only_the_cache_is_left_and_two_ranks_train_from_it(online: Path, hidden: Path, tmp_path: Path) -> None:
    """In a run folder of its own: neither a teacher is trained there nor a signal recorded."""
    shutil.copytree(hidden / "record", tmp_path / "kept")
    words = ["teacher=cached", f"teacher.path={tmp_path / 'kept'}", f"teacher.cache={tmp_path / 'kept'}"]
    ranks = ["strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    done = train(f"run_dir={tmp_path / 'run'}", *LITTLE, *words, *ranks, "stop=distill")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"distill", "logs", "work"}
    same_training(tmp_path / "run" / "distill", online / "distill")


# --- recording ---


@pytest.mark.slow
def test_a_recording_killed_half_way_goes_on_with_two_ranks_to_the_same_pieces(hidden: Path, tmp_path: Path) -> None:
    shutil.copytree(hidden / "pretrain", tmp_path / "pretrain")
    words = [f"run_dir={tmp_path}", *LITTLE, *HIDDEN, "stages=[record]"]
    killing = {"path": str(ROOT / "tests" / "killing"), "RETORT_TEST_KILL": "os.rename .shard-0000-000001 1"}
    assert train(*words, **killing).returncode not in (0, 2)
    (shards,) = (tmp_path / "work" / "signals" / "record").glob("*")
    assert {path.name for path in shards.glob("*shard*")} == {
        "shard-0000-000000.safetensors",
        ".shard-0000-000001.safetensors.partial",
    }
    first = shards / "shard-0000-000000.safetensors"
    before, held = first.stat().st_mtime_ns, len(Cache(shards))
    # Other values of what the signal does not depend on: what is there is kept.
    done = train(*words, "stages.record.batch_size=3", "strategy=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert done.returncode == 0, done.stdout + done.stderr
    record = tmp_path / "record"
    assert not list(record.glob(".*"))
    assert not list((tmp_path / "work").glob("record*"))
    assert not (tmp_path / "work" / "signals" / "record").exists()
    assert (record / first.name).stat().st_mtime_ns == before
    assert {path.name[:10] for path in record.glob("shard-*")} == {"shard-0000", "shard-0001"}
    same_signals(record, hidden / "record")
    assert 0 < held < len(Cache(record)) == len(signals(record))  # and none twice


def test_the_manifest_states_bytes_and_errors(hidden: Path) -> None:
    manifest = json.loads((hidden / "record" / "manifest.json").read_text())
    metrics = manifest["metrics"]
    assert manifest["kind"] == "signal"
    assert manifest["parents"]["teacher"]["content_hash"] == content_hash(hidden / "pretrain")
    held = signals(hidden / "record")
    tokens = sum(len(payload["hidden"]) for payload in held.values())
    assert manifest["tokens"] == tokens
    assert metrics["pieces"] == len(held)
    shards = sum(path.stat().st_size for path in (hidden / "record").glob("shard-*"))
    assert metrics["bytes_per_token"] == pytest.approx(shards / tokens)
    assert 48 * 4 < metrics["bytes_per_token"] < 48 * 4 + 3
    (fidelity,) = metrics["fidelity"].values()
    assert fidelity["own_kl"] == pytest.approx(0, abs=1e-6)
    assert fidelity["gradient_error"] < 1e-5
    assert fidelity["tokens"] > 300


@pytest.mark.parametrize("encoding", ["top_k", "sampled"])
def test_a_coarser_encoding_states_its_error(encoding: str, online: Path, tmp_path: Path) -> None:
    words = ["teacher=cached", f"encoding={encoding}", teacher_of(online)]
    if encoding == "top_k":
        words.append("encoding.temperatures=[2.0,3.0]")
    record = make(tmp_path, "record", *words)
    fidelity = json.loads((record / "manifest.json").read_text())["metrics"]["fidelity"]
    assert list(fidelity) == (["2", "3"] if encoding == "top_k" else ["1"])
    for measured in fidelity.values():
        assert 1e-3 < measured["gradient_error"] < 100  # of draws at a nearly even teacher
        assert measured["kl_dense"] > 0


def test_what_an_earlier_result_holds_is_not_recorded_again(
    hidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard is lost and one damaged; the rest is adopted, unless the stage is forced."""
    shutil.copytree(hidden / "record", tmp_path / "record")
    lost, damaged, *others = Cache(tmp_path / "record").shards
    assert others
    content = bytearray(damaged.path.read_bytes())
    content[len(content) // 2] ^= 1  # of the hidden states
    damaged.path.write_bytes(content)
    lost.path.unlink()
    stage = "pipeline.stages.record.Record.run"
    told: list[dict[str, Any]] = []

    def spy(self: Any, context: Context) -> None:
        told.append(json.loads((context.work / "prepared.json").read_text()))
        told[-1]["adopted"] = len(Cache(Path(told[-1]["shards"])))
        run(self, context)

    run = Record.run
    monkeypatch.setattr(stage, spy)
    make(tmp_path, "record", *HIDDEN, teacher_of(hidden))
    assert told[0]["adopted"] == sum(len(shard.keys_P2) for shard in others)
    assert 0 < len(told[0]["todo"]) < told[0]["pieces"]
    same_signals(tmp_path / "record", hidden / "record")
    make(tmp_path, "record", *HIDDEN, teacher_of(hidden), "force=[record]")
    assert told[1]["adopted"] == 0


# --- refusals ---

TOP_K = ["teacher=cached"]
SAMPLED = ["teacher=cached", "encoding=sampled"]
REFUSED = {
    "another temperature": ([*TOP_K, "divergence.temperature=3.0"], "add it to encoding.temp"),
    "reverse KL of samples": (
        [*SAMPLED, "divergence=reverse_kl"],
        "cannot be worked out from samples",
    ),
    "another temperature of samples": ([*SAMPLED], "set encoding.temperature=2"),
    "whole distributions": (
        [*TOP_K, "divergence=universal_logit"],
        "record with encoding=hidden_states",
    ),
    "layers": (
        [*TOP_K, "auxiliary=[hidden_states]"],
        "compares layers, and the teacher is on disk as a cache of its signal only",
    ),
    "served at another temperature": (
        ["teacher=served", "teacher.endpoint.url=http://127.0.0.1:1/v1", "dry_run=true"],
        "set the temperature of forward_kl to 1",
    ),
    "no dtype": ([*HIDDEN, "encoding.dtype=int4"], "need bfloat16, float16, int8, float32"),
    "no draws": ([*SAMPLED, "encoding.draws=0"], "need 1 to 65535"),
    "no shard": ([*TOP_K, "stages.record.shard_mb=0"], "record.shard_mb=0: need at least 1"),
    "no cache": (
        ["teacher=cached", "teacher.cache=/nowhere"],
        "record the teacher's signal, or give the folder that it was written to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_loaded(case: str, online: Path) -> None:
    words, said = REFUSED[case]
    with pytest.raises(Refusal) as refused:
        check({"config": composed(online, *words), "stages": ["pretrain", "record", "distill"]})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_cache_of_another_tokenizer_and_a_student_of_its_layers_are_refused(hidden: Path, tmp_path: Path) -> None:
    other = tmp_path / "record"
    shutil.copytree(hidden / "record", other)

    def refused(*words: str) -> str:
        config = composed(tmp_path / "run", "teacher=cached", *words)
        with pytest.raises(Refusal) as problem:
            check({"config": config, "stages": ["distill"]})
        assert "\n" not in str(problem.value)
        return str(problem.value)

    alone = (f"teacher.path={other}", f"teacher.cache={other}")
    layers = ("~student.shape", "student._target_=models.student.Layers", "+student.keep=1")
    assert "teacher cache, without the model's weights" in refused(*alone, *layers)
    header = read_header(other)
    another = "0" * len(header.tokenizer)  # the manifest knows the file's length
    write_header(other, type(header)(**{**header.__dict__, "tokenizer": another}))
    assert "it was recorded with another tokenizer" in refused(teacher_of(hidden), f"teacher.cache={other}")


def test_other_text_than_was_recorded_is_refused_by_the_stage(hidden: Path, tmp_path: Path) -> None:
    words = ["teacher=cached", teacher_of(hidden), cache_of(hidden), "data.max_documents=16", "stages=[distill]"]
    done = train(f"run_dir={tmp_path}", *LITTLE, *words)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "a piece of the text is not in it" in line
    assert "record the teacher's signal on this data" in line


# --- a teacher that is served ---


def told_by_a_server(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As Endpoint.score gives it: the best k of all columns; an impossible one's place holds -1 at -inf."""
    best = logits.log_softmax(-1).topk(min(k, logits.shape[1]))
    ids = best.indices.where(best.values > -torch.inf, -1)
    return ids.numpy(), best.values.float().numpy()


def payload_of(told: tuple[np.ndarray, np.ndarray], k: int) -> Payload:
    """30 tokens, in a table of 36."""
    served = Served("teacher", "cache", Endpoint("http://host/v1", top_k=k))
    encoding = Record(Documents(), served, TopK(dtype="float32"))._encoding
    assert isinstance(encoding, TopK)
    return served_payload(encoding, *told, 30, 36, "teacher")


@pytest.mark.parametrize("k", [5, 30, 36])
def test_a_servers_padded_columns_and_impossible_tokens_are_no_tokens(k: int) -> None:
    """30 tokens in a table of 36: every id stands once, and what the server named keeps its share without padding."""
    logits = torch.randn(4, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    logits[0, 33] = logits[1, 35] = 6.0  # padding that the model finds likely
    logits[2, 4:] = -torch.inf  # four tokens are possible
    told = told_by_a_server(logits, k)
    payload = payload_of(told, k)
    ids, got = payload["ids"].long(), payload["logits"].double()
    assert ids.shape == (4, min(k, 30))
    assert all(len(row.unique()) == len(row) and row.max() < 30 for row in ids)
    assert got.isfinite().all()
    named, p = torch.from_numpy(told[0]), logits.softmax(-1)
    padding = torch.where(named >= 30, p.gather(1, named.clamp_min(0)), 0).sum(-1, keepdim=True)
    was_named = (ids[:, :, None] == named[:, None, :]).any(-1)
    expected = (p / (1 - padding)).log().gather(1, ids).clamp_min(-1e4)
    torch.testing.assert_close(got[was_named], expected[was_named], atol=1e-5, rtol=1e-5)
    assert (got[2][~was_named[2]] == -1e4).all()
    tails = payload["tails"][:, 0].double().exp() if k < 30 else 0
    torch.testing.assert_close(got.exp().sum(-1) + tails, torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    if k == 36:
        torch.testing.assert_close(got[:2].exp(), logits[:2, :30].softmax(-1).gather(1, ids[:2]), atol=1e-6, rtol=0)


def test_a_server_of_another_model_or_of_fewer_tokens_is_refused() -> None:
    with pytest.raises(Refusal, match="names token 40, and its model has 36; give the tokenizer and the config"):
        payload_of((np.array([[40, 3]]), np.log([[0.6, 0.2]])), 2)
    with pytest.raises(Refusal, match=r"teacher.endpoint.top_k=20: the server gives 2 tokens at most; set .*top_k=2$"):
        payload_of((np.array([[4, 3]]), np.log([[0.6, 0.2]])), 20)


class Server:
    """tests/serving.py around the teacher, at a port of its own that it keeps."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.folder = folder

    def start(self, *options: str) -> None:
        command = [sys.executable, "-m", "tests.serving", str(self.folder), str(self.port), "vllm", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--max-logprobs", "500"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        while self.process.stdout.readline().strip() != "ready":
            assert self.process.poll() is None, "the server did not start"

    def posts(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/count") as answer:
            return int(json.load(answer)["posts"])

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def server(online: Path) -> Iterator[Server]:
    made = Server(online / "pretrain")
    yield made
    made.kill()


def served_by(port: int, online: Path) -> list[str]:
    url = f"teacher.endpoint.url=http://127.0.0.1:{port}/v1"
    return ["teacher=served", teacher_of(online), url, "divergence.temperature=1.0", "data.max_documents=1"]


def test_a_server_that_is_not_there_is_told_by_the_check_and_warned_of_in_a_plan(online: Path, tmp_path: Path) -> None:
    words = [*served_by(1, online), "teacher.endpoint.retries=6"]
    told = r"^teacher\.endpoint\.url=http://127\.0\.0\.1:1/v1: no answer \(.*\); start the server or correct the addr"
    with pytest.raises(Refusal, match=told) as refused:
        check({"config": composed(tmp_path, *words), "stages": ["record", "distill"]})
    assert "\n" not in str(refused.value)
    record, distill = check({"config": composed(tmp_path, *words, "dry_run=true"), "stages": ["record", "distill"]})[
        "plan"
    ]
    (warning,) = record["warnings"]
    assert re.match(told, warning)
    assert not any("endpoint" in each for each in distill["warnings"])
    # It may stop once it has been asked, and cannot be there before its model is.
    shutil.copytree(online / "pretrain", tmp_path / "record")
    assert check({"config": composed(tmp_path, *words), "stages": ["record"]})["plan"]
    shutil.rmtree(tmp_path / "record")
    own = [word for word in words if not word.startswith("teacher.path")]
    assert check({"config": composed(tmp_path, *own), "stages": ["pretrain", "record"]})["plan"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_record_says_what_its_server_was_proved_to_compute_in(
    dtype: str, server: Server, online: Path, tmp_path: Path
) -> None:
    server.start("--dtype", dtype)
    words = served_by(server.port, online)
    if dtype == "bfloat16":
        with pytest.raises(
            Refusal, match=r"teacher\.dtype=float32: the server at \S+ computes in bfloat16 .*--dtype fl"
        ):
            make(tmp_path, "record", *words)
        assert not list(tmp_path.rglob("shard-*"))
    proved = manifest(make(tmp_path, "record", *words, f"teacher.dtype={dtype}"))["metrics"]["server"]
    assert {name: proved[name] for name in ("kind", "model", "dtype", "proof")} == {
        "kind": "vllm", "model": "tiny", "dtype": dtype, "proof": "own forward",
    }  # fmt: skip
    assert proved["tokens"] >= 64
    assert proved["error"] < proved["error_of_bfloat16"] * (1 / 64 if dtype == "float32" else 4)


@pytest.mark.slow
def test_a_served_teacher_killed_half_way_goes_on_and_trains_as_the_one_beside(
    server: Server, online: Path, tmp_path: Path
) -> None:
    words = [
        "teacher=served",
        teacher_of(online),
        f"teacher.endpoint.url=http://127.0.0.1:{server.port}/v1",
        "teacher.endpoint.top_k=400",
        "teacher.endpoint.retries=1",
        "teacher.endpoint.concurrency=2",
        "encoding.dtype=float32",
        "stages.record.sample_tokens=1",
        "divergence.temperature=1.0",
        "data.max_documents=1",
    ]
    before = 2  # one that the check asks, and the sample
    server.start("--die-after", str(7 + before))
    command = [f"run_dir={tmp_path}", *LITTLE, *words, "stages=[record]"]
    done = train(*command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no usable answer in 2 tries" in done.stderr.strip().splitlines()[-1]
    assert "run the same command again to go on" in done.stderr.strip().splitlines()[-1]
    (shards,) = (tmp_path / "work" / "signals" / "record").glob("*")
    kept = len(Cache(shards))
    assert 3 <= kept < 7
    server.kill()
    server.start()
    done = train(*command, "teacher.endpoint.retries=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert kept + server.posts() - before == len(Cache(tmp_path / "record"))
    beside = make(tmp_path / "beside", "distill", teacher_of(online), *words[-2:])
    same_training(make(tmp_path, "distill", *words), beside, 1e-4)
