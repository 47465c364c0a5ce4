"""What ERRATA.md says of the printed tables is computed from their CSV files; nothing else in them is of that kind."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from orchestrator.report.papers.declared import FOLDER, declared

TIES = 0.12  # how a mean rank moves with the way that equal values share it
Rows = list[dict[str, str]]
REPEATED = {"router_lr=1e-5": "expert", "router_lr=5e-6": "router", "router_lr=2e-6": "expert->router"}
NO_TASKS = ("scale", "data", "method", "ppl", "avg", "avg_rank")


def rows(name: str) -> Rows:
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def setting(found: Rows, name: str) -> dict[str, str]:
    return next(row for row in found if row["setting"] == name)


def ranks(found: Rows) -> dict[str, float]:
    """Return method -> mean rank over the tasks; equal values share the better rank, as the paper has it."""
    tasks = [name for name in found[0] if name not in NO_TASKS]
    columns = {task: [float(row[task]) for row in found] for task in tasks}
    return {
        row["method"]: sum(1 + sum(v > float(row[task]) for v in columns[task]) for task in tasks) / len(tasks)
        for row in found
    }


def mean(row: Mapping[str, str], skipped: Sequence[str]) -> float:
    values = [float(value) for name, value in row.items() if name not in skipped]
    return sum(values) / len(values)


def swapped_ranks(found: Rows) -> bool:
    for scale in ("158m", "679m"):
        of = [row for row in found if row["scale"] == scale]
        computed, printed = ranks(of), {row["method"]: float(row["avg_rank"]) for row in of}
        swapped = {"XMoE": "σ -MoE", "σ -MoE": "XMoE"}
        if any(abs(computed[name] - printed[swapped.get(name, name)]) > TIES for name in computed):
            return False
    return True


def repeats(found: Rows) -> bool:
    def values(name: str) -> list[str]:
        return list(setting(found, name).values())[1:]

    return all(values(rate) == values(same) for rate, same in REPEATED.items())


def highest(found: Rows, column: str, name: str) -> bool:
    return setting(found, name)[column] == max(row[column] for row in found)


def fourth_balance(found: Rows) -> bool:
    schedules = [row for row in found if not row["setting"].startswith("router_lr")]
    better = [row for row in schedules if row["load_balance"] > setting(found, "none->router")["load_balance"]]
    return [row["load_balance"] for row in better] == ["5.7830"] * 3 and len(schedules) == 9


def no_gain_at_2_8(found: Rows) -> bool:
    at = {(r["granularity"], r["shared_expert"], r["router"]): float(r["avg"]) for r in found}
    routers = ("token", "expert", "word")
    # The slip of the sentence router's PIQA takes (57.94 - 0.58) / 6 or so from its average.
    slip = at["2/8", "yes", "sentence"] - at["2/8", "no", "sentence"]
    return all(at["2/8", "yes", r] < at["2/8", "no", r] for r in routers) and 0 < slip < 57 / 6 + 1


def slip(found: Rows) -> bool:
    row = next(r for r in found if float(r["piqa"]) < 1)
    told = ("backbone", "granularity", "shared_expert", "router", "avg")
    with_it = abs(mean(row, told) - float(row["avg"])) < 0.006
    return with_it and row["avg"] == "26.37" and (row["granularity"], row["router"]) == ("2/8", "sentence")


def at_chance(found: Rows) -> bool:
    of = [r for r in found if r["granularity"] == "7/31+1" and r["regularisation"] in ("no_aux", "no_z")]
    return len(of) == 2 and all(abs(float(r[c])) < 0.002 for r in of for c in ("capacity", "specialization"))


def in_bits(found: Rows) -> bool:
    """Return whether the largest load balance is above what nats could reach, and near the bound in bits."""
    experts = {r["granularity"]: int(r["granularity"].split("/")[1].split("+")[0]) for r in found}
    balanced = [(float(r["load_balance"]), experts[r["granularity"]]) for r in found]
    return max(v / math.log(n) for v, n in balanced) > 1.2 and all(v < math.log2(n) + 0.01 for v, n in balanced)


T3, T4, T5 = (
    "moebench_table3_pretrain_reasoning",
    "moebench_table4_olmoe_finetune_reasoning",
    "moebench_table5_deepseek_finetune_reasoning",
)
T6, T7, T8 = (
    "moebench_table6_pretrain_efficiency",
    "moebench_table7_olmoe_finetune_efficiency",
    "moebench_table8_deepseek_finetune_efficiency",
)
T9, T11, T12 = (
    "moebench_table9_olmoe_safety",
    "moebench_table11_olmoe_hallucination",
    "moebench_table12_deepseek_hallucination",
)
L1, L2, L7, L8 = (
    "libmoe_table1_vlm_upcycling",
    "libmoe_table2_pretrain_lm",
    "libmoe_table7_router_temperature",
    "libmoe_table8_regularisation",
)
Check = Callable[[Rows], bool]
# (table, words of its erratum) -> how it is seen in the CSV file.
COMPUTED: dict[tuple[str, str], Check] = {
    (T3, "PIQA 0.58"): slip,
    (T3, "at 2/8 they do not"): no_gain_at_2_8,
    (T3, "expert choice is ahead in all four averages"): lambda found: all(
        max((r for r in found if (r["granularity"], r["shared_expert"]) == at), key=lambda r: float(r["avg"]))["router"]
        == "expert"
        for at in {(r["granularity"], r["shared_expert"]) for r in found}
    ),
    (T4, "repeat the rows"): repeats,
    (T6, "above log2 7"): lambda found: (
        max(float(r["load_balance"]) for r in found if r["granularity"] == "1/7+1") > math.log2(7)
    ),
    (T6, "near 0"): at_chance,
    (T6, "8/32 without z-loss is missing"): lambda found: (
        not any((r["granularity"], r["regularisation"]) == ("8/32", "no_z") for r in found) and len(found) == 23
    ),
    (T6, "in bits"): in_bits,
    (T7, "repeat the rows"): repeats,
    (T8, "lowest value"): lambda found: (
        setting(found, "none->router")["collaboration"] == min(row["collaboration"] for row in found)
    ),
    (T8, "fourth of the nine"): fourth_balance,
    (T8, "shared by three schedules"): lambda _: (
        [row["setting"] for row in rows(T5) if row["avg"] == "64.90"] == ["router", "none->expert", "none->router"]
        and sum(float(row["avg"]) > 64.90 for row in rows(T5) if not row["setting"].startswith("router_lr")) == 2
    ),
    (T8, "in bits"): lambda found: all(math.log(64) < float(row["load_balance"]) < 6 for row in found),
    (T9, "repeat the rows"): repeats,
    (T9, "CoNa reward equals"): lambda found: sum(r["cona_reward"] != r["controversial_reward"] for r in found) == 0,
    (T11, "repeat the rows"): repeats,
    (L1, "give 50.78"): lambda found: any(
        (r["data"], r["method"], r["avg"]) == ("llava_665k", "SharedE-V3", "50.86")
        and round(mean(r, NO_TASKS), 2) == 50.78
        for r in found
    ),
    (L1, "the table has 12"): lambda found: len([name for name in found[0] if name not in NO_TASKS]) == 12,
    (L2, "swapped in both sizes"): swapped_ranks,
    (L2, "BLiMP is 77.38 here"): lambda found: (
        {(r["method"], r["blimp"]) for r in found} >= {("σ -MoE", "77.38")}
        and rows(L7)[0] | {"sigma_moe": "76.75"} == rows(L7)[0]
    ),
}
# What the words of a text or of another table say, which no CSV file holds.
OF_TEXTS = {
    (T4, "The text calls OLMoE"),
    (T5, "The text calls DeepSeekMoE"),
    (T6, '"Aux-free" means'),
    (T8, "RTX A6000"),
    (T11, "The caption says"),
    (T12, "The caption says"),
    (L2, "12 heads"),
    (L7, "the wrong way round"),
    (L8, "66 experts in the configuration"),
}


@pytest.mark.parametrize(("table", "words"), COMPUTED)
def test_an_erratum_is_seen_in_the_printed_values(table: str, words: str) -> None:
    assert COMPUTED[table, words](rows(table))


def test_every_erratum_is_computed_or_of_a_text() -> None:
    written = {(one.printed, note) for one in declared().exhibits for note in one.errata}
    assert len(written) == len(COMPUTED) + len(OF_TEXTS)
    for table, words in (*COMPUTED, *OF_TEXTS):
        assert sum(name == table and words in note for name, note in written) == 1, (table, words)


def test_all_other_printed_averages_are_those_of_their_columns() -> None:
    skipped = (*NO_TASKS, "backbone", "granularity", "shared_expert", "router", "setting")
    known = {("llava_665k", "SharedE-V3")}
    for table in (T3, T4, T5, L1, L2, L8):
        for row in rows(table):
            if (row.get("data"), row.get("method")) not in known:
                assert mean(row, skipped) == pytest.approx(float(row["avg"]), abs=0.011), (table, row)
