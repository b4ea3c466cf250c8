"""Two nodes: two agents of torchrun, or of deepspeed with a hostfile, each with its own HOME and caches.

1. The nodes train the same plan, pure and with every row once an epoch; rank 0's node alone caches the groups.
2. torchrun, without a shared disk: one node is killed with its agent in the second epoch; the other ends. Both started
   again, they resume at the exact next micro-batch from the last checkpoint that is complete on both, once the second
   has the model's files.
3. deepspeed, with a shared output directory: a ZeRO engine over both nodes resumes at the exact next micro-batch.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked import free_port
from helpers.launch import WORKER, zero_config
from helpers.toys import epochs_of, id_rows, rows_in, tiny_tokenizer

from commonit_trl import Rows, load_grouper

pytestmark = pytest.mark.slow

SIZES = [5, 12, 15]
OPTIONS = {
    "commonit_metric": "embedding",
    "commonit_num_groups": 3,
    "commonit_cache_dir": None,  # the node's own
    "commonit_report": True,
    "gradient_accumulation_steps": 2,
    "seed": 7,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_on_each_node": True,
}


def torchrun(directory, port, number):
    command = ["torchrun", "--nnodes", "2", "--node_rank", str(number), "--nproc_per_node", "1"]
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(port)]


def deepspeed(directory, port, number):
    hosts = directory / "hostfile"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n", encoding="utf-8")  # two names of this machine
    command = ["deepspeed", "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(number), "--no_local_rank"]
    return [*command, "--master_addr", "127.0.0.1", "--master_port", str(port)]


def launch(directory, runs, launcher=torchrun):
    """Train `runs` with one rank on each of two nodes; return the exit codes and output of their agents."""
    port, agents = free_port(), []
    for number in range(2):
        node = directory / f"node{number}"
        (node / "home").mkdir(parents=True, exist_ok=True)
        spec = node / "runs.json"
        spec.write_text(json.dumps([{"dir": str(node), **run} for run in runs]), encoding="utf-8")
        environment = os.environ | {
            "HOME": str(node / "home"),
            "HF_HOME": str(node / "hf"),
            "HF_DATASETS_CACHE": str(node / "datasets"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        program, *options = launcher(directory, port, number)
        with (node / "log").open("w", encoding="utf-8") as log:
            agents.append(
                subprocess.Popen(
                    [str(Path(sys.executable).with_name(program)), *options, str(WORKER), str(spec)],
                    cwd=node,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    try:
        codes = [agent.wait(timeout=1500) for agent in agents]
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):  # all processes of the node have ended
                os.killpg(agent.pid, signal.SIGTERM)
    return codes, [(directory / f"node{number}" / "log").read_text(encoding="utf-8") for number in range(2)]


def seen(directory, name):
    """Return the micro-batches of each optimizer step: step -> rank -> micro-step -> row numbers."""
    steps = {}
    for rank in range(2):
        lines = (directory / f"node{rank}" / f"{name}.ids.rank{rank}").read_text(encoding="utf-8").splitlines()
        for entry in map(json.loads, lines):
            steps.setdefault(entry["step"], [[], []])[rank].append(entry["ids"])
    return steps


def groups_of_rows(directory, name):
    """Return the group of each row, by the groups saved on the first node."""
    rows = Rows(id_rows(SIZES), tiny_tokenizer())
    return load_grouper(directory / "node0" / f"{name}-out" / "commonit").assign(rows)


def check_epochs(seen_steps, groups):
    """Assert that both epochs see every row, in steps of one group over both nodes."""
    for steps in epochs_of(seen_steps):
        assert set(rows_in(steps)) == set(range(sum(SIZES)))
        assert all(len({groups[row] for row in rows_in([step])}) == 1 for step in steps)


def checkpoints(directory, node, name):
    return {path.name for path in (directory / f"node{node}" / f"{name}-out").glob("checkpoint-*")}


def test_killed_node_comes_back(tmp_path, minilm):
    run = {"group_sizes": SIZES, "options": {**OPTIONS, "commonit_embedding_model": minilm}}
    kill = {"at": "micro-batch", "count": 17, "ranks": [1], "node": True}
    codes, outputs = launch(tmp_path, [{**run, "name": "whole"}, {**run, "name": "killed", "kill": kill}])
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL, outputs

    whole = seen(tmp_path, "whole")
    per_epoch, groups = len(whole) // 2, groups_of_rows(tmp_path, "whole")
    assert len(set(groups)) == 3
    check_epochs(whole, groups)
    caches = [tmp_path / f"node{number}" / "datasets" / "commonit" for number in range(2)]
    assert caches[0].is_dir() and not caches[1].exists()

    # The kill was in the second epoch, after the checkpoint of step 6; each node has its own part of it.
    assert per_epoch < 6 < max(seen(tmp_path, "killed")) < 9
    for node in range(2):
        assert checkpoints(tmp_path, node, "killed") == {"checkpoint-3", "checkpoint-6"}
        states = (tmp_path / f"node{node}" / "killed-out" / "checkpoint-6").glob("rng_state*")
        assert [path.name for path in states] == [f"rng_state_{node}.pth"]

    for name in ("resumed", "later"):
        for node in range(2):
            shutil.copytree(tmp_path / f"node{node}" / "killed-out", tmp_path / f"node{node}" / f"{name}-out")
        for checkpoint in ("checkpoint-3", "checkpoint-6"):  # transformers writes these on the first node only
            for file in ("config.json", "model.safetensors"):
                source, target = (tmp_path / f"node{node}" / f"{name}-out" / checkpoint / file for node in range(2))
                assert not target.exists()
                shutil.copy(source, target)
    (tmp_path / "node1" / "later-out" / "checkpoint-6" / "trainer_state.json").unlink()  # killed while writing it
    codes, outputs = launch(tmp_path, [{**run, "name": name, "resume": True} for name in ("resumed", "later")])
    assert codes == [0, 0], outputs
    for name, first in {"resumed": 6, "later": 3}.items():
        assert seen(tmp_path, name) == {step: ranks for step, ranks in whole.items() if step >= first}
    assert "no random state of rank" not in "".join(outputs)


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_and_resumes_over_a_hostfile(stage, tmp_path):
    pytest.importorskip("deepspeed")
    options = {**OPTIONS, "commonit_metric": "task", "save_steps": 7, "output_dir": str(tmp_path / "out")}
    del options["commonit_num_groups"], options["save_on_each_node"]
    run = {"group_sizes": SIZES, "options": options, "deepspeed": zero_config(stage)}
    checkpoint = str(tmp_path / "out" / "checkpoint-7")
    runs = [{**run, "name": "whole"}, {**run, "name": "resumed", "resume": checkpoint}]
    codes, outputs = launch(tmp_path, runs, deepspeed)
    assert codes == [0, 0], outputs

    result = json.loads((tmp_path / "node0" / "whole.json").read_text(encoding="utf-8"))
    assert (result["engine"], result["stage"], result["world_size"]) == ("DeepSpeedEngine", stage, 2)
    whole = seen(tmp_path, "whole")
    check_epochs(whole, id_rows(SIZES)["task"])
    assert len(whole) // 2 < 7 < len(whole)
    assert seen(tmp_path, "resumed") == {step: ranks for step, ranks in whole.items() if step >= 7}
