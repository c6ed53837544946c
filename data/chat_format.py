"""Dialogues in the form that a model made for chat was trained on, by the chat template of its tokenizer.

    \\n\\nHuman: Who are you?\\n\\nAssistant:        becomes, for SmolLM2-135M-Instruct,

    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    Who are you?<|im_end|>
    <|im_start|>assistant

A template writes whole conversations, but here contexts, completions and prompts are encoded one by one. So
the template is taken apart once: into what it writes before the first question, between turns, and at the
end.
"""
import json
import re

import jinja2
import jinja2.sandbox

from data.errors import InputError

# A turn's beginning, or the line behind a prompt's last conversation.
MARK = re.compile(r"(?P<line>\n\n-----)?(?:\n\n|\A)(?P<role>Human|Assistant): ?|(?P<last_line>\n\n-----\Z)")


class ChatFormat:
    """start: what stands before a conversation's first question. to_assistant: between a question and its
    answer. to_human: between an answer and the next question. end: behind the last answer."""

    def __init__(self, template, tokens):
        """tokens: {"bos_token": …, "eos_token": …}, which a template may use. Raises InputError for a
        template that cannot be taken apart, as it writes a turn differently depending on others."""
        questions, answers = ("the first question", "the second one", "the third one"), ("an answer", "more")
        try:
            write = compiled(template, tokens)
            self.start, rest = write(questions[:2], answers[:1]).split(questions[0])
            self.to_assistant, rest = rest.split(answers[0])
            self.to_human = rest.split(questions[1])[0]
            self.end = write(questions[:1], answers[:1]).split(answers[0])[1]
            expected = self.start + questions[0]
            for answer, question in zip(answers, questions[1:]):
                expected += self.to_assistant + answer + self.to_human + question
            # Some templates write a space before an answer that is there, and none where one is to be written.
            if write(questions, answers) not in (expected + self.to_assistant,
                                                 expected + self.to_assistant.removesuffix(" ")):
                raise ValueError("it writes a turn differently depending on others")
        except Exception as error:  # a template is a program, which can raise anything
            why = str(error)[:150] or type(error).__name__
            raise InputError(f"--chat: the model's chat template cannot be used ({why})") from None

    def pieces(self, text):
        """A context, a completion or a prompt as [(string, True if the template writes it)].

        A conversation begins at the beginning of a text and after a line `-----`. A text without turns stays
        as it is.
        """
        pieces, done, after_answer = [], 0, False
        for mark in MARK.finditer(text):
            pieces.append((text[done:mark.start()], False))
            done = mark.end()
            if after_answer and (mark["line"] or mark["last_line"]):
                pieces.append((self.end, True))
            if mark["role"] == "Assistant":
                pieces.append((self.to_assistant, True))
            elif mark["role"] == "Human":
                begins = mark["line"] or mark.start() == 0
                pieces.append((self.start if begins else self.to_human, True))
            after_answer = mark["role"] == "Assistant"
        pieces.append((text[done:], False))
        return with_spaces_moved([piece for piece in pieces if piece[0]])

    def space_before_answer(self):
        """The space behind "Assistant:" that is not encoded with an answer: none where the template writes a
        space before answers, which is then the answer's own."""
        return "" if self.to_assistant.endswith(" ") else " "


def with_spaces_moved(pieces):
    """The same pieces, where a space at the end of what the template writes goes to the text behind it, as
    words have tokens that begin with their space. Behind a context's end that text is the completion."""
    moved, space = [], ""
    for string, is_template in pieces:
        string, space = space + string, ""
        if is_template and string.endswith(" "):
            string, space = string[:-1], " "
        moved.append((string, is_template))
    return moved


def compiled(template, tokens):
    """A function of questions and answers -> the text of their conversation. If the last question has no
    answer, the text goes on up to where it would begin."""
    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = refuse
    compiled_template = environment.from_string(template)

    def write(questions, answers):
        messages = []
        for i, question in enumerate(questions):
            messages.append({"role": "user", "content": question})
            if i < len(answers):
                messages.append({"role": "assistant", "content": answers[i]})
        is_open = len(answers) < len(questions)
        return compiled_template.render(
            messages=messages, add_generation_prompt=is_open, tools=None, documents=None, **tokens)
    return write


# Dialogues as they stand, as a chat template.
PLAIN = ('{% for message in messages %}'
         '{{ "\\n\\n" + {"user": "Human", "assistant": "Assistant"}[message.role] + ": "'
         ' + message.content }}{% endfor %}')


def reward_template(template, end, eoc):
    """A chat template by which other programs write a dialogue as a preference model was trained on it.

    template: the model's own (--chat), which writes `end` behind the last answer; or PLAIN, with "", for
    dialogues as they stand. eoc: what stands in that place in training, <eoc> or nothing.
    """
    # In training a template knows no date (strftime_now), as that would differ from day to day.
    settings = "{% set add_generation_prompt = false %}{% set strftime_now = unknown %}"
    end, eoc = (json.dumps(text, ensure_ascii=False) for text in (end, eoc))
    return (settings + "{% set dialogue %}\n" + template.removesuffix("\n")
            + "{%+ endset %}{{ dialogue.removesuffix(" + end + ") + " + eoc + " }}")
