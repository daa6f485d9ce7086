"""OAuth scopes: Google's names, and what each lets a program do, in words for the consent page."""

from collections.abc import Iterable, Mapping

from tunesmith.caller import Caller
from tunesmith.errors import InvalidArgument, PermissionDenied, error_info

AUTH = "https://www.googleapis.com/auth/"
TUNING = f"{AUTH}generative-language.tuning"
TUNING_READONLY = f"{AUTH}generative-language.tuning.readonly"
GENERATIVE_LANGUAGE = f"{AUTH}generative-language"
CLOUD_PLATFORM = f"{AUTH}cloud-platform"
OPENID = "openid"
EMAIL = f"{AUTH}userinfo.email"
IDENTITY = frozenset({OPENID, EMAIL, "email"})
"""Scopes that tell who somebody is and open nothing; gcloud asks for them when it refreshes."""

INSUFFICIENT_SCOPE = "ACCESS_TOKEN_SCOPE_INSUFFICIENT"
"""Google's reason for the refusal."""

_ALL = frozenset({CLOUD_PLATFORM, GENERATIVE_LANGUAGE})
_TUNES = _ALL | {TUNING}
_SEES = _TUNES | {TUNING_READONLY}

# One of the scopes is enough. Who may tune may also try what was tuned.
NEEDED: Mapping[str, frozenset[str]] = {
    "ModelService.GetModel": _SEES,
    "ModelService.ListModels": _SEES,
    "ModelService.GetTunedModel": _SEES,
    "ModelService.ListTunedModels": _SEES,
    "ModelService.CreateTunedModel": _TUNES,
    "ModelService.UpdateTunedModel": _TUNES,
    "ModelService.DeleteTunedModel": _TUNES,
    "PermissionService.GetPermission": _SEES,
    "PermissionService.ListPermissions": _SEES,
    "PermissionService.CreatePermission": _TUNES,
    "PermissionService.UpdatePermission": _TUNES,
    "PermissionService.DeletePermission": _TUNES,
    "PermissionService.TransferOwnership": _TUNES,
    "Operations.GetOperation": _SEES,
    "Operations.ListOperations": _SEES,
    "Operations.WaitOperation": _SEES,
    "Operations.CancelOperation": _TUNES,
    "Operations.DeleteOperation": _TUNES,
    "GenerativeService.GenerateContent": _TUNES,
    "GenerativeService.StreamGenerateContent": _TUNES,
    "GenerativeService.CountTokens": _TUNES,
    "GenerativeService.EmbedContent": _TUNES,
    "GenerativeService.BatchEmbedContents": _TUNES,
    "TextService.GenerateText": _TUNES,
    "TextService.CountTextTokens": _TUNES,
    "TuningService.TuneModel": _TUNES,
    "TuningService.WatchTuning": _SEES,
    "TuningService.GetTuningReport": _SEES,
    "TuningService.PauseTuning": _TUNES,
    "TuningService.ResumeTuning": _TUNES,
    "TuningService.ExportTunedModel": _TUNES,
}
"""The scopes that open each method, by its service and its name."""

WORDS = {
    CLOUD_PLATFORM: "Everything you may do here: tune, share, delete and ask models",
    GENERATIVE_LANGUAGE: "Ask models, and see, tune, share and delete your tuned models",
    TUNING: "See, tune, ask, share and delete your tuned models",
    TUNING_READONLY: "See your tuned models",
    OPENID: "Know which account you use",
    EMAIL: "See your e-mail address",
    "email": "See your e-mail address",
}


def check(method: str, caller: Caller) -> None:
    """Raise PermissionDenied when a caller's credential was not made for a method.

    Args:
        method: The RPC's full name; one that the table lacks is open to no scope.
        caller: Whose credential it is.
    """
    service, _, name = method.rpartition(".")
    needed = NEEDED.get(f"{service.rpartition('.')[2]}.{name}", frozenset())
    if caller.scopes is not None and not caller.scopes & needed:
        raise PermissionDenied(
            "Request had insufficient authentication scopes.",
            [error_info(INSUFFICIENT_SCOPE, method=method)],
        )


def understood(scope: str) -> bool:
    """Whether a client may ask for a scope: ours, or one of Google's that opens nothing here."""
    return scope in WORDS or scope.startswith(AUTH)


def known_scope(name: str) -> str:
    """Return a scope that opens something, given in full or without what Google's have in common.

    Raises:
        InvalidArgument: There is no such scope.
    """
    scope = name.strip()
    full = scope if scope.startswith(AUTH) else AUTH + scope
    opening = [known for known in WORDS if known not in IDENTITY]
    if full not in opening:
        names = ", ".join(known.removeprefix(AUTH) for known in opening)
        raise InvalidArgument(f"{name!r} is not a scope that opens anything; there are: {names}.")
    return full


def in_words(scopes: Iterable[str]) -> list[str]:
    """Return what scopes allow, a line each, without repetitions; what opens nothing here comes last."""
    known = [WORDS[scope] for scope in scopes if scope in WORDS]
    foreign = [scope.removeprefix(AUTH) for scope in scopes if scope not in WORDS]
    return [*dict.fromkeys(known), *(f"{scope}: a scope of Google's that opens nothing here" for scope in foreign)]
