"""Distil a smaller model on your own conversations.

    python examples/distil_chat.py TEACHER chat.jsonl                 makes runs/chat/distill, and runs/chat/report.md
    python examples/distil_chat.py TEACHER chat.jsonl optimizer.lr=1e-4 logger=wandb

TEACHER is a model folder or a hub id. A line of chat.jsonl is {"messages": [{"role": "user", "content": "…"}, …]};
only what the assistant says is learnt. Without a file this script writes a tiny one, to show the form.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

EXAMPLE = [
    ("Where do cats sleep?", "On the book that you are reading."),
    ("What is the plural of mouse?", "Mice."),
    ("How many legs has a spider?", "Eight."),
]


def main(teacher: str, conversations: str = "chat.jsonl", *further: str) -> int:
    file = Path(conversations)
    if not file.exists():
        lines = [
            {"messages": [{"role": "user", "content": f"{n}. {ask}"}, {"role": "assistant", "content": answer}]}
            for n in range(40)
            for ask, answer in EXAMPLE
        ]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{file} does not exist: wrote {len(lines)} short conversations there, to show the form")

    command = [
        sys.executable, str(CHECKOUT / "train.py"), "+experiment=distill",
        f"teacher.path={teacher}",
        "student=layers", "student.keep=2",        # the student starts as two of the teacher's layers
        "data=chat", f"data.train={file}",
        "data.max_length=512",                     # tokens in a sequence
        "data.holdout=0.1",                        # of the conversations: for validation, and again for the test
        "objective.alpha=0.5",                     # half of the loss: the assistant's own words, half: the teacher
        "stages.distill.training.epochs=3",
        "run_dir=runs/chat",
    ]  # fmt: skip
    # A tokenizer without a chat template needs one: data.chat_template=examples/chat.jinja
    return subprocess.call([*command, *further])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
