"""The page of a preview: it holds the rows and figures, reaches for nothing, and no row brings markup into it."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from truetune.cli.main import main

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; $title"
ROWS = [
    {"instruction": EVIL, "output": f"plain {EVIL}\u202e"},
    {"instruction": "no answer <b>"},
    *({"instruction": f"Count to {n}", "output": " ".join(map(str, range(n)))} for n in range(1, 8)),
]


class Outline(HTMLParser):
    """Tags with their attributes, and the text outside of script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if not self.inside:
            self.text.append(data)


def write(tmp_path: Path, model: Path, *flags: str, rows: list[Any] | None = None) -> tuple[str, Outline]:
    data = tmp_path / "rows <i>.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS), encoding="utf-8")
    path = tmp_path / "new" / "page.html"
    assert main(["preview", "--model", str(model), "--data", str(data), "--html", str(path), *flags]) in (0, 1)
    text = path.read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(text)
    return text, outline


def test_no_row_brings_markup_into_the_page(tmp_path: Path, tiny_model: Path) -> None:
    _, outline = write(tmp_path, tiny_model)
    names = [tag for tag, _ in outline.tags]
    assert (names.count("script"), names.count("style"), names.count("img")) == (1, 1, 0)
    assert not any(name.startswith("on") for _, attributes in outline.tags for name in attributes)
    shown = "".join(outline.text)
    assert f"plain {EVIL}⟨U+202E⟩" in shown
    assert '{"instruction": "no answer <b>"}' in shown
    assert "rows <i>.jsonl, row 2" in shown


def test_the_page_reaches_for_nothing_and_runs_only_its_own_script(tmp_path: Path, tiny_model: Path) -> None:
    text, outline = write(tmp_path, tiny_model)
    assert not any(name in ("src", "href", "action") for _, attributes in outline.tags for name in attributes)
    policy = next(a["content"] for tag, a in outline.tags if tag == "meta" and "http-equiv" in a) or ""
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in outline.tags)  # the policy would block it


def test_the_page_holds_every_row_and_its_figures(tmp_path: Path, tiny_model: Path) -> None:
    _, outline = write(tmp_path, tiny_model, "--val-split", "0.3", "--max-bad-rows", "1")
    parts = [attributes["data-part"] for tag, attributes in outline.tags if tag == "article"]
    assert len(parts) == 9
    assert {part: parts.count(part) > 0 for part in ("train", "held_out", "rejected")} == dict.fromkeys(
        ("train", "held_out", "rejected"), True
    )
    shown = "".join(outline.text)
    assert "9 of 9" in shown
    assert "truetune sft would train on this" in shown
    bars = [attributes for tag, attributes in outline.tags if tag == "rect"]
    assert bars


def test_trained_tokens_special_tokens_and_ids_are_marked(tmp_path: Path, tiny_model: Path) -> None:
    text, _ = write(tmp_path, tiny_model, "--rows", "4")
    (row,) = re.findall(r"<article.*?</article>", text, re.DOTALL)
    assert re.search(r"<u title=\d+>&lt;\|im_start\|&gt;</u>", row)
    assert re.search(r"<em title=\d+>&lt;\|im_end\|&gt;</em>", row)
    assert re.search(r"<b title=\d+>0</b><b title=\d+> </b><b title=\d+>1</b><em", row)
    assert '<span class="mark">↵</span>\n' in row


def test_a_very_long_row_is_cut_on_the_page_and_says_so(tmp_path: Path, make_tiny: Any) -> None:
    model = make_tiny(tmp_path / "model", max_position_embeddings=4096)
    text, _ = write(tmp_path, model, "--max-length", "4000", rows=[{"instruction": "a", "output": "x" * 2500}])
    assert re.search(r"… \d+ tokens that are not shown", text)


def test_a_folder_is_no_page(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(ROWS[2]) + "\n")
    assert main(["preview", "--model", str(tiny_model), "--data", str(data), "--html", str(tmp_path)]) == 2
    assert "expected   the name of the page" in capsys.readouterr().err


def test_a_place_that_can_not_be_written_is_said_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    page = tmp_path / "file" / "page.html"
    assert main(["preview", "--model", "nowhere", "--data", "nothing", "--html", str(page)]) == 2
    assert f"--html {page}: can't be written" in capsys.readouterr().err
