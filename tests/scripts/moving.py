"""Stop a run and resume it with another number of processes, again and again."""

from comparing import killed_at
from launching import REPOSITORY, Launch


def deepspeed(config):
    return ["--deepspeed", REPOSITORY / "ds_configs" / f"{config}.json"] if config else []


def move(workplace, name: str, flags: list, worlds: tuple[int, ...]) -> Launch:
    """Train 8 steps, the first two on `worlds[0]` processes, the next two on `worlds[1]`, and so on to the end."""
    for number, world in enumerate(worlds[:-1]):
        # a resumed run first reads the file once; a signal at a step's line stops the run after the next step
        stop = killed_at("open", r"metrics\.jsonl$", 1 if number == 0 else 2, "SIGTERM")
        run = workplace.train(name, *flags, world=world, expect=75, **stop)
        assert f"after step {2 * number + 2} and saved" in run.read_json("state.json")["reason"]
    run = workplace.train(name, *flags, world=worlds[-1])
    assert f"resumes after step {2 * len(worlds) - 2} from" in run.text()
    return run
