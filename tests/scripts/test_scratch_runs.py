"""With --scratch-dir, a run killed while a checkpoint is being copied resumes from the previous one, bit for bit."""

import pytest
from comparing import OFTEN, assert_same_bits, killed_at, newest_step

# each event at which the run is killed, and the newest whole checkpoint at that time
DEATHS = [
    (("os.mkdir", r"zerotune-[0-9a-f]+-[^/]+/rank-0/\.writing-step-00000002$"), None),  # nothing written
    (("open", r"checkpoints/\.writing-step-00000002/optimizer\.pt$"), None),  # half of it copied
    (("os.rename", r"checkpoints/\.writing-step-00000004$"), 2),  # all copied, but it does not count yet
    (("open", r"checkpoints/step-00000004/COMPLETE$"), 2),
    (("os.rmdir", r"checkpoints/step-00000002$"), 4),  # the older one half deleted
]


@pytest.mark.slow
def test_a_run_killed_while_a_checkpoint_is_on_its_way(workplace, tmp_path):
    reference = workplace.train_once("undisturbed", *OFTEN)
    flags = [*OFTEN, "--scratch-dir", tmp_path]
    for death, newest in DEATHS:
        run = workplace.train("killed-scratch", *flags, expect=-9, **killed_at(*death))
        assert newest_step(run) == newest, death
    assert_same_bits(workplace.train("killed-scratch", *flags), reference)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_rank_killed_on_its_own_and_the_run_stopped_on_another_number(workplace, tmp_path):
    flags = [*OFTEN, "--deepspeed", "ds_configs/zero2.json", "--scratch-dir", tmp_path]
    name, own_file = "two-killed-scratch", r"checkpoints/\.writing-step-00000004/exp_avg_sq-00002"
    job = workplace.server.start(
        "train/sst2.py",
        workplace.train_flags(name, *flags),
        workplace.folder / name,
        world=2,
        rank=1,
        **killed_at("open", own_file),
    )
    run = job.wait()
    assert run.codes[1] == -9 and newest_step(run) == 2, run.text()
    stop = killed_at("open", r"checkpoints/\.writing-step-00000004/weight-00001", do="SIGTERM")
    run = workplace.train(name, *flags, world=1, expect=75, **stop)
    assert run.read_json("state.json")["state"] == "preempted"
    assert newest_step(run) == int(run.read_json("state.json")["reason"].split("after step ")[1].split()[0]) >= 5
    workplace.train(name, *flags, world=2)
    assert list(tmp_path.iterdir()) == []
