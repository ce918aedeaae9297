"""Node kinds without tensors, and what it takes to plan and run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from s2v_flow.cache.store import Store
from s2v_flow.errors import Origin, Place, S2VFlowError
from s2v_flow.files.atomic import writing
from s2v_flow.files.facts import file_digest
from s2v_flow.graph.build import build_plan
from s2v_flow.graph.context import Numerics
from s2v_flow.graph.events import Event, NodeStarted, Noted
from s2v_flow.graph.locations import Locations
from s2v_flow.graph.node import Node, NodeSpec, Plan, Planner
from s2v_flow.graph.ports import FileField, Neutral, Port, Ref, Value
from s2v_flow.graph.run import Run, RunResult
from s2v_flow.graph.status import NodeStatus, assess

Text = Annotated[Ref, Port("conditioning")]
Tool = Annotated[Ref, Port("vae")]
Parts = Annotated[Ref, Port("latent")]


class Word(Node):
    """A stored leaf: its text."""

    kind: ClassVar[str] = "word"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    text: str

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": self.text.encode()}


class Join(Node):
    """Its inputs one after the other, and a suffix; fails on demand."""

    kind: ClassVar[str] = "join"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    a: Text
    b: Text | None = None
    tool: Tool | None = None
    suffix: str = ""
    fails: Annotated[str, Neutral()] = ""

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if self.fails:
            raise S2VFlowError(self.fails)
        if "tool" in inputs:
            inputs["tool"].use(context.name)
        texts = [inputs[name].read() for name in ("a", "b") if name in inputs]
        return {"text": b"".join(texts) + self.suffix.encode()}


class Length(Node):
    """How long a text is: different texts, equal bytes."""

    kind: ClassVar[str] = "length"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    a: Text

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": str(len(inputs["a"].read())).encode()}


class Hammer:
    """A live value that writes down when it is made, used and closed; the log is what `context.models()` gives."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log
        log.append(f"make {name}")

    def use(self, by: str) -> None:
        self.log.append(f"{by} uses {self.name}")

    def close(self) -> None:
        self.log.append(f"close {self.name}")


class LoadTool(Node):
    """A live value, of a file or not, made with another or not."""

    kind: ClassVar[str] = "load_tool"
    outputs: ClassVar = {"tool": "vae"}

    file: Annotated[str, FileField("model", "VAE", ("vae", "old_vae"))] | None = None
    made_with: Tool | None = None

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"tool": Hammer(context.name, context.models())}


class Read(Node):
    """A file's bytes."""

    kind: ClassVar[str] = "read"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    file: Annotated[str, FileField("input", "text")]

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": context.files["file",].read_bytes()}


class Part(Node):
    """What `Split` is planned as."""

    kind: ClassVar[str] = "part"
    outputs: ClassVar = {"part": "latent"}
    is_stored: ClassVar[bool] = True

    index: int

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"part": inputs["a"].read()[self.index : self.index + 1]}


class Split(Node):
    """A text letter by letter: as many plan nodes as letters; zero is a mistake."""

    kind: ClassVar[str] = "split"
    outputs: ClassVar = {"parts": "latent"}

    a: Text
    count: int

    def plan(self, builder: Planner, name: str) -> dict[str, Value]:
        if self.count == 0:
            builder.problem(name, "count", "R099", "count: nothing to split into")
            return {}
        inputs = {"a": builder.value(self.a)}
        parts = [
            builder.add(f"{name}[{i + 1}]", Part(index=i), inputs, recipe_node=name)["part"].source
            for i in range(self.count)
        ]
        builder.note(name, f"{name}: {self.count} letters")
        return {"parts": Value("latent", tuple(parts), {"count": self.count})}


class Glue(Node):
    """All parts one after the other."""

    kind: ClassVar[str] = "glue"
    outputs: ClassVar = {"text": "conditioning"}
    is_stored: ClassVar[bool] = True

    parts: Parts

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": b"".join(part.read() for part in inputs["parts"])}


class Save(Node):
    """Write a text."""

    kind: ClassVar[str] = "save"
    outputs: ClassVar = {}
    is_sink: ClassVar[bool] = True
    is_stored: ClassVar[bool] = True

    a: Text
    tool: Tool | None = None
    file: Annotated[str, FileField("output", "text"), Neutral()]

    def run(self, context: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if "tool" in inputs:
            inputs["tool"].use(context.name)
        path = context.scratch / "saved.txt"
        text = inputs["a"].read()
        with writing(path):  # as the writer of films does
            path.write_bytes(text)
        return {"file": path}

    def deliver(self, files: Any, artifacts: Mapping[str, Any], note: bytes) -> list[tuple[Path, bool]]:
        return [(path, artifacts[port].copy_to(path, note)) for port, path in self.targets(files, artifacts).items()]


def toy_spec(name: str, node: Node, folder: Path, file: str = "toy.yaml", line: int = 1) -> NodeSpec:
    """Return a recipe's node as planning sees it."""
    place = Place(file, line)
    return NodeSpec(name, node.kind, node, place, {(): Origin(place, "", folder)})


def plan_toys(nodes: Mapping[str, Node], folder: Path, locations: Locations | None = None) -> Plan:
    """Plan nodes in the order in which they are given; files are looked for in `folder`."""
    specs = {name: toy_spec(name, node, folder, line=line) for line, (name, node) in enumerate(nodes.items(), 1)}
    return build_plan(specs, list(nodes), locations or Locations(models_dirs=[folder]))


def digest(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


@dataclass
class Workshop:
    """A folder with a store: runs toys and remembers what happened in the last run."""

    folder: Path
    events: list[Event] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    statuses: Mapping[str, NodeStatus] = field(default_factory=dict)
    numerics: Numerics = field(default_factory=lambda: Numerics("cpu"))

    @property
    def store(self) -> Store:
        return Store(self.folder / "cache")

    def assess(self, nodes: Mapping[str, Node], file_digest: Callable[[Path], Any] = digest) -> dict[str, NodeStatus]:
        return assess(plan_toys(nodes, self.folder), self.store, self.numerics, file_digest)

    def run(self, nodes: Mapping[str, Node], assessed_with: Callable[[Path], Any] = digest, **more: Any) -> RunResult:
        plan = plan_toys(nodes, self.folder)
        self.events.clear()
        self.log.clear()
        self.statuses = assess(plan, self.store, self.numerics, assessed_with)
        run = Run(
            plan=plan,
            statuses=self.statuses,
            store=self.store,
            numerics=self.numerics,
            device="cpu",
            models=lambda: self.log,
            file_digest=file_digest,
            emit=self.events.append,
            **{"overwrites": True, **more},
        )
        try:
            return run.execute()
        finally:
            self.log.append("end")
            run.close()

    def started(self) -> list[str]:
        """The nodes that were computed in the last run, in order."""
        return [event.node for event in self.events if isinstance(event, NodeStarted)]

    def warnings(self) -> list[str]:
        """The nodes that the last run warned of."""
        return [event.node for event in self.events if isinstance(event, Noted) and event.is_warning]

    def objects(self) -> list[Path]:
        """The stored objects' files, sorted by content."""
        return sorted((self.folder / "cache" / "objects").glob("*/*"), key=lambda path: path.read_bytes())

    def object_of(self, content: bytes) -> Path:
        """The one stored object with this content."""
        (path,) = {path for path in self.objects() if path.read_bytes() == content}
        return path


def damage(path: Path, how: str) -> None:
    """Damage a read-only file: flip a bit, cut, extend, empty or delete it."""
    payload = path.read_bytes()
    path.chmod(0o644)
    middle = len(payload) // 2
    if how == "flip":
        path.write_bytes(payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :])
    elif how == "cut":
        path.write_bytes(payload[:middle])
    elif how == "extend":
        path.write_bytes(payload + b"x")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "delete":
        path.unlink()
    else:
        assert how == "keep", how
