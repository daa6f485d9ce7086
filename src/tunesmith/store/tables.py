"""The tables. A row holds the official message; columns exist only for what is queried."""

from typing import ClassVar

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


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

    __table_args__ = (Index("tuned_models_by_owner", "owner", "create_time", "id"),)


class DeletedModel(Table):
    """Who owned a model that is gone: they are told that it does not exist, others never knew."""

    __tablename__ = "deleted_models"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(ForeignKey("accounts.email", ondelete="CASCADE"), primary_key=True)


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
