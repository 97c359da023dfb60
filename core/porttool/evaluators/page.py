"""The report for people: one picture, and one page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from porttool.component import explain
from porttool.errors import UsageError
from porttool.evaluator import Report, Table, Verdict, write_whole
from porttool.standing import whole_file

if TYPE_CHECKING:
    from porttool.evaluators.comparison import Comparison

STYLE = """
:root{color-scheme:light dark;--ink:#1d2433;--soft:#667085;--line:#e4e7ec;
--card:#fff;--page:#f7f8fa;
--yes:#067647;--yesbg:#ecfdf3;--no:#b42318;--nobg:#fef3f2}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3444;
--card:#181e2a;
--page:#10151e;--yes:#75e0a7;--yesbg:#0c2e1f;--no:#fda29b;--nobg:#3a1512}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:26px;margin:0 0 4px;letter-spacing:-.01em}h2{font-size:18px;margin:40px 0 12px}
.sides{color:var(--soft);margin:0 0 20px}
.outcome{display:inline-block;padding:6px 14px;border-radius:999px;font-weight:600}
.yes{color:var(--yes)}.no{color:var(--no)}
.outcome.yes{background:var(--yesbg)}.outcome.no{background:var(--nobg)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%}th,td{padding:9px 14px;text-align:left;vertical-align:top}
th{font-size:12.5px;color:var(--soft);font-weight:600}
tr+tr td{border-top:1px solid var(--line)}thead+tbody td{border-top:1px solid var(--line)}
td.number{text-align:right;font-variant-numeric:tabular-nums}th.number{text-align:right}
img{width:100%;border:1px solid var(--line);border-radius:10px;background:#fff}
.pair{display:grid;grid-template-columns:repeat(3,1fr);gap:14px;margin:0 0 16px}
.pair>div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;
white-space:pre-wrap;overflow-wrap:anywhere}
.pair h3{margin:0 0 6px;font-size:12.5px;color:var(--soft)}
li{margin:2px 0;color:var(--soft)}
@media (max-width:760px){.pair{grid-template-columns:1fr}}
"""


def write_page(
    output: Path,
    report: Report,
    comparison: Comparison,
    *,
    n_examples: int,
    parity: Report | None,
) -> None:
    """Write report.png and report.html; a parity report is shown if there is one."""
    from porttool.evaluators.chart import draw_chart

    picture = output / "report.png"
    with whole_file(picture) as place:
        draw_chart(comparison, place)
    parts = [
        heading(report),
        "<h2>Verdicts</h2>" + verdict_table(report.verdicts),
        *(f"<h2>{escape(t.title)}</h2>{html_table(t)}" for t in report.tables),
        image(picture),
        *([f"<h2>Parity</h2>{verdict_table(parity.verdicts)}"] if parity else []),
        "<h2>Side by side</h2>" + "".join(examples(comparison, n_examples)),
        "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(n)}</li>" for n in report.notes) + "</ul>",
    ]
    title = escape(f"porttool {report.evaluator}")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    write_whole(output / "report.html", page)


def read_parity(path: Path, *, named: bool) -> Report | None:
    """Read the report that `verify` left, if it did; one that was `named` must be there."""
    try:
        found = Report.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        said = explain(error) if isinstance(error, ValidationError) else error.strerror
    else:
        if found.evaluator == "parity":
            return found
        said = f"it is a report of {found.evaluator!r}"
    if named:
        raise UsageError(f"{path}: no parity report of `verify`: {said}")
    return None


def heading(report: Report) -> str:
    """Return the title, the two sides and the outcome."""
    n, failed = len(report.verdicts), len(report.failed)
    text = f"{failed} of {n} checks failed" if failed else f"all {n} checks pass"
    if not report.verdicts:
        text = "nothing was compared"
    kind = "yes" if report.passed else "no"
    return (
        f"<h1>{escape(report.evaluator)}</h1><p class=sides>{escape(report.engine)} beside "
        f'{escape(report.reference)}</p><span class="outcome {kind}">{text}</span>'
    )


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """Return verdicts as a table."""
    rows = "".join(
        f'<tr><td class="{"yes" if v.passed else "no"}">'
        f"{'untested' if v.passed is None else v.word}</td>"
        f"<td>{escape(v.name)}</td><td class=number>{escape(v.found)}</td>"
        f"<td class=number>{escape(v.bound)}</td><td>{escape(v.detail)}</td></tr>"
        for v in verdicts
    )
    return (
        "<div class=scroll><table><thead><tr><th></th><th>check</th><th class=number>found</th>"
        f"<th class=number>bound</th><th></th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def html_table(table: Table) -> str:
    """Return a table, its columns of numbers set to the right."""
    numeric = [is_numeric([row[i] for row in table.rows]) for i in range(len(table.columns))]
    head = "".join(cell("th", c, n) for c, n in zip(table.columns, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(cell("td", c, n) for c, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class=scroll><table>{inner}</table></div>"


def cell(tag: str, text: str, numeric: bool) -> str:
    """Return one cell."""
    kind = " class=number" if numeric else ""
    return f"<{tag}{kind}>{escape(text)}</{tag}>"


def is_numeric(values: Sequence[str]) -> bool:
    """Return true if every value is a number or a dash."""
    return all(v.lstrip("+-").replace(".", "", 1).isdigit() or v == "-" for v in values)


def image(path: Path) -> str:
    """Return a picture with its bytes inside."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<h2>Article by article</h2><img alt="charts" src="data:image/png;base64,{data}">'


def examples(comparison: Comparison, most: int) -> Iterable[str]:
    """Yield articles side by side, those first on which the sides differ most."""
    order = list(range(len(comparison.articles)))
    if comparison.both:
        gaps = comparison.differences("rouge1")
        order.sort(key=lambda i: -abs(gaps[i]))
    for index in order[:most]:
        columns = [("human", comparison.articles[index].highlights)]
        for name, side in (("engine", comparison.engine), ("Hugging Face", comparison.reference)):
            if side is not None:
                columns.append((name, side.continuations[index].text.strip() or "(empty)"))
        boxes = "".join(f"<div><h3>{n}</h3>{escape(t)}</div>" for n, t in columns)
        yield f"<div class=pair>{boxes}</div>"
