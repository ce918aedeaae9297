"""Executing a plan: each needed node once, in order; its result stored at once; what nobody needs any more freed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from s2v_flow.cache.budget import NO_LIMIT
from s2v_flow.cache.resume_point import ResumePoints
from s2v_flow.cache.store import DamagedObjectError, Entry, Store
from s2v_flow.errors import MissingError, S2VFlowError
from s2v_flow.files.atomic import TakenError, writing
from s2v_flow.graph.context import Artifact, Closable, Keep, Numerics, ResumePoint, RunContext, Watch, Way
from s2v_flow.graph.events import Delivered, Listener, NodeCached, NodeFinished, NodeStarted, Noted, RunStarted
from s2v_flow.graph.fingerprint import as_made, fingerprint
from s2v_flow.graph.interrupt import ShouldStop, StoppedError, exit_code_of, never, node_turn
from s2v_flow.graph.node import Plan, PlanNode
from s2v_flow.graph.ports import Source
from s2v_flow.graph.results import Results, Scratch, failures_of, placed, reap_outputs
from s2v_flow.graph.status import (
    NodeStatus,
    described_files,
    free_place,
    needed_nodes,
    other_files,
    output_digests,
    preimage,
)
from s2v_flow.machine import forget_peaks, peak_device_bytes, peak_memory_bytes, trim_heap

_MENDS = 3

UsedT = TypeVar("UsedT")


@dataclass(frozen=True)
class RunResult:
    """What a run did: the plan nodes computed and found stored, and the files that now hold the results."""

    computed: tuple[str, ...]
    cached: tuple[str, ...]
    outputs: Mapping[str, tuple[Path, ...]]
    entries: Mapping[str, Entry]
    run_id: str = ""  # under which its manifest is kept
    failures: Mapping[str, str] = field(default_factory=dict)  # plan nodes that failed where others went on, and why
    not_kept: tuple[str, ...] = ()  # plan nodes whose results could not be stored
    unmet: Mapping[str, str] = field(default_factory=dict)  # videos that do not meet the recipe's `require`, and why

    def __repr__(self) -> str:
        files = [str(path) for paths in self.outputs.values() for path in paths]
        written = files[:3] + ([f"{len(files) - 3} more"] if len(files) > 3 else [])
        facts = [f"{len(self.computed)} computed", f"{len(self.cached)} stored"]
        facts += [f"{len(self.failures)} failed"] if self.failures else []
        return f"<{type(self).__name__} {self.run_id}: {', '.join([*facts, *written])}>"

    def to_json(self) -> dict[str, Any]:
        """Return the object that `s2vflow run --json` prints."""
        outputs = {name: [str(path) for path in paths] for name, paths in self.outputs.items()}
        run: dict[str, Any] = {"run": self.run_id} if self.run_id else {}
        run |= {"failures": dict(self.failures)} if self.failures else {}
        run |= {"unmet": dict(self.unmet)} if self.unmet else {}
        run |= {"not_kept": list(self.not_kept)} if self.not_kept else {}
        return {**run, "outputs": outputs, "computed": list(self.computed), "stored": list(self.cached)}


@dataclass
class Run:
    """One execution of one plan.

    `note` gives what is to be said inside a sink's file, from the sink and the stored results; `about` are facts that
    every result computed here gets, `about_nodes` those of single ones; `cache_limit` is what the cache may grow to in
    bytes, None: as it chooses. A file that stands under a result's name and is another stays, and the result is
    numbered, unless the run `overwrites`.
    """

    plan: Plan
    statuses: Mapping[str, NodeStatus]
    store: Store
    numerics: Numerics
    device: str
    models: Callable[[], Any]
    file_digest: Callable[[Path], str]
    emit: Listener
    forced: frozenset[str] = frozenset()
    note: Callable[[PlanNode, Mapping[str, Entry]], bytes] = lambda node, entries: b""
    about: Mapping[str, Any] = field(default_factory=dict)
    about_nodes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    should_stop: ShouldStop = never
    keeps_going: bool = False  # a node that fails takes only what depends on it along
    cache_limit: int | None = NO_LIMIT
    overwrites: bool = False
    watch: Watch | None = None
    ways: Mapping[str, Way] = field(default_factory=dict)  # by plan node
    _failures: dict[str, str] = field(default_factory=dict)  # as text: tracebacks hold what a node had in memory
    entries: dict[str, Entry] = field(default_factory=dict)
    _live: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _live_facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    _digests: dict[Source, str] = field(default_factory=dict)
    _uses: dict[str, int] = field(default_factory=dict)
    _computed: list[str] = field(default_factory=list)
    _reported: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._results = Results(self.store, self.emit, self.cache_limit)
        self._consumed = {source.node for node in self.plan.nodes for source in node.sources()}

    def execute(self) -> RunResult:
        """Run what is needed, then put the results where the recipe wants them.

        Raises:
            S2VFlowError: A node failed; everything finished before is stored, but for what `kept` names.
            StoppedError: `should_stop` said so, at the end of a step or between two nodes.
        """
        try:
            return self._execute()
        except (S2VFlowError, StoppedError) as error:
            self._results.amend(error)
            raise

    def _execute(self) -> RunResult:
        for node in self.plan.nodes:
            status = self.statuses[node.name]
            if status.entry is not None:
                self._remember(node, status.fingerprint or "", status.entry)
        self._results.begin(self.entries)
        needed = needed_nodes(self.plan, set(self.entries))
        to_obtain = [node for node in self.plan.nodes if node.name in needed and node.node.is_stored]
        for node in to_obtain:
            self._claim_inputs(node)
        obtained = {node.name for node in to_obtain}
        self.emit(RunStarted(tuple(node.name for node in to_obtain), len(self.plan.nodes)))
        outputs: dict[str, tuple[Path, ...]] = {}
        for node in self.plan.nodes:
            if any(source.node in self._failures for source in node.sources()):
                self._failures[node.name] = "needs a node that failed"
                if node.name in obtained:
                    self._release_inputs(node)
                continue
            if self.should_stop() and node.name in obtained:
                raise StoppedError(f"before {node.name}", exit_code_of(self.should_stop))
            try:
                if node.name in obtained:
                    self._obtain(node)
                if node.node.is_sink:
                    outputs[node.name] = self._deliver(node)
            except S2VFlowError as error:
                if self.should_stop():  # a signal inside of another package's code may come out as its error
                    raise StoppedError(f"in {node.name}", exit_code_of(self.should_stop)) from error
                placed(error, node)
                if not self.keeps_going:
                    raise
                self._failures[node.name] = str(error)
                self.emit(Noted(node.name, f"failed: {error}", is_warning=True))
        cached = tuple(name for name in self.entries if name not in self._computed)
        failures, not_kept = dict(self._failures), tuple(self.not_kept)
        return RunResult(
            tuple(self._computed), cached, outputs, dict(self.entries), failures=failures, not_kept=not_kept
        )

    @property
    def not_kept(self) -> Set[str]:
        """The plan nodes whose results could not be stored, so far."""
        return self._results.not_kept

    def close(self) -> None:
        """Release everything that is still live or held."""
        self._results.close()
        while self._live:
            self._drop(next(reversed(self._live)))  # what uses something goes before what it uses

    def _obtain(self, node: PlanNode) -> None:
        """Make sure a stored node's result is in the store: it may be there under a fingerprint only known now."""
        reasons: list[str] = []
        try:
            key, image = self._identify(node)
            if node.name in self.forced:
                self._compute(node, key, image)
            elif not self._adopt(node, key):
                with node_turn(self.store.root, key, node.name, self.emit, self.should_stop, reasons.append):
                    if not self._adopt(node, key):  # the process that was waited for has stored it
                        self._compute(node, key, image)
        finally:
            self._release_inputs(node)
        if reasons and node.name not in self.not_kept:  # else that nothing can be written has been said
            text = f"nothing can be locked under {self.store.root / 'locks'} ({reasons[0]}): "
            text += "another run may compute the same at the same time"
            if text not in self._reported:
                self._reported.add(text)
                self.emit(Noted("", text, is_warning=True))

    def _adopt(self, node: PlanNode, key: str) -> bool:
        """Take what is stored; tell whether there was something."""
        entry = self._results.find(node.name, key)
        if entry is None:
            return False
        self._remember(node, key, entry)
        self.emit(NodeCached(node.name))
        return True

    def _identify(self, node: PlanNode) -> tuple[str, dict[str, Any]]:
        for source in node.sources():
            if source not in self._digests:
                upstream = self.plan.node(source.node)
                assert not upstream.node.is_stored, f"{node.name} stands before {upstream.name}"
                key, _ = self._identify(upstream)
                self._digests.update(output_digests(upstream, key, None))
        image = preimage(node, self.numerics, self.file_digest, self._digests.get)
        if isinstance(image, str):
            raise MissingError(f"{node.name}: {image}")
        return fingerprint(image), image

    def _compute(self, node: PlanNode, key: str, image: Mapping[str, Any], *, is_mend: bool = False) -> Entry:
        started = time.monotonic()
        self.emit(NodeStarted(node.name, node.kind))
        if not is_mend:  # another node is being computed, whose peak it is
            trim_heap()
            forget_peaks()
        folder, is_fresh = ResumePoints(self.store.root), node.name in self.forced
        resume_point = ResumePoint(folder, key, node.name, self.emit, self.should_stop, is_fresh, self._reported)

        def work(scratch: Scratch) -> Entry:
            facts: dict[str, Any] = {}
            outputs = self._run(node, scratch, facts, resume_point)
            degraded = {**self._degraded(node), **facts.get("degraded", {})}
            facts |= {"degraded": degraded} if degraded else {}
            facts |= {"seconds": round(time.monotonic() - started, 3), "node": node.name}
            on_gpu = peak_device_bytes()
            facts |= {} if on_gpu is None else {"peak_device_bytes": on_gpu}
            facts |= {"peak_bytes": peak_memory_bytes(), **self.about, **self.about_nodes.get(node.name, {})}
            is_last = not node.node.is_sink and node.name not in self._consumed
            what = (node.name, *as_made(key, image, facts), outputs, facts)
            return self._results.publish(*what, replaces=is_fresh, is_last=is_last, holds=is_mend)

        entry = self._results.work(node, work)
        resume_point.folder.forget(key)
        self._remember(node, key, entry)
        self._computed.append(node.name)
        seconds = time.monotonic() - started
        self.emit(NodeFinished(node.name, seconds, peak_memory_bytes(), peak_device_bytes()))
        return entry

    def _degraded(self, node: PlanNode) -> dict[str, Any]:
        """Return what live values that a node has used were made with, where that is less than was asked for."""
        found: dict[str, Any] = {}
        for upstream in self._upstream(node):
            if not upstream.node.is_stored:
                found |= self._degraded(upstream)
                found |= self._live_facts.get(upstream.name, {}).get("degraded", {})
        return found

    def _run(
        self,
        node: PlanNode,
        scratch: Scratch,
        facts: dict[str, Any],
        resume_point: ResumePoint | None = None,
        keep: Keep | None = None,
    ) -> Mapping[str, Any]:
        values: dict[str, Any] = {}
        for name, given in node.inputs.items():
            values[name] = self._value(given) if isinstance(given, Source) else [self._value(part) for part in given]
        read = {path for path, mark, _ in node.node.files() if mark.role != "output"}
        files = {path: f"sha256:{self.file_digest(file)}" for path, file in node.files.items() if path in read}
        context = RunContext(
            node.name,
            node.kind,
            node.facts,
            self.device,
            self.numerics,
            self.models,
            node.files,
            files,
            scratch,
            self.emit,
            facts,
            resume_point,
            keep,
            self.watch,
            self.ways.get(node.name, {}),
        )
        with failures_of(node, scratch):
            return node.node.run(context, values)

    def _value(self, source: Source) -> Any:
        node = self.plan.node(source.node)
        if node.node.is_stored:
            return self._artifact(node, source.port)
        if node.name not in self._live:
            key, image = self._identify(node)
            self._digests.update(output_digests(node, key, None))
            facts = self._live_facts[node.name] = {}
            what = (node.name, key, image, facts, self.about, node.name in self.forced)
            keep = Keep(self.store, self._results.budget, self._results.tell, self.emit, *what)
            self._live[node.name] = self._run(node, Scratch(_no_folder), facts, keep=keep)
        return self._live[node.name][source.port]

    def _artifact(self, node: PlanNode, port: str) -> Artifact:
        def read() -> bytes:
            return self._mending(node, lambda: self._results.read(self.entries[node.name].outputs[port]))

        def copy_to(target: Path, trailer: bytes = b"") -> bool:
            return self._mending(
                node,
                lambda: self._results.copy_to(self.entries[node.name].outputs[port], target, trailer, self.overwrites),
            )

        return Artifact(self._digests[Source(node.name, port)], read, copy_to)

    def _mending(self, node: PlanNode, use: Callable[[], UsedT]) -> UsedT:
        """Use a stored result; compute it again where it is damaged or gone, also when that happens again."""
        for _ in range(_MENDS):
            with suppress(DamagedObjectError):
                return use()
            self._mend(node)
        return use()

    def _mend(self, node: PlanNode) -> None:
        """Compute a damaged result again, and before it what it is made of where that is damaged too, however deep."""
        damaged, seen, pending = {node.name}, {node.name}, [node]
        while pending:
            for upstream in self._upstream(pending.pop()):
                if upstream.name in seen:
                    continue
                seen.add(upstream.name)
                if not upstream.node.is_stored:
                    pending.append(upstream)
                elif self._is_damaged(upstream):
                    damaged.add(upstream.name)
                    pending.append(upstream)
        for item in self.plan.nodes:
            if item.name in damaged:
                text = "its stored result is damaged or gone and is computed again"
                self.emit(Noted(item.name, text, is_warning=True))
                key, image = self._identify(item)
                self._claim_inputs(item)
                try:
                    self._compute(item, key, image, is_mend=True)
                finally:
                    self._release_inputs(item)

    def _is_damaged(self, node: PlanNode) -> bool:
        try:
            for item in self.entries[node.name].outputs.values():
                self._results.read(item)
        except DamagedObjectError:
            return True
        return False

    def _upstream(self, node: PlanNode) -> Iterator[PlanNode]:
        yield from map(self.plan.node, dict.fromkeys(source.node for source in node.sources()))

    def _remember(self, node: PlanNode, key: str, entry: Entry) -> None:
        self.entries[node.name] = entry
        self._digests.update(output_digests(node, key, entry))

    def _claim_inputs(self, node: PlanNode) -> None:
        """Count a node among those that will use its inputs; a live value uses its own inputs as long as it is used."""
        for upstream in self._upstream(node):
            if not self._uses.get(upstream.name) and not upstream.node.is_stored:
                self._claim_inputs(upstream)
            self._uses[upstream.name] = self._uses.get(upstream.name, 0) + 1

    def _release_inputs(self, node: PlanNode) -> None:
        for upstream in self._upstream(node):
            self._uses[upstream.name] -= 1
            if self._uses[upstream.name] == 0 and upstream.node.is_stored:
                self._results.forget(upstream.name)
            elif self._uses[upstream.name] == 0:
                self._drop(upstream.name)
                self._release_inputs(upstream)

    def _drop(self, name: str) -> None:
        """Close a live value; it may never have come to be, where what uses it turned out to be stored."""
        for value in self._live.pop(name, {}).values():
            if isinstance(value, Closable):
                value.close()

    def _deliver(self, node: PlanNode) -> tuple[Path, ...]:
        artifacts = {port: self._artifact(node, port) for port in self.entries[node.name].outputs}
        reap_outputs(node)
        entry, wanted = self.entries[node.name], node.files["file",]
        others, surplus = other_files(node, entry), node.node.surplus(node.files, entry.outputs)
        overwrites = self.overwrites and all(map(self.store.has_copy, surplus))  # else something would be lost
        replaced = described_files(others) if others and overwrites else ""
        note = self.note(node, self.entries)
        delivered: list[tuple[Path, bool]] | None = None
        while delivered is None:
            path = wanted if overwrites else free_place(node, entry)
            with suppress(TakenError):  # another run has just taken the name
                delivered = node.node.deliver({**node.files, ("file",): path}, artifacts, note)
        self._results.forget(node.name)
        for rest in surplus if overwrites else ():
            with writing(rest):
                rest.unlink(missing_ok=True)
        if replaced:
            self.emit(Noted(node.name, f"file: {replaced} was replaced (--overwrite)"))
        elif path != wanted and delivered[0][1]:
            kept = next(iter(surplus if self.overwrites else others), wanted).name
            self.emit(Noted(node.name, f"{kept} kept: it is another result; written as {delivered[0][0].name}"))
        for path, changed in delivered:
            self.emit(Delivered(node.name, str(path), changed))
        return tuple(path for path, _ in delivered)


def _no_folder() -> Path:
    raise AssertionError("what is never stored writes no files")
