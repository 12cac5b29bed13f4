"""The page shows the numbers of the results, and verdicts on claims."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.lab import claims, designs, formats, measures, report, results
from experiments.lab.statistics import compare, estimate
from gt_jax.errors import InputError

RESULTS = Path(report.__file__).parents[1] / "results"
HOSTILE = "<script>x()</script> & {{nav}} \\1"


def a_result(name="fusion", measures=None, **changes):
    losses = {"GF": [1.5, 1.51, 1.52], "HY": [1.6, 1.613, 1.62], HOSTILE: [1.7, 1.6, 1.9]}
    found = {label: estimate(values) for label, values in losses.items()}
    return formats.plain(
        {
            "name": name,
            "experiment": name.split("-")[0],
            "about": f"What of {HOSTILE}?",
            "command": f"python -m experiments {name} --seeds=3",
            "commit": "0123456789" * 4,
            "device": "NVIDIA H100",
            "jax": "0.11.2",
            "python": "3.12.3",
            "seconds": 123.4,
            "quick": False,
            "settings": {
                "steps": 500,
                "rates": [3e-4, 1e-3],
                "seeds": [0, 1, 2],
                "lengths": {HOSTILE: 64},
            },
            "measures": measures or {},
            "tables": [
                results.table("Loss", ["fusion", "loss"], [*found.items()], HOSTILE),
                results.table(
                    "Counts", ["what", "n", "share"], [["a", 12345, 0.00001], ["b", None, True]]
                ),
            ],
            "plots": [
                results.plot("Ends", "nats", "", [results.dot(*item) for item in found.items()]),
                results.plot(
                    "Curves",
                    "step",
                    "loss",
                    [results.line(HOSTILE, [0, 10, 100], [[3, 2, 1], [3, float("nan"), 2]])],
                ),
            ],
            "notes": [HOSTILE],
        }
        | changes
    )


def better_by_its_rule():
    """Measures of the two rates of a claim, that GF is better than HY by 0.05."""
    losses = {"HY": [1.6] * 5, "GF": [1.56, 1.54, 1.55, 1.56, 1.54]}
    (pair,) = compare(losses)
    return {f"HY - GF at {at}": pair for at in ("3e-4", "best")}


@pytest.fixture
def page(tmp_path, capsys):
    measures = better_by_its_rule()
    for name in ("fusion", "fusion-legacy", "custom"):
        text = json.dumps(a_result(name, measures if name == "fusion" else None))
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "other.json").write_text('{"rows": []}')
    (tmp_path / "null.json").write_text("null")
    out = tmp_path / "page" / "report.html"
    report.main([f"--results={tmp_path}", f"--out={out}"])
    said = capsys.readouterr().out
    assert "fusion, fusion-legacy, custom (left out: null.json, other.json)" in said
    assert "claims: 1 reproduced, 0 refuted, 1 artefact," in said
    return out


def test_page_shows_the_numbers_of_the_results(page):
    text = page.read_text("utf-8")
    sections = re.findall(r'<section id="(.*?)">(.*?)</section>', text, re.DOTALL)
    assert [name for name, _ in sections] == ["fusion", "fusion-legacy", "custom"]
    for name, section in sections:
        result = results.read(page.parents[1] / f"{name}.json")
        tables = re.findall(r"<tbody>(.*?)</tbody>", section, re.DOTALL)
        for shown, table in zip(tables, result["tables"], strict=True):
            rows = re.findall(r"<tr>(.*?)</tr>", shown)
            cells = [[html.unescape(c) for c in re.findall(r"<td.*?>(.*?)</td>", r)] for r in rows]
            assert cells == [[formats.show(cell) for cell in row] for row in table["rows"]]
        assert section.count("<svg") == len(result["plots"])
        assert html.escape(result["command"]) in section and "NVIDIA H100, JAX 0.11.2" in section
    badges = dict(re.findall(r'id="claim-(.*?)"><div><span class="badge .*?">(.*?)<', text))
    found, _ = report.collect(page.parents[1])
    assert badges == {claim.id: verdict.verdict for claim, verdict in claims.judge_all(found)}
    assert badges["gf-hy"] == "reproduced"


def test_words_stand_left_and_numbers_right():
    cells = lambda rows: re.findall(
        r"<t[hd]((?: class=.*?)?)>(.*?)</t[hd]>",
        report.html_table(results.table("", ["design", "n", "verdict", "because"], rows)),
    )
    words, long = ' class="words"', ' class="words long"'
    found = cells([["GF", 1.5, "alive", "both branches count"], ["HY", None, "idle", ""]])
    assert [place for place, _ in found] == [words, "", words, long] * 3
    assert [text for _, text in found[4:8]] == ["GF", "1.5000", "alive", "both branches count"]
    assert len(cells([])) == 4, "columns without rows have their names"


def test_page_rebuilds_to_the_byte_and_needs_nothing_else(page):
    found, _ = report.collect(page.parents[1])
    text = page.read_text("utf-8")
    assert report.page(found) == text
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|\burl\(|\bfetch\b|<script", text)
    assert "&lt;script&gt;x()&lt;/script&gt; &amp; {{nav}} \\1" in text


def test_page_says_whose_branch_a_result_is_of_and_counts_folded_plots():
    ours = a_result() | {"settings": {"branch": "official"}}
    theirs = a_result("fusion-legacy") | {"settings": {"branch": "legacy"}}
    theirs["plots"] = theirs["plots"] * 2
    theirs["commit"] = f"{'a' * 40}, {'b' * 40}"  # of two parts
    text = report.page({"fusion": ours, "fusion-legacy": theirs})
    assert (
        text.count("Here with the original&#x27;s branch.") == 2
    )  # in the contents, at the result
    assert "aaaaaaaaaa, bbbbbbbbbb<" in text
    assert ">1 more plot<" in text and report.more_plots(8) == "8 more plots"


def test_designs_are_explained_where_their_names_do_not():
    assert designs.meanings(["GF-MH", "minGRU"]) == []
    assert [each.split(":")[0] for each in designs.meanings(designs.SEARCHED)] == [
        "A path",
        "Repaired",
        "Branch losses",
    ]


@pytest.fixture(scope="module")
def committed():
    """The results in the repository; those of the legacy branch are not kept, and named alike."""
    found, _ = report.collect(RESULTS)
    return {f"{name}-legacy": result for name, result in found.items()} | found


def test_committed_page_is_of_the_committed_results():
    found, _ = report.collect(RESULTS)
    assert report.page(found) == (RESULTS / "report.html").read_text("utf-8")


def test_every_measure_of_a_claim_is_in_the_committed_results(committed):
    for group in (value for name, value in vars(measures).items() if name.isupper()):
        for result, name in group.values() if isinstance(group, dict) else [group]:
            assert name in committed[result]["measures"], (result, name)


def test_undecided_claims_say_what_would_decide_them():
    """On the committed page, where most of them name a number of seeds."""
    found, _ = report.collect(RESULTS)
    takes = [v.takes for _, v in claims.judge_all(found) if v.verdict == "undecided"]
    assert len(takes) <= 8 and all(takes)
    text = (RESULTS / "report.html").read_text("utf-8")
    assert all(f"It would take {html.escape(each)}." in text for each in takes)


def test_every_claim_can_be_judged_from_results_of_these_forms(committed):
    for claim, verdict in claims.judge_all(committed):
        assert not verdict.because.startswith("not measured"), (claim.id, verdict.because)


@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_screen_in_a_browser(page, tmp_path, width):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here; apt install chromium")
    measured = tmp_path / "measured.html"
    probe = (
        "<script>document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth,"
        "[...document.querySelectorAll('svg')].map(x => x.getBoundingClientRect().width),"
        "document.querySelector('svg').getBoundingClientRect().top])</script>"
    )
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{{}}"></iframe>'
    copy = (
        "<script>addEventListener('load', () => document.title = f.contentDocument.title)</script>"
    )
    measured.write_text(
        frame.format(html.escape(page.read_text("utf-8") + probe)) + copy, encoding="utf-8"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'c'}"]
    dom = subprocess.run(
        [chromium, *flags, "--virtual-time-budget=2000", "--dump-dom", measured.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    inner, scrolled, plots, top = json.loads(
        html.unescape(re.search("<title>(.*?)</title>", dom)[1])
    )
    assert inner == width and scrolled <= width
    assert len(plots) == 7 and all(200 < plot < width for plot in plots)
    assert top < 600, "the first plot is on the first screen"


def test_damaged_result_is_one_line(page, tmp_path):
    folder = page.parents[1]
    (folder / "fusion.json").write_text('{"measures": {}, "name"')
    with pytest.raises(InputError, match=r"fusion\.json is not JSON: it is damaged; run its"):
        report.main([f"--results={folder}", f"--out={tmp_path / 'x.html'}"])
    (folder / "fusion.json").write_text((folder / "custom.json").read_text())
    with pytest.raises(InputError, match=r"fusion\.json is a second result custom"):
        report.main([f"--results={folder}"])
    with pytest.raises(
        InputError, match=r"empty holds no result; run python -m experiments fusion"
    ):
        report.main([f"--results={tmp_path / 'empty'}"])
    with pytest.raises(InputError, match=r"unrecognized arguments: --quick"):
        report.main(["--quick"])
