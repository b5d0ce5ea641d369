"""A state machine of one run's store: attempts begin, commit, are overtaken and die anywhere, objects rot. After every
step the newest whole checkpoint can be restored, and retention has deleted nothing that it needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from watched import WatchedStore

from job.errors import Fenced, NoValidCheckpoint
from job.store import RunStore, Store
from job.store.checkpoints import CheckpointWriter
from job.store.commit import fence
from job.store.records import Record
from job.store.restore import list_older, read_manifest, restore_newest

KEEP = 2


class Died(BaseException):
    """The process is gone: nothing in the code under test may catch it."""


class MortalStore(WatchedStore):
    """A store that dies before its n-th change, if told so."""

    def __init__(self, inside: Store) -> None:
        super().__init__(inside, before=self._live)
        self.left: int | None = None

    def _live(self, method: str, key: str) -> None:
        if self.left == 0:
            raise Died
        if self.left is not None:
            self.left -= 1


class StoreMachine(RuleBasedStateMachine):
    """`rotten` is the model: the manifests of which an object was damaged."""

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.plain = RunStore(str(self.place / "store"), "run-1")
        self.epoch, self.step = 0, 0
        self.rotten: set[str] = set()
        self.attempts: list[tuple[CheckpointWriter, MortalStore, int]] = []
        self.start_attempt()

    def teardown(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)

    @rule()
    def start_attempt(self) -> None:
        """A new attempt owns the run, fences, and restores what is there."""
        self.epoch += 1
        nonce = f"{self.epoch:032x}"[::-1]
        self.plain.write_json("owner.json", {"epoch": self.epoch, "nonce": nonce})
        fence(self.plain.objects, self.epoch, nonce)
        restored = self.restore()
        about: Record = {"epoch": self.epoch, "nonce": nonce, "keep": KEEP, "peer_timeout_s": 5.0}
        if restored:
            about |= {"committed": restored.committed}
            self.step = restored.manifest.about["step"]
        store = RunStore(str(self.place / "store"), "run-1")
        mortal = MortalStore(store.objects)
        store.objects = mortal
        self.attempts.append((CheckpointWriter(store, 0, 1, about), mortal, self.epoch))

    @rule()
    def commit(self) -> None:
        """The owner commits a checkpoint."""
        self._commit(self.attempts[-1][0])

    @rule(changes=st.integers(0, 12))
    def die_in_a_commit(self, changes: int) -> None:
        """The owner dies somewhere in a commit; another attempt begins."""
        writer, mortal, _ = self.attempts[-1]
        mortal.left = changes
        try:
            self._commit(writer)
        except Died:
            pass
        self.attempts.pop()
        self.start_attempt()

    @precondition(lambda self: len(self.attempts) > 1)
    @rule(data=st.data())
    def commit_as_a_zombie(self, data: Any) -> None:
        """An attempt that was overtaken wakes up; it may leave garbage, but moves no pointer."""
        writer, _, _ = data.draw(st.sampled_from(self.attempts[:-1]))
        before = self.plain.objects.read("current.json")
        try:
            self._commit(writer)
        except Fenced:
            pass
        else:
            raise AssertionError("a zombie committed")
        assert self.plain.objects.read("current.json") == before

    @precondition(lambda self: self.rottable())
    @rule(data=st.data())
    def let_an_object_rot(self, data: Any) -> None:
        """One object that only the newest checkpoint needs loses its last byte."""
        victim = self.place / "store/runs/run-1" / data.draw(st.sampled_from(self.rottable()))
        victim.write_bytes(victim.read_bytes()[:-1])
        self.rotten.add(self.named()[0])
        self.start_attempt()

    def named(self) -> list[str]:
        """Return the manifests that current.json names, newest first."""
        pointer = self.plain.read_json("current.json") or {}
        return [entry["manifest"] for entry in (pointer, *list_older(pointer)) if entry.get("manifest")]

    def rottable(self) -> list[str]:
        """Return objects of the newest checkpoint, where another one that needs none of them is kept and whole."""
        named = self.named()
        if len(named) < 2 or self.rotten & set(named):
            return []
        newest, other = (read_manifest(self.plain.objects, key) for key in named[:2])
        keys = {entry.key for entry in newest.files.values()} | {named[0]}
        return sorted(keys - {entry.key for entry in other.files.values()})

    def _commit(self, writer: CheckpointWriter) -> None:
        self.step += 1
        folder = self.place / f"checkpoint-{self.step}-{os.urandom(4).hex()}"
        folder.mkdir()
        (folder / "model.safetensors").write_text(f"weights {self.step} {os.urandom(4).hex()}")
        (folder / "tokenizer.json").write_text("never changes")
        writer.commit(folder, self.step, {"world_size": 1})

    def restore(self) -> Any:
        pointer, _ = fence(self.plain.objects, self.epoch, f"{self.epoch:032x}"[::-1])
        scratch = self.place / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        return restore_newest(self.plain.objects, pointer, scratch, 1 << 20)

    @invariant()
    def what_was_committed_can_be_restored(self) -> None:
        if hasattr(self, "plain"):
            whole, restored = [key for key in self.named() if key not in self.rotten], self.restore()
            if whole:
                assert restored is not None
                assert restored.key == whole[0]

    @invariant()
    def no_more_is_kept_than_asked_for(self) -> None:
        if hasattr(self, "plain"):
            assert len(self.named()) <= KEEP


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=int(os.environ.get("MACHINE_EXAMPLES", "15")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_machine_can_see_a_lost_checkpoint() -> None:
    """The invariant is no formality: without the objects, restoring fails."""
    machine = StoreMachine()
    machine.begin()
    machine.commit()
    for folder in (machine.place / "store/runs/run-1/checkpoints").iterdir():
        shutil.rmtree(folder)
    try:
        machine.what_was_committed_can_be_restored()
    except NoValidCheckpoint:
        return
    finally:
        machine.teardown()
    raise AssertionError("a lost checkpoint was not noticed")
