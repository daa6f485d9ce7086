"""The filter of ListTunedModels: words to look for, and whose models."""

import re
from typing import NoReturn

from sqlalchemy import ColumnElement, and_

from tunesmith.caller import Caller
from tunesmith.errors import InvalidArgument
from tunesmith.services import access
from tunesmith.store.tables import TunedModel

_TERM = re.compile(r'"(?P<phrase>[^"]*)"|(?P<word>[^\s"]+)|(?P<open>")')
_OPERATORS = {"owner:me": access.OWNER, "writers:me": access.WRITER, "readers:me": access.READER}
_PUBLIC = "readers:everyone"


def condition(text: str, caller: Caller) -> ColumnElement[bool]:
    """Return the tuned models that a filter selects among those that the caller may read.

    All terms must hold. A word or a "quoted phrase" is looked for in display names and descriptions, in upper or
    lower case. `owner:me`, `writers:me` and `readers:me` select the models for which the caller has that role or a
    stronger one. `readers:everyone` selects the models shared with everyone, which are left out otherwise, unless
    the caller has a role there by name.

    Raises:
        InvalidArgument: A term is neither.
    """
    roles: list[int] = []
    phrases: list[str] = []
    public = False
    for match in _TERM.finditer(text):
        word, phrase = match["word"], match["phrase"]
        if word in _OPERATORS:
            roles.append(_OPERATORS[word])
        elif word == _PUBLIC:
            public = True
        elif match["open"]:
            _refuse("has a quotation mark without a second one")
        elif word and re.match(r"[A-Za-z_]+:", word):
            known = ", ".join([*_OPERATORS, _PUBLIC])
            _refuse(f'has the operator {word}, which is none of {known}; to look for it as text, write "{word}"')
        elif phrase or word:
            phrases.append((phrase or word).casefold())
    found = [TunedModel.search_text.contains(phrase, autoescape=True) for phrase in phrases]
    if roles or not public:
        found.append(access.has_by_name(caller, min(roles, default=access.READER)))
    if public:
        found.append(access.is_public())
    return and_(*found)


def _refuse(reason: str) -> NoReturn:
    raise InvalidArgument.at([("ListTunedModelsRequest.filter", reason)])
