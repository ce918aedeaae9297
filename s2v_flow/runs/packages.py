"""The other packages whose kinds or samplers a recipe uses."""

from __future__ import annotations

from s2v_flow.graph.plan import Plan
from s2v_flow.plugins import NODES, SAMPLERS, Plugin, plugins
from s2v_flow.recipe.document import Recipe


def plugins_of(recipe: Recipe, plan: Plan) -> list[Plugin]:
    """Return the plug-ins that a recipe uses: its nodes' kinds, and the samplers of its plan."""
    kinds, samplers = plugins(NODES), plugins(SAMPLERS)
    found = [kinds.get(spec.kind) for spec in recipe.nodes.values()]
    found += [samplers.get(getattr(node.node, "sampler", "")) for node in plan.nodes]
    return list(dict.fromkeys(plugin for plugin in found if plugin is not None))


def packages_of(recipe: Recipe, plan: Plan) -> dict[str, str]:
    """Return the packages of these plug-ins: name -> version."""
    return {plugin.package: plugin.version for plugin in plugins_of(recipe, plan)}
