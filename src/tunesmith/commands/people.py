"""The people who may call: accounts, groups, projects."""

import sys
from typing import Annotated

import typer

from tunesmith.commands.options import DataDir
from tunesmith.commands.reach import administering, open_parts

accounts = typer.Typer(help="The people who may call the API.", no_args_is_help=True)
groups = typer.Typer(help="People with whom tuned models are shared at once.", no_args_is_help=True)
projects = typer.Typer(help="Projects, which may read the tuned models that list them.", no_args_is_help=True)
GroupEmail = Annotated[str, typer.Argument(metavar="GROUP", help="Its e-mail address, such as team@example.com.")]
ProjectName = Annotated[str, typer.Argument(metavar="PROJECT", help="Its id or its number.")]
Members = Annotated[list[str], typer.Argument(metavar="EMAIL...", help="The accounts.")]


@accounts.command("create")
def create_account(
    email: str,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read a password for signing in from standard input.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Make an account."""
    password = sys.stdin.readline().rstrip("\n") if password_stdin else None
    with administering(data_dir, "CreateAccount", f"accounts/{email}") as parts:
        parts.accounts.create(email, password)
    print(f"Made the account {email}. A token for it: tunesmith token {email}")


@accounts.command("list")
def list_accounts(data_dir: DataDir = None) -> None:
    """List the accounts."""
    for account in open_parts(data_dir).accounts.list():
        print(f"{account.email}{'  disabled' if account.disabled else ''}")


@accounts.command("password")
def set_password(
    email: str,
    password_stdin: Annotated[
        bool, typer.Option("--password-stdin", help="Read it from standard input instead of asking.")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Give an account a new password; its browsers and programs must sign in again."""
    if password_stdin:
        password = sys.stdin.readline().rstrip("\n")
    else:
        password = typer.prompt("New password", hide_input=True, confirmation_prompt=True)
    with administering(data_dir, "ChangePassword", f"accounts/{email}") as parts:
        parts.accounts.set_password(email, password)
    print(f"{email} has a new password. Access tokens of `tunesmith token` and API keys stay as they are.")


@accounts.command("disable")
def disable_account(email: str, data_dir: DataDir = None) -> None:
    """Refuse an account's tokens and keys from now on; its models stay."""
    with administering(data_dir, "DisableAccount", f"accounts/{email}") as parts:
        parts.accounts.disable(email)
    print(f"Disabled {email}.")


@groups.command("create")
def create_group(group: GroupEmail, data_dir: DataDir = None) -> None:
    """Make a group."""
    with administering(data_dir, "CreateGroup", f"groups/{group}") as parts:
        parts.groups.create(group)
    print(f"Made the group {group}. Put people in it: tunesmith groups add {group} EMAIL")


@groups.command("list")
def list_groups(data_dir: DataDir = None) -> None:
    """List the groups, each with its members."""
    for group, members in open_parts(data_dir).groups.list().items():
        print(f"{group}  {', '.join(members) or 'nobody'}")


@groups.command("add")
def add_to_group(group: GroupEmail, accounts: Members, data_dir: DataDir = None) -> None:
    """Put accounts into a group."""
    with administering(data_dir, "AddToGroup", f"groups/{group}", ", ".join(accounts)) as parts:
        parts.groups.add(group, accounts)
    print(f"{', '.join(accounts)} may now do what {group} may.")


@groups.command("remove")
def remove_from_group(group: GroupEmail, accounts: Members, data_dir: DataDir = None) -> None:
    """Take accounts out of a group."""
    with administering(data_dir, "RemoveFromGroup", f"groups/{group}", ", ".join(accounts)) as parts:
        parts.groups.remove(group, accounts)
    print(f"Took {', '.join(accounts)} out of {group}.")


@groups.command("delete")
def delete_group(group: GroupEmail, data_dir: DataDir = None) -> None:
    """Delete a group, and what is shared with it."""
    with administering(data_dir, "DeleteGroup", f"groups/{group}") as parts:
        parts.groups.delete(group)
    print(f"Deleted the group {group}.")


@projects.command("create")
def create_project(
    project: Annotated[str, typer.Argument(help="Its id, such as my-project-id.")],
    number: Annotated[
        int | None, typer.Option(help="Its number, if models name one already; left out, one is made.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make a project and print its number, which goes into a tuned model's readerProjectNumbers."""
    with administering(data_dir, "CreateProject", f"projects/{project}") as parts:
        print(parts.projects.create(project, number))
    print(f"Made the project {project}. Put people in it: tunesmith projects add {project} EMAIL", file=sys.stderr)


@projects.command("list")
def list_projects(data_dir: DataDir = None) -> None:
    """List the projects, each with its number and its members."""
    for project, members in open_parts(data_dir).projects.list():
        print(f"{project.id}  {project.number}  {', '.join(members) or 'nobody'}")


@projects.command("add")
def add_to_project(project: ProjectName, accounts: Members, data_dir: DataDir = None) -> None:
    """Put accounts into a project."""
    with administering(data_dir, "AddToProject", f"projects/{project}", ", ".join(accounts)) as parts:
        parts.projects.add(project, accounts)
    print(f"{', '.join(accounts)} may read what {project} may, with the header x-goog-user-project: {project}")


@projects.command("remove")
def remove_from_project(project: ProjectName, accounts: Members, data_dir: DataDir = None) -> None:
    """Take accounts out of a project."""
    with administering(data_dir, "RemoveFromProject", f"projects/{project}", ", ".join(accounts)) as parts:
        parts.projects.remove(project, accounts)
    print(f"Took {', '.join(accounts)} out of {project}.")


@projects.command("delete")
def delete_project(project: ProjectName, data_dir: DataDir = None) -> None:
    """Delete a project; what it may read stays with those who may read it otherwise."""
    with administering(data_dir, "DeleteProject", f"projects/{project}") as parts:
        parts.projects.delete(project)
    print(f"Deleted the project {project}.")
