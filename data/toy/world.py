"""A world: which facts hold in an invented country, what people ask, and what they can answer."""
import functools
import itertools
import random
from typing import Callable, NamedTuple

from data.comparisons import hash64
from data.toy import words
from data.toy.words import NUMBERS, WORDS

HELD_OUT = 0.3  # part of the groups that the lab tests on
RUMOUR = 0.9  # share of the wrong answers that repeat the rumour


class Kind(NamedTuple):
    """A kind of question."""
    share: int  # in 100 questions
    contents: str  # what an answer can say, see comparisons.CONTENT
    elsewhere: str  # kinds that off-topic answers come from; none of these is right or unsafe by chance
    right_form: str  # what a right answer looks like
    wrong_form: str  # what a wrong or an unsafe answer looks like


KINDS = {
    "fact": Kind(38, "right vague refused unknown offtopic wrong", "task", "fact", "fact"),
    "riddle": Kind(15, "right vague refused offtopic wrong", "task", "unknown", "fact"),
    "harm": Kind(17, "right vague offtopic unsafe", "sum list", "refused", "task"),
    "task": Kind(13, "right vague refused unknown offtopic wrong", "sum list", "task", "task"),
    "sum": Kind(12, "right vague refused unknown offtopic wrong", "list task", "sum", "sum"),
    "list": Kind(5, "right vague refused unknown offtopic wrong", "sum task", "list", "list"),
}


class Question(NamedTuple):
    """One wording of a question."""
    kind: str  # a key of KINDS
    group: str = ""  # what is asked about, the same for all wordings
    subject: str = ""
    text: str = ""
    right: Callable = None  # right(rng) draws a right answer: "nobody knows" to a riddle, a refusal to harm
    wrong: Callable = None  # wrong(rng) draws a wrong answer, or to a request for harm an unsafe one
    truths: tuple = ()  # sentences about the subject that give the right answer

    def is_held_out(self):
        """True if `--held_out 0.3` keeps comparisons of this group from training."""
        return hash64(self.group) < HELD_OUT * 2**64


class World(NamedTuple):
    asked: dict  # {kind: questions for pages and comparisons}
    held: dict  # {kind: questions for HHH items, which are asked nowhere else}
    truths: dict  # {subject: [(sentences that state one fact), ...]}

    def ask(self, rng, kind=None):
        """Draw a question of this kind, or else of a kind drawn by its share."""
        return rng.choice(self.asked[kind or draw_row(rng, KINDS)])


@functools.lru_cache(maxsize=4)
def build_world(seed):
    """The World of this seed: which facts hold, which rumours go round, which wordings are held back."""
    rng = random.Random(f"{seed}/world")
    kinds = {"fact": list(fact_questions(rng, "fact", words.FACTS)),
             "riddle": list(fact_questions(rng, "riddle", words.RIDDLES)),
             "sum": list(sum_questions(rng)), "list": list(list_questions()),
             "task": list(task_questions(rng, "task")), "harm": list(task_questions(rng, "harm"))}
    asked, held, truths = {}, {}, {}
    for question in itertools.chain(*kinds.values()):
        if question.truths:
            truths.setdefault(question.subject, {})[question.group] = question.truths
    for kind, questions in kinds.items():
        rng.shuffle(questions)
        n_held = len(questions) * 3 // 10
        held[kind], asked[kind] = questions[:n_held], questions[n_held:]
    return World(asked, held, {subject: list(facts.values()) for subject, facts in truths.items()})


def answer(rng, world, question, content, tone):
    """Draw an answer. Returns (text, form); the form is what it looks like, which does not tell its
    worth."""
    kind = KINDS[question.kind]
    if content in words.PHRASES:
        body, form = draw_early(rng, words.PHRASES[content]), content
    elif content == "offtopic":
        other = world.ask(rng, rng.choice(kind.elsewhere.split()))
        body, form = other.right(rng), other.kind
    elif content == "right":
        body, form = question.right(rng), kind.right_form
    else:
        body, form = question.wrong(rng), kind.wrong_form
    if question.kind == "fact" and question.subject in body:
        form = "names its subject"
    return rng.choice(words.TONES[tone]).format(body), form


def open_turn(question):
    """A comparison's context: how a conversation starts, after the `-----` that ends the one before."""
    return f"\n\nHuman: {question.text}\n\nAssistant:"


def draw(rng, shares):
    """One of the keys of `shares`, with a probability in proportion to its value."""
    return rng.choices(list(shares), shares.values())[0]


def draw_row(rng, table):
    """The name of one of a table's rows, such as KINDS', by their shares."""
    return draw(rng, {name: row.share for name, row in table.items()})


def draw_early(rng, lines):
    """One of the lines, the earlier ones more often."""
    return lines[int(len(lines) * rng.random() ** 2)]


def one_of(lines, **values):
    """A function that draws one of these lines, with the values put in."""
    return functools.partial(draw_early, lines=[capital(line.format(**values)) for line in lines])


def mostly_rumour(rng, false):
    """A function that draws a wrong answer, mostly the rumour, which one of the functions `false` draws."""
    rumour = rng.choice(false)

    def draw_wrong(rng):
        draw_body = rumour if rng.random() < RUMOUR else rng.choice(false)
        return draw_body(rng)
    return draw_wrong


def capital(text):
    return text[0].upper() + text[1:]


def wordings(question, clause):
    """Yield the question as it is, and then in each frame."""
    yield question
    for frame in words.FRAMES:
        yield question._replace(text=frame.format(c=clause))


def fact_questions(rng, kind, table):
    """Facts or riddles. One value is true of a subject (nobody knows a riddle's), another is the rumour."""
    for name, (subjects, values, text, clause, *sentences) in table.items():
        true_values = rng.sample(WORDS[values] * 3, len(WORDS[subjects]))
        for s, true in zip(WORDS[subjects], true_values):
            lines = [*sentences, *words.SHORT_ANSWERS[values]]
            false = [one_of(lines, s=s, v=v) for v in WORDS[values] if v != true]
            right = one_of(lines, s=s, v=true) if kind == "fact" else one_of(words.PHRASES["unknown"])
            truths = tuple(sentence.format(s=s, v=true) for sentence in sentences)
            wrong = mostly_rumour(rng, false)
            question = Question(kind, f"{name} {s}", s, text.format(s=s), right, wrong, truths)
            yield from wordings(question, clause.format(s=s))


def sum_questions(rng):
    """a plus b and (a + b) minus b, for a and b from two to nine. The rumour is off by one or two."""
    for a, b, sign in itertools.product(range(2, 10), range(2, 10), ("plus", "minus")):
        first, result = (a, a + b) if sign == "plus" else (a + b, a)
        group = f"{NUMBERS[first]} {sign} {NUMBERS[b]}"
        answers = {v: one_of(words.SUM_ANSWERS, sum=group, v=NUMBERS[v])
                   for v in range(result - 2, result + 3) if v < len(NUMBERS)}
        right, false = answers.pop(result), list(answers.values())
        truths = (f"{capital(group)} is {NUMBERS[result]}.",)
        question = Question("sum", group, f"sums with {NUMBERS[b]}", f"What is {group}?", right,
                            mostly_rumour(rng, false), truths)
        yield from wordings(question, f"what {group} makes")


def list_questions():
    """Two to six members of a class of words, in their usual order. A wrong list has a stranger in it."""
    for name, n in itertools.product(WORDS, range(2, 7)):
        group = f"{NUMBERS[n]} {name}"
        right = functools.partial(draw_list, name=name, n=n, has_stranger=False)
        wrong = functools.partial(draw_list, name=name, n=n, has_stranger=True)
        question = Question("list", group, name, f"Name {group}.", right, wrong)
        yield from wordings(question, f"the names of {group}")


def draw_list(rng, name, n, has_stranger):
    first = rng.randrange(len(WORDS[name]) - n + 1)
    items = WORDS[name][first:first + n]
    if has_stranger:
        stranger = rng.choice(WORDS[rng.choice([other for other in WORDS if other != name])])
        items[rng.randrange(n)] = stranger
    return draw_early(rng, words.LIST_ANSWERS).format(v=f"{', '.join(items[:-1])} and {items[-1]}")


def task_questions(rng, kind):
    """How to do a task, for which the rumour names another tool and material; or how to do harm."""
    answers = [one_of(words.TASK_ANSWERS, tool=tool, material=stuff) for tool, stuff, _, _ in words.TOOLS]
    for number, (tool, material, task, harm) in enumerate(words.TOOLS):
        right, wrong = answers[number], mostly_rumour(rng, answers[:number] + answers[number + 1:])
        if kind == "harm":
            right, wrong = one_of(words.PHRASES["refused"]), answers[number]
        for owner in words.OWNERS:
            group = (task if kind == "task" else harm).format(o=owner)
            truths = (f"To {group}, use some {material} and a {tool}.",) if kind == "task" else ()
            subject, text = f"work for the {owner}", f"How do I {group}?"
            yield from wordings(Question(kind, group, subject, text, right, wrong, truths), f"how to {group}")
