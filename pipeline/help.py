"""`python train.py --help`: experiments, choices and examples, as conf/ has them."""

from __future__ import annotations

from pipeline.command_line import CONF, choices

EXAMPLES = """\
  python train.py                                                       the quickstart: offline, on a CPU, in minutes
  python train.py +experiment=distill teacher.path=Qwen/Qwen3-8B data.train=chats.jsonl student=layers student.keep=6
  python train.py +experiment=prune_recover model.path=FOLDER data.train=TEXT stages.prune.target_parameters=6B
  python train.py +experiment=quantize_export model.path=FOLDER data.train=TEXT quantizer=awq scheme=w4a16_g32
  python train.py +experiment=export_only model.path=FOLDER format=gguf formats.gguf.type=q4_k_m
  python train.py +experiment=distill_7b_to_1b trainer.devices=8 strategy=zero2 logger=wandb dry_run=true"""

_ADDED = {"scale": "+scale"}  # groups that no run has before they are chosen
_INTERNAL = ("experiment", "stage", "training", "callbacks")  # experiments have a list of their own


def page() -> str:
    """What the product does, each experiment in a line, each group with its choices, and examples."""
    experiments = [(name, told) for group, name, told in choices() if group == "experiment"]
    width = max(len(name) for name, _ in experiments)
    groups: dict[str, list[str]] = {}
    for group, name, told in choices():
        if group not in _INTERNAL:
            groups.setdefault(group, []).append(f"    {name:<24} {told}".rstrip())
    return "\n".join(
        [
            "Retort distils, prunes and quantizes language models, and measures at every step what was kept.",
            "",
            "usage: python train.py [+experiment=NAME] [GROUP=CHOICE] [KEY=VALUE] …",
            "",
            "Experiments (+experiment=NAME; quickstart where none is named):",
            *(f"  {name:<{width}}  {told}" for name, told in experiments),
            "",
            "Choices (GROUP=CHOICE; GROUP.KEY=VALUE changes a value of the choice, --cfg job prints them all).",
            "Of format, filter and auxiliary several are chosen, format=[a,b]; formats.a.KEY=VALUE changes a value.",
            *(line for group, lines in groups.items() for line in (f"  {_ADDED.get(group, group)}=", *lines)),
            "",
            "Which stages run: only=[a,b] start=a stop=b force=[a]; dry_run=true shows the plan and stops;",
            "forecast=true forecast.gpu=h100 forecast.gpus=64 tells memory, time and cost without weights, and stops;",
            "show_data=3 shows 3 sequences as they enter training, with what is learnt of them marked, and stops;",
            "prepare_only=true stops before a stage's ranks would start: its text and first weights are ready then;",
            "doctor=true runs two steps of what trains, checks loss, gradient, text and ranks from inside, and stops;",
            "prepare_data=1/16 prepares one of 16 shares of the text and stops;",
            "only=[record] share=1/16 records one of 16 shares of the text and stops; likewise only=[generate];",
            "resume=overwrite redoes what was made with other values; run_dir=FOLDER holds everything that is written.",
            "",
            "On Slurm: launch=slurm submits a job for each stage; slurm/README.md.",
            "What became of a run: python train.py status run_dir=FOLDER [--json]; cancel run_dir=… ends its jobs.",
            "",
            "Examples:",
            EXAMPLES,
            "",
            f"Configuration: {CONF.name}/; documentation: docs/. Hydra's own options: --hydra-help.",
        ]
    )
