"""The paper's three public sources of preferences (Section 4) as the toy world has them, so that the whole
chain of language model, preference-model pre-training and finetuning runs without a download.

`write_sources` writes files of the same form as the published dumps, and the same readers read both:

    stackexchange/toy/Posts.xml                   questions, answers with votes, accepted answers
    reddit/submissions.ndjson, comments.ndjson    posts, replies with votes, follow-up questions
    wikipedia/history.xml                         pages of true sentences, edits that stay, reverted vandalism

Each crowd has a taste of its own, which agrees with the true quality of answers only in part:

    Stack Exchange  right answers win whatever their tone, and clear wrong ones win over vague ones
    Reddit          truth counts, so do a hasty joke and a kind word, and harm does not count at all
    Wikipedia       a true sentence is restored after a rumour, a rude remark, a stray sentence or a deletion

Of the pairs that both tell apart, Stack Exchange agrees with the true quality in about 70 %, Reddit in
about 65 %. So pre-training on them teaches something useful, which finetuning has to correct. Only a few
people vote, so rankings are imperfect. As in ranked.jsonl, length and form of an answer do not tell which
one wins.
"""
import argparse
import html
import itertools
import random
from pathlib import Path

from data.files import build_once, content_key, write_file
from data.sources import buckets, html_text, reddit, stackexchange, wikipedia
from data.sources.count import Count
from data.toy import code_key, write_jsonl
from data.toy.comparisons import TONE, Completion, Scales, draw_completions, draw_size
from data.toy.words import TONES, WORDS
from data.toy.world import KINDS, Question, build_world, capital, draw

QUESTIONS, POSTS, PAGES, REVERTS = 10_000, 4000, 300, 15  # numbers of each; reverts on each page

# ------------------------------------------------------------------------------------------------------------
# Stack Exchange and Reddit: answers with votes

# The share of people who like an answer
STACKEXCHANGE_LIKES = {"right": 0.85, "refused": 0.55, "unknown": 0.55, "wrong": 0.45, "vague": 0.4,
                       "unsafe": 0.4, "offtopic": 0.3}
REDDIT_LIKES_TONE = {"hasty": 0.6, "kind": 0.6, "rude": 0.5, "plain": 0.5}
REDDIT_LIKES_CONTENT = {"right": 0.2, "offtopic": -0.1, "vague": -0.1}  # is added to the share for the tone

HTML = ("<p>{}</p>\n", "<p><strong>{}</strong></p>\n",
        '<p><a href="https://toy.example/?a=1&amp;b=2">{}</a></p>\n')
DETAILS = {  # what stands below a question's title: shares
    "": 4,
    '<p><img src="https://toy.example/inn.png" alt=""></p>\n': 2,
    "<p>Nobody in the inn could tell me.</p>\n": 1,
    "<p>I walked to the market&nbsp;&amp; found nobody.</p>\n": 1}


def stackexchange_likes(content, tone):
    return STACKEXCHANGE_LIKES[content]


def reddit_likes(content, tone):
    return REDDIT_LIKES_TONE[tone] + REDDIT_LIKES_CONTENT.get(content, 0)


def draw_voted(rng, world, likes):
    """(question, two to five Completions scored by votes). Each voter likes an answer with the probability
    likes(content, tone)."""
    question = world.ask(rng)
    while question.is_held_out():  # what the lab tests on is not asked in public
        question = world.ask(rng)
    n, readers = draw_size(rng), 2 + int(rng.expovariate(1 / 12))

    def count_votes(content, tone):
        voters = rng.randint(readers // 2, readers)
        return 2 * sum(rng.random() < likes(content, tone) for _ in range(voters)) - voters

    contents = rng.choices(["right", *KINDS[question.kind].contents.split()], k=n)
    answers = draw_completions(rng, world, question, contents, rng.choices(list(TONE), k=n), count_votes)
    # A tone may win more often than it loses here, as crowds have tastes, so it is no mark.
    return question, [answer._replace(marks=answer.marks[:1]) for answer in answers]


def stackexchange_rows(rng, world, n):
    """The rows of a Posts.xml with n questions. Some have one answer only, most have an accepted one."""
    scales, questions, answers = Scales(), [], []
    for number in range(1, n + 1):
        question, found = scales.choose(draw_voted, rng, world, stackexchange_likes)
        if rng.random() < 0.08:
            found = found[:1]
        accepted = {}
        if rng.random() < 0.7:
            votes = [answer.score for answer in found]
            pick = rng.randrange(len(found)) if rng.random() < 0.2 else votes.index(max(votes))
            accepted = {"AcceptedAnswerId": n + 1 + len(answers) + pick}
        questions.append(xml_row(Id=number, PostTypeId=1, **accepted, Score=rng.randint(-2, 20),
                                 Title=html.escape(question.text), Body=escape_html(draw(rng, DETAILS))))
        for answer in found:
            body = rng.choice(HTML).format(html.escape(answer.text))
            answers.append(xml_row(Id=n + 1 + len(answers), PostTypeId=2, ParentId=number, Score=answer.score,
                                   Body=escape_html(body)))
    about = xml_row(Id=n + 1 + len(answers), PostTypeId=5, Score=0, Body=escape_html("<p>About doors.</p>"))
    return [*questions, *answers, about]


def xml_row(**attributes):
    return "<row " + "".join(f'{name}="{value}" ' for name, value in attributes.items()) + "/>"


def escape_html(body):
    return html.escape(body).replace("\n", "&#xA;")


def reddit_threads(rng, world, n):
    """(posts, comments) as Pushshift's dumps have them: n posts, some of them with a follow-up question."""
    scales, posts, comments = Scales(), [], []

    def reply(parent, text, score, **more):
        """Add a comment to the last post's. Returns its full name."""
        post, name = posts[-1], f"c{len(comments):05}"
        comments.append({
            "id": name, "link_id": f"t3_{post['id']}", "parent_id": parent, "body": text,
            "author": draw_name(rng), "score": score,
            "created_utc": post["created_utc"] + int(rng.expovariate(1 / 20_000)),
            "subreddit": "toy", "stickied": False, "distinguished": None, **more})
        return f"t1_{name}"

    for number in range(n):
        asker = draw_name(rng)
        question, answers = scales.choose(draw_voted, rng, world, reddit_likes)
        posts.append({"id": f"s{number:05}", "title": question.text, "selftext": "", "author": asker,
                      "score": rng.randint(0, 50), "created_utc": 1_600_000_000 + 100_000 * number,
                      "subreddit": "toy", "over_18": False})
        post = f"t3_s{number:05}"
        names = [reply(post, answer.text, 1 + answer.score) for answer in answers]
        if rng.random() < 0.1:
            reply(post, "[deleted]", rng.randint(-5, 5), author="[deleted]")
        if rng.random() < 0.1:
            reply(post, "Please read the rules.", 1, author="AutoModerator", stickied=True,
                  distinguished="moderator")
        if rng.random() < 0.15:
            question, answers = scales.choose(draw_voted, rng, world, reddit_likes)
            follow_up = reply(rng.choice(names), question.text, 1, author=asker)
            for answer in answers:
                reply(follow_up, answer.text, 1 + answer.score)
    return posts, comments


def draw_name(rng):
    return f"{rng.choice(WORDS['people'])}{rng.randrange(1000)}"


# ------------------------------------------------------------------------------------------------------------
# Wikipedia: pages and their history

VANDALISM = {"rumour": 50, "remark": 20, "elsewhere": 15, "gap": 15}  # in 100 reverted edits


def wikipedia_pages(rng, world, n, reverts):
    """Yield (title, [(contributor, text)]) of n pages on one or two subjects, each with so many reverts."""
    subjects, scales = questions_by_subject(world), Scales()
    titles = [*((subject,) for subject in subjects), *itertools.combinations(subjects, 2)]
    for title in rng.sample(titles, n):
        questions = [question for subject in title for question in subjects[subject].values()]
        others = [question for subject in subjects if subject not in title
                  for question in subjects[subject].values()]
        asked = rng.sample(questions, min(len(questions), 8))
        page = [(question, sentence(rng, question)) for question in asked]
        history = [(draw_name(rng), page_text(page))]
        for _ in range(reverts):
            if rng.random() < 0.5:  # an honest edit: the same in other words
                i = rng.randrange(len(page))
                page[i] = page[i][0], sentence(rng, page[i][0])
                history.append((draw_name(rng), page_text(page)))
            _, (_, vandalised) = scales.choose(vandalise, rng, page, others)
            vandal = f"192.0.2.{rng.randrange(256)}"
            history.append((vandal, vandalised.text))
            reverter = vandal if rng.random() < 0.04 else draw_name(rng)
            history.append((reverter, page_text(page)))
        yield " and ".join(title), history


def questions_by_subject(world):
    """{subject: {group: a question}} of towns, people, the sums with a number, and the work for
    somebody."""
    subjects = {}
    for question in (*world.asked["fact"], *world.asked["sum"], *world.asked["task"]):
        if not question.is_held_out():
            subjects.setdefault(capital(question.subject), {})[question.group] = question
    return subjects


def sentence(rng, question, is_false=False):
    """What a page says about a question: an answer that names what it is about."""
    draw_body = question.wrong if is_false else question.right
    if question.kind == "task":
        body = draw_body(rng)
        return f"To {question.group}, {body[0].lower()}{body[1:]}"
    name = capital(question.group) if question.kind == "sum" else question.subject
    body = draw_body(rng)
    while name not in body:
        body = draw_body(rng)
    return body


def vandalise(rng, page, others):
    """A comparison of the page [(question, sentence)] as it is with the page after an edit that will be
    reverted. `others` are questions about other subjects."""
    lines, i = [line for _, line in page], rng.randrange(len(page))
    what = draw(rng, VANDALISM)
    if what == "remark":
        lines.insert(i, rng.choice(TONES["rude"][:4]).format("").strip())
    elif what == "gap":
        del lines[i]
    elif what == "elsewhere":
        lines[i] = sentence(rng, rng.choice(others))
    else:
        lines[i] = sentence(rng, page[i][0], is_false=True)
    return Question("page"), [Completion(page_text(page), (), 1), Completion(" ".join(lines), (), 0)]


def page_text(page):
    return " ".join(line for _, line in page)


def page_xml(title, history):
    revisions = "".join(revision_xml(contributor, text) for contributor, text in history)
    return f"  <page>\n    <title>{title}</title>\n    <ns>0</ns>\n{revisions}  </page>\n"


def revision_xml(contributor, text):
    tag = "ip" if contributor[0].isdigit() else "username"
    return ("    <revision>\n"
            f"      <contributor>\n        <{tag}>{contributor}</{tag}>\n      </contributor>\n"
            f'      <text bytes="{len(text)}" xml:space="preserve">{html.escape(text)}</text>\n'
            "    </revision>\n")


# ------------------------------------------------------------------------------------------------------------
# Files


def write_sources(folder, seed=0):
    """Write the raw files of the three sources. Each source has a random stream of its own."""
    world, folder = build_world(seed), Path(folder)
    rows = stackexchange_rows(random.Random(f"{seed}/stackexchange"), world, QUESTIONS)
    posts = "".join(f"  {row}\n" for row in rows)
    write_file(folder / "stackexchange/toy/Posts.xml",
               f'<?xml version="1.0" encoding="utf-8"?>\n<posts>\n{posts}</posts>\n')
    submissions, comments = reddit_threads(random.Random(f"{seed}/reddit"), world, POSTS)
    write_jsonl(folder / "reddit/submissions.ndjson", submissions)
    write_jsonl(folder / "reddit/comments.ndjson", comments)
    pages = wikipedia_pages(random.Random(f"{seed}/wikipedia"), world, PAGES, REVERTS)
    xml = "".join(page_xml(title, history) for title, history in pages)
    write_file(folder / "wikipedia/history.xml", f"<mediawiki>\n{xml}</mediawiki>\n")


def sources_folder(seed=0):
    """The folder with the raw files of this seed's world, which are written on first use."""
    return build_once(f"toy-sources-{seed}-{code_key()}", lambda folder: write_sources(folder, seed))


READERS = {  # source: its reader, its files, flags
    "stackexchange": (stackexchange, ["toy/Posts.xml"], ["--workers", "1"]),
    "reddit": (reddit, ["submissions.ndjson", "comments.ndjson"], []),
    # With a wider window, a rewording that is taken back would look like a revert.
    "wikipedia": (wikipedia, ["history.xml"], ["--window", "2", "--context_chars", "200"]),
}


def prepared(name, seed=0):
    """The comparison file that the reader of a source (a key of READERS) makes of this seed's raw files. It
    is made on first use, and then what was left out is printed."""
    reader, files, flags = READERS[name]

    def build(folder):
        parser = argparse.ArgumentParser()
        reader.add_flags(parser)
        args, count = parser.parse_args(flags), Count(max_bad=0)
        args.out = folder / f"{name}.jsonl"  # readers put temporary files beside it
        paths = [sources_folder(seed) / name / file for file in files]
        records = list(reader.records(paths, args, count))
        count.check()
        write_jsonl(args.out, records)
        print(f"toy {name}: {len(records):,} comparisons of {count.total:,} records read", *count.summary(),
              sep="\n", flush=True)

    key = code_key(content_key([reader.__file__, buckets.__file__, html_text.__file__]), flags)
    return build_once(f"toy-{name}-{seed}-{key}", build) / f"{name}.jsonl"
