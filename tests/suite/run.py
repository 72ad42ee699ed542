"""Runs transformers' own model and generation test suites against our classes, and counts.

    .venv/bin/python tests/suite/run.py [--checkout DIR] [--json FILE] [-k EXPRESSION]

The wheel of transformers has no tests. Its source distribution, which pip downloads, has those that all models share;
the generation suite and a few helpers are in the git repository alone. They are taken from `--checkout`, a clone of
the installed version, else from GitHub; where neither can be had the model suite runs without them, and says so.
Nothing that is fetched stays in this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import transformers

HERE = Path(__file__).parent
GITHUB = "https://raw.githubusercontent.com/huggingface/transformers/v{version}/{path}"
# What only the repository has, and what stands in for it: an empty mixin, or no common arguments of configs.
EXTRA = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
MARKERS = "generate", "all_generate", "training_ci", "tensor_parallel_ci", "flash_attn_test", "flash_attn_3_test"
# Tests that do not fit, and why.
_LAYER = "wants transformers' GradientCheckpointingLayer; our blocks know no transformers (see tests/test_hf_train.py)"
NOT_RUN = {
    "test_gradient_checkpointing_enable_disable": _LAYER,
    "test_training_gradient_checkpointing": _LAYER,
    "test_model_weights_reload_no_missing_tied_weights": "loads a checkpoint without weights, which ours refuse",
}


def build(root: Path, version: str, checkout: Path | None) -> list[str]:
    """Lay out the folder that the suites run in; returns what could not be had."""
    if checkout is None:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run(
            [*pip, "--no-build-isolation", f"transformers=={version}", "-d", str(root)], check=False, text=True
        )
        if done.returncode:
            sys.exit(f"pip cannot download the source of transformers {version}; give a clone of it as --checkout")
        with tarfile.open(next(root.glob("transformers-*.tar.gz"))) as archive:
            archive.extractall(root / "source", filter="data")
        source = next((root / "source").iterdir())
    else:
        source = checkout
    tests = root / "tests"
    missing = []
    for file in (source / "tests").glob("*.py"):
        _write(tests / file.name, file.read_text(encoding="utf-8"))
    for path, stand_in in EXTRA.items():
        text = _extra(source, version, path)
        if text is None:
            missing.append(path)
        _write(root / path, stand_in if text is None else text)
    _write(tests / "utils/tiny_model_summary.json", "{}")
    _write(tests / "models/seqlib/test_modeling_seqlib.py", (HERE / "models.py").read_text(encoding="utf-8"))
    for folder in {file.parent for file in tests.rglob("*.py")} | {tests / "models"}:
        _write(folder / "__init__.py", "")
    _write(root / "pytest.ini", "[pytest]\nmarkers =\n" + "".join(f"    {name}\n" for name in MARKERS))
    (root / "src").mkdir()
    (root / "src/transformers").symlink_to(Path(transformers.__file__).parent)
    return missing


def _extra(source: Path, version: str, path: str) -> str | None:
    if (source / path).is_file():
        return (source / path).read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(GITHUB.format(version=version, path=path), timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.URLError:
        return None


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def count(report: Path) -> dict:
    """Results by outcome, and every reason for a skip or failure with how often it was given."""
    outcomes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "failure" in kinds or "error" in kinds:
            outcomes["failed"] += 1
            what = kinds.get("failure", kinds.get("error"))
            failed[f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = (
                (what.get("message") or "").splitlines() or [""]
            )[0]
        elif "skipped" in kinds:
            outcomes["skipped"] += 1
            skipped[(kinds["skipped"].get("message") or "").strip()] += 1
        else:
            outcomes["passed"] += 1
    return {**outcomes, "reasons_of_skips": dict(skipped.most_common()), "failures": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a clone of transformers at the installed version")
    parser.add_argument("--json", type=Path, help="where the counts go")
    parser.add_argument("-k", default="", help="run a part, as for pytest")
    asked = parser.parse_args()
    version = transformers.__version__
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        missing = build(root, version, asked.checkout)
        for path in missing:
            print(f"{path} of transformers {version} could not be had (no --checkout, GitHub out of reach): left out")
        extra = root / "site"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(extra)]
        subprocess.run([*pip, "parameterized", "httpx"], check=True)
        report = root / "report.xml"
        chosen = " and ".join([*(f"not {name}" for name in NOT_RUN), *([f"({asked.k})"] if asked.k else [])])
        arguments = ["tests/models/seqlib", "-q", "--tb=short", f"--junitxml={report}", "-k", chosen]
        environment = {"PYTHONPATH": str(extra), "HF_HUB_OFFLINE": "1"}
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"],
            cwd=root,
            env=os.environ | environment,
            check=False,
        )
        if not report.is_file():
            return 1
        result = {"transformers": version, "left_out": missing, "not_run": NOT_RUN, **count(report)}
    print(json.dumps(result, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
