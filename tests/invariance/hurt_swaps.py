"""Swaps that are hurt on the way: killed, out of disk, into places that cannot be written.

Run as a program: FOLDER SEED. It lets `kuea-mllm swap` run into every kind of trouble, and prints
what it saw as one JSON object.
"""

import json
import os
import random
import resource
import shutil
import signal
import stat
import sys
import time
from pathlib import Path

import torch
from swap_world import NOT_PERMITTED, SHARD_MB, Child, World, digest, make_read_only, mount_small

TIMED_KILLS = 6


def killed_at_every_step(world):
    """Kill a swap with signal 9 right before each of its file operations, all in one place."""
    place = world.new_place()
    steps = steps_of_a_swap(world, place)
    rounds = []
    for fatal in range(1, steps + 1):

        def die(step, is_last, fatal=fatal):
            if step == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        child = Child(world, place, before=die)
        rounds.append(look_at_end_of(child, world, place))
    return {"rounds": rounds, "again": undisturbed(world, place)}


def killed_between_steps(world, choose):
    """Kill swaps a moment after a random file operation began, such as the writing of a shard."""
    place = world.new_place()
    steps = steps_of_a_swap(world, place)
    rounds = []
    while sum(each["exit"] == -signal.SIGKILL for each in rounds) < TIMED_KILLS:
        child = Child(world, place)
        begun, wanted = 0, choose.randint(1, steps)
        while begun < wanted and (found := os.read(child.steps, wanted - begun)):
            begun += len(found)
        time.sleep(choose.uniform(0, 0.005))
        os.kill(child.pid, signal.SIGKILL)
        rounds.append(look_at_end_of(child, world, place))
    return {"rounds": rounds, "again": undisturbed(world, place)}


def steps_of_a_swap(world, place):
    """Count the file operations of a swap; nothing is left of it."""
    whole = Child(world, place)
    assert whole.wait() == 0, whole.said()
    shutil.rmtree(place / "out")
    return len(os.read(whole.steps, 10_000))


def look_at_end_of(child, world, place):
    """Say what a child left, and make room for the next."""
    seen = {"exit": child.wait(), **world.seen(place)}
    if (place / "out").exists():
        shutil.rmtree(place / "out")
    return seen


def undisturbed(world, place):
    """Run a swap to its end where others were killed, a while later."""
    for leftover in place.iterdir():
        os.utime(leftover, (0, 0))
    child = Child(world, place)
    return {"exit": child.wait(), "said": child.said(), **world.seen(place)}


def asked_to_end(world, choose):
    """Send the signals of Ctrl-C and of a job scheduler at random steps."""
    rounds = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        # Earlier, there is nothing to leave.
        fatal = choose.randint(8, 20)

        def stop(step, is_last, fatal=fatal, number=number):
            if step == fatal:
                os.kill(os.getpid(), number)

        place = world.new_place()
        child = Child(world, place, before=stop)
        rounds.append({"exit": child.wait(), **world.seen(place)})
    return rounds


def out_of_disk(world):
    """Let files end at some size, as on a full disk (EFBIG stands in for ENOSPC)."""
    largest = max(path.stat().st_size for path in world.base.iterdir())
    rounds = []
    for limit in (30_000, 1_000_000, largest // 2, largest - 1):
        place = world.new_place()
        child = Child(
            world,
            place,
            prepare=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        rounds.append({"exit": child.wait(), "said": child.said(), **world.seen(place)})
    return rounds


def small_file_system(world):
    """Swap into file systems that are too small; hard links do not work there either."""
    rounds = []
    for megabytes in (1, SHARD_MB + 2, 2 * SHARD_MB - 1):
        place = world.new_place()
        child = Child(
            world,
            place,
            prepare=lambda place=place, size=megabytes: mount_small(place, size),
            after=lambda place=place: world.seen(place),
        )
        if child.wait() == NOT_PERMITTED:
            return None
        rounds.append({"exit": child.wait(), "said": child.said(), **child.found()})
    return rounds


def read_only_target(world):
    """Swap into a directory that cannot be written."""
    place = world.new_place()
    child = Child(
        world, place, prepare=lambda: make_read_only(place), after=lambda: world.seen(place)
    )
    return {"exit": child.wait(), "said": child.said(), **child.found()}


def read_only_base(world):
    """Swap from a base that cannot be written."""
    place = world.new_place()
    child = Child(world, place, prepare=lambda: make_read_only(world.base))
    seen = {"exit": child.wait(), "said": child.said(), **world.seen(place)}
    world.base.chmod(stat.S_IRWXU)
    return seen


def two_at_once(world):
    """Let two swaps of different towers meet right before each of them gives OUT its name."""
    place = world.new_place()
    ready, go = [os.pipe() for _ in range(2)], os.pipe()

    def meet(mine):
        def wait(step, is_last):
            if is_last:
                os.write(mine, b".")
                os.read(go[0], 1)

        return wait

    children = []
    for tower, (_, mine) in zip(("one", "two"), ready, strict=True):
        children.append(Child(world, place, tower=tower, before=meet(mine)))
        os.close(mine)
    met = sum(len(os.read(side, 1)) for side, _ in ready)
    os.write(go[1], b"..")
    exits = [child.wait() for child in children]
    said = [child.said() for child in children]
    return {"met": met, "exits": exits, "said": said, **world.seen(place)}


def live_one_beside(world):
    """Run a swap while another, that looks abandoned by its age, is about to finish."""
    place = world.new_place()
    ready, go = os.pipe(), os.pipe()

    def wait(step, is_last):
        if is_last:
            os.write(ready[1], b".")
            os.read(go[0], 1)

    slow = Child(world, place, tower="two", before=wait)
    os.read(ready[0], 1)
    (partial,) = place.iterdir()
    os.utime(partial, (0, 0))
    before = digest(partial)
    fast = Child(world, place)
    seen = {"exits": [fast.wait()], **world.seen(place)}
    seen["is_untouched"] = partial.is_dir() and digest(partial) == before
    os.write(go[1], b".")
    seen["exits"].append(slow.wait())
    return {**seen, "said": slow.said(), "left": world.seen(place)}


def somebody_elses_files(world):
    """Let another program make OUT while the swap is at work."""
    place = world.new_place()

    def intrude(step, is_last):
        if is_last:
            (place / "out").mkdir(exist_ok=True)
            (place / "out" / "mine.txt").write_text("precious")

    child = Child(world, place, before=intrude)
    code = child.wait()
    kept = [path.name for path in (place / "out").iterdir()]
    left = sorted(path.name for path in place.iterdir() if path.name != "out")
    return {"exit": code, "said": child.said(), "kept": kept, "leftovers": left}


def main():
    # A shell starts its background jobs with Ctrl-C ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    choose = random.Random(seed)
    world = World(folder)
    seen = {
        "killed_at_every_step": killed_at_every_step(world),
        "killed_between_steps": killed_between_steps(world, choose),
        "asked_to_end": asked_to_end(world, choose),
        "out_of_disk": out_of_disk(world),
        "small_file_system": small_file_system(world),
        "read_only_target": read_only_target(world),
        "read_only_base": read_only_base(world),
        "two_at_once": two_at_once(world),
        "live_one_beside": live_one_beside(world),
        "somebody_elses_files": somebody_elses_files(world),
    }
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
