"""Documents tell the truth: links and commands exist, quoted figures are those of the results."""

import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest

from experiments.__main__ import experiments, takes_lab_flags
from gt_jax.__main__ import PROGRAMS
from gt_jax.config_files import folder

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "experiments" / "README.md"]
PAGES = sorted([*PAGES, ROOT / "gt_jax" / "kernels" / "README.md"])
CONFIGS = sorted(folder().glob("*.py"))
TEXTS = {path: path.read_text("utf-8") for path in [*PAGES, *CONFIGS]}

# What several documents may quote -> how it stands there, the figure in a group.
QUOTED = {
    "minutes of gf_mh on two CPU cores": r"(\d+) (?:minutes )?on two\s+CPU cores",
    "parameters of gf_mh_base": r"(\d+) M\s+parameters[^.|]{0,40}16 x 2048",
}


def headings(page):
    """Names that links have for a page's headings, as GitHub and Sphinx make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    words = (heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.M))
    return [re.sub(r"[^\w-]", "", heading) for heading in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXTS[page]):
        if not target.startswith(("http", "{")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target, heading in re.findall(r"\]\(([^):]*)#([^)]+)\)", TEXTS[page]):
        found = headings(page.parent / target if target else page)
        assert heading in found, f"{page.name} links to {target}#{heading}; there are {found}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_programs_and_configs_that_exist(page):
    for module in re.findall(r"python -m ((?:gt_jax|experiments)[\w.]*)", TEXTS[page]):
        module = module.rstrip(".")
        if not module.endswith("PROGRAM"):
            assert importlib.util.find_spec(module), f"{page.name} runs {module}"
    for name in re.findall(r"--config=(?:configs/)?(\w+)(?:\.py)?\b", TEXTS[page]):
        assert (folder() / f"{name}.py").is_file(), f"{page.name} names config {name}"


@pytest.mark.parametrize("what", QUOTED)
def test_a_figure_quoted_twice_is_the_same(what):
    found = {}
    for path, text in TEXTS.items():
        for figure in re.findall(QUOTED[what], text):
            found.setdefault(re.sub(r"[ ,]", "", figure), []).append(path.name)
    assert len(found) == 1, f"{what}: {found}"


def test_the_readme_names_every_program_and_the_laboratory_s_every_experiment():
    text = TEXTS[ROOT / "README.md"]
    missing = [name for name in PROGRAMS if f"`{name}`" not in text]
    assert not missing, f"README.md does not name {missing}"
    together, alone = TEXTS[ROOT / "experiments" / "README.md"].split("flags of their own")
    for name, file in experiments().items():
        text = together if takes_lab_flags(file) else alone
        assert f"\n| `{name}` | " in text, f"experiments/README.md does not name {name}, or where"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_results_in_the_readme_are_those_of_the_results_files():
    rows = {
        (row["op"], row["who"]): row
        for row in result("kernels")["rows"]
        if row["shape"][:2] == [8, 4096]
    }
    both = lambda op, who: f"{rows[op, who]['both']['ms']:.3f} ms"
    worst = max(
        e for row in rows.values() if row["who"] == "mosaic" for e in row["errors"].values()
    )
    shipped = next(row for row in result("gf_mh")["rows"] if row["name"] == "as shipped")
    parity = result("parity")["measures"]
    half = lambda m: f"{m['mean']:.3f} ± {(m['high'] - m['low']) / 2:.3f}"
    expected = [
        *(both("wkv6", who) for who in ("mosaic", "fla chunk_rwkv6")),
        *(both("ssd", who) for who in ("mosaic", "jla mamba2_ssd", "mamba_ssm")),
        f"{worst:.1e}".replace("e-0", "e-"),
        f"{shipped['mean']:.4f} ± {shipped['sd']:.4f}",
        half(parity["loss GF-MH, characters"]),
        half(parity["loss GPT-2, characters"]),
    ]
    text = (ROOT / "README.md").read_text()
    for figure in expected:
        assert figure in text, f"README.md lacks {figure}"


def test_losses_of_the_presets_are_those_of_the_results_file():
    runs = result("presets")["rows"]
    page = TEXTS[ROOT / "docs" / "results.md"]
    for config in {run["config"] for run in runs}:
        losses = [run["loss"] for run in runs if run["config"] == config]
        figure = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        row = rf"^\| `{config}`[^|]*\| {figure} \|"
        assert re.search(row, page, re.M), f"docs/results.md lacks {figure} of {config}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_what_a_config_expects_stands_under_a_heading_or_a_word_of_the_results(path):
    """Figures change with every build, so a config names the place of its own, not their values."""
    expected = TEXTS[path].partition("Expected:")[2].partition('"""')[0]
    page = " ".join(TEXTS[ROOT / "docs" / "results.md"].split())
    for place in re.findall(r'"([^"]+)"', " ".join(expected.split())):
        assert f"## {place} " in page or f"- {place} (" in page, f"{path.name} names {place}"
    assert not re.search(r"\d (tokens/s|nats)", expected), f"{path.name} quotes a figure"
