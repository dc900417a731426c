"""Find what would go wrong in a run before it does.

Rule 1: what the run decides is asked of the code that the run uses, not decided again.
Rule 2: nothing is made, removed or written, on disk or in a bucket, but for one small object where
        outputs go, which is removed again; nothing of the user's is run.
Rule 3: an error says that the run would fail, a warning that it may; both say what to do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shim.aws.endpoints import configured_endpoint_url
from shim.contract.command import resolve_argv
from shim.contract.errors import InvalidSettings, UsageError, UserSafeError
from shim.contract.settings import PREFIX, VARIABLES, Settings
from shim.contract.tasks import InferenceIO, InferenceTask, result_key, runtime_setup_key
from shim.files.descriptors import closing_descriptor, is_mount_point, open_directory
from shim.frozen import carried_bundle
from shim.http.errors import RemoteError
from shim.log.log import Log
from shim.process.process import MemoryEvents, start
from shim.process.scripts import find_fault
from shim.process.users import User, image_user, may_make_files, resolve_user
from shim.runner.user_command import resolve_spec
from shim.s3.client import S3Client
from shim.s3.errors import ServiceError
from shim.s3.store import Store

OK, WARNING, ERROR = "ok", "warning", "error"
LOG_LEVELS = {OK: "INFO", WARNING: "WARNING", ERROR: "ERROR"}

MIB = 1024 * 1024
FORBIDDEN = 403
MOST_INPUTS = 100
MOST_PREFIXES = 20
# What container engines give unless they are asked for more; podman's k is 1,000 bytes.
USUAL_SHARED_MEMORY_BYTES = 65_536_000
SHARED_MEMORY = Path("/dev/shm")
UNREADABLE = "check the key, and that the credentials may read it"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, as one line; `level` is OK, WARNING or ERROR."""

    level: str
    subject: str
    message: str

    def __str__(self) -> str:
        return f"{self.level:8} {self.subject:13} {self.message}"


@dataclass(frozen=True, slots=True)
class Situation:
    """What the run would start with; `read_tasks` is None where no task list is given.

    is_read_only: nothing is written into a bucket, not even for a moment.
    """

    settings: Settings
    environ: Mapping[str, str] = field(repr=False)
    connect: Callable[[Settings], Store]
    read_tasks: Callable[[Store], tuple[InferenceTask, ...]] | None = None
    is_read_only: bool = False

    @property
    def names_objects(self) -> bool:
        """Tell whether the run needs a bucket, as far as is known here."""
        return self.read_tasks is not None or self.settings.names_objects


def examine(
    environ: Mapping[str, str],
    *,
    cmd: tuple[str, ...],
    connect: Callable[[Settings], Store],
    read_tasks: Callable[[Store], tuple[InferenceTask, ...]] | None,
    is_read_only: bool = False,
) -> Iterator[Finding]:
    """Yield what every check finds.

    - cmd: replaces the image's entrypoint and command unless it is empty
    - connect, read_tasks: what the run would use; read_tasks is None where no list is given
    """
    settings = yield from check_variables(environ)
    if settings is None:
        yield Finding(WARNING, "variables", "nothing else is checked before these are valid")
        return
    if cmd:
        settings = replace(settings, entrypoint=None, cmd=cmd)
    situation = Situation(settings, environ, connect, read_tasks, is_read_only)
    for check in CHECKS:
        try:
            yield from check(situation)
        except (OSError, RemoteError) as error:
            subject = check.__name__.removeprefix("check_").replace("_", " ")
            yield Finding(ERROR, subject, f"could not be checked: {error}")


def write_finding(finding: Finding, log: Log) -> None:
    """Write a finding as a line for people, or as the shim's own line of its level."""
    line = replace(finding, message=" ".join(finding.message.splitlines()))
    _write(str(line), f"{line.subject}: {line.message}", LOG_LEVELS[line.level], log)


def write_verdict(findings: Sequence[Finding], log: Log) -> None:
    """Write how much was found, as the last line."""
    counts = [
        (sum(finding.level == level for finding in findings), level) for level in (ERROR, WARNING)
    ]
    verdict = ", ".join(f"{count} {level}{'s' * (count != 1)}" for count, level in counts)
    _write(verdict, verdict, "INFO", log)


def _write(text: str, message: str, level: str, log: Log) -> None:
    if log.is_text:
        log.write("stdout", f"{text}\n".encode("utf-8", "backslashreplace"))
    else:
        log.lines([message], level=level, internal=True, task=None)


def check_variables(environ: Mapping[str, str]) -> Generator[Finding, None, Settings | None]:
    """Look at every variable of the platform; return the settings when all are valid."""
    known = {variable.name for variable in VARIABLES.values()}
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            yield Finding(WARNING, "variables", f"{name!r} is not known: check how it is spelt")
    try:
        settings = Settings.from_environ(environ)
    except InvalidSettings as error:
        for problem in error.problems:
            yield Finding(ERROR, "variables", str(problem))
        return None
    for warning in settings.warnings:
        yield Finding(WARNING, "variables", warning)
    yield Finding(OK, "variables", f"{len(known & environ.keys())} are set, all valid")
    return settings


def check_privileges(_: Situation) -> Iterator[Finding]:
    """Look whether the shim may do what the platform lets it do."""
    if os.geteuid() == 0:
        yield Finding(OK, "privileges", "the shim runs as root")
    else:
        message = f"the shim runs as uid {os.geteuid()} and can neither switch users nor make the "
        message += "directories of the platform: start the container as root"
        yield Finding(WARNING, "privileges", message)


def check_user(situation: Situation) -> Iterator[Finding]:
    """Resolve the image's USER."""
    wanted = situation.settings.user
    try:
        user = resolve_user(wanted)
    except UserSafeError as error:
        message = f"{error}, found {wanted!r}: create it in the image, or name another"
        yield Finding(ERROR, "user", message)
        return
    groups = ", ".join(map(str, user.groups))
    message = f"{wanted!r} is uid {user.uid}, gid {user.gid}, groups {groups}, home {user.home!r}"
    if user == User():
        message = f"none is set: the command runs as uid {os.geteuid()}"
    yield Finding(OK, "user", message)


def check_argv(situation: Situation) -> Iterator[Finding]:
    """Join the image's ENTRYPOINT and CMD."""
    settings = situation.settings
    try:
        argv = resolve_argv(entrypoint=settings.entrypoint, cmd=settings.cmd)
        yield Finding(OK, "argv", f"{list(argv)}")
    except UserSafeError as error:
        yield Finding(ERROR, "argv", f"{error}: set one of them, or give a command after --")


def check_command(situation: Situation) -> Iterator[Finding]:
    """Have the kernel say whether it would execute the command as the user."""
    try:
        spec = resolve_spec(situation.settings, situation.environ)
    except UserSafeError:
        return  # said by the checks of its parts
    path = spec.env.get("PATH", os.defpath)
    try:
        trial = start(replace(spec, argv=spec.argv[:1], env={"PATH": path}, is_trial=True))
    except UserSafeError as error:
        yield Finding(ERROR, "command", str(error))
        return
    trial.end()
    for fd in (trial.stdout_fd, trial.stderr_fd):
        os.close(fd)
    machine = os.uname().machine
    message = f"the user may execute {spec.argv[0]!r}, a program for this machine ({machine})"
    yield Finding(OK, "command", message)
    if fault := find_fault(spec.argv, path=path, user=spec.user):
        yield Finding(ERROR, "command", fault)


def check_input(situation: Situation) -> Iterator[Finding]:
    """Look whether each task can have an empty input directory."""
    settings = situation.settings
    path = settings.input_path
    if not settings.use_linked_input or is_mount_point(path):
        # A link of the image's is replaced.
        obstacle = _find_obstacle(path.parent if path.is_symlink() else path)
        yield from _judge("input", path, obstacle, "is used in place")
        return
    parent = settings.linked_input_parent
    obstacle = _find_obstacle(path.parent) or _find_obstacle(parent)
    yield from _judge("input", path, obstacle, f"becomes a link to a directory below {parent}")


def check_output(situation: Situation) -> Iterator[Finding]:
    """Look whether each task can have an empty output directory, and write into it."""
    path = situation.settings.output_path
    obstacle = _find_obstacle(path)
    yield from _judge("output", path, obstacle, "can be emptied or made")
    user = _find_user(situation)
    if path.is_dir() and not may_make_files(path.stat(), user):
        advice = "remove it from the image, or let the user write into it (chmod)"
        message = f"{path} is there, and not writable for uid {user.uid}: {advice}"
        yield Finding(WARNING, "output", message)


def check_writable(situation: Situation) -> Iterator[Finding]:
    """Look at the writable directories, where the run only warns, and those of archives."""
    settings = situation.settings
    levels = dict.fromkeys(settings.writable_directories, WARNING)
    if settings.model is not None:
        levels[settings.model_dest] = ERROR
    if settings.ground_truth is not None:
        levels[settings.ground_truth_dest] = ERROR
    good = []
    for path, level in levels.items():
        if obstacle := _find_obstacle(path):
            yield Finding(level, "writable", f"{path} cannot be made writable: {obstacle}")
        else:
            good.append(str(path))
    if good:
        yield Finding(OK, "writable", f"can be made or are there: {', '.join(good)}")


def check_temporary(situation: Situation) -> Iterator[Finding]:
    """Look whether the command has a place for temporary files."""
    path = Path(situation.environ.get("TMPDIR") or "/tmp")
    user = _find_user(situation)
    is_made = path in situation.settings.writable_directories
    if path.is_dir() and (is_made or may_make_files(path.stat(), user)):
        free = os.statvfs(path)
        free_mib = free.f_bavail * free.f_frsize // MIB
        yield Finding(OK, "temporary", f"{path} has {free_mib} MiB free")
    elif not is_made:
        message = f"{path} is no directory that uid {user.uid} can write into"
        yield Finding(WARNING, "temporary", f"{message}: make it (chmod 1777), or set TMPDIR")


def check_shared_memory(_: Situation, path: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Look whether there is as much shared memory as containers usually have."""
    advice = "what shares memory, such as PyTorch's data loaders, fails; set --shm-size"
    if not path.is_dir():
        yield Finding(WARNING, "shared memory", f"{path} is missing: {advice}")
        return
    file_system = os.statvfs(path)
    size = file_system.f_blocks * file_system.f_frsize
    is_small = 0 < size < USUAL_SHARED_MEMORY_BYTES
    level, rest = (WARNING, f": {advice}") if is_small else (OK, "")
    yield Finding(level, "shared memory", f"{path} has {size // MIB} MiB{rest}")


def check_memory(situation: Situation, cgroup: MemoryEvents | None = None) -> Iterator[Finding]:
    """Compare the limit for the command with the memory of the machine and of the cgroup."""
    wanted_mib = situation.settings.max_memory_mb
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(machine, (cgroup or MemoryEvents()).read_limit_bytes() or machine)
    there = f"{limit // MIB} MiB that are there"
    if wanted_mib * MIB > limit:
        message = f"the limit of {wanted_mib} MiB is beyond the {there}: the kernel would end the "
        message += "command before it meets the limit; lower it, or take a larger machine"
        yield Finding(WARNING, "memory", message)
    elif wanted_mib:
        yield Finding(OK, "memory", f"the command may have {wanted_mib} MiB of the {there}")
    else:
        yield Finding(OK, "memory", f"no limit is set for the command, of the {there}")


def check_storage(situation: Situation) -> Iterator[Finding]:
    """Look at what reaches the buckets, then at the objects that are named."""
    settings, level = situation.settings, ERROR if situation.names_objects else WARNING
    store = situation.connect(settings)
    is_ready = True
    if isinstance(store, S3Client):
        for warning in store.warnings:
            yield Finding(WARNING, "storage", warning)
        yield _judge_authorities(store, situation, level)
        try:
            yield Finding(OK, "credentials", store.find_credentials())
        except RemoteError as error:
            is_ready = False
            yield Finding(level, "credentials", f"{error}: the run could reach no bucket")
    else:
        yield Finding(OK, "storage", "a directory: needs no network and no credentials")
    tasks = yield from _check_tasks(store, situation)
    if is_ready:
        inputs = [item for task in tasks for item in task.inputs]
        places = _places_of_results(settings, tasks)
        buckets = [place.bucket for place in (settings.model, settings.ground_truth) if place]
        buckets += [item.bucket_name for item in inputs]
        buckets += [bucket for bucket, _ in places]
        yield from _check_buckets(store, dict.fromkeys(buckets))
        if situation.is_read_only:
            yield Finding(OK, "outputs", "writing is not tried")
        else:
            yield from _check_writing(store, places)
        yield from _check_archives(store, settings)
        yield from _check_inputs(store, inputs)


CHECKS = (
    check_privileges,
    check_user,
    check_argv,
    check_command,
    check_input,
    check_output,
    check_writable,
    check_temporary,
    check_shared_memory,
    check_memory,
    check_storage,
)


def _judge_authorities(store: S3Client, situation: Situation, level: str) -> Finding:
    """Say what certificates are checked against; level: of a fault where TLS is needed."""
    url = configured_endpoint_url(situation.environ, {}, service="s3") or "https:"
    level = level if url.startswith("https:") else WARNING
    try:
        count = store.trust.context().cert_store_stats()["x509"]
    except RemoteError as error:
        return Finding(level, "authorities", f"{error}: name another in AWS_CA_BUNDLE")
    source = store.trust.source.replace(carried_bundle() or "\0", "those carried by this program")
    if count or os.path.isdir(source):
        return Finding(OK, "authorities", f"{count} certificates, read from {source}")
    advice = "install ca-certificates in the image, or name a bundle in AWS_CA_BUNDLE"
    return Finding(level, "authorities", f"no certificates, {store.trust.source}: {advice}")


def _check_archives(store: Store, settings: Settings) -> Iterator[Finding]:
    for subject, location in (("model", settings.model), ("ground truth", settings.ground_truth)):
        if location is not None:
            try:
                size = store.head(location.bucket, location.key).size
                yield Finding(OK, subject, f"{location} has {size} bytes")
            except ServiceError as error:
                yield Finding(ERROR, subject, f"{error}: {UNREADABLE}")
    places = settings.runtime_output_bucket_name, settings.runtime_output_prefix
    if all(places):
        yield Finding(OK, "set-up result", f"goes below {f's3://{places[0]}/{places[1]}'!r}")
    elif any(places):
        message = "goes nowhere: set both its bucket and its prefix, or neither"
        yield Finding(WARNING, "set-up result", message)


def _check_tasks(
    store: Store, situation: Situation
) -> Generator[Finding, None, tuple[InferenceTask, ...]]:
    """Return the tasks; none where no list is given, or it is not valid."""
    if situation.read_tasks is None:
        return ()
    try:
        tasks = situation.read_tasks(store)
        yield Finding(OK, "tasks", f"{len(tasks)} in the list, which is valid")
        return tasks
    except UsageError as error:
        for line in filter(None, str(error).splitlines()):
            yield Finding(ERROR, "tasks", line)
        return ()


def _check_buckets(store: Store, buckets: Iterable[str]) -> Iterator[Finding]:
    good = []
    for bucket in buckets:
        try:
            store.head_bucket(bucket)
            good.append(bucket)
        except ServiceError as error:
            if error.status == FORBIDDEN:
                message = f"{error}: the credentials may not list it, or it is somebody else's"
                yield Finding(WARNING, "buckets", message)
            else:
                yield Finding(ERROR, "buckets", f"{error}: check its name and its region")
    if good:
        yield Finding(OK, "buckets", f"are there: {', '.join(good)}")


def _check_writing(store: Store, places: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Write a small object where each result goes, and remove it again."""
    for bucket, prefix in places[:MOST_PREFIXES]:
        place = f"s3://{bucket}/{prefix}"
        try:
            store.probe(bucket, prefix)
            yield Finding(OK, "outputs", f"can be written below {place!r}")
        except ServiceError as error:
            if error.operation == "DeleteObject":  # which no run needs
                message = f"{error}: it was only there to see that it can be written; remove it"
                yield Finding(WARNING, "outputs", message)
            else:
                message = f"{error}: let the credentials write below {place!r}"
                yield Finding(ERROR, "outputs", message)
        except RemoteError as error:
            yield Finding(ERROR, "outputs", f"{error}: nothing could be written to {place!r}")
    if len(places) > MOST_PREFIXES:
        others = len(places) - MOST_PREFIXES
        yield Finding(OK, "outputs", f"the other {others} prefixes are not tried")


def _places_of_results(settings: Settings, tasks: Sequence[InferenceTask]) -> list[tuple[str, str]]:
    """Return the bucket and the prefix of each result, of the set-up and of the tasks."""
    keys = [(task.output_bucket_name, result_key(task.output_prefix)) for task in tasks]
    if settings.runtime_output_bucket_name and settings.runtime_output_prefix:
        key = runtime_setup_key(settings.runtime_output_prefix)
        keys.insert(0, (settings.runtime_output_bucket_name, key))
    places = [(bucket, f"{key.rpartition('/')[0]}/") for bucket, key in keys]
    return list(dict.fromkeys(places))


def _check_inputs(store: Store, inputs: list[InferenceIO]) -> Iterator[Finding]:
    looked_at = inputs[:MOST_INPUTS]
    found = 0
    for item in looked_at:
        if fault := _find_fault(store, item):
            yield fault
        else:
            found += 1
    others = len(inputs) - len(looked_at)
    rest = f"; the other {others} are not looked at" if others else ""
    if found:
        yield Finding(OK, "inputs", f"{found} of {len(looked_at)} can be read{rest}")


def _find_fault(store: Store, item: InferenceIO) -> Finding | None:
    """Say why an input cannot be downloaded, None when it can."""
    try:
        if not item.is_prefix:
            store.head(item.bucket_name, item.bucket_key)
        elif next(iter(store.list(item.bucket_name, item.bucket_key)), None) is None:
            place = f"s3://{item.bucket_name}/{item.bucket_key}"
            return Finding(WARNING, "inputs", f"nothing lies below {place!r}: check the prefix")
    except ServiceError as error:
        return Finding(ERROR, "inputs", f"{error}: {UNREADABLE}")
    return None


def _judge(subject: str, path: Path, obstacle: str, fate: str) -> Iterator[Finding]:
    """Say whether a directory that each task begins with can be had, and what it costs."""
    is_link = path.is_symlink()
    mounts = [] if is_link else _find_mounts(path)
    if obstacle:
        yield Finding(ERROR, subject, f"{path} cannot be made empty: {obstacle}")
    elif mounts:
        message = f"{path} cannot be made empty: {mounts[0]!r} is mounted in it; unmount it"
        yield Finding(ERROR, subject, message)
    elif path.is_dir() and not is_link and os.listdir(path):
        message = f"{path} is not empty: each task begins by emptying it"
        yield Finding(WARNING, subject, message)
    else:
        yield Finding(OK, subject, f"{path} {fate}")


def _find_obstacle(path: Path) -> str:
    """Say why a directory cannot be made or changed, and what to do; "" when it can."""
    try:
        directory = open_directory(path, follow=True)
    except FileNotFoundError:  # it is made, where a link leads to too
        return _find_obstacle(Path(os.path.realpath(path)).parent)
    except OSError:
        if not os.path.lexists(path):
            return _find_obstacle(path.parent)
        if path.is_symlink():
            return "it is a link; put a directory in its place"
        return f"{path} is not a directory; remove it from the image"
    with closing_descriptor(directory):
        here = f"/proc/self/fd/{directory}"
        if os.access(here, os.W_OK | os.X_OK):
            return ""
        if os.statvfs(here).f_flag & os.ST_RDONLY:
            return f"{path} is on a read-only file system; mount a writable one there"
    return f"{path} is not writable for uid {os.geteuid()}; start the container as root"


def _find_mounts(path: Path) -> list[str]:
    """Return what is mounted below a directory: proc(5), /proc/pid/mountinfo."""
    below = f"{os.path.realpath(path)}/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        points = [line.split(" ")[4] for line in lines]
    unescaped = [re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), p) for p in points]
    return [point for point in unescaped if point.startswith(below)]


def _find_user(situation: Situation) -> User:
    """Return who runs the command; ourselves where that is an error, said elsewhere."""
    try:
        return image_user(situation.settings)
    except UserSafeError:
        return User()
