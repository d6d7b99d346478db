"""Chat with a model or an export: llama.cpp opens a folder with model.gguf, transformers any other.

    python examples/serve_and_chat.py runs/small-export/export/gguf            asks for lines, until an empty one
    python examples/serve_and_chat.py runs/small/recover "Once upon a time"    one answer

This is a demonstration. To serve many users, the model card (README.md) in each export has the command for vLLM
or llama-server; any OpenAI client then talks to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

NEW_TOKENS = 64
Messages = list[dict[str, str]]


def with_llama_cpp(folder: Path) -> Callable[[Messages], str]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(folder / "model.gguf")
    parameters.n_ctx = 2048
    server = xllamacpp.Server(parameters)

    def answer(messages: Messages) -> str:
        prompt = messages[-1]["content"]  # base models go on with the text
        made = server.handle_completions({"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.0})
        return str(made["choices"][0]["text"])

    def chat(messages: Messages) -> str:
        made = server.handle_chat_completions({"messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0.0})
        return str(made["choices"][0]["message"]["content"])

    return chat if _template_of(folder) else answer


def with_transformers(folder: Path) -> Callable[[Messages], str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def answer(messages: Messages) -> str:
        if tokenizer.chat_template:
            read = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            read = tokenizer(messages[-1]["content"], return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**read, max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(made[0, read["input_ids"].shape[1] :], skip_special_tokens=True))

    return answer


def _template_of(folder: Path) -> bool:
    """Whether the GGUF file holds a chat template."""
    from gguf import GGUFReader

    return "tokenizer.chat_template" in GGUFReader(str(folder / "model.gguf")).fields


def asked() -> str:
    """A line; nothing at its end, or at the end of what is typed (Ctrl-D)."""
    try:
        return input("> ")
    except EOFError:
        return ""


def main(folder: str, question: str = "") -> None:
    path = Path(folder)
    if not (path / "model.gguf").is_file() and not (path / "config.json").is_file():
        sys.exit(f"error: {folder} holds no model; give a folder with model.gguf, or with config.json and weights")
    answer = with_llama_cpp(path) if (path / "model.gguf").exists() else with_transformers(path)
    if question:
        print(answer([{"role": "user", "content": question}]))
        return
    messages: Messages = []
    while line := asked():
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(messages)})
        print(messages[-1]["content"])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
