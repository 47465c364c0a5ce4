"""The twelve benchmarks of LibMoE's Table 1 by their names in lmms-eval, whose wheel holds their YAML and functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from orchestrator.catalog.pins import Package

# How a set of `evaluate.pictures` is asked: in our way, or in lmms-eval's.
OURS, LMMS_EVAL = "", "lmms_eval"
PROTOCOLS = (OURS, LMMS_EVAL)


@dataclass(frozen=True, slots=True)
class LmmsTask:
    """One task: its YAML below lmms_eval/tasks, the scores that its own functions make of the answers alone.

    `judged` are those for which they ask a model behind an API: their answers are kept, and not scored.
    """

    name: str
    yaml: str
    scores: tuple[str, ...]
    judged: tuple[str, ...] = ()


# Its YAML and functions: the modules of these tasks are imported one by one, the package itself is not.
LMMS_WHEEL = Package(
    "lmms-eval",
    "0.7.3",
    "5709f9f9f56a8f5f22bf379571bd1c5e7702af5ae2bbb9637001c5dd91168895",
    (),
    licence="MIT, parts Apache-2.0",
    megabytes=4,
)

_POPE = ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio")
LMMS_TASKS: Mapping[str, LmmsTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            LmmsTask("ai2d", "ai2d/ai2d.yaml", ("exact_match",)),
            LmmsTask("textvqa_val", "textvqa/textvqa_val.yaml", ("exact_match",)),
            LmmsTask("gqa", "gqa/gqa.yaml", ("exact_match",)),
            LmmsTask("mmbench_en_dev", "mmbench/mmbench_en_dev.yaml", (), ("gpt_eval_score",)),
            LmmsTask(
                "hallusion_bench_image", "hallusion_bench/hallusion_bench_image.yaml", (), ("aAcc", "qAcc", "fAcc")
            ),
            LmmsTask(
                "mathvista_testmini_format", "mathvista/mathvista_testmini_format.yaml", (), ("llm_as_judge_eval",)
            ),
            LmmsTask("mmmu_val", "mmmu/mmmu_val.yaml", ("mmmu_acc",)),
            LmmsTask("mmstar", "mmstar/mmstar.yaml", ("average",)),
            LmmsTask("pope", "pope/pope.yaml", _POPE),
            LmmsTask("mme", "mme/mme.yaml", ("mme_perception_score", "mme_cognition_score")),
            LmmsTask("mmerealworld", "mme_realworld/mme_realworld.yaml", ("mme_realworld_score",)),
            LmmsTask("ocrbench", "ocrbench/ocrbench.yaml", ("ocrbench_accuracy",)),
        )
    }
)
