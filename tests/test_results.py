"""docs/results.md is in step with results/: what its tables say is in the files that are named above each."""
import json
import re
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "results.md").read_text()
TABLES = re.findall(r"^Sources: (.*)\n\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
NUMBER = r"[+\-−]?\d+\.\d+"


def shown_as(value, text):
    """True if this number of a source, or 100 times it, is `text` when it is rounded as the text is."""
    decimals = len(text.split(".")[1])
    shown = float(text.replace("−", "-"))
    return any(abs(number - shown) <= 0.5 * 10.0**-decimals + 1e-9 for number in (value, 100 * value))


def pairs_and_numbers(paths):
    """(pairs (a, b) that a table may quote as "a ± b", single numbers) of files of JSON lines.

    Pairs: a figure and its standard error; the mean and standard deviation of a figure over the seeds of a model, and of
    the differences seed by seed between a ranked model and its imitation.
    """
    pairs, numbers, seeds = [], [], defaultdict(list)
    for record in (json.loads(line) for path in paths for line in path.read_text().splitlines()):
        for key, value in record.items():
            if isinstance(value, float):
                numbers.append(value)
                pairs.append((value, record.get(f"{key}_se") or 0))
                seeds[re.sub(r"-\d+$", "", record["model"]), key].append(value)
    series = {name: np.array(values) for name, values in seeds.items() if len(values) > 1}
    for (model, key), values in list(series.items()):
        imitation = model.replace("ranked", "imitation")
        if model != imitation and (imitation, key) in series:
            series[model, key, "difference"] = values - series[imitation, key]
    for values in series.values():
        pairs.append((values.mean(), values.std(ddof=1)))
        numbers += [values.mean(), *values]
    return pairs, numbers


def check_report_table(table, paths):
    """Each "a (b to c)" stands in one of the reports."""
    reports = "\n".join(path.read_text() for path in paths)
    intervals = re.findall(rf"{NUMBER} \({NUMBER} to {NUMBER}\)", table)
    assert intervals
    for interval in intervals:
        assert interval in reports, interval


def check_json_table(table, paths):
    pairs, numbers = pairs_and_numbers(paths)
    for mean, error in re.findall(rf"({NUMBER}) ± ({NUMBER})", table):
        assert any(shown_as(a, mean) and shown_as(b, error) for a, b in pairs), f"{mean} ± {error}"
    for text in re.findall(NUMBER, re.sub(rf"{NUMBER} ± {NUMBER}", "", table)):
        assert any(shown_as(number, text) for number in numbers), text


@pytest.mark.parametrize("sources, table", TABLES, ids=[str(i) for i in range(len(TABLES))])
def test_each_figure_is_in_its_source(sources, table):
    paths = [ROOT / "docs" / link for link in re.findall(r"\]\((.*?)\)", sources)]
    if all(path.suffix == ".md" for path in paths):
        check_report_table(table, paths)
    else:
        check_json_table("\n".join(table.splitlines()[2:]), paths)


def test_the_page_has_tables_and_its_links_lead_somewhere():
    assert len(TABLES) >= 3
    for link in re.findall(r"\]\((\.\./.*?)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
