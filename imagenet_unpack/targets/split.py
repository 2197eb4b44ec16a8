"""The state of one split of a target, and the only code that changes it.

| state      | on the disk                                   | transitions                                             |
|------------|-----------------------------------------------|---------------------------------------------------------|
| ABSENT     | nothing, or an empty folder                   | begin -> STAGED                                         |
| STAGED     | plan.json                                     | begin (continue), commit; publish -> PUBLISHED;         |
|            |                                               | clear -> ABSENT                                         |
| PUBLISHING | publish.json                                  | recover -> PUBLISHED                                    |
| PUBLISHED  | the split, its manifest and record            | begin -> EXTENDING                                      |
| EXTENDING  | as PUBLISHED, and plan.json                   | begin (continue), commit; publish -> PUBLISHED;         |
|            |                                               | repair -> PUBLISHED; clear -> PUBLISHED                 |
| FOREIGN    | the split or its manifest without a record    | none: it is not this program's                          |

Nothing is checked here: it is the run that checks, between commit and publish. Order in each transition:

- commit: sync everything that the shards wrote, then journal them.
- publish: sync; write publish.json; then rename and record; then remove the unfinished run. With publish.json on the
  disk, whatever is under the final names is known to be this run's, so that a crash at any point is finished by
  `recover`. A split that is not there yet appears by one rename; classes that are added to a published one come in one
  by one, before the manifest that lists them.
- repair: each file is replaced by one rename of a whole and synced one.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from imagenet_unpack.errors import TargetError
from imagenet_unpack.model import Part, ShardDone, SplitName
from imagenet_unpack.targets import journal, manifest, records
from imagenet_unpack.targets.continuing import require_fragments, require_own_tree, require_same, require_same_work
from imagenet_unpack.targets.durable import Disk, copy_of
from imagenet_unpack.targets.locks import turn
from imagenet_unpack.targets.owner import Owner
from imagenet_unpack.targets.paths import SplitPaths
from imagenet_unpack.targets.records import PlanRecord, SplitRecord
from imagenet_unpack.targets.states import Found, State, look

log = logging.getLogger(__name__)


class Split:
    """One split of a target.

    Attributes:
        paths: where it is.
        disk: writes durably.
        found: what `look` found last.
        owner: this run's owner file, while it holds the split for writing.
    """

    def __init__(self, paths: SplitPaths, disk: Disk, *, boot_id: str = "") -> None:
        self.paths = paths
        self.disk = disk
        self.found = Found()
        self.owner: Owner | None = None
        self._boot_id = boot_id or records.boot_id()

    @property
    def state(self) -> State:
        """The state that `look` found last."""
        return self.found.state

    @property
    def record(self) -> SplitRecord | None:
        """Record of the published split, or None where none is published."""
        return self.found.record if self.found.published else None

    def look(self) -> State:
        """Look what is on the disk.

        Raises:
            TargetError: a record is damaged or a newer version's, or a link is in the way.
        """
        self.found = look(self.paths)
        return self.found.state

    def believed(self, record: SplitRecord | PlanRecord) -> bool:
        """Say whether what a record vouches for is on the disk: always, but for what was not synced in another boot."""
        return record.durability == "disk" or record.boot_id == self._boot_id

    def require_ours(self) -> None:
        """Make sure that nothing else has the split's names.

        Raises:
            TargetError: it is FOREIGN.
        """
        if self.state is State.FOREIGN:
            path = self.paths.published if self.found.published else self.paths.manifest
            raise TargetError(
                f"{path} exists but was not made by this program: move it away or choose another --target-dir"
            )

    def require_folder(self) -> None:
        """Make sure that the published split is a folder of the target, not a link out of it.

        Raises:
            TargetError: it is a link.
        """
        if self.paths.published.is_symlink():
            raise TargetError(f"{self.paths.published} is a symbolic link: nothing is added to what it leads to")

    def recover(self) -> None:
        """Finish what a crash interrupted: publishing that had begun, and deleting."""
        for doomed in sorted(self.paths.root.glob(f"{self.paths.split}.removing*")):
            self.disk.remove_tree(doomed)
        if self.found.intent is not None:
            self._finish_publishing(self.found.intent)
        elif self.found.plan is not None and not self.believed(self.found.plan):
            log.warning(
                "the unfinished run in %s was not synced before the host restarted: it starts again from the beginning",
                self.paths.home,
            )
            self.clear()
        self.look()

    def discard(self) -> None:
        """Throw the unfinished run away, also one whose records are damaged; finish it if it was being published.

        Raises:
            TargetError: its shards are all that is left of a consumed archive.
        """
        intent: SplitRecord | None = None
        with suppress(TargetError):
            intent = records.load(self.paths.intent, SplitRecord)
        if intent is None:
            self._require_source()
            self.clear()
        self.look()

    def _require_source(self) -> None:
        plan: PlanRecord | None = None
        with suppress(TargetError):
            plan = records.load(self.paths.plan, PlanRecord)
        if plan is not None and plan.consume and journal.read(self.paths.home, self.paths.split):
            raise TargetError(
                f"{self.paths.home} holds images whose bytes --consume freed in the archive: leave out --restart, or "
                f"remove {self.paths.home} yourself if you have the archive elsewhere"
            )

    def begin(self, plan: PlanRecord, *, part: Part, time_counts: bool = True) -> dict[str, ShardDone]:
        """Make the staging tree, or continue the unfinished run of the same plan; return the shards it has done.

        Args:
            plan: of all that is to be staged.
            part: the part of it that this run is to do.
            time_counts: an archive with another modification time is another archive.

        Raises:
            TargetError: the unfinished run was begun with something else.
        """
        with turn(self.paths.opening_lock):  # parts that start at once find or make one staging tree
            self.look()
            self.require_ours()
            self.require_folder()
            if self.record is not None and self.record.consumed and not self.disk.durable:
                raise TargetError(
                    f"{self.paths.published} holds images whose bytes --consume freed in the archive, so it must be "
                    "on the disk: leave out --durability none"
                )
            plan = replace(plan, durability="disk" if self.disk.durable else "none", boot_id=self._boot_id)
            return self._begin(plan, part, time_counts=time_counts)

    def _begin(self, plan: PlanRecord, part: Part, *, time_counts: bool) -> dict[str, ShardDone]:
        unfinished = self.found.plan
        if unfinished is not None and unfinished.repair and plan.repair and unfinished.shards != plan.shards:
            unfinished = None  # files were repaired or damaged since: what was staged is little, and is discarded
        if unfinished is not None and not (part.whole and (self._untouched() or not self.believed(unfinished))):
            return self._continue(unfinished, plan, part, time_counts=time_counts)
        self.clear()
        self.disk.make_folder(self.paths.tree)
        self.disk.make_folder(self.paths.fragments)
        records.save(self.disk, self.paths.plan, plan)
        self.disk.sync_folder(self.paths.root)
        self.look()
        return {}

    def _continue(
        self, unfinished: PlanRecord, plan: PlanRecord, part: Part, *, time_counts: bool
    ) -> dict[str, ShardDone]:
        home = self.paths.home
        require_same(
            self.paths,
            unfinished.identity,
            plan.identity,
            "give the same again to continue, or use --restart",
            time_counts=time_counts and not unfinished.consume,
        )
        require_same_work(home, unfinished, plan, part)
        if not part.whole and unfinished.parts != part.count:
            # What one run began may be finished in parts.
            records.save(self.disk, self.paths.plan, replace(plan, consume=unfinished.consume))
        require_own_tree(self.paths)
        consume = plan.consume or unfinished.consume
        if consume and not self.disk.durable:
            raise TargetError(
                f"the unfinished run in {home} holds images whose bytes --consume freed in the archive, so they must "
                "reach the disk: leave out --durability none"
            )
        if (unfinished.durability, unfinished.consume) != (plan.durability, consume):
            self.disk.sync_tree(home)
            records.save(self.disk, self.paths.plan, replace(plan, parts=unfinished.parts, consume=consume))
        done = journal.read(home, self.paths.split)
        require_fragments(self.paths, done)
        return done

    def _untouched(self) -> bool:
        """Say whether the unfinished run was given up before its first image."""
        with suppress(FileNotFoundError), os.scandir(self.paths.tree) as entries:
            return next(entries, None) is None
        return True

    def stage_manifest(self, shards: Iterable[str], class_indices: Mapping[str, int] | None = None) -> Path:
        """Merge the fragments of the staged shards into one manifest, for the check.

        Args:
            shards: their ids.
            class_indices: class index by wnid, where it was not known when the fragments were written.
        """
        streams: list[Iterator[bytes]] = manifest.part_streams(self.paths.fragment(shard) for shard in shards)
        if class_indices is not None:
            streams = [manifest.with_class_indices(stream, class_indices) for stream in streams]
        manifest.write(self.paths.staged_manifest, streams)
        return self.paths.staged_manifest

    def publish(self, record: SplitRecord) -> SplitRecord:
        """Give the checked staging tree its final name, or add its classes to the published split.

        Args:
            record: of the staged classes alone; its `manifest_xxh3` is computed here.

        Returns:
            The record of all that is published now.
        """
        self._require_owned()
        paths, before = self.paths, self.record
        streams = [manifest.rows(paths.staged_manifest)]
        if before is not None:
            if before.durability == "none":
                self.disk.sync_tree(paths.published)
            streams.append(manifest.rows(paths.manifest))
            record = replace(
                record,
                classes=tuple(sorted((*before.classes, *record.classes), key=lambda ref: ref.index)),
                consumed=before.consumed or record.consumed,
                images=before.images + record.images,
                size_bytes=before.size_bytes + record.size_bytes,
            )
        manifest.write(paths.new_manifest, streams)
        self.disk.sync_file(paths.new_manifest)
        self.disk.sync_all(paths.home)
        record = replace(
            record,
            manifest_xxh3=manifest.file_digest(paths.new_manifest),
            durability="disk" if self.disk.durable else "none",
            boot_id=self._boot_id,
        )
        records.save(self.disk, paths.intent, record)
        self._finish_publishing(record)
        return record

    def _finish_publishing(self, record: SplitRecord) -> None:
        paths, disk = self.paths, self.disk
        if paths.tree.exists() or copy_of(paths.tree).exists():
            with suppress(OSError):  # an empty folder that somebody made beforehand
                paths.published.rmdir()
            if os.path.lexists(paths.published):
                for staged in filter(os.path.lexists, (paths.tree, copy_of(paths.tree))):
                    disk.merge_folder(staged, paths.published)
                disk.sync_folder(paths.published)
                self._publish_manifest()
            else:
                self._publish_manifest()
                disk.move_folder(paths.tree, paths.published)
        self._publish_manifest()
        disk.sync_folder(paths.target)
        records.save(disk, paths.record, record)
        self.clear()
        self._remove_legacy_locks()
        disk.sync_all(paths.target)
        self.look()

    def _remove_legacy_locks(self) -> None:
        """Leave no folder behind: remove the lock files of version 0.1.0, of this split."""
        with suppress(OSError):
            for path in self.paths.legacy_locks.glob(f"{self.paths.split}.*"):
                path.unlink()
            self.paths.legacy_locks.rmdir()

    def _publish_manifest(self) -> None:
        if self.paths.new_manifest.exists():
            self.disk.rename(self.paths.new_manifest, self.paths.manifest)

    def repair(self, names: Iterable[str]) -> None:
        """Replace files of the published split by staged, committed and checked ones, and end the unfinished run.

        Args:
            names: `<class>/<image>`, each one in the manifest.
        """
        self._require_owned()
        folders = set()
        for name in names:
            to = self.paths.published / name
            folders.add(to.parent)
            self.disk.make_folder(to.parent)
            self.disk.rename(self.paths.tree / name, to)
        for folder in sorted(folders):
            self.disk.sync_folder(folder)
        self.disk.sync_folder(self.paths.published)
        self.clear()
        self.look()

    def believe(self) -> None:
        """Bring a split that was published without a sync and found whole to the disk, and note that down.

        Where the target cannot be written, it is synced all the same, and only the note is left out. Without durability
        asked for, what was published in this boot is left as it is.
        """
        if self.record is None or self.record.durability == "disk":
            return
        if self.disk.durable or not self.believed(self.record):
            self.disk.sync_tree(self.paths.published)
            self.disk.sync_file(self.paths.manifest)
            try:
                records.save(self.disk, self.paths.record, replace(self.record, durability="disk"))
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                    raise
            self.look()

    def unpublish(self) -> None:
        """Remove a published split that is not to be believed after another boot; ends as ABSENT."""
        doomed = self._doomed()
        self.disk.move_folder(self.paths.published, doomed)
        self.disk.remove(self.paths.manifest)
        self.disk.remove(self.paths.record)
        self.disk.remove_tree(doomed)
        self.look()

    def _doomed(self) -> Path:
        return self.paths.root / f"{self.paths.split}.removing-{secrets.token_hex(8)}"

    def clear(self) -> None:
        """Remove the unfinished run: all at once by its name, then file by file."""
        if os.path.lexists(self.paths.home):
            doomed = self._doomed()
            try:
                self.disk.rename(self.paths.home, doomed)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                # On a lower layer of an overlay: remove what makes it an unfinished run first.
                self.disk.remove(self.paths.intent)
                self.disk.remove(self.paths.plan)
                doomed = self.paths.home
            self.disk.remove_tree(doomed)

    def _require_owned(self) -> None:
        if self.owner is not None:
            self.owner.require()


def commit(done: Mapping[SplitName, tuple[Split, str, Sequence[ShardDone]]]) -> None:
    """Journal shards of one target, after a sync that covers all that they wrote.

    Args:
        done: by split name: the split, the name of the run's part, the shards.

    Raises:
        StoppedError: another run has taken the target over.
        OSError: the target failed; nothing is journaled that is not on the disk.
    """
    waiting = {name: each for name, each in done.items() if each[2]}
    if waiting:
        split, _, _ = next(iter(waiting.values()))
        split.disk.sync_all(split.paths.home)
    journal_synced(waiting)


def journal_synced(done: Mapping[SplitName, tuple[Split, str, Sequence[ShardDone]]]) -> None:
    """Journal shards that were done before a sync that has ended; arguments and errors as for `commit`."""
    for split, part, shards in done.values():
        split._require_owned()  # noqa: SLF001 - the functions that must see all splits of a target
        journal.append(split.disk, split.paths.home, part, shards)
