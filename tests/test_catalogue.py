"""The zoo's table and page: every variant, in its own words, as committed."""

import runpy
import sys
from pathlib import Path

import pytest

from attn_zoo import VARIANTS
from attn_zoo.catalogue import readme_zoo, refusals, zoo_page, zoo_table
from attn_zoo.report import renew_section

ROOT = Path(__file__).parents[1]


def test_the_page_and_the_readme_are_those_of_the_registry():
    renew = "renew them with: python -m attn_zoo.catalogue"
    assert (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8") == zoo_page(), renew
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert renew_section(readme, "zoo", readme_zoo()) == readme, renew


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_row_and_a_paragraph(name):
    v = VARIANTS[name]
    [section] = [s for s in zoo_page().split("\n### ") if s.startswith(f"{name}\n")]
    assert v.paper.key in section and str(v.paper.year) in section and "- Spec: `" + name in section and v.complexity in section
    assert all(reason.split(":")[0] in section for reason in refusals(v))
    assert f"[`{name}`](docs/zoo.md#{name})" in readme_zoo()
    assert name in zoo_table()


def test_families_stand_together():
    families = [v.family for v in VARIANTS.values()]
    assert [f for i, f in enumerate(families) if f not in families[:i]] == [f for i, f in enumerate(families) if i == 0 or f != families[i - 1]]


def test_arguments_are_refused_and_nothing_is_renewed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["catalogue", "--help"])
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail("it wrote"))
    with pytest.raises(SystemExit, match="'--help': it takes no arguments"):
        runpy.run_path(str(ROOT / "attn_zoo" / "catalogue.py"), run_name="__main__")
