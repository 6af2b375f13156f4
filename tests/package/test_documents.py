"""The documents: Python blocks run, links lead somewhere, shown flags exist."""

import functools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spo_kernels import cli
from tests.helpers.processes import ROOT

# make gpu runs in environments without it
MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt

# not the whole root: trainers leave model cards in their output folders
FOLDERS = ("spo_kernels", "integrations", "benchmarks", "tests")
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))]
)
# the first lines of a block that mean something
NOT_RUN = "# not run: "
GOES_ON = "# goes on from the first block"
COMMAND_WORDS = ("spo-kernels", "spo_kernels.cli")
EXAMPLES = "spo_kernels.integrations.examples."


def tokens_of(path: Path):
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def blocks_of(*languages: str) -> list:
    """Return the fenced blocks of all documents as pytest parameters (path, line, source)."""
    found = []
    for path in DOCUMENTS:
        for token in tokens_of(path):
            if token.type == "fence" and token.info.strip() in languages:
                # the line after the fence, counted from 1
                line = token.map[0] + 2
                name = f"{path.relative_to(ROOT)}:{line}"
                found.append(pytest.param(path, line, token.content, id=name))
    return found


def links_of(path: Path) -> Iterator[str]:
    """Yield the target of every link and image."""
    for token in tokens_of(path):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield str(target)


def anchors_of(path: Path) -> set[str]:
    """Return the anchors that GitHub gives a document's headings."""
    tokens = tokens_of(path)
    anchors = set()
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeats = sum(
                re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one) is not None for one in anchors
            )
            anchors.add(f"{slug}-{repeats}" if repeats else slug)
    return anchors


PYTHON_BLOCKS = blocks_of("python")


@pytest.mark.parametrize(("path", "line", "source"), PYTHON_BLOCKS)
def test_python_block(path, line, source, tmp_path, monkeypatch) -> None:
    """Every block stands by itself or on the first one; it runs on a CPU, in an empty folder."""
    if source.startswith(NOT_RUN):
        pytest.skip(source.splitlines()[0].removeprefix(NOT_RUN))
    blocks = [(line, source)]
    if source.startswith(GOES_ON):
        blocks.insert(
            0, next(block.values[1:] for block in PYTHON_BLOCKS if block.values[0] == path)
        )
    monkeypatch.chdir(tmp_path)
    # the default backend compiles C++ for a minute
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for first_line, text in blocks:
        # the empty lines let a traceback show the document's own line
        exec(compile("\n" * (first_line - 1) + text, str(path), "exec"), names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path) -> None:
    for target in links_of(path):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors_of(file), f"{target}: no such heading"


def commands_in(source: str) -> Iterator[list[str]]:
    """Yield the words of each of our commands in a shell block, from its own name on."""
    for text in source.replace("\\\n", " ").splitlines():
        words = shlex.split(text, comments=True)
        for i, word in enumerate(words):
            if word in COMMAND_WORDS or word.startswith(EXAMPLES):
                yield words[i:]


def help_of(command: list[str], monkeypatch, capsys) -> str:
    """Return the help text that a command prints, with all the flags it has."""
    name, *words = command
    if name.startswith(EXAMPLES):
        # the method of the script that takes one decides which flags there are
        first = [word for word in words[:1] if not word.startswith("-")]
        monkeypatch.setattr(sys, "argv", [name, *first, "--help"])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(name, run_name="__main__")
        assert stop.value.code in (0, None)
    elif words[0] == "train":
        method = [words[i : i + 2] for i, word in enumerate(words) if word == "--method"]
        assert cli.main(["train", *sum(method, []), "--help-all"]) == 0
    else:
        with pytest.raises(SystemExit) as stop:
            cli.main([words[0], "--help"])
        assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("path", "line", "source"), blocks_of("sh", "bash"))
def test_shell_block(path, line, source, monkeypatch, capsys) -> None:
    """Commands of ours exist and have the flags that a document gives them."""
    for command in commands_in(source):
        flags = {word.partition("=")[0] for word in command if word.startswith("--")}
        known = set(re.findall(r"--[\w-]+", help_of(command, monkeypatch, capsys)))
        # these two are read before the flags are parsed
        known |= {"--config", "--help-all"}
        assert flags <= known, f"{shlex.join(command)}: no flag {sorted(flags - known)}"
