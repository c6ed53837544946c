"""The lab's report: a table of claims and verdicts, then a figure for each, as one self-contained HTML file and as Markdown."""
import base64
import datetime
import html
import io
import json
import math
import os
import platform
import shlex
from pathlib import Path

import matplotlib
import torch

from data.files import write_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

STYLE = """body{font:16px/1.5 Georgia,serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid #ccc}td.n{white-space:nowrap}.holds{font-weight:bold}
.not{font-style:italic}code{font-size:85%}img{max-width:100%}h2{margin-top:2.5rem}"""


def write_report(folder, args, results):
    """results: {claim: (statement, findings or None, its picture, or why its runs failed)}. Prints the table; writes
    report.html, report.md, results.json and a picture for each claim into `folder`."""
    folder = Path(folder)
    pictures = {name: content for name, (_, findings, content) in results.items() if findings}
    for name, content in pictures.items():
        write_file(folder / f"{name}.png", content)
    about = (f"{datetime.date.today()}, scale {args.scale}, {args.seeds} seeds, sizes {', '.join(args.sizes)}; {os.cpu_count()} cores, "
             f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    rows = list(table(args, results))
    write_file(folder / "report.md", markdown(about, rows, pictures, results))
    write_file(folder / "report.html", web_page(about, rows, pictures, results))
    write_file(folder / "results.json", json.dumps({"about": about, "claims": {
        name: {"statement": statement, "findings": [{k: None if v in (math.inf, -math.inf) else v for k, v in vars(f).items()} for f in findings] if findings else None, "failed": None if findings else why}
        for name, (statement, findings, why) in results.items()}}, indent=1))
    print("\n" + "\n".join(f"  {name:<38}{effect:<50}{verdict}" for name, effect, verdict, *_ in rows) + f"\n\nreport: {folder / 'report.html'}")


def table(args, results):
    """(claim, effect with its interval, verdict, the paper's statement, command) for each claim. args.given: the lab's own flags."""
    for name, (statement, findings, why) in results.items():
        command = shlex.join(["python", "lab.py", args.scale, name, *args.given])
        if findings:
            yield name, shown(findings[0]), findings[0].verdict, statement, command
        else:
            yield name, "", f"failed: {why}", statement, command


def shown(finding):
    if math.isinf(finding.low):
        return f"{finding.effect:+.1f} {finding.unit} (no interval)"
    return f"{finding.effect:+.1f} ({finding.low:+.1f} to {finding.high:+.1f}) {finding.unit}" + (", over seeds only" if finding.over == "seeds" else "")


def picture(draw):
    """A PNG that reads in greyscale."""
    figure, ax = plt.subplots(figsize=(6.4, 3.8), dpi=130)
    draw(ax)
    ax.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def markdown(about, rows, pictures, results):
    lines = ["# The paper's claims, measured", "", about, "", "Effects are differences with 95 % intervals over test groups and seeds.", "",
             "| claim | effect | verdict | the paper | command |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {effect} | *{verdict}* | {statement} | `{command}` |" for name, effect, verdict, statement, command in rows]
    for name in pictures:
        statement, findings, _ = results[name]
        lines += ["", f"## {name}", "", statement, "", f"![{name}]({name}.png)", ""]
        lines += [f"- {finding.what}: {shown(finding)}: *{finding.verdict}*" for finding in findings]
    return "\n".join(lines) + "\n"


def web_page(about, rows, pictures, results):
    text = html.escape
    kind = lambda verdict: "holds" if verdict == "holds" else "not"
    body = "".join(f"<tr><td><a href='#{name}'>{name}</a></td><td class=n>{text(effect)}</td><td class={kind(verdict)}>{text(verdict)}</td><td>{text(statement)}</td>"
                   f"<td><code>{text(command)}</code></td></tr>" for name, effect, verdict, statement, command in rows)
    parts = []
    for name, content in pictures.items():
        statement, findings, _ = results[name]
        listed = "".join(f"<li>{text(f.what)}: {text(shown(f))}: <span class={kind(f.verdict)}>{f.verdict}</span></li>" for f in findings)
        parts.append(f"<h2 id='{name}'>{name}</h2><p>{text(statement)}</p><img alt='{name}' src='data:image/png;base64,{base64.b64encode(content).decode()}'><ul>{listed}</ul>")
    return (f"<!doctype html><html lang=en><meta charset=utf-8><title>The paper's claims, measured</title><style>{STYLE}</style><h1>The paper's claims, measured</h1>"
            f"<p>{text(about)}. Effects are differences with 95 % intervals over test groups and seeds.</p><table><tr><th>claim<th>effect<th>verdict<th>the paper"
            f"<th>command</tr>{body}</table>{''.join(parts)}</html>")
