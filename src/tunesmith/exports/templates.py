"""A prompt format in the words of other programs: Jinja, Ollama's templates, and text for people."""

import json
from collections.abc import Sequence

from tunesmith.base_models.prompts import Piece, PromptFormat, Special


def text(pieces: Sequence[Piece]) -> str:
    """Return pieces as the text that other programs' tokenizers turn into the same tokens."""
    return "".join(piece.token if isinstance(piece, Special) else piece for piece in pieces)


def first_token(form: PromptFormat) -> str | None:
    """Return the token that opens every prompt, which most programs add by themselves; None without one."""
    first = form.start[0] if form.start else None
    return first.token if isinstance(first, Special) else None


def prompt(form: PromptFormat, question: str, system: str | None = None) -> str:
    """Return the text of a prompt, without its first token: what to send to programs that add it."""
    instruction = () if system is None else (*form.before_system, system, *form.after_system)
    return text([*form.start, *instruction, *form.before, question, *form.after]).removeprefix(
        first_token(form) or ""
    )


def jinja(form: PromptFormat) -> str:
    """Return the chat template that transformers, vLLM and llama.cpp apply to messages."""
    turns = {
        "system": (text(form.before_system), text(form.after_system)),
        "user": (text(form.before), text(form.after)),
        "assistant": (form.answer, text([form.end, *form.between])),
    }
    written = {role: " + ".join(_jinja_parts(*around)) for role, around in turns.items()}
    start = f"{{{{ {_quoted(text(form.start))} }}}}" if form.start else ""
    return (
        f"{start}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{{{{ {written['system']} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {written['user']} }}}}"
        f"{{% else %}}{{{{ {written['assistant']} }}}}"
        "{% endif %}{% endfor %}"
    )


def ollama(form: PromptFormat) -> str:
    """Return the template of an Ollama Modelfile, which goes through a conversation's messages."""
    start = text(form.start).removeprefix(first_token(form) or "")
    content = "{{ .Content }}"
    system = text([*form.before_system, content, *form.after_system])
    user = text([*form.before, content, *form.after])
    answer = text([form.answer, content, form.end, *form.between])
    return (
        f'{start}{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{user}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
    )


def _jinja_parts(before: str, after: str) -> list[str]:
    return [*([_quoted(before)] if before else []), "message['content']", *([_quoted(after)] if after else [])]


def _quoted(literal: str) -> str:
    """Return a text as a literal of Jinja's: JSON's escapes are among its own."""
    return json.dumps(literal, ensure_ascii=False)
