"""Warming without a server: sources, pace, journal, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from a3_sglang.cli.app import app
from a3_sglang.local_server import free_port
from a3_sglang.warm import Document, Pace, ServerError, warm
from a3_sglang.warm.journal import Journal
from a3_sglang.warm.sources import STANDARD_INPUT, InvalidSource, count, files, read

SYSTEM = "Answer in one word."


def test_every_line_is_a_document_or_named(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "One.", "id": 7}',
        b'{"text": "Two.", "title": "second", "id": 8}',
        b"",
        b'{"text": "  "}',
        b'{"messages": [], "text": "no"}',
        b'["Three."]',
        b"{broken",
        b'{"text": "\xff"}',
        b'{"text": 4}',
        b'{"text": "Last."}',
    ]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = list(read([path]))
    good = [one for one in found if isinstance(one, Document)]
    wrong = {one.place.rpartition(":")[2]: one.reason for one in found if isinstance(one, InvalidSource)}
    assert good == [Document("One.", "7"), Document("Two.", "second"), Document("Last.", f"{path}:10")]
    assert list(wrong) == ["4", "5", "6", "7", "8", "9"]
    assert '"text"' in wrong["4"]
    assert '"messages"' in wrong["5"]
    assert "JSON" in wrong["7"]
    assert "UTF-8" in wrong["8"]
    assert count([path]) == len(found)


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.txt", "picture.png", "lines.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"Text of {name}.")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    found = list(read(files([tmp_path])))
    assert [Path(one.name if isinstance(one, Document) else one.place).name for one in found] == [
        "a.md",
        "b.txt",
        "latin.txt",
        "c.txt",
    ]
    assert found[2] == InvalidSource(str(tmp_path / "latin.txt"), "it is not UTF-8 (byte 2)")
    assert found[3] == Document("Text of sub/c.txt.", str(tmp_path / "sub" / "c.txt"))


@pytest.mark.parametrize(("name", "said"), [("gone.jsonl", "no such file"), ("a.pdf", ".jsonl"), ("empty", "no .txt")])
def test_a_source_that_cannot_be_read_is_an_error_at_once(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "a.pdf").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=said) as raised:
        files([tmp_path / name])
    assert name in str(raised.value)
    assert files([STANDARD_INPUT]) == [STANDARD_INPUT]


def test_starts_are_apart_and_do_not_catch_up() -> None:
    pace = Pace(4)
    assert [pace.delay(now) for now in (10.0, 10.0, 10.1, 10.75, 20.0, 20.0)] == pytest.approx(
        [0, 0.25, 0.4, 0, 0, 0.25]
    )
    free = Pace(None)
    assert [free.delay(now) for now in (1.0, 1.0)] == [0, 0]


@pytest.mark.parametrize("bad", [{"concurrency": 0}, {"rate": 0}, {"rate": float("nan")}])
def test_bad_arguments_are_errors_of_the_call(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        warm("http://127.0.0.1:1", [], **bad)


def test_a_journal_knows_the_documents_of_this_start_and_beginning(tmp_path: Path) -> None:
    path, one, other = tmp_path / "done.jsonl", Document("One."), Document("Other.")
    journal = Journal(path, "start", (SYSTEM, None))
    assert journal.tokens(one) is None
    journal.add(one, 40)
    journal.add(other, 50)
    again = Journal(path, "start", (SYSTEM, None))
    assert (len(again), again.tokens(Document(" One.\n", "renamed")), again.tokens(other)) == (2, 40, 50)
    assert Journal(path, "later", (SYSTEM, None)).tokens(one) is None
    assert Journal(path, "start", ("Another system message.", None)).tokens(one) is None
    assert Journal(path, "start", (SYSTEM, "tenant")).tokens(one) is None
    again.forget()
    again.add(other, 50)
    with path.open("a") as file:
        file.write('{"start": "start", "docu')
    last = Journal(path, "start", (SYSTEM, None))
    assert (last.tokens(one), last.tokens(other)) == (None, 50)
    last.add(one, 40)
    assert len(Journal(path, "start", (SYSTEM, None))) == 2


def test_a_journal_does_not_touch_other_files(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "One."}\n{"text": "Two."}')
    with pytest.raises(ValueError, match=r"documents\.jsonl:1"):
        Journal(path, "start", ())
    assert path.read_text() == '{"text": "One."}\n{"text": "Two."}'


def test_no_server_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Text.")
    for url in (f"http://127.0.0.1:{free_port()}", "localhost:30000"):
        with pytest.raises(ServerError, match=url):
            next(warm(url, [Document("Text.")]))
        done = CliRunner().invoke(app, ["warm", str(path), "--url", url])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert url in done.stderr
