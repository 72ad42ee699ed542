"""Other people's tools around our models. What `make test` does not install is tried where it is there."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import tiny_config

from seqlib.hf import ByteTokenizer, SeqlibForCausalLM

TEXTS = ["to be, or not to be", "that is the question", "whether 'tis nobler in the mind", "to suffer"] * 4


@pytest.fixture
def speaker() -> SeqlibForCausalLM:
    torch.manual_seed(0)
    ids = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    return SeqlibForCausalLM(tiny_config("hybrid", d_model=32, **ids))


@pytest.mark.dist
def test_two_processes_shard_a_model_with_accelerate() -> None:
    """FSDP2 over every parameter, wrapped by block: losses and weights of three steps are those of one process."""
    pytest.importorskip("accelerate", reason="accelerate is not installed; pip install seqlib[lm]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    worker = Path(__file__).with_name("fsdp_worker.py")
    done = subprocess.run(
        [*launch, str(worker), "hybrid"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("packing", [False, True])
def test_sft_of_trl_learns(speaker: SeqlibForCausalLM, packing: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed; pip install trl")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; pip install seqlib[lm]")
    losses = []
    asked = trl.SFTConfig(
        str(tmp_path), max_steps=12, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        packing=packing, packing_strategy="bfd", max_length=32, per_device_train_batch_size=4, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": TEXTS})
    run = trl.SFTTrainer(speaker, args=asked, train_dataset=data, processing_class=ByteTokenizer())
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]


def test_the_evaluation_harness_reads_a_local_task(speaker: SeqlibForCausalLM, tmp_path: Path) -> None:
    """Its bits per byte are ours, and its model type "hf" opens a saved folder."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; pip install lm-eval")
    from lm_eval.tasks import TaskManager

    speaker.save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "text.jsonl"}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "device": "cpu", "max_length": 64},
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    said = found["results"]["local_text"]["bits_per_byte,none"]
    nats, count = 0.0, 0
    for text in TEXTS[:3]:
        ids = torch.tensor([[257, *text.encode()]])
        with torch.no_grad():
            nats += float(speaker(ids, labels=ids).loss) * len(text)
        count += len(text)
    assert said == pytest.approx(nats / count / math.log(2), rel=1e-4)
