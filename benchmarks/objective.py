"""Seconds and peak memory of a distillation loss and its gradients: ours, the dense formula, the peers', the products.

    .venv/bin/python benchmarks/objective.py --quick

From hidden states and heads to the gradients of the student's hidden states and head: no model, no optimizer. Every
side works on the same tensors, in a process of its own, so that peak memory is its own; the sides take turns, so that a
busy machine slows all of them. Peers live in an environment of their own (benchmarks/README.md), whose Python runs this
very file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALPHA, TEMPERATURE, BETA = 0.5, 2.0, 0.5  # of the hard label; of the softmaxes; of the Jensen–Shannon divergence
TOP_K, SPARSE_CHUNK = 64, 1024
MET = {True: "met", False: "missed"}
GOALS = {"memory_to_dense": 0.1, "time_to_dense": 0.5, "time_to_fastest_peer": 0.7, "time_to_bound": 1.5}


@dataclass(frozen=True)
class Settings:
    cases: str = "2048x32000,2048x128256,2048x151936,8192x32000,8192x128256,8192x151936"  # tokens × vocabulary
    hidden: int = 1024
    teacher_hidden: int = 2048
    device: str = "cpu"
    precision: str = "fp32"  # bf16: hidden states and heads of both models
    threads: int = 2
    calls: int = 2  # timed in each process, after one that is not
    repeats: int = 2  # processes of each side
    distillkit: str = ""


@dataclass(frozen=True)
class Case:
    tokens: int
    vocabulary: int

    @staticmethod
    def read(text: str) -> Case:
        try:
            tokens, vocabulary = (int(each) for each in text.split("x"))
        except ValueError:
            sys.exit(f"error: --cases {text}: need tokens x vocabulary, such as 2048x32000")
        return Case(tokens, vocabulary)

    def __str__(self) -> str:
        return f"{self.tokens}x{self.vocabulary}"


@dataclass(frozen=True)
class Side:
    what: str  # it computes
    package: str  # "" is this Python
    make: Callable[[Any, Settings], Callable[[], Any]]
    # What it holds at its fullest, as measured, by which a case that does not fit is left out: so many fp32 tensors of
    # `tokens` × `columns`, the gradients twice, and the inputs, which while they are made are held twice.
    tensors: float
    tokens: int = sys.maxsize
    columns: int = sys.maxsize
    agrees_with: str = "kl"  # which reference its divergence comes to
    compiled: bool = False

    def estimate(self, case: Case, settings: Settings) -> int:
        rows = -(-case.tokens // max(1, case.tokens // self.tokens))
        gradients = settings.hidden * (case.tokens + case.vocabulary)
        inputs = (settings.hidden + settings.teacher_hidden) * (case.tokens + case.vocabulary)
        return 4 * int(self.tensors * rows * min(self.columns, case.vocabulary) + 2 * gradients + 2 * inputs)


@dataclass
class Inputs:
    hidden: Any
    weight: Any
    teacher_hidden: Any
    teacher_weight: Any
    targets: Any
    top_ids: Any = None  # of the teacher's likeliest tokens, with their log-probabilities at the temperature
    top_logs: Any = None

    @staticmethod
    def load(folder: Path, device: str) -> Inputs:
        import torch

        inputs = Inputs(**torch.load(folder / "inputs.pt", map_location=device))
        inputs.hidden.requires_grad_()
        inputs.weight.requires_grad_()
        return inputs


# What follows makes a side's step: it returns the mean loss over tokens, to be differentiated by the caller, and its
# divergence, T² included. Imports are made here, before the clock runs.


def dense(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
    """The formula of the textbooks, on whole logits."""
    import torch
    import torch.nn.functional as F

    def step() -> Any:
        student = inputs.hidden @ inputs.weight.T
        with torch.no_grad():
            teacher = inputs.teacher_hidden @ inputs.teacher_weight.T
        hard = F.cross_entropy(student, inputs.targets)
        soft = F.kl_div(
            F.log_softmax(student / TEMPERATURE, dim=-1),
            F.softmax(teacher / TEMPERATURE, dim=-1),
            reduction="batchmean",
        )
        return ALPHA * hard + (1 - ALPHA) * TEMPERATURE**2 * soft, TEMPERATURE**2 * soft.detach()

    return step


def bound(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
    """The four products of a step and nothing between them: two to logits, two from their gradients."""
    import torch

    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    rows = min(1024, len(hidden))

    def step() -> Any:
        student, teacher = (hidden.new_empty(rows, len(weight)) for _ in range(2))
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows]
            logits, teacher_logits = student[: len(chunk)], teacher[: len(chunk)]
            torch.mm(chunk, weight.T, out=logits)
            torch.mm(inputs.teacher_hidden[start : start + rows], inputs.teacher_weight.T, out=teacher_logits)
            torch.mm(logits, weight, out=grad_hidden[start : start + rows])
            grad_weight.addmm_(logits.T, chunk)
        return None, None

    return step


def ours(divergence: str, *, alpha: float = 0.0, compiled: bool = False) -> Callable[[Inputs, Settings], Any]:
    def make(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
        import torch

        from models.objectives.chunked import objective_sum
        from models.objectives.distillation import Distillation
        from models.objectives.forward_kl import ForwardKL
        from models.objectives.head import Head
        from models.objectives.jensen_shannon import JensenShannon
        from models.objectives.signal import Dense, TopK

        soft = JensenShannon(TEMPERATURE, beta=BETA) if divergence == "jsd" else ForwardKL(TEMPERATURE)
        objective = Distillation(alpha, soft) if alpha else soft
        signal: Any = Dense(inputs.teacher_hidden, Head(inputs.teacher_weight))
        if divergence == "top_k":
            rest = TEMPERATURE * torch.log1p(-inputs.top_logs.double().exp().sum(-1)).float()
            signal = TopK(inputs.top_ids, inputs.top_logs * TEMPERATURE, {TEMPERATURE: rest})

        def step() -> Any:
            total, parts = objective_sum(
                objective, inputs.hidden, Head(inputs.weight), inputs.targets, signal, compiled=compiled
            )
            return total / len(inputs.targets), parts[soft.name] / len(inputs.targets)

        return step

    return make


def trl(beta: float) -> Callable[[Inputs, Settings], Any]:
    """The loss of DistillationTrainer; it leaves the T² out, and always works out the student's entropy as well."""

    def make(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
        import torch
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        mask = torch.ones_like(inputs.targets)[None]

        def step() -> Any:
            loss, _, _ = _chunked_divergence_loss(
                inputs.hidden[None],
                inputs.teacher_hidden[None],
                inputs.weight,
                inputs.teacher_weight,
                mask,
                beta=beta,
                temperature=TEMPERATURE,
            )
            loss = loss * TEMPERATURE**2
            return loss, loss.detach()

        return step

    return make


def liger(beta: float, *, compiled: bool) -> Callable[[Inputs, Settings], Any]:
    """Liger leaves the T² out of the soft loss, so that it is put into its weight."""

    def make(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss_of = LigerFusedLinearJSDLoss(
            weight_hard_loss=ALPHA,
            weight_soft_loss=(1 - ALPHA) * TEMPERATURE**2,
            beta=beta,
            temperature=TEMPERATURE,
            compiled=compiled,
            return_soft_hard_loss=True,
        )

        def step() -> Any:
            loss, soft, _ = loss_of(
                inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.targets
            )
            return loss, soft * TEMPERATURE**2

        return step

    return make


def torchtune(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
    """As its recipe: both models' logits in 8 chunks, all there at once, then both losses over them. T is 1."""
    import torch
    import torch.nn.functional as F

    kd = _torchtune_loss("kd_losses").ForwardKLWithChunkedOutputLoss()
    ce = _torchtune_loss("ce_chunked_output_loss").CEWithChunkedOutputLoss()
    labels = inputs.targets[None]

    def chunks(hidden: Any, weight: Any) -> list[Any]:
        return [F.linear(chunk, weight) for chunk in hidden[None].chunk(kd.num_output_chunks, dim=1)]

    def step() -> Any:
        student = chunks(inputs.hidden, inputs.weight)
        with torch.no_grad():
            teacher = chunks(inputs.teacher_hidden, inputs.teacher_weight)
        soft = kd(student, teacher, labels)
        hard = ce(student, labels)
        del student, teacher
        return ALPHA * hard + (1 - ALPHA) * soft, soft.detach()

    return step


def _torchtune_loss(name: str) -> Any:
    """Its file alone: the package wants a torchao which this PyTorch no longer has."""
    import importlib.util

    package = importlib.util.find_spec("torchtune")
    if package is None:
        raise ModuleNotFoundError("No module named 'torchtune'")
    path = Path(next(iter(package.submodule_search_locations or []))) / "modules/loss" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def distillkit(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
    """Its trainer's losses for an online teacher, both on whole logits: it cuts only sparse ones into chunks."""
    import torch
    import torch.nn.functional as F
    from transformers.modeling_outputs import CausalLMOutput

    sys.path.insert(0, settings.distillkit)
    from distillkit.lossfuncs.cross_entropy import CrossEntropyLoss
    from distillkit.lossfuncs.kl import KLDLoss
    from distillkit.signals import DenseSignal

    hard_of, soft_of = CrossEntropyLoss(), KLDLoss(temperature=TEMPERATURE)
    mask = (inputs.targets >= 0)[None, :, None]

    def step() -> Any:
        student = (inputs.hidden @ inputs.weight.T)[None]
        # Its hard label is the loss that transformers' models return.
        output = CausalLMOutput(loss=F.cross_entropy(student[0].float(), inputs.targets), logits=student)
        with torch.no_grad():
            teacher = (inputs.teacher_hidden @ inputs.teacher_weight.T)[None]
        signal = DenseSignal(1.0, None, teacher.shape[-1], teacher)
        soft = soft_of(output, signal, mask=mask)
        return ALPHA * hard_of(output, signal, mask=mask) + (1 - ALPHA) * soft, soft.detach()

    return step


def distillkit_sparse(inputs: Inputs, settings: Settings) -> Callable[[], Any]:
    """Its loss for a recorded teacher: the student's logits whole, the divergence over the kept tokens in chunks."""
    from transformers.modeling_outputs import CausalLMOutput

    sys.path.insert(0, settings.distillkit)
    from distillkit.lossfuncs.kl import KLDLoss
    from distillkit.missing_probability import MissingProbabilityHandling
    from distillkit.signals import SparseSignal

    soft_of = KLDLoss(TEMPERATURE, MissingProbabilityHandling.SYMMETRIC_UNIFORM, sparse_chunk_length=SPARSE_CHUNK)
    mask = (inputs.targets >= 0)[None, :, None]

    def step() -> Any:
        student = (inputs.hidden @ inputs.weight.T)[None]
        signal = SparseSignal(
            TEMPERATURE, None, student.shape[-1], inputs.top_ids[None], inputs.top_logs[None], log_values=True
        )
        loss = soft_of(CausalLMOutput(logits=student), signal, mask=mask)
        return loss, loss.detach()

    return step


OURS = {"tensors": 4, "tokens": 1024}
TRL = {"columns": 32768, "tokens": 4096}
LIGER = {"tokens": 1024}
BOTH, KL, JSD, SPARSE = "½ CE + ½ T²·KL", "T²·KL", "T²·JSD", f"T²·KL against a recorded top-{TOP_K}"
ENTROPY = "and the student's entropy"
SIDES = {
    "dense": Side(f"{BOTH}: F.cross_entropy, F.kl_div on whole logits", "", dense, 8),
    "bound": Side("the products alone", "", bound, 2, tokens=1024, agrees_with=""),
    "ours": Side(BOTH, "", ours("kl", alpha=ALPHA), **OURS),
    "ours_compiled": Side("as ours, terms compiled", "", ours("kl", alpha=ALPHA, compiled=True), **OURS, compiled=True),
    "ours_kl": Side(KL, "", ours("kl"), **OURS),
    "trl": Side(f"{KL}, {ENTROPY}", "trl", trl(0.0), 12, **TRL),
    "liger": Side(BOTH, "liger_kernel", liger(0.0, compiled=False), 9, **LIGER),
    "liger_compiled": Side("as liger, compiled", "liger_kernel", liger(0.0, compiled=True), 9, **LIGER, compiled=True),
    "torchtune": Side(
        "½ CE + ½ KL less the teacher's entropy, T = 1", "torchtune", torchtune, 10, agrees_with="kl_at_1"
    ),
    "distillkit": Side(f"{BOTH} on whole logits", "distillkit", distillkit, 8),
    "ours_jsd": Side(JSD, "", ours("jsd"), **OURS, agrees_with="jsd"),
    "trl_jsd": Side(f"{JSD}, {ENTROPY}", "trl", trl(BETA), 13, **TRL, agrees_with="jsd"),
    "liger_jsd": Side("½ CE + ½ T²·JSD", "liger_kernel", liger(BETA, compiled=False), 18, **LIGER, agrees_with="jsd"),
    "liger_jsd_compiled": Side(
        "as liger_jsd, compiled",
        "liger_kernel",
        liger(BETA, compiled=True),
        18,
        **LIGER,
        agrees_with="jsd",
        compiled=True,
    ),
    "ours_top_k": Side(SPARSE, "", ours("top_k"), **OURS, agrees_with="top_k"),
    "distillkit_sparse": Side(SPARSE, "distillkit", distillkit_sparse, 5, agrees_with="top_k"),
}
QUICK = ("dense", "bound", "ours", "ours_kl", "trl", "liger")


def write_inputs(folder: Path, case: Case, settings: Settings, wanted: set[str]) -> dict[str, float]:
    """The tensors of every side, and the divergences they have to come to, worked out a few tokens at a time."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    N, V = case.tokens, case.vocabulary
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    # Logits of standard deviation 2
    sizes = {"hidden": (N, settings.hidden), "weight": (V, settings.hidden)}
    sizes |= {"teacher_hidden": (N, settings.teacher_hidden), "teacher_weight": (V, settings.teacher_hidden)}
    tensors = {
        name: (torch.randn(size) * (2 / size[1] ** 0.5 if name.endswith("weight") else 1.0)).to(dtype)
        for name, size in sizes.items()
    }
    tensors["targets"] = torch.randint(V, (N,))
    device = {name: tensor.to(settings.device) for name, tensor in tensors.items()}
    sums = dict.fromkeys(wanted, 0.0)
    ids, logs = [], []
    for start in range(0, N, 128):
        rows = slice(start, start + 128)
        student, teacher = (
            (device[f"{who}hidden"][rows] @ device[f"{who}weight"].T).float() for who in ("", "teacher_")
        )
        if "kl_at_1" in wanted:
            sums["kl_at_1"] -= float((teacher.softmax(-1) * student.log_softmax(-1)).sum(dtype=torch.float64))
        q, p = ((logits / TEMPERATURE).log_softmax(-1) for logits in (student, teacher))
        if "kl" in wanted:
            sums["kl"] += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        if "jsd" in wanted:
            m = torch.log(BETA * p.exp() + (1 - BETA) * q.exp())
            teacher_part, student_part = (F.kl_div(m, each, log_target=True, reduction="sum") for each in (p, q))
            sums["jsd"] += float(BETA * teacher_part + (1 - BETA) * student_part)
        if "top_k" in wanted:
            top, at = p.topk(TOP_K, dim=-1)
            ids.append(at.cpu())
            logs.append(top.cpu())
            kept, theirs = top.double().exp(), q.gather(1, at).double()
            rest = 1 - kept.sum(-1)
            rest_value = rest * (rest.log() - (1 - theirs.exp().sum(-1)).log())
            sums["top_k"] += float((kept * (top.double() - theirs)).sum() + rest_value.sum())
    if ids:
        tensors |= {"top_ids": torch.cat(ids), "top_logs": torch.cat(logs)}
    torch.save(tensors, folder / "inputs.pt")
    return {name: each / N * (1 if name == "kl_at_1" else TEMPERATURE**2) for name, each in sums.items()}


class Clock:
    """Seconds of a call, and peak memory above what the process held before it."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, device

    def settle(self) -> None:
        """What earlier calls freed goes back to the system, so that the next has to ask for it again."""
        import ctypes
        import gc

        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()
            self.before = self.torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again here
        self.before = self._resident("VmRSS")

    def peak(self) -> int:
        high = self.torch.cuda.max_memory_allocated() if self.device == "cuda" else self._resident("VmHWM")
        return high - self.before

    def now(self) -> float:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    @staticmethod
    def _resident(field: str) -> int:
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
        return int(line.split()[1]) * 1024


def run_side(name: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """In the side's own process."""
    side = SIDES[name]
    inputs = Inputs.load(folder, settings.device)
    step = side.make(inputs, settings)
    clock = Clock(settings.device)

    def call() -> tuple[float, Any]:
        inputs.hidden.grad = inputs.weight.grad = None
        begin = clock.now()
        loss, divergence = step()
        if loss is not None:
            loss.backward()
        return clock.now() - begin, divergence

    first, divergence = call()
    inputs.hidden.grad = inputs.weight.grad = None
    clock.settle()
    seconds = [call()[0] for _ in range(settings.calls)]
    peak = clock.peak()
    gradients = [each.grad for each in (inputs.hidden, inputs.weight) if each.grad is not None]
    return {
        "seconds": seconds,
        "first_call_seconds": first,
        "peak_memory": peak,
        "gradient_norms": [float(each.double().norm()) for each in gradients],
        "divergence": None if divergence is None else float(divergence),
        "load": os.getloadavg()[0],
        "versions": _versions("torch", *([side.package] if side.package else [])),
    }


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a checkout
            found[name] = "checkout"
    return found


def run_child(words: argparse.Namespace) -> None:
    """The last line printed is the figures."""
    import warnings

    import torch

    warnings.simplefilter("ignore")
    settings = Settings(**json.loads(words.settings))
    torch.set_num_threads(settings.threads)
    if words.side == "inputs":
        found: Any = write_inputs(Path(words.folder), Case.read(words.case), settings, set(words.wanted.split(",")))
    else:
        found = run_side(words.side, Path(words.folder), settings)
    print(json.dumps(found))


def measure(case: Case, sides: list[str], settings: Settings, peer_python: str, say: Any) -> dict[str, Any]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    # A thread that spins at a barrier while its partner waits for a core makes a busy machine ten times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        # The first call of a compiled side has to compile.
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}

        def child(python: str, side: str, *more: str) -> subprocess.CompletedProcess[str]:
            words = ["--side", side, "--folder", folder, "--settings", json.dumps(asdict(settings)), *more]
            return subprocess.run([python, __file__, *words], env=environment, capture_output=True, text=True)

        room = memory(settings.device)
        for side in sides:
            if (estimate := SIDES[side].estimate(case, settings)) > 0.9 * room:
                left_out[side] = f"does not fit: about {estimate / 2**30:.1f} GiB needed, {room / 2**30:.1f} there"
                say(f"{case} {side}: {left_out[side]}")
        references: dict[str, float] = {}
        if wanted := {SIDES[side].agrees_with for side in sides if side not in left_out} - {""}:
            done = child(sys.executable, "inputs", "--case", str(case), "--wanted", ",".join(sorted(wanted)))
            if done.returncode:
                sys.exit(f"{done.stderr[-4000:]}\nerror: the inputs of {case} could not be made")
            references = json.loads(done.stdout.splitlines()[-1])
        for repeat in range(settings.repeats):
            for side in sides:
                if side in left_out:
                    continue
                package = SIDES[side].package
                done = child(peer_python if package else sys.executable, side)
                if done.returncode and not package:
                    sys.exit(f"{done.stderr[-4000:]}\nerror: side {side} failed")
                if done.returncode:
                    left_out[side] = f"failed: {(done.stderr.strip().splitlines() or [f'code {done.returncode}'])[-1]}"
                    say(f"{case} {side}: {left_out[side]}")
                    continue
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                last = runs[side][-1]
                say(
                    f"{case} {repeat + 1}/{settings.repeats} {side}: {statistics.median(last['seconds']):.3f} s, "
                    f"{last['peak_memory'] / 2**20:,.0f} MiB"
                )
    figures = {side: summary(each, SIDES[side], references) for side, each in runs.items() if side not in left_out}
    for name, each in figures.items():
        each["ratios"] = {
            f"{key}_to_{other}": round(each[field] / figures[other][field], 4)
            for key, field, other in (
                ("time", "seconds", "dense"),
                ("time", "seconds", "bound"),
                ("memory", "peak_memory", "dense"),
            )
            # A recorded teacher spares the product with its head.
            if other in figures and (other, SIDES[name].agrees_with) != ("bound", "top_k")
        }
    # What no side can do without: the gradients it is asked for, in the inputs' precision.
    width = 4 if settings.precision == "fp32" else 2
    return {
        "sides": figures,
        "left_out": left_out,
        "goals": goals(figures),
        "gradient_bytes": width * settings.hidden * (case.tokens + case.vocabulary),
    }


def memory(device: str) -> int:
    """Bytes free on the device."""
    if device == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info()[0]
        return free
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    free = int(available.split()[1]) * 1024
    return free if allowed == "max" else min(free, int(allowed))


def summary(runs: list[dict[str, Any]], side: Side, references: dict[str, float]) -> dict[str, Any]:
    """Medians over every timed call of every repeat, and the spread."""
    seconds = [each for run in runs for each in run["seconds"]]
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "first_call_seconds": runs[0]["first_call_seconds"],
        "peak_memory": int(statistics.median(run["peak_memory"] for run in runs)),
        "divergence": runs[0]["divergence"],
        "reference": references.get(side.agrees_with),
        "gradient_norms": runs[0]["gradient_norms"],
        "load": [round(run["load"], 2) for run in runs],
        "versions": runs[0]["versions"],
    }


def goals(figures: dict[str, Any]) -> dict[str, Any]:
    """Of each of our sides: the ratios that have a goal. The peer is the fastest that computes this divergence."""

    def kind(side: str) -> str:
        return SIDES[side].agrees_with.removesuffix("_at_1")

    found: dict[str, Any] = {}
    for name, each in figures.items():
        if not name.startswith("ours"):
            continue
        ratios = {} if kind(name) == "top_k" else dict(each["ratios"])
        found[name] = {}
        if peers := [other for other in figures if SIDES[other].package and kind(other) == kind(name)]:
            fastest = min(peers, key=lambda peer: figures[peer]["seconds"])
            ratios["time_to_fastest_peer"] = round(each["seconds"] / figures[fastest]["seconds"], 4)
            found[name]["fastest_peer"] = fastest
        for key, value in ratios.items():
            found[name][key] = {"is": value, "goal": GOALS[key], "met": value <= GOALS[key]}
    return found


def table(case: Case, found: dict[str, Any]) -> Any:
    from rich.table import Table

    heads = (
        "side",
        "seconds (range)",
        "÷ dense",
        "÷ bound",
        "peak MiB",
        "÷ dense",
        "divergence",
        "dense has",
        "computes",
    )
    shown = Table(*heads, title=f"{case.tokens} tokens × {case.vocabulary}")

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for side in SIDES:
        if side in found["left_out"]:
            shown.add_row(side, *[""] * 7, f"{SIDES[side].what}; {found['left_out'][side]}")
        if side not in found["sides"]:
            continue
        each = found["sides"][side]
        what = SIDES[side].what
        if SIDES[side].compiled:
            what += f"; first call {each['first_call_seconds']:.1f} s"
        shown.add_row(
            side,
            f"{each['seconds']:.3f} ({each['seconds_range'][0]:.3f}–{each['seconds_range'][1]:.3f})",
            text(each["ratios"].get("time_to_dense"), ".2f"),
            text(each["ratios"].get("time_to_bound"), ".2f"),
            f"{each['peak_memory'] / 2**20:,.0f}",
            text(each["ratios"].get("memory_to_dense"), ".2f"),
            text(each["divergence"], ".5f"),
            text(each["reference"], ".5f"),
            what,
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="about a minute on 2 cores: 512 tokens × 32000, fewer sides"
    )
    parser.add_argument(
        "--peer-python",
        help="has TRL, Liger, torchtune (default: $RETORT_PEER_PYTHON or .venv-peers/bin/python)",
        default=os.environ.get("RETORT_PEER_PYTHON", str(ROOT / ".venv-peers/bin/python")),
    )
    parser.add_argument("--sides", help=f"comma-separated, of {', '.join(SIDES)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name, value in asdict(Settings()).items():
        if name not in ("device", "precision", "distillkit"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default: {value}")
    parser.add_argument("--distillkit", help="a checkout of github.com/arcee-ai/DistillKit, which is on no index")
    for name in ("--side", "--folder", "--settings", "--case", "--wanted"):  # how this script calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.side:
        run_child(words)
        return

    sides = (words.sides or ",".join(QUICK if words.quick else SIDES)).split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides {','.join(unknown)}: need some of {', '.join(SIDES)}")
    if not words.distillkit:
        if words.sides and (without := [side for side in sides if SIDES[side].package == "distillkit"]):
            parser.error(
                f"--sides {','.join(without)}: need --distillkit, a checkout of github.com/arcee-ai/DistillKit"
            )
        sides = [side for side in sides if SIDES[side].package != "distillkit"]
    if any(SIDES[side].package for side in sides) and not Path(words.peer_python).is_file():
        parser.error(
            f"--peer-python {words.peer_python}: not there; make it as benchmarks/README.md says, or leave "
            f"the peers out with --sides dense,bound,ours"
        )

    import torch
    from rich.console import Console

    device = words.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(device=device, precision="bf16" if device == "cuda" else "fp32", threads=os.cpu_count() or 1)
    if words.quick:
        settings = replace(settings, cases="512x32000", calls=2, repeats=1)
    given = {name: value for name in asdict(settings) if (value := getattr(words, name, None)) is not None}
    settings = replace(settings, **given)
    cases = [Case.read(text) for text in settings.cases.split(",")]
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    found = {}
    for case in cases:
        found[str(case)] = measure(
            case, sides, settings, words.peer_python, lambda line: console.print(line, highlight=False)
        )
        console.print(table(case, found[str(case)]))
        for side, each in found[str(case)]["goals"].items():
            parts = [
                f"{key.replace('_', ' ')} {value['is']:.2f} (goal {value['goal']:g}: {MET[value['met']]})"
                for key, value in each.items()
                if key != "fastest_peer"
            ]
            console.print(f"{side}: {'; '.join(parts)}", highlight=False)
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {settings.threads} threads"
    print(json.dumps({"cases": found, "device": name, "settings": asdict(settings)}))


if __name__ == "__main__":
    main()
