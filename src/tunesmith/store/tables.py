"""The tables. A row holds the official message; columns exist only for what is queried."""

from typing import ClassVar

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, LargeBinary, UniqueConstraint, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates

from tunesmith import protos

RELEASED = 0.0
"""When a job's lease ends of which is known that nobody holds it."""


class Table(DeclarativeBase):
    """Base of all tables; times are seconds since the epoch, UTC."""

    type_annotation_map: ClassVar = {bytes: LargeBinary}


class Account(Table):
    """A person or a program that may call the API."""

    __tablename__ = "accounts"

    email: Mapped[str] = mapped_column(primary_key=True)
    password_hash: Mapped[str | None]
    disabled: Mapped[bool] = mapped_column(default=False)
    create_time: Mapped[float]
    service: Mapped[bool] = mapped_column(default=False, server_default=false())
    """A program's: it signs in with keys, never with a password."""
    served_time: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """When a worker last began one of its jobs; 0 before the first."""


class AccessToken(Table):
    """A bearer token; only its hash is kept."""

    __tablename__ = "access_tokens"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"))
    scopes: Mapped[str]
    create_time: Mapped[float]
    expire_time: Mapped[float] = mapped_column(index=True)
    authorization: Mapped[str | None] = mapped_column(
        ForeignKey("authorizations.id", ondelete="CASCADE"), index=True
    )
    """The authorization that it was made from, and ends with; None for a token that nobody can refresh."""


class OAuthClient(Table):
    """A program that people sign in with; only its secret's hash is kept."""

    __tablename__ = "oauth_clients"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    """What the consent page calls it."""
    secret_hash: Mapped[str]
    create_time: Mapped[float]


class Authorization(Table):
    """What an account allowed a client to do, until it is revoked: then the row is deleted."""

    __tablename__ = "authorizations"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), index=True)
    client: Mapped[str] = mapped_column(index=True)
    """Id of the client; the command line's own has no row."""
    scopes: Mapped[str]
    refresh_hash: Mapped[str] = mapped_column(unique=True)
    create_time: Mapped[float]
    use_time: Mapped[float]
    """When a token was last made from it."""


class AuthorizationCode(Table):
    """A code that a client exchanges for tokens, once; only its hash is kept.

    It stays for a while after its use, so that a second use is recognized and ends what the first one gave.
    """

    __tablename__ = "authorization_codes"

    code_hash: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"))
    client: Mapped[str]
    scopes: Mapped[str]
    redirect_uri: Mapped[str]
    code_challenge: Mapped[str]
    nonce: Mapped[str | None]
    expire_time: Mapped[float] = mapped_column(index=True)
    used: Mapped[bool] = mapped_column(default=False)
    authorization: Mapped[str | None]
    """What its use gave."""


class DeviceCode(Table):
    """A sign-in that a person approves in a browser elsewhere (RFC 8628); only the device's code is secret."""

    __tablename__ = "device_codes"

    code_hash: Mapped[str] = mapped_column(primary_key=True)
    user_code: Mapped[str] = mapped_column(unique=True)
    client: Mapped[str]
    scopes: Mapped[str]
    account: Mapped[str | None] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"))
    """Who decided; None while nobody has."""
    approved: Mapped[bool] = mapped_column(default=False)
    poll_time: Mapped[float] = mapped_column(default=0.0)
    expire_time: Mapped[float] = mapped_column(index=True)


class BrowserSession(Table):
    """A browser in which an account is signed in; only the cookie's hash is kept."""

    __tablename__ = "browser_sessions"

    cookie_hash: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), index=True)
    create_time: Mapped[float]
    expire_time: Mapped[float] = mapped_column(index=True)


class Attempts(Table):
    """Guesses at a secret, counted for what is guessed at and for where they come from."""

    __tablename__ = "attempts"

    subject: Mapped[str] = mapped_column(primary_key=True)
    """A hash of it: people type passwords where the e-mail address belongs."""
    count: Mapped[int]
    start_time: Mapped[float] = mapped_column(index=True)
    """When the first of them was made; the count starts anew some time later."""


class ServiceAccountKey(Table):
    """The public half of a key with which a service account signs."""

    __tablename__ = "service_account_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), index=True)
    public_key: Mapped[str]
    """PEM."""
    create_time: Mapped[float]


class SigningKey(Table):
    """A key with which the server signs identity tokens."""

    __tablename__ = "signing_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    private_key: Mapped[str]
    """PEM."""
    create_time: Mapped[float]
    retire_time: Mapped[float | None]
    """When the last token that it signed is past; None for the key in use."""


class ApiKey(Table):
    """An API key; only its hash is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    key_hash: Mapped[str] = mapped_column(unique=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), index=True)
    create_time: Mapped[float]
    revoked: Mapped[bool] = mapped_column(default=False)
    name: Mapped[str] = mapped_column(default="", server_default="")
    """What its maker calls it."""
    scopes: Mapped[str] = mapped_column(default="", server_default="")
    """Separated by spaces; empty for all that the account may do."""
    expire_time: Mapped[float | None]
    """None for a key that is good until it is revoked."""
    last_use_time: Mapped[float | None]
    """To the minute; None for a key that was never used."""


class Group(Table):
    """People with whom models are shared at once."""

    __tablename__ = "groups"

    email: Mapped[str] = mapped_column(primary_key=True)
    create_time: Mapped[float]


class GroupMember(Table):
    """An account is in a group."""

    __tablename__ = "group_members"

    group: Mapped[str] = mapped_column(ForeignKey("groups.email", ondelete="CASCADE"), primary_key=True)
    account: Mapped[str] = mapped_column(
        ForeignKey("accounts.email", ondelete="CASCADE"), primary_key=True, index=True
    )


class Project(Table):
    """What `x-goog-user-project` and a model's `readerProjectNumbers` may name."""

    __tablename__ = "projects"

    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(unique=True)
    create_time: Mapped[float]


class ProjectMember(Table):
    """An account is in a project."""

    __tablename__ = "project_members"

    project: Mapped[int] = mapped_column(
        BigInteger, ForeignKey("projects.number", ondelete="CASCADE"), primary_key=True
    )
    account: Mapped[str] = mapped_column(
        ForeignKey("accounts.email", ondelete="CASCADE"), primary_key=True, index=True
    )


class Secret(Table):
    """A key that all servers of one database share, made when it is first needed."""

    __tablename__ = "secrets"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[bytes]


class TunedModel(Table):
    """A tuned model: its message, with the snapshots once its job is done.

    The primary key closes the race of two creates that ask for one id.
    """

    __tablename__ = "tuned_models"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("accounts.email"))
    base: Mapped[str]
    """The catalog id of the base model, aliases resolved when the model was made."""
    message: Mapped[bytes]
    state: Mapped[int]
    create_time: Mapped[float]
    adapter: Mapped[str | None]
    """Path of the published adapter in the artifact store; None until there is one."""
    search_text: Mapped[str] = mapped_column(default="", server_default="")
    """Display name and description in lower case, a line each."""
    reader_projects: Mapped[str] = mapped_column(default="", server_default="")
    """The message's reader_project_numbers, a comma before and after each."""

    __table_args__ = (Index("tuned_models_by_owner", "owner", "create_time", "id"),)

    @validates("message")
    def _note_what_is_queried(self, _key: str, message: bytes) -> bytes:
        model = protos.TunedModel.FromString(message)
        self.search_text = f"{model.display_name}\n{model.description}".casefold()
        self.reader_projects = "".join(f",{number}," for number in model.reader_project_numbers)
        return message


class Permission(Table):
    """A role of somebody who is not the owner; the owner is a column of the model, so there is always one.

    The primary key closes the race of two shares with one grantee, because the id follows from the grantee.
    """

    __tablename__ = "permissions"

    tuned_model: Mapped[str] = mapped_column(ForeignKey("tuned_models.id", ondelete="CASCADE"), primary_key=True)
    id: Mapped[str] = mapped_column(primary_key=True)
    grantee_type: Mapped[int]
    grantee: Mapped[str]
    """E-mail address of a user or a group, which need not be known here yet; empty for everyone."""
    role: Mapped[int]
    create_time: Mapped[float]

    __table_args__ = (Index("permissions_by_grantee", "grantee_type", "grantee"),)


class DeletedModel(Table):
    """Who could see a model that is gone: they are told that it does not exist, others never knew."""

    __tablename__ = "deleted_models"

    id: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), primary_key=True)


class Job(Table):
    """The work that makes a tuned model, and its long-running operation.

    One worker at a time holds the job: `worker` and `lease_until` name it, and `attempt` is the fencing
    token that goes up with each claim, so that what a worker writes after it lost its lease is refused.
    """

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    """The operation's id."""
    tuned_model: Mapped[str] = mapped_column(ForeignKey("tuned_models.id", ondelete="CASCADE"), index=True)
    state: Mapped[str]
    """queued, running or done."""
    training_data: Mapped[bytes] = mapped_column(deferred=True)  # megabytes, that only who trains needs
    seed: Mapped[int]
    total_steps: Mapped[int]
    create_time: Mapped[float]
    attempt: Mapped[int] = mapped_column(default=0)
    fruitless_attempts: Mapped[int] = mapped_column(default=0)
    """Claims since the job last got any further: one that keeps killing its worker is given up."""
    micro_batch_tokens: Mapped[int | None]
    """How many tokens may go through the model at once, since memory ran out; None while it did not."""
    worker: Mapped[str | None]
    lease_until: Mapped[float | None]
    """When the lease ends, by the clock of who renewed it: the sign of life is that it changes."""
    cancelled: Mapped[bool] = mapped_column(default=False)
    start: Mapped[str | None]
    """Path of the adapter that training starts from, the parent's; it is kept until the job is done."""
    checkpoint: Mapped[str | None]
    """Path of the newest checkpoint in the artifact store."""
    error: Mapped[bytes | None]
    """google.rpc.Status of a job that failed or was cancelled."""
    forgotten: Mapped[bool] = mapped_column(default=False)
    """The operation was deleted: nobody asks for its result any more."""
    account: Mapped[str] = mapped_column(default="", server_default="")
    """Who asked for it, and has a turn in the queue; the model may have been given away since."""
    paused: Mapped[bool] = mapped_column(default=False, server_default=false())
    """It rests, or will as soon as its worker hears of it: nobody may claim it."""
    options: Mapped[bytes | None]
    """TuningOptions as asked; None for a job from before there were any, which validates nothing."""

    __table_args__ = (
        Index("jobs_by_state", "state", "create_time"),
        Index("jobs_by_account", "account", "state"),
    )


class Snapshot(Table):
    """One finished training step of a job that is not done; the done ones' are part of the model's message."""

    __tablename__ = "snapshots"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    mean_loss: Mapped[float]
    compute_time_ns: Mapped[int] = mapped_column(BigInteger)


class Event(Table):
    """Something that happened to a job, written with it; see `store/events.py`.

    The constraint closes the race of two attempts that tell of one step.
    """

    __tablename__ = "events"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    """From 1."""
    kind: Mapped[str]
    """The name of the message's case."""
    step: Mapped[int | None]
    """None for what belongs to no step."""
    message: Mapped[bytes]
    """TuningEvent, without its number."""

    __table_args__ = (UniqueConstraint("job", "kind", "step", name="events_of_a_step"),)


class Report(Table):
    """What a job's report says that its events do not."""

    __tablename__ = "reports"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    message: Mapped[bytes]
    """TuningReport with the recipe, and the samples once somebody asked for them."""


class AuditRecord(Table):
    """Who did what, when and from where; see `store/audit.py`. Triggers refuse to change or remove a row."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float] = mapped_column(index=True)
    account: Mapped[str] = mapped_column(index=True)
    """The e-mail address of an account, or `administrator` for who holds the data dir; empty when unknown."""
    credential: Mapped[str]
    """The kind of credential, and the id of a key; never a secret."""
    action: Mapped[str]
    """The RPC's name, or one of the same form for what is no RPC."""
    resource: Mapped[str] = mapped_column(index=True)
    """What it was done to: `tunedModels/x`, `accounts/ada@example.com`, …"""
    outcome: Mapped[str]
    """OK or the name of the error's canonical code."""
    detail: Mapped[str]
    address: Mapped[str]
    """The network address, or user and machine of a command."""
    project: Mapped[str | None]
    prunes_before: Mapped[float | None] = mapped_column(index=True)
    """Of a prune: rows before this time may go; the triggers look it up."""

    __table_args__ = (
        CheckConstraint("prunes_before <= time", name="audit_prunes_the_past"),
        {"sqlite_autoincrement": True},  # an id is never given twice
    )
