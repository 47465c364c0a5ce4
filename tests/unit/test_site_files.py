"""Site files: read as every YAML file of the project is, and turned into what a scheduler and a node are asked for."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.base import Batch, Job
from orchestrator.backends.ray import RaySite
from orchestrator.backends.slurm_script import SlurmSite, script
from orchestrator.errors import GridError, MoegridError
from orchestrator.grid.site_fields import asked, variables
from orchestrator.resources import ROOT
from orchestrator.settings import Site, load_site, open_backend
from orchestrator.spec.cell import Resources


def site_of(folder: Path, text: str, backend: str = "slurm") -> Site:
    path = folder / "mine.yaml"
    path.write_text(f"backend: {backend}\n{text}\n")
    return load_site(str(path))


def script_of(site: SlurmSite) -> list[str]:
    """Return the lines of the submission file of one small job."""
    batch = Batch("d-0", "store", (Job("d-0-0", 0, "", Resources()),))
    return script(site, batch, Resources(), 0, [0], ["run"], Path("/logs")).splitlines()


def test_every_yaml_file_of_the_project_has_one_reader() -> None:
    """Others would read `no`, `012345` and `1:30:00` otherwise. The harnesses' own files are read as they read them."""
    readers = set()
    for path in [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            readers |= {path.name for name in names if name.split(".")[0] in ("yaml", "ruamel")}
    assert readers == {"yaml_positions.py", "lmms_tasks.py"}


@pytest.mark.parametrize(
    "text, line",
    [
        ("account: 012345", "#SBATCH --account=012345"),
        ("account: 1_000", "#SBATCH --account=1_000"),
        ("account: 1e3", "#SBATCH --account=1e3"),
        ("qos: no", "#SBATCH --qos=no"),
        ("partition: on", "#SBATCH --partition=on"),
        ("constraint: 0x1F", "#SBATCH --constraint=0x1F"),
        ("exclude: [n1, n2, 007]", "#SBATCH --exclude=n1,n2,007"),
        ("options: {time-min: 1:30:00}", "#SBATCH --time-min=1:30:00"),
        ("options: {begin: 16:00:00}", "#SBATCH --begin=16:00:00"),
        ("options: {deadline: 2026-01-02}", "#SBATCH --deadline=2026-01-02"),
        ("options: {kill-on-invalid-dep: yes}", "#SBATCH --kill-on-invalid-dep=yes"),
        ("options: {nice: 0}", "#SBATCH --nice=0"),
        ("options: {mail-type: [FAIL, END]}", "#SBATCH --mail-type=FAIL,END"),
        ("options: {licenses: [matlab:1, ~, false, 07]}", "#SBATCH --licenses=matlab:1,07"),
        ("options: {exclusive: true}", "#SBATCH --exclusive"),
        ("options: {--mem_per_gpu: 10G}", "#SBATCH --mem-per-gpu=10G"),
        ("environment: {X: 012345}", "export X=012345"),
        ("environment: {X: 1:30:00}", "export X=1:30:00"),
        ("environment: {X: off}", "export X=off"),
        ("environment: {X: TRUE}", "export X=TRUE"),
        ("environment: {X: 1.10}", "export X=1.10"),
        ("environment: {X: [ib0, ib1]}", "export X=ib0,ib1"),
        ("environment: {X: ''}", "export X=''"),
        ("modules: cuda/12.10", "module load cuda/12.10"),
        ("modules: [3.10]", "module load 3.10"),
        ("setup: ulimit -n 65536", "ulimit -n 65536"),
    ],
)
def test_what_a_site_file_says_reaches_the_scheduler_as_it_was_written(tmp_path: Path, text: str, line: str) -> None:
    assert line in script_of(site_of(tmp_path, text).settings)


@pytest.mark.parametrize("value", ["", "~", "null", "''", "[]", "['']", "[~, false]", "false"])
def test_what_is_empty_or_false_asks_for_nothing(tmp_path: Path, value: str) -> None:
    plain = script_of(SlurmSite())
    for name in ("reservation", "exclusive", "mail-type", "time-min"):
        assert script_of(site_of(tmp_path, f"options: {{{name}: {value}}}").settings) == plain
    for name in ("account", "partition", "qos", "constraint", "exclude", "gpu_type", "modules", "setup"):
        assert script_of(site_of(tmp_path, f"{name}: {value}").settings) == plain
    if value != "''":  # a variable may be empty
        assert script_of(site_of(tmp_path, f"environment: {{X: {value}}}").settings) == plain


def test_plain_values_of_options_and_variables_follow_the_same_rule() -> None:
    values = {"a": None, "b": False, "c": [], "d": "", "e": ["x", None, "y"], "f": True, "g": 0}
    assert asked(values) == {"e": "x,y", "f": True, "g": "0"}
    assert variables(values) == {"d": "", "e": "x,y", "f": "true", "g": "0"}
    site = SlurmSite(options={"reservation": None, "exclusive": False, "mail-type": ["FAIL", "END"]})
    assert [line for line in script_of(site) if line not in script_of(SlurmSite())] == ["#SBATCH --mail-type=FAIL,END"]
    assert RaySite.of({"environment": values}).environment == variables(values)


@pytest.mark.parametrize(
    "text, message, hint",
    [
        ("partiton: gpu", "setting 'partiton' is unknown (", "did you mean 'partition'?"),
        ("tick_secnds: 3", "setting 'tick_secnds' is unknown (", "did you mean 'tick_seconds'?"),
        ("account: a\naccount: b", "key 'account' is given twice (", "the first one is at "),
        ("options: {nice: 1, nice: 2}", "key 'nice' is given twice (", "the first one is at "),
        ("requeue: no", "requeue must be true or false, not 'no' (", "write false"),
        ("requeue: 1", "requeue must be true or false, not 1 (", ""),
        ("max_jobs: '3'", "max_jobs must be a whole number, not '3' (", "remove the quotes"),
        ("signal_seconds: 2:00", "signal_seconds must be a whole number, not '2:00' (", ""),
        ("max_array: 0", "max_array must be at least 1, not 0 (", ""),
        ("lease_seconds: .nan", "lease_seconds must be a number, not '.nan' (", ""),
        ("qos: true", "qos must be text, not True (", "quote the word"),
        ("options: [a]", "options must be a mapping, not ['a'] (", "write {NAME: value}"),
        ("options: {gres: {gpu: 1}}", "options.gres must be text, not {'gpu': 1} (", ""),
        ("options: {job-name: mine}", "options.job-name is set by moegrid itself (", "remove it"),
        ("environment: {my-name: 1}", "environment.my-name is not the name of a variable (", "use letters"),
        ('account: "a\\nb"', "account must be one line of text", ""),
        ("options: {x: !!python/name:os.system y}", "is not allowed (", "write plain values"),
        ("account: [", "not valid YAML", "check indentation and quotes"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_the_nearest_name(
    tmp_path: Path, text: str, message: str, hint: str
) -> None:
    with pytest.raises(GridError) as raised:
        site_of(tmp_path, text)
    said = str(raised.value)
    line = 3 if "\n" in text or "[" in text[-1:] else 2
    assert message in said
    assert f"{tmp_path}/mine.yaml:{line}" in said
    assert hint in said


def test_all_mistakes_of_a_site_file_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(GridError) as raised:
        site_of(tmp_path, "partiton: gpu\nrequeue: no\ncores: 4\nmax_jobs: x")
    assert [problem.where.rpartition(":")[2] for problem in raised.value.problems] == ["2", "4", "3", "5"]


@pytest.mark.parametrize("text", ["", "cores: 4", "[a, b]", "backend:", "backend: slrum"])
def test_a_file_that_names_no_backend_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(MoegridError, match=r"mine\.yaml:1"):
        load_site(str(path))
    path.write_bytes(b"backend: slurm\naccount: \xff\n")
    with pytest.raises(MoegridError, match="cannot read"):
        load_site(str(path))


@pytest.mark.parametrize("name", ["local", "slurm", "ray"])
def test_the_sites_of_the_project_ask_for_nothing_special(name: str) -> None:
    site = load_site(name)
    assert site.backend == name
    assert site.settings == type(site.settings)()


@pytest.mark.parametrize(("text", "warm"), [("", True), ("warm: false", False)])
def test_a_local_site_says_whether_jobs_are_forked(tmp_path: Path, text: str, warm: bool) -> None:
    site = site_of(tmp_path, text, "local")
    backend: Any = open_backend(site)
    assert site.settings.warm is warm
    assert (backend._targets is not None) is warm
