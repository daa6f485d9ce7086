"""The tables. A row holds the official message; columns exist only for what is queried."""

from typing import ClassVar

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, validates

from tunesmith import protos


class Table(DeclarativeBase):
    """Base of all tables; times are seconds since the epoch, UTC."""

    type_annotation_map: ClassVar = {bytes: LargeBinary}


class Account(Table):
    """A person who may call the API."""

    __tablename__ = "accounts"

    email: Mapped[str] = mapped_column(primary_key=True)
    password_hash: Mapped[str | None]
    disabled: Mapped[bool] = mapped_column(default=False)
    create_time: Mapped[float]


class AccessToken(Table):
    """A bearer token; only its hash is kept."""

    __tablename__ = "access_tokens"

    token_hash: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"))
    scopes: Mapped[str]
    create_time: Mapped[float]
    expire_time: Mapped[float]


class ApiKey(Table):
    """An API key; only its hash is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    key_hash: Mapped[str] = mapped_column(unique=True)
    account: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), index=True)
    create_time: Mapped[float]
    revoked: Mapped[bool] = mapped_column(default=False)


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
    """A tuned model: its message without the snapshots, which are rows of their own.

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
    training_data: Mapped[bytes]
    seed: Mapped[int]
    total_steps: Mapped[int]
    create_time: Mapped[float]
    attempt: Mapped[int] = mapped_column(default=0)
    fruitless_attempts: Mapped[int] = mapped_column(default=0)
    """Claims since the last finished step: a job that keeps killing its worker is given up."""
    worker: Mapped[str | None]
    lease_until: Mapped[float | None]
    cancelled: Mapped[bool] = mapped_column(default=False)
    start: Mapped[str | None]
    """Path of the adapter that training starts from, the parent's; it is kept until the job is done."""
    checkpoint: Mapped[str | None]
    """Path of the newest checkpoint in the artifact store."""
    error: Mapped[bytes | None]
    """google.rpc.Status of a job that failed or was cancelled."""
    forgotten: Mapped[bool] = mapped_column(default=False)
    """The operation was deleted: nobody asks for its result any more."""

    __table_args__ = (Index("jobs_by_state", "state", "create_time"),)


class Snapshot(Table):
    """One finished training step."""

    __tablename__ = "snapshots"

    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    mean_loss: Mapped[float]
    compute_time_ns: Mapped[int] = mapped_column(BigInteger)
