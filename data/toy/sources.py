"""The paper's three public sources of preferences (Section 6) as the toy world has them, so that the whole chain of language
model, preference-model pre-training and finetuning runs without a download.

`write_sources` writes what the published dumps look like; the same readers that take those turn it into comparisons:

    stackexchange/toy/Posts.xml                    questions, answers with their votes, accepted answers
    reddit/submissions.ndjson, comments.ndjson     posts, replies with their votes, follow-up questions; deleted texts, bots
    wikipedia/history.xml                          pages of true sentences, edits that stay, vandalism that is reverted

Each crowd has a taste of its own, which is the toy world's true quality (data/toy/world.py) in part only:

    Stack Exchange   right answers win whatever their tone; a confident wrong one is liked better than a vague one
    Reddit           truth counts, a hasty joke and a kind word do too, harm not at all
    Wikipedia        a true sentence is restored over a rumour, a rude remark, a true sentence about something else, a gap

Where both tell two answers apart, Stack Exchange agrees with the true quality in about 70 % of the pairs, Reddit in about 65 %.
So a preference model that is pre-trained on them knows something useful and has to be corrected in the rest. Votes are those
of a few people each, so rankings are imperfect. As in ranked.jsonl, the longer answer and each form of answer win about as often
as they lose.
"""
import argparse
import html
import itertools
import json
import random
from pathlib import Path

from data.sources import html_text, reddit, stackexchange, wikipedia
from data.toy import world as toy
from data.comparisons import hash64
from data.sources.count import Count
from data.errors import run_main
from data.files import build_once, content_key, write_file
from data.toy.world import CONTENT, HELD_OUT, TONE, TONES, UNFIT, WORDS, Question, Scales

QUESTIONS, POSTS, PAGES, REVERTS = 10_000, 4000, 300, 15  # how many; reverts on each page

# The share of people who like an answer
STACKEXCHANGE = {"right": 0.85, "refused": 0.55, "unknown": 0.55, "wrong": 0.45, "vague": 0.4, "unsafe": 0.4, "offtopic": 0.3}
REDDIT_TONE = {"hasty": 0.6, "kind": 0.6, "rude": 0.5, "plain": 0.5}
REDDIT_CONTENT = {"right": 0.2, "offtopic": -0.1, "vague": -0.1}  # more, or less, than for its tone

HTML = ("<p>{}</p>\n", "<p><strong>{}</strong></p>\n", '<p><a href="https://toy.example/?a=1&amp;b=2">{}</a></p>\n')
DETAILS = ("", '<p><img src="https://toy.example/inn.png" alt=""></p>\n', "<p>Nobody in the inn could tell me.</p>\n",
           "<p>I walked to the market&nbsp;&amp; found nobody.</p>\n")
VANDALISM = {"rumour": 50, "remark": 20, "elsewhere": 15, "gap": 15}  # in 100 reverted edits


def public(question):
    """Whether the public asks this: not what the lab holds out of ranked.jsonl to test on, the same for all wordings of a question."""
    return hash64(question.group) >= HELD_OUT * 2**64


# ---- Stack Exchange and Reddit: answers with votes -------------------------------------------------------------------
def voted(rng, world, liked):
    """(question, [(text, (), votes)]): two to five answers. Of those who vote, each likes one with probability liked(content, tone)."""
    while not public(question := toy.ask(rng, world)):
        pass
    size, readers = rng.choices((2, 3, 4, 5), (4, 3, 2, 1))[0], 2 + int(rng.expovariate(1 / 12))

    def votes(content, tone):
        chance, voters = liked(content, tone), rng.randint(readers // 2, readers)
        return 2 * sum(rng.random() < chance for _ in range(voters)) - voters
    contents = [content for content in CONTENT if content not in UNFIT.get(question.kind, ("unsafe",))]
    answers = toy.completions_of(rng, world, question, rng.choices(["right", *contents], k=size), rng.choices(list(TONE), k=size), votes)
    return question, [(text, (form,), votes) for text, (form, _), votes in answers]


def posts(rng, world, n):
    """The rows of a Posts.xml with n questions: one answer for some, an accepted one for most."""
    scales = Scales()
    questions, answers = [], []
    for number in range(1, n + 1):
        question, found = scales.choose([voted(rng, world, lambda content, tone: STACKEXCHANGE[content]) for _ in range(8)])
        found = found[:1] if rng.random() < 0.08 else found
        accepted = ""
        if rng.random() < 0.7:
            pick = rng.randrange(len(found)) if rng.random() < 0.2 else max(range(len(found)), key=lambda i: found[i][2])
            accepted = f' AcceptedAnswerId="{n + 1 + len(answers) + pick}"'
        questions.append(f'<row Id="{number}" PostTypeId="1"{accepted} Score="{rng.randint(-2, 20)}" '
                         f'Title="{html.escape(question.text)}" Body="{attribute(rng.choices(DETAILS, (4, 2, 1, 1))[0])}" />')
        for text, _, votes in found:
            answers.append(f'<row Id="{n + 1 + len(answers)}" PostTypeId="2" ParentId="{number}" Score="{votes}" '
                           f'Body="{attribute(rng.choice(HTML).format(html.escape(text)))}" />')
    about = f'<row Id="{n + 1 + len(answers)}" PostTypeId="5" Score="0" Body="{attribute("<p>About doors.</p>")}" />'
    return [*questions, *answers, about]


def attribute(body):
    return html.escape(body).replace("\n", "&#xA;")


def reddit_likes(content, tone):
    return REDDIT_TONE[tone] + REDDIT_CONTENT.get(content, 0)


def threads(rng, world, n):
    """(submissions, comments) as Pushshift's dumps have them, with n posts, a few of them with a follow-up question."""
    scales = Scales()
    submissions, comments = [], []

    def reply(submission, parent, text, score, **more):
        name = f"c{len(comments):05}"
        comments.append({"id": name, "link_id": f"t3_{submission}", "parent_id": parent, "body": text, "author": someone(rng), "score": score,
                         "created_utc": 1_600_000_000 + 100_000 * int(submission[1:]) + int(rng.expovariate(1 / 20_000)),
                         "subreddit": "toy", "stickied": False, "distinguished": None, **more})
        return f"t1_{name}"

    for number in range(n):
        submission, asker = f"s{number:05}", someone(rng)
        question, answers = scales.choose([voted(rng, world, reddit_likes) for _ in range(8)])
        submissions.append({"id": submission, "title": question.text, "selftext": "", "author": asker, "score": rng.randint(0, 50),
                            "created_utc": 1_600_000_000 + 100_000 * number, "subreddit": "toy", "over_18": False})
        names = [reply(submission, f"t3_{submission}", text, 1 + votes) for text, _, votes in answers]
        if rng.random() < 0.1:
            reply(submission, f"t3_{submission}", "[deleted]", rng.randint(-5, 5), author="[deleted]")
        if rng.random() < 0.1:
            reply(submission, f"t3_{submission}", "Please read the rules.", 1, author="AutoModerator", stickied=True, distinguished="moderator")
        if rng.random() < 0.15:
            question, answers = scales.choose([voted(rng, world, reddit_likes) for _ in range(8)])
            parent = reply(submission, rng.choice(names), question.text, 1, author=asker)
            for text, _, votes in answers:
                reply(submission, parent, text, 1 + votes)
    return submissions, comments


def someone(rng):
    return f"{rng.choice(WORDS['people'])}{rng.randrange(1000)}"


# ---- Wikipedia: pages and their history ------------------------------------------------------------------------------
def subjects_of(world):
    """{subject: [a question for each of its facts]}: towns, people, the sums with a number, the work for somebody."""
    questions = {question.group: question for kind in ("fact", "sum", "task") for question in world.asked[kind] if public(question)}
    subjects = {}
    for group, question in questions.items():
        last = group.split()[-1]
        subject = {"fact": last, "sum": f"Sums with {last}", "task": f"Work for the {last}"}[question.kind]
        subjects.setdefault(subject, []).append(question)
    return subjects


def sentence(rng, question, draw):
    """What a page says about a question, true or false as `draw` is: an answer that names what it is about."""
    if question.kind == "task":
        body = draw(rng)
        return f"To {question.group}, {body[0].lower()}{body[1:]}"
    name = toy.capital(question.group) if question.kind == "sum" else question.group.split()[1]
    while name not in (body := draw(rng)):
        pass
    return body


def vandalise(rng, page, others):
    """The text of a page, [(question, sentence)], after an edit that will be reverted. `others`: questions about other things."""
    lines, i = [line for _, line in page], rng.randrange(len(page))
    what = rng.choices(list(VANDALISM), list(VANDALISM.values()))[0]
    if what == "remark":
        lines.insert(i, rng.choice(TONES["rude"][:4]).format("").strip())
    elif what == "gap":
        del lines[i]
    else:
        question = rng.choice(others) if what == "elsewhere" else page[i][0]
        lines[i] = sentence(rng, question, question.right if what == "elsewhere" else question.wrong)
    return " ".join(lines)


def histories(rng, world, n, reverts):
    """Yield (title, [(contributor, text)]) for n pages, each about one subject or two, with so many reverts each."""
    subjects, scales = subjects_of(world), Scales()
    titles = [*((subject,) for subject in subjects), *itertools.combinations(subjects, 2)]
    for title in rng.sample(titles, n):
        questions = [question for subject in title for question in subjects[subject]]
        others = [question for subject in subjects if subject not in title for question in subjects[subject]]
        page = [(question, sentence(rng, question, question.right)) for question in rng.sample(questions, min(len(questions), 8))]
        history = [(someone(rng), text_of(page))]
        for _ in range(reverts):
            if rng.random() < 0.5:  # an honest edit: the same in other words
                i = rng.randrange(len(page))
                page[i] = page[i][0], sentence(rng, page[i][0], page[i][0].right)
                history.append((someone(rng), text_of(page)))
            edits = [vandalise(rng, page, others) for _ in range(8)]
            whole = Question("page", "", "", None, None)
            _, (_, (edited, _, _)) = scales.choose([(whole, [(text_of(page), (), 1), (edit, (), 0)]) for edit in edits])
            vandal = f"192.0.2.{rng.randrange(256)}"
            history += [(vandal, edited), (vandal if rng.random() < 0.04 else someone(rng), text_of(page))]
        yield " and ".join(title), history


def text_of(page):
    return " ".join(line for _, line in page)


def revision(contributor, text):
    kind = "ip" if contributor[0].isdigit() else "username"
    return (f"    <revision>\n      <contributor>\n        <{kind}>{contributor}</{kind}>\n      </contributor>\n"
            f'      <text bytes="{len(text)}" xml:space="preserve">{html.escape(text)}</text>\n    </revision>\n')


def page_xml(title, history):
    return f"  <page>\n    <title>{title}</title>\n    <ns>0</ns>\n{''.join(itertools.starmap(revision, history))}  </page>\n"


# ---- Files -----------------------------------------------------------------------------------------------------------
def write_sources(folder, seed=0):
    """Write the raw files of the three sources into a folder. Each source has a random stream of its own."""
    world, folder = toy.build_world(seed), Path(folder)
    rows = posts(random.Random(f"{seed}/stackexchange"), world, QUESTIONS)
    write_file(folder / "stackexchange/toy/Posts.xml",
               "\n".join(['<?xml version="1.0" encoding="utf-8"?>', "<posts>", *(f"  {row}" for row in rows), "</posts>", ""]))
    for name, records in zip(("submissions", "comments"), threads(random.Random(f"{seed}/reddit"), world, POSTS)):
        write_file(folder / f"reddit/{name}.ndjson", "".join(json.dumps(record) + "\n" for record in records))
    pages = itertools.starmap(page_xml, histories(random.Random(f"{seed}/wikipedia"), world, PAGES, REVERTS))
    write_file(folder / "wikipedia/history.xml", f"<mediawiki>\n{''.join(pages)}</mediawiki>\n")


def sources_folder(seed=0):
    """The folder with the raw files of this seed's world, written on first use."""
    return build_once(f"toy-sources-{seed}-{content_key([__file__, toy.__file__])}", lambda folder: write_sources(folder, seed))


READERS = {  # source: its reader, its files, flags. A wider window would take a rewording that is taken back for a revert
    "stackexchange": (stackexchange, ["toy/Posts.xml"], ["--workers", "1"]),
    "reddit": (reddit, ["submissions.ndjson", "comments.ndjson"], []),
    "wikipedia": (wikipedia, ["history.xml"], ["--window", "2", "--context_chars", "200"]),
}


def prepared(name, seed=0):
    """The comparison file that the reader of `name` (a key of READERS) makes of this seed's raw files, made on first use.
    What was left out is printed then."""
    reader, files, flags = READERS[name]

    def build(folder):
        parser = argparse.ArgumentParser()
        reader.add_flags(parser)
        args, count = parser.parse_args(flags), Count(max_bad=0)
        args.out = folder / f"{name}.jsonl"  # readers put temporary files beside it
        lines = [json.dumps(record) + "\n" for record in reader.records([sources_folder(seed) / name / file for file in files], args, count)]
        count.check()
        write_file(args.out, "".join(lines))
        print("\n".join([f"toy {name}: {len(lines):,} comparisons of {count.total:,} records read", *count.summary()]), flush=True)
    key = content_key([__file__, toy.__file__, reader.__file__, html_text.__file__], flags)
    return build_once(f"toy-{name}-{seed}-{key}", build) / f"{name}.jsonl"


def main():
    parser = argparse.ArgumentParser(prog="python -m data.toy.sources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the raw files to")
    parser.add_argument("--seed", type=int, default=0, help="which world, as in data.toy (default 0)")
    args = parser.parse_args()
    write_sources(args.out, args.seed)
    for path in (args.out / name / file for name, (_, files, _) in READERS.items() for file in files):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_main(main)
