"""Examples of every command, below its --help."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "plan": (
        "moegrid plan finetune_freeze",
        "moegrid plan finetune_freeze --scale paper | less",
        "moegrid plan grids/mine.yaml factors.seed=[0,1] set.finetune.lr=1e-3",
    ),
    "simulate": (
        "moegrid simulate finetune_freeze --scale paper --gpu h100",
        "moegrid simulate finetune_freeze --scale paper --gpu a100 --nodes 2 --json",
    ),
    "run": (
        "moegrid run quickstart",
        "moegrid run finetune_freeze factors.backbone=[olmoe,deepseek_moe] --seeds 0",
        "moegrid run finetune_freeze --site slurm --scale small --max-gpu-hours 40 --detach",
    ),
    "resume": ("moegrid resume quickstart", "moegrid resume quickstart --retry all"),
    "tick": ("moegrid tick finetune_freeze --site slurm",),
    "status": (
        "moegrid status quickstart",
        "moegrid status quickstart --watch",
        "moegrid status quickstart > state.txt",
    ),
    "logs": ("moegrid logs quickstart -f", "moegrid logs 'quickstart:freeze=none->router' --rank 0"),
    "explain": ("moegrid explain 'quickstart:freeze=none->router'", "moegrid explain quickstart set.finetune.lr=1e-3"),
    "diff": (
        "moegrid diff quickstart finetune_freeze",
        "moegrid diff 'quickstart:freeze=none' 'quickstart:freeze=router'",
    ),
    "cancel": ("moegrid cancel quickstart", "moegrid cancel finetune_freeze --site slurm"),
    "report": ("moegrid report quickstart --open", "moegrid report quickstart --output /tmp/quickstart/index.html"),
    "dashboard": ("moegrid dashboard quickstart", "moegrid dashboard finetune_freeze --port 8042"),
    "table": ("moegrid table quickstart", "moegrid table quickstart --format csv > quickstart.csv"),
    "export": ("moegrid export 'quickstart:freeze=none->router' /tmp/model",),
    "import": ("moegrid import /data/OLMoE-1B-7B-0924",),
    "data": (
        "moegrid data list",
        "moegrid data show npm://emoji-datasource-google@16.0.0/questions --open",
        "moegrid data show file:///data/chat.jsonl --format chat --rows 50",
    ),
    "compare": ("moegrid compare quickstart finetune_freeze", "moegrid compare quickstart mine --format csv"),
    "effects": (
        "moegrid effects finetune_freeze",
        "moegrid effects finetune_freeze finetune_router_lr --metric answer_bpb",
    ),
    "paper": ("moegrid paper", "moegrid paper --run tiny", "moegrid paper --json | head"),
    "sync": ("moegrid sync quickstart", "moegrid sync --follow"),
    "gc": ("moegrid gc", "moegrid gc --delete --grace 3"),
    "doctor": ("moegrid doctor", "moegrid doctor --site slurm --json"),
    "init": ("moegrid init", "moegrid init my_experiments"),
    "new": ("moegrid new router my_router",),
    "schema": ("moegrid schema > grid.schema.json",),
    "ui": ("moegrid ui", "moegrid ui quickstart --open", "moegrid ui --port 5001 --store runs"),
}


def epilog(command: str, *, overrides: bool) -> str:
    """Return what stands below the --help of a command; `overrides` ones take KEY=VALUE words."""
    told = "KEY=VALUE words after GRID replace values of the grid, as --set does\n\n"
    lines = "".join(f"  {example}\n" for example in EXAMPLES.get(command, ()))
    return (told if overrides else "") + (f"examples:\n{lines}" if lines else "")
