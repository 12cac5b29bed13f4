"""All results of the laboratory as one page that needs no network: a summary, claims, questions.

    python -m experiments report --out experiments/results/report.html

The same results give the same page, to the byte. JSON files of other programs are left out.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from experiments.lab import command, formats, results, svg
from experiments.lab.claims import Claim, judge_all
from experiments.lab.rules import VERDICTS, Verdict
from gt_jax.errors import InputError

# Experiments in the order of the page; what is not named here follows.
ORDER = ("fusion", "ratio", "parity", "long_parity", "optimizers", "paradox", "characterize")
ORDER += ("context", "recall", "needle", "states", "persistence", "toys", "interventions")
ORDER += ("search", "pilot", "arbiters", "residual", "debate", "stability", "throughput")
ORDER += ("fusion_cost", "parallel", "scaling", "gates")

LEAD = "parity"  # its first plot opens the page: the losses of all families
PLOTS = 3  # of a result that are shown unfolded

# Characters that fit half the page's width, and the whole of it: tables with more than the half
# take all of it, those with more than the whole in smaller letters.
HALF, WHOLE = 68, 136
# Characters of a cell from which its column may be broken into lines.
LONG = 16


def main(argv=None):
    parser = command.plain_parser("report", __doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the JSON")
    parser.add_argument(
        "--out", type=Path, default=results.FOLDER / "report.html", help="page to write"
    )
    options = parser.parse_args(argv)
    found, others = collect(options.results)
    if not found:
        raise InputError(
            f"--results={options.results} holds no result; run python -m experiments fusion first"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(found), "utf-8")
    counts = Counter(verdict.verdict for _, verdict in judge_all(found))
    print(
        f"{options.out}: {', '.join(found)}"
        + (f" (left out: {', '.join(others)})" if others else "")
    )
    print(f"claims: {', '.join(f'{counts[v]} {v}' for v in VERDICTS)}")


def collect(folder: Path) -> tuple[dict[str, dict], list[str]]:
    """name -> result of every laboratory result in a folder, in the page's order; other files.

    Raises:
        InputError: a file is damaged, or two hold the same result.
    """
    found, others = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            stored = json.loads(path.read_text("utf-8"))
            if not isinstance(stored, dict) or "measures" not in stored:
                others.append(path.name)
                continue
        except ValueError:
            pass  # `read` says it better
        result = results.read(path)
        if result["name"] in found:
            raise InputError(f"{path} is a second result {result['name']}; remove one of them")
        found[result["name"]] = result
    places = {name: i for i, name in enumerate(ORDER)}
    order = sorted(found, key=lambda n: (places.get(found[n]["experiment"], len(ORDER)), n))
    return {name: found[name] for name in order}, others


def page(found: Mapping[str, dict]) -> str:
    """The HTML page of some results, by name."""
    judged = judge_all(found)
    parts = {
        "nav": " ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in found),
        "lead": lead(found),
        "findings": findings(judged),
        "contents": "".join(
            f'<li><a href="#{escape(name)}">{escape(name)}</a> {escape(asked(result))}</li>'
            for name, result in found.items()
        ),
        "claims": "\n".join(claims_of(verdict, judged, found) for verdict in VERDICTS),
        "experiments": "\n".join(map(section, found.values())),
    }
    template = Path(__file__).with_suffix(".html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda marker: parts[marker[1]], template)


def lead(found: Mapping[str, dict]) -> str:
    """The plot that opens the page, with a link to its result: LEAD's, else the first there is."""
    order = sorted(found, key=lambda name: name != LEAD)
    name = next((name for name in order if found[name]["plots"]), None)
    if name is None:
        return ""
    plots = found[name]["plots"]
    about = f'<p class="small"><a href="#{escape(name)}">{escape(found[name]["about"])}</a></p>'
    return figure(plots[0], svg.colour_numbers(plots), about)


def findings(judged: Sequence[tuple[Claim, Verdict]]) -> str:
    """How many claims have which verdict, and those on which it is not open."""
    counts = Counter(verdict.verdict for _, verdict in judged)
    tally = "".join(
        f'<li class="card"><a class="{v}" href="#{v}"><b>{counts[v]}</b>{v}</a></li>'
        for v in VERDICTS
    )
    lists = [f'<ul class="tally">{tally}</ul>']
    for name in VERDICTS:
        texts = [c for c, (verdict, *_) in judged if verdict == name != "undecided"]
        if texts:
            rows = "".join(f'<li><a href="#claim-{c.id}">{escape(c.text)}</a></li>' for c in texts)
            lists.append(f'<h3 class="{name}">{name.capitalize()}</h3><ul>{rows}</ul>')
    return "".join(lists)


def claims_of(
    which: str, judged: Sequence[tuple[Claim, Verdict]], found: Mapping[str, dict]
) -> str:
    """The claims of one verdict as rows, cards on a narrow screen; undecided ones are folded."""
    judged = [(claim, verdict) for claim, verdict in judged if verdict.verdict == which]
    if not judged:
        return ""
    rows = [
        '<li class="head"><span>Verdict</span><span>Claim</span><span>Published</span>'
        "<span>Measured here</span></li>"
    ]
    for claim, (verdict, ours, because, takes) in judged:
        links = ", ".join(
            f'<a href="#{escape(n)}">{escape(n)}</a>' if n in found else escape(n)
            for n in claim.results
        )
        measured = [f"<p>{escape(line)}</p>" for line in ours.splitlines()]
        if because:
            measured.append(f'<p class="soft">{escape(f"{verdict}, because {because}")}</p>')
        if takes:
            measured.append(f'<p class="soft">It would take {escape(takes)}.</p>')
        rows.append(
            f'<li id="claim-{claim.id}"><div><span class="badge {verdict}">{verdict}</span></div>'
            f"<div><p>{escape(claim.text)}</p>"
            f'<details class="small soft"><summary>rule</summary>{escape(claim.rule)}'
            f"{f' From {links}.' if links else ''}</details></div>"
            f'<div><p><span class="label">Published: </span>{escape(claim.published)}</p>'
            f'<p class="small soft">{escape(claim.source)}</p></div>'
            f'<div><span class="label">Measured here: </span>{"".join(measured)}</div></li>'
        )
    unfolded = "" if which == "undecided" else " open"
    return (
        f'<details id="{which}"{unfolded}><summary><b class="{which}">{len(judged)} {which}</b>'
        f'</summary><ul class="claims card">{"".join(rows)}</ul></details>'
    )


def section(result: Mapping) -> str:
    """One experiment: what it asks, its plots, then, folded, its tables and how to repeat it."""
    settings = result["settings"]
    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    line = ", ".join(f"{n} {_plain(v)}" for n, v in settings.items() if n not in groups)
    folded = "".join(group(*each) for each in groups.items())
    commits = ", ".join(commit[:10] for commit in (result["commit"] or "").split(", "))
    commit = f", commit <code>{escape(commits)}</code>" if commits else ""
    trial = (
        " <b>A trial run of a tiny model: its numbers mean nothing.</b>" if result["quick"] else ""
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in result["notes"])
    colours = svg.colour_numbers(result["plots"])
    plots = [figure(plot, colours) for plot in result["plots"]]
    shown, more = ("".join(each) for each in (plots[:PLOTS], plots[PLOTS:]))
    tables = "".join(map(html_table, result["tables"]))
    return f"""<section id="{escape(result["name"])}">
<h2>{escape(result["name"])}</h2>
<p>{escape(asked(result))}{trial}</p>
{notes}{f'<div class="plots">{shown}</div>' if shown else ""}
{fold(more_plots(len(plots) - PLOTS), f'<div class="plots">{more}</div>') if more else ""}
{fold(f"Tables ({len(result['tables'])})", f'<div class="tables">{tables}</div>', not plots)}
{
        fold(
            "How it was measured",
            f'''<pre><code>{escape(result["command"])}</code></pre>
<p class="small soft">{escape(line)}<br>
{escape(result["device"])}, JAX {escape(result["jax"])}, {result["seconds"]:,.0f} s{commit}</p>
{folded}''',
        )
    }
</section>"""


def more_plots(count: int) -> str:
    return f"{count} more plot{'s' if count > 1 else ''}"


def asked(result: Mapping) -> str:
    """The question of a result, and whose branch answers it where that is not ours."""
    legacy = result["settings"].get("branch") == "legacy"
    return result["about"] + (" Here with the original's branch." if legacy else "")


def fold(title: str, content: str, unfolded: bool = False) -> str:
    """Content to be unfolded by its title."""
    state = " open" if unfolded else ""
    return f"<details{state}><summary>{escape(title)}</summary>{content}</details>"


def group(name: str, values: Mapping) -> str:
    """Settings of one kind, a line each."""
    lines = "".join(
        f"<p>{escape(n)}: {escape(_plain(v) or 'no change')}</p>" for n, v in values.items()
    )
    return f'<div class="small soft"><h3>{escape(name)}</h3>{lines}</div>'


def html_table(table: Mapping) -> str:
    """A table as a card; columns of words stand left, those of numbers right."""
    columns = list(zip(*table["rows"], strict=True)) or [()] * len(table["columns"])
    places = [_place(column) for column in columns]
    cells = lambda tag, row: "".join(
        f"<{tag}{place}>{escape(formats.show(cell))}</{tag}>"
        for place, cell in zip(places, row, strict=True)
    )
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table["rows"])
    note = f'<p class="small soft">{escape(table["note"])}</p>' if table["note"] else ""
    shown = [table["columns"], *([formats.show(cell) for cell in row] for row in table["rows"])]
    width = sum(3 + max(map(len, column)) for column in zip(*shown))  # characters
    place = "block card" + " wide" * (width > HALF) + " dense" * (width > WHOLE)
    return (
        f'<div class="{place}"><h3>{escape(table["title"])}</h3><div class="scroll"><table>'
        f"<thead><tr>{cells('th', table['columns'])}</tr></thead><tbody>{rows}</tbody>"
        f"</table></div>{note}</div>"
    )


def _place(column: Sequence) -> str:
    """The class of a column's cells: of words, of sentences, which take several lines, or none."""
    lengths = [len(cell) for cell in column if isinstance(cell, str)]
    if not lengths:
        return ""
    return ' class="words long"' if max(lengths) > LONG else ' class="words"'


def figure(plot: Mapping, colours: Mapping[str, int], about: str = "") -> str:
    """A plot with its title, HTML about it, and a legend where its lines need one."""
    names = [series["name"] for series in plot["series"] if "x" in series]
    classes = [svg.class_of(colours[n]) for n in names]
    legend = "".join(f'<li class="{c}"><i></i>{escape(n)}</li>' for c, n in zip(classes, names))
    legend = f'<ul class="legend">{legend}</ul>' if len(names) > 1 else ""
    axis = f' <span class="soft">{escape(plot["y"])}</span>' if plot["y"] else ""
    title = f"<h3>{escape(plot['title'])}{axis}</h3>"
    return f'<figure class="card">{title}{about}{legend}{svg.draw(plot, colours)}</figure>'


def _plain(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_plain(v)}" for name, v in value.items())
    return " ".join(map(_plain, value)) if isinstance(value, list) else formats.show(value)


if __name__ == "__main__":
    command.run(main)
