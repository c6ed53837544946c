"""Dialogues in the form that a model made for chat was trained on, by the chat template of its tokenizer.

    \\n\\nHuman: Who are you?\\n\\nAssistant: A lamp.        becomes, for SmolLM2-135M-Instruct,

    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    Who are you?<|im_end|>
    <|im_start|>assistant
    A lamp.

A template writes whole conversations; here contexts, completions and prompts are encoded one by one. So the
template is taken apart once: into what it writes before the first question, between the turns, and at the end.
"""
import re

import jinja2
import jinja2.sandbox

from data.errors import InputError

TURN = re.compile(r"(?P<new>\n\n-----)?(?:\n\n|\A)(?P<role>Human|Assistant):(?P<space> ?)|(?P<last>\n\n-----\Z)")


class ChatFormat:
    """start: written before a conversation's first question. to_assistant: between a question and its answer.
    to_human: between an answer and the next question. end: behind the last answer."""

    def __init__(self, template, tokens):
        """tokens: {"bos_token": …, "eos_token": …}, which a template may name. Raises InputError for a template
        that writes a turn differently depending on others, as it cannot be taken apart."""
        questions, answers = ("the first question", "the second one", "the third one"), ("an answer", "another")
        try:
            write = compiled(template, tokens)
            whole = write(questions[:2], answers[:1])
            self.start, rest = whole.split(questions[0])
            self.to_assistant, rest = rest.split(answers[0])
            self.to_human, _ = rest.split(questions[1])
            self.end = write(questions[:1], answers[:1]).split(answers[0])[1]
            expected = self.start + questions[0]
            for question, answer in zip(questions[1:], answers):
                expected += self.to_assistant + answer + self.to_human + question
            if write(questions, answers) != expected + self.to_assistant:
                raise ValueError("it writes a turn differently depending on others")
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InputError(f"--chat: the tokenizer's chat template cannot be used ({str(error)[:150]})") from None

    def pieces(self, text):
        """[(string, True if it is the template's and not the text's)] for a context, a completion or a prompt.

        A conversation begins at the beginning of a text and after a line `-----`. A text without turns stays as
        it is.
        """
        pieces, done, in_answer = [], 0, False
        for turn in TURN.finditer(text):
            pieces.append((text[done:turn.start()], False))
            done = turn.end()
            if in_answer and (turn["new"] or turn["last"]):
                pieces.append((self.end, True))
            if turn["role"] == "Assistant":
                pieces.append((self.to_assistant, True))
            elif turn["role"] == "Human":
                begins = turn["new"] or turn.start() == 0
                pieces.append((self.start if begins else self.to_human, True))
            in_answer = turn["role"] == "Assistant"
        pieces.append((text[done:], False))
        return [piece for piece in pieces if piece[0]]


def compiled(template, tokens):
    """A function of n questions and of n or n - 1 answers -> the text of the conversation; if the last question
    has no answer, the text goes on to where the answer begins."""
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
        return compiled_template.render(messages=messages, add_generation_prompt=len(answers) < len(questions),
                                        **tokens)
    return write
