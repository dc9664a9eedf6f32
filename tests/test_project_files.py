"""What a project needs around its code: a licence that its metadata name, a changelog that knows the version, owners."""

import hashlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
# Of the text that the Apache Software Foundation publishes as LICENSE-2.0.txt.
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_licence_is_the_unmodified_text_and_in_the_metadata(project):
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0
    assert project["license"] == "Apache-2.0" and project["license-files"] == ["LICENSE"]
    assert project["authors"] == [{"name": "the jax_megamoe authors"}]
    # An expression and a classifier of a licence exclude each other.
    assert not any(classifier.startswith("License") for classifier in project["classifiers"])


def test_changelog_has_the_version_and_its_tag(project):
    version = project["version"]
    heading = rf"\n## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n\nTag `v{re.escape(version)}`\.\n"
    assert re.search(heading, (ROOT / "CHANGELOG.md").read_text())


def test_citation_is_of_the_version_in_the_changelog(project):
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    heading = f"\n## [{citation['version']}] - {citation['date-released']}\n"
    assert heading in (ROOT / "CHANGELOG.md").read_text()


def test_owners_own_what_exists():
    lines = (ROOT / "CODEOWNERS").read_text().splitlines()
    patterns = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    for pattern in patterns[1:]:
        assert (ROOT / pattern.lstrip("/")).exists(), pattern
