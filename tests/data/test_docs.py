"""Every example of docs/data.md is read, as the page says it is."""

import json
import re
from pathlib import Path

import pytest
import yaml

from truetune.config.sft import SFTConfig
from truetune.data import registry
from truetune.data.formats import FORMATS, detect, parse_rows
from truetune.data.formats.columns import parse_columns
from truetune.data.schema import Origin, RawRow
from truetune.data.templates import BUILT_IN
from truetune.errors import DataError

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json ([\w-]+)(?: --columns ([^\n]*))?\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("name", "columns", "text"), EXAMPLES, ids=[f"{e[0]} {e[1]}".strip() for e in EXAMPLES])
def test_an_example_is_read_as_its_format(name: str, columns: str, text: str) -> None:
    raw = [RawRow(Origin("page", n), json.loads(line)) for n, line in enumerate(text.strip().splitlines(), 1)]
    mapped = parse_columns(columns.split())
    if name == "chosen":
        with pytest.raises(DataError, match="--format chosen"):
            detect(raw)
    elif not mapped:
        assert detect(raw) == name
    rows, rejects = parse_rows(raw, name if name == "chosen" else "auto", columns=mapped)
    assert (len(rows), rejects) == (len(raw), [])


def test_every_format_has_an_example() -> None:
    assert {name for name, _, _ in EXAMPLES} == {form.NAME for form in FORMATS}


def test_the_registry_on_the_page_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "data.yaml").write_text(text, encoding="utf-8")
    (name,) = yaml.safe_load(text)
    entry = registry.entry_of(str(tmp_path / "data.yaml"), name)
    assert entry.files == (str(tmp_path / "tickets" / "*.jsonl"),)
    assert (entry.form, entry.weight, set(entry.columns)) == ("alpaca", 0.5, {"instruction", "output"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_named_template_is_on_the_page_and_in_the_help(name: str) -> None:
    assert f"`{name}`" in PAGE
    assert name in str(SFTConfig.model_fields["template"].description)
