"""Preparing published files: the form of each small source, broken records, output that is complete or
absent, and downloads."""
import gzip
import http.server
import json
import lzma
import os
import threading
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
from conftest import DATA, Running, run, run_well, write_jsonl

from data.comparisons import load_comparisons, parse
from data.errors import InputError
from data.files import read_records
from data.prepare import SOURCES, fetch
from data.sources import ethics, published
from data.sources.count import Count
from data.tokenizer import get_tokenizer

SCRIPT = "data/prepare.py"
READERS = {"ethics": ethics.records, "utilitarianism": ethics.utilitarianism, "hh": published.hh,
           "pairs": published.pairs, "summarize": published.summarize, "hellaswag": published.hellaswag}


def read(source, path, max_bad=1.0, **flags):
    """(records, Count) of one of the small sources, in this process."""
    count = Count(max_bad)
    return list(READERS[source]([path], Namespace(**{"split": None, **flags}), count)), count


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------------------------------------------------
# The form of each source


def test_hh(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    path = write_jsonl(tmp_path / "a.jsonl", [{"chosen": start + " yes", "rejected": start + " no"},
                                              {"chosen": "same", "rejected": "same"}])
    records, count = read("hh", path)
    assert records == [{"context": start, "completions": [" yes", " no"], "scores": [1, 0], "group": start}]
    assert count.dropped == {"pairs of two equal texts": 1} and count.total == 2


def test_pairs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"prompt": "P", "chosen": "a", "rejected": "b", "model": "x"},
        {"prompt": "P", "chosen": "a", "rejected": "c", "group": 7}, {"chosen": "a", "rejected": "b"}])
    records, count = read("pairs", path)
    assert records[0] == {"context": "P", "completions": ["a", "b"], "scores": [1, 0], "group": "P"}
    assert records[1]["group"] == "7" and count.places == [f'{path}:3: no text "prompt"']


def test_pairs_of_equal_published_scores_prefer_neither(tmp_path):
    """As in ultrafeedback_binarized, whose order of two equal ones is arbitrary."""
    record = {"prompt": "a", "chosen": " b", "rejected": " c"}
    lines = [{**record, "score_chosen": 7.0, "score_rejected": score} for score in (7.0, 5.0)]
    path = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, lines)))
    found, count = read("pairs", path)
    assert len(found) == 1 and count.dropped == {"pairs whose published scores prefer neither": 1}


def test_an_empty_list_is_a_broken_record_and_a_mark_of_the_byte_order_none(tmp_path):
    empty, good = '{"prompt": "x", "chosen": [], "rejected": []}', '{"prompt": "x", "chosen": " y", "rejected": " z"}'
    found, count = read("pairs", write(tmp_path / "pairs.jsonl", f"\ufeff{good}\n{empty}\n"))
    assert len(found) == 1 and count.n_bad == 1 and "a list that is too short" in count.places[0]


def message(role, content):
    return {"role": role, "content": content}


ASKED = [message("user", "Hi."), message("assistant", "Hello."), message("user", "And?")]


@pytest.mark.parametrize("record", [
    {"chosen": [*ASKED, message("assistant", "So.")], "rejected": [*ASKED, message("assistant", "No.")]},
    {"prompt": "Hi.", "chosen": [*ASKED, message("assistant", "So.")],
     "rejected": [*ASKED, message("assistant", "No.")]},
    {"prompt": ASKED, "chosen": [message("assistant", "So.")], "rejected": [message("assistant", "No.")]}])
def test_chat_messages_become_dialogues(tmp_path, record):
    records, _ = read("pairs", write_jsonl(tmp_path / "chat.jsonl", [record]))
    assert records == [{"context": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:",
                        "completions": [" So.", " No."], "scores": [1, 0],
                        "group": "\n\nHuman: Hi.\n\nAssistant:"}]


def test_a_single_prompt_and_the_systems_words_in_chat_messages(tmp_path):
    answers = {"chosen": [message("assistant", "So.")], "rejected": [message("assistant", "No.")]}
    before = [message("system", "Be brief."), message("user", "Hi.")]
    told = {key: [*before, *value] for key, value in answers.items()}
    records, count = read("pairs", write_jsonl(tmp_path / "chat.jsonl", [
        {"prompt": "Hi.", **answers}, told, {**told, "chosen": [message("tool", "4")]}]))
    assert [record["context"] for record in records] == [
        "\n\nHuman: Hi.\n\nAssistant:", "Be brief.\n\nHuman: Hi.\n\nAssistant:"]
    assert count.n_bad == 1 and "a message of 'tool'" in count.places[0]


def test_summarize(tmp_path):
    two = [{"text": "short "}, {"text": "long"}]
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"info": {"id": "1", "article": "News."}, "summaries": two, "choice": 1},
        {"info": {"id": "2", "post": "Post.", "title": "T", "article": None}, "summaries": two, "choice": 0},
        {"info": {"id": "3", "article": "News."}, "summaries": two[::-1], "choice": 0},
        {"info": {"article": "News."}, "summaries": [two[0], two[0]], "choice": 0}])
    records, count = read("summarize", path)
    assert [(r["context"], r["completions"], r["scores"]) for r in records] == [
        ("News.\n\nTL;DR:", [" short", " long"], [0, 1]),
        ("T\n\nPost.\n\nTL;DR:", [" short", " long"], [1, 0]),
        ("News.\n\nTL;DR:", [" long", " short"], [1, 0])]
    assert records[0]["group"] == records[2]["group"] != records[1]["group"]
    assert count.dropped.total() == 1


def test_the_published_splits_of_summaries_do_not_mix(tmp_path):
    record = {"info": {"article": "News."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    path = write_jsonl(tmp_path / "batch3.json", [{**record, "split": split} for split in ("train", "valid1")])
    with pytest.raises(InputError, match="holds the splits train, valid1; choose one of them by --split"):
        read("summarize", path)
    records, count = read("summarize", path, split="train")
    assert len(records) == 1 and count.dropped == {"records of other splits than train": 1}


def test_hellaswag(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [
        {"activity_label": "Cooking", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": 2}])
    assert read("hellaswag", path)[0] == [{"context": "He", "completions": [" a", " b", " c", " d"],
                                           "scores": [0, 0, 1, 0], "group": "Cooking"}]


ETHICS = {  # set: (file, contexts, scores of the first completion, groups as numbers)
    "commonsense": (
        "label,input,is_short,edited\n0,I fed the old cat at home.,True,False\n"
        '1,I hit the old cat at home.,True,False\n1,"A long\nstory, ""so"".",False,False\n',
        ["I fed the old cat at home.", "I hit the old cat at home.", 'A long\nstory, "so".'],
        [0, 1, 1], [0, 0, 1]),
    "deontology": (
        "label,scenario,excuse\n1,Do it?,No because I did.\n0,Do it?,No because no.\n"
        "1,I am a cook,So I cook.\n0,Do it?, But no.\n",
        ["Do it? No because I did.", "Do it? No because no.", "I am a cook So I cook.", "Do it? But no."],
        [1, 0, 1, 0], [0, 0, 1, 0]),
    "justice": (
        "label,scenario\n1,I deserve pay from my boss because I work.\n"
        "0,I deserve a car from my boss because I work.\n1,We used to talk but he left.\n",
        ["I deserve pay from my boss because I work.", "I deserve a car from my boss because I work.",
         "We used to talk but he left."],
        [1, 0, 1], [0, 0, 1]),
    "virtue": (
        "label,scenario\n1,She ran. [SEP] brave\n0,She ran. [SEP] calm\n0,He sat. [SEP] calm\n",
        ["She ran.", "She ran.", "He sat."], [1, 0, 0], [0, 0, 1])}


@pytest.mark.parametrize("name", ETHICS)
def test_binary_ethics_sets_are_cast_as_their_two_labels(tmp_path, name):
    text, contexts, scores, groups = ETHICS[name]
    records, count = read("ethics", write(tmp_path / "a.csv", "\ufeff" + text), set=name)
    assert all(r["completions"] == [" Yes", " No"] and sum(r["scores"]) == 1 for r in records)
    assert [r["context"].rpartition("\n\n")[0] for r in records] == contexts and not count.n_bad
    assert [r["scores"][0] for r in records] == scores
    names = list(dict.fromkeys(r["group"] for r in records))
    assert [names.index(r["group"]) for r in records] == groups
    assert all(r["context"].endswith("?") for r in records)
    assert name != "virtue" or records[0]["context"].endswith(" brave?")


def test_utilitarianism_groups_hang_together_by_shared_scenarios(tmp_path):
    path = write(tmp_path / "a.csv", 'good , ok\nok,"bad, very"\nx,y\n')
    records, _ = read("utilitarianism", path)
    assert records == read("ethics", path, set="utilitarianism")[0]
    assert records[1]["completions"] == ["ok", "bad, very"]
    assert records[0]["group"] == records[1]["group"] != records[2]["group"]


HELLASWAG = '{"ctx": "a", "label": 2, "activity_label": "x"'
HEADER = "label,scenario\n1,a b\n"
JUSTICE, VIRTUE = {"set": "justice"}, {"set": "virtue"}
BROKEN = {  # source, flags, file, line of the broken record, words of the answer
    "no JSON": ("hh", {}, '{"chosen": "a"', 1, "not a JSON object"),
    "no text": ("hh", {}, '{"chosen": "a", "rejected": 5}', 1, 'no text "rejected"'),
    "no list": ("summarize", {}, '\n{"info": {"post": "x"}, "summaries": 5, "choice": 0}', 2, "wrong type"),
    "info a list": ("summarize", {}, '{"info": [], "summaries": [], "choice": 0}', 1, "wrong type"),
    "no summaries": ("summarize", {}, '{"info": {"post": "x"}, "summaries": [], "choice": 0}', 1,
                     "not a comparison of two summaries"),
    "choice beyond": ("summarize", {}, '{"info": {"post": "x"}, "summaries": [{"text": "a"}, {"text": "b"}], '
                                       '"choice": 2}', 1, "choice 2"),
    "no endings": ("hellaswag", {}, HELLASWAG + "}", 1, "no 'endings'"),
    "endings a text": ("hellaswag", {}, HELLASWAG + ', "endings": "abc"}', 1, "not a HellaSwag record"),
    "label beyond": ("hellaswag", {}, HELLASWAG + ', "endings": ["a", "b"]}', 1, "label 2"),
    "an ending no text": ("hellaswag", {}, HELLASWAG + ', "endings": ["a", 1, "c"]}', 1, "wrong type"),
    "label a word": ("ethics", JUSTICE, HEADER + '0,"a\nb"\nyes,c\n', 5, "with a label 0 or 1"),
    "a column missing": ("ethics", JUSTICE, HEADER + "1\n", 3, "found 1 columns"),
    "nothing said": ("ethics", JUSTICE, HEADER + "1, \n", 3, "expected label, scenario"),
    "no trait": ("ethics", VIRTUE, "label,scenario\n1,She ran.\n", 2, "[SEP]"),
    "not UTF-8": ("ethics", JUSTICE, HEADER.encode() + b"1,caf\xe9\n", 3, "not UTF-8"),
    "three columns": ("utilitarianism", {}, "a,b\na,b,c\n", 2, "expected two scenarios, found 3 columns"),
}


@pytest.mark.parametrize("source, flags, text, line, words", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_counted_with_its_place(tmp_path, source, flags, text, line, words):
    path = write(tmp_path / "a.txt", text)
    _, count = read(source, path, **flags)
    assert count.n_bad == 1 and count.places[0].startswith(f"{path}:{line}: ") and words in count.places[0]
    with pytest.raises(InputError, match="broken"):
        read(source, path, max_bad=0.1, **flags)[1].check()


@pytest.mark.parametrize("text, words", [
    ("label,input\n1,a\n", "no columns label, scenario"), ("", "no columns"),
    ('label,scenario\n1,"' + "x" * 200000, "not a csv file")])
def test_the_wrong_csv_file_is_refused(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read("ethics", write(tmp_path / "a.csv", text), set="justice")


# ---------------------------------------------------------------------------------------------------------
# The share of broken records


def test_broken_records_end_the_reading_once_their_share_is_certain_and_too_large():
    count = Count(max_bad=0.01)
    for i in range(1000):
        count.total += 1
        if i % 100 == 7:
            count.bad(f"f:{i}", "odd")  # 1 % are accepted
    count.check()
    count.total += 1
    message = (r"f:7: odd \(11 of 1,001 records are broken, 1\.10%, also f:107: odd; f:207: odd\).*"
               "--max_bad 0.011")
    with pytest.raises(InputError, match=message):
        count.bad("f:1001", "odd")
    assert len(count.places) == 5


def test_a_few_broken_records_are_told_and_too_many_leave_no_file(tmp_path):
    lines = [json.dumps({"chosen": f"a{i}", "rejected": "b"}) for i in range(99)]
    path, out = write(tmp_path / "a.jsonl", "\n".join([*lines, "{broken"])), tmp_path / "out.jsonl"
    done = run(SCRIPT, "hh", "--raw", path, "--out", out)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"prepare.py: error: {path}:100: not a JSON object")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    printed = run_well(SCRIPT, "hh", "--raw", path, "--out", out, "--max_bad", 0.01)
    assert f"{out}: 99 comparisons of 100 records read" in printed and f"{path}:100" in printed
    assert len(out.read_text().splitlines()) == 99


# ---------------------------------------------------------------------------------------------------------
# Flags and output


PAIR = {"prompt": "P", "chosen": "é\ud800", "rejected": "b"}
REFUSED = {  # flags, and words of the answer
    "no file": ("pairs --raw nowhere.jsonl", "nowhere.jsonl: no such file"),
    "empty": ("pairs --raw {empty}", "nothing came out of 0 records"),
    "nothing kept": ("pairs --raw {equal}", "left out: 1 pairs of two equal texts"),
    "mixed splits": ("pairs --raw {good} {test}", "a test split must not be mixed"),
    "out is raw": ("pairs --raw {good} --out {good}", "--out is one of the files that are read"),
    "a prompt in HH": ("hh --raw {good}", 'it has a "prompt", unlike HH-RLHF; data.prepare pairs reads such'),
    "a folder": ("pairs --raw {folder}", "this is a folder"),
    "not of Reddit": ("reddit --raw {good}", "good.jsonl:1: neither a submission"),
    "not of Wikipedia": ("wikipedia --raw {good}", "no <page> on a line"),
    "bz2": ("pairs --raw {good} --out {good}.bz2", "--out ends in"),
    "share": ("pairs --raw {good} --max_bad 2", "--max_bad 2.0"),
    "no set": ("ethics --raw {good}", "--set"),
    "set elsewhere": ("pairs --raw {good} --set justice", "unrecognized arguments"),
    "name last": ("--raw {good} pairs", "the name of the data set comes first"),
    "unknown name": ("nothing --raw {good}", "choose from hh, summarize"),
    "whole archive": ("ethics --set justice --raw {tar}", "unpack it"),
    "not known": ("pairs --raw nowhere.jsonl --download", "--download knows no such file of pairs"),
}


@pytest.mark.parametrize("flags, words", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(tmp_path, flags, words):
    files = {"folder": tmp_path, "good": write_jsonl(tmp_path / "good.jsonl", [PAIR]),
             "tar": write(tmp_path / "ethics.tar", "x"),
             "test": write_jsonl(tmp_path / "x_test.jsonl", [PAIR]), "empty": write(tmp_path / "e", ""),
             "equal": write_jsonl(tmp_path / "equal.jsonl", [{**PAIR, "rejected": PAIR["chosen"]}])}
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    out = [] if "--out" in flags else ["--out", tmp_path / "out.jsonl"]
    done = run(SCRIPT, *flags.format(**files).split(), *out)
    assert done.returncode == 2 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}


@pytest.mark.parametrize("ending", ["", ".gz", ".xz", ".zst"])
def test_output_is_compressed_by_its_ending_and_equal_each_time(tmp_path, ending):
    raw = write_jsonl(tmp_path / "raw.jsonl", [PAIR, {**PAIR, "chosen": "has <eot>"}])
    outs = [tmp_path / f"{i}.jsonl{ending}" for i in range(2)]
    for out in outs:
        printed = run_well(SCRIPT, "pairs", "--raw", raw, "--out", out)
        assert "left out: 1 records that hold <eot> or <eoc>" in printed
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert [r for _, r in read_records(outs[0])] == [
        {"context": "P", "completions": ["é\ufffd", "b"], "scores": [1, 0], "group": "P"}]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_changed_byte_of_the_output_is_noticed(tmp_path, ending):
    raw, out = write_jsonl(tmp_path / "raw.jsonl", [PAIR]), tmp_path / f"out.jsonl{ending}"
    run_well(SCRIPT, "pairs", "--raw", raw, "--out", out)
    content = out.read_bytes()
    for place in range(14, len(content)):  # the headers have names and times that do not matter
        out.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(InputError):
            list(read_records(out))


def test_a_killed_run_leaves_no_output(tmp_path):
    raw, out = write_jsonl(tmp_path / "raw.jsonl", [PAIR] * 100000), tmp_path / "out.jsonl"
    running = Running(SCRIPT, "pairs", "--raw", raw, "--out", out)
    running.wait_for("reading")
    while running.process.is_alive() and not Path(f"{out}.partial").exists():
        pass
    running.process.kill()
    running.process.join()
    assert not out.exists()
    run_well(SCRIPT, "pairs", "--raw", raw, "--out", out)
    assert not Path(f"{out}.partial").exists() and len(out.read_text().splitlines()) == 100000


# ---------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine

CONTENT = b"".join(json.dumps({"chosen": f"a{i}", "rejected": "b"}).encode() + b"\n" for i in range(2000))


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cut = None  # bytes after which the next connection is cut
    knows_ranges = True
    asked = []  # the Range of each request, or None

    def do_GET(self):
        cls, start, asked = type(self), 0, self.headers.get("Range")
        cls.asked.append(asked)
        if self.path != "/file.jsonl":
            self.send_error(404)
            return
        if asked and cls.knows_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            start = len(CONTENT)
        elif start:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:cls.cut])
        cls.cut, self.close_connection = None, True

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.cut, Server.knows_ranges, Server.asked = None, True, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_cut_download_goes_on_where_it_was(tmp_path, server, knows_ranges):
    Server.cut, Server.knows_ranges, path = 30000, knows_ranges, tmp_path / "file.jsonl"
    with pytest.raises(InputError, match="cut after 30,000 of [0-9,]+ bytes; the same command goes on"):
        fetch(f"{server}/file.jsonl", path)
    assert [p.name for p in tmp_path.iterdir()] == ["file.jsonl.part"]
    fetch(f"{server}/file.jsonl", path)
    assert path.read_bytes() == CONTENT and Server.asked == [None, "bytes=30000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["file.jsonl"]


def test_a_download_that_was_complete_but_not_renamed_is_taken(tmp_path, server):
    write(tmp_path / "file.jsonl.part", CONTENT)
    fetch(f"{server}/file.jsonl", tmp_path / "file.jsonl")
    assert (tmp_path / "file.jsonl").read_bytes() == CONTENT


def test_a_file_of_another_size_is_refused_and_removed(tmp_path, server):
    write(tmp_path / "file.jsonl.part", CONTENT + b"more")
    with pytest.raises(InputError, match="not the file expected"):
        fetch(f"{server}/file.jsonl", tmp_path / "file.jsonl")
    assert not list(tmp_path.iterdir())


def test_without_a_connection_the_address_and_raw_are_named(tmp_path, server):
    for url, words in ((f"{server}/other", "404"), ("http://127.0.0.1:9/file.jsonl", "refused")):
        with pytest.raises(InputError, match=f"{url}.*{words}.*--raw"):
            fetch(url, tmp_path / "file.jsonl")
    assert not list(tmp_path.iterdir())


def small_addresses():
    published.URLS["hh"] = {"part/file.jsonl": os.environ["TEST_URL"]}


def test_the_script_downloads_once_then_reads(tmp_path, server):
    raw, out = tmp_path / "part" / "file.jsonl", tmp_path / "out.jsonl"
    for _ in range(2):
        run_well(SCRIPT, "hh", "--raw", raw, "--download", "--out", out, before=small_addresses,
                 TEST_URL=f"{server}/file.jsonl")
    assert len(Server.asked) == 1 and len(out.read_text().splitlines()) == 2000


def test_every_source_can_be_loaded():
    for name in SOURCES:
        done = run(SCRIPT, name, "--help")
        assert done.returncode == 0 and "--max_bad" in done.stdout, done


# ---------------------------------------------------------------------------------------------------------
# The published files


def raw_lines(path):
    opens = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    return opens(path, "rt", encoding="utf-8")


FILES = {  # file: (flags, comparisons, groups, share of comparisons whose first completion is the better one)
    "hh-rlhf/harmless-base/test.jsonl.gz": ("hh", 1954, None, 1),
    "ukp-convarg/pairs.jsonl.xz": ("pairs", 10186, None, 1),
    "summarize-from-feedback/newsroom_comparisons.jsonl.xz": ("summarize", 1014, None, None),
    "hellaswag/hellaswag_val.jsonl.xz": ("hellaswag", 8829, None, None),
    "ethics/commonsense/cm_test.csv": ("ethics --set commonsense", 3885, 2974, 0.4674),
    "ethics/deontology/deontology_test.csv": ("ethics --set deontology", 3596, 899, 0.4967),
    "ethics/justice/justice_test.csv": ("ethics --set justice", 2704, 738, 0.5007),
    "ethics/virtue/virtue_test.csv": ("ethics --set virtue", 4975, 995, 0.2),
    "ethics/utilitarianism/util_test.csv": ("utilitarianism", 4808, 1108, 1),
}


@pytest.mark.skipif(not DATA.exists(), reason="no published files here")
@pytest.mark.parametrize("name", FILES)
def test_published_files(tmp_path, name):
    flags, n, n_groups, first = FILES[name]
    path, out = DATA / name, tmp_path / "out.jsonl"
    printed = run_well(SCRIPT, *flags.split(), "--raw", path, "--out", out)
    assert f"{n:,} comparisons of {n:,} records read" in printed
    assert "broken" not in printed and "left out" not in printed
    records = [record for _, record in read_records(out)]
    assert n_groups is None or len({r["group"] for r in records}) == n_groups
    share = sum(r["scores"][0] == 1 for r in records) / len(records)
    assert first is None or share == pytest.approx(first, abs=1e-4)
    if flags == "hh":  # the same as when the file is read directly
        assert [parse(json.loads(line), "")[:3] for line in raw_lines(path)] == [
            (r["context"], r["completions"], r["scores"]) for r in records]
    if flags.endswith("justice"):  # blocks of four near-copies are groups of four
        sizes = Counter(Counter(r["group"] for r in records).values())
        assert sizes[4] > 600
    if n < 4000:
        data = load_comparisons([out], get_tokenizer("bytes"), quiet=True)
        assert len(data) == n and data.differ().all()
