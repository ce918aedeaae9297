"""Writing a recipe's lock."""

from __future__ import annotations

from pathlib import Path

from s2v_flow.api import Options, plan, require_files
from s2v_flow.errors import MissingError
from s2v_flow.runs.files import files_of
from s2v_flow.runs.lockfile import lock_path, lock_text, read_lock
from s2v_flow.runs.sources import FileDigests


def make_lock(recipe: Path, options: Options) -> str:
    """Return the text of a recipe's lock: the digests of its models and inputs.

    With profiles or overrides, what the lock beside the recipe says of other files stays: one lock can hold several
    profiles' files.

    Args:
        recipe: The recipe file.
        options: See `Options`.

    Raises:
        RecipeError: The recipe, or the lock that is there, is wrong.
        MissingError: A model or an input is missing.
    """
    planned = plan(recipe, options)
    require_files(planned)
    for item in files_of(planned.plan.nodes):
        if not item.file.is_file():
            raise MissingError(f"{item.name} has not been made yet", fix=f"`s2vflow run {recipe}` makes it, once")
    kept = read_lock(lock_path(recipe)) if options.changes else {}
    return lock_text(planned.recipe, planned.plan, FileDigests(options.cache_root / "digests.json"), kept=kept)
