"""A part of a plan: up to a node, from a node on, one node alone, some nodes anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from s2v_flow.errors import ExitCode, MissingError, S2VFlowError
from s2v_flow.graph.node import Plan
from s2v_flow.graph.status import TO_COMPUTE, NodeStatus
from s2v_flow.wording import did_you_mean, listed


@dataclass(frozen=True)
class Selection:
    """What of a plan is to run. Names are the recipe's ("talk") or the plan's ("talk[2]").

    until: nothing after these nodes. only: these nodes, from stored inputs. start: nothing before this node is
    computed. force: computed anew; with a plus sign ("first+") everything after them too. is_fresh: everything is
    computed anew. is_cached_only: it is an error if something would have to be computed.
    """

    until: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    start: str | None = None
    force: tuple[str, ...] = ()
    is_fresh: bool = False
    is_cached_only: bool = False

    def __post_init__(self) -> None:
        """Take one name where several may be given.

        Raises:
            S2VFlowError: Nodes are chosen in two ways of which one would not count.
        """
        for name in ("until", "only", "force"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        if self.only and self.start is not None:
            fix = "--only runs a node alone; --from X --until Y runs a part"
            raise S2VFlowError("--only and --from are both given", fix, exit_code=ExitCode.USAGE)

    def cut(self, plan: Plan) -> Plan:
        """Return the plan without what comes after `until` and `only`.

        Raises:
            S2VFlowError: A name is unknown.
        """
        names = [*self.until, *self.only]
        if not names:
            return plan
        targets = {name for given in names for name in members(plan, given)}
        kept = targets | plan.before(targets)
        return replace(plan, nodes=tuple(node for node in plan.nodes if node.name in kept))

    def forced(self, plan: Plan) -> frozenset[str]:
        """Return the plan nodes that are computed anew.

        Raises:
            S2VFlowError: A name is unknown, or what is to be computed anew may not be computed.
        """
        chosen = {node.name for node in plan.nodes} if self.is_fresh else set[str]()
        for given in self.force:
            found = members(plan, given.removesuffix("+"))
            chosen |= found | (plan.after(found) if given.endswith("+") else set())
        barred, why = self._barred(plan)
        clash = [node.name for node in plan.nodes if node.name in barred & chosen and node.node.is_stored]
        if clash:
            anew = "--no-cache" if self.is_fresh else "--force"
            text = f"{anew} computes anew what {why} takes as it is stored: {listed(clash)}"
            raise S2VFlowError(text, fix=f"leave out {anew} or {why}", exit_code=ExitCode.USAGE)
        return frozenset(name for name in chosen if plan.node(name).node.is_stored or plan.node(name).node.is_kept)

    def _barred(self, plan: Plan) -> tuple[set[str], str]:
        """Return the plan nodes that may not be computed, and the option that says so."""
        if self.is_cached_only:
            return {node.name for node in plan.nodes}, "--cache-only"
        if self.only:
            targets = {name for given in self.only for name in members(plan, given)}
            return {node.name for node in plan.nodes} - targets, "--only"
        if self.start is not None:
            return plan.before(members(plan, self.start)), "--from"
        return set(), ""

    def check(self, plan: Plan, statuses: Mapping[str, NodeStatus]) -> None:
        """Refuse a run that would have to compute what it may not.

        Raises:
            S2VFlowError: A name is unknown, or something is not stored.
        """
        barred, why = self._barred(plan)
        lacking = [
            node.name
            for node in plan.nodes
            if node.name in barred and node.node.is_stored and statuses[node.name].status in TO_COMPUTE
        ]
        if lacking:
            fix = f"run without {why} first; `s2vflow plan` tells why each of them must run"
            raise MissingError(f"{why} needs results that are not stored: {listed(lacking)}", fix)


def members(plan: Plan, given: str) -> set[str]:
    """Return the plan nodes that a name means.

    Raises:
        S2VFlowError: There are none.
    """
    found = {node.name for node in plan.nodes if given in (node.name, node.recipe_node)}
    if not found:
        known = dict.fromkeys([*(node.recipe_node for node in plan.nodes), *(node.name for node in plan.nodes)])
        raise S2VFlowError(
            f"the plan has no node {given!r}", fix=did_you_mean(given, known, "nodes"), exit_code=ExitCode.USAGE
        )
    return found
