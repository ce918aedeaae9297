"""The pages that people read, as tests look at them: headings, links, code blocks, command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")])
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A line of a code block that calls s2vflow, or such a call inside a sentence (`is_inline`)."""

    page: str
    line: str
    is_inline: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"

    @property
    def is_shell(self) -> bool:
        """Whether more than one call of the program stands in the line."""
        return not self.line.startswith("s2vflow ") or " || " in self.line

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call."""
        found = re.findall(r"(?:^|\bdo |\$\()s2vflow (.*?)(?=;| \|\|| &|\)|$)", self.line)
        return [shlex.split(call) for call in found]


def text_of(page: str) -> str:
    """Return a page's text."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language; "" for those that name none."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    """Return the text without code blocks and HTML comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors that forges give to headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def links(text: str) -> list[str]:
    """Return where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def commands() -> Iterator[Command]:
    """Yield every call of s2vflow, continued lines joined and comments cut off."""
    for page in PAGES:
        name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
        for block in blocks(text, ""):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#\s.*$", "", line).strip()
                if re.search(r"(?:^|\bdo |\$\()s2vflow ", line):
                    yield Command(name, line)
        for line in re.findall(r"`(s2vflow [a-z][^`|]+)`", prose(text)):
            yield Command(name, " ".join(line.split()), is_inline=True)
