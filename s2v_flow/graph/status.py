"""What a plan would do: which part of it is chosen, which nodes are stored already, which must run, and why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.cache.store import Entry, Store, holds
from s2v_flow.errors import MissingError, UsageError
from s2v_flow.files.atomic import free_name, is_file_there
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.fingerprint import fingerprint
from s2v_flow.graph.node import Node, Plan, PlanNode
from s2v_flow.graph.ports import Source
from s2v_flow.wording import did_you_mean, listed, shown, size_text

EARLIER = 300  # stored results among which the nearest one is looked for
Status = Literal["HIT", "RUN", "RESUME", "LOAD", "SKIP"]
TO_COMPUTE = frozenset({"RUN", "RESUME"})
FileDigest = Callable[[Path], "str | None"]


@dataclass(frozen=True)
class NodeStatus:
    """What a run would do with a node, and why.

    HIT: stored. RUN: will be computed. RESUME: the same, from a resume point on. LOAD: a file that will be read. SKIP:
    nothing needs it.
    """

    status: Status
    reason: str
    fingerprint: str | None = None
    entry: Entry | None = None


def preimage(
    node: PlanNode, numerics: Numerics, file_digest: FileDigest, input_digest: Callable[[Source], str | None]
) -> dict[str, Any] | str:
    """Return what determines a plan node's result, the pre-image of the fingerprint; or text: what is not known yet.

    `file_digest`: sha256 of a file, or None where it is not known (yet); `input_digest`: that of an input, or None
    before it is computed.
    """
    files: dict[tuple[str | int, ...], str] = {}
    for path, mark, text in node.node.files():
        if mark.role == "output":
            continue
        digest = file_digest(node.files[path]) if path in node.files else None
        if digest is None:
            return f"{text} is missing" if path not in node.files else f"{text} has not been read yet"
        files[path] = f"sha256:{digest}"
    inputs: dict[str, Any] = {}
    for key, given in node.inputs.items():
        parts = (given,) if isinstance(given, Source) else given
        digests = [input_digest(part) for part in parts]
        for part, digest in zip(parts, digests, strict=True):
            if digest is None:
                return f"waits for {part.node}"
        inputs[key] = digests[0] if isinstance(given, Source) else digests
    result: dict[str, Any] = {
        "kind": type(node.node).kind,
        "version": node.node.version,
        "fields": node.node.identity(files, numerics.precision),
        "inputs": inputs,
    }
    if node.node.has_numerics:
        result["numerics"] = numerics.identity()
    return result


def output_digests(node: PlanNode, key: str, entry: Entry | None) -> dict[Source, str]:
    """Return the digest of every output: an artifact's own sha256, or the fingerprint of what is not stored."""
    if entry is not None:
        return {Source(node.name, port): f"sha256:{item.sha256}" for port, item in entry.outputs.items()}
    if node.node.is_stored:
        return {}
    return {Source(node.name, port): f"{key}.{port}" for port in node.node.outputs}


def assess(
    plan: Plan, store: Store, numerics: Numerics, file_digest: FileDigest, forced: frozenset[str] = frozenset()
) -> dict[str, NodeStatus]:
    """Find out what a run would do, without computing anything: the status of every plan node by name.

    `file_digest`: sha256 of a file where it is known without much work, else None; `forced`: plan nodes that are
    computed whatever is stored.
    """
    known: dict[Source, str] = {}
    found: dict[str, NodeStatus] = {}
    earlier: list[Entry] | None = None
    resume_points = ResumePoints(store.root)
    for node in plan.nodes:
        image = preimage(node, numerics, file_digest, known.get)
        if isinstance(image, str):
            found[node.name] = NodeStatus("RUN", image)
            continue
        key = fingerprint(image)
        known.update(output_digests(node, key, None))
        if node.name in forced:
            found[node.name] = NodeStatus("RUN", "forced", key)
            continue
        entry = store.lookup(key) if node.node.is_stored or node.node.is_kept else None
        if entry is not None:
            entry = entry if node.node.is_stored else None
            known.update(output_digests(node, key, entry))
            found[node.name] = NodeStatus("HIT", "stored", key, entry)
        elif node.node.is_stored and (facts := resume_points.peek(key)) is not None:
            told = f"resume point at step {facts.get('step', '?')} of {facts.get('steps', '?')}"
            found[node.name] = NodeStatus("RESUME", told, key)
        elif node.node.is_stored:
            earlier = store.recent(EARLIER) if earlier is None else earlier
            reason = explain(node.name, node.recipe_node, image, earlier, node.node)
            found[node.name] = NodeStatus("RUN", reason, key)
        else:
            found[node.name] = NodeStatus("RUN", NEVER, key)
    return _with_need(plan, found)


def placing(plan: Plan, statuses: Mapping[str, NodeStatus], *, overwrites: bool = False) -> Iterator[str]:
    """Yield a line for each sink that will find another file in its place: which, and where its own result goes."""
    for node in plan.nodes:
        entry = statuses[node.name].entry
        if node.node.is_sink and (others := other_files(node, entry)):
            files = {**node.files, ("file",): free_place(node, entry)}
            new = next(iter(node.node.targets(files, entry.outputs if entry else None).values()))
            if overwrites:
                ports = entry.outputs if entry else None
                held = "; what goes on behind the new ones only if the cache holds it"
                more = held if node.node.surplus(node.files, ports) else ""
                yield f"file: {described_files(others)} will be replaced (--overwrite){more}"
            elif entry is None:
                yield f"file: {described_files(others)} stays, unless it is this result; else written as {new.name}"
            elif not os.path.lexists(new):
                yield f"file: {described_files(others)} stays: it is another result; written as {new.name}"


def free_place(node: PlanNode, entry: Entry | None) -> Path:
    """Return where a sink's result goes: its file, numbered where another one stands; an unknown result is another."""
    return free_name(node.files["file",], lambda path: not other_files(node, entry, path))


def other_files(node: PlanNode, entry: Entry | None, path: Path | None = None) -> list[Path]:
    """List what stands where a sink's files are to go, or would go under another path, and is not its result."""
    outputs = entry.outputs if entry else {}
    files = {**node.files, ("file",): path or node.files["file",]}
    targets = node.node.targets(files, outputs or None)
    others = [path for port, path in targets.items() if not (entry and holds(path, outputs[port]))]
    return [path for path in (*others, *node.node.surplus(files, outputs or None)) if is_file_there(path)]


def described_files(files: Sequence[Path]) -> str:
    """Name the first of some files, with its size and time: out/talk.mp4 (2.1 MB, written 2026-11-28 14:03)."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    with suppress(OSError):
        found = files[0].stat()
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.st_mtime))
        return f"{files[0]}{more} ({size_text(found.st_size)}, written {written})"
    return f"{files[0]}{more}"


def _with_need(plan: Plan, found: Mapping[str, NodeStatus]) -> dict[str, NodeStatus]:
    """Mark what nothing needs, and tell reading a file from computing."""
    needed = needed_nodes(plan, {name for name, status in found.items() if status.status == "HIT"})
    result: dict[str, NodeStatus] = {}
    for node in plan.nodes:
        status = found[node.name]
        if status.status in TO_COMPUTE and node.name not in needed:
            status = NodeStatus("SKIP", "not needed: what follows is stored", status.fingerprint)
        elif status.status == "RUN" and not node.inputs:
            reason = status.reason if status.fingerprint is None else "read when it is needed"
            status = NodeStatus("LOAD", reason, status.fingerprint)
        elif status.status == "RUN" and not node.node.is_stored:
            text = "made as it is used, and kept" if node.node.is_kept else "made as it is used, never stored"
            status = NodeStatus("RUN", text, status.fingerprint)
        result[node.name] = status
    return result


def needed_nodes(plan: Plan, stored: set[str]) -> set[str]:
    """Return the plan nodes that have to run, given which ones are stored: targets that are not, and what they need."""
    consumed = {source.node for node in plan.nodes for source in node.sources()}
    targets = {node.name for node in plan.nodes if node.node.is_sink or node.name not in consumed}
    needed: set[str] = targets - stored
    for node in reversed(plan.nodes):
        if node.name in needed:
            needed.update(source.node for source in node.sources() if source.node not in stored)
    return needed


NEVER = "never ran with these inputs and settings"
_SHOWN = 3


def explain(
    name: str, recipe_node: str, image: Mapping[str, Any], entries: Sequence[Entry], node: Node | None = None
) -> str:
    """Say what differs from the nearest stored result of the same kind: text like "nodes.first.steps: 4 -> 20".

    `entries`: stored results, the newest first; among equally near ones, those of the plan node `name` count first.
    `node` tells the values of fields that an identity leaves out, and their defaults.
    """
    best: list[str] | None = None
    for entry in sorted(entries, key=lambda entry: entry.facts.get("node") != name):
        if entry.preimage.get("kind") != image["kind"]:
            continue
        found = list(differences(entry.preimage, image, recipe_node, node))
        if found and (best is None or len(found) < len(best)):
            best = found
    if best is None:
        return NEVER
    more = f" and {len(best) - _SHOWN} more" if len(best) > _SHOWN else ""
    return "; ".join(best[:_SHOWN]) + more


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], recipe_node: str, node: Node | None = None
) -> Iterator[str]:
    """Yield each difference of two pre-images, in words; `node`: see `explain`."""
    found = list(_of_what_was_asked(old, new, recipe_node, node))
    yield from found
    if not found and old.get("degraded"):
        less = ", ".join(f"{key} {shown(value)}" for key, value in old["degraded"].items())
        yield f"its last result was made with less memory than it needs: {less}"


def _of_what_was_asked(
    old: Mapping[str, Any], new: Mapping[str, Any], recipe_node: str, node: Node | None
) -> Iterator[str]:
    if old.get("version") != new.get("version"):
        yield f"the kind {new['kind']} has changed in s2vflow (version {old.get('version')} -> {new.get('version')})"
    for section in ("numerics", "fields"):
        before, after = old.get(section, {}), new.get(section, {})
        where = f"nodes.{recipe_node}." if section == "fields" else ""
        if section == "fields" and node is not None:
            usual = {
                name: None if info.is_required() else info.default for name, info in type(node).model_fields.items()
            }
            now = dict(node)
            after = {**after, **{name: now.get(name) for name in before if name not in after}}
            before = {**{name: usual.get(name) for name in after}, **before}
        yield from _changed(before, after, where)
    before, after = old.get("inputs", {}), new.get("inputs", {})
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"input {key} is {'new' if key not in before else 'gone' if key not in after else 'another'}"


def _changed(before: Any, after: Any, where: str) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*after, *(key for key in before if key not in after)]:
            dot = "" if where.endswith(".") or not where else "."
            yield from _changed(before.get(key), after.get(key), f"{where}{dot}{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _changed(one, other, f"{where}[{index}]")
    elif before != after or type(before) is not type(after):
        if _is_digest(before) and _is_digest(after):
            yield f"{where}: another file"
        else:
            one, other = ("a file" if _is_digest(value) else shown(value) for value in (before, after))
            yield f"{where}: {one} -> {other}"


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")


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
            raise UsageError("--only and --from are both given", fix)

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
            raise UsageError(text, f"leave out {anew} or {why}")
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
        raise UsageError(f"the plan has no node {given!r}", did_you_mean(given, known, "nodes"))
    return found
