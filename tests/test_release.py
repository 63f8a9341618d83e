"""What a release stands on: one version everywhere, files that are what their readers expect, a dated changelog."""

import datetime
from pathlib import Path

import pytest
import yaml

import release
import trimtab

ROOT = Path(__file__).parents[1]


def test_the_version_is_one() -> None:
    assert set(release.versions().values()) == {trimtab.__version__}
    assert release.version() == trimtab.__version__


def test_versions_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "versions", lambda: {"a": "1", "b": "2"})
    with pytest.raises(SystemExit, match="versions differ: a 1, b 2"):
        release.version()


def test_a_version_is_released_once() -> None:
    """What is refused before a release; the tests and the wheel of the dated commit itself ask for neither."""
    now = trimtab.__version__
    assert release.check("# Changelog\n\n## [Unreleased]\n\n- A.\n") == now
    with pytest.raises(SystemExit, match=rf"has {now} already; begin the next version"):
        release.check(f"# Changelog\n\n## [Unreleased]\n\n- B.\n\n## [{now}] - 2026-12-01\n\n- A.\n")
    with pytest.raises(SystemExit, match="nothing under Unreleased"):
        release.check("# Changelog\n\n## [Unreleased]\n\n## [0.1.0] - 2026-01-01\n\n- A.\n")


def test_a_changelog_is_dated() -> None:
    before = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A.\n\n## [0.1.0] - 2026-01-01\n\n- B.\n"
    assert release.unreleased(before) == "### Added\n\n- A."
    after = release.dated(before, "0.2.0", datetime.date(2026, 12, 1))
    assert after.index("[Unreleased]") < after.index("## [0.2.0] - 2026-12-01\n\n### Added") < after.index("[0.1.0]")
    assert not release.unreleased(after)


def test_files_for_the_host_are_read() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]
    read = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    assert {"ci.yml", "bug.yml", "feature.yml", "config.yml", "CITATION.cff"} <= set(read)
    jobs = read["ci.yml"]["jobs"]
    assert "bash .ci/run" in [step.get("run") for step in jobs["all"]["steps"]]
    made = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in made for target in jobs["versions"]["strategy"]["matrix"]["what"])
