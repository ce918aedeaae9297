"""s2vflow: talking videos with Wan2.2-S2V from a YAML recipe.

    import s2v_flow

    planned = s2v_flow.plan("recipes/demo.yaml", params={"steps": 2})      # no torch, nothing computed
    print(planned.num_chunks, planned.seconds)
    result = s2v_flow.run("recipes/demo.yaml", params={"steps": 2}, on_event=print)
    print(result.outputs["video"])

A recipe may also be a dict; `with Session() as session: session.run(...)` keeps models loaded between runs. The other
keywords are the fields of `s2v_flow.Options`; errors are those of `s2v_flow.errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2v_flow.version import __version__

if TYPE_CHECKING:
    from s2v_flow.api import Options, check, load, plan, run
    from s2v_flow.api.session import Session

__all__ = ["Options", "Session", "__version__", "check", "load", "plan", "run"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the Python entry when it is first used: `import s2v_flow` alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 's2v_flow' has no attribute {name!r}")
    if name == "Session":
        from s2v_flow.api.session import Session

        return Session
    from s2v_flow import api

    return getattr(api, name)
