"""A LLaVA of two shards, towers to swap into it, and processes that do so and can be stopped.

The swaps are forked children, since importing takes far longer than swapping here. Audit hooks (PEP
578) stop a child right before a chosen file operation, whatever the code is called that does it.
"""

import ctypes
import hashlib
import json
import os
import shutil
import stat
import sys
import time

import torch
from transformers import (
    CLIPVisionModelWithProjection,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from kuea_mllm.cli.main import run
from kuea_mllm.miniworld import ASSETS

# Words enough that copying a shard takes milliseconds, so that a kill can land in the middle.
VOCABULARY, SHARD_MB = 30_000, 13
NOT_PERMITTED = 77
# Of unshare(2) and mount(2).
NEW_NAMESPACE, READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1 << 17, 1, 32, 4096, 1 << 14, 1 << 18


def make_world(folder):
    """Write the base and two towers that descend from its own."""
    torch.manual_seed(0)
    config = LlavaConfig.from_pretrained(ASSETS / "llava")
    config.text_config.vocab_size = VOCABULARY
    model = LlavaForConditionalGeneration(config)
    tower = CLIPVisionModelWithProjection.from_pretrained(ASSETS / "clip")
    own = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    model.model.vision_tower.load_state_dict(own, strict=False)
    base = folder / "base"
    model.save_pretrained(base, max_shard_size=f"{SHARD_MB}MB")
    for file in (ASSETS / "llava").iterdir():
        if file.name.startswith(("tokenizer", "processor", "preprocessor")):
            shutil.copyfile(file, base / file.name)
    for name in ("one", "two"):
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        tower.save_pretrained(folder / name)
        shutil.copyfile(
            ASSETS / "clip" / "preprocessor_config.json",
            folder / name / "preprocessor_config.json",
        )


def digest(directory):
    """Return the content of every file below a directory, hidden ones too, as a hash each."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class World:
    """The base, the towers and what a swap that nothing disturbs writes."""

    def __init__(self, folder):
        self.folder = folder
        make_world(folder)
        self.base = folder / "base"
        self.untouched = digest(self.base)
        self.references = {}
        for tower in ("one", "two"):
            place = self.new_place()
            # In this process: whatever is imported on the way is then there for all children.
            assert swap(self, place, tower) == 0
            self.references[tower] = self.content(place / "out")

    def new_place(self):
        """Make an empty directory that nothing else writes to."""
        place = self.folder / f"place-{len(list(self.folder.glob('place-*')))}"
        place.mkdir()
        return place

    def content(self, out):
        """Return what a model directory holds, without what tells when and how it was made."""
        found = digest(out)
        manifest = json.loads((out / "kuea.json").read_text())
        for name in ("created", "seconds", "command"):
            manifest.pop(name, None)
        del found["kuea.json"]
        # A card may carry the date.
        found.pop("README.md", None)
        return {"files": found, "manifest": manifest}

    def seen(self, place):
        """Say in which state a place and the base are."""
        names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
        out = place / "out"
        state = "absent"
        if out.exists():
            same = [k for k, v in self.references.items() if v == self.content(out)]
            state = same[0] if same else "wrong"
        return {
            "out": state,
            "leftovers": [name for name in names if name != "out"],
            "base_is_untouched": digest(self.base) == self.untouched,
        }


def swap(world, place, tower):
    """Run the command in this process; return its exit code."""
    sys.argv = ["kuea-mllm", "swap", f"--base={world.base}", f"--tower={world.folder / tower}"]
    # Running the towers takes longer than all the rest and comes before the first write.
    sys.argv += [f"--out={place / 'out'}", "--no-drift"]
    try:
        run()
    except SystemExit as end:
        return end.code or 0
    return 0


class Child:
    """One `kuea-mllm swap` in a forked process."""

    def __init__(self, world, place, *, tower="one", prepare=None, before=None, after=None):
        notes = world.folder / f"child-{time.monotonic_ns()}"
        self._said, self._found = notes.with_suffix(".txt"), notes.with_suffix(".json")
        self.steps, announce = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.steps)
            code = 70
            try:
                out = os.open(self._said, os.O_WRONLY | os.O_CREAT)
                os.dup2(out, 1)
                os.dup2(out, 2)
                if prepare:
                    prepare()
                watch(place, announce, before)
                code = swap(world, place, tower)
            finally:
                if after:
                    self._found.write_text(json.dumps(after()))
                os._exit(code)
        os.close(announce)
        self.status = None

    def wait(self):
        """Return the exit code, or minus the signal that ended it."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def said(self):
        """Return what it printed."""
        return self._said.read_text()

    def found(self):
        """Return what `after` returned in the child."""
        return json.loads(self._found.read_text())


def watch(place, announce, before):
    """Announce every step that touches a path below a place; before it, call `before`."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        names = [str(each) for each in arguments if isinstance(each, str | os.PathLike)]
        if any(name.startswith(f"{place}/") for name in names):
            count += 1
            os.write(announce, b".")
            if before:
                before(count, event == "os.rename" and names[-1] == str(place / "out"))

    sys.addaudithook(hook)


def mount_small(place, megabytes):
    """Mount an empty file system on a place, for this process alone; end if that is forbidden."""
    libc = ctypes.CDLL(None)
    options = f"size={megabytes}m".encode()
    if not own_namespace(libc) or libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, options):
        os._exit(NOT_PERMITTED)


def make_read_only(directory):
    """Forbid to write: by the mode, and where that does not bind (root), by a mount."""
    directory.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() == 0:
        libc, path = ctypes.CDLL(None), bytes(directory)
        done = own_namespace(libc) and not libc.mount(path, path, None, BIND, None)
        if not done or libc.mount(None, path, None, BIND | REMOUNT | READ_ONLY, None):
            os._exit(NOT_PERMITTED)


def own_namespace(libc):
    """Give this process mounts of its own; tell whether that was allowed."""
    if libc.unshare(NEW_NAMESPACE):
        return False
    return not libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None)
