"""Verdicts follow from numbers by their rules; the page shows the numbers of the results."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.lab import claims, designs, formats, measures, report, results, rules
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


def pairs(losses, at):
    return {f"{pair['a']} - {pair['b']} at {at}": pair for pair in compare(losses)}


def verdict_of(claim_id, found):
    (verdict,) = [v for claim, v in claims.judge_all(found) if claim.id == claim_id]
    return verdict


def losses(gain, spread=1):
    """HY and GF over five seeds, GF better by `gain`; differences have sd 0.01 times the spread."""
    noise = (0.01, -0.01, 0.0, 0.01, -0.01)
    return {"HY": [1.6] * 5, "GF": [1.6 - gain + spread * e for e in noise]}


@pytest.mark.parametrize(
    ("at_reference", "at_best", "spread", "verdict"),
    [
        (0.05, 0.05, 1, "reproduced"),
        (0.0, 0.05, 1, "reproduced"),
        (0.05, -0.05, 1, "refuted"),
        (0.05, 0.0, 1, "artefact"),  # 0 ± 0.012 leaves out 0.025
        (0.02, 0.005, 1, "refuted"),  # 0.005 ± 0.012 leaves out half of 0.071, not of 0.02
        (0.0, 0.0, 1, "refuted"),
        (0.05, 0.0, 4, "undecided"),  # 0 ± 0.05 leaves out neither
        (0.0, 0.0, 4, "undecided"),
    ],
)
def test_a_variant_is_better_by_its_rule(at_reference, at_best, spread, verdict):
    measures = pairs(losses(at_reference), "3e-4") | pairs(losses(at_best, spread), "best")
    found = verdict_of("gf-hy", {"fusion": a_result(measures=measures)})
    assert found.verdict == verdict
    assert found.ours.startswith("GF − HY, best rates: ")
    assert f"{-at_best:+.3f} ± {0.01242 * spread:.3f}".replace("-", "−") in found.ours


def test_original_branch_alone_makes_an_artefact():
    fair = pairs(losses(0.0), "3e-4") | pairs(losses(0.0, 4), "best")
    found = {"fusion": a_result(measures=fair)}
    assert verdict_of("gf-hy", found).verdict == "undecided"
    found["fusion-legacy"] = a_result("fusion-legacy", measures=pairs(losses(0.12), "3e-4"))
    assert verdict_of("gf-hy", found).verdict == "artefact"


@pytest.mark.parametrize(("gain", "said"), [(0.02, "in its direction: half of"), (0.05, "")])
def test_a_reproduced_difference_says_where_it_is_much_smaller(gain, said):
    """0.02 ± 0.012 leaves out half of 0.071, and 0.05 ± 0.012 does not."""
    found = {"fusion": a_result(measures=pairs(losses(gain), "best"))}
    verdict = verdict_of("gf-hy", found)
    assert verdict.verdict == "reproduced"
    assert verdict.because.startswith(said) and bool(verdict.because) == bool(said)


def test_a_single_seed_at_the_best_rates_leaves_a_claim_undecided():
    one = {name: values[:1] for name, values in losses(0.0).items()}
    found = {
        "fusion": a_result(measures=pairs(one, "best")),
        "fusion-legacy": a_result("fusion-legacy", measures=pairs(losses(0.12), "3e-4")),
    }
    verdict = verdict_of("gf-hy", found)
    assert (verdict.verdict, verdict.because) == ("undecided", "a single seed has no interval")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([4.0, 4.1, 3.9], "reproduced"),
        ([1.6, 1.7, 1.6], "refuted"),
        ([2.5, 3.5, 3.0], "undecided"),
        ([4.0], "undecided"),
    ],
)
def test_a_figure_is_judged_by_its_interval(values, verdict):
    found = {"training speed GPT-2 / GF-MH": estimate(values)}
    found = {"throughput": a_result("throughput", found)}
    assert verdict_of("gpt2-speed", found).verdict == verdict


@pytest.mark.parametrize(
    ("theirs", "fair", "verdict"),
    [
        ([0.001, 0.002, 0.001], [0.3, 0.31, 0.3], "artefact"),
        ([0.2, 0.21, 0.2], [0.3, 0.31, 0.3], "refuted"),
        ([0.001, 0.002, 0.001], [0.002, 0.002, 0.003], "reproduced"),
        ([0.2, 0.21, 0.2], [0.002, 0.02, 0.01], "undecided"),
    ],
)
def test_a_figure_of_unfair_conditions_is_an_artefact(theirs, fair, verdict):
    measures = {
        "Mamba share, published": estimate(theirs),
        "Mamba share, trained": estimate(fair),
    }
    assert verdict_of("mamba-share", {"paradox": a_result("paradox", measures)}).verdict == verdict


@pytest.mark.parametrize(
    ("kept", "theirs", "verdict"),
    [
        (("attractor",) * 2, None, "reproduced"),
        (("none",) * 2, None, "refuted"),
        (("none",) * 2, ("none", "attractor"), "refuted"),
        (("none",) * 2, ("attractor",) * 2, "artefact"),
        (("attractor", "none"), ("attractor",) * 2, "undecided"),
    ],
)
def test_attractor_must_show_at_both_rates(kept, theirs, verdict):
    """And is an artefact if it shows with the original's branch alone."""

    def result(name, found):
        measures = {f"attractor at {rate}": each for rate, each in zip((3e-4, 3e-3), found)}
        kept = {f"gate spread kept at {rate}": estimate([0.1, 0.2]) for rate in (3e-4, 3e-3)}
        return {name: a_result(name, measures | kept)}

    found = result("ratio", kept) | (result("ratio-legacy", theirs) if theirs else {})
    assert verdict_of("attractor", found).verdict == verdict


@pytest.mark.parametrize(
    ("learnt", "score", "verdict"),
    [
        ((1.0, 0.9, 1.0), (100, 100, 100), "reproduced"),
        ((1.0, 0.9, 1.0), (10, 20, 10), "refuted"),
        ((1.0, 0.1, 1.0), (100, 0, 100), "undecided"),  # one did not learn to answer
        ((0.1, 0.1, 0.1), (0, 0, 0), "undecided"),
    ],
)
def test_what_was_not_learnt_is_not_forgotten(learnt, score, verdict):
    measures = {"fact GF-MH, turn 5": estimate(learnt)}
    measures |= {"state persistence GF-MH": estimate(score)}
    found = {"persistence": a_result("persistence", measures=measures)}
    assert verdict_of("state-persistence", found).verdict == verdict


def test_size_is_counted():
    verdict = verdict_of("gpt2-size", {})
    assert verdict.verdict == "artefact" and "5,618,920 against 6,814,080" in verdict.ours


def test_what_is_not_measured_is_undecided():
    quick = a_result(measures=pairs(losses(0.05), "best"), quick=True)
    for found, because in (
        ({}, "not measured: there is no result fusion"),
        ({"fusion": a_result()}, 'not measured: fusion has no "HY - GF at best"'),
        ({"fusion": quick}, "not measured: fusion is from a trial run"),
    ):
        verdict = verdict_of("gf-hy", found)
        assert verdict.verdict == "undecided" and verdict.because == because
    for claim, verdict in claims.judge_all({}):
        assert verdict.verdict in rules.VERDICTS
        assert claim.rule and claim.source and (verdict.because or not claim.results)
    assert len({claim.id for claim in claims.CLAIMS}) == len(claims.CLAIMS)


@pytest.fixture
def page(tmp_path, capsys):
    measures = pairs(losses(0.05), "3e-4") | pairs(losses(0.05), "best")
    for name in ("fusion", "fusion-legacy", "custom"):
        text = json.dumps(a_result(name, measures if name == "fusion" else None))
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "other.json").write_text('{"rows": []}')
    out = tmp_path / "page" / "report.html"
    report.main([f"--results={tmp_path}", f"--out={out}"])
    said = capsys.readouterr().out
    assert "fusion, fusion-legacy, custom (left out: other.json)" in said
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
    text = report.page({"fusion": ours, "fusion-legacy": theirs})
    assert (
        text.count("Here with the original&#x27;s branch.") == 2
    )  # in the contents, at the result
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
