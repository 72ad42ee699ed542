"""Runs transformers' own model and generation test suites against our classes, and counts.

    .venv/bin/python tests/suite/run.py [--checkout DIR] [--json FILE] [-k EXPRESSION]

The wheel of transformers has no tests. Its source distribution, which pip downloads, has those that all models share;
the generation suite and a few helpers are in the git repository alone. They are taken from `--checkout`, a clone near
the installed version, else from GitHub; where neither can be had the model suite runs without them, and says so.
Nothing that is fetched stays in this repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
GENERATION = "tests/generation/test_utils.py"
# What only the repository has, and what stands in for it: an empty mixin, or no common arguments of configs.
EXTRA = {
    GENERATION: "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "utils/test_module/custom_configuration.py": "",
}
EXPORTERS = "class ExportTesterMixin:\n    pass\n\n\nclass ExportGenerateTesterMixin:\n    pass\n"
MARKERS = (
    *("slow", "accelerate_tests", "generate", "all_generate", "training_ci", "tensor_parallel_ci"),
    *("torch_compile_test", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test"),
)
# Tests that do not fit, and why.
_LAYER = "wants transformers' GradientCheckpointingLayer; our blocks know no transformers (see tests/test_hf_train.py)"
NOT_RUN = {
    "test_gradient_checkpointing_enable_disable": _LAYER,
    "test_training_gradient_checkpointing": _LAYER,
    "test_model_weights_reload_no_missing_tied_weights": "loads a checkpoint without weights, which ours refuse",
    "_export": "torch.export, ONNX and ExecuTorch trace without values; our models look at masks and document starts",
}
# Beginnings of the reasons that transformers gives for a skip, and what they come from in our models. A reason that is
# not here fails the run.
_INTERFACE = (
    "attention is an op of ours: no maps of it are made, and no eager, sdpa or flash form of transformers is used"
)
_POSITIONS = "positions are each mixer's own business; the config has no rotary parameters and no table of positions"
_EXPERTS = "experts are an MLP of the backbone, not the module of transformers that these tests look into"
_STATE = "states are allocated once without a StaticCache, and a decoding step is not compiled: it is native already"
_ONE = "one config and one decoder"
_MACHINE = "needs hardware or a package that the machine of this run does not have"
WHY = {
    "Model architecture does not support attentions": _INTERFACE,
    "Model does not output attentions": _INTERFACE,
    "Model does not support output_attentions": _INTERFACE,
    "Parts of this model don't support sdpa": _INTERFACE,
    "SeqlibForCausalLM does not support `attn_implementation=sdpa`": _INTERFACE,
    "test requires Flash Attention": _INTERFACE,
    "test requires the kernels library": "kernels are our own, not those of the Hub",
    "test requires MPS": _MACHINE,
    "test requires accelerator": _MACHINE,
    "test requires multiple accelerators": _MACHINE,
    "test requires deepspeed": _MACHINE,
    "test requires optimum-quanto": "keys and values are not quantised; cache_implementation='quantized' is refused",
    "This model does not support the static cache format": _STATE,
    "This model doesn't support compilation without graph breaks": _STATE,
    "This model does not support RoPE scaling": _POSITIONS,
    "This model does not have RoPE": _POSITIONS,
    "Model does not have position embeddings": _POSITIONS,
    "<class 'seqlib.hf.modeling.SeqlibModel'> has no axial RoPE": _POSITIONS,
    "SeqlibModel does not support grouped_mm": _EXPERTS,
    "This model has no sparse experts": _EXPERTS,
    "This model has no `output_router_logits`": _EXPERTS,
    "No conversion found": "our checkpoints hold our names; other layouts are read by seqlib.from_pretrained",
    "Model does not have a TP plan": "layers are sharded by FSDP2 (tests/test_hf_ecosystem.py), not split over devices",
    "No MTP keys registered": "no heads that draft tokens; drafts come from a model, its first layers or the prompt",
    "Not a prioritized model for now": "seeds transformers' initialisers by module; ours start when they are built",
    "No sequence-to-sequence": _ONE,
    "This model is not composite": _ONE,
    "No subconfigs": _ONE,
}


def build(root: Path, version: str, checkout: Path | None) -> list[str]:
    """Lay out the folder that the suites run in; returns what could not be had."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", f"transformers=={version}", "-d", str(root)], check=False, text=True
    )
    if done.returncode:
        sys.exit(f"pip cannot download the source of transformers {version}")
    with tarfile.open(next(root.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(root / "source", filter="data")
    source = next((root / "source").iterdir())
    tests = root / "tests"
    missing = []
    for file in (source / "tests").glob("*.py"):
        _write(tests / file.name, file.read_text(encoding="utf-8"))
    for path, stand_in in EXTRA.items():
        text = _extra(checkout, version, path)
        if text is None:
            missing.append(path)
        _write(root / path, stand_in if text is None else text)
    _write(tests / "exporters/test_export.py", EXPORTERS)
    _write(tests / "utils/tiny_model_summary.json", "{}")
    _write(tests / "models/seqlib/test_modeling_seqlib.py", (HERE / "models.py").read_text(encoding="utf-8"))
    for folder in {file.parent for file in tests.rglob("*.py")} | {tests / "models"}:
        _write(folder / "__init__.py", "")
    _write(root / "pytest.ini", "[pytest]\nmarkers =\n" + "".join(f"    {name}\n" for name in MARKERS))
    (root / "src").mkdir()
    (root / "src/transformers").symlink_to(Path(transformers.__file__).parent)
    return missing


def _extra(checkout: Path | None, version: str, path: str) -> str | None:
    if checkout is not None:
        return (checkout / path).read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(GITHUB.format(version=version, path=path), timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.URLError:
        return None


def checkout_version(checkout: Path) -> str:
    """The version of transformers that a clone holds."""
    text = (checkout / "src/transformers/__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)[1]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def count(report: Path) -> dict:
    """Results by outcome; why tests were skipped, in transformers' words and in ours; failures."""
    outcomes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if "failure" in kinds or "error" in kinds:
            outcomes["failed"] += 1
            what = kinds.get("failure", kinds.get("error"))
            failed[name] = ((what.get("message") or "").splitlines() or [""])[0]
        elif "skipped" in kinds:
            outcomes["skipped"] += 1
            skipped[(kinds["skipped"].get("message") or "").strip()] += 1
        else:
            outcomes["passed"] += 1
    reasons = {
        reason: {"times": times, "why": next((why for begin, why in WHY.items() if reason.startswith(begin)), None)}
        for reason, times in skipped.most_common()
    }
    return {**outcomes, "reasons_of_skips": reasons, "failures": failed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="a clone of transformers near the installed version")
    parser.add_argument("--json", type=Path, help="where the counts go")
    parser.add_argument("-k", default="", help="run a part, as for pytest")
    asked = parser.parse_args()
    version = transformers.__version__
    if asked.checkout is not None and not (asked.checkout / GENERATION).is_file():
        sys.exit(f"--checkout {asked.checkout} is no clone of transformers: it has no {GENERATION}")
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
        environment = {"PYTHONPATH": str(extra), "HF_HUB_OFFLINE": "1", "RUN_SLOW": "1"}
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider"],
            cwd=root,
            env=os.environ | environment,
            check=False,
        )
        if not report.is_file():
            return 1
        origin = version if asked.checkout is None else checkout_version(asked.checkout)
        result = {
            "transformers": version,
            "generation_suite": None if GENERATION in missing else origin,
            "left_out": missing,
            "not_run": NOT_RUN,
            **count(report),
        }
    print(json.dumps(result, indent=1))
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unexplained = [reason for reason, said in result["reasons_of_skips"].items() if said["why"] is None]
    for reason in unexplained:
        print(f"skipped for a reason that this script does not know: {reason}")
    return 1 if result.get("failed") or unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
