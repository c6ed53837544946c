"""The lab's report: a table of claims and verdicts, then each claim's figure and findings; as Markdown, and
as one HTML file that holds its pictures."""
import base64
import datetime
import html
import json
import math
import os
import platform
import re
import shlex
from collections import Counter

import torch

from claims.scales import size_label
from data.files import write_file

STYLE = """body{font:16px/1.5 Georgia,serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111}
table{border-collapse:collapse}td{vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid #ccc}
td:nth-child(3){font-weight:bold}code{font-size:85%}img{max-width:100%}h2{margin-top:2.5rem}"""
BY_SEED = "Above: means over seeds, with bars of one standard deviation over seeds to either side."


def write_report(folder, args, results):
    """Write report.md, report.html, results.json and a picture of each claim into the folder; print the
    table.

    results: {claim: (its statement, its Outcome or why it has none)}. args.given: the lab's own flags."""
    outcomes = {name: outcome for name, (_, outcome) in results.items() if not isinstance(outcome, str)}
    for name, outcome in outcomes.items():
        write_file(folder / f"{name}.png", outcome.png)
    sizes = ", ".join(map(size_label, args.sizes))
    about = (f"{datetime.date.today()}, scale {args.scale}, {args.seeds} seeds, sizes {sizes}; "
             f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
             f"Python {platform.python_version()}, torch {torch.__version__}")
    text = markdown(about, args, results, outcomes)
    write_file(folder / "report.md", text)
    write_file(folder / "report.html", web_page(text, outcomes))
    claims = {name: as_json(*result) for name, result in results.items()}
    write_file(folder / "results.json", json.dumps({"about": about, "claims": claims}, indent=1))
    print()
    counts = Counter()
    for name, (_, outcome) in results.items():
        print(summary(name, outcome))
        counts[effect_and_verdict(outcome)[1].split(":")[0]] += 1
    counted = ", ".join(f"{verdict}: {n}" for verdict, n in counts.items())
    print(f"\n{counted}. The report is {folder / 'report.html'}")


def summary(name, outcome):
    """One line on a claim, for the terminal."""
    effect, verdict = effect_and_verdict(outcome)
    return f"{name:<38}{effect:<68}{verdict}"


def effect_and_verdict(outcome):
    """(the first part's effect and how many parts hold, the verdict) of an Outcome, or why there is none."""
    if isinstance(outcome, str):
        return "", f"failed: {outcome}"
    n_hold = sum(part.verdict == "holds" for part in outcome.parts)
    n = len(outcome.parts) + bool(outcome.untested)
    return shown(outcome.parts[0]) + f"; {n_hold} of {n} parts hold" * (n > 1), outcome.verdict


def shown(finding):
    """A Finding's difference with its interval."""
    if math.isinf(finding.low):
        return f"{finding.effect:+.1f} {finding.unit} (no interval)"
    over = "" if finding.over == "groups and seeds" else f", over {finding.over} only"
    return f"{finding.effect:+.1f} ({finding.low:+.1f} to {finding.high:+.1f}) {finding.unit}{over}"


def roles(outcome):
    """(role, Finding) of all Findings of an Outcome."""
    for role in ("parts", "premises", "beside"):
        for finding in getattr(outcome, role):
            yield role.removesuffix("s"), finding


def as_json(statement, outcome):
    if isinstance(outcome, str):
        return {"statement": statement, "verdict": None, "findings": None, "failed": outcome}
    findings = [{"role": role, **vars(finding)} for role, finding in roles(outcome)]
    findings = [{key: None if value in (math.inf, -math.inf) else value for key, value in finding.items()}
                for finding in findings]
    return {"statement": statement, "verdict": outcome.verdict, "findings": findings, "failed": None}


def markdown(about, args, results, outcomes):
    lines = ["# The paper's claims, measured", "", about, "", introduction(outcomes), "",
             "| claim | effect | verdict | the paper | command |", "|---|---|---|---|---|"]
    for name, (statement, outcome) in results.items():
        effect, verdict = effect_and_verdict(outcome)
        command = shlex.join(["python", "lab.py", args.scale, name, *args.given])
        lines.append(f"| {name} | {effect} | *{verdict}* | {statement} | `{command}` |")
    for name, outcome in outcomes.items():
        lines += ["", f"## {name}", "", results[name][0], "", f"![{name}]({name}.png)", "",
                  verdict_line(outcome), "", caption(outcome), ""]
        lines += [f"- {role}: {finding.what}: {shown(finding)}: *{finding.verdict}*"
                  for role, finding in roles(outcome)]
    return "\n".join(lines) + "\n"


def introduction(outcomes):
    """How to read the verdicts, and how many of them chance would make."""
    n = sum(len(outcome.parts) for outcome in outcomes.values())
    return (
        f"{len(outcomes)} verdicts on {n} parts of claims. Effects are differences with 95 % intervals over "
        "test groups and seeds. A claim *holds* if all parts of its sentence hold and *does not hold* if one "
        "of them does not; otherwise, or where a premise is not given or a part is not tested, these runs "
        "*cannot tell*. A 95 % interval misses the truth in one case of twenty: if there were no effects at "
        f"all, about {n / 20:.1f} of the {n} parts would be told from 0 all the same.")


def verdict_line(outcome):
    """The verdict and what it comes from."""
    missing = [premise.what for premise in outcome.premises if premise.verdict != "holds"]
    deciding = [part.what for part in outcome.parts if part.verdict == outcome.verdict != "holds"]
    why = ""
    if missing:
        why = f", as a premise is not given: {'; '.join(missing)}"
    elif deciding and len(outcome.parts) > 1:
        why = f", because of {len(deciding)} of {len(outcome.parts)} parts: {'; '.join(deciding)}"
    untested = f" Not tested: {outcome.untested}." if outcome.untested else ""
    explanation = f" {outcome.explanation}" if outcome.verdict != "holds" else ""
    return f"Verdict: *{outcome.verdict}*{why}.{untested}{explanation}"


def caption(outcome):
    main, within = outcome.parts[0], max(finding.within for _, finding in roles(outcome))
    stripe = f"; a grey stripe, {within:g} to either side, counts as no difference" if within else ""
    return (f"{BY_SEED} Below: differences with 95 % intervals; full points are parts of the claim, hollow "
            f"ones its premises and what stands beside it{stripe}. The first interval is over {main.over}: "
            f"{main.data}.")


def web_page(text, outcomes):
    """The report as a web page with its pictures in it. Its Markdown has no more than what is read here."""
    body = []
    for line in text.splitlines():
        shown_line = re.sub(r"\*([^*]+)\*(?=[\s.;,|]|$)", r"<em>\1</em>", html.escape(line, quote=False))
        shown_line = re.sub(r"`(.+?)`", r"<code>\1</code>", shown_line)
        if line.startswith("!["):
            name = line[2:line.index("]")]
            picture = base64.b64encode(outcomes[name].png).decode()
            body.append(f"<img alt='{name}' src='data:image/png;base64,{picture}'>")
        elif line.startswith("| "):
            body.append(f"<tr><td>{'<td>'.join(shown_line.strip('| ').split(' | '))}</tr>")
        elif line.startswith("#"):
            marks, title = shown_line.split(" ", 1)
            body.append(f"<h{len(marks)}>{title}</h{len(marks)}>")
        elif line and not line.startswith("|-"):
            body.append(f"<li>{shown_line[2:]}" if line.startswith("- ") else f"<p>{shown_line}</p>")
    page = re.sub("(<tr>.*</tr>)", r"<table>\1</table>", "\n".join(body), flags=re.DOTALL)
    return ("<!doctype html><html lang=en><meta charset=utf-8><title>The paper's claims, measured</title>"
            f"<style>{STYLE}</style>{page}</html>")
