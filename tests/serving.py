"""A real HTTP server around a model folder, in the shapes that vLLM, llama.cpp and others answer in.

    python -m tests.serving FOLDER PORT DIALECT [--fail-every N] [--die-after N] [--max-logprobs N] [--dtype D]

Every dialect is served, under /DIALECT/v1; the one named is served at /v1 too. A token's text is its id in brackets.
With --fail-every, every Nth POST meets, in turn, a 503, a dropped connection, half an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.command import ROOT

DIALECTS = ("vllm", "openai", "strings", "llama.cpp", "tgi", "broken")
OWNERS = {"vllm": "vllm", "llama.cpp": "llamacpp"}
# llama.cpp tells no probabilities of a token that ends inside a character; of these it does not here.
INSIDE_A_CHARACTER = range(30, 60)


class Rejected(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Model:
    def __init__(self, folder: str, max_logprobs: int, dtype: str = "float32") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.vocabulary = self.model.config.vocab_size
        self.max_logprobs = max_logprobs
        self.lock = threading.Lock()

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        if not all(0 <= token < self.vocabulary for token in ids):
            raise Rejected(400, f"Token id {max(ids)} is out of vocabulary")
        with self.lock, torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def ids(self, prompt: list[int] | str) -> list[int]:
        return [int(found) for found in re.findall(r"<(\d+)>", prompt)] if isinstance(prompt, str) else prompt

    def text(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    def greedy(self, prompt: list[int], limit: int, stop: list[str]) -> tuple[list[int], str, str]:
        ids: list[int] = []
        while len(ids) < limit:
            ids.append(int(self.logprobs(prompt + ids)[-1].argmax()))
            for end in stop:
                if end in self.text(ids):
                    return ids, self.text(ids).partition(end)[0], "stop"
        return ids, self.text(ids), "length"

    def vllm(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k = self.ids(body["prompt"]), body.get("prompt_logprobs")
        self.allow(k)
        generated, text, reason = self.greedy(ids, body["max_tokens"], body.get("stop", []))
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason, "prompt_logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = generated
        if body.get("logprobs") is not None and body["max_tokens"] == len(generated) and k is None:
            rows = self.logprobs(ids + generated)[len(ids) - 1 : -1]
            choice["logprobs"] = {"token_logprobs": rows.gather(1, torch.tensor(generated)[:, None])[:, 0].tolist()}
        if k is not None:
            choice["prompt_logprobs"] = [None]
            for own, row in zip(ids[1:], self.logprobs(ids), strict=False):
                # The prompt's own token comes first, at its rank; if it is among the best, it is there once.
                told = {own: int((row >= row[own]).sum())}
                told |= {int(token): rank for rank, token in enumerate(row.topk(k).indices, 1)}
                choice["prompt_logprobs"].append(
                    {
                        str(token): {"logprob": row[token].item(), "rank": rank, "decoded_token": f"<{token}>"}
                        for token, rank in told.items()
                    }
                )
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def openai(self, body: dict[str, Any], by_id: bool) -> dict[str, Any]:
        if "prompt_logprobs" in body:
            raise Rejected(400, "Unrecognized request argument supplied: prompt_logprobs")
        if not by_id and body.get("logprobs", 0) > 5:
            raise Rejected(400, "Invalid value for 'logprobs': must be less than or equal to 5.")
        ids = self.ids(body["prompt"])
        _, text, reason = self.greedy(ids, body["max_tokens"], body.get("stop", []))
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        if body.get("echo") and body.get("logprobs"):
            self.allow(body["logprobs"])
            name = (lambda token: f"token_id:{int(token)}") if by_id else (lambda token: f"<{int(token)}>")
            top: list[dict[str, float] | None] = [None]
            for own, row in zip(ids[1:], self.logprobs(ids), strict=False):
                best = [own, *row.topk(body["logprobs"]).indices]
                top.append({name(token): row[token].item() for token in best})
            choice["logprobs"] = {"tokens": [name(token) for token in ids], "top_logprobs": top, "text_offset": []}
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def llama_cpp(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = self.ids(body["prompt"])
        if body["n_predict"] > 1:
            generated, text, reason = self.greedy(ids, body["n_predict"], body.get("stop", []))
            stop_type = {"length": "limit", "stop": "word"}[reason]
            return {"content": text, "tokens": generated, "stop_type": stop_type}
        raw = self.logprobs(ids)[-1]
        biased = raw.clone()
        for token, bias in body.get("logit_bias", []):
            biased[token] = -torch.inf if bias is False else biased[token] + bias
        sampled = int(biased.argmax())
        answer = {"content": "", "tokens": [sampled], "tokens_predicted": 1, "tokens_evaluated": len(ids)}
        if sampled not in INSIDE_A_CHARACTER:
            best = raw.topk(min(body["n_probs"], self.vocabulary)).indices.tolist()
            told = [{"id": token, "token": f"<{token}>", "bytes": [], "logprob": raw[token].item()} for token in best]
            answer["completion_probabilities"] = [{"id": sampled, "logprob": raw[sampled].item(), "top_logprobs": told}]
        return answer

    def allow(self, k: int | None) -> None:
        if k is not None and k > self.max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            raise Rejected(400, f"{message} (parameter=prompt_logprobs, value={k})")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    model: Model
    dialect: str
    fail_every: int
    die_after: int
    posts = 0
    connections = 0
    counting = threading.Lock()

    def setup(self) -> None:
        super().setup()
        with Handler.counting:
            Handler.connections += 1

    def do_GET(self) -> None:
        dialect, path = self.place()
        if path == "/count":
            return self.answer(200, {"posts": Handler.posts, "connections": Handler.connections})
        if path == "/v1/models":
            owner = OWNERS.get(dialect, "someone")
            return self.answer(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "owned_by": owner}]})
        if path == "/info" and dialect == "tgi":
            return self.answer(200, {"model_id": "tiny", "router": "text-generation-router", "version": "3.3.7"})
        if path == "/props" and dialect == "llama.cpp":
            return self.answer(200, {"default_generation_settings": {}, "total_slots": 4})
        return self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        dialect, path = self.place()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Handler.counting:
            Handler.posts += 1
            turn = Handler.posts
        if turn == self.die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        failure = turn // self.fail_every % 3 if self.fail_every and turn % self.fail_every == 0 else None
        if failure == 0:
            return self.answer(503, {"error": {"message": "Loading model"}}, {"Retry-After": "0"})
        if failure == 1:
            self.close_connection = True
            return None
        try:
            answer = self.completion(dialect, path, body)
        except Rejected as problem:
            return self.answer(problem.status, {"error": {"message": str(problem), "code": problem.status}})
        return self.answer(200, answer, cut=failure == 2)

    def completion(self, dialect: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if dialect == "llama.cpp" and path == "/completion":
            return self.model.llama_cpp(body)
        if path != "/v1/completions" or dialect == "llama.cpp":
            raise Rejected(404, "Not Found")
        if self.headers.get("Authorization") == "Bearer wrong":
            raise Rejected(401, "Unauthorized")
        if dialect == "tgi" and not isinstance(body["prompt"], str):
            raise Rejected(422, "data did not match any variant of untagged enum PromptDeserializer")
        if dialect in ("vllm", "broken"):
            answer = self.model.vllm(body)
            if dialect == "broken" and len(body["prompt"]) > 2:
                row = answer["choices"][0]["prompt_logprobs"][1]
                row[next(iter(row))]["logprob"] = float("nan")
            return answer
        return self.model.openai(body, by_id=dialect == "openai")

    def place(self) -> tuple[str, str]:
        """The dialect, and the path that remains."""
        _, first, rest = self.path.split("/", 2) if self.path.count("/") > 1 else ("", "", self.path)
        return (first, f"/{rest}") if first in DIALECTS else (self.dialect, self.path)

    def answer(
        self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        data = json.dumps(body).encode()
        if cut:
            data = data[: len(data) // 2]
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json", "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class ServerProcess:
    """This file's server in a process of its own, at a port of its own."""

    def __init__(self, folder: Path, *options: str, dialect: str = "vllm") -> None:
        self.folder, self.options, self.dialect, self.port = folder, options, dialect, free_port()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.serving", str(self.folder), str(self.port), self.dialect, *self.options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        while self.process.stdout.readline().strip() != "ready":
            assert self.process.poll() is None, "the server did not start"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    parser.add_argument("dialect", choices=DIALECTS)
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    told = parser.parse_args()
    torch.set_num_threads(1)
    Handler.model, Handler.dialect = Model(told.folder, told.max_logprobs, told.dtype), told.dialect
    Handler.fail_every, Handler.die_after = told.fail_every, told.die_after
    server = Server(("127.0.0.1", told.port), Handler)
    print("ready", flush=True)
    server.serve_forever()
